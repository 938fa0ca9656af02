"""Kubernetes YAML -> objects that a machine can play, or everything that is wrong with a file at once.

For: `read` takes one file apart (syntax, fields, types); `together.check` compares objects with each other. Pure: text
in,
values out. Must not know what a pod becomes (`plan.py`) or what an image is (`images.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mantle.platform.machine.kinds import KINDS, NOT_WORKLOADS_HERE
from mantle.platform.machine.schema import Node, Wrong, walk
from mantle.platform.machine.yamlpos import Document, Mistake, Path
from mantle.platform.machine.yamlpos import read as read_yaml

ObjectId = tuple[str, str, str]
"""(kind, namespace, name); the namespace of a Namespace is empty."""

WORKLOADS = ("Deployment", "Pod", "Job")


@dataclass(frozen=True, slots=True)
class Object:
    """One object that passed the table of its kind. `doc` is the manifest as Kubernetes would see it, namespace
    filled in.
    """

    kind: str
    namespace: str
    name: str
    doc: dict[str, Any]
    file: str = ""
    document: Document | None = field(default=None, compare=False, repr=False)
    prefix: Path = field(default=(), compare=False)

    @property
    def id(self) -> ObjectId:
        return self.kind, self.namespace, self.name

    def __str__(self) -> str:
        return f"{self.kind.lower()}/{self.name}"

    def wrong(self, path: Path, message: str, fix: str = "") -> Mistake:
        line = self.document.line((*self.prefix, *path)) if self.document else 0
        return Mistake(self.file, line, f"{self}: {message}", fix)


@dataclass(frozen=True, slots=True)
class Parsed:
    """What one file held. `notes` are what was left out, each said once."""

    objects: tuple[Object, ...]
    """All that can be checked further; those with harmless mistakes without the fields that are wrong."""
    mistakes: tuple[Mistake, ...]
    notes: tuple[str, ...]
    unread: tuple[Object, ...] = ()
    """Objects too wrong to be checked: their names are taken all the same."""
    complete: bool = True
    """Is every object of the file in `objects`? Otherwise nobody can say that something is missing."""


@dataclass(frozen=True, slots=True)
class Template:
    """The pod inside a workload. `path` leads to it; the metadata is under `path + metadata`, the spec under `path +
    spec`.
    """

    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    spec: dict[str, Any]
    path: Path


def template(item: Object) -> Template | None:
    """The pod template of a workload; None for an object that runs nothing."""
    if item.kind not in WORKLOADS:
        return None
    path: Path = () if item.kind == "Pod" else ("spec", "template")
    pod = item.doc if item.kind == "Pod" else item.doc["spec"]["template"]
    meta = pod.get("metadata") or {}
    return Template(meta.get("labels") or {}, meta.get("annotations") or {}, pod["spec"], path)


def containers(pod: Template) -> Iterator[tuple[Path, dict[str, Any], bool]]:
    """(path, container, is it an init container) of every container, in start order."""
    for key, init in (("initContainers", True), ("containers", False)):
        for index, item in enumerate(pod.spec.get(key) or []):
            yield (*pod.path, "spec", key, index), item, init


def service_account(pod: Template) -> str:
    return pod.spec.get("serviceAccountName") or pod.spec.get("serviceAccount") or "default"


# ---- one file ----


def read(file: str, text: str, default_namespace: str = "default") -> Parsed:
    """All objects of a file, in order. `file` is used in messages only."""
    documents, mistakes = read_yaml(file, text)
    found = _Found(file, default_namespace, mistakes, complete=not mistakes)
    if not documents and not mistakes:
        mistakes.append(Mistake(file, 0, "no object in this file", "write a Kubernetes manifest into it"))
    for document in documents:
        for prefix, value in _items(document):
            found.complete &= _one(found, document, prefix, value)
    notes = [f"{said} ({_few(where)})" for said, where in found.ignored.items()]
    notes += [f"{kind} is not played on one machine: skipped ({_few(names)})" for kind, names in found.skipped.items()]
    mistakes.sort(key=lambda m: m.line)
    return Parsed(tuple(found.objects), tuple(mistakes), tuple(notes), tuple(found.unread), found.complete)


@dataclass(slots=True)
class _Found:
    """What is known of a file while it is read."""

    file: str
    default_namespace: str
    mistakes: list[Mistake]
    complete: bool
    objects: list[Object] = field(default_factory=list)
    unread: list[Object] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)


def _items(document: Document, prefix: Path = (), value: Any = None, depth: int = 0) -> Iterator[tuple[Path, Any]]:
    value = document.value if not prefix else value
    if (
        isinstance(value, dict)
        and str(value.get("kind", "")).endswith("List")
        and isinstance(value.get("items"), list)
        and depth < 4
    ):
        for index, item in enumerate(value["items"]):
            yield from _items(document, (*prefix, "items", index), item, depth + 1)
    else:
        yield prefix, value


def _one(found: _Found, document: Document, prefix: Path, value: Any) -> bool:
    """Takes one object in. False if there is something in the file that cannot be checked any further."""

    def wrong(path: Path, message: str, fix: str) -> bool:
        found.mistakes.append(Mistake(found.file, document.line((*prefix, *path)), message, fix))
        return False

    begin = "an object begins with `apiVersion:`, `kind:` and `metadata:`"
    if not isinstance(value, dict):
        return wrong((), "this is not a Kubernetes object", begin)
    kind, version = value.get("kind"), value.get("apiVersion")
    if not isinstance(kind, str) or not isinstance(version, str):
        missing = [k for k in ("apiVersion", "kind") if not isinstance(value.get(k), str)]
        return wrong((), f"{' and '.join(missing)} missing or not text", begin)
    meta = value.get("metadata")
    name = meta.get("name", "?") if isinstance(meta, dict) else "?"
    label = f"{kind.lower()}/{name}"
    if kind in NOT_WORKLOADS_HERE:
        return wrong(("kind",), f"{label}: a {kind} is not played on one machine", NOT_WORKLOADS_HERE[kind])
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.75)
        if near:
            return wrong(("kind",), f"unknown kind {kind}", f"write {near[0]}")
        found.skipped.setdefault(kind, []).append(label)
        return True
    want, table = KINDS[kind]
    if version != want:
        wrong(("apiVersion",), f"{label}: a {kind} of {version}", f"write apiVersion: {want}")
    bad: list[Path] = []
    for one in walk(table, value):
        if isinstance(one, Wrong):
            bad.append(one.path)
            wrong(one.path, f"{label}: {one.message}", one.fix)
        else:
            where = found.ignored.setdefault(one[1], [])
            if label not in where:
                where.append(label)
    if not isinstance(meta, dict) or not isinstance(name, str):
        return False
    good = value if not bad else _harmless(table, value, bad)
    namespace = "" if kind == "Namespace" else meta.get("namespace") or found.default_namespace
    if good is None:
        if isinstance(namespace, str):
            found.unread.append(Object(kind, namespace, name, value, found.file, document, prefix))
        return False
    doc = dict(good)
    doc["metadata"] = {**meta, **({"namespace": namespace} if namespace else {})}
    found.objects.append(Object(kind, namespace, name, doc, found.file, document, prefix))
    return True


_MEANT = frozenset({"metadata", "selector", "ports", "volumes", "data", "stringData", "binaryData"})
"""Fields that others refer to: with a mistake inside one of them, what would be said next may be wrong."""


def _harmless(table: Node, value: dict[str, Any], bad: list[Path]) -> dict[str, Any] | None:
    """The object without the fields at `bad`, so that everything else about it can be checked in the same go; None if
    that is not safe, or is no object any more.
    """
    if any(_MEANT.intersection(path) or not path or not isinstance(path[-1], str) for path in bad):
        return None
    good = _without(value, (), frozenset(bad))
    return None if any(isinstance(one, Wrong) for one in walk(table, good)) else good


def _without(value: Any, path: Path, bad: frozenset[Path]) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, (*path, k), bad) for k, v in value.items() if (*path, k) not in bad}
    if isinstance(value, list):
        return [_without(item, (*path, index), bad) for index, item in enumerate(value)]
    return value


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


def references(pod: Template) -> Iterator[tuple[Path, str, str, str]]:
    """(path, kind, name, key or empty) of every ConfigMap and Secret that the pod cannot start without."""
    for path, box, _ in containers(pod):
        for index, variable in enumerate(box.get("env") or []):
            for ref, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                source = (variable.get("valueFrom") or {}).get(ref)
                if source and not source.get("optional"):
                    yield (*path, "env", index, "valueFrom", ref), kind, source["name"], source["key"]
        for index, source in enumerate(box.get("envFrom") or []):
            for ref, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if source.get(ref) and not source[ref].get("optional"):
                    yield (*path, "envFrom", index, ref), kind, source[ref]["name"], ""
    for index, volume in enumerate(pod.spec.get("volumes") or []):
        at: Path = (*pod.path, "spec", "volumes", index)
        sources = [(at, volume)]
        if volume.get("projected"):
            sources += [((*at, "projected", "sources", i), s) for i, s in enumerate(volume["projected"]["sources"])]
        for where, source in sources:
            for ref, kind in (("configMap", "ConfigMap"), ("secret", "Secret")):
                if (value := source.get(ref)) and not value.get("optional"):
                    name = value.get("name") or value.get("secretName")
                    keys = [i["key"] for i in value.get("items") or []] or [""]
                    for key in keys:
                        yield (*where, ref), kind, name, key
