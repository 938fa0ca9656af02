"""A Helm chart made from the manifests: what `install_objects` renders, with expressions where a chart's user decides.

What a chart can change is what stands verbatim in the objects: namespace, registry, version, domains and the trust.
Everything else is decided when the chart is made, with the flags of `mantle install`; the chart's schema refuses the
rest, so that no value is taken and ignored. Pure: values in, files' texts out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mantle import __version__
from mantle.manifests.config import BY_PATH, InstallValues, put
from mantle.manifests.facts import ADMISSION_POLICIES, LEAST_MINOR
from mantle.manifests.render import TrustMaterial, install_objects, yaml_text


@dataclass(frozen=True, slots=True)
class Hole:
    """A value that the chart's user gives. `mark` stands for it while rendering; it is accepted where the value is."""

    path: str
    """In the chart's values; empty for the release's namespace."""
    field: str
    """The field of `InstallValues` it fills; empty for trust."""
    mark: str
    help: str

    @property
    def expression(self) -> str:
        return f".Values.{self.path}" if self.path else ".Release.Namespace"


HOLES: tuple[Hole, ...] = (
    Hole("", "control_namespace", "mark-namespace", ""),
    *(
        Hole(path, BY_PATH[path].field, mark, BY_PATH[path].help)
        for path, mark in (
            ("trustDomain", "mark-trust-domain.invalid"),
            ("clusterDomain", "mark-cluster-domain.invalid"),
            ("registry", "mark-registry.invalid"),
            ("version", "mark-version"),
        )
    ),
    Hole("identity.trustAnchorsPEM", "", "mark-trust-anchors", "trust roots (PEM); required"),
    Hole("identity.issuer.crtPEM", "", "mark-issuer-certificate", "the issuer's certificate (PEM); required"),
    Hole("identity.issuer.keyPEM", "", "mark-issuer-key", "the issuer's private key (PEM, P-256); required"),
)
_MARKS: Mapping[str, Hole] = {hole.mark: hole for hole in HOLES}
_ROOTS = _MARKS["mark-trust-anchors"]
_REGISTRY = _MARKS["mark-registry.invalid"]
NAMESPACE = "installNamespace"


def chart(values: InstallValues) -> dict[str, str]:
    """The chart's files by their path in it. `values`: what is decided now; its trust is the chart's user's."""
    marks: dict[str, Any] = {hole.field: hole.mark for hole in HOLES if hole.field}
    marked = replace(values, **marks)
    trust = TrustMaterial("mark-trust-anchors", "mark-issuer-certificate", "mark-issuer-key")
    if values.external_issuer:
        trust = TrustMaterial("mark-trust-anchors")
    namespace, *objects = install_objects(marked, trust)
    return {
        "Chart.yaml": yaml_text([_CHART | {"kubeVersion": f">=1.{_least_minor(values)}.0-0"}]),
        "values.yaml": _values_file(values),
        "values.schema.json": json.dumps(_schema(values), indent=2) + "\n",
        "templates/namespace.yaml": f"{{{{ if .Values.{NAMESPACE} }}}}\n{_template([namespace])}{{{{ end }}}}\n",
        "templates/mantle.yaml": _template(objects),
    }


_CHART: dict[str, Any] = {
    "apiVersion": "v2",
    "name": "mantle",
    "description": "Automatic mutual TLS between workloads",
    "type": "application",
    "version": __version__,
    "appVersion": __version__,
}


def _least_minor(values: InstallValues) -> int:
    return ADMISSION_POLICIES[1] if values.tls == "optional" else LEAST_MINOR


def _template(objects: list[dict[str, Any]]) -> str:
    """The objects with an expression for each mark."""
    text = yaml_text(objects)
    if "{{" in text:  # nothing of ours has them; a value could
        raise ValueError("a value holds {{, which Helm would take for an expression")
    digest = hashlib.sha256(_ROOTS.mark.encode()).hexdigest()
    text = text.replace(digest, f"{{{{ {_ROOTS.expression} | sha256sum }}}}")
    # A registry stands before a slash, or not at all.
    text = text.replace(f"{_REGISTRY.mark}/", f"{{{{ with {_REGISTRY.expression} }}}}{{{{ . }}}}/{{{{ end }}}}")
    for mark, hole in _MARKS.items():
        whole = f'required "give {hole.path}" {hole.expression}' if hole.path and not hole.field else hole.expression
        text = re.sub(rf"(?m)(: |^- |^ +- ){re.escape(mark)}$", rf"\1{{{{ {_escaped(whole)} | quote }}}}", text)
        text = text.replace(mark, f"{{{{ {hole.expression} }}}}")
    return text


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\")


def _values_file(values: InstallValues) -> str:
    """values.yaml, with what each value is for."""
    lines = [
        "# What this chart can change. Everything else was decided when it was made: `mantle install --helm-chart DIR`",
        "# takes the flags of `mantle install`.",
        f"# {NAMESPACE}: render the Namespace, too (not together with --create-namespace)",
        f"{NAMESPACE}: false",
    ]
    nested: dict[str, Any] = {}
    for hole in _holes(values):
        put(nested, hole.path, getattr(values, hole.field) if hole.field else "")
        lines.append(f"# {hole.path}: {hole.help}")
    return "\n".join(lines) + "\n" + yaml_text([nested])


def _schema(values: InstallValues) -> dict[str, Any]:
    """The JSON schema of the values: these and no others."""
    schema: dict[str, Any] = {"$schema": "http://json-schema.org/draft-07/schema#", **_section()}
    schema["properties"][NAMESPACE] = {"type": "boolean"}
    schema["properties"]["global"] = {"type": "object"}  # Helm adds it
    for hole in _holes(values):
        *sections, last = hole.path.split(".")
        here = schema
        for section in sections:
            here = here["properties"].setdefault(section, _section())
        verbatim = {"pattern": "^[A-Za-z0-9._:/-]*$"} if hole.field else {}
        here["properties"][last] = {"type": "string", "description": hole.help, **verbatim}
    return schema


def _section() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _holes(values: InstallValues) -> list[Hole]:
    return [h for h in HOLES if h.path and not (values.external_issuer and h.path.startswith("identity.issuer."))]
