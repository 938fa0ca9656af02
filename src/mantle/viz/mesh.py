"""Questions about a platform snapshot that stat, edges, tap and the scraper share. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from mantle.core.model import Pod, Service, Snapshot
from mantle.viz.source import Subject

CONTROL_PLANE_LABEL = "mantle.dev/control-plane-ns"


def is_meshed(pod: Pod) -> bool:
    """True if injection gave this pod a proxy."""
    return CONTROL_PLANE_LABEL in pod.labels


def is_live(pod: Pod) -> bool:
    """True unless the pod has ended."""
    return pod.phase not in ("Succeeded", "Failed")


def subject_of(pod: Pod) -> Subject:
    return Subject(pod.key.namespace, pod.key.name, pod.ip, pod.owner, pod.service_account)


def short_identity(identity: str) -> str:
    """`service-account.namespace` of an identity, as tables show it, or `owner.kind.namespace` of one of the
    experimental mode; other names are shown whole.
    """
    for form in (".serviceaccount.identity.", ".optional."):
        account, found, _ = identity.partition(form)
        if found:
            return account
    return identity


def selected_by(service: Service, pods: Iterable[Pod]) -> list[Pod]:
    """The pods behind a service. A service without a selector selects nothing."""
    if not service.selector:
        return []
    wanted = service.selector.items()
    return [pod for pod in pods if pod.key.namespace == service.key.namespace and wanted <= pod.labels.items()]


def pods_of(snapshot: Snapshot, kind: str, name: str, namespace: str) -> list[Pod]:
    """The live pods of a resource, sorted by name; an empty `name` means every resource of that kind in `namespace`.

    `kind` is one of `core.views.TAPPED`; a namespace is `name`, else `namespace`. An empty `namespace` means all.
    """
    pods = sorted((pod for pod in snapshot.pods.values() if is_live(pod)), key=lambda pod: str(pod.key))
    if kind == "namespace":
        return [pod for pod in pods if (name or namespace) in ("", pod.key.namespace)]
    pods = [pod for pod in pods if namespace in ("", pod.key.namespace)]
    if kind == "pod":
        return [pod for pod in pods if name in ("", pod.key.name)]
    if kind == "service":
        chosen = {
            pod.key
            for service in snapshot.services.values()
            if namespace in ("", service.key.namespace) and name in ("", service.key.name)
            for pod in selected_by(service, pods)
        }
        return [pod for pod in pods if pod.key in chosen]
    return [pod for pod in pods if pod.owner.kind.lower() == kind and name in ("", pod.owner.name)]
