"""Tap: one watch over all pods of a target, merged into one stream of objects until whoever asked goes away.

Each pod's proxy is asked by `Observe` with a share of the rate as its limit; the proxy ends the call when the limit is
reached, and it is asked again at the next second. Pods that come or go meanwhile join or leave. A proxy that cannot be
asked gives one notice, not the end of the watch: the others still have something to say.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from mantle.core.model import Pod, Snapshot
from mantle.gen.io.linkerd.proxy import tap_pb2
from mantle.viz.mesh import is_meshed
from mantle.viz.proxies import Unreachable
from mantle.viz.tap_events import TapQuery, event_object, limit_per_pod, observe_request, targets
from mantle.viz.world import World

WINDOW_SECONDS = 1.0
"""A proxy reports at most its share of requests in this time."""
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0)
MAX_DRAINING = 8
"""Earlier calls to one proxy that still wait for the ends of their requests (a gRPC stream may never end)."""
QUEUED_EVENTS = 1000
"""Beyond this a slow reader holds up the proxies' streams, which then drop events (and never slow traffic down)."""

Emit = Callable[[dict[str, Any]], Awaitable[None]]


class Observes(Protocol):
    """What tap needs of `proxies.Proxies`."""

    def observe(self, pod: Pod, request: tap_pb2.ObserveRequest) -> AsyncIterator[tap_pb2.TapEvent]: ...


class NothingToTap(Exception):
    """The target has no pod that could be watched. `fix` says what to do."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.message, self.fix = message, fix


def choose(world: World, query: TapQuery) -> list[Pod]:
    """The meshed pods to watch. Raises `NothingToTap` if there is none, with the reason."""
    snapshot = world.snapshot
    pods = targets(snapshot, query)
    meshed = [pod for pod in pods if is_meshed(pod)]
    watched = [pod for pod in meshed if pod.key != world.own]
    if watched:
        return watched
    if meshed:
        raise NothingToTap(f"{world.own} is who watches, and cannot watch itself", "choose another workload")
    where = f"namespace {query.target.namespace}" if query.target.namespace else "any namespace"
    if pods:
        names = ", ".join(str(pod.key) for pod in pods)
        raise NothingToTap(
            f"{len(pods)} {'pod' if len(pods) == 1 else 'pods'} found, but not in the mesh: {names}",
            "remove `mantle.dev/inject: disabled` and apply again",
        )
    raise NothingToTap(
        f"no pods to tap for type={query.target.kind} name={query.target.name} in {where}"
        + (" with the labels of -l" if query.selector else ""),
        # Not which namespaces there are: who asks may be allowed to see this one only.
        "choose the namespace with -n, or all with -A",
    )


async def watch(world: World, proxies: Observes, query: TapQuery, emit: Emit) -> None:
    """Emits events and notices until cancelled, or until `emit` raises."""
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue(QUEUED_EVENTS)
    async with asyncio.TaskGroup() as group:
        group.create_task(_manage(world, proxies, query, events, group))
        while True:
            await emit(await events.get())


def _can_be_watched(pod: Pod, world: World) -> bool:
    return is_meshed(pod) and pod.proxy_started and pod.key != world.own


async def _manage(
    world: World, proxies: Observes, query: TapQuery, events: asyncio.Queue[dict[str, Any]], group: asyncio.TaskGroup
) -> None:
    """Keeps one task for each pod of the target."""
    following: dict[str, asyncio.Task[None]] = {}
    snapshot: Snapshot | None = None
    while True:
        snapshot = await world.after(snapshot)
        pods = {pod.uid: pod for pod in targets(snapshot, query) if _can_be_watched(pod, world)}
        for uid in following.keys() - pods.keys():
            following.pop(uid).cancel()
        for uid in pods.keys() - following.keys():
            limit = limit_per_pod(query.max_rps, len(pods))
            following[uid] = group.create_task(_follow(world, proxies, query, pods[uid], limit, events))


async def _follow(
    world: World, proxies: Observes, query: TapQuery, pod: Pod, limit: int, events: asyncio.Queue[dict[str, Any]]
) -> None:
    """Asks one pod's proxy again and again."""
    loop = asyncio.get_running_loop()
    request = observe_request(query, limit)
    failures = 0
    draining: deque[asyncio.Task[Unreachable | None]] = deque()
    async with asyncio.TaskGroup() as group:
        while True:
            started = loop.time()
            full = asyncio.Event()
            asking = group.create_task(_observe(world, proxies, pod, request, events, full))
            asking.add_done_callback(lambda _, full=full: full.set())  # type: ignore[misc]
            await full.wait()
            if not asking.done():  # all requests are there, but some still run: their ends come beside the next ones
                draining.append(asking)
                if len(draining) > MAX_DRAINING:
                    draining.popleft().cancel()
                failure = None
            else:
                failure = asking.result()
            if failure is None:
                failures = 0
                pause = started + WINDOW_SECONDS - loop.time()
            else:
                if failures == 0:
                    await events.put({"notice": {"pod": str(pod.key), "message": str(failure)}})
                pause = RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)]
                failures += 1
            await asyncio.sleep(max(0.0, pause))


async def _observe(
    world: World,
    proxies: Observes,
    pod: Pod,
    request: tap_pb2.ObserveRequest,
    events: asyncio.Queue[dict[str, Any]],
    full: asyncio.Event,
) -> Unreachable | None:
    """One `Observe` until it ends; why it failed, if it did. Sets `full` when its last request has been seen."""
    left = request.limit
    try:
        async for event in proxies.observe(pod, request):
            await events.put(event_object(event, world.addresses.pods))
            left -= event.http.HasField("request_init")
            if left <= 0:
                full.set()
    except Unreachable as error:
        return error
    return None
