"""What viz asks of the cluster it serves: which front proxy to believe, and what a user may do.

The only file of viz that knows the Kubernetes API; `aggregated.py` and `tls.py` decide what follows. RBAC of viz
(`manifests/cluster/rbac.yml`) grants exactly these calls.
"""

from __future__ import annotations

import logging
import ssl
from typing import Any

import httpx2
import msgspec

from mantle.core import views
from mantle.core.views import Right
from mantle.platform.kubernetes.client import Client
from mantle.platform.kubernetes.reflector import Change, Reflector, Resource
from mantle.viz.aggregated import Denied, Unreviewed
from mantle.viz.front_proxy import CONFIG_MAP, NAMESPACE, BadConfiguration, User, parse
from mantle.viz.tls import Tls

log = logging.getLogger(__name__)

REVIEWS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"


class _Meta(msgspec.Struct):
    name: str = ""


class _ConfigMap(msgspec.Struct):
    metadata: _Meta = msgspec.field(default_factory=_Meta)
    data: dict[str, str] | None = None


class Cluster:
    """The cluster that `client` reaches."""

    def __init__(self, client: Client) -> None:
        self._http = client.http

    async def follow_front_proxy(self, tls: Tls) -> None:
        """Gives `tls` each front proxy that the cluster names; never ends. One that cannot be used changes nothing."""

        def changed(changes: tuple[Change[str, dict[str, str]], ...]) -> None:
            for change in changes:
                found = parse(change.now or {})
                if isinstance(found, BadConfiguration):
                    log.error("the API server cannot be told from others: %s", found)
                    continue
                try:
                    tls.believe(found)
                except ssl.SSLError as error:
                    log.error("ConfigMap %s/%s has a CA that cannot be read: %s", NAMESPACE, CONFIG_MAP, error)
                else:
                    log.info("requests come from the API server's front proxy as ConfigMap %s says", CONFIG_MAP)

        resource = Resource(
            path=f"/api/v1/namespaces/{NAMESPACE}/configmaps",
            raw=_ConfigMap,
            convert=lambda raw: (raw.metadata.name, raw.data or {}),
            instead=lambda sketch, known: (sketch.name, known.get(sketch.name)),
            params={"fieldSelector": f"metadata.name={CONFIG_MAP}"},
        )
        await Reflector(self._http, resource, changed).run()

    async def may(self, user: User, right: Right) -> Denied | None:
        """None: they may. Raises `Unreviewed`. https://kubernetes.io/docs/reference/access-authn-authz/authorization/"""
        try:
            response = await self._http.post(REVIEWS, json=review_of(user, right))
        except httpx2.HTTPError as error:
            raise Unreviewed(f"{type(error).__name__} {error}".rstrip()) from error
        if response.status_code >= 300:
            raise Unreviewed(f"the API server answered {response.status_code}: {response.text[:300]}")
        return answer_of(response.json())


def review_of(user: User, right: Right) -> dict[str, Any]:
    """The SubjectAccessReview that asks for a right."""
    attributes = {
        "group": views.GROUP,
        "version": views.VERSION,
        "verb": right.verb,
        "resource": right.resource,
        "subresource": right.subresource,
        "namespace": right.namespace,
        "name": right.name,
    }
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": user.name,
            "groups": list(user.groups),
            **({"uid": user.uid} if user.uid else {}),
            **({"extra": {key: list(values) for key, values in user.extra.items()}} if user.extra else {}),
            "resourceAttributes": {key: value for key, value in attributes.items() if value},
        },
    }


def answer_of(review: Any) -> Denied | None:
    """What a reviewed SubjectAccessReview says; anything but a clear yes is a no."""
    status = review.get("status") if isinstance(review, dict) else None
    if not isinstance(status, dict):
        return Denied("the review has no status")
    if status.get("allowed") is True and not status.get("denied"):
        return None
    return Denied(str(status.get("reason") or status.get("evaluationError") or ""))
