"""The experimental mode `tls: optional` in one pod: a meshed pod in, the same pod with its owner's Secret mounted out.

Applied to what `inject.py` has made, so that the default way knows nothing of it. The proxy reads key and certificate
from files, needs no token, and its identity is its owner's. See `optional_tls.py` for the design. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from mantle.core.annotations import LABEL_COMPONENT, PREFIX, Mistake
from mantle.core.names import BadName, MeshNames
from mantle.core.optional_names import LABEL_TLS, MIGRATION, OPTIONAL, OWNER, OptionalNames, Owner

VOLUME = "mantle-tls-optional"
DIRECTORY = "/var/run/secrets/mantle.dev/tls-optional"
MIGRATION_VOLUME = "mantle-tls-migration"
MIGRATION_DIRECTORY = "/var/run/mantle/tls-migration"
MIGRATION_CONFIG = "mantle-tls-migration"
"""ConfigMap that `mantle migrate-tls` keeps beside the pods while it runs: `ca.crt`, `identities`."""
VOLUMES = (VOLUME, MIGRATION_VOLUME)
SETTING = f"{PREFIX}tls"

Object = dict[str, Any]


def owner_for(
    pod: Mapping[str, Any], namespace: str, owner: tuple[str, str] | None, names: OptionalNames
) -> Owner | Mistake:
    """Whose Secret the pod mounts: its workload's, or its own if it has none."""
    metadata = pod.get("metadata") or {}
    kind, name = owner if owner else ("pod", metadata.get("name") or "")
    if not name:
        return Mistake(SETTING, OPTIONAL, "a pod with a name or a controller: this one's name is not known beforehand")
    found = Owner(namespace, kind.lower(), name)
    # A template may stand in a file that names no namespace: the rest of the name can be checked all the same.
    checked = names.identity(Owner(namespace or "default", found.kind, name))
    if isinstance(checked, BadName):
        return Mistake(SETTING, OPTIONAL, f"{checked.wanted} (found {checked.found!r})")
    return found


def make_optional(pod: Object, owner: Owner, names: OptionalNames, proxy: str, token_volume: str) -> None:
    """Changes a meshed pod in place. `proxy`: the sidecar's name; `token_volume`: what this mode does without."""
    metadata, spec = pod["metadata"], pod["spec"]
    metadata["labels"][LABEL_TLS] = OPTIONAL
    metadata["annotations"][OWNER] = f"{owner.kind}/{owner.name}"
    sidecar = next(c for key in ("initContainers", "containers") for c in spec.get(key) or [] if c["name"] == proxy)
    for entry in sidecar["env"]:
        if entry["name"].endswith("_PROXY_IDENTITY_LOCAL_NAME"):
            entry["value"] = f"{owner.name}.{owner.kind}.$(_pod_ns){names.suffix}"
        if entry["name"].endswith("_PROXY_TAP_SVC_NAME"):
            entry["value"] = str(names.identity(names.observer))
    sidecar["env"] = [e for e in sidecar["env"] if not e["name"].endswith("_PROXY_IDENTITY_TOKEN_FILE")]
    sidecar["env"] += [
        {"name": "MANTLE_PROXY_IDENTITY_FILES", "value": DIRECTORY},
        {"name": "MANTLE_PROXY_IDENTITY_FILES_SUFFIX", "value": names.suffix},
    ]
    mounts = [mount for mount in sidecar["volumeMounts"] if mount["name"] != token_volume]
    sidecar["volumeMounts"] = [*mounts, {"name": VOLUME, "mountPath": DIRECTORY, "readOnly": True}]
    # Root writes the files and the proxy is another user: 0444, in a volume that no other container mounts.
    secret = {"secretName": owner.secret, "optional": True, "defaultMode": 0o444}
    volumes = [volume for volume in spec["volumes"] if volume["name"] != token_volume]
    spec["volumes"] = [*volumes, {"name": VOLUME, "secret": secret}]


def accept_migration(pod: Object, names: OptionalNames, proxy: str) -> Mistake | None:
    """A default pod that `mantle migrate-tls` moves: it accepts the identities being migrated, until the deadline."""
    stated = pod["metadata"]["annotations"].get(MIGRATION)
    if stated is None:
        return None
    parts = dict(part.partition(":")[::2] for part in stated.split())
    if set(parts) != {"sha256", "until"} or len(parts["sha256"]) != 64:
        return Mistake(MIGRATION, stated, "what `mantle migrate-tls` writes: sha256:<hex> until:<time>")
    spec = pod["spec"]
    sidecar = next(c for key in ("initContainers", "containers") for c in spec.get(key) or [] if c["name"] == proxy)
    try:
        until = int(datetime.fromisoformat(parts["until"]).timestamp())
    except ValueError:
        return Mistake(MIGRATION, stated, "a time after until:, such as 2026-11-24T09:00:00Z")
    sidecar["env"] += [
        {"name": "MANTLE_PROXY_IDENTITY_MIGRATION", "value": MIGRATION_DIRECTORY},
        {"name": "MANTLE_PROXY_IDENTITY_MIGRATION_ROOTS", "value": parts["sha256"]},
        {"name": "MANTLE_PROXY_IDENTITY_MIGRATION_UNTIL", "value": str(until)},
        {"name": "MANTLE_PROXY_IDENTITY_FILES_SUFFIX", "value": names.suffix},
    ]
    sidecar["volumeMounts"] += [{"name": MIGRATION_VOLUME, "mountPath": MIGRATION_DIRECTORY, "readOnly": True}]
    spec["volumes"] += [{"name": MIGRATION_VOLUME, "configMap": {"name": MIGRATION_CONFIG, "optional": True}}]
    return None


def tls_mistakes(pod: Mapping[str, Any], installed: str) -> tuple[Mistake, ...]:
    """Why a pod cannot be of this mode. `installed`: what `mantle install --tls` was told."""
    mistakes = []
    if installed != OPTIONAL:
        mistakes.append(
            Mistake(SETTING, OPTIONAL, "required: this mesh has no ca (`mantle install --tls=optional` adds one)")
        )
    if LABEL_COMPONENT in ((pod.get("metadata") or {}).get("labels") or {}):
        mistakes.append(Mistake(SETTING, OPTIONAL, "required: the control plane is always of the default mode"))
    return tuple(mistakes)


def names_of(control_namespace: str, trust_domain: str) -> OptionalNames:
    """The names of this mode in a mesh whose two parts are known to be right."""
    return OptionalNames(MeshNames(control_namespace, trust_domain))
