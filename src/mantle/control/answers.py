"""How destination and policy answer: who asks, the live topic, messages as they become due. Both services are made of
this.

A stream is: wait until the platform has spoken → check the caller → write what leads to each newer state. Writing waits
while the client's window is shut; a client that takes nothing for `STUCK` seconds is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc.aio
from prometheus_client import CollectorRegistry, Counter, Gauge

from mantle.control.topics import Topics
from mantle.core.callers import Caller, CallerDenied, Presented, check_caller, parse_workload
from mantle.core.model import Key
from mantle.core.reasons import CallerRefused
from mantle.core.world import Tag, World

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

FIRST_SNAPSHOT = 2.5
"""Seconds a call waits for the platform's first word: below the 3 s after which proxies give a stream up."""
STUCK = 60.0
"""Seconds a client may keep its window shut."""

_STATUS = {
    CallerRefused.ANONYMOUS: grpc.StatusCode.UNAUTHENTICATED,
    CallerRefused.BAD_WORKLOAD: grpc.StatusCode.INVALID_ARGUMENT,
    # Retried by every proxy: a pod may ask before the platform's word of it has come here.
    CallerRefused.UNKNOWN_WORKLOAD: grpc.StatusCode.UNAVAILABLE,
    CallerRefused.OTHER_WORKLOAD: grpc.StatusCode.PERMISSION_DENIED,
}


@dataclass(frozen=True, slots=True)
class Status:
    """An answer that is no message."""

    code: grpc.StatusCode
    text: str


class Metrics:
    """What is counted of the calls."""

    def __init__(self, registry: CollectorRegistry, topics: Topics) -> None:
        self.calls = Counter(
            "mantle_discovery_calls", "Calls by method and how they ended.", ["method", "result"], registry=registry
        )
        self.messages = Counter("mantle_discovery_messages", "Messages sent on streams.", ["method"], registry=registry)
        live = Gauge("mantle_discovery_topics", "Things that somebody asks about.", registry=registry)
        live.set_function(lambda: topics.counts()[0])
        streams = Gauge("mantle_discovery_streams", "Open streams.", registry=registry)
        streams.set_function(lambda: topics.counts()[1])
        version = Gauge("mantle_discovery_snapshot_version", "Platform snapshots taken in.", registry=registry)
        version.set_function(lambda: topics.world.snapshot.version)


@dataclass(frozen=True, slots=True)
class Answers:
    """Everything a method needs to answer a call."""

    topics: Topics
    metrics: Metrics
    own_pod: Key | None
    allow_anonymous: bool
    optional_tls: bool = False

    async def admit(self, context: Context, method: str, workload: str) -> Key | None:
        """Waits for the first snapshot and checks the caller; the pod it speaks for. Aborts the call otherwise."""
        if not self.topics.known.is_set():
            try:
                async with asyncio.timeout(FIRST_SNAPSHOT):
                    await self.topics.known.wait()
            except TimeoutError:
                await self.abort(
                    context, method, Status(grpc.StatusCode.UNAVAILABLE, "the platform has not spoken yet")
                )
        caller = self._caller(context, workload)
        if isinstance(caller, CallerDenied):
            await self.abort(context, method, Status(_STATUS[caller.reason], str(caller)), caller.reason)
        return caller.workload

    def _caller(self, context: Context, workload: str) -> Caller | CallerDenied:
        named = parse_workload(workload) if workload else None
        if isinstance(named, CallerDenied):
            return named
        return check_caller(
            self.topics.world, presented(context), named, self.own_pod, self.allow_anonymous, self.optional_tls
        )

    async def abort(self, context: Context, method: str, status: Status, label: str = "") -> NoReturn:
        """Ends the call with a status. `label` is what is counted, the code's name by default."""
        self.metrics.calls.labels(method, label or status.code.name.lower()).inc()
        await context.abort(status.code, status.text)
        raise AssertionError("abort does not return")

    async def stream(
        self,
        context: Context,
        method: str,
        key: Hashable,
        compute: Callable[[World], T],
        encode: Callable[[T | None, T], tuple[bytes, ...]],
        refuse: Callable[[T], Status | None],
        tags: tuple[Tag, ...],
    ) -> None:
        """Answers `context` with the topic `key` while the caller listens. `refuse` names values that end it, `tags`
        what the answer depends on.
        """
        sent = None
        sender = self.metrics.messages.labels(method)
        with self.topics.read((method, key), compute, encode, tags) as reader:
            async for now in reader.states():
                refusal = refuse(now.value)
                if refusal is not None:
                    await self.abort(context, method, refusal)
                if sent is None:
                    self.metrics.calls.labels(method, "ok").inc()
                for message in reader.topic.messages(sent, now):
                    try:
                        async with asyncio.timeout(STUCK):
                            await context.write(message)
                    except TimeoutError:
                        self.metrics.calls.labels(method, "stuck").inc()
                        # A status cannot be sent behind a message that waits: ending as cancelled is all grpc offers.
                        raise asyncio.CancelledError from None
                    sender.inc()
                sent = now

    async def once(
        self,
        context: Context,
        method: str,
        compute: Callable[[World], T],
        encode: Callable[[T | None, T], tuple[bytes, ...]],
        refuse: Callable[[T], Status | None],
    ) -> bytes:
        """The same, as a single answer."""
        value = compute(self.topics.world)
        refusal = refuse(value)
        if refusal is not None:
            await self.abort(context, method, refusal)
        self.metrics.calls.labels(method, "ok").inc()
        return encode(None, value)[0]


def presented(context: Context) -> Presented:
    """What our sidecar says about the caller, and where the connection itself comes from."""
    client_id = next((str(value) for name, value in context.invocation_metadata() or () if name == "l5d-client-id"), "")
    return Presented(client_id, peer_address(context) in ("127.0.0.1", "::1"))


def peer_address(context: Context) -> str:
    """The IP of the connection's other end; empty for a Unix socket. grpc writes `ipv4:1.2.3.4:5` and
    `ipv6:%5B::1%5D:5`.
    """
    family, _, rest = context.peer().partition(":")
    if family not in ("ipv4", "ipv6"):
        return ""
    return rest.rpartition(":")[0].removeprefix("%5B").removesuffix("%5D").removeprefix("[").removesuffix("]")
