"""What `mantle check` concludes of a cluster's pods, their proxies and their traffic: facts in, findings out. Pure.

`pods` needs no proxy to answer: it finds what should be in the mesh and is not. `data_plane` asks whether every proxy
is current, certified and encrypting, from the pods and from what viz has learnt of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from mantle.cli.checks import Finding, Result, good_unless
from mantle.cli.checks_objects import (
    RESTRICTING,
    Listed,
    Object,
    Unread,
    alive,
    annotations_of,
    ends_of,
    enforced,
    full_of,
    has_proxy,
    labels_of,
    name_of,
    owner_of,
    proxy_env,
    proxy_status,
    running_since,
    stamp,
    state_of,
    unread,
)
from mantle.core.annotations import INJECT, PREFIX, PROXY_VERSION, read_config
from mantle.core.inject import Injected, Refused, inject_pod, uninject_pod
from mantle.core.inject_containers import INIT
from mantle.core.optional_names import LABEL_TLS, OPTIONAL
from mantle.core.proxy_env import Values

STALE_SECONDS = 15.0
YOUNG = timedelta(seconds=15)
"""viz asks every other second: what it does not know of a proxy that runs for less than this says nothing."""
HARMLESS = frozenset({"loopback"})
"""Reasons of traffic that never leaves a pod."""
SYSTEM = ("kube-system", "kube-node-lease", "kube-public")
OF_SERVICES = frozenset({f"{PREFIX}opaque-ports"})
"""What a Service may say to its clients' proxies."""


@dataclass(frozen=True, slots=True)
class Data:
    """Every pod, and what viz knows of their proxies."""

    pods: Listed
    namespaces: Listed
    values: Values | Unread
    """What the injector injects with; its trust anchors are those of now."""
    version: str
    """Of the control plane; empty if it is not known, as `values` are not."""
    summary: Object | Unread
    control_namespace: str
    services: Listed = ()
    namespace: str | None = None
    """Whose pods are asked about; None: those of all. `pods` has all, as traffic has two ends."""

    def asked(self) -> list[Object]:
        """The pods that are asked about, and are neither over nor ending; none if they cannot be read.

        After a rolling update old pods are listed for a while, not ready: nobody has to do anything about them.
        """
        every = [] if isinstance(self.pods, Unread) else alive(self.pods)
        staying = [pod for pod in every if "deletionTimestamp" not in pod["metadata"]]
        return [pod for pod in staying if self.namespace in (None, pod["metadata"]["namespace"])]

    def asked_services(self) -> list[Object]:
        every = [] if isinstance(self.services, Unread) else self.services
        return [service for service in every if self.namespace in (None, service["metadata"]["namespace"])]


NOTHING: Object = {"metadata": {}}


def pods(data: Data) -> list[Finding]:
    """Is every pod in the mesh that should be? What is said here needs no proxy to answer."""
    if isinstance(data.pods, Unread):
        return [unread("the cluster's pods can be read", data.pods, "pods-meshed", Result.ERROR)]
    namespaces = {} if isinstance(data.namespaces, Unread) else {name_of(ns): ns for ns in data.namespaces}
    return [
        *_outside(data, namespaces),
        _refused_by_policy(data, namespaces),
        _labels_for_annotations(data, namespaces),
        _of_services(data),
    ]


def data_plane(data: Data, now: datetime) -> list[Finding]:
    """Is every proxy current, certified and encrypting?"""
    if isinstance(data.pods, Unread):
        return []
    inside = [pod for pod in data.asked() if proxy_status(pod) is not None or has_proxy(pod)]
    restart = "restart the workload: `kubectl -n NAMESPACE rollout restart deployment/NAME`"
    unready = [f"{full_of(pod)}: {state_of(pod)}" for pod in inside if not (proxy_status(pod) or {}).get("ready")]
    findings = [
        *_namespace(data, inside),
        good_unless(
            "every proxy is ready", unready, "`kubectl -n NAMESPACE logs POD -c mantle-proxy`", id="proxy-ready"
        ),
    ]
    if isinstance(data.values, Unread):
        findings.append(unread("every proxy has the trust roots of now", data.values, "proxy-roots"))
    else:
        current = _certificates_in(data.values.trust_anchors)
        # What the proxy got, not what an annotation says of it: anybody may write annotations.
        old = [full_of(pod) for pod in inside if _certificates_in(proxy_env(pod, "IDENTITY_TRUST_ANCHORS")) != current]
        findings.append(
            good_unless(
                "every proxy has the trust roots of now",
                [f"{name} has others" for name in old],
                restart,
                id="proxy-roots",
            )
        )
    versions = [
        f"{full_of(pod)} has {found}"
        for pod in inside
        if (found := annotations_of(pod).get(PROXY_VERSION)) not in (None, data.version)
    ]
    about = "every proxy is of the control plane's version"
    findings.append(
        good_unless(about, versions, restart, Result.WARNING, id="proxy-version")
        if data.version or not isinstance(data.values, Unread)
        else unread(about, data.values, "proxy-version")
    )
    if isinstance(data.summary, Unread):
        findings.append(
            unread("the proxies' certificates and traffic are known", data.summary, "views-answer", Result.ERROR)
        )
    else:
        findings += [*_leaves(inside, data.summary, now), *_traffic(data, data.summary)]
    return [*findings, *_optional(inside, data)]


