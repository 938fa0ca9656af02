"""The wiring of both control-plane programs, top to bottom: flags, parts, servers, shutdown.

`identity` issues certificates; `destination` says where things are and who may connect. They are two processes, because
signing must never make discovery wait and because only one of them may hold the issuer's key.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import resource
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
from prometheus_client import CollectorRegistry

from mantle.control.admin import PlatformCounts, admin_server
from mantle.control.program import address, duration, now, run, until_told
from mantle.core.annotations import POLICIES
from mantle.core.model import Key
from mantle.core.names import BadName, MeshNames, mesh_names
from mantle.core.world import DEFAULT_POLICY, EVERYWHERE, PRIVATE_NETWORKS, Mesh, Network, World
from mantle.platform.connect import View, connected, where

if TYPE_CHECKING:
    from mantle.control.identity import IssuerFiles

log = logging.getLogger("mantle.control")

PLATFORM = "unix:/run/mantle/control/platform.sock"
GRACE = 0.5
"""Seconds open calls get at shutdown: streams never end by themselves, and Certify takes milliseconds."""
MAX_WAITING = 50_000
"""Calls that may wait to be taken up."""
ISSUER_CHECK = 5.0
"""Seconds between two looks at the issuer's files."""
CERTIFY_RATE, CERTIFY_BURST = 5.0, 20
"""Certificates a second and address: a pod needs one an hour, a test a few a second."""


# ---- identity ----


def identity_main(argv: Sequence[str]) -> int:
    """`python -m mantle.control_plane identity`: serves Certify until SIGTERM. Returns the exit code."""
    from mantle.core.ca import CLOCK_SKEW, LEAF_LIFETIME

    flags = _common("identity", listen="0.0.0.0:8080", admin="0.0.0.0:9990")
    flags.add_argument(
        "--issuer", type=Path, required=True, help="directory with crt.pem and key.pem, or tls.crt and tls.key (P-256)"
    )
    flags.add_argument("--trust-roots", type=Path, required=True, help="PEM bundle")
    flags.add_argument("--audience", type=_list, default=["identity.mantle.dev"], help="of tokens, comma-separated")
    flags.add_argument("--issuance-lifetime", type=duration, default=LEAF_LIFETIME, help="of a leaf: 24h, 10s …")
    flags.add_argument("--clock-skew-allowance", type=duration, default=CLOCK_SKEW, help="added at both ends of it")
    flags.add_argument(
        "--check-address", choices=("true", "false"), default="true", help="whether a token must come from its pod's"
    )
    flags.add_argument("--certify-rate", type=float, default=CERTIFY_RATE, help="per second and address")
    flags.add_argument("--certify-burst", type=int, default=CERTIFY_BURST, help="at once and address")
    flags.add_argument("--nice", type=int, default=10, help="how much this process steps back behind destination")
    options = flags.parse_args(argv)
    os.nice(options.nice)
    return run(serve_identity(options))


async def serve_identity(options: argparse.Namespace) -> None:
    # Each program imports only its own parts: a pod's start waits for them.
    from mantle.control import identity
    from mantle.core.ca import Issuer, Refusal, check_issuer
    from mantle.core.ratelimit import RateLimiter

    registry = CollectorRegistry()
    async with (
        connected(options.platform, View.IDENTITY, "mantle-identity") as platform,
        asyncio.TaskGroup() as tasks,
    ):
        deployment = Key(options.control_namespace, "mantle-identity")
        issuer = identity.IssuerFiles(*_issuer_files(options.issuer), options.trust_roots, platform.tell, deployment)
        issuer.refresh()
        certifier = identity.Certifier(
            names=options.names,
            platform=platform,
            issuer=issuer,
            audiences=options.audience,
            own_pod=options.own_pod,
            lifetime=options.issuance_lifetime,
            skew=options.clock_skew_allowance,
            limiter=RateLimiter(options.certify_rate, options.certify_burst),
            metrics=identity.Metrics(registry, issuer, now),
            now=now,
            ticks=asyncio.get_running_loop().time,
            entropy=secrets.token_bytes,
            tell=platform.tell,
            deployment=deployment,
            check_address=options.check_address == "true",
        )
        registry.register(PlatformCounts(platform))

        def not_ready() -> str:
            current = issuer.current
            state = check_issuer(current, now()) if isinstance(current, Issuer) else current
            # What the platform does not know yet, it can still be asked about: only a missing right is final.
            return str(state) if isinstance(state, Refusal) else platform.denied()

        watcher = tasks.create_task(_refresh(issuer))
        # A request holds an identity, a token and a CSR: nothing larger is read.
        limit = ("grpc.max_receive_message_length", 64 * 1024)
        async with (
            grpc_server(options.listen, [identity.handler(certifier)], [limit]),
            admin_server(options.admin, registry, not_ready),
        ):
            await _until_told(options)
        watcher.cancel()


def _issuer_files(directory: Path) -> tuple[Path, Path]:
    """Certificate and key, under our names or those of a Secret of type kubernetes.io/tls (cert-manager's)."""
    if (directory / "tls.crt").exists():
        return directory / "tls.crt", directory / "tls.key"
    return directory / "crt.pem", directory / "key.pem"


async def _refresh(issuer: IssuerFiles) -> None:
    while True:
        await asyncio.sleep(ISSUER_CHECK)
        issuer.refresh()


# ---- destination and policy ----


