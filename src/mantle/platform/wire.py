"""`mantle.v1` messages to and from the platform's values, for both ends of the platform socket.

`full` and `between` make what a watcher is sent; `Mirror` is the watcher's copy. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

from mantle.core.model import (
    EMPTY,
    ContainerPort,
    Key,
    Namespace,
    Owner,
    Pod,
    Service,
    ServicePort,
    Snapshot,
)
from mantle.gen.mantle.v1 import platform_pb2 as pb
from mantle.platform.port import TokenClaims, TokenRejected

# ---- what a watcher is sent ----


def full(snapshot: Snapshot) -> pb.Change:
    """Everything, as the first message of a stream."""
    return pb.Change(
        version=snapshot.version,
        reset=True,
        pods=[pod_to_proto(pod) for pod in snapshot.pods.values()],
        services=[service_to_proto(service) for service in snapshot.services.values()],
        namespaces=[namespace_to_proto(namespace) for namespace in snapshot.namespaces.values()],
    )


def between(before: Snapshot, now: Snapshot) -> pb.Change:
    """What changed from one snapshot to a later one."""
    return pb.Change(
        version=now.version,
        pods=[pod_to_proto(pod) for key, pod in now.pods.items() if before.pods.get(key) != pod],
        services=[service_to_proto(svc) for key, svc in now.services.items() if before.services.get(key) != svc],
        namespaces=[namespace_to_proto(ns) for name, ns in now.namespaces.items() if before.namespaces.get(name) != ns],
        removed_pods=_keys(key for key in before.pods if key not in now.pods),
        removed_services=_keys(key for key in before.services if key not in now.services),
        removed_namespaces=[name for name in before.namespaces if name not in now.namespaces],
    )


class Mirror:
    """A watcher's copy: changes go in, snapshots come out. What did not change stays the same object.

    Versions are this mirror's own and grow by one with each change: a restarted platform counts from the start again.
    """

    def __init__(self) -> None:
        self._pods: dict[Key, Pod] = {}
        self._services: dict[Key, Service] = {}
        self._namespaces: dict[str, Namespace] = {}
        self.version = 0

    def apply(self, change: pb.Change) -> None:
        """Takes one message of the stream in."""
        if change.reset:
            self._reset(change)
        for pod in map(pod_from_proto, change.pods):
            if self._pods.get(pod.key) != pod:
                self._pods[pod.key] = pod
        for service in map(service_from_proto, change.services):
            if self._services.get(service.key) != service:
                self._services[service.key] = service
        for namespace in map(namespace_from_proto, change.namespaces):
            if self._namespaces.get(namespace.name) != namespace:
                self._namespaces[namespace.name] = namespace
        for key in change.removed_pods:
            self._pods.pop(key_from_proto(key), None)
        for key in change.removed_services:
            self._services.pop(key_from_proto(key), None)
        for name in change.removed_namespaces:
            self._namespaces.pop(name, None)
        self.version += 1

    def snapshot(self) -> Snapshot:
        """What is known now."""
        return Snapshot(self.version, dict(self._pods), dict(self._services), dict(self._namespaces))

    def _reset(self, change: pb.Change) -> None:
        pods = {key_from_proto(pod.key) for pod in change.pods}
        services = {key_from_proto(service.key) for service in change.services}
        namespaces = {namespace.name for namespace in change.namespaces}
        self._pods = {key: pod for key, pod in self._pods.items() if key in pods}
        self._services = {key: service for key, service in self._services.items() if key in services}
        self._namespaces = {name: namespace for name, namespace in self._namespaces.items() if name in namespaces}


# ---- objects ----


def key_to_proto(key: Key) -> pb.ObjectKey:
    return pb.ObjectKey(namespace=key.namespace, name=key.name)


def key_from_proto(message: pb.ObjectKey) -> Key:
    return Key(message.namespace, message.name)


def pod_to_proto(pod: Pod) -> pb.Pod:
    return pb.Pod(
        key=key_to_proto(pod.key),
        uid=pod.uid,
        ip=pod.ip,
        service_account=pod.service_account,
        owner_kind=pod.owner.kind,
        owner_name=pod.owner.name,
        labels=pod.labels,
        annotations=pod.annotations,
        ports=[pb.ContainerPort(name=port.name, port=port.port, protocol=port.protocol) for port in pod.ports],
        phase=pod.phase,
        ready=pod.ready,
        node=pod.node,
        host_network=pod.host_network,
        proxy_started=pod.proxy_started,
        probe_paths=[pb.ProbePath(port=port, path=path) for port, path in pod.probe_paths],
    )


def pod_from_proto(message: pb.Pod) -> Pod:
    return Pod(
        key=key_from_proto(message.key),
        uid=message.uid,
        ip=message.ip,
        service_account=message.service_account,
        owner=Owner(message.owner_kind, message.owner_name),
        labels=MappingProxyType(dict(message.labels)),
        annotations=MappingProxyType(dict(message.annotations)),
        ports=tuple(ContainerPort(port.name, port.port, port.protocol) for port in message.ports),
        phase=message.phase,
        ready=message.ready,
        node=message.node,
        host_network=message.host_network,
        proxy_started=message.proxy_started,
        probe_paths=tuple((probe.port, probe.path) for probe in message.probe_paths),
    )


def service_to_proto(service: Service) -> pb.Service:
    return pb.Service(
        key=key_to_proto(service.key),
        cluster_ip=service.cluster_ip,
        ports=[_service_port_to_proto(port) for port in service.ports],
        selector=service.selector,
        annotations=service.annotations,
        publish_not_ready=service.publish_not_ready,
    )


def service_from_proto(message: pb.Service) -> Service:
    return Service(
        key=key_from_proto(message.key),
        cluster_ip=message.cluster_ip,
        ports=tuple(_service_port_from_proto(port) for port in message.ports),
        selector=MappingProxyType(dict(message.selector)),
        annotations=MappingProxyType(dict(message.annotations)) if message.annotations else EMPTY,
        publish_not_ready=message.publish_not_ready,
    )


def namespace_to_proto(namespace: Namespace) -> pb.Namespace:
    return pb.Namespace(name=namespace.name, labels=namespace.labels, annotations=namespace.annotations)


def namespace_from_proto(message: pb.Namespace) -> Namespace:
    return Namespace(message.name, MappingProxyType(dict(message.labels)), MappingProxyType(dict(message.annotations)))


def review_to_proto(outcome: TokenClaims | TokenRejected) -> pb.ReviewTokenResponse:
    """What the platform found out about a token."""
    if isinstance(outcome, TokenRejected):
        return pb.ReviewTokenResponse(rejected=pb.TokenRejected(reason=outcome.reason, detail=outcome.detail))
    return pb.ReviewTokenResponse(
        accepted=pb.TokenClaims(
            namespace=outcome.namespace,
            service_account=outcome.service_account,
            pod=outcome.pod,
            pod_uid=outcome.pod_uid,
            pod_ip=outcome.pod_ip,
        )
    )


def review_from_proto(message: pb.ReviewTokenResponse) -> TokenClaims | TokenRejected:
    """The same, read back. Raises ValueError for an answer that says neither: it must never pass for an acceptance."""
    match message.WhichOneof("outcome"):
        case "accepted":
            claims = message.accepted
            return TokenClaims(claims.namespace, claims.service_account, claims.pod, claims.pod_uid, claims.pod_ip)
        case "rejected":
            return TokenRejected(message.rejected.reason, message.rejected.detail)
    raise ValueError("the platform's token review says neither accepted nor rejected")


def _keys(keys: Iterable[Key]) -> list[pb.ObjectKey]:
    return [key_to_proto(key) for key in keys]


def _service_port_to_proto(port: ServicePort) -> pb.ServicePort:
    message = pb.ServicePort(name=port.name, port=port.port, protocol=port.protocol, app_protocol=port.app_protocol)
    if isinstance(port.target_port, int):
        message.number = port.target_port
    else:
        message.port_name = port.target_port
    return message


def _service_port_from_proto(message: pb.ServicePort) -> ServicePort:
    target: int | str = message.port_name if message.WhichOneof("target_port") == "port_name" else message.number
    return ServicePort(message.name, message.port, target or message.port, message.protocol, message.app_protocol)
