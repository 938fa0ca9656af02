"""Where a destination leads: endpoints of a service's port, the profile of an address or name, and the steps between
two answers.

Decides from a `World`, as plain values; `control/wire.py` writes them as messages. An endpoint has an identity only if
a proxy of this mesh serves it, and an endpoint whose identity cannot be written is left out: it is never plaintext by
mistake.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from mantle.core.annotations import LABEL_CONTROL_NS
from mantle.core.model import Key, Service, ServicePort, SliceEndpoint
from mantle.core.names import BadName, is_label
from mantle.core.reasons import NoIdentity, NotADestination
from mantle.core.world import HEADLESS, PodFacts, Tag, View, World, is_optional, unreadable

KEPT_ENDPOINTS = 32
"""Of one pod: callers may ask for any port."""
Address = tuple[str, int]
"""(IP as text, TCP port)"""


class Hint(Enum):
    """What the peer's proxy does with the bytes."""

    NONE = auto()
    H2 = auto()
    """It detects, and takes HTTP/1 carried over HTTP/2."""
    OPAQUE = auto()
    """It does not look into them."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address. `tls` is the identity that must be proved there, or why it is plaintext."""

    address: Address
    tls: str | NoIdentity
    opaque_transport: int | None
    """The peer proxy's inbound port, when its own framing may be used; None: plain mesh TLS on the port itself."""
    hint: Hint
    labels: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The ready endpoints of a service's port. `exists` is False if there is no such service or port."""

    exists: bool
    by_address: Mapping[Address, Endpoint] = field(default_factory=dict)
    labels: tuple[tuple[str, str], ...] = ()
    """Of every endpoint."""


@dataclass(frozen=True, slots=True)
class ServiceTarget:
    """A service's port, by name. Whether it exists is another question."""

    key: Key
    port: int


@dataclass(frozen=True, slots=True)
class AddressTarget:
    """An address, which may be a service's, a pod's, or a stranger's."""

    ip: str
    port: int


@dataclass(frozen=True, slots=True)
class BadTarget:
    """Why a path cannot be asked for; `wanted` says which form could."""

    reason: NotADestination
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.reason}: found {self.found!r}, wanted {self.wanted}"


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known about a destination. All empty: nothing, it is a stranger."""

    service: Key | None = None
    port: int = 0
    name: str = ""
    """`name.namespace.svc.<domain>`, if it is a service."""
    opaque: bool = False
    endpoint: Endpoint | None = None
    """If it is one pod."""


# ---- what a caller asks for ----

_PORT = re.compile(r"[0-9]{1,5}")


def parse_path(path: str, cluster_domain: str) -> ServiceTarget | AddressTarget | BadTarget:
    """Reads `name.ns.svc.<domain>:port` (a final dot is allowed) or `ip:port` (`[ip]:port` for IPv6)."""
    wanted = f"<service>.<namespace>.svc.{cluster_domain}:<port> or <ip>:<port>"
    host, colon, digits = path.rpartition(":")
    if not colon or not host or not _PORT.fullmatch(digits) or not 0 < int(digits) < 65536:
        return BadTarget(NotADestination.MALFORMED, path[:300], wanted)
    port = int(digits)
    try:
        return AddressTarget(str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))), port)
    except ValueError:
        pass  # not an address: it may be a name
    name = host.removesuffix(".").lower()
    labels = name.removesuffix(f".svc.{cluster_domain}").split(".")
    if not name.endswith(f".svc.{cluster_domain}") or len(labels) != 2 or not all(is_label(label) for label in labels):
        return BadTarget(NotADestination.NOT_A_SERVICE_NAME, path[:300], wanted)
    return ServiceTarget(Key(labels[1], labels[0]), port)


def service_name(key: Key, cluster_domain: str) -> str:
    """The service's fully qualified name."""
    return f"{key.name}.{key.namespace}.svc.{cluster_domain}"


# ---- answers ----


def depends_on(target: ServiceTarget | AddressTarget) -> tuple[Tag, ...]:
    """What answers about a destination depend on: as long as none of it is `World.touched`, they stay the same."""
    return (("service", target.key),) if isinstance(target, ServiceTarget) else (("ip", target.ip),)


def view_of(world: World, caller: Key | None) -> View:
    """With whose eyes the pod that asks is answered; everybody else is of the default mode."""
    facts = None if caller is None else world.pods.get(caller)
    if facts is None:
        return View.REQUIRED
    return View.OPTIONAL if is_optional(facts.pod) else View.MIGRATING if facts.migrating else View.REQUIRED