def _namespace(data: Data, inside: Sequence[Object]) -> list[Finding]:
    """Is there anything to ask about, in a namespace that somebody named?"""
    if data.namespace is None:
        return []
    known = None if isinstance(data.namespaces, Unread) else {name_of(namespace) for namespace in data.namespaces}
    reasons = [] if inside else [f"no pod of {data.namespace} has a proxy"]
    if known is not None and data.namespace not in known:
        reasons = [f"there is no namespace {data.namespace}"]
    fix = (
        f"name another with -n, or `kubectl annotate namespace {data.namespace} {INJECT}=enabled` "
        "and restart its workloads"
    )
    return [good_unless(f"namespace {data.namespace} has pods in the mesh", reasons, fix, id="proxy-namespace")]


_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)


def _certificates_in(pem: str) -> frozenset[str]:
    """The certificates of a PEM text as base64 without breaks: neither their order nor what stands between matters."""
    return frozenset("".join(found.split()) for found in _CERTIFICATE.findall(pem))


def _outside(data: Data, namespaces: Mapping[str, Object]) -> list[Finding]:
    """Pods that ask for the mesh and are not in it: created while the injector did not answer, or before they asked."""
    description = "every pod that should be in the mesh is"
    if isinstance(data.values, Unread):
        return [unread(description, data.values, "pods-meshed")]
    missed: list[str] = []
    mistaken: list[str] = []
    for pod in data.asked():
        namespace = pod["metadata"]["namespace"]
        if has_proxy(pod):  # what was written since is followed while it runs, too
            _, mistakes = read_config(annotations_of(pod), annotations_of(namespaces.get(namespace, NOTHING)))
            mistaken += [f"{full_of(pod) if m.where == 'pod' else namespace}: {m}" for m in mistakes]
            continue
        if namespace in (*SYSTEM, data.control_namespace):
            continue
        owner = owner_of(pod)
        outcome = inject_pod(uninject_pod(pod), namespaces.get(namespace, {}), data.values, owner)
        if isinstance(outcome, Injected):
            missed.append(f"{full_of(pod)} ({f'{owner[0].lower()}/{owner[1]}' if owner else 'no controller'})")
        elif isinstance(outcome, Refused):
            mistaken += [f"{full_of(pod)}: {mistake}" for mistake in outcome.mistakes]
    return [
        good_unless(
            description,
            missed,
            "they began while the injector did not answer, or before they asked: "
            "`kubectl -n NAMESPACE rollout restart deployment/NAME`",
            id="pods-meshed",
        ),
        good_unless(
            "no pod asks for something that injection refuses",
            list(dict.fromkeys(mistaken)),  # what a namespace says it says to many pods
            "correct the annotation",
            id="pods-annotations",
        ),
    ]


def _refused_by_policy(data: Data, namespaces: Mapping[str, Object]) -> Finding:
    """Namespaces with pods to be meshed whose PodSecurity level refuses the container that sets the redirect."""
    wanting = {name for name, ns in namespaces.items() if annotations_of(ns).get(INJECT) in ("enabled", "ingress")}
    for pod in data.asked():
        if annotations_of(pod).get(INJECT) in ("enabled", "ingress"):
            wanting.add(pod["metadata"]["namespace"])
    reasons = [
        f"{name} enforces {level}"
        for name in sorted(wanting)
        if data.namespace in (None, name)
        and name in namespaces
        and (level := enforced(namespaces[name])) in RESTRICTING
    ]
    return good_unless(
        "no namespace refuses the container that sets the redirect",
        reasons,
        "`kubectl label --overwrite namespace NAMESPACE pod-security.kubernetes.io/enforce=privileged`: "
        f"{INIT} needs NET_ADMIN",
        id="pods-security",
    )


def _labels_for_annotations(data: Data, namespaces: Mapping[str, Object]) -> Finding:
    """`mantle.dev/inject` is an annotation; as a label it says nothing to anybody."""
    named = [("namespace", ns) for name, ns in namespaces.items() if data.namespace in (None, name)]
    named += [("pod", pod) for pod in data.asked()] + [("service", service) for service in data.asked_services()]
    wrong = [f"{kind} {full_of(obj)}" for kind, obj in named if INJECT in labels_of(obj)]
    return good_unless(
        f"{INJECT} is nowhere a label",
        [f"{what} has it as a label" for what in wrong],
        f"`kubectl annotate … {INJECT}=enabled`, and remove the label: `kubectl label … {INJECT}-`",
        Result.WARNING,
        id="pods-labels",
    )


