"""The secrets of a mesh on one machine: trust roots and issuer, and the key that signs tokens.

Made once, kept 0600 on the mesh's tmpfs. The trust anchor's own key is never written: it lives inside `ca.make_trust`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime

from joserfc.jwk import ECKey

from mantle.core.names import MeshNames
from mantle.platform.machine import tokens
from mantle.platform.machine.state import StateDir

CONTROL_UID = 2103
"""Who the control plane's programs run as (manifests/control-plane.yml)."""


@dataclass(frozen=True, slots=True)
class MeshTrust:
    """PEM text, and the key of the tokens."""

    roots: str
    issuer: str
    issuer_key: str
    token_key: ECKey


def ensure(store: StateDir, names: MeshNames, now: datetime) -> MeshTrust:
    """The secrets of this mesh, made if there are none. `now` is aware."""
    parts = [store.read(name) for name in ("trust-roots.pem", "issuer/crt.pem", "issuer/key.pem")]
    if any(part is None for part in parts):
        from mantle.core import ca

        made = ca.make_trust(names, now, (os.urandom(ca.SERIAL_BYTES), os.urandom(ca.SERIAL_BYTES)))
        parts = [made.roots_pem, made.issuer_pem, made.issuer_key_pem]
        store.write("issuer/key.pem", made.issuer_key_pem)
        store.write("issuer/crt.pem", made.issuer_pem)
        store.write("trust-roots.pem", made.roots_pem)
    pem = store.read("token-key.pem")
    if pem is None:
        key = tokens.new_key()
        store.write("token-key.pem", tokens.key_pem(key))
    else:
        key = tokens.load_key(pem)
    roots, issuer, issuer_key = (part.decode() for part in parts if part is not None)
    return MeshTrust(roots, issuer, issuer_key, key)
