"""Objects beside each other: names that are taken, selectors that select nothing, references that lead nowhere.

Pure: everything that is wrong between objects that passed the table of their kind (`manifest.read`), each with its
line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mantle.platform.machine.manifest import (
    Object,
    ObjectId,
    Template,
    containers,
    references,
    selects,
    service_account,
    template,
)
from mantle.platform.machine.schema import LABEL, SERVICE_LABEL, spell
from mantle.platform.machine.yamlpos import Mistake, Path


def check(
    new: Iterable[Object],
    present: Mapping[ObjectId, Object],
    reserved: frozenset[str] = frozenset(),
    partial: bool = False,
    unread: Iterable[Object] = (),
) -> list[Mistake]:
    """What does not fit together. `present`: objects that stay beside the new ones. `reserved`: namespaces that are
    not the user's.

    `partial`: some objects of the files could not be read, so nothing is said about missing ones. `unread`: those of
    them whose names are known.
    """
    new = list(new)
    seen: dict[ObjectId, Object] = {}
    found: list[Mistake] = []
    for item in [*new, *unread]:
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
