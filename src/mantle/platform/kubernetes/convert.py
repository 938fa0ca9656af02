"""The API's objects as the mesh's values. Pure: what is read of each kind, and what is made of it.

The `…Object` types name the fields that are read; msgspec skips everything else while it parses, so a pod of 12 KB
costs what we keep of it. Field names are Kubernetes' own (https://kubernetes.io/docs/reference/kubernetes-api/).

A value that would be of no use further on (a port that is none, an address that cannot be read, more settings than
anybody writes) is refused here, with `Unfit`: the API server admits more than it documents. What is kept in place of
such an object is decided in `unfit`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import msgspec

from mantle.core.model import (
    EMPTY,
    ContainerPort,
    EndpointSlice,
    Key,
    Namespace,
    Owner,
    Pod,
    Service,
    ServicePort,
    SliceEndpoint,
    SlicePort,
)
from mantle.core.policy import GRPC_HEALTH
from mantle.core.world import HEADLESS
from mantle.platform.kubernetes.reading import Unfit

PROXY_CONTAINER = "mantle-proxy"
SERVICE_NAME = "kubernetes.io/service-name"
"""The label of a slice that says whose it is."""
OUR_ANNOTATIONS = ("mantle.dev/", "config.mantle.dev/", "viz.mantle.dev/")
"""Prefixes of the annotations that anything here decides by. The others are not kept: some are larger than the pod."""
MOST_TEXT = 32 * 1024
"""Characters of labels, or of annotations of ours, that an object may have: thousands of them are kept at once."""
BETWEEN = {"ReplicaSet": "apps", "Job": "batch"}
"""Kinds that stand between a workload and its pods, and their API group."""


class Fields(msgspec.Struct, rename="camel"):
    """Base of everything read: JSON's camelCase, unknown fields skipped."""


class OwnerReference(Fields):
    api_version: str = ""
    kind: str = ""
    name: str = ""
    controller: bool | None = False


class Meta(Fields):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    owner_references: list[OwnerReference] | None = None
    deletion_timestamp: str | None = None


class NamedPort(Fields):
    container_port: int = 0
    name: str = ""
    protocol: str = "TCP"


class HttpGet(Fields):
    port: int | str = 0
    path: str = "/"


class Grpc(Fields):
    port: int = 0


class Probe(Fields):
    http_get: HttpGet | None = None
    grpc: Grpc | None = None


class Container(Fields):
    name: str = ""
    restart_policy: str = ""
    ports: list[NamedPort] | None = None
    startup_probe: Probe | None = None
    readiness_probe: Probe | None = None
    liveness_probe: Probe | None = None


class PodSpec(Fields):
    containers: list[Container]
    init_containers: list[Container] | None = None
    service_account_name: str = "default"
    node_name: str = ""
    host_network: bool = False


class ContainerStatus(Fields):
    name: str = ""
    started: bool | None = None
    restart_count: int = 0


class Condition(Fields):
    type: str = ""
    status: str = ""


class PodIp(Fields):
    ip: str = ""


class PodStatus(Fields):
    phase: str = "Pending"
    pod_ip: str = msgspec.field(name="podIP", default="")
    pod_ips: list[PodIp] | None = msgspec.field(name="podIPs", default=None)
    conditions: list[Condition] | None = None
    container_statuses: list[ContainerStatus] | None = None
    init_container_statuses: list[ContainerStatus] | None = None


class PodObject(Fields):
    metadata: Meta
    spec: PodSpec
    status: PodStatus = msgspec.field(default_factory=PodStatus)


class MetaObject(Fields):
    """Any object of which only the metadata is asked for."""

    metadata: Meta


class NamespaceObject(Fields):
    metadata: Meta


class PortSpec(Fields):
    port: int
    name: str = ""
    target_port: int | str = 0
    protocol: str = "TCP"
    app_protocol: str = ""


class ServiceSpec(Fields):
    cluster_ip: str = msgspec.field(name="clusterIP", default="")
    cluster_ips: list[str] | None = msgspec.field(name="clusterIPs", default=None)
    ip_families: list[str] | None = None
    ports: list[PortSpec] | None = None
    selector: dict[str, str] | None = None
    type: str = "ClusterIP"
    external_name: str = ""
    publish_not_ready_addresses: bool = False


class ServiceObject(Fields):
    metadata: Meta
    spec: ServiceSpec


class Conditions(Fields):
    ready: bool | None = None


class Reference(Fields):
    kind: str = ""
    namespace: str = ""
    name: str = ""


class EndpointFields(Fields):
    addresses: list[str] | None = None
    conditions: Conditions | None = None
    target_ref: Reference | None = None


class PortFields(Fields):
    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class SliceObject(Fields):
    metadata: Meta
    address_type: str = ""
    endpoints: list[EndpointFields] | None = None
    ports: list[PortFields] | None = None


