"""Installations that plays of the Helm chart are given, and what `mantle install` prints for each."""

from dataclasses import replace

from ruamel.yaml import YAML

from mantle.manifests.config import InstallValues, load
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
