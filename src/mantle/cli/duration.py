"""Durations as people write them on a command line: `30s`, `5m`, `1h30m`, or a plain number of seconds."""

from __future__ import annotations

import re

import click

_PART = re.compile(r"(\d+(?:\.\d+)?)(h|m|s)")
_SECONDS = {"h": 3600, "m": 60, "s": 1}


def seconds_of(text: str) -> int:
    """Whole seconds. Raises `click.UsageError` for anything else than the forms above."""
    if text.isdecimal():
        return int(text)
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise click.UsageError(f"{text!r} is not a duration; write it like 30s, 5m or 1h30m")
    return round(sum(float(number) * _SECONDS[unit] for number, unit in parts))
