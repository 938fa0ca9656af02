"""What `mantle check` concludes on a cluster: facts in, findings out. Pure; `check_cluster.py` gathers the facts.

One function a category, in the order in which people repair: the API, what an installation needs, what is installed,
its certificates, what the API server calls. Pods and their traffic are in `checks_pods.py`. What could not be read is a
fact too (`Unread`). Each finding's `id` is an anchor of docs/check.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from mantle.cli.checks import Finding, Result, Validity, good_unless
from mantle.cli.checks_objects import (
    RESTRICTING,
    Listed,
    Object,
    Unread,
    component_of,
    enforced,
    find,
    labels_of,
    name_of,
    stamp,
    time_of,
    unread,
)
from mantle.core.annotations import LABEL_COMPONENT
from mantle.core.optional_names import OPTIONAL

MINIMUM = (1, 29)
SKEW_ALLOWED = timedelta(seconds=20)
"""`ca.CLOCK_SKEW`: what certificates forgive."""
SKEW_FATAL = timedelta(minutes=5)
LEASE_AGE = timedelta(seconds=60)
"""The kubelet renews its lease every 10 s."""
SOON = timedelta(days=60)


@dataclass(frozen=True, slots=True)
class Api:
    """What the API server says of itself. Times are aware."""

    server: str
    version: str
    """Such as `v1.33.2`."""
    answered_at: datetime | None
    """Its `Date`, whole seconds; None if it sends none."""
    asked_at: datetime
    """This machine's clock, in the middle of that question."""
    leases: Listed = ()
    """`kube-node-lease`: when each node last said it lives, by its own clock."""

    @property
    def number(self) -> tuple[int, ...]:
        """Major and minor."""
        parts = self.version.lstrip("v").split(".")[:2]
        return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


@dataclass(frozen=True, slots=True)
class Wish:
    """Something an installation must be allowed to do: `verb resource`, and the cluster's answer (None: it may)."""

    right: str
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Mesh:
    """What an installed control plane consists of, as read."""

    namespace: str
    client_version: str
    config: str | Unread
    """What is wrong with ConfigMap `mantle-config`; empty if nothing."""
    version: str
    ha: bool
    tls: str
    expected: Sequence[tuple[str, str, str]]
    """(kind, namespace, name) of everything that this version installs with these values."""
    present: frozenset[tuple[str, str, str]] | Unread
    deployments: Listed
    pods: Listed
    only: str | None = None
    """The one namespace that is asked about; None: the whole mesh."""


@dataclass(frozen=True, slots=True)
class Trust:
    """Certificates of the mesh and of the control plane's own servers."""

    roots: Sequence[Validity] | Unread
    issuer: Validity | Unread
    issuer_fault: str
    """Why the issuer cannot sign for the roots; empty if it can."""
    serving: Mapping[str, Validity | Unread]
    """By server (`injector`, `viz`): the certificate in its Secret."""
    bundles: Mapping[str, str | Unread]
    """By server: why the CA bundle that the API server uses does not fit that certificate; empty if it does."""
    webhooks: Listed
    api_service: Object | Unread | None
    identity: Mapping[str, str | Unread]
    """By identity pod: empty if it is ready to sign, else what it said."""
    identity_clock: timedelta | None
    """How far identity's clock is before the API server's."""


# ---- the API ----


def kubernetes(api: Api) -> list[Finding]:
    """Is this a cluster that a mesh can live in, and do its clocks agree?"""
    findings = [
        Finding("the Kubernetes API answers", id="api-answers"),
        good_unless(
            "Kubernetes is 1.29 or newer",
            [] if api.number >= MINIMUM else [f"found {api.version}"],
            "upgrade the cluster: native sidecars begin with 1.29",
            id="api-version",
        ),
    ]
    if api.answered_at is not None:
        skew = api.answered_at - api.asked_at
        findings.append(_skew("this machine's clock agrees with the API server's", skew, "this machine", "clock-here"))
    findings.append(_nodes(api))
    return findings


def _skew(description: str, skew: timedelta, who: str, id: str) -> Finding:
    amount = abs(skew)
    if amount <= SKEW_ALLOWED:
        return Finding(description, id=id)
    direction = "behind" if skew > timedelta(0) else "ahead of"
    return Finding(
        description,
        Result.ERROR if amount >= SKEW_FATAL else Result.WARNING,
        f"{who} is {amount.total_seconds():.0f} s {direction} the API server; certificates forgive "
        f"{SKEW_ALLOWED.total_seconds():.0f} s",
        "set both clocks by NTP",
        id=id,
    )


