"""What a pod's spec says about itself, for injection: what keeps it out of the mesh, and which ports it serves.

Pure: plain dictionaries as the YAML has them in, values out; knows nothing of what injection adds.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any

from mantle.core.annotations import INJECT, Config, Mistake, named_ranges, spelled

DEFAULT_OPAQUE = (25, 587, 3306, 4444, 5432, 6379, 9300, 11211)
"""Protocols whose server speaks first: SMTP, MySQL, Galera, PostgreSQL, Redis, Elasticsearch, memcached."""
FOREIGN_SIDECARS = (
    "linkerd-proxy",
    "linkerd-init",
    "linkerd-network-validator",
    "istio-proxy",
    "istio-init",
    "istio-validation",
    "kuma-sidecar",
    "kuma-init",
    "consul-dataplane",
    "consul-connect-inject-init",
)
FOREIGN_IMAGES = (
    "cr.l5d.io/linkerd/proxy:",
    "cr.l5d.io/linkerd/proxy-init:",
    "gcr.io/istio-release/proxyv2:",
    "gcr.io/istio-release/proxy_init:",
    "docker.io/istio/proxyv2:",
    "istio/proxyv2:",
    "docker.io/kumahq/kuma-dp:",
    "kumahq/kuma-dp:",
    "hashicorp/consul-dataplane:",
)


class Skip(enum.StrEnum):
    """Why a pod was left as it is. The value is the label in metrics and events."""

    HOST_NETWORK = "host_network_enabled"
    FOREIGN_SIDECAR = "sidecar_already_exists"
    UNSUPPORTED = "unsupported_resource"
    STATIC = "static_pod"
    NOT_ENABLED = "injection_enable_annotation_absent"
    DISABLED = "injection_disable_annotation_present"

    def message(self) -> str:
        """The same for people."""
        return {
            Skip.HOST_NETWORK: "hostNetwork is enabled",
            Skip.FOREIGN_SIDECAR: "pod has a sidecar injected already",
            Skip.UNSUPPORTED: "this resource kind is unsupported",
            Skip.STATIC: "the kubelet runs it from a file on its node, which nobody else can change",
            Skip.NOT_ENABLED: f'neither the namespace nor the pod have the annotation "{INJECT}:enabled"',
            Skip.DISABLED: f'pod has the annotation "{INJECT}:disabled"',
        }[self]


_PROBE = {way: dict[str, Any]() for way in ("httpGet", "tcpSocket", "grpc")}
_CONTAINER: Mapping[str, Any] = {
    "securityContext": {},
    "ports": [{"containerPort": int}],
    **dict.fromkeys(("startupProbe", "readinessProbe", "livenessProbe"), _PROBE),
}
_SHAPE: Mapping[str, Any] = {
    "metadata": {"labels": {}, "annotations": {}},
    "spec": {
        "securityContext": {"sysctls": [{}]},
        "volumes": [{}],
        "initContainers": [_CONTAINER],
        "containers": [_CONTAINER],
    },
}
"""What injection reads of a pod: mappings, lists of mappings, and numbers that must be there."""


def misshapen(pod: Mapping[str, Any]) -> tuple[Mistake, ...]:
    """Everything in a pod that is not of the form that Kubernetes gives it, as far as injection looks. A file may hold
    anything; the API server sends none of these.
    """
    return tuple(_misshapen(pod, _SHAPE, ""))


def _misshapen(value: Any, shape: Any, path: str) -> Iterator[Mistake]:
    if shape is int:
        if not isinstance(value, int) or isinstance(value, bool):
            yield Mistake(path, str(value)[:100], "a number")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield Mistake(path, str(value)[:100], "a list")
            return
        for index, item in enumerate(value):
            yield from _misshapen(item, shape[0], f"{path}[{index}]")
    elif not isinstance(value, Mapping):
        yield Mistake(path or "pod", str(value)[:100], "a mapping")
    else:
        for key, inner in shape.items():
            if inner is int or value.get(key) is not None:
                yield from _misshapen(value.get(key), inner, f"{path}.{key}" if path else key)


def obstacles(spec: Mapping[str, Any]) -> Iterator[Skip]:
    """What keeps a pod with this spec out of the mesh, whatever its annotations say."""
    if spec.get("hostNetwork"):
        yield Skip.HOST_NETWORK
    for container in containers(spec):
        if container.get("name") in FOREIGN_SIDECARS or str(container.get("image", "")).startswith(FOREIGN_IMAGES):
            yield Skip.FOREIGN_SIDECAR
            return


def containers(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Init containers, then containers."""
    yield from spec.get("initContainers") or []
    yield from spec.get("containers") or []


def has_udp_ports(spec: Mapping[str, Any]) -> bool:
    return any(port.get("protocol") == "UDP" for c in containers(spec) for port in c.get("ports") or [])


def inbound_ports(spec: Mapping[str, Any]) -> tuple[int, ...]:
    """Every TCP port the pod says it serves: container ports, and the ports its probes ask. Sorted."""
    ports = {
        int(port["containerPort"])
        for container in containers(spec)
        for port in container.get("ports") or []
        if port.get("protocol", "TCP") == "TCP"
    }
    return tuple(sorted(ports | set(probed_ports(spec, "httpGet", "tcpSocket", "grpc"))))


def probed_ports(spec: Mapping[str, Any], *ways: str) -> tuple[int, ...]:
    """The ports that probes of these ways (`httpGet`, `tcpSocket`, `grpc`) ask, names resolved. Sorted."""
    ports: set[int] = set()
    for container in containers(spec):
        named = {p["name"]: p.get("containerPort") for p in container.get("ports") or [] if "name" in p}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            for way in ways:
                asked = ((container.get(probe) or {}).get(way) or {}).get("port")
                number = named.get(asked, asked)
                if isinstance(number, int):
                    ports.add(number)
    return tuple(sorted(ports))


def opaque_ports(spec: Mapping[str, Any], config: Config) -> str:
    """The pod's opaque ports as a list: the annotation's, names resolved; else the default list ∩ container ports."""
    given = config.get("opaque-ports")
    if given is None:
        return ",".join(str(port) for port in inbound_ports(spec) if port in DEFAULT_OPAQUE)
    named = {p["name"]: int(p["containerPort"]) for c in containers(spec) for p in c.get("ports") or [] if "name" in p}
    return spelled(named_ranges(given, named))
