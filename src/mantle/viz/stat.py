"""`stat`: success, rate, latency, connections and share of TLS of a kind of resource. Pure: values in, rows out.

Which traffic counts: of workloads, pods and namespaces what came in; of services and authorities what
left the pods of the namespace towards them; with `to` what left the resources towards one, with `from_` what one sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mantle.core.model import Pod, Snapshot
from mantle.core.views import WORKLOADS
from mantle.viz.mesh import is_live, is_meshed
from mantle.viz.source import LATENCY_BUCKET, RESPONSES, TCP_OPEN, TCP_READ, TCP_WRITTEN, Point, Traffic

KINDS = ("authority", *WORKLOADS, "namespace", "pod", "service")
ALL = (*WORKLOADS, "pod", "service", "authority")
"""What `all` means, in the order to show it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end that `--to` or `--from` names; an empty name means any of that kind."""

    kind: str
    name: str
    namespace: str


@dataclass(frozen=True, slots=True)
class StatQuery:
    """What is asked. `namespace` None: all namespaces. `name` empty: all of the kind."""

    kind: str
    namespace: str | None
    name: str = ""
    to: Peer | None = None
    from_: Peer | None = None


@dataclass(slots=True)
class _Sums:
    success: float = 0.0
    failure: float = 0.0
    secured: float = 0.0
    buckets: dict[float, float] = field(default_factory=dict)
    open: float = 0.0
    read: float = 0.0
    written: float = 0.0
    tcp_seen: bool = False

    @property
    def responses(self) -> float:
        return self.success + self.failure


_RowKey = tuple[str, str]
"""(namespace, name)"""


def stat_rows(traffic: Traffic, snapshot: Snapshot, query: StatQuery) -> list[dict[str, Any]]:
    """The rows, sorted by namespace and name, keyed as `stat -o json` shows them; shares are 0..1, None if no data."""
    sums: dict[_RowKey, _Sums] = {}
    for point in traffic.increases:
        key = _row_of(point, query)
        if key is not None and point.series.family in (RESPONSES, LATENCY_BUCKET, TCP_READ, TCP_WRITTEN):
            _add(sums.setdefault(key, _Sums()), point, query)
    for point in traffic.now(TCP_OPEN):
        key = _row_of(point, query)
        if key is not None and point.label("peer") == _peer_label(query):
            row = sums.setdefault(key, _Sums())
            row.open += point.value
            row.tcp_seen = True
    known = _known(snapshot, query)
    names = sums.keys() if query.to or query.from_ or query.kind == "authority" else sums.keys() | known.keys()
    return [_row(key, sums.get(key, _Sums()), known.get(key), traffic.seconds, query.kind) for key in sorted(names)]


def _outbound(query: StatQuery) -> bool:
    return query.kind in ("authority", "service") or query.to is not None or query.from_ is not None


def _peer_label(query: StatQuery) -> str:
    return "dst" if _outbound(query) else "src"


def _row_of(point: Point, query: StatQuery) -> _RowKey | None:
    """The row that a measurement belongs to; None if it is not part of the question."""
    if point.label("direction") != ("outbound" if _outbound(query) else "inbound"):
        return None
    if query.from_ is not None:
        if not _is_source(point, query.from_):
            return None
        key = _destination(point, query.kind)
    elif query.to is not None:
        if not _is_destination(point, query.to):
            return None
        key = _source(point, query.kind)
    elif query.kind == "service":
        key = _destination(point, "service")
    else:
        key = _source(point, query.kind)
    if key is None or not key[1] or (query.name and key[1] != query.name):
        return None
    return key if query.namespace in (None, key[0] if query.kind != "namespace" else key[1]) else None


def _source(point: Point, kind: str) -> _RowKey | None:
    subject = point.subject
    if kind == "authority":
        return subject.namespace, short_authority(point.label("authority"))
    if kind == "namespace":
        return subject.namespace, subject.namespace
    if kind == "pod":
        return subject.namespace, subject.pod
    return (subject.namespace, subject.owner.name) if subject.owner.kind.lower() == kind else None


def _destination(point: Point, kind: str) -> _RowKey | None:
    namespace = point.label("dst_namespace")
    if kind == "authority":
        return point.subject.namespace, short_authority(point.label("authority"))
    return (namespace, namespace) if kind == "namespace" else (namespace, point.label(f"dst_{kind}"))


def _is_source(point: Point, peer: Peer) -> bool:
    key = _source(point, peer.kind)
    return key is not None and bool(key[1]) and _matches(key, peer)


def _is_destination(point: Point, peer: Peer) -> bool:
    key = _destination(point, peer.kind)
    return key is not None and bool(key[1]) and _matches(key, peer)


def _matches(key: _RowKey, peer: Peer) -> bool:
    return (
        key[1] == (peer.name or peer.namespace)
        if peer.kind == "namespace"
        else (key[0] == peer.namespace and peer.name in ("", key[1]))
    )


def _add(row: _Sums, point: Point, query: StatQuery) -> None:
    family = point.series.family
    if family == RESPONSES:
        if point.label("classification") == "success":
            row.success += point.value
        else:
            row.failure += point.value
        if point.label("tls") == "true":
            row.secured += point.value
    elif family == LATENCY_BUCKET:
        if (bound := _bound(point.label("le"))) is not None:
            row.buckets[bound] = row.buckets.get(bound, 0.0) + point.value
    elif point.label("peer") == _peer_label(query):
        row.tcp_seen = True
        if family == TCP_READ:
            row.read += point.value
        else:
            row.written += point.value


def _bound(text: str) -> float | None:
    """A bucket's upper bound; None for what a proxy of ours does not write."""
    try:
        bound = float(text or "inf")
    except ValueError:
        return None
    return bound if bound >= 0 else None  # a NaN is not, either


