"""The admission webhook: HTTPS from the API server in, a decision of `core.admission` out, long before it gives up.

The Namespace is read for every pod, as it may have been annotated a moment ago; a workload's owner is remembered, as it
never changes. When the API is too slow for us, the owner falls back to the one the pod names. Without the Namespace, or
without the mesh's settings, nothing can be decided: the answer is an error, and the failurePolicy of the namespace
decides whether the pod runs without the mesh (Ignore) or not at all (Fail).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram

from mantle.control.injector_api import Api
from mantle.control.injector_events import Events
from mantle.core.admission import (
    OWNERS_ABOVE,
    Decision,
    NotAReview,
    Outcome,
    Owner,
    controller,
    decide,
    decide_service,
    pod_of,
)
from mantle.core.inject import OWNER_KINDS
from mantle.core.proxy_env import Values
from mantle.platform.kubernetes.calls import Refused, Unreachable
from mantle.platform.kubernetes.reading import anything

log = logging.getLogger(__name__)

LOOKUP = 3.0
"""Seconds each of the two look-ups, made side by side, may take. They take milliseconds, but where a busy API server is
given up too early, a pod starts in plaintext or is counted under a wrong name. The API server itself waits ten."""
LARGEST = 8 * 1024 * 1024
"""Bytes of a review: the API server's own limit for a request is 3 MiB."""
REMEMBERED = 10_000
"""Owners."""
SETTINGS = 5.0
"""Seconds between two looks at the mesh's settings and roots."""


class Settings:
    """The mesh's `Values`, as two ConfigMaps say; read again every few seconds. What cannot be used changes nothing."""

    def __init__(self, read: Callable[[], Awaitable[Values]]) -> None:
        self._read = read
        self.current: Values | None = None
        self.missing = "the mesh's settings have not been read yet"

    async def refresh(self) -> None:
        try:
            self.current = await self._read()
            self.missing = ""
        except (Refused, Unreachable, ValueError) as error:
            log.warning("the mesh's settings cannot be read: %s", error)
            if self.current is None:
                self.missing = f"the mesh's settings cannot be read: {error}"

    async def run(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(SETTINGS)


class Injector:
    def __init__(self, api: Api, settings: Settings, events: Events, registry: CollectorRegistry) -> None:
        self._api, self._settings, self._events = api, settings, events
        self._owners: OrderedDict[str, Owner] = OrderedDict()
        self._namespaces: OrderedDict[str, dict[str, Any]] = OrderedDict()
        common = ["owner_kind", "namespace", "annotation_at"]
        self._requests = Counter(
            "proxy_inject_admission_requests", "pods and services that were to be admitted", common, registry=registry
        )
        self._responses = Counter(
            "proxy_inject_admission_responses", "answers", [*common, "skip", "skip_reason"], registry=registry
        )
        self._seconds = Histogram(
            "mantle_injector_admission_seconds", "time to an answer", registry=registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
        )  # fmt: skip

    async def admit(self, review: Mapping[str, Any]) -> Decision:
        """Raises `NotAReview`, `Refused`, `Unreachable`, or `Unreachable` where the mesh's settings are not known."""
        subject = pod_of(review)
        if subject.kind == "Service":
            return self._told(review, decide_service(review, await self._namespace(subject.namespace)), None)
        values = self._settings.current
        if values is None:
            raise Unreachable(self._settings.missing)
        namespace, owner = await asyncio.gather(
            self._namespace(subject.namespace), self._owner(subject.namespace, subject.owner)
        )
        return self._told(review, decide(review, namespace, values, owner), owner)

    def _told(self, review: Mapping[str, Any], decision: Decision, owner: Owner | None) -> Decision:
        """The same decision, counted and told."""
        subject = decision.subject
        if decision.outcome is not Outcome.UNCHANGED and not decision.again:
            kind = owner.kind.lower() if owner else "service" if subject.kind == "Service" else ""
            common = (kind if kind in ("", "service", *OWNER_KINDS) else "other", subject.namespace, decision.asked_at)
            self._requests.labels(*common).inc()
            skip = str(decision.outcome is not Outcome.INJECTED).lower()
            self._responses.labels(*common, skip, ",".join(decision.reasons)).inc()
        if decision.note is not None:
            labels = ((review["request"].get("object") or {}).get("metadata") or {}).get("labels") or {}
            admitted = decision.outcome is not Outcome.REFUSED
            self._events.tell(subject, labels, decision.note, owner, admitted)
        return decision

    async def _namespace(self, name: str) -> dict[str, Any]:
        """The Namespace as it is now; as it was last, where the API does not answer in time."""
        try:
            async with asyncio.timeout(LOOKUP):
                found = await self._api.namespace(name)
        except (TimeoutError, Unreachable) as error:
            if name not in self._namespaces:
                raise Unreachable(f"namespace {name} is not known: {error or 'no answer in time'}") from error
            log.warning("namespace %s is taken as it was last: %s", name, error or "no answer in time")
            return self._namespaces[name]
        _remember(self._namespaces, name, found)
        return found

    async def _owner(self, namespace: str, direct: Owner | None) -> Owner | None:
        if direct is None or direct.kind not in OWNERS_ABOVE:
            return direct
        if direct.uid in self._owners:
            self._owners.move_to_end(direct.uid)
            return self._owners[direct.uid]
        try:
            async with asyncio.timeout(LOOKUP):
                metadata = await self._api.owner_references(namespace, direct)
        except (TimeoutError, Unreachable, Refused) as error:
            log.warning("owner of %s %s/%s: %s", direct.kind, namespace, direct.name, error or "no answer in time")
            return direct
        _remember(self._owners, direct.uid, owner := controller(metadata) or direct)
        return owner

    async def handle(self, request: web.Request) -> web.Response:
        """`POST /`. A decision has status 200; anything else makes the API server follow the failurePolicy."""
        with self._seconds.time():
            try:
                review = _read(await request.read())
                decision = await self.admit(review)
            except NotAReview as error:
                return web.Response(status=400, text=f"{error}\n")
            except (Refused, Unreachable) as error:
                log.error("no decision: %s", error)
                return web.Response(status=503, text=f"mantle-injector cannot decide: {error}\n")
            return web.json_response(decision.review)


def _read(body: bytes) -> Any:
    try:
        return anything(body)
    except ValueError as error:
        raise NotAReview(f"found no JSON: {error}") from error


def _remember(memory: OrderedDict[str, Any], key: str, value: Any) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)


def application(injector: Injector) -> web.Application:
    app = web.Application(client_max_size=LARGEST)
    app.add_routes([web.post("/", injector.handle)])
    return app
