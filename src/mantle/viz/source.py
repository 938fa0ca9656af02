"""What `stat`, `edges` and `check` read: traffic of a recent window, wherever it was measured.

`MetricsSource` is the port. Today the embedded scraper's window serves it (`window.py`); where there is a Prometheus,
a client of it will. The readers (`stat.py`, `edges.py`) take the values below and do no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from mantle.core.model import Owner
from mantle.core.reasons import Unproven
from mantle.viz.promtext import Series

REQUESTS = "request_total"
RESPONSES = "response_total"
LATENCY_BUCKET = "response_latency_ms_bucket"
TCP_OPENED = "tcp_open_total"
TCP_OPEN = "tcp_open_connections"
TCP_READ = "tcp_read_bytes_total"
TCP_WRITTEN = "tcp_write_bytes_total"
CLIENTS_TOTAL = "mantle_edge_clients_total"
"""Not a proxy's metric: a row of its `mantle.v1.Edges` table as a counter, with labels `client_ip`, `port` and TLS."""
CLIENTS_OPEN = "mantle_edge_clients_open"

COUNTERS = (REQUESTS, RESPONSES, LATENCY_BUCKET, TCP_OPENED, TCP_READ, TCP_WRITTEN)
CERTIFICATE_ENDS = "control_identity_cert_expiration_timestamp_seconds"
CERTIFICATE_CAME = "control_identity_cert_refresh_timestamp_seconds"
GAUGES = (TCP_OPEN, CERTIFICATE_ENDS, CERTIFICATE_CAME)

_OUR_WORDS = {"no_tls_from_remote": "not_provided_by_remote"}


def reason_word(label: str) -> str:
    """A proxy's no-TLS label in our one vocabulary (DESIGN: linkerd2-proxy has its own word for one of them)."""
    return _OUR_WORDS.get(label, label) or Unproven.UNKNOWN


@dataclass(frozen=True, slots=True)
class Subject:
    """The pod that a measurement was taken at, as the platform described it then; it may be gone since."""

    namespace: str
    pod: str
    ip: str
    owner: Owner
    service_account: str


@dataclass(frozen=True, slots=True)
class Point:
    """A series of one pod with a number: what a counter grew by in the window, or a gauge's newest value."""

    subject: Subject
    series: Series
    value: float

    def label(self, name: str) -> str:
        return self.series.label(name)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Everything measured in a window. `seconds` is how much of it was observed: less than asked after a start."""

    seconds: float
    increases: tuple[Point, ...] = ()
    gauges: tuple[Point, ...] = ()
    age_seconds: float | None = None
    """Since the last complete round of scrapes; None before the first."""

    def grown(self, family: str) -> Iterable[Point]:
        return (point for point in self.increases if point.series.family == family)

    def now(self, family: str) -> Iterable[Point]:
        return (point for point in self.gauges if point.series.family == family)


class MetricsSource(Protocol):
    """Where traffic is read from."""

    async def traffic(self, window_seconds: float) -> Traffic:
        """What happened in the last `window_seconds`."""
        ...
