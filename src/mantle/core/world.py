"""One snapshot, made ready to be asked: pods by address and namespace, services by address, annotations parsed once.

`endpoints` and `policy` decide from a `World`; the platform makes the snapshots. `World.next` keeps the facts of every
pod that did not change, so a change of one pod costs one pod. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from mantle.core.annotations import LABEL_CONTROL_NS, PREFIX, Config, port_ranges, read_config
from mantle.core.model import EMPTY, Key, Namespace, Pod, Service, ServicePort, Snapshot
from mantle.core.names import BadName, MeshNames, Workload
from mantle.core.pod_facts import DEFAULT_OPAQUE
from mantle.core.reasons import NoIdentity

INBOUND_PORT = 4143
CONTROL_PORT = 4190
ADMIN_PORT = 4191
DEFAULT_POLICY = "all-unauthenticated"
HEADLESS = "None"
"""How Kubernetes spells the cluster address of a headless service."""
OPAQUE_APP_PROTOCOLS = ("mantle.dev/opaque", "linkerd.io/opaque")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
PRIVATE_NETWORKS: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "fd00::/8")
)
EVERYWHERE: tuple[Network, ...] = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))


@dataclass(frozen=True, slots=True)
class Mesh:
    """What is the same for every answer of one control plane."""

    names: MeshNames
    cluster_domain: str = "cluster.local"
    cluster_networks: tuple[Network, ...] = PRIVATE_NETWORKS
    probe_networks: tuple[Network, ...] = EVERYWHERE
    default_policy: str = DEFAULT_POLICY


@dataclass(frozen=True, slots=True)
class Ports:
    """A set of ports as inclusive ranges."""

    ranges: tuple[tuple[int, int], ...] = ()

    def __contains__(self, port: int) -> bool:
        return any(low <= port <= high for low, high in self.ranges)


@dataclass(frozen=True, slots=True)
class PodFacts:
    """A pod and what its annotations, and its namespace's, say."""

    pod: Pod
    identity: str | NoIdentity | BadName
    """Its DNS identity, or why it has none; a `BadName` is a meshed pod that can never be named: no endpoint, no
    plaintext.
    """
    skipped: Ports
    opaque: Ports
    authenticated: Ports
    """Ports that take meshed clients only, whatever the policy says."""
    inbound_port: int
    control_port: int
    admin_port: int
    policy: str
    """The default inbound policy; `deny` if the annotation is not one of the known words."""

    def port_named(self, name: str) -> int | None:
        """The TCP container port of that name; None if the pod has none."""
        return next((port.port for port in self.pod.ports if port.name == name and port.protocol == "TCP"), None)


@dataclass(frozen=True, slots=True)
class World:
    """A snapshot with its indices. Make it with `empty(mesh)` and then `next`."""

    mesh: Mesh
    snapshot: Snapshot
    pods: Mapping[Key, PodFacts] = field(default_factory=dict)
    pods_by_ip: Mapping[str, PodFacts] = field(default_factory=dict)
    """Pods with an address of their own that is in use: not of the host's network, not completed."""
    pods_by_namespace: Mapping[str, tuple[PodFacts, ...]] = field(default_factory=dict)
    services_by_ip: Mapping[str, Service] = field(default_factory=dict)

    @staticmethod
    def empty(mesh: Mesh) -> World:
        return World(mesh, Snapshot())

    def next(self, snapshot: Snapshot) -> World:
        """The world of a newer snapshot."""
        facts: dict[Key, PodFacts] = {}
        by_ip: dict[str, PodFacts] = {}
        by_namespace: dict[str, list[PodFacts]] = {}
        for key, pod in snapshot.pods.items():
            known = self.pods.get(key)
            namespace = snapshot.namespaces.get(key.namespace)
            if known is not None and known.pod is pod and namespace is self.snapshot.namespaces.get(key.namespace):
                fact = known
            else:
                fact = _once_meshed(known, pod_facts(self.mesh, pod, namespace))
            facts[key] = fact
            by_namespace.setdefault(key.namespace, []).append(fact)
            if pod.ip and not pod.host_network and pod.phase in ("Pending", "Running"):
                by_ip[pod.ip] = fact
        return World(
            self.mesh,
            snapshot,
            facts,
            by_ip,
            {name: tuple(pods) for name, pods in by_namespace.items()},
            {s.cluster_ip: s for s in snapshot.services.values() if s.cluster_ip not in ("", HEADLESS)},
        )

    def service_port_opaque(self, service: Service, port: ServicePort) -> bool:
        """Whether clients must not detect a protocol: the port's appProtocol, else the service's, namespace's or
        default list.
        """
        if port.app_protocol:
            return port.app_protocol in OPAQUE_APP_PROTOCOLS
        namespace = self.snapshot.namespaces.get(service.key.namespace)
        config, _ = read_config(service.annotations, namespace.annotations if namespace else EMPTY)
        return port.port in _opaque(config, {})


def pod_facts(mesh: Mesh, pod: Pod, namespace: Namespace | None) -> PodFacts:
    """Reads what a pod's annotations say, its namespace's where it says nothing itself.

    A default policy that cannot be read is `deny`: a typo must never open a port.
    """
    config, mistakes = read_config(pod.annotations, namespace.annotations if namespace else EMPTY)
    policy_mistaken = any(mistake.annotation == f"{PREFIX}default-inbound-policy" for mistake in mistakes)
    return PodFacts(
        pod=pod,
        identity=_identity(mesh, pod),
        skipped=Ports(port_ranges(config.get("skip-inbound-ports", ""))),
        opaque=_opaque(config, {port.name: port.port for port in pod.ports if port.name}),
        authenticated=Ports(port_ranges(config.get("proxy-require-identity-inbound-ports", ""))),
        inbound_port=config.get("inbound-port", INBOUND_PORT),
        control_port=config.get("control-port", CONTROL_PORT),
        admin_port=config.get("admin-port", ADMIN_PORT),
        policy="deny" if policy_mistaken else config.get("default-inbound-policy", mesh.default_policy),
    )


def _once_meshed(before: PodFacts | None, now: PodFacts) -> PodFacts:
    """A pod whose proxy has run keeps its identity while that restarts: a crash must not turn clients to plaintext."""
    if before is None or before.pod.uid != now.pod.uid or now.identity is not NoIdentity.PROXY_NOT_STARTED:
        return now
    return now if isinstance(before.identity, NoIdentity) else replace(now, identity=before.identity)


def _identity(mesh: Mesh, pod: Pod) -> str | NoIdentity | BadName:
    control_namespace = pod.labels.get(LABEL_CONTROL_NS)
    if control_namespace is None:
        return NoIdentity.NOT_MESHED
    if control_namespace != mesh.names.control_namespace:
        return NoIdentity.OTHER_CONTROL_PLANE
    if pod.host_network:
        return NoIdentity.HOST_NETWORK
    if not pod.proxy_started:
        return NoIdentity.PROXY_NOT_STARTED
    return mesh.names.identity(Workload(pod.key.namespace, pod.service_account))


def _opaque(config: Config, named: Mapping[str, int]) -> Ports:
    """The opaque ports that an annotation lists (names of container ports resolved), else the default list."""
    given: str | None = config.get("opaque-ports")
    if given is None:
        return Ports(tuple((port, port) for port in DEFAULT_OPAQUE))
    return Ports(tuple(_ranges(given.split(","), named)))


def _ranges(parts: Iterable[str], named: Mapping[str, int]) -> Iterable[tuple[int, int]]:
    for part in parts:
        if part in named:
            yield (named[part], named[part])
        elif part[:1].isdigit():
            yield from port_ranges(part)
