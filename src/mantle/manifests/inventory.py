"""The kinds of objects an installation consists of: how they are addressed, and in which order they go away. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mantle.core.annotations import LABEL_CONTROL_NS
from mantle.manifests.config import InstallValues
from mantle.manifests.render import PART_OF, PART_OF_VALUE, TrustMaterial, identify, install_objects


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of object. `plural` is its name in paths of the API."""

    api_version: str
    kind: str
    plural: str

    @property
    def path(self) -> str:
        """Where all of them are listed, in every namespace."""
        root = "/api/" if "/" not in self.api_version else "/apis/"
        return f"{root}{self.api_version}/{self.plural}"

    def path_in(self, namespace: str) -> str:
        """Where those of one namespace are listed."""
        return f"{self.path.removesuffix(self.plural)}namespaces/{namespace}/{self.plural}"

    @property
    def pruned_as(self) -> str:
        """Its name for `kubectl apply --prune-allowlist`."""
        return f"{self.api_version if '/' in self.api_version else 'core/' + self.api_version}/{self.kind}"

    def reference(self, namespace: str, name: str) -> dict[str, Any]:
        """As little of an object as `kubectl delete -f` needs."""
        where = {"namespace": namespace} if namespace else {}
        return {"apiVersion": self.api_version, "kind": self.kind, "metadata": {"name": name, **where}}


_RBAC = "rbac.authorization.k8s.io/v1"
_ADMISSION = "admissionregistration.k8s.io/v1"

KINDS: tuple[Kind, ...] = (
    Kind(_ADMISSION, "MutatingWebhookConfiguration", "mutatingwebhookconfigurations"),
    Kind("apiregistration.k8s.io/v1", "APIService", "apiservices"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("apps/v1", "Deployment", "deployments"),
    Kind("v1", "Service", "services"),
    Kind(_RBAC, "RoleBinding", "rolebindings"),
    Kind(_RBAC, "Role", "roles"),
    Kind(_RBAC, "ClusterRoleBinding", "clusterrolebindings"),
    Kind(_RBAC, "ClusterRole", "clusterroles"),
    Kind(_ADMISSION, "ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings"),
    Kind(_ADMISSION, "ValidatingAdmissionPolicy", "validatingadmissionpolicies"),
    Kind("v1", "ConfigMap", "configmaps"),
    Kind("v1", "Secret", "secrets"),
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("v1", "Namespace", "namespaces"),
)
"""In the order to delete them: what the API server asks first, so that nothing waits for a program that is gone; the
namespace last."""

PRUNE = " ".join(
    (
        "kubectl apply --prune",
        f"-l {PART_OF}={PART_OF_VALUE}",
        *(f"--prune-allowlist={kind.pruned_as}" for kind in KINDS if kind.kind != "Namespace"),
        "-f -",
    )
)
"""The command that applies an upgrade and removes what it no longer has."""


def selector(namespace: str) -> Mapping[str, str]:
    """The query that finds everything of the control plane in `namespace`."""
    return {"labelSelector": f"{LABEL_CONTROL_NS}={namespace}"}


def possible(namespace: str) -> list[dict[str, Any]]:
    """References to everything that any install into `namespace` could have made, in the order to delete it."""
    values = InstallValues(control_namespace=namespace, ha=True, tls="optional")
    rendered = install_objects(values, TrustMaterial("-", "-", "-"))
    return in_order((obj["kind"], *identify(obj)[1:]) for obj in rendered)


def in_order(names: Iterable[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """References to the (kind, namespace, name) given, in the order to delete them."""
    places = {kind.kind: place for place, kind in enumerate(KINDS)}
    ordered = sorted(names, key=lambda name: places[name[0]])
    return [KINDS[places[kind]].reference(namespace, name) for kind, namespace, name in ordered]


WORKLOADS: tuple[Kind, ...] = (
    Kind("apps/v1", "Deployment", "deployments"),
    Kind("apps/v1", "StatefulSet", "statefulsets"),
    Kind("apps/v1", "DaemonSet", "daemonsets"),
    Kind("batch/v1", "CronJob", "cronjobs"),
    Kind("batch/v1", "Job", "jobs"),
    Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
)
"""What somebody would miss if the namespace around it were deleted."""
MADE_THERE = ("mantle-injector-tls", "mantle-viz-tls")
"""Secrets that the control plane's programs made. They have no label of an install, and end with the namespace."""


def others(listed: Iterable[tuple[Kind, Mapping[str, Any]]], namespace: str) -> tuple[str, ...]:
    """What of the objects in the control namespace is not the control plane's, as `kind/name`."""
    return tuple(
        f"{kind.kind.lower()}/{obj['metadata']['name']}"
        for kind, obj in listed
        if (obj["metadata"].get("labels") or {}).get(LABEL_CONTROL_NS) != namespace
    )


def staying(others: tuple[str, ...], namespace: str, shown: int = 20) -> str:
    """What to tell people of a namespace that is not deleted, as it holds something of theirs."""
    more = f" and {len(others) - shown} more" if len(others) > shown else ""
    return (
        f"namespace {namespace} stays, as it also holds {', '.join(others[:shown])}{more}; it keeps the labels and the "
        f"annotation of a control plane: kubectl label namespace {namespace} mantle.dev/is-control-plane- "
        f"{LABEL_CONTROL_NS}- mantle.dev/admission-webhooks-; kubectl annotate namespace {namespace} mantle.dev/inject-"
    )


def still_meshed(pods: Iterable[Mapping[str, Any]], namespace: str, shown: int = 20) -> tuple[str, ...]:
    """What to tell people about pods that have a proxy of the control plane that goes away."""
    left = sorted(
        f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        for pod in pods
        if pod["metadata"]["namespace"] != namespace
        and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
    )
    if not left:
        return ()
    more = f" and {len(left) - shown} more" if len(left) > shown else ""
    count = "1 pod still has" if len(left) == 1 else f"{len(left)} pods still have"
    return (
        f"{count} a proxy: {', '.join(left[:shown])}{more}. It keeps its certificate until that expires, and cannot "
        "start again without a control plane: first remove mantle.dev/inject from workloads and namespaces "
        "(`mantle uninject`) and restart them",
    )