def _nodes(api: Api) -> Finding:
    """Leases say when each node last lived, by its own clock: in the future it is ahead, long ago behind, or gone."""
    description, id = "every node's clock agrees with the API server's", "clock-nodes"
    if isinstance(api.leases, Unread):
        return unread(description, api.leases, id)
    now = api.answered_at or api.asked_at
    wrong = []
    for lease in api.leases:
        renewed = time_of(lease.get("spec", {}).get("renewTime"))
        if renewed is not None and renewed - now > SKEW_ALLOWED:
            wrong.append(f"node {name_of(lease)} is {(renewed - now).total_seconds():.0f} s ahead")
        elif renewed is not None and now - renewed > LEASE_AGE:
            wrong.append(f"node {name_of(lease)} is {(now - renewed).total_seconds():.0f} s behind, or does not answer")
    return good_unless(description, wrong, "set the node's clock by NTP; `kubectl get nodes`", Result.WARNING, id=id)


# ---- before an installation ----


def before(
    namespace: str, namespaces: Listed, deployments: Listed, webhooks: Listed, wishes: Sequence[Wish], aggregation: str
) -> list[Finding]:
    """Can Mantle be installed here? `aggregation`: why aggregated APIs cannot be served; empty if they can."""
    here = find(namespaces, namespace)
    enforce = enforced(here) if here is not None else ""
    found = [] if isinstance(deployments, Unread) else [d for d in deployments if LABEL_COMPONENT in labels_of(d)]
    foreign = [] if isinstance(deployments, Unread) else [d for d in deployments if d not in found]
    others = [
        name_of(w)
        for w in ([] if isinstance(webhooks, Unread) else webhooks)
        if any(word in name_of(w) for word in ("linkerd", "istio", "consul-connect", "kuma"))
    ]
    return [
        good_unless(
            f"namespace {namespace} holds no control plane yet",
            [f"found {', '.join(sorted(map(name_of, found)))}"] if found else [],
            "`mantle upgrade | kubectl apply -f -` changes an installation; `mantle check` checks it",
            id="pre-namespace",
        ),
        good_unless(
            f"namespace {namespace} is Mantle's own",
            [f"found other workloads in it: {', '.join(sorted(map(name_of, foreign)))}"] if foreign else [],
            "choose another with `--set controlNamespace=NAME`, or move them: the namespace becomes privileged",
            Result.WARNING,
            id="pre-namespace-shared",
        ),
        good_unless(
            f"namespace {namespace} may run the container that sets the redirect",
            [f"its PodSecurity level is {enforce}"] if enforce in RESTRICTING else [],
            f"kubectl label --overwrite namespace {namespace} pod-security.kubernetes.io/enforce=privileged",
            Result.WARNING,
            id="pre-pod-security",
        ),
        good_unless(
            "you may create everything an installation needs",
            [f"{wish.right}: {wish.refusal}" for wish in wishes if wish.refusal is not None],
            "ask for the role cluster-admin while you install, or let somebody apply `mantle install`'s output",
            id="pre-rights",
        ),
        good_unless(
            "the API server can serve APIs of others",
            [aggregation] if aggregation else [],
            "give kube-apiserver the flags of the aggregation layer (--requestheader-client-ca-file and its peers)",
            id="pre-aggregation",
        ),
        good_unless(
            "no other mesh injects pods here",
            [f"found the webhook {', '.join(sorted(others))}"] if others else [],
            "never ask both for the same pod; a pod that has another mesh's sidecar is left alone",
            Result.WARNING,
            id="pre-other-mesh",
        ),
    ]


# ---- the installation ----


