"""The wiring of the injector, top to bottom: flags, parts, servers, shutdown."""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CollectorRegistry

from mantle import __version__
from mantle.control.admin import admin_server
from mantle.control.program import address, duration, now, run, until_told
from mantle.core.proxy_env import Values
from mantle.core.serving_cert import Plan
from mantle.manifests.config import CONFIG_MAP, VALUES_KEY, injection_values, load
from mantle.platform.kubernetes.client import from_kubeconfig, in_cluster

if TYPE_CHECKING:
    from mantle.control.injector_api import Api

ROOTS_MAP, ROOTS_KEY = "mantle-identity-trust-roots", "ca-bundle.crt"
IDLE = 3600.0
"""Seconds an idle connection is kept: longer than the API server's 90, so that it is never us who close one in use."""


def injector_main(argv: Sequence[str]) -> int:
    """`python -m mantle.control_plane injector`: the admission webhook until SIGTERM. Returns the exit code."""
    flags = argparse.ArgumentParser("mantle.control_plane injector", allow_abbrev=False)
    flags.add_argument("--listen", type=address, default=("0.0.0.0", 8443), help="HTTPS, for the API server")
    flags.add_argument("--admin", type=address, default=("0.0.0.0", 9991), help="/live /ready /metrics")
    flags.add_argument("--control-namespace", default="mantle")
    flags.add_argument("--pod-name", default=socket.gethostname(), help="who writes events")
    flags.add_argument("--kubeconfig", type=Path, help="how to reach the cluster from outside it")
    flags.add_argument("--dns-name", action="append", default=[], help="what else the API server may call us")
    flags.add_argument(
        "--certificate-lifetime", type=duration, default=timedelta(days=30), help="renewed at 70 %% of it"
    )
    flags.add_argument("--authority-lifetime", type=duration, help="the same of its authority (twelve times as long)")
    flags.add_argument(
        "--linger", type=duration, default=timedelta(seconds=3),
        help="served on after SIGTERM, until the Service no longer leads here",
    )  # fmt: skip
    return run(serve_injector(flags.parse_args(argv)))


async def serve_injector(options: argparse.Namespace) -> None:
    from mantle.control.injector import Injector, Settings, application
    from mantle.control.injector_api import Api
    from mantle.control.injector_events import Events
    from mantle.platform.kubernetes.serving_cert import Keeper, load_from_memory, webhooks

    registry = CollectorRegistry()
    async with from_kubeconfig(options.kubeconfig) if options.kubeconfig else in_cluster() as client:
        api = Api(client, options.control_namespace)
        settings = Settings(lambda: read_values(api))
        events = Events(api, options.pod_name, registry, now, asyncio.get_running_loop().time)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        show = partial(load_from_memory, context)
        whom = (client, options.control_namespace, "injector", webhooks("mantle-injector"))
        keeper = Keeper(*whom, plan(options), show, registry, now)
        injector = Injector(api, settings, events, registry)
        stopping = asyncio.Event()

        def not_ready() -> str:
            return "stopping" if stopping.is_set() else keeper.missing or settings.missing

        async with asyncio.TaskGroup() as tasks:
            parts = [tasks.create_task(part) for part in (settings.run(), events.run(), keeper.run())]
            async with (
                admin_server(options.admin, registry, not_ready),
                https_server(options.listen, application(injector), context),
            ):
                await until_told(f"injecting for {options.control_namespace} as {options.pod_name}")
                stopping.set()
                await asyncio.sleep(options.linger.total_seconds())
            for part in parts:
                part.cancel()


def plan(options: argparse.Namespace) -> Plan:
    """The Service's names, and how long certificate and authority live."""
    service = f"mantle-injector.{options.control_namespace}.svc"
    authority: timedelta = options.authority_lifetime or options.certificate_lifetime * 12
    return Plan(
        common_name=service,
        dns_names=(service, *options.dns_name),
        lifetime=options.certificate_lifetime,
        authority_lifetime=authority,
        propagation=min(authority / 20, timedelta(minutes=1)),
    )


async def read_values(api: Api) -> Values:
    """The settings that `mantle install` wrote down, with the roots of this moment. ValueError if they cannot be
    used.
    """
    config, roots = await asyncio.gather(api.config_map(CONFIG_MAP), api.config_map(ROOTS_MAP))
    anchors = roots.get(ROOTS_KEY, "")
    if "BEGIN CERTIFICATE" not in anchors:
        raise ValueError(f"ConfigMap {ROOTS_MAP} has no {ROOTS_KEY}: run `mantle install`")
    if VALUES_KEY not in config:
        raise ValueError(f"ConfigMap {CONFIG_MAP} has no {VALUES_KEY}: run `mantle upgrade`")
    try:
        values = load(json.loads(config[VALUES_KEY]))
    except ValueError as error:
        raise ValueError(f"ConfigMap {CONFIG_MAP}, {VALUES_KEY}: {error}; run `mantle upgrade`") from error
    return injection_values(values, anchors, f"mantle/injector {__version__}")


@asynccontextmanager
async def https_server(address: tuple[str, int], app: web.Application, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Serves until left, with the context's certificate of the moment; yields the port (useful with port 0)."""
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=IDLE)
    await runner.setup()
    try:
        site = web.TCPSite(runner, *address, ssl_context=context)
        await site.start()
        bound: int = runner.addresses[0][1]
        yield bound
    finally:
        await runner.cleanup()
