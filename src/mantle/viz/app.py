"""The viz component: its flags, and the wiring of platform, scraper, tap, API and admin port. No logic.

Run as `python -m mantle.control_plane viz …` in the pod `mantle-viz`. Its sidecar makes every call to another pod
mutual TLS, with the one identity that proxies let tap.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mantle.core.model import Key
from mantle.core.names import BadName, MeshNames, mesh_names
from mantle.platform.port import Platform
from mantle.platform.remote import RemotePlatform
from mantle.viz.api import Api
from mantle.viz.discovery import Discovery
from mantle.viz.observer import Observer
from mantle.viz.pod_views import PodViews
from mantle.viz.proxies import Proxies
from mantle.viz.router import router_addresses
from mantle.viz.scrape import INTERVAL_SECONDS, Scraper
from mantle.viz.world import World

log = logging.getLogger("mantle.viz")


@dataclass(frozen=True, slots=True)
class Options:
    """The parsed command line."""

    admin_host: str
    admin_port: int
    platform: Path | None
    """The platform's socket; None: a Kubernetes cluster."""
    api: Path
    names: MeshNames
    interval: float
    router: tuple[str, ...]
    pod: str
    """The name of the pod this runs in."""
    aggregated: tuple[str, int] = ("0.0.0.0", 8089)
    """Where the API server finds the aggregated API of a cluster."""
    kubeconfig: Path | None = None
    """How to reach the cluster from outside it; None: as the pod this runs in."""
    cluster_domain: str = "cluster.local"
    """What service names end in."""
    tls_optional: Path | None = None
    """Where viz's certificate of the experimental mode is mounted."""
    dns_names: tuple[str, ...] = ()
    """What else than the Service's name the API server may call us."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs viz until SIGTERM or SIGINT. Exit code 2 for a bad command line."""
    options = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells of each request
    asyncio.run(_main(options))


async def _main(options: Options) -> None:
    if options.platform is None:
        from mantle.viz.on_cluster import on_cluster

        async with on_cluster(options) as (platform, serve):
            await run(options, platform, serve)
    else:
        async with RemotePlatform(options.platform) as platform:
            await run(options, platform, partial(_serve_on_machine, options))


Serve = Callable[[contextlib.AsyncExitStack, asyncio.TaskGroup, Api, CollectorRegistry], Awaitable["Part"]]
"""Serves the API until the stack is left, with tasks of its own."""


@dataclass(frozen=True, slots=True)
class Part:
    """What serves the API: tasks to end with the component, and why it is not ready (empty: it is)."""

    tasks: tuple[asyncio.Task[None], ...] = ()
    not_ready: Callable[[], str] = str


async def _serve_on_machine(
    options: Options, servers: contextlib.AsyncExitStack, _: asyncio.TaskGroup, api: Api, __: CollectorRegistry
) -> Part:
    await _serve_socket(servers, api.application(), options.api)
    return Part()


def parse(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="viz", description="Scrapes proxies; serves stat, edges and tap.")
    parser.add_argument("--admin", default="0.0.0.0:9995", metavar="IP:PORT", help="/ready, /live and /metrics")
    parser.add_argument("--platform", required=True, metavar="unix:/PATH", help="or `kubernetes`")
    parser.add_argument(
        "--api", type=Path, metavar="PATH", help="the API's socket (default: viz.sock beside --platform)"
    )
    parser.add_argument("--control-namespace", default="mantle")
    parser.add_argument("--trust-domain", default="cluster.local")
    parser.add_argument("--cluster-domain", default="cluster.local", help="what service names end in")
    parser.add_argument("--networks", default="", metavar="CIDR,…", help="the mesh's networks")
    parser.add_argument("--scrape-interval", type=float, default=INTERVAL_SECONDS, metavar="SECONDS")
    parser.add_argument("--router-ip", action="append", metavar="IP", help="where probes come from (default: found)")
    parser.add_argument("--listen", default="0.0.0.0:8089", metavar="IP:PORT", help="HTTPS, for a cluster's API server")
    parser.add_argument("--kubeconfig", type=Path, metavar="FILE", help="how to reach a cluster from outside it")
    parser.add_argument("--dns-name", action="append", default=[], help="what else the API server may call us")
    parser.add_argument("--tls-optional", type=Path, metavar="DIR", help="viz's Secret of the experimental mode")
    parser.add_argument("--pod", default=socket.gethostname(), metavar="NAME", help="this pod (default: the host name)")
    args = parser.parse_args(argv)
    names = mesh_names(args.control_namespace, args.trust_domain)
    host, _, port = args.admin.rpartition(":")
    listen_host, _, listen_port = args.listen.rpartition(":")
    platform = None if args.platform == "kubernetes" else Path(args.platform.removeprefix("unix:"))
    if isinstance(names, BadName):
        parser.error(str(names))
    for flag, text, number in (("--admin", args.admin, port), ("--listen", args.listen, listen_port)):
        if not number.isdecimal():
            parser.error(f"{flag} {text}: wanted IP:PORT")
    if args.scrape_interval <= 0:
        parser.error("--scrape-interval must be above 0")
    return Options(
        admin_host=host.strip("[]"),
        admin_port=int(port),
        platform=platform,
        api=args.api or (platform or Path("viz.sock")).with_name("viz.sock"),
        names=names,
        interval=args.scrape_interval,
        router=tuple(args.router_ip or router_addresses(name_server=platform is not None)),
        pod=args.pod,
        aggregated=(listen_host.strip("[]"), int(listen_port)),
        kubeconfig=args.kubeconfig,
        cluster_domain=args.cluster_domain,
        tls_optional=args.tls_optional,
        dns_names=tuple(args.dns_name),
    )