def installation(mesh: Mesh) -> list[Finding]:
    """Is everything there that was installed, and does it run?"""
    again = "`mantle upgrade | kubectl apply -f -` puts it back"
    description = f"Mantle is installed in namespace {mesh.namespace}"
    if isinstance(mesh.config, Unread) and mesh.config.forbidden:
        if mesh.only is not None:
            return [unread(description, mesh.config, "install-config")]
        # Nothing is known of the mesh then, which must not look like health.
        fix = (
            "ask somebody who may read it; of a namespace of your own you see more: `mantle check --proxy -n NAMESPACE`"
        )
        return [Finding(description, Result.ERROR, f"not known: {mesh.config}", fix, id="install-config")]
    if isinstance(mesh.config, Unread) or mesh.config:
        return [
            Finding(
                description,
                Result.ERROR,
                str(mesh.config),
                "`mantle install | kubectl apply -f -`, or name its namespace with --control-namespace",
                id="install-config",
            )
        ]
    findings = [Finding(description, id="install-config")]
    description = "everything that was installed is there"
    if isinstance(mesh.present, Unread):
        findings.append(unread(description, mesh.present, "install-objects"))
    else:
        missing = [
            f"{kind} {f'{namespace}/' if namespace else ''}{name} is missing"
            for kind, namespace, name in mesh.expected
            if (kind, namespace, name) not in mesh.present
        ]
        findings.append(good_unless(description, missing, again, id="install-objects"))
    findings += [
        good_unless(
            "control plane and command are of one version",
            [] if mesh.version == mesh.client_version else [f"found {mesh.version}, the command {mesh.client_version}"],
            "`mantle upgrade | kubectl apply -f -`, or use the command of that version",
            Result.WARNING,
            id="install-version",
        ),
        _ready(mesh),
    ]
    if mesh.ha and not isinstance(mesh.deployments, Unread):
        single = [
            f"{name_of(d)} has {d['spec'].get('replicas', 1)} pod"
            for d in mesh.deployments
            if component_of(d) not in ("", "ca") and d["spec"].get("replicas", 1) < 2
        ]
        fix = "`mantle upgrade | kubectl apply -f -`"
        findings.append(good_unless("each component has several pods", single, fix, Result.WARNING, id="install-ha"))
    if mesh.tls == OPTIONAL:
        findings.append(
            Finding(
                "no experimental mode is installed",
                Result.WARNING,
                "--tls=optional is weaker: its ca makes the keys, and its pods fail open",
                "move its pods to the default mode, then `mantle upgrade --tls=required | kubectl apply --prune …`",
                id="install-optional",
            )
        )
    return findings


def _ready(mesh: Mesh) -> Finding:
    description = "the control plane is ready"
    fix = f"`kubectl -n {mesh.namespace} get pods` and `kubectl -n {mesh.namespace} describe pod POD`"
    if isinstance(mesh.deployments, Unread):
        return unread(description, mesh.deployments, "control-ready")
    reasons = []
    for deployment in mesh.deployments:
        wanted, ready = deployment["spec"].get("replicas", 1), deployment.get("status", {}).get("readyReplicas", 0)
        if component_of(deployment) and ready < wanted:
            why = _why_not(mesh.pods, component_of(deployment))
            reasons.append(f"{name_of(deployment)}: {ready} of {wanted} pods ready{f' ({why})' if why else ''}")
    if not any(map(component_of, mesh.deployments)):
        reasons.append("there are no Deployments of Mantle")
    return good_unless(description, reasons, fix, id="control-ready")


def _why_not(pods: Listed, component: str) -> str:
    """The first thing that keeps a component's pods from being ready, in Kubernetes' words."""
    for pod in () if isinstance(pods, Unread) else pods:
        if labels_of(pod).get(LABEL_COMPONENT) != component:
            continue
        status = pod.get("status", {})
        for condition in status.get("conditions", ()):
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                return f"{name_of(pod)} cannot be scheduled: {condition.get('message', '')}"
        for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
            waiting = container.get("state", {}).get("waiting")
            if waiting and waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
                return (
                    f"{container['name']} of {name_of(pod)}: {waiting['reason']} {waiting.get('message', '')}".rstrip()
                )
    return ""


# ---- certificates ----


def certificates(trust: Trust, now: datetime, namespace: str) -> list[Finding]:
    """Roots, issuer, and what the API server sees when it calls the control plane."""
    new_trust = "install new trust material before that day (docs/install.md); every meshed pod must get the new roots"
    findings = []
    if isinstance(trust.roots, Unread):
        findings.append(unread("the trust roots can be read", trust.roots, "trust-roots", Result.ERROR))
    else:
        findings += _lifetimes("trust roots", trust.roots, now, new_trust, "trust-roots")
    if isinstance(trust.issuer, Unread):
        findings.append(unread("the issuer can be read", trust.issuer, "issuer"))
    else:
        findings += _lifetimes("the issuer", [trust.issuer], now, new_trust, "issuer")
        findings.append(
            good_unless(
                "the issuer is signed by a trust root, and is as identity needs it",
                [trust.issuer_fault] if trust.issuer_fault else [],
                "give identity an issuer, its key and trust roots that were made together",
                id="issuer-chain",
            )
        )
    findings.append(_identity(trust, namespace))
    if trust.identity_clock is not None:
        about = "identity's clock agrees with the API server's"
        findings.append(_skew(about, trust.identity_clock, "identity", "clock-identity"))
    for server, served in trust.serving.items():
        again = f"`kubectl -n {namespace} rollout restart deployment/mantle-{server}`: it makes a new one"
        if isinstance(served, Unread):
            findings.append(unread(f"the certificate of {server} can be read", served, f"{server}-certificate"))
        else:
            # It is renewed at 70 % of its life: one that is older was not.
            late = served.not_after - (served.not_after - served.not_before) * 0.2
            reasons = [f"it expired on {stamp(served.not_after)}"] if now >= served.not_after else []
            reasons += [f"it is valid from {stamp(served.not_before)}"] if now < served.not_before else []
            findings.append(
                good_unless(f"the certificate of {server} is valid", reasons, again, id=f"{server}-certificate")
            )
            old = [f"it ends on {stamp(served.not_after)} and is not renewed"] if late <= now < served.not_after else []
            findings.append(
                good_unless(
                    f"the certificate of {server} is renewed in time",
                    old,
                    again,
                    Result.WARNING,
                    id=f"{server}-renewal",
                )
            )
        bundle = trust.bundles.get(server, "")
        about = f"the API server trusts the certificate of {server}"
        findings.append(
            unread(about, bundle, f"{server}-bundle")
            if isinstance(bundle, Unread)
            else good_unless(about, [bundle] if bundle else [], again, id=f"{server}-bundle")
        )
    return findings