def service_endpoints(world: World, target: ServiceTarget) -> Endpoints:
    """The ready endpoints of a service's TCP port, in the order of their addresses: what its slices list where the
    platform has slices, else the pods that its selector matches.
    """
    service = world.snapshot.services.get(target.key)
    port = service_port(service, target.port) if service else None
    if service is None or port is None or service.external_name:
        return Endpoints(exists=False)
    behind = _selected if world.snapshot.slices is None else _sliced
    found = {e.address: e for e in behind(world, service, port) if not isinstance(e, BadName)}
    labels = (("namespace", target.key.namespace), ("service", target.key.name))
    return Endpoints(exists=True, by_address=dict(sorted(found.items())), labels=labels)


def _selected(world: World, service: Service, port: ServicePort) -> Iterator[Endpoint | BadName]:
    """The pods a selector sends to. An empty selector selects none (its endpoints would be kept by someone else)."""
    if not service.selector:
        return
    wanted = service.selector.items()
    for facts in world.pods_by_namespace.get(service.key.namespace, {}).values():
        pod = facts.pod
        in_use = pod.ip and pod.phase in ("Pending", "Running") and (pod.ready or service.publish_not_ready)
        if in_use and wanted <= pod.labels.items():
            number = facts.port_named(port.target_port) if isinstance(port.target_port, str) else port.target_port
            if number is not None:
                yield pod_endpoint(world, facts, number)


def _sliced(world: World, service: Service, port: ServicePort) -> Iterator[Endpoint | BadName]:
    """What the service's slices of its first address family list as ready."""
    for one in world.slices_by_service.get(service.key, {}).values():
        if one.ip_family != service.ip_family:
            continue
        numbers = [p.port for p in one.ports if p.name == port.name and p.protocol == port.protocol]
        for listed in one.endpoints if numbers else ():
            if listed.ready:
                yield from _listed(world, listed, service.key.namespace, numbers[0])


def _listed(world: World, listed: SliceEndpoint, namespace: str, port: int) -> Iterator[Endpoint | BadName]:
    """One address of a slice. It has an identity only as the pod whose address it is.

    A slice may be ahead of what is known of its pods, or name a pod that has another address: then the address is left
    out until both agree, because without the pod it would be plaintext by mistake, and with it someone else's name.
    """
    if listed.pod is None:
        facts = world.pods_by_ip.get(listed.address)
        if facts is None:
            labels = (("namespace", namespace),)
            yield Endpoint((listed.address, port), NoIdentity.NOT_A_POD, None, Hint.NONE, labels)
            return
    else:
        facts = world.pods.get(listed.pod)
        if facts is None or listed.address not in facts.pod.ips:
            return
    yield pod_endpoint(world, facts, port, listed.address)


def pod_endpoint(world: World, facts: PodFacts, port: int, ip: str = "") -> Endpoint | BadName:
    """One port of one pod as an endpoint, or why its identity cannot be written (then there is no endpoint). `ip` is
    which of its addresses; its first one if empty.
    """
    asked = (port, ip, world.view)
    made: Endpoint | BadName | None = facts.made.get(asked)
    if made is None:
        made = _pod_endpoint(facts, port, ip, world.view)
        if len(facts.made) < KEPT_ENDPOINTS:
            facts.made[asked] = made
    return made


def _pod_endpoint(facts: PodFacts, port: int, ip: str, view: View) -> Endpoint | BadName:
    pod = facts.pod
    labels = {"namespace": pod.key.namespace, "pod": pod.key.name, "serviceaccount": pod.service_account}
    if pod.owner.kind != "Pod":  # an owner is the pod's own word: it names no other namespace or account
        labels.setdefault(pod.owner.kind.lower(), pod.owner.name)
    address = (ip or pod.ip, port)
    identity: str | NoIdentity | BadName = NoIdentity.PORT_SKIPPED if port in facts.skipped else _seen(facts, view)
    if isinstance(identity, BadName):
        return identity
    if isinstance(identity, NoIdentity):
        return Endpoint(address, identity, None, Hint.NONE, tuple(sorted(labels.items())))
    labels["control_plane_ns"] = pod.labels[LABEL_CONTROL_NS]
    fixed = tuple(sorted(labels.items()))
    if port in (facts.control_port, facts.admin_port):
        # The proxy's own servers: they are asked on their own port, not through its inbound port.
        return Endpoint(address, identity, None, Hint.NONE, fixed)
    if facts.transparent:
        # TLS straight to the port, without framing of ours: HTTP/1 is not carried over HTTP/2 there.
        return Endpoint(address, identity, None, Hint.OPAQUE if port in facts.opaque else Hint.NONE, fixed)
    hint = Hint.OPAQUE if port in facts.opaque else Hint.H2
    return Endpoint(address, identity, facts.inbound_port, hint, fixed)