# ---- pods ----


@dataclass(frozen=True, slots=True)
class Between:
    """A ReplicaSet or Job."""

    kind: str
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class SeenPod:
    """A pod as the API server has it: `pod` with its controller as owner, which may be a ReplicaSet or Job between."""

    pod: Pod
    between: Between | None
    deleting: bool
    """It has been told to end."""


def pod(raw: PodObject) -> tuple[Key, SeenPod | None]:
    """A pod. Its identity and readiness follow from `proxy_started` and `ready`."""
    meta, spec, status = raw.metadata, raw.spec, raw.status
    key = Key(meta.namespace, meta.name)
    controller = controller_of(meta)
    between = None
    if controller.kind in BETWEEN:
        between = Between(controller.kind, meta.namespace, controller.name)
    ip = address(status.pod_ip)
    others = tuple(more for one in status.pod_ips or () if (more := address(one.ip)) and more != ip)
    serving = list(_serving(spec))
    seen = Pod(
        key=key,
        uid=meta.uid,
        ip=ip,
        service_account=spec.service_account_name or "default",
        owner=controller if controller.kind else Owner("Pod", meta.name),
        labels=_kept(meta.labels),
        annotations=_ours(meta.annotations),
        ports=_ports(
            tuple((p.name, port_number(p.container_port), p.protocol) for c in serving for p in c.ports or ())
        ),
        phase=status.phase,
        ready=meta.deletion_timestamp is None and _condition(status, "Ready"),
        node=spec.node_name,
        host_network=spec.host_network,
        proxy_started=proxy_started(status),
        probe_paths=tuple(dict.fromkeys(_probe_paths(serving))),
        more_ips=others,
    )
    return key, SeenPod(seen, between, meta.deletion_timestamp is not None)


def proxy_started(status: PodStatus) -> bool:
    """Whether the proxy has run. A native sidecar stands among the init containers; one that restarts has run, and must
    not make clients turn to plaintext meanwhile.
    """
    statuses = (*(status.init_container_statuses or ()), *(status.container_statuses or ()))
    return any(one.name == PROXY_CONTAINER and (one.started is True or one.restart_count > 0) for one in statuses)


def controller_of(meta: Meta) -> Owner:
    """The object that made this one; an empty owner if nothing did. A mirror pod's node does not count, nor does a text
    that is no object's name: owners are shown in tables and metrics, and the API server takes any text for one.
    """
    for reference in meta.owner_references or ():
        if reference.controller and reference.kind != "Node":
            named = _KIND.fullmatch(reference.kind) and _OBJECT.fullmatch(reference.name)
            return Owner(reference.kind, reference.name) if named else Owner("", "")
    return Owner("", "")


_KIND = re.compile(r"[A-Za-z][A-Za-z0-9]{0,62}")
_OBJECT = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9._:]{0,251}[A-Za-z0-9])?")


def owned(seen: SeenPod, owner: Owner | None) -> Pod:
    """The pod with the workload that users know it by. `owner` is what owns the object between; None or empty: nothing
    known, then it is the one between itself.
    """
    if seen.between is None or owner is None or not owner.kind:
        return seen.pod
    return replace(seen.pod, owner=owner)


def _serving(spec: PodSpec) -> Iterator[Container]:
    """The application's containers that keep running, native sidecars among them; the proxy's own is not one."""
    for container in spec.init_containers or ():
        if container.restart_policy == "Always" and container.name != PROXY_CONTAINER:
            yield container
    yield from (container for container in spec.containers if container.name != PROXY_CONTAINER)


def _probe_paths(containers: list[Container]) -> Iterator[tuple[int, str]]:
    for container in containers:
        named = {port.name: port.container_port for port in container.ports or () if port.name}
        for probe in (container.startup_probe, container.readiness_probe, container.liveness_probe):
            if probe is not None and (asked := probe.http_get) is not None:
                number = named.get(asked.port) if isinstance(asked.port, str) else asked.port
                if number:
                    yield number, asked.path or "/"
            elif probe is not None and probe.grpc is not None:
                yield probe.grpc.port, GRPC_HEALTH


def _condition(status: PodStatus, kind: str) -> bool:
    return any(one.type == kind and one.status == "True" for one in status.conditions or ())


# ---- what stands between, service accounts ----


def between(kind: str) -> Any:
    """`convert` for ReplicaSets and Jobs: what owns one. Those that nothing owns are kept, too."""

    def convert(raw: MetaObject) -> tuple[Between, Owner | None]:
        return Between(kind, raw.metadata.namespace, raw.metadata.name), controller_of(raw.metadata)

    return convert


def service_account(raw: MetaObject) -> tuple[Key, str | None]:
    """The uid of a service account: tokens are bound to it. One that is being deleted is gone."""
    meta = raw.metadata
    return Key(meta.namespace, meta.name), meta.uid if meta.deletion_timestamp is None else None


