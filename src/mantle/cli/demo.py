"""`mantle demo`: a mesh with emojivoto, the proof that its traffic is encrypted, and then its requests as they
happen.
"""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click

from mantle.cli.apply import check_alone, lines, request
from mantle.cli.duration import seconds_of
from mantle.cli.launch import Launch, check_name, ensure, is_running, obstacles, refuse_foreign
from mantle.cli.machine_client import MachineClient
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure, Problem, json_text, write

MESH, NAMESPACE = "demo", "emojivoto"
EXPECTED = (("vote-bot", "web"), ("web", "emoji"), ("web", "voting"))
"""Who talks to whom in emojivoto."""
UP_TIMEOUT, TRAFFIC_TIMEOUT, ASK_AGAIN = 90.0, 45.0, 0.25
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
    removes
    every trace. The exit code is 0 only if encrypted traffic was seen on every edge.
    """
    output = flags.output_of("table", "json")
    seconds = seconds_of(duration) if duration is not None else None
    mesh = check_name(flags.mesh or MESH)
    if is_running(mesh):
        raise Failure(
            f"mesh {mesh} is running already",
            fix=f"`mantle down --mesh {mesh}`, or give the demo another name with --mesh",
        )
    refuse_foreign(mesh)
    body = request([str(bundled())], (), None, UP_TIMEOUT)
    check_alone(body, obstacles())
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    demo = _Demo(mesh, output == "json", port, seconds)
    try:
        return demo.run(body)
    finally:
        demo.end()


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


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class _TimeIsUp(Exception):
    pass


@dataclass(slots=True)
class _Demo:
    mesh: str
    quiet: bool
    port: int
    seconds: int | None
    began: float = field(default_factory=time.monotonic)
    begun: bool = False
    """May there be anything to remove?"""
    client: MachineClient | None = None
    forwarder: Any = None
    taps: list[Mapping[str, Any]] = field(default_factory=list)
    status: Any = None

    def run(self, body: Mapping[str, Any]) -> int:
        """The whole play. Returns the exit code."""
        edges: list[Mapping[str, Any]] = []
        encrypted_after: float | None = None
        try:
            with self._progress("starting the mesh"):
                self.begun = True
                self.client, _ = ensure(self.mesh, Launch())
                self._up(body)
                self._say("waiting for encrypted traffic on every edge")
                edges, encrypted_after = self._wait_for_traffic()
            wrong = what_is_wrong(edges)
            self._report(edges, wrong, encrypted_after)
            if not wrong:
                self._watch()
                edges = self._edges()
                wrong = what_is_wrong(edges)
        except KeyboardInterrupt:
            edges = self._edges() if self.client else []
            wrong = what_is_wrong(edges)
            if not self.quiet:
                click.echo("", err=True)
        if self.quiet:
            web = f"http://{self.forwarder.address}" if self.forwarder else None
            answer = {
                "ok": not wrong,
                "edges": edges,
                "wrong": wrong,
                "web": web,
                "encrypted_after_seconds": encrypted_after,
                "tap": self.taps,
            }
            write(json_text(answer))
        elif wrong:
            for problem in wrong:
                click.echo(f"error: {problem}", err=True)
        return 1 if wrong else 0

    def _up(self, body: Mapping[str, Any]) -> None:
        assert self.client is not None
        problems = []
        for line, is_error in lines(self.client.stream("/v1/apply", body)):
            if is_error:
                problems.append(
                    Problem(line, f"look at `mantle --mesh {self.mesh} ps` while it runs, or run `mantle check`")
                )
            elif line.endswith(" ready") or " waiting: " in line:
                self._say(line)
        if problems:
            raise Failure.of(problems)

    def _wait_for_traffic(self) -> tuple[list[Mapping[str, Any]], float | None]:
        """The edges as soon as every one carries encrypted traffic, else as they are when the time is up."""
        deadline = time.monotonic() + TRAFFIC_TIMEOUT
        edges: list[Mapping[str, Any]] = []
        while time.monotonic() < deadline:
            edges = self._edges()
            if not what_is_wrong(edges):
                return edges, time.monotonic() - self.began
            time.sleep(ASK_AGAIN)
        return edges, None

    def _edges(self) -> list[Mapping[str, Any]]:
        assert self.client is not None
        try:
            rows = self.client.get("/v1/viz/edges", resource="deployment", namespace=NAMESPACE)["edges"]
        except Failure:
            return []  # viz is not up yet
        return [row for row in rows if not row.get("control")]

    def _plaintext(self) -> list[Mapping[str, Any]]:
        """The edges of all namespaces that carry plaintext: here, the probes, which come from outside the mesh."""
        assert self.client is not None
        rows = self.client.get("/v1/viz/edges", resource="deployment", all=1)["edges"]
        return [row for row in rows if row["no_tls_reason"] and not row.get("control")]

    def _report(self, edges: Sequence[Mapping[str, Any]], wrong: Sequence[str], after: float | None) -> None:
        self._forward()
        if self.quiet:
            return
        from mantle.cli.edges import table

        if after is not None:
            click.echo(f"encrypted traffic on every edge after {after:.1f} s\n")
        write(table(edges))
        if plain := self._plaintext():
            click.echo("\nwhat is not encrypted keeps working, and says why:\n")
            write(table(plain))
        if self.forwarder is not None:
            click.echo(f"\nvote at http://{self.forwarder.address}")
        if not wrong:
            end = "Ctrl-C" if self.seconds is None else f"the end, after {self.seconds} s,"
            click.echo(f"requests as they happen; {end} removes every trace:\n")

    def _forward(self) -> None:
        """The web page on the host's loopback."""
        from mantle.cli.port_forward import Forwarder, dialler

        assert self.client is not None
        dial = dialler(self.client.get, "svc/web-svc", NAMESPACE, "80")
        for port in (self.port, 0):
            with contextlib.suppress(OSError):
                self.forwarder = Forwarder("127.0.0.1", port, dial)
                self.forwarder.start()
                return

    def _watch(self) -> None:
        """Tap lines until the time is up; KeyboardInterrupt ends it earlier."""
        from mantle.cli.tap import line_of

        def up(_number: int, _frame: FrameType | None) -> None:
            raise _TimeIsUp

        if self.seconds is not None:
            signal.signal(signal.SIGALRM, up)
            signal.setitimer(signal.ITIMER_REAL, max(0.1, float(self.seconds)))
        try:
            for event in self._tap():
                if "notice" in event:
                    continue  # a pod that could not be tapped for a moment: `mantle tap` says so
                if self.quiet:
                    self.taps.append(event)
                else:
                    write(line_of(event) + "\n")
        except _TimeIsUp:
            return
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _tap(self) -> Iterator[Mapping[str, Any]]:
        assert self.client is not None
        target = {"kind": "namespace", "name": NAMESPACE, "namespace": NAMESPACE}
        while True:
            yield from self.client.stream("/v1/viz/tap", {"target": target, "max_rps": 100})
            time.sleep(ASK_AGAIN)  # viz was restarted: ask again

    # ---- what people see ----

    @contextlib.contextmanager
    def _progress(self, first: str) -> Iterator[None]:
        """A spinner on a terminal, plain lines elsewhere, nothing for JSON."""
        if self.quiet or not sys.stderr.isatty():
            self._say(first)
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(first) as self.status:
            yield
        self.status = None

    def _say(self, text: str) -> None:
        if self.quiet:
            return
        if self.status is not None:
            self.status.update(f"{time.monotonic() - self.began:4.1f} s  {text}")
        else:
            click.echo(text, err=True)

    def end(self) -> None:
        """Removes every trace, whatever happened; a second Ctrl-C does not keep it from that."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if self.forwarder is not None:
            self.forwarder.close()
        if not self.begun:
            return
        from mantle.cli.down import take_down

        if not self.quiet and self.client is not None:
            click.echo("removing every trace …", err=True)
        take_down(self.mesh, _nothing)


def _nothing(_line: str) -> None:
    """Pods that go are not worth a line."""


def what_is_wrong(edges: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every reason why this is not a mesh in which each edge of emojivoto is encrypted. Empty: it is."""
    wrong = []
    by_ends = {(row["src"], row["dst"]): row for row in edges}
    for ends in EXPECTED:
        row = by_ends.get(ends)
        if row is None or not row["counts"]:
            wrong.append(f"no traffic was seen from {ends[0]} to {ends[1]}")
        elif not row["counts"].get("secured"):
            wrong.append(
                f"the traffic from {ends[0]} to {ends[1]} is not encrypted: {row['no_tls_reason'] or 'unknown'}"
            )
    for ends, row in by_ends.items():
        if row["no_tls_reason"] and (ends not in EXPECTED or row["counts"].get("secured")):
            wrong.append(f"some traffic from {ends[0]} to {ends[1]} is not encrypted: {row['no_tls_reason']}")
    return wrong
