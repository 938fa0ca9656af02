"""The environment that injection gives a proxy: one list, in the order people read it.

Formats are those of the proxy (durations as number and unit, ports as `1,2-5`). Names are `MANTLE_PROXY_*`; with
`Values.interop` they are `LINKERD2_PROXY_*`, for an unmodified linkerd2-proxy under this control plane. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mantle.core.annotations import Config
from mantle.core.pod_facts import DEFAULT_OPAQUE

DETECT_FOREVER = "365d"


@dataclass(frozen=True, slots=True)
class Values:
    """What injection must be told about the mesh and the platform; the same for every pod."""

    version: str
    trust_anchors: str
    """PEM text."""
    networks: tuple[str, ...]
    """The mesh's networks (CIDRs): inside them the proxy fails closed."""
    control_namespace: str = "mantle"
    trust_domain: str = "cluster.local"
    cluster_domain: str = "cluster.local"
    token_audience: str = "identity.mantle.dev"
    inject_by_default: bool = False
    """True on one machine, where every pod is meshed unless it says otherwise."""
    mark: int | None = None
    """Exempt the proxy from the redirect by this socket mark instead of its user id (without root)."""
    proxy_uid: int = 2102
    guard: bool = False
    """Whether a container stays to put the redirect back when somebody flushes it: where others get at the rules."""
    proxy_image: str = "mantle/proxy"
    default_policy: str = "all-unauthenticated"
    interop: bool = False
    created_by: str = ""
    tls: str = "required"
    """What `mantle install --tls` was told: `optional` if there is a `ca` for pods of the experimental mode."""
    log: str = "warn,mantle=info"
    proxy_env: Mapping[str, str] = field(default_factory=dict)
    """More for every proxy, unprefixed (`IDENTITY_MIN_REFRESH`: `1s`); only `proxy-additional-env` wins over them."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The mesh's own defaults of `config.mantle.dev/` settings, parsed: a namespace's and a pod's win over them."""
    api_server: str = ""
    """Networks of the API server, which the control plane's own pods reach past their proxy."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What the environment depends on in one pod."""

    ports: tuple[int, ...]
    component: str
    """`identity`, `destination` or `viz` for the control plane's own pods, else empty."""
    ingress: bool
    tap: bool
    token_file: str
    end_entity_directory: str


def environment(config: Config, values: Values, subject: Subject, opaque: str) -> list[dict[str, Any]]:
    """The sidecar's `env` list: downward API first, as later entries refer to it."""
    prefix = "LINKERD2_PROXY_" if values.interop else "MANTLE_PROXY_"
    named: dict[str, Any] = {}
    for name, value in _settings(config, values, subject, opaque):
        named[prefix + name] = value
    for name, value in values.proxy_env.items():
        named[prefix + name] = value
    entries: dict[str, dict[str, Any]] = {name: {"name": name, "valueFrom": _field(path)} for name, path in _DOWNWARD}
    for name, value in named.items():
        entries[name] = {"name": name, **(value if isinstance(value, dict) else {"value": value})}
    for item in config.get("proxy-additional-env", ()):
        entries[item["name"]] = dict(item)
    return list(entries.values())


_DOWNWARD = (
    ("_pod_name", "metadata.name"),
    ("_pod_ns", "metadata.namespace"),
    ("_pod_uid", "metadata.uid"),
    ("_pod_ip", "status.podIP"),
    ("_pod_nodeName", "spec.nodeName"),
    ("_pod_sa", "spec.serviceAccountName"),
)


