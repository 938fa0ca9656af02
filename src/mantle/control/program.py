"""What every control-plane program does the same way: its log, its end, and the shapes of its flags.

Imports nothing heavy, and knows no program.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

from prometheus_client import disable_created_metrics

log = logging.getLogger("mantle.control")


def run(program: Any) -> int:
    """Runs a program. A listener that cannot be had, or a file that cannot be read, is an error with exit code 1."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    logging.getLogger().handlers[0].setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request to the API server
    disable_created_metrics()  # type: ignore[no-untyped-call]  # not annotated upstream
    # Full collections of many thousand streams cost more than all first answers together (bench/RESULTS.md).
    gc.set_threshold(50_000, 20, 100)
    code = 0
    try:
        asyncio.run(program)
    except* (OSError, RuntimeError) as errors:
        for error in errors.exceptions:
            log.error("cannot go on: %s", error)
        code = 1
    return code


class _OneLine(logging.Formatter):
    """One record, one line: what peers put into names and requests cannot forge another."""

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info:
            return super().format(record)
        line = super().format(record)
        if line.isprintable():
            return line
        return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in line)


async def until_told(doing: str) -> None:
    """Serves until SIGTERM or SIGINT; `doing` is what the log says meanwhile."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    gc.collect()
    gc.freeze()
    log.info("%s", doing)
    await stop.wait()
    log.info("stopping")


def now() -> datetime:
    return datetime.now(UTC)


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]") or "0.0.0.0", int(port)


def duration(text: str) -> timedelta:
    """`24h`, `90m`, `10s`, `500ms`."""
    for unit, seconds in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86400.0)):
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdigit():
            return timedelta(seconds=float(number) * seconds)
    raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 24h, 10s or 500ms")
