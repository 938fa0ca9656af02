"""The experimental mode `--tls=optional`: its names, its Secrets, and what is due when. Pure.

The design, whole, in one place. This mode is the weaker one, and is marked so wherever people meet it: the `ca` makes
the private keys, keys travel as Secrets, whoever may create pods in a namespace may mount any of them there, and a
proxy that cannot do TLS speaks plaintext (it *fails open*). It exists so that nothing breaks while people try TLS
out.

- *Who.* The `ca` (`control/ca.py`) is deployed only by `mantle install --tls=optional`. It has a root of its own,
  made by the same CA core (`core/ca.py`), constrained to names below `optional.<control-ns>.<trust-domain>`. A proxy
  of the default mode never trusts that root, so nothing it signs can pass for a default identity, and no default name
  is valid under it.
- *Names.* One identity an owner, not a service account: `<owner>.<kind>.<ns>.optional.<control-ns>.<trust-domain>`
  and `spiffe://optional.<control-ns>.<trust-domain>/ns/<ns>/<kind>/<owner>`. A namespace and a kind are one label
  each, an owner may hold dots, so the form is unambiguous.
- *Distribution.* For each owner of a pod labelled `mantle.dev/tls=optional` there is one Secret
  `<owner>-<kind>-tls-mantle` (`tls.crt`, `tls.key`, `ca.crt`). The `ca` writes Secrets and can read none but its own:
  what it has issued it remembers, and after a restart it issues everything anew, with new keys.
- *In the pod* (`core/inject_optional.py`). The Secret is an *optional* volume: the pod starts without it. The proxy
  reads the files when they appear and when they change.
- *Between modes.* An optional and a default proxy speak plaintext with each other, each saying so: neither can prove
  itself to the other. While `mantle migrate-tls` runs, pods already on their way to the default mode accept the
  identities being migrated, and only those, until a deadline.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mantle.core import ca
from mantle.core.ca import Refusal, Trust, ValidIssuer
from mantle.core.csr import check_csr
from mantle.core.names import BadName
from mantle.core.optional_names import LABEL_TLS, OPTIONAL, OWNER, OptionalNames, Owner
from mantle.core.reasons import CertifyRefused

LIFETIME = ca.LEAF_LIFETIME
RENEW_AT = 0.7
"""Part of a certificate's life after which it is issued anew, with a new key."""
ROOT_RENEW_AT = 0.7
"""Part of the root's life after which a new root is made; the old one stays in the bundle until it ends."""
CERTIFICATE, KEY, ROOTS = "tls.crt", "tls.key", "ca.crt"
ROOTS_PAST = "past-roots.crt"
CA_SECRET = "mantle-ca"
"""In the control namespace: the issuer's certificate and key, and the roots. Only the `ca` may read it."""


# ---- the authority's own material ----


@dataclass(frozen=True, slots=True)
class Authority:
    """The root and issuer in force, and earlier roots that live leaves may still lead to (PEM)."""

    trust: Trust
    past_roots: bytes = b""

    @property
    def bundle(self) -> bytes:
        """What proxies of this mode trust."""
        return self.trust.roots_pem + self.past_roots


def new_authority(
    names: OptionalNames, now: datetime, serials: tuple[bytes, bytes], before: Authority | None = None
) -> Authority:
    """A root and issuer that can sign names below `names.suffix` only. `before`'s roots stay trusted until they end."""
    trust = ca.make_trust(names, now, serials, permitted=names.trust_domain)
    return Authority(trust, _unexpired(before.bundle, now) if before else b"")


def authority_secret(authority: Authority, control_namespace: str, version: str) -> dict[str, Any]:
    """The `ca`'s own Secret."""
    return _secret(
        CA_SECRET,
        control_namespace,
        "Opaque",
        {
            CERTIFICATE: authority.trust.issuer_pem,
            KEY: authority.trust.issuer_key_pem,
            ROOTS: authority.trust.roots_pem,
            ROOTS_PAST: authority.past_roots,
        },
        {"mantle.dev/created-by": f"mantle {version}"},
    )


def read_authority(data: Mapping[str, str]) -> Authority | Refusal:
    """Reads the `ca`'s own Secret (`data`, base64). What is there must be whole: a CA is not replaced by accident."""
    try:
        parts = {name: base64.b64decode(data[name], validate=True) for name in (CERTIFICATE, KEY, ROOTS)}
        past = base64.b64decode(data.get(ROOTS_PAST, ""), validate=True)
    except (KeyError, ValueError) as error:
        return Refusal(
            CertifyRefused.ISSUER_UNUSABLE,
            f"a Secret {CA_SECRET} without a readable {error}",
            f"{CERTIFICATE}, {KEY} and {ROOTS}",
            f"delete the Secret {CA_SECRET}: the ca then makes a new root, and every proxy of this mode gets it",
        )
    return Authority(Trust(parts[ROOTS], parts[CERTIFICATE], parts[KEY]), past)


