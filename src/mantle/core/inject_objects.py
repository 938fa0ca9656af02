"""Injection of whole Kubernetes objects, as `mantle inject` does it: find the pod template, annotate or inject it.

Works on the parsed objects in place (so that what knows about comments and order may be passed in) and returns one
`Report` an object. Which text they came from and went to is the caller's business.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from mantle.core.annotations import (
    INHERITED_OPAQUE_PORTS,
    INJECT,
    INJECT_VALUES,
    LABEL_COMPONENT,
    OPAQUE_PORTS,
    PREFIX,
    SKIPPED,
    Mistake,
    read_config,
)
from mantle.core.inject import Injected, Refused, inject_pod, uninject_pod
from mantle.core.inject_containers import PROXY
from mantle.core.pod_facts import Skip, containers, has_udp_ports, misshapen, obstacles
from mantle.core.proxy_env import Values

TEMPLATE_PATHS: Mapping[str, tuple[str, ...]] = {
    "Deployment": ("spec", "template"),
    "ReplicationController": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    "Pod": (),
}


class Verdict(enum.StrEnum):
    INJECTED = "injected"
    ANNOTATED = "annotated"
    SKIPPED = "skipped"
    FAILED = "failed"
    UNINJECTED = "uninjected"


@dataclass(frozen=True, slots=True)
class Report:
    """What came of one object. `kind` is lower case, empty when the object has none."""

    kind: str
    name: str
    verdict: Verdict
    skips: tuple[Skip, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    error: str = ""
    udp: bool = False
    path: tuple[str | int, ...] = ()
    """Where, inside the document, the object is whose `metadata.annotations` were written."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    """What was written there."""
    removed: tuple[str, ...] = ()
    """Which annotations were removed there. Empty where more than annotations was."""

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked of `mantle inject`."""

    settings: Mapping[str, str]
    """`config.mantle.dev/` names without prefix, to their texts: already known to be accepted."""
    inject: str = "enabled"
    """`enabled` or `ingress`."""
    manual: Values | None = None
    """Render the sidecar with these values instead of asking for it by annotation."""


@dataclass(frozen=True, slots=True)
class _Item:
    """One object of a document."""

    obj: MutableMapping[str, Any]
    kind: str
    name: str
    path: tuple[str | int, ...]
    """Where it is in its document."""


def _items(obj: Any, path: tuple[str | int, ...] = ()) -> Iterator[_Item | None]:
    """The object, or each item of a `List`; None for what is no Kubernetes object."""
    if not isinstance(obj, MutableMapping) or not obj.get("kind"):
        yield None
        return
    kind = str(obj["kind"])
    if kind.endswith("List") and isinstance(obj.get("items"), list):
        for index, item in enumerate(obj["items"]):
            yield from _items(item, (*path, "items", index))
        return
    metadata = obj.get("metadata")
    if not isinstance(metadata, Mapping):
        metadata = {}
    yield _Item(obj, kind, str(metadata.get("name") or metadata.get("generateName") or ""), path)


NO_OBJECT = Report("", "", Verdict.SKIPPED)


def inject_object(obj: Any, wish: Wish, namespaces: Mapping[str, Mapping[str, Any]]) -> Iterator[Report]:
    """Annotates or injects one object, each item of a `List` by itself. `namespaces`: Namespace objects by name."""
    for item in _items(obj):
        yield NO_OBJECT if item is None else _inject(item, wish, namespaces)


def _inject(item: _Item, wish: Wish, namespaces: Mapping[str, Mapping[str, Any]]) -> Report:
    if item.kind == "Namespace" and wish.manual is None:
        written = {INJECT: wish.inject, **_prefixed(wish.settings)}
    elif item.kind == "Service" and "opaque-ports" in wish.settings:
        written = {PREFIX + "opaque-ports": wish.settings["opaque-ports"]}
    elif item.kind in TEMPLATE_PATHS:
        return _inject_workload(item.obj, item.kind, item.name, wish, namespaces, item.path)
    else:
        return Report(item.kind.lower(), item.name, Verdict.SKIPPED)
    if wrong := misshapen({"metadata": item.obj.get("metadata")}):
        return Report(item.kind.lower(), item.name, Verdict.FAILED, mistakes=wrong)
    _annotate(item.obj, written)
    return Report(item.kind.lower(), item.name, Verdict.ANNOTATED, path=item.path, annotations=written)


