"""What `mantle inject --manual` renders with: the settings and roots of a mesh, or what the user says of one.

A cluster keeps both in ConfigMaps, which the webhook reads as well; a mesh of this machine keeps its roots in a file.
With `--trust-anchors` nobody is asked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mantle import __version__
from mantle.cli.main import Globals
from mantle.cli.output import Failure
from mantle.core.proxy_env import Values

_WITHOUT = "or ask nobody: --trust-anchors FILE with the mesh's roots"


@dataclass(frozen=True, slots=True)
class Given:
    """The flags that matter. None: not given."""

    ignore_cluster: bool = False
    trust_anchors: str | None = None
    networks: str | None = None
    control_namespace: str | None = None
    trust_domain: str | None = None
    tls: str | None = None


def manual_values(flags: Globals, given: Given, *, quiet: bool) -> Values:
    """Raises `Failure` with what is missing. `quiet`: do not say on standard error which mesh was asked."""
    alone = given.trust_anchors is not None or given.ignore_cluster
    values = _said(given) if alone else _asked(flags, given, quiet)
    return replace(values, tls=given.tls) if given.tls else values


def _said(given: Given) -> Values:
    if given.trust_anchors is None:
        raise Failure(
            "with --ignore-cluster nothing says which roots the mesh trusts",
            "give them with --trust-anchors FILE: kubectl -n mantle get configmap mantle-identity-trust-roots "
            "-o go-template='{{index .data \"ca-bundle.crt\"}}'",
        )
    try:
        anchors = Path(given.trust_anchors).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"cannot read the trust anchors: {error}", "name a PEM file with --trust-anchors") from error
    fields = {
        "controlNamespace": given.control_namespace,
        "trustDomain": given.trust_domain,
        "networks": given.networks,
    }
    return _rendered({name: text for name, text in fields.items() if text is not None}, anchors, "the flags")


def _asked(flags: Globals, given: Given, quiet: bool) -> Values:
    from mantle.cli.target import Cluster, target

    try:
        found = target(flags, json=quiet)
        if isinstance(found, Cluster):
            return _of_cluster(found, given)
        file = found.client.root / found.client.mesh / "trust-roots.pem"
        # Pods that `mantle up` runs are made anew with its own settings: only the roots must be the right ones.
        return _rendered({}, file.read_text(encoding="ascii"), str(found))
    except Failure as failure:
        raise Failure(
            f"--manual renders with a mesh's own settings and roots, and {failure.problems[0].message}",
            f"{failure.problems[0].fix or 'choose a mesh with --context or --mesh'}; {_WITHOUT}",
        ) from failure
    except OSError as error:
        raise Failure(f"cannot read the roots of {found}: {error}", _WITHOUT) from error


def _of_cluster(found: Any, given: Given) -> Values:
    from mantle.cli.cluster_facts import control_namespaces, get
    from mantle.manifests.config import CONFIG_MAP, VALUES_KEY
    from mantle.manifests.render import TRUST_ROOTS
    from mantle.manifests.trust import ROOTS_KEY

    namespace = given.control_namespace or next(iter(control_namespaces(found.client)), "mantle")
    maps = {name: get(found.client, f"/api/v1/namespaces/{namespace}/configmaps/{name}") or {}
            for name in (CONFIG_MAP, TRUST_ROOTS)}  # fmt: skip
    settings, roots = ((maps[name].get("data") or {}) for name in (CONFIG_MAP, TRUST_ROOTS))
    missing = [f"no ConfigMap {name}" for name, key in ((CONFIG_MAP, VALUES_KEY), (TRUST_ROOTS, ROOTS_KEY))
               if key not in (maps[name].get("data") or {})]  # fmt: skip
    if missing:
        raise Failure(
            f"{found} has {' and '.join(missing)} in namespace {namespace}",
            "install the mesh (`mantle install | kubectl apply -f -`), or name its namespace with --control-namespace",
        )
    try:
        stored = json.loads(settings[VALUES_KEY])
    except ValueError as error:
        raise Failure(f"ConfigMap {CONFIG_MAP} of {found} is not readable: {error}", "run `mantle upgrade`") from error
    return _rendered(stored, roots[ROOTS_KEY], f"ConfigMap {CONFIG_MAP}")


def _rendered(mapping: dict[str, Any], anchors: str, whose: str) -> Values:
    from mantle.manifests.config import BadValues, injection_values, load

    try:
        return injection_values(load(mapping), anchors, f"mantle/cli {__version__}")
    except BadValues as bad:
        raise Failure(f"{whose} cannot be used: {bad}", "correct it") from bad
