"""Reads the Prometheus text format, keeping only the families that the mesh's numbers are made of.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4). Pure: text in, samples out.
A line that is not valid is skipped and counted, never fatal: one odd series must not blind us to a whole pod.
A series' text repeats in each scrape, so parsed label sets are remembered (`Reader`), in a bounded table.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_QUOTED = r'"(?:[^"\\\n]|\\.)*"'
_LINE = re.compile(rf"({_NAME})(\{{(?:[^\"}}]|{_QUOTED})*\}})?[ \t]+(\S+)(?:[ \t]+-?\d+)?[ \t]*$")
_LABEL = re.compile(rf"[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*({_QUOTED})[ \t]*(,|$)")
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", "\\": "\\", '"': '"'}


@dataclass(frozen=True, slots=True)
class Series:
    """The name of a series: its family and its labels, sorted by name."""

    family: str
    labels: tuple[tuple[str, str], ...]

    def label(self, name: str) -> str:
        """The value of a label, empty if it has none (as Prometheus treats it)."""
        return next((value for key, value in self.labels if key == name), "")


@dataclass(frozen=True, slots=True)
class Scrape:
    """One scrape's samples, and how many lines could not be read."""

    samples: dict[Series, float]
    bad_lines: int


class Reader:
    """Parses scrapes. `families` are the sample names to keep (for a histogram `name_bucket`); None keeps all."""

    def __init__(self, families: Collection[str] | None = None, remember: int = 50_000) -> None:
        self._families = None if families is None else frozenset(families)
        self._remember = remember
        self._seen: dict[tuple[str, str], Series] = {}

    def read(self, text: str) -> Scrape:
        samples: dict[Series, float] = {}
        bad = 0
        for line in text.split("\n"):
            if not line or line[0] == "#":
                continue
            match = _LINE.match(line)
            if match is None:
                bad += bool(line.strip())
                continue
            family, labels, value = match.group(1), match.group(2) or "", match.group(3)
            if self._families is not None and family not in self._families:
                continue
            series = self._series(family, labels)
            number = _number(value)
            if series is None or number is None:
                bad += 1
                continue
            samples[series] = number
        return Scrape(samples, bad)

    def _series(self, family: str, labels: str) -> Series | None:
        known = self._seen.get((family, labels))
        if known is not None:
            return known
        pairs = _labels(labels)
        if pairs is None:
            return None
        if len(self._seen) >= self._remember:
            self._seen.clear()
        series = self._seen[family, labels] = Series(family, pairs)
        return series


def _labels(text: str) -> tuple[tuple[str, str], ...] | None:
    body, position, pairs = text[1:-1].strip(), 0, dict[str, str]()
    while position < len(body):
        match = _LABEL.match(body, position)
        if match is None or match.group(1) in pairs:
            return None
        pairs[match.group(1)] = _ESCAPE.sub(lambda m: _ESCAPED.get(m.group(1), m.group(0)), match.group(2)[1:-1])
        position = match.end()
    return tuple(sorted(pairs.items()))


def _number(text: str) -> float | None:
    try:
        return float(text.replace("_", "!"))  # Go and Prometheus know no 1_000; Python does
    except ValueError:
        return None
