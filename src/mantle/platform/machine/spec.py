"""What the node runtime is told to run: a pod with every question answered, as plain values that survive JSON.

The daemon's planner (`plan.py`) makes these from manifests; the supervisor (`supervisor.py`) carries them out and
decides nothing about images, users, services or the mesh. Durations are seconds, addresses dotted IPv4 text.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Role(enum.StrEnum):
    INIT = "init"
    """Runs to completion before the next container starts."""
    SIDECAR = "sidecar"
    """An init container with restartPolicy Always: starts in init order, is waited for until started, stops last."""
    APP = "app"


class Restart(enum.StrEnum):
    ALWAYS = "Always"
    ON_FAILURE = "OnFailure"
    NEVER = "Never"


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """One probe. Exactly one of `http`, `tcp`, `grpc`, `exec` is set. The supervisor runs exec; the daemon sends the
    others from the router."""

    http: tuple[str, int, str] | None = None
    """(scheme, port, path)"""
    http_headers: tuple[tuple[str, str], ...] = ()
    tcp: int | None = None
    grpc: tuple[int, str] | None = None
    """(port, service)"""
    exec: tuple[str, ...] | None = None
    initial_delay: float = 0.0
    period: float = 10.0
    timeout: float = 1.0
    success: int = 1
    failure: int = 3


@dataclass(frozen=True, slots=True)
class MountSpec:
    """A directory or file of the host (already made by the daemon, in the pod's state directory for volumes), bound
    into one container."""

    source: str
    target: str
    read_only: bool = False
    below: str = ""
    """What of `source` is meant (`subPath`). Applications may write there, so no symbolic link in it is followed."""


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    name: str
    role: Role
    argv: tuple[str, ...]
    """`argv[0]` is an absolute path on the host; the supervisor opens it before it gives up its rights."""
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    uid: int = 65534
    """Host uid as root; ignored (the one mapped uid) in a user namespace."""
    gid: int = 65534
    groups: tuple[int, ...] = ()
    capabilities: tuple[str, ...] = ()
    """Kept in the bounding, permitted and ambient sets: only Mantle's own containers get any (NET_ADMIN for the
    redirect)."""
    own_user_namespace: bool = True
    """Rootless: put the process in a nested user namespace, out of reach of the proxy. False for Mantle's own
    containers."""
    mounts: tuple[MountSpec, ...] = ()
    startup: ProbeSpec | None = None
    readiness: ProbeSpec | None = None
    liveness: ProbeSpec | None = None


@dataclass(frozen=True, slots=True)
class PodSpec:
    uid: str
    namespace: str
    name: str
    ip: str
    restart: Restart
    containers: tuple[ContainerSpec, ...]
    """In start order: init and sidecar containers as listed, then apps."""
    hostname: str = ""
    resolv_conf: str = ""
    hosts: str = ""
    grace: float = 30.0
    """terminationGracePeriodSeconds"""
    expose: tuple[str, ...] = ()
    """Host directories that must be reachable for this pod's users though an ancestor is private (a checkout in a
    home directory)."""
    spec_hash: str = ""
    """Of the manifest it was planned from: a pod whose hash changed is replaced."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Opaque to the runtime: what the daemon wants back after it restarted (owner, labels, ports, …)."""


class Phase(enum.StrEnum):
    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


@dataclass(frozen=True, slots=True)
class ContainerStatus:
    name: str
    state: str
    """`waiting`, `running` or `terminated`."""
    reason: str = ""
    """`PodInitializing`, `CrashLoopBackOff`, `StartError`, `Completed`, `Error`, … as kubectl shows it."""
    message: str = ""
    pid: int = 0
    """Of the container's own init, in the pod's PID namespace; 0 unless running."""
    started: bool = False
    """Running, and its startup probe (if any) has passed."""
    exit_code: int | None = None
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class PodStatus:
    uid: str
    phase: Phase
    containers: tuple[ContainerStatus, ...] = ()
    message: str = ""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """How one mesh's node is started."""

    mesh: str
    state_dir: str
    """The mesh's own directory, mode 0700, already made; `node.sock` and `pods/` appear in it."""
    pod_cidr: str = "10.203.0.0/17"
    service_cidr: str = "10.203.128.0/17"
    router_ip: str = "10.203.128.10"
    """The pods' gateway, where DNS listens and probes come from."""
    uplink: bool = True
    """As root: lead the pods out through the host. Without root it is always off."""
    cover: tuple[str, ...] = ()
    """More directories that no pod may see, beside the state directories of all meshes."""
    backoff: float = 10.0
    """The first repeated restart waits this many seconds, each later one twice as long, at most 30 times this."""


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a service address, for pods outside the mesh: the router sends it to one of the endpoints, evenly."""

    ip: str
    port: int
    endpoints: tuple[tuple[str, int], ...]
    protocol: str = "TCP"
    """TCP or UDP"""


@dataclass(frozen=True, slots=True)
class RunningPod:
    """A pod as the node knows it. `alive` turns False when its supervisor has ended; its files stay."""

    uid: str
    ip: str
    alive: bool


def to_json(value: Any) -> Any:
    """A spec or status as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def node_config_from_json(data: Mapping[str, Any]) -> NodeConfig:
    return NodeConfig(**{**data, "cover": tuple(data.get("cover", ()))})


def pod_from_json(data: Mapping[str, Any]) -> PodSpec:
    """The inverse of `to_json` for a PodSpec. Raises KeyError, TypeError or ValueError for anything else."""
    containers = tuple(_container(item) for item in data["containers"])
    rest = {key: value for key, value in data.items() if key not in ("containers", "restart", "expose")}
    return PodSpec(
        **rest, restart=Restart(data["restart"]), containers=containers, expose=tuple(data.get("expose", ()))
    )


def _container(data: Mapping[str, Any]) -> ContainerSpec:
    values = dict(data)
    for key in ("argv", "groups", "capabilities"):
        values[key] = tuple(values.get(key, ()))
    values["role"] = Role(values["role"])
    values["mounts"] = tuple(MountSpec(**item) for item in values.get("mounts", ()))
    for key in ("startup", "readiness", "liveness"):
        if values.get(key) is not None:
            values[key] = _probe(values[key])
    return ContainerSpec(**values)


def _probe(data: Mapping[str, Any]) -> ProbeSpec:
    values = dict(data)
    if values.get("http") is not None:
        scheme, port, path = values["http"]
        values["http"] = (scheme, port, path)
    if values.get("grpc") is not None:
        port, service = values["grpc"]
        values["grpc"] = (port, service)
    if values.get("exec") is not None:
        values["exec"] = tuple(values["exec"])
    values["http_headers"] = tuple((name, value) for name, value in values.get("http_headers", ()))
    return ProbeSpec(**values)


def status_from_json(data: Mapping[str, Any]) -> PodStatus:
    containers = tuple(ContainerStatus(**item) for item in data.get("containers", ()))
    return PodStatus(data["uid"], Phase(data["phase"]), containers, data.get("message", ""))