def _inject_workload(
    obj: MutableMapping[str, Any],
    kind: str,
    name: str,
    wish: Wish,
    namespaces: Mapping[str, Mapping[str, Any]],
    path: tuple[str | int, ...],
) -> Report:
    lower = kind.lower()
    template: Any = obj
    for step in TEMPLATE_PATHS[kind]:
        template = template.get(step) if isinstance(template, Mapping) else None
    if not isinstance(template, MutableMapping) or not isinstance(template.get("spec"), MutableMapping):
        where = ".".join((*TEMPLATE_PATHS[kind], "spec"))
        return Report(lower, name, Verdict.FAILED, error=f"{where} is missing: there is no pod to inject")
    if wrong := misshapen(template):
        return Report(lower, name, Verdict.FAILED, mistakes=wrong)
    if any(container.get("name") == PROXY for container in containers(template["spec"])):
        _replace(template, uninject_pod(template))
    own = (template.get("metadata") or {}).get("annotations") or {}
    skips = list(obstacles(template["spec"]))
    if own.get(INJECT) == "disabled":
        skips.append(Skip.DISABLED)
    if skips:
        return Report(lower, name, Verdict.SKIPPED, tuple(skips))
    namespace_name = str((obj.get("metadata") or {}).get("namespace") or "default")
    udp = has_udp_ports(template["spec"])
    written = {INJECT: wish.inject, **_prefixed(wish.settings)}
    if wish.manual is None:
        failed = _wrong_annotations(template, lower, name, own)
        if failed is None:
            _annotate(template, written)
            at = (*path, *TEMPLATE_PATHS[kind])
            return Report(lower, name, Verdict.INJECTED, udp=udp, path=at, annotations=written)
        return failed
    _annotate(template, written)
    owner = None if kind == "Pod" else (kind, name)
    result = inject_pod(template, namespaces.get(namespace_name, {}), wish.manual, owner)
    if isinstance(result, Injected):
        _replace(template, result.pod)
        return Report(lower, name, Verdict.INJECTED, udp=udp)
    if isinstance(result, Refused):
        return Report(lower, name, Verdict.FAILED, mistakes=result.mistakes)
    return Report(lower, name, Verdict.SKIPPED, result.reasons)


def _wrong_annotations(template: Mapping[str, Any], kind: str, name: str, own: Mapping[str, str]) -> Report | None:
    if LABEL_COMPONENT in ((template.get("metadata") or {}).get("labels") or {}):
        return Report(kind, name, Verdict.FAILED, error="--manual must be set when injecting control plane components")
    mistakes = read_config(own, {})[1]
    if (said := own.get(INJECT)) is not None and said not in INJECT_VALUES:
        mistakes = (Mistake(INJECT, str(said), " or ".join(INJECT_VALUES)), *mistakes)
    if mistakes:
        return Report(kind, name, Verdict.FAILED, mistakes=mistakes)
    return None


def uninject_object(obj: Any) -> Iterator[Report]:
    """Takes one object out of the mesh again, each item of a `List` by itself: the inverse of `inject_object`.

    What was rendered goes, and so does what asks for injection: `mantle.dev/inject` (but not `disabled`) and the
    settings below it, since that is where injection writes them; settings above it were there before.
    """
    for item in _items(obj):
        yield NO_OBJECT if item is None else _uninject(item)


def _uninject(item: _Item) -> Report:
    kind, name = item.kind, item.name
    holder: Any = item.obj
    steps = TEMPLATE_PATHS.get(kind, ())
    for step in steps:
        holder = holder.get(step) if isinstance(holder, Mapping) else None
    known = kind in TEMPLATE_PATHS or kind in ("Namespace", "Service")
    metadata = holder.get("metadata") if isinstance(holder, MutableMapping) else None
    if not known or not isinstance(metadata, MutableMapping):
        return Report(kind.lower(), name, Verdict.SKIPPED)
    if misshapen(holder if kind in TEMPLATE_PATHS else {"metadata": metadata}):
        return Report(kind.lower(), name, Verdict.SKIPPED)  # nothing that Mantle wrote
    if LABEL_COMPONENT in (metadata.get("labels") or {}):
        return Report(kind.lower(), name, Verdict.SKIPPED)
    rendered = False
    if isinstance(holder.get("spec"), Mapping) and kind in TEMPLATE_PATHS:
        plain = uninject_pod(holder)
        rendered = plain != holder
        if rendered:
            _replace(holder, plain)
            metadata = holder["metadata"]
    gone = tuple(_asking(metadata.get("annotations") or {}, kind))
    for key in gone:
        del metadata["annotations"][key]
    if gone and not metadata["annotations"]:
        del metadata["annotations"]
    if (gone or rendered) and not metadata:
        del holder["metadata"]
    if not gone and not rendered:
        return Report(kind.lower(), name, Verdict.SKIPPED)
    at = (*item.path, *steps)
    return Report(kind.lower(), name, Verdict.UNINJECTED, path=at, removed=() if rendered else gone)


def _asking(annotations: Mapping[str, str], kind: str) -> Iterator[str]:
    """The annotations that ask for injection, in their order."""
    if kind == "Service":
        yield from (key for key in annotations if key in (OPAQUE_PORTS, INHERITED_OPAQUE_PORTS, SKIPPED))
        return
    if SKIPPED in annotations:
        yield SKIPPED
    if annotations.get(INJECT, "disabled") == "disabled":
        return
    below = False
    for key in annotations:
        below = below or key == INJECT
        if below and (key == INJECT or key.startswith(PREFIX)):
            yield key


def _prefixed(settings: Mapping[str, str]) -> dict[str, str]:
    return {PREFIX + name: text for name, text in settings.items()}


def _annotate(obj: MutableMapping[str, Any], annotations: Mapping[str, str]) -> None:
    """Sets annotations in place; `metadata` goes first where there was none."""
    if not obj.get("metadata"):
        rest = dict(obj)
        obj.clear()
        obj["metadata"] = {}
        obj.update({key: value for key, value in rest.items() if key != "metadata"})
    metadata = obj["metadata"]
    if not metadata.get("annotations"):
        metadata["annotations"] = {}
    metadata["annotations"].update(annotations)


def _replace(target: MutableMapping[str, Any], source: Mapping[str, Any]) -> None:
    """Takes over `metadata` and `spec` without losing the mapping (and what it knows of comments) around them."""
    for key in ("metadata", "spec"):
        if key in source:
            target[key] = source[key]
        else:
            target.pop(key, None)