def _seen(facts: PodFacts, view: View) -> str | NoIdentity | BadName:
    """The identity that a caller can verify and that will accept the caller, or why there is none."""
    if facts.optional is not None:
        return NoIdentity.OPTIONAL_TLS if view is View.REQUIRED else facts.optional
    if view is View.OPTIONAL and isinstance(facts.identity, str) and not isinstance(facts.identity, NoIdentity):
        return facts.identity if facts.migrating else NoIdentity.OPTIONAL_TLS
    return facts.identity


def profile(world: World, target: ServiceTarget | AddressTarget) -> Profile | BadName:
    """What is known about a name or an address. A stranger's profile is empty.

    A `BadName` is a meshed pod whose identity cannot be written, or a pod or service that cannot be read. It must not
    look like a stranger (that would be plaintext): the caller gets an error that it retries.
    """
    if isinstance(target, ServiceTarget):
        return _service_profile(world, world.snapshot.services.get(target.key), target.port)
    service = world.services_by_ip.get(target.ip)
    if service is not None:
        return _service_profile(world, service, target.port)
    facts = world.pods_by_ip.get(target.ip)
    if facts is None:
        return Profile()
    endpoint = pod_endpoint(world, facts, target.port, target.ip)
    if isinstance(endpoint, BadName):
        return endpoint
    return Profile(port=target.port, opaque=target.port in facts.opaque, endpoint=endpoint)


def service_port(service: Service, number: int) -> ServicePort | None:
    """The service's TCP port of that number; None if it has none."""
    return next((port for port in service.ports if port.port == number and port.protocol == "TCP"), None)


def _service_profile(world: World, service: Service | None, number: int) -> Profile | BadName:
    if service is not None and service.unreadable:
        return unreadable(service.key)
    port = service_port(service, number) if service else None
    if service is None or port is None:
        return Profile()
    name = service_name(service.key, world.mesh.cluster_domain)
    return Profile(service.key, number, name, world.service_port_opaque(service, port))


def service_at(world: World, target: ServiceTarget | AddressTarget) -> tuple[Service, ServicePort] | BadName | None:
    """The service and port that clients mean with an address or name; None if it is none (a pod, a stranger), a
    `BadName` if it cannot be read.
    """
    if isinstance(target, AddressTarget):
        service = world.services_by_ip.get(target.ip)
    else:
        service = world.snapshot.services.get(target.key)
    if service is not None and service.unreadable:
        return unreadable(service.key)
    by_name = service if isinstance(target, ServiceTarget) else None
    if by_name is not None and (by_name.external_name or _without_endpoints(world, by_name)):
        return None
    port = service_port(service, target.port) if service else None
    return None if service is None or port is None else (service, port)


def _without_endpoints(world: World, service: Service) -> bool:
    """A headless service that nobody keeps endpoints for: its name leads wherever DNS says."""
    kept_by_hand = bool(world.slices_by_service.get(service.key))
    return service.cluster_ip == HEADLESS and not service.selector and not kept_by_hand


# ---- steps between two answers ----


@dataclass(frozen=True, slots=True)
class Add:
    endpoints: tuple[Endpoint, ...]
    labels: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Remove:
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Nothing:
    """There are no endpoints (any more)."""

    exists: bool


Step = Add | Remove | Nothing


def full(now: Endpoints) -> tuple[Step, ...]:
    """The first message of every stream: the whole set, or that it is empty."""
    if not now.by_address:
        return (Nothing(now.exists),)
    return (Add(tuple(now.by_address.values()), now.labels),)


def step(before: Endpoints, now: Endpoints) -> tuple[Step, ...]:
    """What turns `before` into `now`: additions and changes first, so that a set in use is never empty between."""
    if not now.by_address:
        return (Nothing(now.exists),) if before.by_address or before.exists != now.exists else ()
    added = tuple(e for address, e in now.by_address.items() if before.by_address.get(address) != e)
    if before.labels != now.labels:
        added = tuple(now.by_address.values())
    removed = _missing(before.by_address, now.by_address)
    return tuple(part for part, any_ in ((Add(added, now.labels), added), (Remove(removed), removed)) if any_)


def _missing(before: Iterable[Address], now: Mapping[Address, Endpoint]) -> tuple[Address, ...]:
    return tuple(address for address in before if address not in now)
