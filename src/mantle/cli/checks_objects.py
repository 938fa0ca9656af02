"""What the checks of a cluster ask of Kubernetes objects as the API gives them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mantle.cli.checks import Finding, Result
from mantle.core.annotations import LABEL_COMPONENT, LABEL_CONTROL_NS
from mantle.core.inject_containers import PROXY
from mantle.core.pod_facts import containers

Object = Mapping[str, Any]
RESTRICTING = ("baseline", "restricted")
"""PodSecurity levels that refuse the init container (https://kubernetes.io/docs/concepts/security/pod-security-standards/)."""


@dataclass(frozen=True, slots=True)
class Unread:
    """Why a fact is not known: it becomes a finding, because silence must never look like health."""

    why: str
    fix: str = "ask somebody who may read it to run `mantle check`"
    forbidden: bool = False
    """True if this user may not read it; it may well be there."""

    def __str__(self) -> str:
        return self.why


Listed = Sequence[Object] | Unread


def unread(description: str, why: Unread, id: str, result: Result = Result.WARNING) -> Finding:
    return Finding(description, result, f"not known: {why}", why.fix, id=id)


def find(objects: Listed, name: str) -> Object | None:
    return None if isinstance(objects, Unread) else next((obj for obj in objects if name_of(obj) == name), None)


def name_of(obj: Object) -> str:
    return str(obj["metadata"]["name"])


def full_of(obj: Object) -> str:
    namespace = obj["metadata"].get("namespace")
    return f"{namespace}/{name_of(obj)}" if namespace else name_of(obj)


def labels_of(obj: Object) -> Mapping[str, str]:
    return obj["metadata"].get("labels") or {}


def annotations_of(obj: Object) -> Mapping[str, str]:
    return obj["metadata"].get("annotations") or {}


def component_of(obj: Object) -> str:
    labels = labels_of(obj)
    return labels.get(LABEL_COMPONENT, "") if LABEL_CONTROL_NS in labels else ""


def enforced(namespace: Object) -> str:
    return labels_of(namespace).get("pod-security.kubernetes.io/enforce", "")


def alive(found: Iterable[Object]) -> list[Object]:
    return [pod for pod in found if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")]


def has_proxy(pod: Object) -> bool:
    return any(container.get("name") == PROXY for container in containers(pod.get("spec") or {}))


def proxy_status(pod: Object) -> Object | None:
    status = pod.get("status", {})
    statuses = (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ()))
    return next((one for one in statuses if one.get("name") == PROXY), None)


def proxy_env(pod: Object, name: str) -> str:
    """A setting that injection gave the pod's proxy, by its name without prefix; empty if it has none."""
    for container in containers(pod.get("spec") or {}):
        for variable in container.get("env") or () if container.get("name") == PROXY else ():
            if str(variable.get("name", "")).endswith(f"_PROXY_{name}"):
                return str(variable.get("value") or "")
    return ""


def running_since(pod: Object) -> datetime | None:
    """When the pod's proxy was started; None while it does not run."""
    state = (proxy_status(pod) or {}).get("state") or {}
    return time_of((state.get("running") or {}).get("startedAt"))


def state_of(pod: Object) -> str:
    found = proxy_status(pod)
    if found is None:
        return f"{pod.get('status', {}).get('phase', 'unknown')}, not started"
    for name, state in (found.get("state") or {}).items():
        return f"{name} {state.get('reason', '')}".strip()
    return "not ready"


def owner_of(pod: Object) -> tuple[str, str] | None:
    """The workload that people know: a ReplicaSet that a Deployment made is that Deployment."""
    reference = next((r for r in pod["metadata"].get("ownerReferences") or () if r.get("controller")), None)
    if reference is None:
        return None
    kind, name = reference["kind"], reference["name"]
    template = labels_of(pod).get("pod-template-hash")
    if kind == "ReplicaSet" and template and name.endswith(f"-{template}"):
        return "Deployment", name.removesuffix(f"-{template}")
    return kind, name


def ends_of(pod: Object) -> tuple[str, ...]:
    """How `edges deployment` names this pod's workload."""
    kind, name = owner_of(pod) or ("Pod", name_of(pod))
    return name, f"{kind.lower()}/{name}"


def time_of(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None


def stamp(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
