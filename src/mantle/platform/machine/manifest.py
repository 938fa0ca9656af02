"""Kubernetes YAML -> objects that a machine can play, or everything that is wrong with it at once.

For: `read` takes one file apart (syntax, fields, types); `check` compares objects with each other (names, selectors,
references). Pure: text in, values out. Must not know what a pod becomes (`plan.py`) or what an image is (`images.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mantle.platform.machine.kinds import KINDS, NOT_WORKLOADS_HERE
from mantle.platform.machine.schema import LABEL, SERVICE_LABEL, Wrong, spell, walk
from mantle.platform.machine.yamlpos import Document, Mistake, Path
from mantle.platform.machine.yamlpos import read as read_yaml

ObjectId = tuple[str, str, str]
"""(kind, namespace, name); the namespace of a Namespace is empty."""

WORKLOADS = ("Deployment", "Pod", "Job")


@dataclass(frozen=True, slots=True)
class Object:
    """One object that passed the table of its kind. `doc` is the manifest as Kubernetes would see it, namespace filled in."""

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
    """The pod inside a workload. `path` leads to it; the metadata is under `path + metadata`, the spec under `path + spec`."""

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


# ---- objects beside each other ----


def check(
    new: Iterable[Object],
    present: Mapping[ObjectId, Object],
    reserved: frozenset[str] = frozenset(),
    partial: bool = False,
) -> list[Mistake]:
    """What does not fit together. `present`: objects that stay beside the new ones. `reserved`: namespaces that are not the user's.

    `partial`: some objects of the files could not be read, so nothing is said about missing ones.
    """
    new = list(new)
    seen: dict[ObjectId, Object] = {}
    found: list[Mistake] = []
    for item in new:
        if first := seen.get(item.id):
            line = first.document.line(first.prefix) if first.document else 0
            found.append(
                item.wrong(
                    ("metadata", "name"),
                    f"the name is taken by another {item.kind} ({first.file}:{line})",
                    "rename one of them",
                )
            )
        seen.setdefault(item.id, item)
        if (item.name if item.kind == "Namespace" else item.namespace) in reserved:
            found.append(
                item.wrong(
                    ("metadata", "namespace"), "this namespace belongs to Mantle itself", "use another namespace"
                )
            )
    world = {**present, **seen}
    for item in new:
        if item.kind == "Namespace" and not LABEL.match(item.name):
            found.append(
                item.wrong(
                    ("metadata", "name"),
                    f"{item.name!r} is not the name of a namespace",
                    "use small letters, digits and `-`",
                )
            )
        if item.kind == "Service":
            found += _check_service(item, world, partial)
        pod = template(item)
        if pod is not None:
            found += _check_workload(item, pod)
            found += _check_pod(item, pod)
            found += () if partial else _check_references(item, pod, world)
    order = {file: index for index, file in enumerate(dict.fromkeys(o.file for o in new))}
    return sorted(found, key=lambda m: (order.get(m.file, 0), m.line))


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


def _check_service(item: Object, world: Mapping[ObjectId, Object], partial: bool) -> Iterator[Mistake]:
    spec = item.doc["spec"]
    if not SERVICE_LABEL.match(item.name):
        yield item.wrong(
            ("metadata", "name"),
            f"{item.name!r} is not the name of a Service",
            "begin with a letter; small letters, digits and `-`",
        )
    ports = spec.get("ports") or []
    if not ports:
        yield item.wrong(("spec", "ports"), "a Service needs a port", "add `ports: [{port: 80}]`")
    names: set[str] = set()
    numbers: set[tuple[int, str]] = set()
    for index, port in enumerate(ports):
        path: Path = ("spec", "ports", index)
        if len(ports) > 1 and not port.get("name"):
            yield item.wrong(path, "several ports, and this one has no name", "add `name:`")
        if port.get("name") in names:
            yield item.wrong((*path, "name"), f"the port name {port['name']!r} is used twice", "rename one of them")
        if (pair := (port["port"], port.get("protocol", "TCP"))) in numbers:
            yield item.wrong((*path, "port"), f"the port {pair[0]}/{pair[1]} is listed twice", "remove one of them")
        names.add(port.get("name", ""))
        numbers.add(pair)
    selector = spec.get("selector") or {}
    if not selector:
        yield item.wrong(
            ("spec",),
            "a Service without a selector reaches nothing here",
            "add `selector:` with the labels of the pods",
        )
        return
    if partial:
        return
    neighbours = [(o, t) for o in world.values() if o.namespace == item.namespace and (t := template(o)) is not None]
    chosen = [(o, t) for o, t in neighbours if selects(selector, t.labels)]
    if not chosen:
        near = _nearest(selector, neighbours)
        shown = ", ".join(f"{k}={v}" for k, v in selector.items())
        yield item.wrong(
            ("spec", "selector"),
            f"it selects nothing: no pod in namespace {item.namespace} has the labels {shown}",
            near,
        )
        return
    for index, port in enumerate(ports):
        target = port.get("targetPort")
        if isinstance(target, str):
            known = {p.get("name") for _, t in chosen for _, c, _ in containers(t) for p in c.get("ports") or []}
            if target not in known:
                near_names = ", ".join(sorted(n for n in known if n)) or "none"
                yield item.wrong(
                    ("spec", "ports", index, "targetPort"),
                    f"no container of {chosen[0][0]} has a port named {target!r}",
                    f"names there: {near_names}",
                )


def _nearest(selector: Mapping[str, str], neighbours: list[tuple[Object, Template]]) -> str:
    best, shown = -1.0, ""
    for item, pod in neighbours:
        score = sum(
            difflib.SequenceMatcher(None, value, pod.labels.get(key, "")).ratio() for key, value in selector.items()
        )
        if score > best:
            best, shown = (
                score,
                f"{item} has the labels " + (", ".join(f"{k}={v}" for k, v in pod.labels.items()) or "none at all"),
            )
    return shown or "no pod is in this namespace: check `metadata.namespace`"


def _check_workload(item: Object, pod: Template) -> Iterator[Mistake]:
    policy = pod.spec.get("restartPolicy", "Always")
    if item.kind == "Deployment":
        labels = (item.doc["spec"].get("selector") or {}).get("matchLabels") or {}
        if not labels:
            yield item.wrong(
                ("spec", "selector"), "the selector is empty", "add `matchLabels:` with labels of the template"
            )
        elif not selects(labels, pod.labels):
            missing = ", ".join(f"{k}: {v}" for k, v in labels.items() if pod.labels.get(k) != v)
            yield item.wrong(
                ("spec", "selector", "matchLabels"),
                "the selector does not match the template's own labels",
                f"add {missing} under spec.template.metadata.labels",
            )
        if policy != "Always":
            yield item.wrong(
                (*pod.path, "spec", "restartPolicy"),
                f"a Deployment's pods restart always, found {policy}",
                "remove it, or write a Job",
            )
    if item.kind == "Job" and policy == "Always":
        yield item.wrong(
            (*pod.path, "spec"), "a Job needs restartPolicy OnFailure or Never", "add `restartPolicy: Never`"
        )


def _check_pod(item: Object, pod: Template) -> Iterator[Mistake]:
    if not pod.spec.get("containers"):
        yield item.wrong((*pod.path, "spec", "containers"), "no container", "add one")
    volumes: set[str] = set()
    for index, volume in enumerate(pod.spec.get("volumes") or []):
        if volume["name"] in volumes:
            yield item.wrong(
                (*pod.path, "spec", "volumes", index),
                f"the volume name {volume['name']!r} is used twice",
                "rename one of them",
            )
        volumes.add(volume["name"])
    names: set[str] = set()
    taken: dict[tuple[int, str], str] = {}
    for path, box, init in containers(pod):
        if box["name"] in names:
            yield item.wrong((*path, "name"), f"the container name {box['name']!r} is used twice", "rename one of them")
        names.add(box["name"])
        stays = not init or box.get("restartPolicy") == "Always"
        if not init and box.get("restartPolicy"):
            yield item.wrong(
                (*path, "restartPolicy"),
                "only an init container has a restartPolicy of its own",
                "set it under the pod's spec",
            )
        for index, port in enumerate(box.get("ports") or []):
            pair = (port["containerPort"], port.get("protocol", "TCP"))
            if stays and pair in taken:
                yield item.wrong(
                    (*path, "ports", index),
                    f"port {pair[0]} is in use inside the pod: container {taken[pair]!r} has it",
                    "give one of them another port",
                )
            if stays:
                taken.setdefault(pair, box["name"])
        yield from _check_container(item, path, box, init and not stays, volumes)


def _check_container(
    item: Object, path: Path, box: dict[str, Any], runs_once: bool, volumes: set[str]
) -> Iterator[Mistake]:
    env: set[str] = set()
    for index, variable in enumerate(box.get("env") or []):
        if variable["name"] in env:
            yield item.wrong(
                (*path, "env", index), f"the variable {variable['name']} is set twice", "remove one of them"
            )
        if "value" in variable and "valueFrom" in variable:
            yield item.wrong(
                (*path, "env", index), f"the variable {variable['name']} has a value and a valueFrom", "keep one"
            )
        env.add(variable["name"])
    targets: set[str] = set()
    for index, mount in enumerate(box.get("volumeMounts") or []):
        if mount["name"] not in volumes:
            near = difflib.get_close_matches(mount["name"], volumes, n=1, cutoff=0.5)
            fix = f"write {near[0]}" if near else "add it under the pod's volumes"
            yield item.wrong((*path, "volumeMounts", index, "name"), f"no volume is named {mount['name']!r}", fix)
        if (target := mount["mountPath"].rstrip("/")) in targets:
            yield item.wrong(
                (*path, "volumeMounts", index, "mountPath"), f"{target} is mounted twice", "use another path"
            )
        targets.add(target)
    ports = {p.get("name") for p in box.get("ports") or []}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if not (value := box.get(probe)):
            continue
        if runs_once:
            yield item.wrong((*path, probe), "an init container that runs once has no probes", "remove it")
        action = value.get("httpGet") or value.get("tcpSocket")
        if action and isinstance(action["port"], str) and action["port"] not in ports:
            yield item.wrong(
                (*path, probe),
                f"{probe} asks for a port named {action['port']!r}, which this container does not have",
                "name it under `ports:`, or write the number",
            )
        if probe != "readinessProbe" and value.get("successThreshold", 1) != 1:
            yield item.wrong((*path, probe, "successThreshold"), f"successThreshold of a {probe} is 1", "remove it")


def _check_references(item: Object, pod: Template, world: Mapping[ObjectId, Object]) -> Iterator[Mistake]:
    account = service_account(pod)
    if account != "default" and ("ServiceAccount", item.namespace, account) not in world:
        lines = f"kind: ServiceAccount, metadata: {{name: {account}, namespace: {item.namespace}}}"
        yield item.wrong(
            (*pod.path, "spec", "serviceAccountName"),
            f"no ServiceAccount {account} in namespace {item.namespace}",
            f"add one: {{apiVersion: v1, {lines}}}",
        )
    for path, kind, name, key in references(pod):
        target = world.get((kind, item.namespace, name))
        if target is None:
            yield item.wrong(
                path, f"no {kind} {name} in namespace {item.namespace}", f"add it, or `optional: true` at {spell(path)}"
            )
        elif key and key not in {
            **(target.doc.get("data") or {}),
            **(target.doc.get("stringData") or {}),
            **(target.doc.get("binaryData") or {}),
        }:
            yield item.wrong(path, f"{kind} {name} has no key {key!r}", "add the key, or `optional: true`")


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
