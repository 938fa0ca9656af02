"""`mantle demo`: a mesh with emojivoto, the proof that its traffic is encrypted, and then its requests as they
happen. Here: the command, and the demo's stage on one machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from mantle.cli.apply import check_alone, lines, request
from mantle.cli.demo_play import NAMESPACE, Play, Say
from mantle.cli.duration import seconds_of
from mantle.cli.launch import Launch, check_name, ensure, is_running, obstacles, refuse_foreign
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure, Problem
from mantle.cli.target import Machine, Views, machine

MESH = "demo"
UP_TIMEOUT = 180.0
WEB_PORT = 8080


@mesh_command()
@click.option(
    "--for", "duration", metavar="DURATION", help="End by itself after so long, for example 20s (default: at Ctrl-C)."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=WEB_PORT,
    help="Port of the web page on this machine; another one if it is taken.",
)
def command(flags: Globals, duration: str | None, port: int) -> int:
    """Start a mesh with the emojivoto application and watch its traffic being encrypted.

    Shows every edge with the identities of both ends, then requests as they happen. Ctrl-C, or the end of --for,
    removes every trace. The exit code is 0 only if encrypted traffic was seen on every edge. With --context it is
    played on a cluster that has Mantle.
    """
    output = flags.output_of("table", "json")
    seconds = seconds_of(duration) if duration is not None else None
    if flags.cluster_flags:
        from mantle.cli.demo_cluster import stage_of

        return Play(stage_of(flags), output == "json", seconds).play()
    mesh = check_name(flags.mesh or MESH)
    if is_running(mesh):
        raise Failure(
            f"mesh {mesh} is running already",
            fix=f"`mantle down --mesh {mesh}`, or give the demo another name with --mesh",
        )
    refuse_foreign(mesh)
    body = request([str(bundled())], (), None, UP_TIMEOUT)
    check_alone(body, obstacles())
    return Play(_MachineStage(mesh, port, body), output == "json", seconds).play()


def bundled() -> Path:
    """emojivoto's manifest: inside the installed package, or beside it in a checkout. Raises `Failure`."""
    found = importlib.util.find_spec("mantle_emojivoto")
    if found is None or found.origin is None:
        raise Failure(
            "the emojivoto application is not installed", fix="install the package mantle-mesh, or run `make install`"
        )
    package = Path(found.origin).parent
    for candidate in (package / "emojivoto.yml", package.parent / "emojivoto.yml"):
        if candidate.is_file():
            return candidate
    raise Failure(f"emojivoto.yml is not in {package}", fix="install the package mantle-mesh again")


@dataclass(slots=True)
class _MachineStage:
    """A mesh of its own on this machine."""

    mesh: str
    port: int
    body: Mapping[str, Any]
    starting: str = field(default="starting the mesh", init=False)
    begun: bool = field(default=False, init=False)
    _machine: Machine | None = field(default=None, init=False)
    _forwarder: Any = field(default=None, init=False)

    @property
    def views(self) -> Views | None:
        return None if self._machine is None else self._machine.views

    def start(self, say: Say) -> None:
        self.begun = True
        ensure(self.mesh, Launch())
        self._machine = machine(self.mesh)
        problems = []
        for line, is_error in lines(self._machine.client.stream("/v1/apply", self.body)):
            if is_error:
                problems.append(
                    Problem(line, f"look at `mantle --mesh {self.mesh} ps` while it runs, or run `mantle check`")
                )
            elif line.endswith(" ready") or " waiting: " in line:
                say(line)
        if problems:
            raise Failure.of(problems)

    def page(self) -> tuple[str | None, str]:
        """The web page on the host's loopback."""
        from mantle.cli.port_forward import Forwarder, dialler

        assert self._machine is not None
        dial = dialler(self._machine.client.get, "svc/web-svc", NAMESPACE, "80")
        for port in (self.port, 0):
            with contextlib.suppress(OSError):
                self._forwarder = Forwarder("127.0.0.1", port, dial)
                self._forwarder.start()
                return f"http://{self._forwarder.address}", f"vote at http://{self._forwarder.address}"
        return None, ""

    def end(self) -> None:
        if self._forwarder is not None:
            self._forwarder.close()
        if self.begun:
            from mantle.cli.down import take_down

            take_down(self.mesh, _nothing)


def _nothing(_line: str) -> None:
    """Pods that go are not worth a line."""
