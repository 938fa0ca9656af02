"""The chart renders to what `mantle install` prints, given the same values and trust; and takes no value it ignores.

Here with the few forms of expression that the chart has; with Helm itself in tests/cluster/test_helm.py.
"""

import hashlib
import json
import re
from dataclasses import replace

import pytest
from chart_play import GIVEN, VALUES, expected, given, yaml

from mantle.manifests.config import InstallValues, load
from mantle.manifests.helm import HOLES, chart
from mantle.manifests.render import Object, identify


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
