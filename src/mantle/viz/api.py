"""viz's answers, and its API on one machine: HTTP and JSON on a Unix socket, which file permissions guard and which
the daemon relays. `aggregated.py` gives the same answers to a cluster's users.

`GET /v1/VIEW` for each of `Api.views`, `POST /v1/tap` (NDJSON until the client goes). Requests are parsed here, once,
with every mistake reported at once; answers are made by `edges`, `stat` and `tap`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from aiohttp import web

from mantle.core.selector import EVERYTHING, BadSelector
from mantle.core.selector import parse as parse_selector
from mantle.viz import edges, selected, stat, tap, tap_events
from mantle.viz.fields import BadRequest, Fields, View
from mantle.viz.scrape import Health
from mantle.viz.source import CERTIFICATE_CAME, CERTIFICATE_ENDS, MetricsSource, Traffic
from mantle.viz.world import World

EDGES_WINDOW_SECONDS = 300.0
STAT_WINDOW_SECONDS = 60.0
HEARTBEAT_SECONDS = 2.0
"""Between the empty lines of a tap: they show each relay on the way that its reader is gone, even without events."""
MAX_BODY_BYTES = 64 << 10


class HealthOf(Protocol):
    """Who knows how scraping goes: `scrape.Scraper`."""

    def health(self) -> Health: ...


class Api:
    """Answers from `source` and `world`; taps through `proxies`. `health` tells how scraping goes; `more` are views
    made elsewhere."""

    def __init__(
        self,
        world: World,
        source: MetricsSource,
        proxies: tap.Observes,
        health: HealthOf,
        more: Mapping[str, View] = MappingProxyType({}),
    ) -> None:
        self._world, self._source, self._proxies, self._health = world, source, proxies, health
        self.open_taps = 0
        self.views: Mapping[str, View] = {"edges": self.edges, "stat": self.stat, "summary": self.summary, **more}

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors])
        for name, view in self.views.items():
            app.router.add_get(f"/v1/{name}", _answering(view))
        app.router.add_post("/v1/tap", self._tap)
        return app

    async def edges(self, asked: Mapping[str, str]) -> dict[str, Any]:
        fields = Fields(asked)
        kind = fields.one_of("resource", edges.KINDS, default="deployment")
        namespace = fields.namespace()
        window = fields.window(EDGES_WINDOW_SECONDS)
        labels = fields.selector()
        fields.done()
        addresses = self._world.addresses
        traffic = selected.with_an_end(await self._source.traffic(window), addresses.pods, labels)
        control = self._world.own.namespace if self._world.own else "mantle"
        rows = edges.edge_rows(traffic, addresses, edges.EdgeQuery(kind, namespace, control))
        return {"edges": rows, "window_seconds": traffic.seconds}

    async def stat(self, asked: Mapping[str, str]) -> dict[str, Any]:
        fields = Fields(asked)
        kind = fields.one_of("resource", (*stat.KINDS, "all"))
        namespace = fields.namespace()
        window = fields.window(STAT_WINDOW_SECONDS)
        to, from_ = (_peer(fields, name, namespace or "default") for name in ("to", "from"))
        if to and from_:
            fields.wrong("to and from exclude each other", "leave one of them out")
        labels = fields.selector()
        fields.done()
        kinds = stat.ALL if kind == "all" else (kind,)
        queries = [stat.StatQuery(one, namespace, fields.text("name"), to, from_) for one in kinds]
        traffic = selected.measured_at(await self._source.traffic(window), self._world.addresses.pods, labels)
        snapshot = selected.snapshot_of(self._world.snapshot, labels)
        rows = [row for query in queries for row in stat.stat_rows(traffic, snapshot, query)]
        return {"rows": rows, "window_seconds": traffic.seconds}

    async def summary(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """What `check` and `demo` ask: every edge by its worst state, and how scraping goes."""
        fields = Fields(asked)
        namespace = fields.namespace() if fields.text("namespace") else None
        window = fields.window(EDGES_WINDOW_SECONDS)
        fields.done()
        traffic = await self._source.traffic(window)
        rows = edges.edge_rows(traffic, self._world.addresses, edges.EdgeQuery("deployment", namespace))
        rows = [row for row in rows if not row["control"]]
        health = self._health.health()
        return {
            "certificates": _certificates(traffic, namespace),
            "edges": rows,
            "secured": sum(not row["no_tls_reason"] for row in rows),
            "pods_seen": health.pods,
            "failing": {pod: why for pod, why in health.failing.items() if namespace in (None, pod.partition("/")[0])},
            "scrape_age_seconds": health.age_seconds,
        }

    async def _tap(self, request: web.Request) -> web.StreamResponse:
        return await self.tap(request, tap_query(await parse_body(request)))

    async def tap(self, request: web.Request, query: tap_events.TapQuery) -> web.StreamResponse:
        """The events of `query` until the client goes. Raises `tap.NothingToTap`."""
        tap.choose(self._world, query)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)

        async def emit(event: Mapping[str, Any]) -> None:
            await response.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")

        async def beat() -> None:
            while True:
                await asyncio.sleep(HEARTBEAT_SECONDS)
                await response.write(b"\n")

        self.open_taps += 1
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(beat())
                group.create_task(tap.watch(self._world, self._proxies, query, emit))
        except* ConnectionError:  # the client went: that is how a tap ends
            pass
        finally:
            self.open_taps -= 1
        return response


def _answering(view: View) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        return web.json_response(await view(request.query))

    return handle


def _peer(fields: Fields, name: str, namespace: str) -> stat.Peer | None:
    """`to=deployment/web`, with `to_namespace`."""
    kind, _, peer = fields.text(name).partition("/")
    if not kind:
        return None
    if kind not in stat.KINDS:
        fields.wrong(f"{name} is of kind {kind!r}", f"use one of: {', '.join(stat.KINDS)}")
    return stat.Peer(kind, peer, fields.text(f"{name}_namespace") or namespace)


async def parse_body(request: web.Request) -> Mapping[str, Any]:
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise BadRequest([("the body is not a JSON object", "send one")])
    return body


def tap_query(body: Mapping[str, Any]) -> tap_events.TapQuery:
    """The query of a tap. Raises `BadRequest` with everything that is wrong."""
    mistakes: list[tuple[str, str]] = []

    def target(name: str) -> tap_events.Target | None:
        value = body.get(name)
        if value is None and name == "to":
            return None
        fields = [value.get(field) or "" for field in ("kind", "name", "namespace")] if isinstance(value, dict) else []
        if len(fields) != 3 or not all(isinstance(field, str) for field in fields):
            mistakes.append((f"{name} is not a resource", 'send {"kind": …, "name": …, "namespace": …}'))
            return None
        if fields[0] not in tap_events.TARGET_KINDS:
            mistakes.append((f"{name} has kind {fields[0]!r}", f"use one of: {', '.join(tap_events.TARGET_KINDS)}"))
        everywhere = name == "target" and isinstance(value, dict) and value.get("all") is True
        if everywhere and fields[1]:
            mistakes.append((f"{fields[1]} of all namespaces is asked for", "name it, or ask for all; not both"))
        return tap_events.Target(fields[0], fields[1], "" if everywhere else fields[2] or "default")

    def text(name: str) -> str:
        value = body.get(name) or ""
        if not isinstance(value, str):
            mistakes.append((f"{name} is not text", "send a string"))
            return ""
        return value

    max_rps = body.get("max_rps")
    if max_rps is None:
        max_rps = tap_events.DEFAULT_MAX_RPS
    if isinstance(max_rps, bool) or not isinstance(max_rps, int | float) or not 0 < max_rps <= 1_000_000:
        mistakes.append((f"max_rps is {max_rps!r}", "send a number above 0"))
        max_rps = tap_events.DEFAULT_MAX_RPS
    of, to = target("target"), target("to")
    labels = parse_selector(text("selector"))
    if isinstance(labels, BadSelector):
        mistakes.append((str(labels), "give -l another selector"))
        labels = EVERYTHING
    query = tap_events.TapQuery(
        target=of or tap_events.Target("", "", ""),
        to=to,
        method=text("method"),
        path=text("path"),
        authority=text("authority"),
        scheme=text("scheme"),
        max_rps=float(max_rps),
        headers=bool(body.get("headers")),
        selector=labels,
    )
    if mistakes:
        raise BadRequest(mistakes)
    return query


def _certificates(traffic: Traffic, namespace: str | None) -> dict[str, dict[str, float]]:
    """By `namespace/pod`: when the certificate in force came and when it ends, Unix time; nothing before the first."""
    found: dict[str, dict[str, float]] = {}
    for family, name in ((CERTIFICATE_ENDS, "expires"), (CERTIFICATE_CAME, "refreshed")):
        for point in traffic.now(family):
            if point.value > 0 and namespace in (None, point.subject.namespace):
                found.setdefault(f"{point.subject.namespace}/{point.subject.pod}", {})[name] = point.value
    return found


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except BadRequest as error:
        return _failure(error.status, error.mistakes)
    except tap.NothingToTap as error:
        return _failure(404, [(error.message, error.fix)])
    except web.HTTPException as error:
        return _failure(error.status, [(f"{request.method} {request.path}: {error.reason}", "")])


def _failure(status: int, mistakes: list[tuple[str, str]]) -> web.Response:
    errors = [{"message": message, **({"fix": fix} if fix else {})} for message, fix in mistakes]
    return web.json_response({"errors": errors}, status=status)
