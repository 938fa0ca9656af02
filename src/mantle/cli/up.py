"""`mantle up FILE…`: Kubernetes YAML as processes of this machine, every pod in the mesh."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import click

from mantle.cli.apply import check_alone, lines, request
from mantle.cli.launch import DEFAULT_MESH, Launch, check_name, ensure, is_running, obstacles, refuse_foreign
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure


@mesh_command(on_a_cluster="kubectl apply -f FILE")
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@click.option("-d", "--detach", is_flag=True, help="Return when everything is ready, and leave the mesh running.")
@click.option(
    "--images",
    multiple=True,
    metavar="MAP.yml",
    help="What the images are on this machine (default: mantle.images.yml beside each file).",
)
@click.option("--pod-cidr", metavar="CIDR", help="Network of the pods of a new mesh (default 10.203.0.0/17).")
@click.option("--service-cidr", metavar="CIDR", help="Network of the services of a new mesh (default 10.203.128.0/17).")
@click.option(
    "--issuance-lifetime", metavar="DURATION", help="How long certificates of a new mesh are valid (default 24h)."
)
@click.option(
    "--proxy-env",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of every proxy of a new mesh, without MANTLE_PROXY_.",
)
@click.option(
    "--timeout",
    type=float,
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait until all is ready.",
)
def command(
    flags: Globals,
    files: tuple[str, ...],
    detach: bool,
    images: tuple[str, ...],
    pod_cidr: str | None,
    service_cidr: str | None,
    issuance_lifetime: str | None,
    proxy_env: tuple[str, ...],
    timeout: float,
) -> int:
    """Run Kubernetes YAML on this machine, every pod in the mesh unless it says `mantle.dev/inject: disabled`.

    Like `kubectl apply` it adds to what runs: changed objects are updated, and an object that left a file given before
    is
    removed. In the foreground Ctrl-C takes the whole mesh down; with --detach the mesh stays.
    """
    mesh = check_name(flags.mesh or DEFAULT_MESH)
    _check_cidrs(pod_cidr, service_cidr)
    body = request(files, images, flags.namespace, timeout)
    if not is_running(mesh):
        refuse_foreign(mesh)
        check_alone(body, obstacles())
    launch = Launch(pod_cidr, service_cidr, issuance_lifetime, proxy_env)
    if not detach:
        signal.signal(signal.SIGTERM, _interrupt)
    running = is_running(mesh)
    try:
        client, started = ensure(mesh, launch)
    except KeyboardInterrupt:
        if not running:
            _take_down(mesh)
        raise
    if not started and launch.arguments():
        click.echo(
            f"note: mesh {mesh} runs already; {launch.arguments()[0]} is for a new one and was ignored", err=True
        )
    try:
        good = _print(client.stream("/v1/apply", body))
        if detach:
            return 0 if good else 1
        click.echo(
            f"mesh {mesh} is {'up' if good else 'up, but not everything is ready'}; Ctrl-C takes it down", err=True
        )
        _print(client.stream("/v1/events", {}))
        return 0 if good else 1
    except KeyboardInterrupt:
        if detach:
            raise
    except Failure:
        if started:
            _take_down(mesh)
        raise
    click.echo(f"taking mesh {mesh} down …", err=True)
    _take_down(mesh)
    return 0


def _take_down(mesh: str) -> None:
    from mantle.cli.down import take_down

    take_down(mesh, lambda _: None)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _print(events: Iterable[Mapping[str, Any]]) -> bool:
    """Each event as it comes; was there no error?"""
    good = True
    for line, is_error in lines(events):
        good = good and not is_error
        click.echo(f"error: {line}" if is_error else line, err=is_error)
        (sys.stderr if is_error else sys.stdout).flush()
    return good


def _check_cidrs(pod_cidr: str | None, service_cidr: str | None) -> None:
    """Raises a usage error for networks that cannot hold pods or services."""
    import ipaddress

    networks = []
    for flag, text in (("--pod-cidr", pod_cidr), ("--service-cidr", service_cidr)):
        if text is None:
            continue
        try:
            network = ipaddress.IPv4Network(text)
        except ValueError as error:
            raise click.UsageError(f"{flag} {text}: {error}; write it like 10.203.0.0/17") from error
        if "/" not in text or network.prefixlen > 27:
            raise click.UsageError(f"{flag} {text}: too small; use /27 or larger")
        if network.is_loopback or network.is_multicast or network.is_link_local or network.is_unspecified:
            raise click.UsageError(f"{flag} {text}: these addresses are not for pods; use a private network")
        networks.append(network)
    if len(networks) == 2 and networks[0].overlaps(networks[1]):
        raise click.UsageError("--pod-cidr and --service-cidr overlap")
