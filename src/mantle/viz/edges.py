"""`edges`: who talked to whom in the window, with both identities, or why not encrypted. Pure: values in, rows out.

Two witnesses are joined. The outbound metrics of a meshed client name both ends, also of connections that never reach
another proxy. The table of clients of a meshed server knows those outside the mesh, by address. Traffic that both saw
is counted once, from the client's side. What neither proved to be mutual TLS is never called secured.

A proxy's own calls to the control plane (certificates, discovery) are marked `control`, and left out unless the control
plane's namespace is asked for: no workload made them, and each workload would have two such edges.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mantle.core.model import Pod, Snapshot
from mantle.core.reasons import Unproven
from mantle.core.views import WORKLOADS
from mantle.viz.mesh import is_live, is_meshed
from mantle.viz.source import (
    CLIENTS_OPEN,
    CLIENTS_TOTAL,
    REQUESTS,
    TCP_OPEN,
    TCP_OPENED,
    Point,
    Subject,
    Traffic,
    reason_word,
)

KINDS = (*WORKLOADS, "namespace", "pod")
SECURED = "secured"
MAX_REMEMBERED = 4096
"""Addresses of pods that are gone, newest last."""
PROBE = "probe"
"""The name of the node's own address, from which probes come."""


@dataclass(frozen=True, slots=True)
class EdgeQuery:
    """What is asked. `namespace` None: all; else an edge is kept if either end is in it."""

    kind: str
    namespace: str | None
    control_namespace: str = "mantle"


@dataclass(frozen=True, slots=True)
class _End:
    namespace: str
    name: str


@dataclass(slots=True)
class _Seen:
    """What was seen of one edge."""

    connections: dict[str, float] = field(default_factory=dict)
    """By `secured` or a reason: connections opened in the window, or open now."""
    requests: dict[str, float] = field(default_factory=dict)
    open: float = 0.0
    clients: set[str] = field(default_factory=set)
    servers: set[str] = field(default_factory=set)
    by_client: bool = False
    """True if the client's own proxy reported it."""
    control: bool = False
    """True if all of it are calls of the client's proxy to the control plane."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Who has which address, or had it last. `router`: the addresses that probes come from."""

    pods: dict[str, Pod]
    services: dict[str, tuple[str, str]]
    router: frozenset[str] = frozenset()

    @classmethod
    def of(cls, snapshot: Snapshot, router: Iterable[str] = (), before: Addresses | None = None) -> Addresses:
        """Of a snapshot, and of pods that are gone since `before`: their connections stay in the window for a while."""
        gone = {} if before is None else dict(list(before.pods.items())[-MAX_REMEMBERED:])
        now = {pod.ip: pod for pod in snapshot.pods.values() if pod.ip and is_live(pod)}
        pods = {**{ip: pod for ip, pod in gone.items() if ip not in now}, **now}
        services = {s.cluster_ip: (s.key.namespace, s.key.name) for s in snapshot.services.values()}
        return cls(pods, services, frozenset(router))


def edge_rows(traffic: Traffic, addresses: Addresses, query: EdgeQuery) -> list[dict[str, Any]]:
    """Edges sorted by namespaces and names, keyed as `edges -o json` shows them."""
    seen: dict[tuple[_End, _End], _Seen] = {}
    _read_clients(traffic, addresses, query, seen)
    _read_servers(traffic, addresses, query, seen)
    rows = [_row(src, dst, edge) for (src, dst), edge in seen.items() if _is_asked(src, dst, edge, query)]
    return sorted(rows, key=lambda r: (r["src_namespace"], r["dst_namespace"], r["src"], r["dst"]))


def _is_asked(src: _End, dst: _End, edge: _Seen, query: EdgeQuery) -> bool:
    if query.namespace is None:
        return True
    if edge.control and query.namespace != query.control_namespace:
        return False
    return query.namespace in (src.namespace, dst.namespace)


def _read_clients(
    traffic: Traffic, addresses: Addresses, query: EdgeQuery, seen: dict[tuple[_End, _End], _Seen]
) -> None:
    """The outbound metrics: `peer="dst"` for connections, requests where HTTP was understood."""

    def edge_of(point: Point) -> _Seen | None:
        if point.label("direction") != "outbound":
            return None
        src = _pod_end(point.subject, query.kind)
        edge = seen.setdefault((src, _destination(point, addresses, query.kind)), _Seen())
        edge.by_client = True
        if (server := point.label("server_id")) and _state_of(point, "server_id") == SECURED:
            edge.servers.add(server)
            edge.clients.add(_identity_like(server, point.subject))
        return edge

    for point in traffic.increases:
        family = point.series.family
        if family == TCP_OPENED and point.label("peer") == "dst":
            if edge := edge_of(point):
                _count(edge.connections, _state_of(point, "server_id"), point.value)
        elif family == REQUESTS and (edge := edge_of(point)):
            _count(edge.requests, _state_of(point, "server_id"), point.value)
    for point in traffic.now(TCP_OPEN):
        if point.label("peer") == "dst" and point.value > 0 and (edge := edge_of(point)):
            edge.open += point.value
            state = _state_of(point, "server_id")
            edge.connections[state] = max(edge.connections.get(state, 0.0), point.value)


