"""viz's API as part of a cluster's own: `tap.mantle.dev/v1alpha1`, for users whom the cluster's RBAC lets see it.

Every request comes from the API server, which is known by its front proxy's certificate and says who asks. Each right
is asked for again here (SubjectAccessReview), so that the answer never depends on the path that led here. Namespaces
are those of the path, never of the query. Discovery needs a user, but no right. What is answered is made by `api.py`.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import web

from mantle.core import views
from mantle.core.views import Right
from mantle.viz.api import MAX_BODY_BYTES, Api, parse_body, tap_query
from mantle.viz.fields import BadRequest
from mantle.viz.front_proxy import FrontProxy, NotAuthenticated, User, user_of
from mantle.viz.tap import NothingToTap

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Denied:
    """The cluster's answer to a review that is a no, with its own words, if it had any."""

    why: str = ""


class Unreviewed(Exception):
    """The cluster could not be asked. The text says why; asking again may work."""


class Reviews(Protocol):
    """Who knows what a user may do: a cluster."""

    async def may(self, user: User, right: Right) -> Denied | None:
        """None: they may. Raises `Unreviewed`."""
        ...


class Believes(Protocol):
    """Who knows which API server to believe: `tls.Tls`."""

    @property
    def front_proxy(self) -> FrontProxy | None: ...

    def is_current(self, connection: ssl.SSLObject) -> bool:
        """Was this connection verified against the front proxy of now?"""
        ...


class Aggregated:
    """The aggregated API's application."""

    def __init__(self, api: Api, believes: Believes, reviews: Reviews) -> None:
        self._api, self._believes, self._reviews = api, believes, reviews

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors])
        root = views.ROOT
        app.router.add_get("/apis", self._discovery(_groups()))
        app.router.add_get(f"/apis/{views.GROUP}", self._discovery(_group()))
        app.router.add_get(root, self._discovery(_resources()))
        for view in self._api.views:
            app.router.add_get(f"{root}/{view}", self._view(view))
            app.router.add_get(f"{root}/namespaces/{{namespace}}/{view}", self._view(view))
        for method in ("GET", "POST"):
            app.router.add_route(method, f"{root}/watch/namespaces/{{namespace}}/{{plural}}/{{name}}/tap", self.tap)
            app.router.add_route(method, f"{root}/watch/{{plural}}/{views.ALL}/tap", self.tap)
        return app

    def _view(self, view: str) -> Any:
        async def handle(request: web.Request) -> web.Response:
            user = self._user(request)
            namespace = request.match_info.get("namespace")
            await self._require(user, views.view_right(view, namespace))
            asked = {k: v for k, v in request.query.items() if k not in ("namespace", "all")}
            asked |= {"all": "1"} if namespace is None else {"namespace": namespace}
            return web.json_response(await self._api.views[view](asked))

        return handle

    async def tap(self, request: web.Request) -> web.StreamResponse:
        user = self._user(request)
        kind = views.KIND_OF_PLURAL.get(request.match_info["plural"])
        if kind is None:
            raise web.HTTPNotFound
        name = request.match_info.get("name", views.ALL)
        name = "" if name == views.ALL else name
        namespace = request.match_info.get("namespace", "")
        right = views.tap_right(kind, name, namespace)
        if kind == "namespace" and name != namespace:
            raise BadRequest([(f"{right} is asked for {name or 'all'}", "name the same namespace twice in the path")])
        await self._require(user, right)
        body = await parse_body(request) if request.can_read_body else {}
        target = {"kind": kind, "name": name, "namespace": namespace, "all": not namespace}
        query = tap_query({**body, "target": target})
        log.info("%s watches %s", user.name, right)
        return await self._api.tap(request, query)

    def _discovery(self, document: Mapping[str, Any]) -> Any:
        async def handle(request: web.Request) -> web.Response:
            self._user(request)
            return web.json_response(document)

        return handle

    def _user(self, request: web.Request) -> User:
        """Who asks. Raises 401 for whoever does not come through the API server."""
        connection = request.get_extra_info("ssl_object")
        proxy = self._believes.front_proxy
        if proxy is None or connection is None or not self._believes.is_current(connection):
            raise _Refused(401, "Unauthorized", "this connection was made before the front proxy's CA was known", "")
        found = user_of(proxy, _common_name(connection), request.headers.items())
        if isinstance(found, NotAuthenticated):
            raise _Refused(401, "Unauthorized", str(found), "ask through the API server: `mantle` and `kubectl` do")
        return found

    async def _require(self, user: User, right: Right) -> None:
        try:
            denied = await self._reviews.may(user, right)
        except Unreviewed as error:
            fix = "ask again; `kubectl -n mantle logs deploy/mantle-viz` says more"
            raise _Refused(
                503, "ServiceUnavailable", f"the cluster did not say who may {right}: {error}", fix
            ) from error
        if denied is not None:
            message, fix = views.refusal(right, user.name, denied.why)
            log.info("refused: %s", message)
            raise _Refused(403, "Forbidden", message, fix)


