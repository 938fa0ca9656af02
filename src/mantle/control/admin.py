"""The admin server of a control-plane program: `/live`, `/ready` (with the reason why not) and `/metrics`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from mantle.platform.port import ConnectedPlatform


class PlatformCounts(Collector):
    """What a platform counts of its own work, as metrics."""

    def __init__(self, platform: ConnectedPlatform) -> None:
        self._platform = platform

    def collect(self) -> Iterable[Metric]:
        families: dict[str, CounterMetricFamily] = {}
        for count in self._platform.counts():
            labels = [name for name, _ in count.labels]
            family = families.setdefault(count.name, CounterMetricFamily(count.name, count.help, labels=labels))
            family.add_metric([value for _, value in count.labels], count.value)
        return families.values()


@asynccontextmanager
async def admin_server(
    address: tuple[str, int], registry: CollectorRegistry, not_ready: Callable[[], str]
) -> AsyncIterator[int]:
    """Serves until left; yields the port (useful with port 0). `not_ready` says what is missing, nothing if all is
    there.
    """

    async def live(_: web.Request) -> web.Response:
        return web.Response(text="live\n")

    async def ready(_: web.Request) -> web.Response:
        missing = not_ready()
        return web.Response(status=503 if missing else 200, text=f"not ready: {missing}\n" if missing else "ready\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"content-type": CONTENT_TYPE_PLAIN_1_0_0})

    app = web.Application()
    app.add_routes([web.get("/live", live), web.get("/ready", ready), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, *address)
        await site.start()
        bound: int = runner.addresses[0][1]
        yield bound
    finally:
        await runner.cleanup()
