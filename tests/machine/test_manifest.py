"""Manifests: what is accepted, and that every mistake is reported at once with its line and its fix."""

from __future__ import annotations

import pytest

from mantle.platform.machine import manifest, together
from mantle.platform.machine.yamlpos import MAX_NODES

DEPLOYMENT = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
        - name: web
          image: acme/web:1
          ports: [{name: http, containerPort: 8080}]
"""
SERVICE = """\
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
"""


def said(text: str) -> list[str]:
    """`line: message | fix` of everything wrong with a file."""
    parsed = manifest.read("app.yml", text)
    wrong = [
        *parsed.mistakes,
        *together.check(parsed.objects, {}, frozenset({"mantle"}), partial=not parsed.complete, unread=parsed.unread),
    ]
    return [f"{m.line}: {m.message} | {m.fix}" for m in wrong]


def test_an_ordinary_application_has_no_mistakes() -> None:
    parsed = manifest.read("app.yml", DEPLOYMENT + SERVICE)
    assert not parsed.mistakes
    assert [str(o) for o in parsed.objects] == ["deployment/web", "service/web"]
    assert {o.namespace for o in parsed.objects} == {"default"}
    assert together.check(parsed.objects, {}) == []


def test_every_mistake_is_reported_at_once_with_its_line() -> None:
    text = DEPLOYMENT.replace("image:", "imgae:").replace("selector:", "replicas: two\n  selector:") + SERVICE.replace(
        "port: 80,", "prot: 80,"
    )
    lines = said(text)
    assert any(line.startswith("5: ") and "wanted a whole number" in line for line in lines)
    assert any(line.startswith("12: ") and "unknown field" in line and "write image" in line for line in lines)
    assert any("containers[0].image is missing" in line for line in lines)
    assert any("unknown field spec.ports[0].prot" in line and "write port" in line for line in lines)


def test_a_mistake_hides_no_other() -> None:
    """A wrong field is looked past, a document that is no YAML too; and nothing is guessed about what was not read."""
    lines = said(
        DEPLOYMENT.replace(
            "name: web\n          image", "nmae: x\n          name: web\n          imgae: y\n          image"
        )
    )
    assert [line.split(":")[0] for line in lines] == ["10", "12"]
    unknown = DEPLOYMENT.replace("          image:", "          commnd: [x]\n          image:")
    second = "        - {name: web, image: acme/x:1, ports: [{containerPort: 8080}]}\n"
    lines = said(unknown + second + SERVICE.replace("app: web", "app: wbe"))
    words = ["unknown field", "'web' is used twice", "port 8080 is in use inside the pod", "it selects nothing"]
    assert [word in line for word, line in zip(words, lines, strict=True)] == [True] * 4, lines
    lines = said(DEPLOYMENT + "---\na: [1\n---\nb: c: d\n" + SERVICE + SERVICE.replace("port: 80", "port: 80000"))
    words = ["15: this is not YAML", "16: this is not YAML", "80000 is not between", "the name is taken"]
    assert [word in line for word, line in zip(words, lines, strict=True)] == [True] * 4, lines
    labels = said(DEPLOYMENT.replace("labels: {app: web}", "labels: {app: 5}") + SERVICE)
    assert len(labels) == 1 and "quote it" in labels[0], labels


@pytest.mark.parametrize(
    ("change", "to", "line", "words"),
    [
        ("app: web}\n  ports: [{port: 80", "app: wbe}\n  ports: [{port: 80", 18, "it selects nothing"),
        ("targetPort: http", "targetPort: htpt", 19, "no container of deployment/web has a port named 'htpt'"),
        ("matchLabels: {app: web}", "matchLabels: {app: other}", 5, "does not match the template's own labels"),
        (
            "name: web\n          image",
            "name: web\n          volumeMounts: [{name: data, mountPath: /data}]\n          image",
            11,
            "no volume is named 'data'",
        ),
        ("    spec:\n", "    spec:\n      serviceAccountName: web\n", 9, "no ServiceAccount web in namespace default"),
        ("    spec:\n", "    spec:\n      hostNetwork: true\n", 9, "outside the mesh"),
        ("kind: Deployment", "kind: StatefulSet", 2, "a StatefulSet is not played"),
        ("kind: Deployment", "kind: Deploymnet", 2, "unknown kind Deploymnet"),
        ("apiVersion: apps/v1", "apiVersion: v1", 1, "write apiVersion: apps/v1"),
        (
            "metadata: {name: web}\nspec:\n  selector: {match",
            "metadata: {name: Web_1}\nspec:\n  selector: {match",
            3,
            "'Web_1' is not a Kubernetes name",
        ),
        (
            "metadata: {name: web}\nspec:\n  selector: {match",
            "metadata: {name: web, namespace: mantle}\nspec:\n  selector: {match",
            3,
            "belongs to Mantle itself",
        ),
    ],
)
def test_one_mistake(change: str, to: str, line: int, words: str) -> None:
    text = DEPLOYMENT + SERVICE
    assert change in text
    lines = said(text.replace(change, to, 1))
    assert any(entry.startswith(f"{line}: ") and words in entry for entry in lines), lines


def test_duplicate_names_and_a_port_in_use_inside_the_pod() -> None:
    second = "        - {name: web, image: acme/x:1, ports: [{containerPort: 8080}]}\n"
    lines = said(DEPLOYMENT + second + SERVICE + SERVICE)
    assert any("the container name 'web' is used twice" in line for line in lines)
    assert any("port 8080 is in use inside the pod" in line for line in lines)
    assert any("the name is taken by another Service (app.yml:15)" in line for line in lines)


def test_a_value_that_yaml_reads_as_something_else_says_to_quote_it() -> None:
    lines = said(DEPLOYMENT + "          env: [{name: DEBUG, value: yes}]\n")
    assert lines[0].startswith("13: ") and "quote it" in lines[0]


def test_lists_and_other_kinds() -> None:
    text = (
        "apiVersion: v1\n"
        "kind: List\n"
        "items:\n"
        "- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n"
        "- {apiVersion: x/v1, kind: Ingress, metadata: {name: i}}\n"
    )
    parsed = manifest.read("l.yml", text)
    assert [o.id for o in parsed.objects] == [("Namespace", "", "a")]
    assert parsed.notes == ("Ingress is not played on one machine: skipped (ingress/i)",)


def test_resource_limits_are_named_once() -> None:
    twice = DEPLOYMENT + "          resources: {limits: {cpu: 1}}\n"
    parsed = manifest.read("a.yml", twice + "---\n" + twice.replace("name: web}\nspec", "name: two}\nspec"))
    assert parsed.notes == ("resource limits are not enforced on one machine (deployment/web, deployment/two)",)


def bomb() -> str:
    rows = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for index in range(1, 12):
        name, before = chr(97 + index), chr(96 + index)
        rows.append(f"{name}: &{name} [{', '.join(['*' + before] * 9)}]")
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(), f"more than {MAX_NODES} values"),
        ("[" * 100_000, "nested deeper than"),
        ("x" * (3 << 20), "larger than"),
        ("a: b: c", "this is not YAML"),
        ("a:\n\t- b", "YAML does not allow tabs"),
        ("a: *nothing", "has no anchor"),
        ("? [a, b]\n: c", "used as a key"),
        ("a: 1\na: 2", "written twice (first on line 1)"),
        ("just text", "this is not a Kubernetes object"),
        ("", "no object in this file"),
        ("kind: Pod\napiVersion: v1\nmetadata: []\nspec: 7", "found a list, wanted a mapping"),
        ("\x00", "this is not YAML"),
    ],
)
def test_hostile_yaml_is_bounded_and_explained(text: str, words: str) -> None:
    assert any(words in line for line in said(text)), said(text)


def test_merge_keys_and_octal_modes_mean_what_they_mean_on_a_cluster() -> None:
    text = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: c}
data: {<<: {a: one}, b: two}
---
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  containers: [{name: c, image: i}]
  volumes: [{name: v, configMap: {name: c, defaultMode: 0644}}]
"""
    parsed = manifest.read("m.yml", text)
    assert not parsed.mistakes
    assert parsed.objects[0].doc["data"] == {"a": "one", "b": "two"}
    assert parsed.objects[1].doc["spec"]["volumes"][0]["configMap"]["defaultMode"] == 0o644