async def run(options: Options, platform: Platform, serve: Serve) -> None:
    """Everything viz is, until a signal. `serve` is how the platform's users reach the API."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    world = World(options.router, own=Key(options.names.control_namespace, options.pod))
    observer = Observer(options.names, options.tls_optional)
    async with Proxies(options.names, observer) as proxies, contextlib.AsyncExitStack() as servers:
        scraper = Scraper(
            world,
            proxies,
            time.monotonic,
            control_namespace=options.names.control_namespace,
            interval=options.interval,
        )
        services = f"mantle-destination.{options.names.control_namespace}.svc.{options.cluster_domain}"
        discovery = Discovery(f"{services}:8086", f"{services}:8090", world.own or Key("", ""))
        servers.push_async_callback(discovery.close)
        api = Api(world, scraper, proxies, scraper, PodViews(world, proxies, discovery, options.cluster_domain).views)
        registry = CollectorRegistry()
        registry.register(_Metrics(scraper, api))
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(world.follow(platform)), tasks.create_task(scraper.run())]
            part = await serve(servers, tasks, api, registry)
            running += part.tasks
            await _serve_port(servers, admin(world, registry, part), options.admin_host, options.admin_port)
            log.info("serving, with an admin port on %s:%d", options.admin_host, options.admin_port)
            await stop.wait()
            log.info("stopping")
            for task in running:
                task.cancel()


def admin(world: World, registry: CollectorRegistry, part: Part) -> web.Application:
    """`/live` at once, `/ready` when the platform has told us what there is and we can be asked, `/metrics` always."""

    async def ready(_: web.Request) -> web.Response:
        missing = part.not_ready() if world.is_known else "the platform has not answered yet"
        return web.Response(text=f"{missing or 'ok'}\n", status=503 if missing else 200)

    async def live(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/ready", ready)
    app.router.add_get("/live", live)
    app.router.add_get("/metrics", metrics)
    return app


async def _serve_port(servers: contextlib.AsyncExitStack, app: web.Application, host: str, port: int) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    servers.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, host, port, reuse_address=True).start()


async def _serve_socket(servers: contextlib.AsyncExitStack, app: web.Application, path: Path) -> None:
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    servers.push_async_callback(runner.cleanup)
    await web.SockSite(runner, _bind(path)).start()


def _bind(path: Path) -> socket.socket:
    """A Unix socket that only owner and group may open, in place of one that a killed process left."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.fchmod(listener.fileno(), 0o660)
    listener.bind(str(path))
    return listener


class _Metrics(Collector):
    """viz's own state, read when asked for."""

    def __init__(self, scraper: Scraper, api: Api) -> None:
        self._scraper, self._api = scraper, api

    def collect(self) -> list[GaugeMetricFamily]:
        health = self._scraper.health()
        return [
            GaugeMetricFamily("mantle_viz_pods", "Proxies asked in the last round.", value=health.pods),
            GaugeMetricFamily("mantle_viz_failing_pods", "Proxies that did not answer.", value=len(health.failing)),
            GaugeMetricFamily("mantle_viz_window_entries", "Numbers in the window.", value=self._scraper.entries),
            GaugeMetricFamily("mantle_viz_open_taps", "Taps that somebody watches now.", value=self._api.open_taps),
        ]
