"""viz on a cluster, wired: the platform from the API server, the aggregated API for its users. No logic."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

from aiohttp import web
from prometheus_client import CollectorRegistry

from mantle.core import views
from mantle.core.serving_cert import Plan
from mantle.platform.kubernetes.client import from_kubeconfig, in_cluster
from mantle.platform.kubernetes.serving_cert import Keeper, api_service
from mantle.platform.kubernetes.world import DISCOVERY, running
from mantle.platform.port import Platform
from mantle.viz.aggregated import Aggregated
from mantle.viz.api import Api
from mantle.viz.app import Options, Part, Serve
from mantle.viz.cluster import Cluster
from mantle.viz.tls import Tls

log = logging.getLogger("mantle.viz")

API_SERVICE = f"{views.VERSION}.{views.GROUP}"
CERTIFICATE_LIFETIME = timedelta(days=30)
IDLE_SECONDS = 3600.0
"""Longer than the API server keeps an idle connection: it is never us who close one in use."""


@contextlib.asynccontextmanager
async def on_cluster(options: Options) -> AsyncIterator[tuple[Platform, Serve]]:
    """The platform, and how the API is served there, until the block is left."""
    async with from_kubeconfig(options.kubeconfig) if options.kubeconfig else in_cluster() as client:
        tls, cluster = Tls(), Cluster(client)

        async def serve(
            servers: contextlib.AsyncExitStack, tasks: asyncio.TaskGroup, api: Api, registry: CollectorRegistry
        ) -> Part:
            namespace = options.names.control_namespace
            whom = (client, namespace, "viz", api_service(API_SERVICE))
            keeper = Keeper(*whom, plan(options), tls.show, registry, lambda: datetime.now(UTC))
            app = Aggregated(api, tls, cluster).application()
            runner = web.AppRunner(
                app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0, keepalive_timeout=IDLE_SECONDS
            )
            await runner.setup()
            servers.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, *options.aggregated, ssl_context=tls.context, reuse_address=True).start()
            log.info("serving %s on %s:%d", API_SERVICE, *options.aggregated)
            following = tasks.create_task(cluster.follow_front_proxy(tls))
            return Part((following, tasks.create_task(keeper.run())), lambda: keeper.missing or tls.missing)

        async with running(client, DISCOVERY) as platform:
            yield platform, serve


def plan(options: Options) -> Plan:
    """The Service's name, and an authority that lives twelve times as long as a certificate."""
    service = f"mantle-viz.{options.names.control_namespace}.svc"
    return Plan(
        common_name=service,
        dns_names=(service, *options.dns_names),
        lifetime=CERTIFICATE_LIFETIME,
        authority_lifetime=CERTIFICATE_LIFETIME * 12,
    )
