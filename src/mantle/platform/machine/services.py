"""Services beside pods: who answers a service's address, as values for DNS and for the router's table. Pure."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mantle.core.model import Key, Pod, Service, ServicePort
from mantle.platform.machine.manifest import Object, selects


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One pod behind one service port."""

    ip: str
    port: int


@dataclass(frozen=True, slots=True)
class Row:
    """One service port in the router's table: traffic to (vip, port) goes to one of the endpoints."""

    vip: str
    port: int
    protocol: str
    endpoints: tuple[Endpoint, ...]


def service(item: Object, cluster_ip: str) -> Service:
    """A Service object as the mesh sees it."""
    spec = item.doc["spec"]
    ports = tuple(
        ServicePort(
            name=p.get("name", ""),
            port=p["port"],
            target_port=p.get("targetPort", p["port"]),
            protocol=p.get("protocol", "TCP"),
            app_protocol=p.get("appProtocol", ""),
        )
        for p in spec.get("ports") or []
    )
    return Service(
        Key(item.namespace, item.name),
        cluster_ip,
        ports,
        dict(spec.get("selector") or {}),
        dict(item.doc["metadata"].get("annotations") or {}),
        bool(spec.get("publishNotReadyAddresses")),
    )


def is_headless(item: Object) -> bool:
    return str(item.doc["spec"].get("clusterIP", "")) == "None"


def behind(svc: Service, pods: Iterable[Pod]) -> list[Pod]:
    """The pods that answer for a service now: selected, ready (or published anyway), not finished."""
    found = [
        p
        for p in pods
        if p.key.namespace == svc.key.namespace
        and selects(svc.selector, p.labels)
        and (p.ready or svc.publish_not_ready)
        and p.phase in ("Running", "Pending")
    ]
    return sorted(found, key=lambda p: ipaddress.IPv4Address(p.ip))


def target(port: ServicePort, pod: Pod) -> int | None:
    """The pod's port behind a service port; None if the pod has no port of that name."""
    if isinstance(port.target_port, int):
        return port.target_port
    return next((c.port for c in pod.ports if c.name == port.target_port and c.protocol == port.protocol), None)


def table(services: Mapping[Key, Service], pods: Iterable[Pod]) -> tuple[Row, ...]:
    """What the router must know, sorted: one row for each port of each service that has an address."""
    pods = list(pods)
    rows = []
    for svc in services.values():
        if svc.cluster_ip == "None":
            continue
        chosen = behind(svc, pods)
        for port in svc.ports:
            if port.protocol in ("TCP", "UDP"):
                ends = tuple(Endpoint(p.ip, number) for p in chosen if (number := target(port, p)) is not None)
                rows.append(Row(svc.cluster_ip, port.port, port.protocol, ends))
    return tuple(sorted(rows, key=lambda r: (ipaddress.IPv4Address(r.vip), r.port, r.protocol)))


def links(objects: Iterable[Object], namespace: str, addresses: Mapping[str, str]) -> dict[str, str]:
    """The variables by which a pod finds the services of its namespace (Kubernetes: "Accessing the Service"), the older
    ones in the form of Docker's links too. `addresses`: by `namespace/name`.
    """
    out: dict[str, str] = {}
    for item in objects:
        ports = item.doc["spec"].get("ports") or [] if item.kind == "Service" and item.namespace == namespace else []
        ip = addresses.get(f"{namespace}/{item.name}")
        if not ports or ip is None or is_headless(item):
            continue
        name = item.name.upper().replace("-", "_")
        out[f"{name}_SERVICE_HOST"], out[f"{name}_SERVICE_PORT"] = ip, str(ports[0]["port"])
        for index, port in enumerate(ports):
            number, protocol = str(port["port"]), port.get("protocol") or "TCP"
            if port.get("name"):
                out[f"{name}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = number
            url, one = f"{protocol.lower()}://{ip}:{number}", f"{name}_PORT_{number}_{protocol}"
            if index == 0:
                out[f"{name}_PORT"] = url
            out |= {one: url, f"{one}_PROTO": protocol.lower(), f"{one}_PORT": number, f"{one}_ADDR": ip}
    return out


def preferred_address(namespace: str, name: str, first: int, last: int) -> int:
    """Where a service's address is looked for first: the same for the same name, so it survives a restart."""
    digest = hashlib.sha256(f"{namespace}/{name}".encode()).digest()
    return first + int.from_bytes(digest[:8], "big") % (last - first + 1)