class _Refused(Exception):
    """An answer that is a no."""

    def __init__(self, status: int, reason: str, message: str, fix: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.fix = status, reason, message, fix


def _common_name(connection: ssl.SSLObject) -> str | None:
    """Of the client's certificate, which TLS has verified; None: it showed none."""
    certificate = connection.getpeercert()
    if not certificate:
        return None
    subject: Any = certificate.get("subject", ())
    return next((str(value) for part in subject for name, value in part if name == "commonName"), "")


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except _Refused as error:
        refused = _status(error.status, error.reason, [(error.message, error.fix)])
        if error.status == 401:
            refused.force_close()  # who comes again is verified anew, against the front proxy of then
        return refused
    except BadRequest as error:
        reason = "BadRequest" if error.status == 400 else "ServiceUnavailable"
        return _status(error.status, reason, error.mistakes)
    except NothingToTap as error:
        return _status(404, "NotFound", [(error.message, error.fix)])
    except web.HTTPException as error:
        return _status(
            error.status, "NotFound" if error.status == 404 else "", [(f"{request.path}: {error.reason}", "")]
        )


def _status(status: int, reason: str, mistakes: list[tuple[str, str]]) -> web.Response:
    """A `Status`, which kubectl understands, with our `errors` beside it, which `mantle` does."""
    lines = [f"{message}\n  fix: {fix}" if fix else message for message, fix in mistakes]
    errors = [{"message": message, **({"fix": fix} if fix else {})} for message, fix in mistakes]
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "; ".join(lines),
        "reason": reason,
        "code": status,
        "errors": errors,
    }
    return web.json_response(body, status=status)


# ---- discovery ----

_VERSION = {"groupVersion": f"{views.GROUP}/{views.VERSION}", "version": views.VERSION}


def _group() -> dict[str, Any]:
    return {
        "kind": "APIGroup",
        "apiVersion": "v1",
        "name": views.GROUP,
        "versions": [_VERSION],
        "preferredVersion": _VERSION,
    }


def _groups() -> dict[str, Any]:
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group()]}


def _resources() -> dict[str, Any]:
    # Without the resources themselves kubectl does not know what their subresource is of; they have no verb.
    parents = [
        {"name": plural, "singularName": "", "namespaced": True, "kind": "Tap", "verbs": []}
        for plural in sorted(views.KIND_OF_PLURAL)
    ]
    taps = [
        {"name": f"{plural}/tap", "singularName": "", "namespaced": True, "kind": "Tap", "verbs": ["watch"]}
        for plural in sorted(views.KIND_OF_PLURAL)
    ]
    lists = [
        {"name": view, "singularName": view, "namespaced": True, "kind": view.capitalize(), "verbs": ["list"]}
        for view in views.VIEWS
    ]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{views.GROUP}/{views.VERSION}",
        "resources": [*lists, *parents, *taps],
    }
