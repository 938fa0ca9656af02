"""What `mantle top` shows: requests of a tap, counted by who asks whom for what. Pure: events in, rows out.

Both ends of a request may be watched, and then both report it. The server's word counts; the client's is shown only of
requests to servers that are not among the watched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FAILED_GRPC = frozenset((2, 4, 13, 14, 15))
"""Unknown, DeadlineExceeded, Internal, Unavailable, DataLoss: what `stat` counts as failures, too."""
MAX_PENDING = 10_000
"""Requests that wait for their end. Streams may never end: the oldest are forgotten."""
HEADER = ("Source", "Destination", "Method", "Path", "Count", "Best", "Worst", "Last", "Success Rate")


@dataclass(frozen=True, slots=True)
class RowKey:
    source: str
    destination: str
    method: str
    path: str
    destination_ip: str
    outbound: bool


@dataclass(slots=True)
class Numbers:
    """Of requests that have ended. Latencies in nanoseconds, from request to the end of the response."""

    count: int = 0
    successes: int = 0
    best: int = 0
    worst: int = 0
    last: int = 0

    def add(self, latency: int, *, success: bool) -> None:
        self.best = latency if self.count == 0 else min(self.best, latency)
        self.worst = max(self.worst, latency)
        self.last = latency
        self.count += 1
        self.successes += success


@dataclass(slots=True)
class Top:
    """Everything counted so far."""

    hide_sources: bool = False
    rows: dict[RowKey, Numbers] = field(default_factory=dict)
    _pending: dict[tuple[Any, ...], tuple[RowKey, int]] = field(default_factory=dict)
    _watched: set[str] = field(default_factory=set)

    def add(self, event: Mapping[str, Any]) -> bool:
        """Takes one event of a tap. True if a row changed."""
        outbound = event["proxyDirection"] == "OUTBOUND"
        source, destination = event["source"], event["destination"]
        self._watched.add(source["ip"] if outbound else destination["ip"])
        if init := event.get("requestInitEvent"):
            name = "" if self.hide_sources else _name(source)
            row = RowKey(name, _name(destination), init["method"], init["path"], destination["ip"], outbound)
            self._pending[_request(event, init)] = row, 0
            while len(self._pending) > MAX_PENDING:
                del self._pending[next(iter(self._pending))]
        elif init := event.get("responseInitEvent"):
            request = _request(event, init)
            if waiting := self._pending.get(request):
                self._pending[request] = waiting[0], init["httpStatus"]
        elif (end := event.get("responseEndEvent")) and (waiting := self._pending.pop(_request(event, end), None)):
            row, status = waiting
            success = status < 500 and end.get("grpcStatusCode") not in FAILED_GRPC and "resetErrorCode" not in end
            self.rows.setdefault(row, Numbers()).add(end["sinceRequestInit"]["nanos"], success=success)
            return not (row.outbound and row.destination_ip in self._watched)
        return False

    def table(self) -> list[list[str]]:
        """The rows to show, busiest first, without the client's view of what the server reports."""
        merged: dict[tuple[str, ...], Numbers] = {}
        for key, numbers in self.rows.items():
            if key.outbound and key.destination_ip in self._watched:
                continue
            name = key.source, key.destination, key.method, key.path
            merged[name] = numbers if name not in merged else _sum(merged[name], numbers)
        busiest = sorted(merged.items(), key=lambda row: (-row[1].count, row[0]))
        return [_cells(name[self.hide_sources :], numbers) for name, numbers in busiest]

    def header(self) -> list[str]:
        return list(HEADER[self.hide_sources :])


def _sum(a: Numbers, b: Numbers) -> Numbers:
    return Numbers(a.count + b.count, a.successes + b.successes, min(a.best, b.best), max(a.worst, b.worst), b.last)


def _cells(name: tuple[str, ...], numbers: Numbers) -> list[str]:
    times = (duration(nanos) for nanos in (numbers.best, numbers.worst, numbers.last))
    return [*name, str(numbers.count), *times, _rate(numbers)]


def _rate(numbers: Numbers) -> str:
    """Short of all is never rounded up to 100%."""
    share = f"{100 * numbers.successes / numbers.count:.2f}%"
    return "99.99%" if share == "100.00%" and numbers.successes < numbers.count else share


def duration(nanos: int) -> str:
    """Three digits are enough: `482µs`, `2ms`, `1.5s`."""
    if nanos < 1_000_000:
        return f"{nanos // 1000}µs"
    return f"{nanos / 1_000_000:.0f}ms" if nanos < 1_000_000_000 else f"{nanos / 1_000_000_000:.1f}s"


def _name(end: Mapping[str, Any]) -> str:
    return str(end["metadata"].get("pod") or end["ip"])


def _request(event: Mapping[str, Any], part: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the three events of a request have in common: an id is one proxy's, hence its direction and ends."""
    source, destination = event["source"], event["destination"]
    return (
        event["proxyDirection"],
        source["ip"],
        source["port"],
        destination["ip"],
        destination["port"],
        part["id"]["base"],
        part["id"]["stream"],
    )
