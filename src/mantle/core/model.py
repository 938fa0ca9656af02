"""What a platform tells the mesh about the world, as immutable values.

A `Snapshot` is the only way state travels: one writer (the platform) makes them, readers keep one for a whole
decision. Field names follow the Kubernetes API (https://kubernetes.io/docs/reference/kubernetes-api/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

EMPTY: Mapping[str, str] = MappingProxyType({})


def _empty() -> Mapping[str, str]:
    """Python 3.11 takes a mapping proxy for a mutable default."""
    return EMPTY


@dataclass(frozen=True, slots=True)
class Key:
    """The name of a namespaced object."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class ContainerPort:
    """A port that a pod's container declares. `name` may be empty."""

    name: str
    port: int
    protocol: str = "TCP"


@dataclass(frozen=True, slots=True)
class Owner:
    """The workload a pod belongs to, as users say it: `Deployment/web`, not the ReplicaSet between; else `Pod/NAME`."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that has an address."""

    key: Key
    uid: str
    ip: str
    service_account: str
    owner: Owner
    labels: Mapping[str, str] = field(default_factory=_empty)
    annotations: Mapping[str, str] = field(default_factory=_empty)
    ports: tuple[ContainerPort, ...] = ()
    phase: str = "Running"
    ready: bool = False
    node: str = ""
    host_network: bool = False
    proxy_started: bool = False
    """True once a `mantle-proxy` container of this pod has started: a labelled pod then has an identity."""
    probe_paths: tuple[tuple[int, str], ...] = ()
    """(port, path) of each httpGet and grpc probe: reachable without identity where the policy would refuse."""
    more_ips: tuple[str, ...] = ()
    """Its addresses beside `ip`: a dual-stack pod has one of each family."""
    unreadable: bool = False
    """It exists and cannot be read: only its name and addresses count, and nobody may take it for an unmeshed one."""

    @property
    def ips(self) -> tuple[str, ...]:
        """All its addresses; none while it has none."""
        return (self.ip, *self.more_ips) if self.ip else ()


@dataclass(frozen=True, slots=True)
class ServicePort:
    name: str
    port: int
    target_port: int | str
    """A number, or the name of a container port. Equal to `port` where the manifest leaves it out."""
    protocol: str = "TCP"
    app_protocol: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    key: Key
    cluster_ip: str
    """An address, `None` as text for a headless service (Kubernetes spells it so), or empty (ExternalName)."""
    ports: tuple[ServicePort, ...] = ()
    selector: Mapping[str, str] = field(default_factory=_empty)
    annotations: Mapping[str, str] = field(default_factory=_empty)
    publish_not_ready: bool = False
    more_cluster_ips: tuple[str, ...] = ()
    """Its addresses beside `cluster_ip`: of a dual-stack service, the second family's."""
    external_name: str = ""
    """What DNS answers for a service of type ExternalName: it has no endpoints, traffic goes where the name leads."""
    ip_family: str = "IPv4"
    """Of the endpoints that are balanced over: the service's first family."""
    unreadable: bool = False
    """It exists and cannot be read: nothing but its name and addresses counts. Its addresses are no stranger's."""


@dataclass(frozen=True, slots=True)
class SliceEndpoint:
    """One address behind a service. `pod` is the pod it claims to be (`targetRef`); None: the slice names none."""

    address: str
    pod: Key | None = None
    ready: bool = True


@dataclass(frozen=True, slots=True)
class SlicePort:
    """A port of every endpoint of a slice; `name` is the service port's."""

    name: str
    port: int
    protocol: str = "TCP"


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """A part of the addresses behind a service, as the cluster's controller or a person wrote it
    (https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/).
    """

    key: Key
    service: Key
    ip_family: str
    ports: tuple[SlicePort, ...]
    endpoints: tuple[SliceEndpoint, ...]


@dataclass(frozen=True, slots=True)
class Namespace:
    name: str
    labels: Mapping[str, str] = field(default_factory=_empty)
    annotations: Mapping[str, str] = field(default_factory=_empty)


@dataclass(frozen=True, slots=True)
class Changes:
    """Which objects differ from those of the snapshot of version `since`, so that nobody needs to look for them."""

    since: int
    pods: frozenset[Key] = frozenset()
    services: frozenset[Key] = frozenset()
    namespaces: frozenset[str] = frozenset()
    slices: frozenset[Key] = frozenset()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything the mesh knows, at one version. Versions grow; equal versions are equal content."""

    version: int = 0
    pods: Mapping[Key, Pod] = field(default_factory=dict)
    services: Mapping[Key, Service] = field(default_factory=dict)
    namespaces: Mapping[str, Namespace] = field(default_factory=dict)
    slices: Mapping[Key, EndpointSlice] | None = None
    """What is behind services. None: this platform has no slices, a service's selector says which pods."""
    changes: Changes | None = field(default=None, compare=False)
    """What is new, for those who have the snapshot before it; None: look for yourself."""