def _settings(config: Config, values: Values, subject: Subject, opaque: str) -> Iterator[tuple[str, Any]]:
    mesh = ",".join(values.networks)
    service = f"{values.control_namespace}.svc.{values.cluster_domain}"
    identity = f"{values.control_namespace}.serviceaccount.identity.{values.control_namespace}.{values.trust_domain}"

    def address(component: str, port: int) -> str:
        at_home = subject.component == component
        return f"127.0.0.1:{port}" if at_home else f"mantle-{component}.{service}:{port}"

    ports = ",".join(str(port) for port in subject.ports)
    yield "CORES", "1"
    if ratio := config.get("proxy-cpu-ratio-limit"):
        yield "CORES_MAX_RATIO", ratio
    yield "SHUTDOWN_ENDPOINT_ENABLED", _bool(config.get("proxy-admin-shutdown", False))
    headers = "" if config.get("proxy-log-http-headers", "off") == "insecure" else ",[{headers}]=off,[{request}]=off"
    yield "LOG", config.get("proxy-log-level", values.log) + (headers if values.interop else "")
    yield "LOG_FORMAT", config.get("proxy-log-format", "plain")
    if (access_log := config.get("access-log")) is not None:
        yield "ACCESS_LOG", access_log

    yield "IDENTITY_TRUST_ANCHORS", values.trust_anchors
    yield "IDENTITY_LOCAL_NAME", f"$(_pod_sa).$(_pod_ns).serviceaccount.identity.{identity.split('.identity.', 1)[1]}"
    yield "IDENTITY_DIR", subject.end_entity_directory
    yield "IDENTITY_TOKEN_FILE", subject.token_file
    yield "IDENTITY_SVC_ADDR", address("identity", 8080)
    yield "IDENTITY_SVC_NAME", f"mantle-identity.{identity}"

    yield "DESTINATION_SVC_ADDR", address("destination", 8086)
    yield "DESTINATION_SVC_NAME", f"mantle-destination.{identity}"
    yield "DESTINATION_PROFILE_NETWORKS", mesh
    suffix = "." if config.get("enable-external-profiles", False) else f"svc.{values.cluster_domain}."
    yield "DESTINATION_PROFILE_SUFFIXES", suffix
    yield "DESTINATION_CONTEXT", '{"ns":"$(_pod_ns)","nodeName":"$(_pod_nodeName)","pod":"$(_pod_name)"}'
    yield "POLICY_SVC_ADDR", address("destination", 8090)
    yield "POLICY_SVC_NAME", f"mantle-destination.{identity}"
    yield "POLICY_WORKLOAD", '{"ns":"$(_pod_ns)","pod":"$(_pod_name)"}'
    yield "POLICY_CLUSTER_NETWORKS", mesh
    yield "CONTROL_STREAM_INITIAL_TIMEOUT", "3s"
    yield "CONTROL_STREAM_IDLE_TIMEOUT", "5m"
    yield "CONTROL_STREAM_LIFETIME", "1h"

    yield "INBOUND_IPS", {"valueFrom": _field("status.podIPs")}
    yield "INBOUND_PORTS", config.get("pod-inbound-ports", ports)
    yield "INBOUND_DEFAULT_POLICY", config.get("default-inbound-policy", values.default_policy)
    # Ports that nobody declared still deserve the default list: their servers speak first.
    yield (
        "INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION",
        (",".join(map(str, DEFAULT_OPAQUE)) if config.get("opaque-ports") is None else opaque),
    )
    if (strict := config.get("proxy-require-identity-inbound-ports")) is not None:
        yield "INBOUND_PORTS_REQUIRE_IDENTITY", strict
    if subject.component == "identity":
        yield "INBOUND_CLIENT_ADDR_PORTS", "8080"
    if config.get("enable-gateway", False):
        yield "INBOUND_GATEWAY_SUFFIXES", f"svc.{values.cluster_domain}."
    if subject.ingress:
        yield "INGRESS_MODE", "true"

    yield "OUTBOUND_LISTEN_ADDR", f"127.0.0.1:{config.get('outbound-port', 4140)}"
    yield "INBOUND_LISTEN_ADDR", f"0.0.0.0:{config.get('inbound-port', 4143)}"
    yield "CONTROL_LISTEN_ADDR", f"0.0.0.0:{config.get('control-port', 4190)}"
    yield "ADMIN_LISTEN_ADDR", f"0.0.0.0:{config.get('admin-port', 4191)}"
    if values.mark is not None:
        yield "OUTBOUND_MARK", hex(values.mark)
    if subject.tap:
        yield "TAP_SVC_NAME", f"mantle-viz.{identity}"

    yield "INBOUND_CONNECT_TIMEOUT", config.get("proxy-inbound-connect-timeout", "100ms")
    yield "OUTBOUND_CONNECT_TIMEOUT", config.get("proxy-outbound-connect-timeout", "1000ms")
    yield "OUTBOUND_DISCOVERY_IDLE_TIMEOUT", config.get("proxy-outbound-discovery-cache-unused-timeout", "5s")
    yield "INBOUND_DISCOVERY_IDLE_TIMEOUT", config.get("proxy-inbound-discovery-cache-unused-timeout", "90s")
    for side in ("inbound", "outbound"):
        if config.get(f"proxy-disable-{side}-protocol-detect-timeout", False):
            yield f"{side.upper()}_DETECT_TIMEOUT", DETECT_FOREVER
    hostnames = _bool(config.get("proxy-metrics-hostname-labels", False))
    yield "OUTBOUND_METRICS_HOSTNAME_LABELS", hostnames
    if (grace := config.get("shutdown-grace-period")) is not None:
        yield "SHUTDOWN_GRACE_PERIOD", grace


def _field(path: str) -> dict[str, Any]:
    """A field of the pod, written as the API server keeps it, so that nothing differs from what it has."""
    return {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}


def _bool(value: bool) -> str:
    return "true" if value else "false"
