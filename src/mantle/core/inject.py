"""Injection: a pod (template) in, the same pod with Mantle's redirect and sidecar out, or the typed reason why not.

The same function serves `mantle inject --manual`, the one-machine platform and the admission webhook of a cluster. It
knows no platform: what differs between them is in `Values`. Pods are plain dictionaries as the YAML has them; the
argument is never changed. The pieces that are added, in order: `_init_container` (redirect), `_sidecar` (proxy, with
`proxy_env.environment`), volumes, labels and annotations.

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
    TRUST_ROOT_SHA256,
    Config,
    Mistake,
    read_config,
)
from mantle.core.inject_optional import VOLUMES as OPTIONAL_VOLUMES
from mantle.core.inject_optional import accept_migration, make_optional, names_of, owner_for, tls_mistakes
from mantle.core.optional_names import LABEL_TLS, OPTIONAL, OWNER
from mantle.core.pod_facts import Skip, containers, has_udp_ports, inbound_ports, obstacles, opaque_ports
from mantle.core.proxy_env import Subject, Values, environment

Object = dict[str, Any]

PROXY = "mantle-proxy"
INIT = "mantle-init"
DEBUG = "mantle-debug"
TOKEN_VOLUME = "mantle-identity-token"
END_ENTITY_VOLUME = "mantle-identity-end-entity"
TOKEN_DIRECTORY = "/var/run/secrets/mantle.dev/identity"
END_ENTITY_DIRECTORY = "/var/run/mantle/identity/end-entity"
OWNER_KINDS = ("deployment", "replicationcontroller", "replicaset", "job", "daemonset", "statefulset", "cronjob")


@dataclass(frozen=True, slots=True)
class Injected:
    pod: Object
    udp_ports: bool = False
    """The pod declares UDP ports: they are not redirected, and people are told."""


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
    result = uninject_pod(pod)
    metadata: Object = result.setdefault("metadata", {})
    ns_metadata = namespace.get("metadata") or {}
    own, inherited = metadata.get("annotations") or {}, ns_metadata.get("annotations") or {}

    wanted = _wanted(own, inherited, values.inject_by_default)
    if isinstance(wanted, Mistake):
        return Refused((wanted,))
    spec: Object = result.setdefault("spec", {})
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
    component = labels.get(LABEL_COMPONENT, "")
    subject = Subject(
        ports=inbound_ports(spec),
        component=component,
        ingress=(own.get(INJECT) or inherited.get(INJECT)) == "ingress",
        tap=own.get(DISABLE_TAP) != "true",
        token_file=f"{TOKEN_DIRECTORY}/{TOKEN_VOLUME}",
        end_entity_directory=END_ENTITY_DIRECTORY,
    )
    opaque = opaque_ports(spec, config)
    sidecar = _sidecar(config, values, environment(config, values, subject, opaque))
    init = _init_container(config, values, values.api_server if component else "")
    _add_containers(spec, init, sidecar, config, component)
    if config.get("enable-debug-sidecar", False):
        spec["containers"].append(_debug_container(config, values))
    spec["volumes"] = [*(spec.get("volumes") or []), *_volumes(values)]
    if (timeout := config.get("close-wait-timeout")) is not None:
        context = spec.setdefault("securityContext", {})
        context["sysctls"] = [*context.get("sysctls", []), _close_wait(timeout)]

    metadata["labels"] = {**labels, **_labels(metadata, ns_metadata, values, owner)}
    metadata["annotations"] = {
        **config.inherited,
        **own,
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
    return Injected(result, has_udp_ports(spec))


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
        if key in spec:
            spec[key] = [c for c in spec[key] if c.get("name") not in (PROXY, INIT, DEBUG)]
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


def _close_wait(seconds: object) -> Object:
    return {"name": "net.netfilter.nf_conntrack_tcp_timeout_close_wait", "value": str(seconds)}


def _without_sysctl(spec: Object, sysctl: Object) -> None:
    context = spec.get("securityContext") or {}
    if sysctl in context.get("sysctls", []):
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
        for name in (INIT, PROXY, DEBUG)
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


def _init_container(config: Config, values: Values, beside: str) -> Object:
    """Installs the redirect; its one capability is what that takes. `beside`: networks that are not redirected."""
    admin, control = config.get("admin-port", 4191), config.get("control-port", 4190)
    skip_in = ",".join(filter(None, (f"{control},{admin}", config.get("skip-inbound-ports"))))
    args = ["redirect", "install"]
    args += ["--inbound-port", str(config.get("inbound-port", 4143))]
    args += ["--outbound-port", str(config.get("outbound-port", 4140))]
    if values.mark is None:
        args += ["--proxy-uid", str(config.get("proxy-uid", values.proxy_uid))]
    else:
        args += ["--proxy-mark", hex(values.mark)]
    args += ["--skip-inbound-ports", skip_in]
    if skip_out := config.get("skip-outbound-ports"):
        args += ["--skip-outbound-ports", skip_out]
    if subnets := ",".join(filter(None, (beside, config.get("skip-subnets")))):
        args += ["--skip-subnets", subnets]
    container: Object = {
        "name": INIT,
        **_image(config, values),
        "args": args,
        "securityContext": {**_confined(65534, ["NET_ADMIN"]), "runAsGroup": 65534},
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if resources := _resources(config):  # where a quota asks for them, it asks of every container
        container["resources"] = resources
    return container


def _sidecar(config: Config, values: Values, env: list[Object]) -> Object:
    admin = config.get("admin-port", 4191)

    def probe(path: str, **times: int) -> Object:
        return {"httpGet": {"path": path, "port": admin}, **times}

    container: Object = {
        "name": PROXY,
        **_image(config, values),
        "env": env,
        "ports": [
            {"name": PROXY, "containerPort": config.get("inbound-port", 4143)},
            {"name": "mantle-admin", "containerPort": admin},
        ],
        "readinessProbe": probe("/ready", initialDelaySeconds=2),
        "livenessProbe": probe("/live", initialDelaySeconds=10),
        "securityContext": _confined(
            config.get("proxy-uid", values.proxy_uid), [] if values.mark is None else ["NET_ADMIN"]
        ),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": END_ENTITY_VOLUME, "mountPath": END_ENTITY_DIRECTORY},
            {"name": TOKEN_VOLUME, "mountPath": TOKEN_DIRECTORY, "readOnly": True},
        ],
    }
    if (gid := config.get("proxy-gid")) is not None:
        container["securityContext"]["runAsGroup"] = gid
    if resources := _resources(config):
        container["resources"] = resources
    if seconds := config.get("proxy-wait-before-exit-seconds"):
        container["lifecycle"] = {"preStop": {"sleep": {"seconds": seconds}}}
    if config.get("proxy-await", True):
        container["startupProbe"] = probe("/ready", periodSeconds=1, failureThreshold=120)
    return container


def _add_containers(spec: Object, init: Object, sidecar: Object, config: Config, component: str) -> None:
    """Order is meaning: redirect, proxy, then everything of the application, whose init containers are meshed too.

    Identity is the exception: its application starts before its proxy, which asks it for a certificate over loopback.
    """
    before = list(spec.get("initContainers") or [])
    if component == "identity":
        sidecar.pop("startupProbe", None)
        spec["initContainers"] = [init, *before]
        spec["containers"] = [*spec["containers"], sidecar]
    elif config.get("proxy-enable-native-sidecar", True):
        spec["initContainers"] = [init, {**sidecar, "restartPolicy": "Always"}, *before]
    else:
        spec["initContainers"] = [init, *before]
        spec["containers"] = [sidecar, *(spec.get("containers") or [])]


def _debug_container(config: Config, values: Values) -> Object:
    image = config.get("debug-image", "mantle/debug")
    return {
        "name": DEBUG,
        "image": f"{image}:{config.get('debug-image-version', values.version)}",
        "imagePullPolicy": config.get("debug-image-pull-policy", "IfNotPresent"),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _image(config: Config, values: Values) -> Object:
    image, tag = config.get("proxy-image", values.proxy_image), config.get("proxy-version", values.version)
    return {"image": f"{image}:{tag}", "imagePullPolicy": config.get("image-pull-policy", "IfNotPresent")}


def _confined(uid: int, capabilities: list[str]) -> Object:
    allowed: Object = {"drop": ["ALL"]}
    if capabilities:
        allowed["add"] = capabilities
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": allowed,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": uid,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _resources(config: Config) -> Object:
    resources: Object = {}
    for bound in ("request", "limit"):
        for name, key in (("cpu", "cpu"), ("memory", "memory"), ("ephemeral-storage", "ephemeral-storage")):
            if (amount := config.get(f"proxy-{name}-{bound}")) is not None:
                resources.setdefault(f"{bound}s", {})[key] = amount
    return resources


def _volumes(values: Values) -> list[Object]:
    token = {"audience": values.token_audience, "expirationSeconds": 3600, "path": TOKEN_VOLUME}
    return [
        {"name": END_ENTITY_VOLUME, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": TOKEN_VOLUME, "projected": {"sources": [{"serviceAccountToken": token}]}},
    ]


def _labels(
    metadata: Mapping[str, Any], ns_metadata: Mapping[str, Any], values: Values, owner: tuple[str, str] | None
) -> Object:
    labels: Object = {LABEL_CONTROL_NS: values.control_namespace}
    if workload_ns := metadata.get("namespace") or ns_metadata.get("name"):
        labels[LABEL_WORKLOAD_NS] = workload_ns
    if owner and owner[0].lower() in OWNER_KINDS and len(owner[1]) <= 63:
        labels[LABEL_OWNER_PREFIX + owner[0].lower()] = owner[1]
    return labels
