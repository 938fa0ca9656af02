"""`mantle top RESOURCE`: the busiest requests now, counted from a tap until Ctrl-C.

On a terminal a table that renews itself; elsewhere the table as lines, each time it changed; with `-o json` one object
at the end.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import click

from mantle.cli.duration import seconds_of
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import escape, json_text, left_table, write
from mantle.cli.tapped import tapped, which_requests
from mantle.cli.top_table import Top

REDRAW_SECONDS = 0.1
LINES_SECONDS = 1.0


@mesh_command(selects="Al")
@which_requests
@click.option("--hide-sources", is_flag=True, help="Do not tell clients apart.")
@click.option("--for", "span", metavar="DURATION", help="End by itself after so long, for example 20s.")
def command(
    flags: Globals,
    resource: tuple[str, ...],
    to: str | None,
    to_namespace: str | None,
    hide_sources: bool,
    span: str | None,
    **filters: Any,
) -> None:
    """Show the busiest requests, with latency and success, as they happen.

    \b
    mantle top deploy -n emojivoto
    mantle top deploy/web --to deploy/emoji --hide-sources
    """
    output = flags.output_of("table", "json")
    seconds = seconds_of(span) if span is not None else None
    events = tapped(flags, resource, to, to_namespace, filters, json=output == "json")
    top = Top(hide_sources)
    with _time_limit(seconds):
        if output == "json":
            for _ in _counted(events, top):
                pass
        elif sys.stdout.isatty():
            _live(events, top)
        else:
            _lines(events, top)
    if output == "json":
        names = [name.lower().replace(" ", "_") for name in top.header()]
        write(json_text([dict(zip(names, row, strict=True)) for row in top.table()]))


class _time_limit:
    """Ends the block after so many seconds, as Ctrl-C does: without a word. None: only Ctrl-C does."""

    def __init__(self, seconds: int | None) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        def up(_number: int, _frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        if self._seconds is not None:
            signal.signal(signal.SIGALRM, up)
            signal.setitimer(signal.ITIMER_REAL, max(0.1, float(self._seconds)))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return kind is not None and issubclass(kind, KeyboardInterrupt)


def _counted(events: Iterator[Mapping[str, Any]], top: Top) -> Iterator[None]:
    """Once for each event that changed a row."""
    for event in events:
        if top.add(event):
            yield


def _lines(events: Iterator[Mapping[str, Any]], top: Top, clock: Callable[[], float] = time.monotonic) -> None:
    """The whole table at most once a second, and once more at the end."""
    printed, changed = clock(), False
    try:
        for _ in _counted(events, top):
            changed = True
            if clock() - printed >= LINES_SECONDS:
                write(left_table(top.header(), top.table()) + "\n")
                printed, changed = clock(), False
    finally:
        if changed:
            write(left_table(top.header(), top.table()))


def _live(events: Iterator[Mapping[str, Any]], top: Top) -> None:
    """A table over the whole screen, as many rows as fit."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def drawn() -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, name in enumerate(top.header()):
            table.add_column(name, justify="left" if number < len(top.header()) - 5 else "right", no_wrap=True)
        for row in top.table()[: max(1, console.height - 2)]:
            table.add_row(*(Text(escape(cell)) for cell in row))
        return table

    with Live(drawn(), console=console, screen=True, auto_refresh=False) as live:
        last = 0.0
        for _ in _counted(events, top):
            now = time.monotonic()
            if now - last >= REDRAW_SECONDS:
                live.update(drawn(), refresh=True)
                last = now
