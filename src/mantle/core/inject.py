"""Injection: a pod (template) in, the same pod with Mantle's redirect and sidecar out, or the typed reason why not.

The same function serves `mantle inject --manual`, the one-machine platform and the admission webhook of a cluster. It
knows no platform: what differs between them is in `Values`. Pods are plain dictionaries as the YAML has them; the
argument is never changed. What is added: containers and volumes (`inject_containers.py`, the proxy's environment from
`proxy_env.py`), labels and annotations.

Sources: the sidecar pattern is https://kubernetes.io/docs/concepts/workloads/pods/sidecar-containers/.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mantle.core.annotations import (
    ADDED,
    CREATED_BY,
    DISABLE_TAP,
    INJECT,
    INJECT_VALUES,
    LABEL_COMPONENT,
    LABEL_CONTROL_NS,
    LABEL_OWNER_PREFIX,
    LABEL_WORKLOAD_NS,
    PREFIX,
    PROXY_VERSION,
    SKIPPED,
    TRUST_ROOT_SHA256,
    Config,
    Mistake,
    port_ranges,
    read_config,
)
from mantle.core.inject_containers import (
    END_ENTITY_DIRECTORY,
    END_ENTITY_VOLUME,
    OURS,
    PROXY,
    TOKEN_DIRECTORY,
    TOKEN_VOLUME,
    add_containers,
    debug_container,
    redirect,
    sidecar,
    volumes,
)
from mantle.core.inject_optional import VOLUMES as OPTIONAL_VOLUMES
from mantle.core.inject_optional import accept_migration, make_optional, names_of, owner_for, tls_mistakes
from mantle.core.optional_names import LABEL_TLS, OPTIONAL, OWNER
from mantle.core.pod_facts import (
    Skip,
    containers,
    has_udp_ports,
    inbound_ports,
    misshapen,
    obstacles,
    opaque_ports,
    probed_ports,
)
from mantle.core.proxy_env import Subject, Values, environment

Object = dict[str, Any]

OWNER_KINDS = ("deployment", "replicationcontroller", "replicaset", "job", "daemonset", "statefulset", "cronjob")


@dataclass(frozen=True, slots=True)
class Injected:
    pod: Object
    udp_ports: bool = False
    """The pod declares UDP ports: they are not redirected, and people are told."""
    tcp_probes: tuple[int, ...] = ()
    """Ports that `tcpSocket` probes ask, and the proxy answers: people are told."""
    clashes: tuple[int, ...] = ()
    """Ports of the application that the proxy listens on, too: one of them will not start, and people are told."""


@dataclass(frozen=True, slots=True)
class Skipped:
    reasons: tuple[Skip, ...]
    """At least one."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The pod asks for something that cannot be: it must not run, least of all without the mesh."""

    mistakes: tuple[Mistake, ...]
    """At least one."""


