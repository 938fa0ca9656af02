"""What tap says and shows: the request that goes to proxies, and each event as the object that people and tools get.

Pure. Objects have the shape of `linkerd viz tap -o json` with two repairs: `grpcStatusCode` is null when the response
is not gRPC (there it reads 0, "OK"), and the no-TLS word is the one of all our tools.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration

from mantle.core.model import Pod, Snapshot
from mantle.core.selector import EVERYTHING, Selector
from mantle.core.views import TAPPED
from mantle.gen.io.linkerd.proxy import http_types_pb2, net_pb2, tap_pb2
from mantle.viz.mesh import CONTROL_PLANE_LABEL, pods_of
from mantle.viz.source import reason_word

TARGET_KINDS = TAPPED
DEFAULT_MAX_RPS = 100.0
_DIRECTION = {
    tap_pb2.TapEvent.INBOUND: "INBOUND",
    tap_pb2.TapEvent.OUTBOUND: "OUTBOUND",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A resource to watch. An empty name: all of that kind in the namespace; an empty namespace: in all of them."""

    kind: str
    name: str
    namespace: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}" if self.name else self.kind


@dataclass(frozen=True, slots=True)
class TapQuery:
    """What to watch. Empty filters match everything; `path` is a prefix, the others are exact."""

    target: Target
    to: Target | None = None
    method: str = ""
    path: str = ""
    authority: str = ""
    scheme: str = ""
    max_rps: float = DEFAULT_MAX_RPS
    headers: bool = False
    selector: Selector = EVERYTHING
    """Only pods with these labels are watched."""


def targets(snapshot: Snapshot, query: TapQuery) -> list[Pod]:
    """The pods that a query means now, meshed or not."""
    target = query.target
    pods = pods_of(snapshot, target.kind, target.name, target.namespace)
    return [pod for pod in pods if pod.ip and query.selector.matches(pod.labels)]


def limit_per_pod(max_rps: float, pods: int) -> int:
    """How many requests a second each proxy may report: an even share of `max_rps`, at least one."""
    return max(1, int(max_rps / max(pods, 1)))


def observe_request(query: TapQuery, limit: int) -> tap_pb2.ObserveRequest:
    """The `Observe` request for one proxy. An empty conjunction matches everything."""
    match = tap_pb2.ObserveRequest.Match
    http = match.Http
    matches: list[tap_pb2.ObserveRequest.Match] = []
    if query.method:
        matches.append(match(http=http(method=_method(query.method))))
    if query.scheme:
        matches.append(match(http=http(scheme=_scheme(query.scheme))))
    if query.authority:
        matches.append(match(http=http(authority=http.StringMatch(exact=query.authority))))
    if query.path:
        matches.append(match(http=http(path=http.StringMatch(prefix=query.path))))
    for key, value in _destination_labels(query.to).items():
        matches.append(match(destination_label=match.Label(key=key, value=value)))
    request = tap_pb2.ObserveRequest(limit=limit, match=match(all=match.Seq(matches=matches)))
    if query.headers:
        request.extract.http.headers.SetInParent()
    return request


def _destination_labels(to: Target | None) -> Mapping[str, str]:
    """The labels of a destination that `--to` names, as discovery gives them to proxies."""
    if to is None:
        return {}
    if to.kind == "namespace":
        return {"namespace": to.name or to.namespace}
    return {"namespace": to.namespace, **({to.kind: to.name} if to.name else {})}


def _method(name: str) -> http_types_pb2.HttpMethod:
    registered = http_types_pb2.HttpMethod.Registered
    if name.upper() in registered.keys():  # noqa: SIM118  (an enum wrapper, not a dict)
        return http_types_pb2.HttpMethod(registered=registered.Value(name.upper()))
    return http_types_pb2.HttpMethod(unregistered=name)


def _scheme(name: str) -> http_types_pb2.Scheme:
    registered = http_types_pb2.Scheme.Registered
    if name.upper() in registered.keys():  # noqa: SIM118
        return http_types_pb2.Scheme(registered=registered.Value(name.upper()))
    return http_types_pb2.Scheme(unregistered=name)


