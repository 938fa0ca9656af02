"""The embedded scraper: asks every meshed pod's proxy each interval and keeps what it learns in the window.

It is the `MetricsSource` of a mesh without Prometheus. A pod that does not answer is remembered with the reason, and
holds up nobody: each question has its own time limit, and a round ends when all have answered or failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from mantle.core.model import Pod
from mantle.gen.mantle.v1 import edges_pb2
from mantle.viz.mesh import subject_of
from mantle.viz.promtext import Reader, Series
from mantle.viz.proxies import Unreachable
from mantle.viz.source import CLIENTS_OPEN, CLIENTS_TOTAL, COUNTERS, GAUGES, Traffic
from mantle.viz.window import Window
from mantle.viz.world import World

INTERVAL_SECONDS = 2.0
AT_ONCE = 16
"""Pods asked at the same time: a round over many pods must not starve tap and the API."""
DESTINATION_ADMIN_PORT = 9996


class Asks(Protocol):
    """What the scraper needs of `proxies.Proxies`."""

    async def metrics(self, pod: Pod, port: int = ...) -> str: ...
    async def clients(self, pod: Pod) -> list[edges_pb2.Edge]: ...
    async def keep_only(self, uids: set[str]) -> None: ...


@dataclass(frozen=True, slots=True)
class Health:
    """How the last round went. `failing`: reasons by `namespace/pod`; `age_seconds` None before the first round."""

    pods: int
    failing: dict[str, str]
    age_seconds: float | None


class Scraper:
    """`clock` gives seconds of a monotonic clock."""

    def __init__(
        self,
        world: World,
        proxies: Asks,
        clock: Callable[[], float],
        *,
        control_namespace: str = "mantle",
        interval: float = INTERVAL_SECONDS,
    ) -> None:
        self._world, self._proxies, self._clock = world, proxies, clock
        self._control_namespace, self._interval = control_namespace, interval
        self._window = Window(clock())
        self._reader = Reader((*COUNTERS, *GAUGES))
        self._there_before: set[str] | None = None
        self._failing: dict[str, str] = {}
        self._asked = 0
        self._last_round: float | None = None

    async def run(self) -> None:
        """Scrapes for ever, one round each interval; a long round delays the next instead of overlapping it."""
        await self._world.after(None)
        while True:
            started = self._clock()
            await self.round()
            await asyncio.sleep(max(0.0, started + self._interval - self._clock()))

    async def round(self) -> None:
        """Asks every proxy once, and destination's admin port, so that the control plane's own links stay in use."""
        pods = self._world.proxies()
        if self._there_before is None:
            self._there_before = {pod.uid for pod in pods}
        failing: dict[str, str] = {}
        turn = asyncio.Semaphore(AT_ONCE)

        async def ask(pod: Pod) -> None:
            async with turn:
                try:
                    await self._ask(pod)
                except Unreachable as error:
                    failing[str(pod.key)] = str(error)

        async with asyncio.TaskGroup() as group:
            for pod in pods:
                group.create_task(ask(pod))
        alive = {pod.uid for pod in pods}
        self._window.keep_only({f"{uid}/{origin}" for uid in alive for origin in ("metrics", "clients")})
        await self._proxies.keep_only(alive)
        self._failing, self._asked, self._last_round = failing, len(pods), self._clock()

    async def _ask(self, pod: Pod) -> None:
        subject, new = subject_of(pod), pod.uid not in (self._there_before or ())
        scrape = self._reader.read(await self._proxies.metrics(pod))
        self._window.observe(self._clock(), f"{pod.uid}/metrics", subject, scrape.samples, new=new)
        if pod.key == self._world.own:
            return
        clients = samples_of(await self._proxies.clients(pod))
        self._window.observe(self._clock(), f"{pod.uid}/clients", subject, clients, new=new)
        if pod.key.namespace == self._control_namespace and pod.owner.name == "mantle-destination":
            await self._proxies.metrics(pod, DESTINATION_ADMIN_PORT)

    async def traffic(self, window_seconds: float) -> Traffic:
        """`MetricsSource.traffic`."""
        traffic = self._window.read(self._clock(), window_seconds)
        return replace(traffic, age_seconds=self.health().age_seconds)

    def health(self) -> Health:
        age = None if self._last_round is None else self._clock() - self._last_round
        return Health(self._asked, dict(self._failing), age)

    @property
    def entries(self) -> int:
        """How many numbers the window holds."""
        return self._window.entries


def samples_of(rows: list[edges_pb2.Edge]) -> dict[Series, float]:
    """A proxy's table of clients as samples: its totals as counters, its open connections as gauges."""
    samples: dict[Series, float] = {}
    for row in rows:
        match row.WhichOneof("tls"):
            case "client_id":
                tls = (("client_id", row.client_id), ("tls", "true"))
            case "no_tls_reason":
                tls = (("no_tls_reason", row.no_tls_reason), ("tls", "no_identity"))
            case "passthru_sni":
                tls = (("sni", row.passthru_sni), ("tls", "opaque"))
            case None:
                tls = (("client_id", ""), ("tls", ""))
        labels = tuple(sorted((("client_ip", row.client_ip), ("port", str(row.port)), *tls)))
        for family, value in ((CLIENTS_TOTAL, row.total), (CLIENTS_OPEN, row.open)):
            series = Series(family, labels)
            samples[series] = samples.get(series, 0.0) + value
    return samples