def _read_servers(
    traffic: Traffic, addresses: Addresses, query: EdgeQuery, seen: dict[tuple[_End, _End], _Seen]
) -> None:
    """The servers' tables of clients: adds edges no client's proxy reported, and plaintext it does not know of."""
    reported = {ends for ends, edge in seen.items() if edge.by_client}
    plain = {ends for ends in reported if {*seen[ends].connections, *seen[ends].requests} - {SECURED}}

    def edge_of(point: Point) -> _Seen | None:
        client_ip = point.label("client_ip")
        if _is_loopback(client_ip):  # never left the pod
            return None
        ends = _client_end(client_ip, addresses, query.kind), _pod_end(point.subject, query.kind)
        state = _state_of(point, "client_id")
        control = _is_control(point, state, addresses, query)
        if ends in reported and (state == SECURED or control or ends in plain):
            if client := point.label("client_id"):
                seen[ends].clients.add(client)
            return None
        edge = seen.setdefault(ends, _Seen(control=True))
        edge.control = edge.control and control
        if state == SECURED:
            edge.clients.add(point.label("client_id"))
            edge.servers.add(_identity_like(point.label("client_id"), point.subject))
        return edge

    for point in traffic.grown(CLIENTS_TOTAL):
        if edge := edge_of(point):
            _count(edge.connections, _state_of(point, "client_id"), point.value)
    for point in traffic.now(CLIENTS_OPEN):
        if point.value > 0 and (edge := edge_of(point)):
            edge.open += point.value
            state = _state_of(point, "client_id")
            edge.connections[state] = max(edge.connections.get(state, 0.0), point.value)


def _is_control(point: Point, state: str, addresses: Addresses, query: EdgeQuery) -> bool:
    """A meshed pod's proxy at a control-plane pod, by TLS; its first certificate it can only ask for anonymously."""
    client = addresses.pods.get(point.label("client_ip"))
    return (
        point.subject.namespace == query.control_namespace
        and client is not None
        and is_meshed(client)
        and state in (SECURED, Unproven.NO_CLIENT_IDENTITY)
    )


def _state_of(point: Point, identity_label: str) -> str:
    """`secured` only with mutual TLS and the peer's name; else the reason, or `unknown`."""
    tls = point.label("tls")
    if tls == "true":
        if point.label(identity_label):
            return SECURED
        return Unproven.NO_CLIENT_IDENTITY if identity_label == "client_id" else Unproven.UNKNOWN
    if tls in ("opaque", "passthru"):
        return Unproven.PASSTHRU
    if tls == "disabled":
        return Unproven.DISABLED
    return reason_word(point.label("no_tls_reason")) if tls == "no_identity" else Unproven.UNKNOWN


def _pod_end(subject: Subject, kind: str) -> _End:
    return _named(kind, subject.namespace, subject.pod, subject.owner.kind, subject.owner.name)


def _named(kind: str, namespace: str, pod: str, owner_kind: str, owner: str) -> _End:
    """An end as the asked kind names it; a pod of another kind of workload is shown as `kind/name`."""
    if kind == "namespace":
        return _End(namespace, namespace)
    if kind == "pod":
        return _End(namespace, pod)
    return _End(namespace, owner if owner_kind.lower() == kind else f"{owner_kind.lower()}/{owner}")


def _destination(point: Point, addresses: Addresses, kind: str) -> _End:
    """The far end of an outbound connection: by the labels discovery gave it, else by its address."""
    namespace = point.label("dst_namespace")
    if namespace:
        if kind == "namespace":
            return _End(namespace, namespace)
        if name := point.label(f"dst_{kind}"):
            return _End(namespace, name)
        for other in (*WORKLOADS, "pod"):
            if name := point.label(f"dst_{other}"):
                return _End(namespace, f"{other}/{name}")
    target = point.label("target_ip") or point.label("target_addr").rpartition(":")[0].strip("[]")
    return _client_end(target, addresses, kind)


def _client_end(ip: str, addresses: Addresses, kind: str) -> _End:
    if pod := addresses.pods.get(ip):
        return _named(kind, pod.key.namespace, pod.key.name, pod.owner.kind, pod.owner.name)
    if service := addresses.services.get(ip):
        return _End(service[0], service[0] if kind == "namespace" else f"service/{service[1]}")
    return _End("", PROBE if ip in addresses.router else ip or Unproven.UNKNOWN)


def _identity_like(other: str, subject: Subject) -> str:
    """The identity of a pod whose peer is named `other`: the same mode, control namespace and trust domain."""
    account = f"{subject.service_account}.{subject.namespace}"
    _, found, domain = other.partition(".serviceaccount.identity.")
    if found:
        return f"{account}.serviceaccount.identity.{domain}"
    _, found, domain = other.partition(".optional.")
    owner = f"{subject.owner.name}.{subject.owner.kind.lower()}.{subject.namespace}"
    return f"{owner}.optional.{domain}" if found else account


def _is_loopback(ip: str) -> bool:
    try:
        return ipaddress.ip_address(ip).is_loopback
    except ValueError:
        return False


def _count(table: dict[str, float], state: str, value: float) -> None:
    table[state] = table.get(state, 0.0) + value


def _row(src: _End, dst: _End, edge: _Seen) -> dict[str, Any]:
    counts = dict(edge.requests)
    for state, value in edge.connections.items():
        counts.setdefault(state, value)  # of HTTP the requests are counted, of everything else the connections
    whole = {state: max(1, round(value)) for state, value in sorted(counts.items())}
    reasons = [state for state in whole if state != SECURED]
    if not whole:
        reasons = [Unproven.UNKNOWN]
    return {
        "src": src.name,
        "src_namespace": src.namespace,
        "dst": dst.name,
        "dst_namespace": dst.namespace,
        "client_id": ",".join(sorted(edge.clients)),
        "server_id": ",".join(sorted(edge.servers)),
        "no_tls_reason": ",".join(reasons),
        "protocol": "http" if edge.requests else "tcp",
        "counts": whole,
        "open": round(edge.open),
        "control": edge.control,
    }