def _known(snapshot: Snapshot, query: StatQuery) -> dict[_RowKey, list[Pod]]:
    """Rows that exist without traffic, with their pods."""
    found: dict[_RowKey, list[Pod]] = {}
    if query.kind == "service":
        for service in snapshot.services.values():
            found[service.key.namespace, service.key.name] = []
    for pod in snapshot.pods.values():
        if not is_live(pod):
            continue
        namespace = pod.key.namespace
        if query.kind == "namespace":
            found.setdefault((namespace, namespace), []).append(pod)
        elif query.kind == "pod":
            found[namespace, pod.key.name] = [pod]
        elif pod.owner.kind.lower() == query.kind:
            found.setdefault((namespace, pod.owner.name), []).append(pod)
    return {
        key: pods for key, pods in found.items() if query.namespace in (None, key[0]) and query.name in ("", key[1])
    }


def _row(key: _RowKey, sums: _Sums, pods: list[Pod] | None, seconds: float, kind: str) -> dict[str, Any]:
    responses = sums.responses
    counted = pods is not None and kind != "service"
    return {
        "namespace": key[0],
        "kind": kind,
        "name": key[1],
        "meshed": f"{sum(map(is_meshed, pods))}/{len(pods)}" if pods is not None and counted else None,
        "status": pods[0].phase if pods and kind == "pod" else None,
        "success": sums.success / responses if responses else None,
        "rps": responses / seconds if responses else None,
        **{
            f"latency_ms_p{percent}": quantile(sums.buckets, percent / 100) if responses else None
            for percent in (50, 95, 99)
        },
        "tcp_open_connections": round(sums.open) if sums.tcp_seen else None,
        "tcp_read_bytes_rate": sums.read / seconds if sums.tcp_seen else None,
        "tcp_write_bytes_rate": sums.written / seconds if sums.tcp_seen else None,
        "tls": sums.secured / responses if responses else None,
    }


def short_authority(authority: str) -> str:
    """`name.namespace:port` of a service's full name, however a proxy spells it; other authorities as they are."""
    host, colon, port = authority.partition(":")
    name, found, _ = host.partition(".svc.")
    return name + colon + port if found and name.count(".") == 1 else authority


def quantile(buckets: Mapping[float, float], q: float) -> int | None:
    """The `q`-quantile in whole milliseconds of a cumulative histogram (upper bound → count), as in Prometheus.

    Linear inside a bucket; the highest finite bound where the quantile lies above it. None without observations.
    Source: https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile
    """
    bounds = sorted(buckets)
    if not bounds or bounds[-1] != math.inf or buckets[math.inf] <= 0:
        return None
    rank = q * buckets[math.inf]
    lower, below = 0.0, 0.0
    for bound in bounds:
        count = max(buckets[bound], below)  # scrapes are not atomic: keep it monotone
        if count >= rank:
            if bound == math.inf:
                break
            share = (rank - below) / (count - below) if count > below else 1.0
            return _half_up(lower + (bound - lower) * share)
        lower, below = bound, count
    return _half_up(lower)


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)
