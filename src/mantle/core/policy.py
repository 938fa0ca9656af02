"""Who may reach a port of a pod and what is spoken there; how traffic to a service is to be treated.

Decides from a `World`, as plain values; `control/wire.py` writes them as messages. Every port gets an answer at once:
one that nobody declared has the pod's default policy, and the proxy's own ports are open to everyone (what they serve
they authorize themselves). No port is opaque unless a list says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from mantle.core.annotations import LABEL_COMPONENT
from mantle.core.endpoints import AddressTarget, ServiceTarget, service_at, service_name
from mantle.core.model import Key
from mantle.core.names import BadName
from mantle.core.world import EVERYWHERE, Mesh, Network, PodFacts, World

AUTHENTICATED = {"all-unauthenticated": "all-authenticated", "cluster-unauthenticated": "cluster-authenticated"}
"""What `proxy-require-identity-inbound-ports` makes of a policy. `audit` would let everyone in, so it becomes the
first.
"""

GRPC_HEALTH = "/grpc.health.v1.Health/Check"
"""The path of a grpc probe; it is a POST, where an httpGet probe is a GET."""

TLS_ONLY = "all-tls-unauthenticated"
CERTIFY_PORT = 8080
"""Identity's: asked by proxies that have no certificate yet, but never in plaintext, as they show their token."""


class Clients(Enum):
    """Which clients an authorization is for."""

    ANYONE = auto()
    """With or without TLS."""
    ANY_TLS = auto()
    """Mesh TLS, with or without a client identity."""
    ANY_IDENTITY = auto()
    """Mesh TLS with any client identity."""


@dataclass(frozen=True, slots=True)
class Authorization:
    """Clients from these networks may connect. `name` is a default's name, as metrics show it."""

    name: str
    networks: tuple[Network, ...]
    clients: Clients


@dataclass(frozen=True, slots=True)
class ServerPolicy:
    """What a port accepts. Without authorizations: nobody but the pod itself."""

    name: str
    opaque: bool
    authorizations: tuple[Authorization, ...]
    probe_paths: tuple[str, ...] = ()
    """What probes ask for: allowed from `probe_networks` whatever the authorizations say."""
    probe_networks: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class ServicePolicy:
    """How traffic to a service's port is treated: balanced over what discovery answers for `path`."""

    service: Key
    port: int
    path: str
    opaque: bool


@dataclass(frozen=True, slots=True)
class NotOurs:
    """The destination is no service: the proxy passes it through, or uses the profile's endpoint."""


def inbound(world: World, facts: PodFacts, port: int) -> ServerPolicy:
    """The policy of one port of one pod."""
    if port in (facts.control_port, facts.admin_port):
        open_to_all = Authorization("all-unauthenticated", EVERYWHERE, Clients.ANYONE)
        return ServerPolicy("all-unauthenticated", False, (open_to_all,))
    if port == CERTIFY_PORT and _is_identity(world, facts):
        return ServerPolicy(TLS_ONLY, False, (Authorization(TLS_ONLY, EVERYWHERE, Clients.ANY_TLS),))
    policy = facts.policy
    if port in facts.authenticated:
        policy = "all-authenticated" if policy == "audit" else AUTHENTICATED.get(policy, policy)
    opaque = port in facts.opaque
    paths = (
        ()
        if opaque
        else tuple(sorted({path.partition("?")[0] for number, path in facts.pod.probe_paths if number == port}))
    )
    return ServerPolicy(policy, opaque, default_authorizations(world.mesh, policy), paths, world.mesh.probe_networks)


def _is_identity(world: World, facts: PodFacts) -> bool:
    """Whether it is a pod of identity. Only the control namespace's own label counts."""
    pod = facts.pod
    return pod.key.namespace == world.mesh.names.control_namespace and pod.labels.get(LABEL_COMPONENT) == "identity"


def default_authorizations(mesh: Mesh, policy: str) -> tuple[Authorization, ...]:
    """What a default policy allows. A word that is none of them allows nothing, like `deny`."""
    match policy:
        case "all-unauthenticated" | "audit":
            return (Authorization(policy, EVERYWHERE, Clients.ANYONE),)
        case "all-authenticated":
            return (Authorization(policy, EVERYWHERE, Clients.ANY_IDENTITY),)
        case "cluster-unauthenticated":
            return (Authorization(policy, mesh.cluster_networks, Clients.ANYONE),)
        case "cluster-authenticated":
            return (Authorization(policy, mesh.cluster_networks, Clients.ANY_IDENTITY),)
    return ()


def outbound(world: World, target: ServiceTarget | AddressTarget) -> ServicePolicy | NotOurs | BadName:
    """The policy of traffic to an address or name: a service's, or that it is not ours. A `BadName` is a service that
    cannot be read: it must not be passed through like a stranger.
    """
    found = service_at(world, target)
    if isinstance(found, BadName):
        return found
    if found is None:
        return NotOurs()
    service, port = found
    path = f"{service_name(service.key, world.mesh.cluster_domain)}:{port.port}"
    return ServicePolicy(service.key, port.port, path, world.service_port_opaque(service, port))