def destination_main(argv: Sequence[str]) -> int:
    """`python -m mantle.control_plane destination`: discovery and policy until SIGTERM. Returns the exit code."""
    flags = _common("destination", listen="0.0.0.0:8086", admin="0.0.0.0:9996")
    flags.add_argument("--policy-listen", type=address, default=("0.0.0.0", 8090), help="gRPC listener of policy")
    flags.add_argument("--cluster-domain", default="cluster.local", help="what service names end in")
    flags.add_argument(
        "--networks", type=_networks, default=PRIVATE_NETWORKS, help="the mesh's, for the cluster-* policies"
    )
    flags.add_argument("--probe-networks", type=_networks, default=EVERYWHERE, help="where probes come from")
    flags.add_argument("--default-inbound-policy", choices=POLICIES, default=DEFAULT_POLICY)
    flags.add_argument(
        "--tls", choices=("required", "optional"), default="required",
        help="optional: answer pods of the experimental mode, which have no certificate of this mesh",
    )  # fmt: skip
    flags.add_argument(
        "--allow-anonymous", action="store_true",
        help="answer proxies that ask before they have a certificate (linkerd2-proxy): their word is taken",
    )  # fmt: skip
    options = flags.parse_args(argv)
    _raise_file_limit()
    return run(serve_destination(options))


async def serve_destination(options: argparse.Namespace) -> None:
    from mantle.control import answers, destination, policy
    from mantle.control.topics import Topics

    mesh = Mesh(
        options.names,
        options.cluster_domain,
        options.networks,
        options.probe_networks,
        options.default_inbound_policy,
    )
    registry = CollectorRegistry()
    topics = Topics(World.empty(mesh))
    metrics = answers.Metrics(registry, topics)
    optional_tls = options.tls == "optional"
    shared = answers.Answers(topics, metrics, options.own_pod, options.allow_anonymous, optional_tls)
    async with (
        connected(options.platform, View.DISCOVERY, "mantle-destination") as platform,
        asyncio.TaskGroup() as tasks,
    ):
        registry.register(PlatformCounts(platform))
        follower = tasks.create_task(topics.follow(platform.watch()))

        def not_ready() -> str:
            if topics.known.is_set():
                return ""
            return f"no word from the platform ({options.platform}): {platform.missing() or 'it is on its way'}"

        async with (
            grpc_server(options.listen, [destination.handler(shared)]),
            grpc_server(options.policy_listen, [policy.outbound_handler(shared), policy.inbound_handler(shared)]),
            admin_server(options.admin, registry, not_ready),
        ):
            await _until_told(options)
        follower.cancel()


# ---- shared ----


@asynccontextmanager
async def grpc_server(
    address: tuple[str, int],
    handlers: Sequence[grpc.GenericRpcHandler[Any, Any]],
    options: Sequence[tuple[str, Any]] = (),
    grace: float = GRACE,
) -> AsyncIterator[int]:
    """A plaintext gRPC server (the sidecar in front does TLS) until left; yields its port (useful with port 0).

    Open calls get `grace` seconds to end.
    """
    server = grpc.aio.server(
        options=[
            # A second server on the port must fail, not take half the calls.
            ("grpc.so_reuseport", 0),
            # Proxies ping quiet connections; grpc's default is to end such a connection after a few.
            ("grpc.http2.min_ping_interval_without_data_ms", 500),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.max_concurrent_streams", 2000),
            # After a restart every proxy subscribes again at once: grpc drops calls at random beyond 1,000 waiting.
            ("grpc.server.max_pending_requests", MAX_WAITING),
            ("grpc.server.max_pending_requests_hard_limit", MAX_WAITING),
            *options,
        ]
    )
    server.add_generic_rpc_handlers(handlers)
    host, port = address
    bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(grace)


async def _until_told(options: argparse.Namespace) -> None:
    names: MeshNames = options.names
    await until_told(f"serving {names.control_namespace}.{names.trust_domain} as {options.own_pod}")


def _common(program: str, listen: str, admin: str) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(f"mantle.control_plane {program}", allow_abbrev=False)
    flags.add_argument("--listen", type=address, default=address(listen), help="gRPC listener")
    flags.add_argument("--admin", type=address, default=address(admin), help="listener of /live /ready /metrics")
    flags.add_argument("--platform", type=where, default=where(PLATFORM), help="unix:/PATH, or kubernetes")
    flags.add_argument("--control-namespace", default="mantle")
    flags.add_argument("--trust-domain", default="cluster.local")
    # The host name of a pod is its name (https://kubernetes.io/docs/concepts/workloads/pods/pod-hostname/).
    flags.add_argument("--pod-name", default=socket.gethostname(), help="whose sidecar asks over loopback")
    parse = flags.parse_args

    def parse_args(argv: Sequence[str]) -> argparse.Namespace:
        options = parse(argv)
        options.names = _names(flags, options)
        options.own_pod = Key(options.control_namespace, options.pod_name) if options.pod_name else None
        return options

    flags.parse_args = parse_args  # type: ignore[method-assign,assignment]
    return flags


def _names(flags: argparse.ArgumentParser, options: argparse.Namespace) -> MeshNames:
    names = mesh_names(options.control_namespace, options.trust_domain)
    if isinstance(names, BadName):
        flags.error(str(names))
    return names


def _raise_file_limit() -> None:
    """One stream per connection meets the limit of open files first."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _networks(text: str) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(part) for part in _list(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
