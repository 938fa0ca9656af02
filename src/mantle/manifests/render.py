"""Fills `control-plane.yml`: values in, Kubernetes objects out.

Placeholders are replaced in parsed strings, never in YAML text, so no value can change the structure. The only I/O is
reading the packaged file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """What the control plane's manifests depend on. Certificates and key are PEM text, durations as `24h`, `20s`."""

    version: str
    trust_roots: str
    issuer_certificate: str
    issuer_key: str
    networks: tuple[str, ...]
    """The mesh's networks (CIDRs)."""
    platform: str
    """Where components reach the platform: `unix:/PATH` of `mantle.v1.Platform`, or `kubernetes`."""
    control_namespace: str = "mantle"
    trust_domain: str = "cluster.local"
    issuance_lifetime: str = "24h"
    clock_skew: str = "20s"


def control_plane(values: ControlPlane) -> list[dict[str, Any]]:
    """The objects of the control plane, in the order to create them. Pods are not injected yet: they ask for it."""
    from ruamel.yaml import YAML

    text = resources.files(__package__).joinpath("control-plane.yml").read_text(encoding="utf-8")
    placeholders = {
        "VERSION": values.version,
        "CONTROL_NAMESPACE": values.control_namespace,
        "TRUST_DOMAIN": values.trust_domain,
        "TRUST_ROOTS": values.trust_roots,
        "ISSUER_CERTIFICATE": values.issuer_certificate,
        "ISSUER_KEY": values.issuer_key,
        "NETWORKS": ",".join(values.networks),
        "PLATFORM": values.platform,
        "ISSUANCE_LIFETIME": values.issuance_lifetime,
        "CLOCK_SKEW": values.clock_skew,
    }
    return [_fill(document, placeholders) for document in YAML(typ="safe", pure=True).load_all(text)]


def _fill(node: Any, placeholders: Mapping[str, str]) -> Any:
    """The node with `${NAME}` replaced in every string; KeyError for a placeholder nobody fills."""
    if isinstance(node, dict):
        return {key: _fill(value, placeholders) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(item, placeholders) for item in node]
    return Template(node).substitute(placeholders) if isinstance(node, str) else node
