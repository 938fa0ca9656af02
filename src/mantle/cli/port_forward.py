"""`mantle port-forward`: a port of the host's loopback that leads into a pod, with root and without."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import click

from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure
from mantle.cli.podnames import find_port

Dial = Callable[[], socket.socket]


@mesh_command(on_a_cluster="kubectl port-forward")
@click.argument("target", metavar="POD|deploy/NAME|svc/NAME")
@click.argument("ports", nargs=-1, required=True, metavar="[LOCAL:]PORT…")
@click.option("--address", default="127.0.0.1", show_default=True, help="Where to listen on this machine.")
def command(flags: Globals, target: str, ports: tuple[str, ...], address: str) -> None:
    """Listen on this machine's loopback and pass each connection on into a pod, until Ctrl-C.

    An empty LOCAL or 0, or a port's name without LOCAL, lets the system choose one.
    """
    from mantle.cli.machine_client import MachineClient

    client = MachineClient(flags.mesh)
    pairs = [_pair(text) for text in ports]
    forwarders = []
    for local, remote in pairs:
        find_port(client.get("/v1/status"), target, flags.namespace, remote)  # say at once what is wrong
        dial = dialler(client.get, target, flags.namespace, remote)
        try:
            forwarders.append(Forwarder(address, local, dial))
        except OSError as error:
            raise Failure(
                f"cannot listen on {address}:{local}: {error.strerror}", fix="choose another LOCAL port"
            ) from error
    for forwarder, (_, remote) in zip(forwarders, pairs, strict=True):
        click.echo(f"Forwarding from {forwarder.address} -> {target} {remote}")
        forwarder.start()
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()
    for forwarder in forwarders:
        forwarder.close()


def _pair(text: str) -> tuple[int, str]:
    local, colon, remote = text.rpartition(":")
    if not colon or not local:
        local = remote if not colon and remote.isdecimal() else "0"
    if (
        not local.isdecimal()
        or int(local) > 65535
        or not remote
        or (remote.isdecimal() and not 0 < int(remote) < 65536)
    ):
        raise click.UsageError(f"{text}: write PORT or LOCAL:PORT")
    return int(local), remote


def dialler(get: Callable[[str], object], target: str, namespace: str | None, port: str) -> Dial:
    """Opens connections to whatever pod is behind the target at that moment."""
    from mantle.platform.machine.direct import dial

    def connect() -> socket.socket:
        status = get("/v1/status")
        assert isinstance(status, dict)
        uid, number = find_port(status, target, namespace, port)
        return dial(Path(status["state_dir"]) / "pods" / uid, number)

    return connect


class Forwarder:
    """Listens at once; `start` begins to accept. Each connection is two threads that copy until either side ends."""

    def __init__(self, address: str, port: int, dial: Dial) -> None:
        self._listener = socket.create_server((address, port))
        self._dial = dial

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    def start(self) -> None:
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        from mantle.platform.machine.wire import Refused

        try:
            server = self._dial()
        except (OSError, Refused, Failure) as error:
            click.echo(f"error: {error}", err=True)
            client.close()
            return
        back = threading.Thread(target=_copy, args=(server, client), daemon=True)
        back.start()
        _copy(client, server)
        back.join()
        client.close()
        server.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
