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
    """An address, or `None` as text for a headless service (Kubernetes spells it so)."""
    ports: tuple[ServicePort, ...] = ()
    selector: Mapping[str, str] = field(default_factory=_empty)
    annotations: Mapping[str, str] = field(default_factory=_empty)
    publish_not_ready: bool = False


@dataclass(frozen=True, slots=True)
class Namespace:
    name: str
    labels: Mapping[str, str] = field(default_factory=_empty)
    annotations: Mapping[str, str] = field(default_factory=_empty)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything the mesh knows, at one version. Versions grow; equal versions are equal content."""

    version: int = 0
    pods: Mapping[Key, Pod] = field(default_factory=dict)
    services: Mapping[Key, Service] = field(default_factory=dict)
    namespaces: Mapping[str, Namespace] = field(default_factory=dict)
