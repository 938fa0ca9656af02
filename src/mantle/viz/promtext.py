"""Reads the Prometheus text format, keeping only the families that the mesh's numbers are made of.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4). Pure: text in, samples out.
A line that is not valid is skipped and counted, never fatal: one odd series must not blind us to a whole pod.
A series' text repeats in each scrape, so parsed label sets are remembered (`Reader`), in a bounded table.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*$")
_QUOTED = r'"(?:[^"\\\n]|\\.)*"'
_LABEL = re.compile(rf"[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*({_QUOTED})[ \t]*(,|$)")
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", "\\": "\\", '"': '"'}


@dataclass(frozen=True, slots=True)
class Series:
    """The name of a series: its family and its labels, sorted by name."""

    family: str
    labels: tuple[tuple[str, str], ...]
    _hash: int = field(init=False, repr=False, compare=False)
    """Series are keys all over the window, and hashing two dozen labels each time is most of a scrape's cost."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.family, self.labels)))

    def __hash__(self) -> int:
        return self._hash

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
        self._seen: dict[str, Series] = {}

    def read(self, text: str) -> Scrape:
        samples: dict[Series, float] = {}
        bad = 0
        for line in text.split("\n"):
            if not line or line[0] == "#":
                continue
            end = line.rfind("}") + 1  # a label's value may hold one, but nothing behind the labels can
            if not end:
                end = len(line.split(None, 1)[0]) if line.strip() else 0
            series = self._seen.get(line[:end]) or self._parse(line[:end])
            number = _number(line[end:])
            if series is _UNWANTED:
                continue
            if series is None or number is None:
                bad += bool(line.strip())
                continue
            samples[series] = number
        return Scrape(samples, bad)

    def _parse(self, text: str) -> Series | None:
        """The series that `text` names; None if it is not valid, `_UNWANTED` if its family is not kept."""
        family, brace, labels = text.partition("{")
        family = family.rstrip(" \t")
        if not _NAME.match(family):
            return None
        if self._families is not None and family not in self._families:
            series = _UNWANTED
        else:
            pairs = _labels(labels[:-1]) if brace else ()
            if pairs is None:
                return None
            series = Series(family, pairs)
        if len(self._seen) >= self._remember:
            self._seen.clear()
        self._seen[text] = series
        return series


_UNWANTED = Series("", ())


def _labels(text: str) -> tuple[tuple[str, str], ...] | None:
    body, position, pairs = text.strip(), 0, dict[str, str]()
    while position < len(body):
        match = _LABEL.match(body, position)
        if match is None or match.group(1) in pairs:
            return None
        pairs[match.group(1)] = _ESCAPE.sub(lambda m: _ESCAPED.get(m.group(1), m.group(0)), match.group(2)[1:-1])
        position = match.end()
    return tuple(sorted(pairs.items()))


def _number(text: str) -> float | None:
    """The value behind a series' name, which a timestamp may follow."""
    words = text.split()
    if not 1 <= len(words) <= 2 or (len(words) == 2 and not words[1].lstrip("-").isdecimal()) or "_" in words[0]:
        return None  # Python reads 1_000, Prometheus does not
    try:
        return float(words[0])
    except ValueError:
        return None