def inject_pod(
    pod: Mapping[str, Any],
    namespace: Mapping[str, Any],
    values: Values,
    owner: tuple[str, str] | None = None,
) -> Injected | Skipped | Refused:
    """Decides whether `pod` is meshed, and makes the meshed pod.

    `pod`: `{"metadata": …, "spec": …}`, a Pod or a pod template. `namespace`: the Namespace object (`{}` where it is
    not known). `owner`: (kind, name) of the workload, for labels. A pod that Mantle injected before is made anew from
    what it was, so the function can be applied to its own result.
    """
    if wrong := misshapen(pod):
        return Refused(wrong)
    result = uninject_pod(pod)
    metadata: Object = _mapping(result, "metadata")
    ns_metadata = namespace.get("metadata") or {}
    own, inherited = metadata.get("annotations") or {}, ns_metadata.get("annotations") or {}

    wanted = _wanted(own, inherited, values.inject_by_default)
    if isinstance(wanted, Mistake):
        return Refused((wanted,))
    spec: Object = _mapping(result, "spec")
    reasons = tuple(reason for reason in (wanted, *obstacles(spec)) if reason is not None)
    if reasons:
        return Skipped(reasons)
    config, mistakes = read_config(own, inherited)
    config = Config({**values.defaults, **config.values}, config.inherited)
    mistakes += _namesakes(pod)
    mistakes += _uid_mistakes(spec, config.get("proxy-uid", values.proxy_uid)) if values.mark is None else ()
    if mistakes:
        return Refused(mistakes)

    labels: Object = metadata.get("labels") or {}
    # The label means something in the control namespace alone, which a template of it does not name.
    at_home = (
        metadata.get("namespace") or ns_metadata.get("name") or values.control_namespace
    ) == values.control_namespace
    component = labels.get(LABEL_COMPONENT, "") if at_home else ""
    subject = Subject(
        ports=inbound_ports(spec),
        component=component,
        ingress=(own.get(INJECT) or inherited.get(INJECT)) == "ingress",
        tap=own.get(DISABLE_TAP) != "true",
        token_file=f"{TOKEN_DIRECTORY}/{TOKEN_VOLUME}",
        end_entity_directory=END_ENTITY_DIRECTORY,
    )
    opaque = opaque_ports(spec, config)
    proxy = sidecar(config, values, environment(config, values, subject, opaque))
    first = redirect(config, values, values.api_server if component else "")
    add_containers(spec, first, proxy, config, component)
    if config.get("enable-debug-sidecar", False):
        spec["containers"] = [*(spec.get("containers") or []), debug_container(config, values)]
    spec["volumes"] = [*(spec.get("volumes") or []), *volumes(values)]
    if (timeout := config.get("close-wait-timeout")) is not None:
        context = _mapping(spec, "securityContext")
        context["sysctls"] = [*(context.get("sysctls") or []), _close_wait(timeout)]

    metadata["labels"] = {**labels, **_labels(metadata, ns_metadata, values, owner)}
    metadata["annotations"] = {
        **config.inherited,
        **{name: text for name, text in own.items() if name != SKIPPED},
        CREATED_BY: values.created_by or f"mantle {values.version}",
        PROXY_VERSION: config.get("proxy-version", values.version),
        TRUST_ROOT_SHA256: hashlib.sha256(values.trust_anchors.encode()).hexdigest(),
    }
    added = set(config.inherited)
    if f"{PREFIX}opaque-ports" not in metadata["annotations"] and opaque:
        metadata["annotations"][f"{PREFIX}opaque-ports"] = opaque
        added.add(f"{PREFIX}opaque-ports")
    if added:
        metadata["annotations"][ADDED] = ",".join(sorted(added))
    if mistakes := _apply_tls(result, ns_metadata, owner, config, values):
        return Refused(mistakes)
    return Injected(result, has_udp_ports(spec), _answered_by_proxy(spec, config), _clashes(spec, config))


def _answered_by_proxy(spec: Mapping[str, Any], config: Config) -> tuple[int, ...]:
    """The ports at which a `tcpSocket` probe meets the proxy, whether the application listens or not."""
    skipped = port_ranges(config.get("skip-inbound-ports", ""))
    probed = probed_ports(spec, "tcpSocket")
    return tuple(port for port in probed if not any(low <= port <= high for low, high in skipped))


def _clashes(spec: Mapping[str, Any], config: Config) -> tuple[int, ...]:
    """The TCP ports that containers of the application declare and the proxy has."""
    settings = {"inbound-port": 4143, "outbound-port": 4140, "control-port": 4190, "admin-port": 4191}
    ours = {config.get(name, usual) for name, usual in settings.items()}
    theirs = {
        port.get("containerPort")
        for container in containers(spec)
        for port in container.get("ports") or []
        if container.get("name") not in OURS and port.get("protocol", "TCP") == "TCP"
    }
    return tuple(sorted(ours & theirs))


def _apply_tls(
    pod: Object, ns_metadata: Mapping[str, Any], owner: tuple[str, str] | None, config: Config, values: Values
) -> tuple[Mistake, ...]:
    """The experimental mode, where it is asked for; what keeps the pod from it."""
    names = names_of(values.control_namespace, values.trust_domain)
    if config.get("tls") != OPTIONAL:
        mistake = accept_migration(pod, names, PROXY)
        return (mistake,) if mistake else ()
    namespace = pod["metadata"].get("namespace") or ns_metadata.get("name") or ""
    found = owner_for(pod, namespace, owner, names)
    mistakes = tls_mistakes(pod, values.tls) + ((found,) if isinstance(found, Mistake) else ())
    if not mistakes and not isinstance(found, Mistake):
        make_optional(pod, found, names, PROXY, TOKEN_VOLUME)
    return mistakes


