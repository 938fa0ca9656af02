"""The demo's play, the same on one machine and on a cluster: emojivoto comes up, its traffic is encrypted, that is
shown as it happens, and every trace is removed.

What differs is behind `Stage`: `demo.py` has that of one machine, `demo_cluster.py` that of a cluster.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import click

from mantle.cli.output import Failure, json_text, write
from mantle.cli.target import Views

NAMESPACE = "emojivoto"
EXPECTED = (("vote-bot", "web"), ("web", "emoji"), ("web", "voting"))
"""Who talks to whom in emojivoto."""
TRAFFIC_TIMEOUT, ASK_AGAIN = 90.0, 0.25

Say = Callable[[str], None]


class Stage(Protocol):
    """Where the demo is played."""

    @property
    def starting(self) -> str:
        """What is said first."""
        ...

    @property
    def begun(self) -> bool:
        """May there be anything to remove?"""
        ...

    @property
    def views(self) -> Views | None:
        """None until there is somebody to ask."""
        ...

    def start(self, say: Say) -> None:
        """Brings everything up, saying how far it is. Raises `Failure`."""
        ...

    def page(self) -> tuple[str | None, str]:
        """The address of the application's page, if it is on this machine now, and what people are told of it."""
        ...

    def end(self) -> None:
        """Removes every trace. Interrupts are off."""
        ...


class _TimeIsUp(Exception):
    pass


@dataclass(slots=True)
class Play:
    """One run. `seconds` None: until Ctrl-C."""

    stage: Stage
    quiet: bool
    seconds: int | None
    began: float = field(default_factory=time.monotonic)
    web: str | None = None
    taps: list[Mapping[str, Any]] = field(default_factory=list)
    status: Any = None

    def play(self) -> int:
        """All of it, and the end whatever happens. Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        try:
            return self._run()
        finally:
            self._end()

    def _run(self) -> int:
        edges: list[Mapping[str, Any]] = []
        encrypted_after: float | None = None
        try:
            with self._progress(self.stage.starting):
                self.stage.start(self._say)
                self._say("waiting for encrypted traffic on every edge")
                edges, encrypted_after = self._wait_for_traffic()
            wrong = what_is_wrong(edges)
            self._report(edges, wrong, encrypted_after)
            if not wrong:
                self._watch()
                edges = self._edges()
                wrong = what_is_wrong(edges)
        except KeyboardInterrupt:
            edges = self._edges()
            wrong = what_is_wrong(edges)
            if not self.quiet:
                click.echo("", err=True)
        if self.quiet:
            answer = {
                "ok": not wrong,
                "edges": edges,
                "wrong": wrong,
                "web": self.web,
                "encrypted_after_seconds": encrypted_after,
                "tap": self.taps,
            }
            write(json_text(answer))
        elif wrong:
            for problem in wrong:
                click.echo(f"error: {problem}", err=True)
        return 1 if wrong else 0

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
        if self.stage.views is None:
            return []
        try:
            window = self._window()
            rows = self.stage.views.get("edges", NAMESPACE, resource="deployment", window=window)["edges"]
        except Failure:
            return []  # viz is not up yet
        return [row for row in rows if not row.get("control")]

    def _window(self) -> int:
        """Seconds since the play began: what went on in that namespace before is not ours. At least what viz takes."""
        return min(300, max(15, round(time.monotonic() - self.began)))

    def _plaintext(self) -> list[Mapping[str, Any]]:
        """The edges of all namespaces that carry plaintext: probes, which come from outside the mesh, and on a cluster
        whatever else there is. None if only the demo's own namespace may be seen.
        """
        if self.stage.views is None:
            return []
        try:
            rows = self.stage.views.get("edges", None, resource="deployment", window=self._window())["edges"]
        except Failure:
            return []
        return [row for row in rows if row["no_tls_reason"] and not row.get("control")]

    def _report(self, edges: Sequence[Mapping[str, Any]], wrong: Sequence[str], after: float | None) -> None:
        self.web, page = self.stage.page()
        if self.quiet:
            return
        from mantle.cli.edges import table

        if after is not None:
            click.echo(f"encrypted traffic on every edge after {after:.1f} s\n")
        write(table(edges))
        if plain := self._plaintext():
            click.echo("\nwhat is not encrypted keeps working, and says why:\n")
            write(table(plain))
        if page:
            click.echo(f"\n{page}")
        if not wrong:
            end = "Ctrl-C" if self.seconds is None else f"the end, after {self.seconds} s,"
            click.echo(f"requests as they happen; {end} removes every trace:\n")

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
        assert self.stage.views is not None
        target = {"kind": "namespace", "name": NAMESPACE, "namespace": NAMESPACE}
        while True:
            yield from self.stage.views.tap(target, {"max_rps": 100})
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

    def _end(self) -> None:
        """Removes every trace, whatever happened; a second Ctrl-C does not keep it from that."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if self.stage.begun and self.stage.views is not None and not self.quiet:
            click.echo("removing every trace …", err=True)
        self.stage.end()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


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
