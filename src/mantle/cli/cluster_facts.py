"""Reads from a cluster what `install`, `upgrade` and `uninstall` must know of it. A few GETs; changes nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from mantle.cli.kube_client import KubeClient, Refused
from mantle.cli.output import Failure
from mantle.manifests.config import CONFIG_MAP
from mantle.manifests.facts import Facts, parse_version
from mantle.manifests.render import ISSUER, TRUST_ROOTS
from mantle.manifests.trust import ROOTS_KEY, Existing

CONTROL_PLANES = {"labelSelector": "mantle.dev/is-control-plane=true"}


def read_facts(client: KubeClient, namespace: str) -> Facts:
    """The cluster as it is now; `namespace` is the control plane's. Raises `Failure`."""
    core = f"/api/v1/namespaces/{namespace}"
    roots = get(client, f"{core}/configmaps/{TRUST_ROOTS}")
    issuer = get(client, f"{core}/secrets/{ISSUER}")
    config = get(client, f"{core}/configmaps/{CONFIG_MAP}")
    deployments = get(client, f"/apis/apps/v1/namespaces/{namespace}/deployments") or {}
    api = get(client, "/api/v1/namespaces/default/services/kubernetes") or {}
    return Facts(
        version=parse_version(get(client, "/version") or {}),
        control_namespaces=control_namespaces(client),
        namespace_labels=((get(client, core) or {}).get("metadata") or {}).get("labels") or {},
        deployments=tuple(item["metadata"]["name"] for item in deployments.get("items", [])),
        config=None if config is None else config.get("data") or {},
        trust=Existing(
            None if roots is None else (roots.get("data") or {}).get(ROOTS_KEY, ""),
            None if issuer is None else _decoded(issuer),
        ),
        ip_family=(api.get("spec") or {}).get("ipFamilies", ["IPv4"])[0],
    )


def control_namespaces(client: KubeClient) -> tuple[str, ...]:
    """The namespaces that hold a control plane of ours."""
    found = get(client, "/api/v1/namespaces", CONTROL_PLANES) or {}
    return tuple(item["metadata"]["name"] for item in found.get("items", []))


def get(client: KubeClient, path: str, query: Mapping[str, str] | None = None) -> Any:
    """The object or list, or None where there is none. What may not be read is a `Failure`."""
    try:
        return client.get(path, query)
    except Refused as refused:
        answer = refused.answer
        if answer.status == 404:
            return None
        access = client.access
        raise Failure(
            f"{access.server} (context {access.context!r}) refuses to show {path}: {answer.message}",
            "use the rights of a cluster administrator, or give --offline to print without asking",
        ) from refused


def _decoded(secret: Mapping[str, Any]) -> dict[str, bytes]:
    return {key: base64.b64decode(value) for key, value in (secret.get("data") or {}).items()}