def event_object(event: tap_pb2.TapEvent, pods: Mapping[str, Pod]) -> dict[str, Any]:
    """One event as an object; `pods` (by address) adds what the platform knows of both ends."""
    direction = _DIRECTION.get(event.proxy_direction, "UNKNOWN")
    record: dict[str, Any] = {
        "source": _endpoint(event.source, event.source_meta.labels, pods),
        "destination": _endpoint(event.destination, event.destination_meta.labels, pods),
        "routeMeta": dict(sorted(event.route_meta.labels.items())) if event.HasField("route_meta") else None,
        "proxyDirection": direction,
    }
    which = event.http.WhichOneof("event")
    if which == "request_init":
        record["requestInitEvent"] = _request_init(event.http.request_init)
    elif which == "response_init":
        record["responseInitEvent"] = _response_init(event.http.response_init)
    elif which == "response_end":
        record["responseEndEvent"] = _response_end(event.http.response_end)
    return record


def _request_init(init: tap_pb2.TapEvent.Http.RequestInit) -> dict[str, Any]:
    return {
        "id": _id(init.id),
        "method": _word(init.method, http_types_pb2.HttpMethod.Registered.Name),
        "scheme": _word(init.scheme, http_types_pb2.Scheme.Registered.Name).lower(),
        "authority": init.authority,
        "path": init.path,
        "headers": _headers(init, "headers"),
    }


def _response_init(init: tap_pb2.TapEvent.Http.ResponseInit) -> dict[str, Any]:
    return {
        "id": _id(init.id),
        "sinceRequestInit": _duration(init.since_request_init),
        "httpStatus": init.http_status,
        "headers": _headers(init, "headers"),
    }


def _response_end(end: tap_pb2.TapEvent.Http.ResponseEnd) -> dict[str, Any]:
    which = end.eos.WhichOneof("end")
    record: dict[str, Any] = {
        "id": _id(end.id),
        "sinceRequestInit": _duration(end.since_request_init),
        "sinceResponseInit": _duration(end.since_response_init),
        "responseBytes": end.response_bytes,
        "trailers": _headers(end, "trailers"),
        "grpcStatusCode": end.eos.grpc_status_code if which == "grpc_status_code" else None,
    }
    if which == "reset_error_code":
        record["resetErrorCode"] = end.eos.reset_error_code
    return record


def _endpoint(address: net_pb2.TcpAddress, labels: Mapping[str, str], pods: Mapping[str, Pod]) -> dict[str, Any]:
    ip = _ip(address.ip)
    metadata = dict(labels)
    if "tls" in metadata:
        metadata["tls"] = reason_word(metadata["tls"])
    if pod := pods.get(ip):
        for key, value in _pod_labels(pod).items():
            metadata.setdefault(key, value)
    return {"ip": ip, "port": address.port, "metadata": dict(sorted(metadata.items()))}


def _pod_labels(pod: Pod) -> dict[str, str]:
    labels = {
        pod.owner.kind.lower(): pod.owner.name,
        "namespace": pod.key.namespace,
        "pod": pod.key.name,
        "serviceaccount": pod.service_account,
    }
    if control := pod.labels.get(CONTROL_PLANE_LABEL):
        labels["control_plane_ns"] = control
    return labels


def _ip(ip: net_pb2.IPAddress) -> str:
    if ip.WhichOneof("ip") == "ipv6":
        return str(ipaddress.IPv6Address((ip.ipv6.first << 64) | ip.ipv6.last))
    return str(ipaddress.IPv4Address(ip.ipv4))


def _id(stream: tap_pb2.TapEvent.Http.StreamId) -> dict[str, int]:
    return {"base": stream.base, "stream": stream.stream}


def _duration(duration: Duration) -> dict[str, int]:
    return {"nanos": duration.seconds * 1_000_000_000 + duration.nanos}


def _word(value: Any, name_of: Any) -> str:
    """A registered name, or the peer's own text; empty if absent. A number we do not know is shown as one."""
    which = value.WhichOneof("type")
    if which != "registered":
        return value.unregistered if which else ""
    try:
        return str(name_of(value.registered))
    except ValueError:
        return str(value.registered)


def _headers(message: Any, name: str) -> list[dict[str, str]] | None:
    if not message.HasField(name):
        return None
    found: list[dict[str, str]] = []
    for header in getattr(message, name).headers:
        try:
            found.append({"name": header.name, "valueStr": header.value.decode("utf-8")})
        except UnicodeDecodeError:
            found.append({"name": header.name, "valueBin": base64.b64encode(header.value).decode()})
    return found