def root_due(issuer: ca.Issuer, now: datetime) -> bool:
    """Whether it is time for a new root."""
    return now >= issuer.not_before + (issuer.not_after - issuer.not_before) * ROOT_RENEW_AT


# ---- an owner's material ----


@dataclass(frozen=True, slots=True)
class Material:
    """One owner's key and certificate, ready to be distributed. Made by `issue` only."""

    owner: Owner
    identity: str
    chain_pem: bytes
    key_pem: bytes
    bundle: bytes
    issued: datetime
    not_after: datetime

    @property
    def renew(self) -> datetime:
        """When it is issued anew."""
        return self.issued + (self.not_after - self.issued) * RENEW_AT


def issue(
    valid: ValidIssuer,
    authority: Authority,
    owner: Owner,
    names: OptionalNames,
    now: datetime,
    serial: bytes,
    lifetime: timedelta = LIFETIME,
    skew: timedelta = ca.CLOCK_SKEW,
) -> Material | Refusal | BadName:
    """A new key and certificate for `owner`, through the same checks as a proxy's own request."""
    identity = names.identity(owner)
    if isinstance(identity, BadName):
        return identity
    key = ec.generate_private_key(ec.SECP256R1())
    san = x509.SubjectAlternativeName([x509.DNSName(identity)])
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(san, critical=True)
    csr = check_csr(request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER), identity)
    if isinstance(csr, Refusal):
        return csr
    wanted = ca.template(valid, csr, owner, names, now, serial, lifetime, skew)
    if isinstance(wanted, BadName):
        return wanted
    leaf = ca.sign(valid, wanted)
    if isinstance(leaf, Refusal):
        return leaf
    chain = b"".join(
        x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
        for der in (leaf.der, *leaf.intermediates)
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Material(owner, identity, chain, key_pem, authority.bundle, now, leaf.not_after)


def material_secret(
    material: Material, control_namespace: str, owned_by: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The owner's Secret. `owned_by`: the owner reference with which the cluster removes it together with its owner."""
    secret = _secret(
        material.owner.secret,
        material.owner.namespace,
        "kubernetes.io/tls",
        {CERTIFICATE: material.chain_pem, KEY: material.key_pem, ROOTS: material.bundle},
        {
            OWNER: f"{material.owner.kind}/{material.owner.name}",
            "mantle.dev/tls-identity": material.identity,
            "mantle.dev/tls-not-after": f"{material.not_after:%Y-%m-%dT%H:%M:%SZ}",
            "mantle.dev/tls-root-sha256": hashlib.sha256(material.bundle).hexdigest(),
        },
    )
    secret["metadata"]["labels"]["mantle.dev/control-plane-ns"] = control_namespace
    if owned_by is not None:
        secret["metadata"]["ownerReferences"] = [{**owned_by, "blockOwnerDeletion": False, "controller": False}]
    return secret


@dataclass(frozen=True, slots=True)
class Due:
    """What the `ca` has to do now: owners to issue for, owners to forget, and when to look again at the latest."""

    issue: tuple[Owner, ...]
    forget: tuple[Owner, ...]
    next_at: datetime | None


def due(wanted: frozenset[Owner], issued: Mapping[Owner, Material], authority: Authority, now: datetime) -> Due:
    """Compares the owners that run with what was issued: missing, of another bundle, or past `RENEW_AT`."""
    late = [
        owner
        for owner in sorted(wanted, key=lambda o: (o.namespace, o.kind, o.name))
        if (known := issued.get(owner)) is None or known.bundle != authority.bundle or now >= known.renew
    ]
    waiting = [issued[owner].renew for owner in wanted if owner in issued and owner not in late]
    return Due(tuple(late), tuple(owner for owner in issued if owner not in wanted), min(waiting, default=None))


# ---- details ----


def _secret(
    name: str, namespace: str, kind: str, data: Mapping[str, bytes], annotations: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {LABEL_TLS: OPTIONAL},
            "annotations": dict(annotations),
        },
        "type": kind,
        "data": {key: base64.b64encode(value).decode("ascii") for key, value in data.items()},
    }


def _unexpired(bundle: bytes, now: datetime) -> bytes:
    roots = x509.load_pem_x509_certificates(bundle)
    kept = [root.public_bytes(serialization.Encoding.PEM) for root in roots if root.not_valid_after_utc > now]
    return b"".join(kept)
