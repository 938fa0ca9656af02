"""The chart renders to what `mantle install` prints, given the same values and trust; and takes no value it ignores."""

import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mantle.manifests.config import InstallValues, load
from mantle.manifests.helm import HOLES, chart
from mantle.manifests.render import Object, TrustMaterial, identify, install_objects

TRUST = TrustMaterial("ROOTS\n  of: two {lines}\n", "CERT\n", "KEY\n")
GIVEN = {
    "installNamespace": True,
    "identity": {"trustAnchorsPEM": TRUST.roots, "issuer": {"crtPEM": TRUST.issuer, "keyPEM": TRUST.issuer_key}},
}
VALUES = {
    "defaults": InstallValues(),
    "ha, experimental, a registry": load(
        {"ha": True, "tls": "optional", "registry": "r.example/x", "proxy": {"opaquePorts": "25,80"}}
    ),
    "an external issuer": InstallValues(external_issuer=True),
}


def expected(values: InstallValues) -> list[Object]:
    trust = replace(TRUST, issuer="", issuer_key="") if values.external_issuer else TRUST
    return sorted(install_objects(values, trust), key=identify)


def yaml(text: str) -> list[Object]:
    return [document for document in YAML(typ="safe", pure=True).load_all(text) if document]


def given(values: InstallValues) -> dict[str, object]:
    """What a user of the chart gives: the trust."""
    if not values.external_issuer:
        return GIVEN
    return {"installNamespace": True, "identity": {"trustAnchorsPEM": TRUST.roots}}


def rendered(files: dict[str, str], above: dict[str, object], namespace: str) -> list[Object]:
    """The templates with the few forms of expression that the chart has, each meaning what it means to Helm."""

    def value(path: str) -> str:
        if path == ".Release.Namespace":
            return namespace
        for source in (above, yaml(files["values.yaml"])[0]):
            found: object = source
            for step in path.removeprefix(".Values.").split("."):
                found = found.get(step) if isinstance(found, dict) else None
            if found is not None:
                return str(found)
        raise KeyError(path)

    def expression(match: re.Match[str]) -> str:
        word, path, function = match["required"], match["path"], match["function"]
        text = value(path)
        assert text or not word, f"required {path}"
        match function:
            case "quote":
                return json.dumps(text)
            case "sha256sum":
                return hashlib.sha256(text.encode()).hexdigest()
        return text

    text = "---\n".join(files[name] for name in ("templates/namespace.yaml", "templates/mantle.yaml"))
    text = re.sub(r"\{\{ if \.Values\.installNamespace \}\}(.*?)\{\{ end \}\}\n", r"\1", text, flags=re.S)
    text = re.sub(
        r"\{\{ with (\.[\w.]+) \}\}\{\{ \. \}\}/\{\{ end \}\}", lambda m: (v := value(m[1])) and v + "/", text
    )
    known = r"\{\{ (?P<required>required \"[\w .]+\" )?(?P<path>\.[\w.]+)( \| (?P<function>quote|sha256sum))? \}\}"
    text = re.sub(known, expression, text)
    assert "{{" not in text, "a form of expression that this test does not know"
    return sorted(yaml(text), key=identify)


@pytest.mark.parametrize("name", VALUES)
def test_the_chart_renders_to_what_install_prints(name):
    values = VALUES[name]
    assert rendered(chart(values), given(values), "mantle") == expected(values)


def test_what_the_chart_can_change_changes_everything_that_install_would_change():
    values = load({"trustDomain": "example.org", "clusterDomain": "my.local", "registry": "r:5/x", "version": "9.9"})
    above = {**GIVEN, "trustDomain": "example.org", "clusterDomain": "my.local", "registry": "r:5/x", "version": "9.9"}
    assert rendered(chart(InstallValues()), above, "mesh") == expected(replace(values, control_namespace="mesh"))


def test_the_schema_knows_every_value_and_no_other():
    files = chart(InstallValues())
    schema = json.loads(files["values.schema.json"])
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) - {"global"} == set(yaml(files["values.yaml"])[0])
    assert set(schema["properties"]["identity"]["properties"]["issuer"]["properties"]) == {"crtPEM", "keyPEM"}
    external = json.loads(chart(InstallValues(external_issuer=True))["values.schema.json"])
    assert set(external["properties"]["identity"]["properties"]) == {"trustAnchorsPEM"}


def test_no_mark_is_left_and_no_value_smuggles_an_expression_in():
    text = "".join(chart(InstallValues()).values())
    assert not [hole.mark for hole in HOLES if hole.mark in text]
    assert hashlib.sha256(b"mark-trust-anchors").hexdigest() not in text
    with pytest.raises(ValueError, match="would take for an expression"):
        chart(load({"proxy": {"logLevel": "{{ .Values.identity.issuer.keyPEM }}"}}))


@pytest.mark.may_skip("helm is no dependency of ours; the test above says the same with the forms it knows")
@pytest.mark.parametrize("name", VALUES)
def test_helm_itself_renders_it_the_same(name, tmp_path: Path):
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("no helm on PATH")
    values = VALUES[name]
    for path, text in chart(values).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "given.json").write_text(json.dumps(given(values)))
    command = [helm, "template", "m", str(tmp_path), "-n", "mantle", "--kube-version", "1.33"]
    command += ["-f", str(tmp_path / "given.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(yaml(done.stdout), key=identify) == expected(values)
    unknown = subprocess.run([*command, "--set", "ha=true"], capture_output=True, text=True, timeout=60)
    assert unknown.returncode != 0 and "ha" in unknown.stderr
    without = subprocess.run(command[:-2], capture_output=True, text=True, timeout=60)
    assert "give identity.trustAnchorsPEM" in without.stderr
