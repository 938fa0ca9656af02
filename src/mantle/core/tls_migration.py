"""From the experimental mode to the default one without a gap: what moves, what it is told, when it is over.

Workloads are rolled, each by its own update strategy, from `tls: optional` to `tls: required`. New pods mount a list of
the identities being migrated and accept those, so old and new pods keep speaking mutual TLS. The list is pinned to the
roots of now, has a deadline, and is deleted when the last old pod is gone. Pure: objects as the API gives them in,
values out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mantle.core.inject_optional import MIGRATION_CONFIG, SETTING
from mantle.core.names import BadName
from mantle.core.optional_names import MIGRATION, OptionalNames, Owner, owner_of

Object = Mapping[str, Any]

PATHS: Mapping[str, str] = {
    "deployment": "/apis/apps/v1/namespaces/{}/deployments/{}",
    "statefulset": "/apis/apps/v1/namespaces/{}/statefulsets/{}",
    "daemonset": "/apis/apps/v1/namespaces/{}/daemonsets/{}",
    "cronjob": "/apis/batch/v1/namespaces/{}/cronjobs/{}",
    "replicaset": "/apis/apps/v1/namespaces/{}/replicasets/{}",
    "replicationcontroller": "/api/v1/namespaces/{}/replicationcontrollers/{}",
}
"""Kinds whose pod template can be changed."""
ROLLS = ("deployment", "statefulset", "daemonset")
"""Kinds that replace their pods themselves when their template changes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done."""

    move: tuple[Owner, ...]
    """Workloads whose template is changed."""
    by_hand: Mapping[Owner, str]
    """Owners that nobody can change in place, with what their users must do."""
    identities: tuple[str, ...]
    """Of everything that moves: what new pods accept until it is over."""

    @property
    def left(self) -> bool:
        """Whether something stays of the experimental mode until somebody acts."""
        return any(owner.kind not in PATHS for owner in self.by_hand)

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(sorted({owner.namespace for owner in self.move}))


def owners_of(pods: Iterable[Object]) -> frozenset[Owner]:
    """The owners of pods of the experimental mode that have not ended."""
    found = set()
    for pod in pods:
        meta = pod["metadata"]
        owner = owner_of(meta.get("labels") or {}, meta.get("annotations") or {}, meta["namespace"])
        if owner is not None and pod.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
            found.add(owner)
    return frozenset(found)


def plan(owners: Iterable[Owner], names: OptionalNames) -> Plan:
    """Sorts the owners: those that can be changed, and those that their users must make anew."""
    move, by_hand = [], {}
    for owner in sorted(owners, key=lambda o: (o.namespace, o.kind, o.name)):
        if owner.kind in PATHS:
            move.append(owner)
        if owner.kind not in ROLLS:
            by_hand[owner] = _advice(owner)
    named = [names.identity(owner) for owner in (*move, *by_hand)]
    return Plan(tuple(move), by_hand, tuple(sorted({name for name in named if not isinstance(name, BadName)})))


def _advice(owner: Owner) -> str:
    match owner.kind:
        case "cronjob":
            return "its next run is of the default mode; what runs now ends by itself"
        case "replicaset" | "replicationcontroller":
            return f"it replaces no pod by itself: `kubectl -n {owner.namespace} delete pod …`, one by one"
        case "job":
            return "a Job's template cannot be changed: it ends by itself"
        case _:
            return f"nothing controls it: `kubectl -n {owner.namespace} delete pod {owner.name}`, and apply it again"


def stated(roots: bytes, until: datetime) -> str:
    """What the annotation `mantle.dev/tls-migration` of moving pods says."""
    return f"sha256:{hashlib.sha256(roots).hexdigest()} until:{until:%Y-%m-%dT%H:%M:%SZ}"


def patch(owner: Owner, migration: str) -> dict[str, Any]:
    """What turns a workload's pods to the default mode (a JSON merge patch). The template's word wins over the
    namespace's.
    """
    template = {"metadata": {"annotations": {SETTING: "required", MIGRATION: migration}}}
    if owner.kind == "cronjob":
        return {"spec": {"jobTemplate": {"spec": {"template": template}}}}
    return {"spec": {"template": template}}


def listing(namespace: str, roots: bytes, identities: Iterable[str], control_namespace: str) -> dict[str, Any]:
    """The ConfigMap that moving pods of a namespace mount."""
    labels = {"mantle.dev/control-plane-ns": control_namespace, "mantle.dev/tls": "migration"}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": MIGRATION_CONFIG, "namespace": namespace, "labels": labels},
        "data": {"ca.crt": roots.decode("ascii"), "identities": "".join(f"{name}\n" for name in identities)},
    }


def unfinished(owner: Owner, workload: Object) -> str:
    """What a rolling workload still has to do, in Kubernetes' own numbers; empty when it is done.

    https://kubernetes.io/docs/concepts/workloads/controllers/deployment/#complete-deployment
    """
    spec, status = workload.get("spec", {}), workload.get("status", {})
    if status.get("observedGeneration", 0) < workload["metadata"].get("generation", 0):
        return "its change is not seen yet"
    if owner.kind == "daemonset":
        wanted = status.get("desiredNumberScheduled", 0)
        updated, ready = status.get("updatedNumberScheduled", 0), status.get("numberAvailable", 0)
    else:
        wanted = spec.get("replicas", 1)
        updated, ready = (
            status.get("updatedReplicas", 0),
            status.get("availableReplicas", status.get("readyReplicas", 0)),
        )
    if updated < wanted:
        return f"{updated} of {wanted} pods are new"
    if status.get("replicas", wanted) > updated and owner.kind == "deployment":
        return f"{status['replicas'] - updated} old pods are ending"
    return f"{ready} of {wanted} pods are ready" if ready < wanted else ""


def stuck(workload: Object) -> str:
    """Why a rollout will not end by itself; empty if it may."""
    strategy = workload.get("spec", {}).get("updateStrategy", {}).get("type")
    if strategy == "OnDelete":
        return "its update strategy is OnDelete: delete its pods one by one"
    if workload.get("spec", {}).get("paused"):
        return "its rollout is paused: `kubectl rollout resume`"
    for condition in workload.get("status", {}).get("conditions", ()):
        if condition.get("type") == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded":
            return str(condition.get("message"))
    return ""