def _lifetimes(what: str, found: Sequence[Validity], now: datetime, fix: str, id: str) -> list[Finding]:
    """Valid, and for how long. Short-lived issuers of others (48 h, renewed early) are not late by being short."""
    due = [(v, min(SOON, (v.not_after - v.not_before) / 4)) for v in found]
    over = [f"{v.name} expired on {stamp(v.not_after)}" for v in found if now >= v.not_after]
    over += [f"{v.name} is valid from {stamp(v.not_before)}, now is {stamp(now)}" for v in found if now < v.not_before]
    late = [f"{v.name} will expire on {stamp(v.not_after)}" for v, ahead in due if now < v.not_after <= now + ahead]
    verb = "are" if what.endswith("s") else "is"
    return [
        good_unless(f"{what} {verb} valid", over, fix, id=f"{id}-valid"),
        good_unless(f"{what} {verb} valid for long enough", late, fix, Result.WARNING, id=f"{id}-soon"),
    ]


def _identity(trust: Trust, namespace: str) -> Finding:
    description = "identity can be reached and signs"
    unread = [f"{pod}: {said}" for pod, said in trust.identity.items() if isinstance(said, Unread)]
    faults = [f"{pod}: {said}" for pod, said in trust.identity.items() if said and not isinstance(said, Unread)]
    if not trust.identity:
        faults = ["it has no running pod"]
    fix = f"`kubectl -n {namespace} logs deployment/mantle-identity -c identity` says why"
    if faults or not unread:
        return good_unless(description, faults, fix, id="identity-ready")
    return Finding(
        description,
        Result.WARNING,
        "; ".join(unread),
        "ask somebody with the right to `get pods/proxy` there",
        id="identity-ready",
    )


# ---- what the API server calls ----


def webhook(trust: Trust, namespace: str) -> list[Finding]:
    """Will new pods be injected, and do views answer?"""
    again = "`mantle upgrade | kubectl apply -f -` puts it back"
    findings = []
    description = "the API server asks the injector about new pods"
    if isinstance(trust.webhooks, Unread):
        findings.append(unread(description, trust.webhooks, "injector-webhook"))
    else:
        ours = [w for w in trust.webhooks if name_of(w) == "mantle-injector"]
        reasons = [] if ours else ["there is no MutatingWebhookConfiguration mantle-injector"]
        reasons += [
            f"{hook['name']} has no CA bundle yet"
            for w in ours
            for hook in w.get("webhooks", ())
            if not hook.get("clientConfig", {}).get("caBundle")
        ]
        writes = f"the injector writes it: `kubectl -n {namespace} logs deployment/mantle-injector -c injector`"
        findings.append(good_unless(description, reasons, writes if ours else again, id="injector-webhook"))
    about, fix = "the views' API is available", f"`kubectl -n {namespace} logs deployment/mantle-viz -c viz` says why"
    if isinstance(trust.api_service, Unread):
        findings.append(unread(about, trust.api_service, "views-api"))
    else:
        conditions = (trust.api_service or {}).get("status", {}).get("conditions", ())
        available = next((c for c in conditions if c.get("type") == "Available"), None)
        reason = (
            "there is no APIService v1alpha1.tap.mantle.dev" if trust.api_service is None else "it was never reached"
        )
        if available is not None:
            reason = f"{available.get('reason', '')}: {available.get('message', '')}"
        good = available is not None and available.get("status") == "True"
        findings.append(good_unless(about, [] if good else [reason], fix, id="views-api"))
    return findings
