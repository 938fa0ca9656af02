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
from mantle.platform.machine.schema import Wrong, walk
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
    mistakes: tuple[Mistake, ...]
    notes: tuple[str, ...]


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
    objects: list[Object] = []
    ignored: dict[str, list[str]] = {}
    skipped: dict[str, list[str]] = {}
    if not documents and not mistakes:
        mistakes.append(Mistake(file, 0, "no object in this file", "write a Kubernetes manifest into it"))
    for document in documents:
        for prefix, value in _items(document):
            _one(file, document, prefix, value, default_namespace, objects, mistakes, ignored, skipped)
    notes = [f"{said} ({_few(where)})" for said, where in ignored.items()]
    notes += [f"{kind} is not played on one machine: skipped ({_few(names)})" for kind, names in skipped.items()]
    mistakes.sort(key=lambda m: m.line)
    return Parsed(tuple(objects), tuple(mistakes), tuple(notes))


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


def _one(
    file: str,
    document: Document,
    prefix: Path,
    value: Any,
    default_namespace: str,
    objects: list[Object],
    mistakes: list[Mistake],
    ignored: dict[str, list[str]],
    skipped: dict[str, list[str]],
) -> None:
    def wrong(path: Path, message: str, fix: str) -> None:
        mistakes.append(Mistake(file, document.line((*prefix, *path)), message, fix))

    if not isinstance(value, dict):
        return wrong(
            (), "this is not a Kubernetes object", "an object begins with `apiVersion:`, `kind:` and `metadata:`"
        )
    kind, version = value.get("kind"), value.get("apiVersion")
    if not isinstance(kind, str) or not isinstance(version, str):
        missing = [k for k in ("apiVersion", "kind") if not isinstance(value.get(k), str)]
        return wrong(
            (),
            f"{' and '.join(missing)} missing or not text",
            "an object begins with `apiVersion:`, `kind:` and `metadata:`",
        )
    meta = value.get("metadata")
    name = meta.get("name", "?") if isinstance(meta, dict) else "?"
    if kind in NOT_WORKLOADS_HERE:
        return wrong(
            ("kind",), f"{kind.lower()}/{name}: a {kind} is not played on one machine", NOT_WORKLOADS_HERE[kind]
        )
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.75)
        if near:
            return wrong(("kind",), f"unknown kind {kind}", f"write {near[0]}")
        skipped.setdefault(kind, []).append(f"{kind.lower()}/{name}")
        return None
    want, table = KINDS[kind]
    if version != want:
        wrong(("apiVersion",), f"{kind.lower()}/{name}: a {kind} of {version}", f"write apiVersion: {want}")
    before = len(mistakes)
    for found in walk(table, value):
        if isinstance(found, Wrong):
            wrong(found.path, f"{kind.lower()}/{name}: {found.message}", found.fix)
        else:
            where = ignored.setdefault(found[1], [])
            if (label := f"{kind.lower()}/{name}") not in where:
                where.append(label)
    if len(mistakes) > before or not isinstance(meta, dict):
        return None
    namespace = "" if kind == "Namespace" else meta.get("namespace") or default_namespace
    doc = dict(value)
    doc["metadata"] = {**meta, **({"namespace": namespace} if namespace else {})}
    objects.append(Object(kind, namespace, str(name), doc, file, document, prefix))
    return None


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