# ---- services ----


def service(raw: ServiceObject) -> tuple[Key, Service | None]:
    """A service: with an address, headless, or a name that leads elsewhere."""
    meta, spec = raw.metadata, raw.spec
    key = Key(meta.namespace, meta.name)
    external = spec.external_name if spec.type == "ExternalName" else ""
    return key, Service(
        key=key,
        cluster_ip="" if external else _cluster_ip(spec.cluster_ip),
        ports=tuple(
            ServicePort(
                port.name, port_number(port.port), port.target_port or port.port, port.protocol, port.app_protocol
            )
            for port in spec.ports or ()
        ),
        selector=_kept(spec.selector),
        annotations=_ours(meta.annotations),
        publish_not_ready=spec.publish_not_ready_addresses,
        more_cluster_ips=tuple(_cluster_ip(ip) for ip in spec.cluster_ips or () if ip != spec.cluster_ip),
        external_name=external,
        ip_family=(spec.ip_families or ["IPv4"])[0],
    )


def endpoint_slice(raw: SliceObject) -> tuple[Key, EndpointSlice | None]:
    """A slice of a service; None if it belongs to none. A port without a number means all ports: it is no use here."""
    meta = raw.metadata
    key = Key(meta.namespace, meta.name)
    owner = (meta.labels or {}).get(SERVICE_NAME)
    if not owner:
        return key, None
    ports = tuple(SlicePort(p.name or "", port_number(p.port), p.protocol or "TCP") for p in raw.ports or () if p.port)
    # A slice of type FQDN lists names: nothing is balanced over it.
    readable = address if raw.address_type in ("IPv4", "IPv6") else str
    endpoints = tuple(_endpoint(one, meta.namespace, readable) for one in raw.endpoints or () if one.addresses)
    return key, EndpointSlice(key, Key(meta.namespace, owner), raw.address_type, ports, endpoints)


def _endpoint(raw: EndpointFields, namespace: str, readable: Callable[[str], str]) -> SliceEndpoint:
    """All addresses of one endpoint mean the same: the first is taken. No condition means ready."""
    target = raw.target_ref
    named = target is not None and target.kind == "Pod"
    pod = Key(target.namespace or namespace, target.name) if target is not None and named else None
    ready = raw.conditions is None or raw.conditions.ready is not False
    return SliceEndpoint(readable((raw.addresses or [""])[0]), pod, ready)


def namespace(raw: NamespaceObject) -> tuple[str, Namespace | None]:
    meta = raw.metadata
    return meta.name, Namespace(meta.name, _kept(meta.labels), _ours(meta.annotations))


# ---- values that must be of use ----


def address(text: str) -> str:
    """An IP address in its one spelling; empty stays empty. Raises `Unfit`.

    The API server takes IPv4 with leading zeros (they are decimal) and IPv6 in any spelling, and gives them back so.
    """
    try:
        ip = ipaddress.ip_address(_LEADING_ZEROS.sub("", text) if "." in text else text) if text else None
    except ValueError:
        ip = None
    if text and (ip is None or "%" in text):
        raise Unfit(f"found the address {text[:80]!r}, wanted an IP address")
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip or "")


_LEADING_ZEROS = re.compile(r"(?<![0-9A-Fa-f:])0+(?=[0-9])")


def _cluster_ip(text: str) -> str:
    return text if text == HEADLESS else address(text)


def port_number(number: int) -> int:
    """A port. Raises `Unfit`."""
    if not 0 < number < 65536:
        raise Unfit(f"found the port {number}, wanted one from 1 to 65535")
    return number


# ---- values shared by many objects ----


def _kept(values: Mapping[str, str] | None) -> Mapping[str, str]:
    return _shared(_bounded("labels", values.items())) if values else EMPTY


def _ours(values: Mapping[str, str] | None) -> Mapping[str, str]:
    kept = [item for item in (values or {}).items() if item[0].startswith(OUR_ANNOTATIONS)]
    return _shared(_bounded("annotations of Mantle's", kept)) if kept else EMPTY


def _bounded(what: str, items: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The items in order. Raises `Unfit` if they are too large."""
    kept = tuple(sorted(items))
    if (size := sum(len(name) + len(value) for name, value in kept)) > MOST_TEXT:
        raise Unfit(f"found {size} characters of {what}, wanted at most {MOST_TEXT}")
    return kept


@lru_cache(maxsize=4096)
def _shared(items: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    """Replicas have equal labels: one mapping serves them all."""
    return MappingProxyType(dict(items))


@lru_cache(maxsize=4096)
def _ports(items: tuple[tuple[str, int, str], ...]) -> tuple[ContainerPort, ...]:
    return tuple(ContainerPort(*item) for item in items)