def uninject_pod(pod: Mapping[str, Any]) -> Object:
    """The pod without anything that injection adds. One that Mantle did not inject comes back as it is."""
    result: Object = copy.deepcopy(dict(pod))
    metadata, spec = result.get("metadata") or {}, result.get("spec") or {}
    annotations: Object = metadata.get("annotations") or {}
    if CREATED_BY not in annotations or not any(c.get("name") == PROXY for c in containers(spec)):
        return result
    if (timeout := annotations.get(f"{PREFIX}close-wait-timeout")) is not None:
        _without_sysctl(spec, _close_wait(timeout))
    for key in ("containers", "initContainers"):
        if spec.get(key) is not None:
            spec[key] = [c for c in spec[key] if c.get("name") not in OURS]
            if not spec[key] and key == "initContainers":
                del spec[key]
    spec["volumes"] = [
        v
        for v in spec.get("volumes") or []
        if v.get("name") not in (TOKEN_VOLUME, END_ENTITY_VOLUME, *OPTIONAL_VOLUMES)
    ]
    if not spec["volumes"]:
        del spec["volumes"]
    for key in (CREATED_BY, PROXY_VERSION, TRUST_ROOT_SHA256, OWNER, ADDED, *annotations.get(ADDED, "").split(",")):
        annotations.pop(key, None)
    labels = metadata.get("labels") or {}
    for key in (LABEL_CONTROL_NS, LABEL_WORKLOAD_NS, LABEL_TLS, *(LABEL_OWNER_PREFIX + kind for kind in OWNER_KINDS)):
        labels.pop(key, None)
    for key in ("annotations", "labels"):
        if not metadata.get(key):
            metadata.pop(key, None)
    return result


def _mapping(of: Object, key: str) -> Object:
    """The mapping there, made if there is none: YAML's `key:` is null."""
    if of.get(key) is None:
        of[key] = {}
    found: Object = of[key]
    return found


def _close_wait(seconds: object) -> Object:
    return {"name": "net.netfilter.nf_conntrack_tcp_timeout_close_wait", "value": str(seconds)}


def _without_sysctl(spec: Object, sysctl: Object) -> None:
    context = spec.get("securityContext") or {}
    if sysctl in (context.get("sysctls") or []):
        context["sysctls"] = [each for each in context["sysctls"] if each != sysctl]
        if not context["sysctls"]:
            del context["sysctls"]
        if not context:
            del spec["securityContext"]


def _wanted(own: Mapping[str, str], inherited: Mapping[str, str], by_default: bool) -> Skip | Mistake | None:
    """The truth table of `mantle.dev/inject`: the pod's word, then the namespace's, then the platform's default."""
    for where, said in (("pod", own), ("namespace", inherited)):
        value = said.get(INJECT)
        if value is None:
            continue
        if value not in INJECT_VALUES:
            return Mistake(INJECT, str(value), " or ".join(INJECT_VALUES), where)
        return Skip.DISABLED if value == "disabled" else None
    return None if by_default else Skip.NOT_ENABLED


def _namesakes(pod: Mapping[str, Any]) -> tuple[Mistake, ...]:
    """Containers that only look like ours: taking them for ours would leave the pod without a proxy."""
    if CREATED_BY in ((pod.get("metadata") or {}).get("annotations") or {}):
        return ()
    names = [c.get("name") for c in containers(pod.get("spec") or {})]
    return tuple(
        Mistake("container", name, "another name: this one is Mantle's, and Mantle did not make it")
        for name in OURS
        if name in names
    )


def _uid_mistakes(spec: Mapping[str, Any], proxy_uid: int) -> tuple[Mistake, ...]:
    """An application with the proxy's user id would pass the redirect by."""
    users = [("the pod", spec.get("securityContext") or {})]
    users += [(f"container {c.get('name')}", c.get("securityContext") or {}) for c in containers(spec)]
    return tuple(
        Mistake(
            "runAsUser", str(proxy_uid), f"another user id for {who}: this one is the proxy's and bypasses the mesh"
        )
        for who, context in users
        if context.get("runAsUser") == proxy_uid
    )


def _labels(
    metadata: Mapping[str, Any], ns_metadata: Mapping[str, Any], values: Values, owner: tuple[str, str] | None
) -> Object:
    labels: Object = {LABEL_CONTROL_NS: values.control_namespace}
    if workload_ns := metadata.get("namespace") or ns_metadata.get("name"):
        labels[LABEL_WORKLOAD_NS] = workload_ns
    if owner and owner[0].lower() in OWNER_KINDS and len(owner[1]) <= 63:
        labels[LABEL_OWNER_PREFIX + owner[0].lower()] = owner[1]
    return labels
