"""The control plane's own objects on one machine: the shipped manifests with this mesh's values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mantle import __version__
from mantle.manifests.render import ControlPlane, control_plane
from mantle.platform.machine.applying import CONTROL_FILE
from mantle.platform.machine.manifest import Object
from mantle.platform.machine.state import MeshConfig

if TYPE_CHECKING:
    from mantle.platform.machine.trust import MeshTrust


def control_objects(config: MeshConfig, secrets: MeshTrust, control_directory: str) -> tuple[Object, ...]:
    """Identity, destination and viz as objects. `control_directory`: where their pods see the platform's socket."""
    values = ControlPlane(
        version=__version__,
        trust_roots=secrets.roots,
        issuer_certificate=secrets.issuer,
        issuer_key=secrets.issuer_key,
        networks=config.networks,
        platform=f"unix:{control_directory}/platform.sock",
        issuance_lifetime=config.issuance_lifetime,
    )
    objects = []
    for doc in control_plane(values):
        meta = doc["metadata"]
        objects.append(Object(doc["kind"], meta.get("namespace", ""), meta["name"], doc, CONTROL_FILE))
    return tuple(objects)
