"""Events on the cluster's objects, written behind the back of those who tell them.

`tell` never waits and never fails: what comes faster than a person reads, or while the API server is away, is counted
and dropped. Limits are per object and reason, as in Kubernetes' own event recorder, and for all together.
https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx2

from mantle.core.ratelimit import Limited, RateLimiter
from mantle.platform.kubernetes.client import NO_ANSWER, Client
from mantle.platform.kubernetes.reading import anything
from mantle.platform.port import Event

log = logging.getLogger(__name__)

PER_OBJECT = (1 / 60, 10)
"""Events a second on average, and at once, about one object for one reason."""
TOGETHER = (10.0, 100)
"""The same for everything."""
WAITING = 500
"""Events that wait to be written at most."""
API_VERSIONS = {"Deployment": "apps/v1"}
PLURALS = {"Deployment": "deployments"}


class EventWriter:
    """Writes events as `component`. `uid_of` finds an object's uid, empty if it is not known."""

    def __init__(self, client: Client, component: str, uid_of: Callable[[Event], str] = lambda _: "") -> None:
        self._client, self._component, self._uid_of = client, component, uid_of
        self._each = RateLimiter(*PER_OBJECT)
        self._all = RateLimiter(*TOGETHER)
        self._queue: deque[dict[str, Any]] = deque()
        self._work = asyncio.Event()
        self._complaint = 0
        self._uids: dict[str, str] = {}
        self.outcomes: Counter[str] = Counter()
        """How many were `written`, dropped as `limited` or `full`, or refused by the API server (`failed`)."""

    def tell(self, event: Event) -> None:
        """Takes an event to be written soon, or counts why it will not be."""
        ticks = time.monotonic()
        about = f"{event.reason} {event.kind}/{event.namespace}/{event.name}"
        if isinstance(self._each.admit(about, ticks), Limited) or isinstance(self._all.admit("", ticks), Limited):
            self.outcomes["limited"] += 1
        elif len(self._queue) >= WAITING:
            self.outcomes["full"] += 1
        else:
            self._queue.append(body(event, self._component, self._uid_of(event), datetime.now(UTC), time.time_ns()))
            self._work.set()

    async def run(self) -> None:
        """Writes what was told, for ever."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self._queue:
                await self._write(self._queue.popleft())

    async def _write(self, event: dict[str, Any]) -> None:
        try:
            await self._add_uid(event["involvedObject"])
            path = f"/api/v1/namespaces/{event['metadata']['namespace']}/events"
            response = await self._client.http.post(path, json=event)
            response.raise_for_status()
        except NO_ANSWER as error:
            self.outcomes["failed"] += 1
            status = error.response.status_code if isinstance(error, httpx2.HTTPStatusError) else 0
            if status != self._complaint:
                log.warning("events cannot be written (%s %s); they are in the log and counted", status or "", error)
            self._complaint = status
        else:
            self.outcomes["written"] += 1
            self._complaint = 0

    async def _add_uid(self, about: dict[str, str]) -> None:
        """An object that is not followed is asked for, once: without its uid `kubectl describe` finds no event."""
        if "uid" in about or about["kind"] not in PLURALS:
            return
        group, plural = about["apiVersion"], PLURALS[about["kind"]]
        path = f"/apis/{group}/namespaces/{about['namespace']}/{plural}/{about['name']}"
        if path not in self._uids:
            response = await self._client.http.get(path)
            found = anything(response.content) if response.status_code == 200 else {"metadata": {"uid": ""}}
            self._uids[path] = found["metadata"]["uid"]
        if uid := self._uids[path]:
            about["uid"] = uid


def body(event: Event, component: str, uid: str, now: datetime, unique: int) -> dict[str, Any]:
    """The API's object. `unique` is a number that no other event of this object has."""
    about = {
        "kind": event.kind,
        "apiVersion": API_VERSIONS.get(event.kind, "v1"),
        "namespace": event.namespace,
        "name": event.name,
    }
    at = f"{now:%Y-%m-%dT%H:%M:%SZ}"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{event.name[:230]}.{unique:x}", "namespace": event.namespace},
        "involvedObject": about | ({"uid": uid} if uid else {}),
        "reason": event.reason,
        "message": event.message[:1024],
        "type": "Warning" if event.warning else "Normal",
        "source": {"component": component},
        "reportingComponent": component,
        "reportingInstance": component,
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }
