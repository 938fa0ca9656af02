"""One snapshot, made ready to be asked: pods by address and namespace, services by address, annotations parsed once.

`endpoints` and `policy` decide from a `World`; the platform makes the snapshots. A change of one pod of thousands costs
one pod: the platform says which objects changed (`Snapshot.changes`), or they are found; `World.touched`
says which answers may differ. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, Generic, TypeVar

from mantle.core.annotations import (
    LABEL_CONTROL_NS,
    OPAQUE_PORTS,
    PREFIX,
    Config,
    named_ranges,
    own_opaque_ports,
    port_ranges,
    read_config,
)
from mantle.core.model import EMPTY, Changes, EndpointSlice, Key, Namespace, Pod, Service, ServicePort, Snapshot
from mantle.core.names import BadName, MeshNames, Workload
from mantle.core.optional_names import LABEL_TLS, MIGRATION, OPTIONAL, OptionalNames, owner_of
from mantle.core.pod_facts import DEFAULT_OPAQUE
from mantle.core.reasons import NameRefused, NoIdentity

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")
Group = TypeVar("Group", bound=Hashable)
Member = TypeVar("Member", bound=Hashable)

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


class View(Enum):
    """With whose eyes the world is seen: what a caller's proxy can verify, and prove itself to."""

    REQUIRED = auto()
    """A proxy of the default mode."""
    OPTIONAL = auto()
    """A proxy of the experimental mode `--tls=optional`."""
    MIGRATING = auto()
    """A proxy of the default mode while its peers are being migrated from the experimental one."""


@dataclass(frozen=True, slots=True)
class PodFacts:
    """A pod and what its annotations, and its namespace's, say."""

    pod: Pod
    identity: str | NoIdentity | BadName
    """Its DNS identity, or why it has none; a `BadName` is a meshed pod that can never be named: no endpoint, no
    plaintext.
    """
    optional: str | None
    """Its DNS identity in the experimental mode, if it is of that; `identity` is then why others see none."""
    migrating: bool
    """It is of the default mode, and accepts the experimental mode's identities while they are being migrated."""
    skipped: Ports
    opaque: Ports
    authenticated: Ports
    """Ports that take meshed clients only, whatever the policy says."""
    inbound_port: int
    transparent: bool
    """Meshed clients come to the application's own port, by TLS, and not to `inbound_port`."""
    control_port: int
    admin_port: int
    policy: str
    """The default inbound policy; `deny` if the annotation is not one of the known words."""
    made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """What `endpoints` has made of these facts, by what was asked: a service of a thousand pods makes one endpoint anew
    when one of them changes.
    """

    def port_named(self, name: str) -> int | None:
        """The TCP container port of that name; None if the pod has none."""
        return next((port.port for port in self.pod.ports if port.name == name and port.protocol == "TCP"), None)


Tag = tuple[str, Hashable]
"""What an answer depends on: `("pod", Key)`, `("service", Key)` or `("ip", address)`."""


@dataclass(frozen=True, slots=True)
class World:
    """A snapshot with its indices. Make it with `empty(mesh)` and then `next`."""

    mesh: Mesh
    snapshot: Snapshot
    pods: Mapping[Key, PodFacts] = field(default_factory=dict)
    pods_by_ip: Mapping[str, PodFacts] = field(default_factory=dict)
    """Pods with an address of their own that is in use: not of the host's network, not completed."""
    pods_by_namespace: Mapping[str, Mapping[Key, PodFacts]] = field(default_factory=dict)
    services_by_ip: Mapping[str, Service] = field(default_factory=dict)
    services_by_namespace: Mapping[str, Mapping[Key, Service]] = field(default_factory=dict)
    slices_by_service: Mapping[Key, Mapping[Key, EndpointSlice]] = field(default_factory=dict)
    services_by_endpoint: Mapping[str, frozenset[Key]] = field(default_factory=dict)
    """The services that have an address in one of their slices."""
    touched: frozenset[Tag] = frozenset()
    """Answers that depend on one of these may differ from those of the world before; all others are as they were."""
    view: View = View.REQUIRED

    @staticmethod
    def empty(mesh: Mesh) -> World:
        return World(mesh, Snapshot())

    def next(self, snapshot: Snapshot) -> World:
        """The world of a newer snapshot. Costs what changed, and copies of the indices that did."""
        return _step(self, snapshot)

    def seen_as(self, view: View) -> World:
        """The same world with other eyes."""
        return self if view is self.view else replace(self, view=view)

    def service_port_opaque(self, service: Service, port: ServicePort) -> bool:
        """Whether clients must not detect a protocol: the port's appProtocol, else the service's, namespace's or
        default list.
        """
        if port.app_protocol:
            return port.app_protocol in OPAQUE_APP_PROTOCOLS
        namespace = self.snapshot.namespaces.get(service.key.namespace)
        own = own_opaque_ports(service.annotations)
        written = EMPTY if own is None else {OPAQUE_PORTS: own}
        config, _ = read_config(written, namespace.annotations if namespace else EMPTY)
        return port.port in _opaque(config, {})


_CLOSING = frozenset(PREFIX + name for name in ("default-inbound-policy", "proxy-require-identity-inbound-ports"))


def pod_facts(mesh: Mesh, pod: Pod, namespace: Namespace | None) -> PodFacts:
    """Reads what a pod's annotations say, its namespace's where it says nothing itself.

    A default policy, or a list of ports for meshed clients only, that cannot be read is `deny`: a typo must never open
    a port.
    """
    config, mistakes = read_config(pod.annotations, namespace.annotations if namespace else EMPTY)
    closed = pod.unreadable or any(mistake.annotation in _CLOSING for mistake in mistakes)
    identity = _identity(mesh, pod)
    return PodFacts(
        pod=pod,
        identity=NoIdentity.OPTIONAL_TLS if is_optional(pod) and not isinstance(identity, NoIdentity) else identity,
        optional=None if isinstance(identity, NoIdentity) else _optional_identity(mesh, pod),
        migrating=MIGRATION in pod.annotations,
        skipped=Ports(port_ranges(config.get("skip-inbound-ports", ""))),
        opaque=_opaque(config, {port.name: port.port for port in pod.ports if port.name}),
        authenticated=Ports(port_ranges(config.get("proxy-require-identity-inbound-ports", ""))),
        inbound_port=config.get("inbound-port", INBOUND_PORT),
        transparent=config.get("transport-mode") == "transparent",
        control_port=config.get("control-port", CONTROL_PORT),
        admin_port=config.get("admin-port", ADMIN_PORT),
        policy="deny" if closed else config.get("default-inbound-policy", mesh.default_policy),
    )


def _once_meshed(before: PodFacts | None, now: PodFacts) -> PodFacts:
    """A pod whose proxy has run keeps its identity while that restarts: a crash must not turn clients to plaintext."""
    if before is None or before.pod.uid != now.pod.uid or now.identity is not NoIdentity.PROXY_NOT_STARTED:
        return now
    if before.pod.unreadable:
        return now
    if isinstance(before.identity, NoIdentity) and before.optional is None:
        return now
    return replace(now, identity=before.identity, optional=before.optional, made={})


def unreadable(key: Key) -> BadName:
    """What is answered about an object that exists and cannot be read."""
    wanted = "an object that can be read: the log of mantle-destination says why"
    return BadName(NameRefused.UNREADABLE, str(key), wanted)


def _identity(mesh: Mesh, pod: Pod) -> str | NoIdentity | BadName:
    if pod.unreadable:
        return unreadable(pod.key)
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


def is_optional(pod: Pod) -> bool:
    """Whether a pod is of the experimental mode, its proxy started or not."""
    return pod.labels.get(LABEL_TLS) == OPTIONAL


def _optional_identity(mesh: Mesh, pod: Pod) -> str | None:
    """The identity of a pod of the experimental mode. One that cannot be named has none: that mode fails open."""
    owner = owner_of(pod.labels, pod.annotations, pod.key.namespace)
    name = None if owner is None else OptionalNames(mesh.names).identity(owner)
    return name if isinstance(name, str) else None


def _opaque(config: Config, named: Mapping[str, int]) -> Ports:
    """The opaque ports that an annotation lists (names of container ports resolved), else the default list."""
    given: str | None = config.get("opaque-ports")
    if given is None:
        return Ports(tuple((port, port) for port in DEFAULT_OPAQUE))
    return Ports(named_ranges(given, named))


# ---- from one world to the next ----


def _step(world: World, snapshot: Snapshot) -> World:
    changes = snapshot.changes
    if changes is None or changes.since != world.snapshot.version:
        changes = difference(world.snapshot, snapshot)
    before = world.snapshot
    touched: set[Tag] = set()
    services_by_ip, services_by_namespace = _services(world, snapshot, changes, touched)
    slices_by_service, services_by_endpoint = _slices(world, snapshot, changes, touched)
    pods, pods_by_ip, pods_by_namespace = dict(world.pods), dict(world.pods_by_ip), _Groups(world.pods_by_namespace)
    rewritten = {key for name in changes.namespaces for key in world.pods_by_namespace.get(name, ())}
    gone, here = _split(changes.pods | rewritten, snapshot.pods)
    for key in (*gone, *here):  # an address that moves from one pod to another ends with the one that has it
        pod = snapshot.pods.get(key)
        known = pods.get(key)
        own = _own_addresses(pod) if pod is not None else ()
        # Only what goes is deleted: a dictionary with holes is copied ten times slower.
        for ip in _own_addresses(known.pod) if known is not None else ():
            if ip not in own and (holder := pods_by_ip.get(ip)) is not None and holder.pod.key == key:
                del pods_by_ip[ip]
        if pod is not None:
            fact = _once_meshed(known, pod_facts(world.mesh, pod, snapshot.namespaces.get(key.namespace)))
            pods[key] = fact
            pods_by_namespace.put(key.namespace, key, fact)
            pods_by_ip.update(dict.fromkeys(own, fact))
        else:
            pods.pop(key, None)
            pods_by_namespace.remove(key.namespace, key)
        touched.add(("pod", key))
        for one in (before.pods.get(key), pod):
            if one is not None:
                touched.update(("ip", ip) for ip in one.ips)
                touched.update(_services_of(one, snapshot, services_by_namespace, services_by_endpoint))
    return World(
        world.mesh,
        snapshot,
        pods,
        pods_by_ip,
        pods_by_namespace.groups,
        services_by_ip,
        services_by_namespace,
        slices_by_service,
        services_by_endpoint,
        frozenset(touched),
    )


def difference(before: Snapshot, now: Snapshot) -> Changes:
    """What differs between two snapshots, found by looking at each object."""
    return Changes(
        before.version,
        frozenset(_differing(before.pods, now.pods)),
        frozenset(_differing(before.services, now.services)),
        frozenset(_differing(before.namespaces, now.namespaces)),
        frozenset(_differing(before.slices or {}, now.slices or {})),
    )


def _differing(before: Mapping[Name, Value], now: Mapping[Name, Value]) -> Iterable[Name]:
    yield from (name for name, value in now.items() if (old := before.get(name)) is not value and old != value)
    yield from (name for name in before if name not in now)


def _split(keys: Iterable[Key], objects: Mapping[Key, Pod]) -> tuple[list[Key], list[Key]]:
    gone: list[Key] = []
    here: list[Key] = []
    for key in keys:
        (here if key in objects else gone).append(key)
    # A fixed order, and those that hold an address after those that do not any more.
    here.sort(key=lambda key: (objects[key].phase in ("Pending", "Running"), key.namespace, key.name))
    return gone, here


def _own_addresses(pod: Pod) -> tuple[str, ...]:
    return pod.ips if not pod.host_network and pod.phase in ("Pending", "Running") else ()


def _services_of(
    pod: Pod,
    snapshot: Snapshot,
    services: Mapping[str, Mapping[Key, Service]],
    by_endpoint: Mapping[str, frozenset[Key]],
) -> Iterable[Tag]:
    """The services that a pod is, or may be, behind."""
    if snapshot.slices is not None:
        return (("service", service) for ip in pod.ips for service in by_endpoint.get(ip, ()))
    labels = pod.labels.items()
    candidates = services.get(pod.key.namespace, {}).values()
    return (("service", s.key) for s in candidates if s.selector and s.selector.items() <= labels)


def addresses_of(service: Service) -> tuple[str, ...]:
    """The addresses that clients know a service by."""
    if service.cluster_ip in ("", HEADLESS):
        return ()
    return (service.cluster_ip, *service.more_cluster_ips)


def _services(
    world: World, snapshot: Snapshot, changes: Changes, touched: set[Tag]
) -> tuple[Mapping[str, Service], Mapping[str, Mapping[Key, Service]]]:
    rewritten = {key for name in changes.namespaces for key in world.services_by_namespace.get(name, ())}
    if not changes.services and not rewritten:
        return world.services_by_ip, world.services_by_namespace
    by_ip, groups = dict(world.services_by_ip), _Groups(world.services_by_namespace)
    old = {key: world.snapshot.services.get(key) for key in changes.services | rewritten}
    for service in old.values():
        for ip in addresses_of(service) if service is not None else ():
            by_ip.pop(ip, None)
            touched.add(("ip", ip))
    for key in old:
        touched.add(("service", key))
        service = snapshot.services.get(key)
        if service is None:
            groups.remove(key.namespace, key)
            continue
        groups.put(key.namespace, key, service)
        for ip in addresses_of(service):
            by_ip[ip] = service
            touched.add(("ip", ip))
    return by_ip, groups.groups


def _slices(
    world: World, snapshot: Snapshot, changes: Changes, touched: set[Tag]
) -> tuple[Mapping[Key, Mapping[Key, EndpointSlice]], Mapping[str, frozenset[Key]]]:
    if not changes.slices:
        return world.slices_by_service, world.services_by_endpoint
    before, now = world.snapshot.slices or {}, snapshot.slices or {}
    groups, by_endpoint = _Groups(world.slices_by_service), dict(world.services_by_endpoint)
    moved: dict[Key, set[str]] = {}
    for key in changes.slices:
        for one in (before.get(key), now.get(key)):
            if one is not None:
                touched.add(("service", one.service))
                moved.setdefault(one.service, set()).update(e.address for e in one.endpoints)
        if (old := before.get(key)) is not None:
            groups.remove(old.service, key)
        if (new := now.get(key)) is not None:
            groups.put(new.service, key, new)
    for service, addresses in moved.items():
        held = {e.address for one in groups.groups.get(service, {}).values() for e in one.endpoints}
        for address in addresses:
            others = by_endpoint.get(address, frozenset()) - {service}
            if address in held:
                by_endpoint[address] = others | {service}
            elif others:
                by_endpoint[address] = others
            else:
                by_endpoint.pop(address, None)
    return groups.groups, by_endpoint


class _Groups(Generic[Group, Member, Value]):
    """Mappings by group. A group is copied when it is first changed, and forgotten when it is empty."""

    def __init__(self, groups: Mapping[Group, Mapping[Member, Value]]) -> None:
        self.groups: dict[Group, Mapping[Member, Value]] = dict(groups)
        self._own: dict[Group, dict[Member, Value]] = {}

    def _of(self, group: Group) -> dict[Member, Value]:
        if group not in self._own:
            self._own[group] = dict(self.groups.get(group, {}))
            self.groups[group] = self._own[group]
        return self._own[group]

    def put(self, group: Group, member: Member, thing: Value) -> None:
        self._of(group)[member] = thing

    def remove(self, group: Group, member: Member) -> None:
        members = self._of(group)
        members.pop(member, None)
        if not members:
            del self.groups[group], self._own[group]