def _of_services(data: Data) -> Finding:
    """Annotations of Services that nobody follows: they were meant for pods, or cannot be read."""
    description, id = "every annotation of a service has an effect", "services-annotations"
    if isinstance(data.services, Unread):
        return unread(description, data.services, id)
    reasons = []
    for service in data.asked_services():
        written = annotations_of(service)
        useless = [name for name in written if name == INJECT or (name.startswith(PREFIX) and name not in OF_SERVICES)]
        _, mistakes = read_config({name: written[name] for name in written if name in OF_SERVICES}, {})
        reasons += [f"{full_of(service)}: {name} is not followed on a service" for name in useless]
        reasons += [
            f"{full_of(service)}: {m.annotation}: {m.value!r} is not accepted; use {m.accepted}" for m in mistakes
        ]
    fix = "write it on the namespace or on the pods (`mantle inject` does), or correct it"
    return good_unless(description, reasons, fix, Result.WARNING, id)


def _leaves(inside: Sequence[Object], summary: Object, now: datetime) -> list[Finding]:
    """The certificate in force in every proxy, as its own metrics say."""
    known = summary.get("certificates", {})
    none, expired, late = [], [], []
    for pod in inside:
        found = known.get(full_of(pod))
        if found is None and not (proxy_status(pod) or {}).get("ready"):
            continue  # said already: it is not ready
        if found is None and (began := running_since(pod)) is not None and now - began < YOUNG:
            continue
        if found is None or not (found.get("expires") and found.get("refreshed")):
            if labels_of(pod).get(LABEL_TLS) != OPTIONAL:
                none.append(full_of(pod))
            continue
        end, came = (datetime.fromtimestamp(found[key], UTC) for key in ("expires", "refreshed"))
        if now >= end:
            expired.append(f"{full_of(pod)}: expired on {stamp(end)}")
        elif now > came + (end - came) * 0.9:
            late.append(f"{full_of(pod)}: expires at {stamp(end)} and is not renewed yet")
    logs = "`kubectl -n NAMESPACE logs POD -c mantle-proxy` says why"
    return [
        good_unless("every proxy has a certificate", none, logs, id="leaf-there"),
        good_unless("every certificate is valid", expired, logs, id="leaf-valid"),
        good_unless("every certificate is renewed in time", late, logs, Result.WARNING, id="leaf-renewal"),
    ]


def _traffic(data: Data, summary: Object) -> list[Finding]:
    """Is what should be encrypted encrypted?"""
    age = summary.get("scrape_age_seconds")
    stale = (
        [] if age is not None and age < STALE_SECONDS else ["never asked" if age is None else f"asked {age:.0f} s ago"]
    )
    failing = [f"{pod}: {reason}" for pod, reason in sorted(summary.get("failing", {}).items())]
    meshed = [] if isinstance(data.pods, Unread) else [pod for pod in alive(data.pods) if has_proxy(pod)]
    members = {(pod["metadata"]["namespace"], end) for pod in meshed for end in ends_of(pod)}
    broken: list[str] = []
    plain: list[str] = []
    for edge in summary.get("edges", ()):
        reasons = [reason for reason in edge["no_tls_reason"].split(",") if reason and reason not in HARMLESS]
        if not reasons or edge["src"] == "probe":
            continue
        ends = ((edge["src_namespace"], edge["src"]), (edge["dst_namespace"], edge["dst"]))
        both = all(end in members for end in ends)
        (broken if both else plain).append(f"{edge['src']} → {edge['dst']}: {', '.join(reasons)}")
    return [
        good_unless(
            "every proxy tells viz its metrics",
            [*stale, *failing],
            f"`kubectl -n {data.control_namespace} logs deployment/mantle-viz -c viz` says why",
            id="traffic-known",
        ),
        good_unless(
            "all traffic between meshed workloads is encrypted",
            broken,
            "`mantle edges deploy -A -o wide` shows each; the log of the client's mantle-proxy says more",
            id="traffic-encrypted",
        ),
        good_unless(
            "no traffic leaves or enters the mesh in plaintext",
            plain,
            "put the other end into the mesh, if it should be",
            Result.WARNING,
            id="traffic-plaintext",
        ),
    ]


def _optional(inside: Sequence[Object], data: Data) -> list[Finding]:
    """Pods of the experimental mode: that they are, and whether they have what they need."""
    mode = [pod for pod in inside if labels_of(pod).get(LABEL_TLS) == OPTIONAL]
    if not mode:
        return []
    weaker = Finding(
        "no pod is of the experimental mode",
        Result.WARNING,
        "; ".join(f"{full_of(pod)} is weaker: its key is in a Secret, and it fails open" for pod in mode),
        "set `config.mantle.dev/tls: required`, or take the annotation away, and restart the workload",
        id="optional-pods",
    )
    if isinstance(data.summary, Unread):
        return [weaker]
    known = data.summary.get("certificates", {})
    missing = [f"{full_of(pod)} has none" for pod in mode if not known.get(full_of(pod), {}).get("expires")]
    fix = f"`kubectl -n {data.control_namespace} logs deployment/mantle-ca -c ca` says why; until then it is plaintext"
    about = "every pod of the experimental mode has its key and certificate"
    return [weaker, good_unless(about, missing, fix, Result.WARNING, id="optional-material")]
