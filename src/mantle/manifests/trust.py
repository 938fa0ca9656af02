"""Which trust a mesh is installed with: what the cluster has, what was handed in, or a fresh root, in that order.

`decide` is the whole rule. Trust is made once: what a cluster has is never replaced from here, and what cannot carry a
mesh is refused before anything is printed. Pure: what the cluster holds, the files' contents, the time and entropy are
arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from mantle.core import ca
from mantle.core.names import BadName, mesh_names
from mantle.core.trust import Fault, Sound, check_roots, check_trust
from mantle.manifests.config import InstallValues
from mantle.manifests.render import ISSUER, TRUST_ROOTS, TrustMaterial

OWN_KEYS, TLS_KEYS = ("crt.pem", "key.pem"), ("tls.crt", "tls.key")
"""The keys of the issuer Secret: as `install` makes it, and of type `kubernetes.io/tls` (cert-manager)."""
ROOTS_KEY = "ca-bundle.crt"
BACKDATED = timedelta(minutes=10)
"""How long before its making fresh trust is valid: a node whose clock is behind can sign at once."""
TLS_ROOTS_KEY = "ca.crt"


@dataclass(frozen=True, slots=True)
class Given:
    """The contents of the files that were named, PEM."""

    roots: bytes | None = None
    issuer: bytes | None = None
    issuer_key: bytes | None = None


@dataclass(frozen=True, slots=True)
class Existing:
    """What the control namespace holds. None: there is no such object."""

    roots: str | None = None
    issuer: Mapping[str, bytes] | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The material to render with, and what to tell people."""

    material: TrustMaterial
    notes: tuple[str, ...] = ()


def decide(
    values: InstallValues,
    given: Given,
    existing: Existing,
    now: datetime,
    entropy: Callable[[int], bytes],
    asked: bool = True,
) -> Decision | tuple[Fault, ...]:
    """The trust of this mesh, or every reason why there is none. `asked`: a cluster was, and `existing` is its word."""
    if faults := _given_faults(values, given, existing, asked):
        return faults
    if existing.roots is not None and existing.issuer is not None:
        return _kept(values, given, existing.roots, existing.issuer, now)
    if values.external_issuer:
        return _external(given, existing, now, asked)
    if existing.roots is not None:
        return (
            Fault(
                f"ConfigMap {TRUST_ROOTS}",
                f"trust roots, but no Secret {ISSUER} with their issuer",
                "both, or neither",
                f"restore the Secret from a backup, or begin with new trust (every meshed pod must then be restarted): "
                f"kubectl -n {values.control_namespace} delete configmap {TRUST_ROOTS}",
            ),
        )
    if existing.issuer is not None:
        return (
            Fault(
                f"Secret {ISSUER}",
                f"an issuer, but no ConfigMap {TRUST_ROOTS} with its roots",
                "both, or neither",
                "give --identity-external-issuer if somebody else makes this Secret; else restore the ConfigMap, or "
                f"begin with new trust: kubectl -n {values.control_namespace} delete secret {ISSUER}",
            ),
        )
    if given.roots is not None and given.issuer is not None and given.issuer_key is not None:
        checked = check_trust(given.roots, given.issuer, given.issuer_key, now)
        if not isinstance(checked, Sound):
            return checked
        return Decision(TrustMaterial(checked.roots, checked.issuer, checked.issuer_key), checked.warnings)
    return _fresh(values, now, entropy)


def _given_faults(values: InstallValues, given: Given, existing: Existing, asked: bool) -> tuple[Fault, ...]:
    """What was handed in must be complete, and must not contradict the rest."""
    parts = {
        "--identity-trust-anchors-file": given.roots,
        "--identity-issuer-certificate-file": given.issuer,
        "--identity-issuer-key-file": given.issuer_key,
    }
    there = [name for name, content in parts.items() if content is not None]
    faults = []
    if values.external_issuer:
        faults = [
            Fault(name, "a file", "none: the issuer is in a Secret made by somebody else", f"leave {name} out")
            for name in there
            if name != "--identity-trust-anchors-file"
        ]
        if not asked and given.roots is None:
            faults.append(
                Fault(
                    "--identity-external-issuer",
                    "no cluster to read the issuer's ca.crt from",
                    "a cluster, or the trust roots in a file",
                    "reach the cluster, or give --identity-trust-anchors-file",
                )
            )
    elif there and len(there) < len(parts):
        faults = [
            Fault(name, "nothing", f"a file, as {' and '.join(there)} came with one", f"give {name}, too")
            for name in parts
            if name not in there
        ]
    return tuple(faults)


def _kept(
    values: InstallValues, given: Given, roots: str, issuer: Mapping[str, bytes], now: datetime
) -> Decision | tuple[Fault, ...]:
    """The cluster's own trust, checked, and not in the output."""
    pair = _issuer_of(values.external_issuer, issuer)
    if isinstance(pair, Fault):
        return (pair,)
    other = [
        (name, ours, theirs)
        for name, ours, theirs in (
            ("--identity-trust-anchors-file", given.roots, roots.encode()),
            ("--identity-issuer-certificate-file", given.issuer, pair[0]),
            ("--identity-issuer-key-file", given.issuer_key, pair[1]),
        )
        if ours is not None and ours.strip() != theirs.strip()
    ]
    faults = tuple(
        Fault(
            name,
            "other material than this mesh lives with",
            "the same, or none",
            f"leave {name} out: trust is made once; replacing it under running pods would cut them off",
        )
        for name, _, _ in other
    )
    checked = check_trust(roots.encode(), *pair, now)
    if not isinstance(checked, Sound):
        return (*faults, *checked)
    return faults or Decision(TrustMaterial(checked.roots, emit_roots=False), checked.warnings)


def _external(given: Given, existing: Existing, now: datetime, asked: bool) -> Decision | tuple[Fault, ...]:
    """Somebody else makes the issuer's Secret: it must be there, as its `ca.crt` says whom to trust."""
    if existing.issuer is None:
        if asked or given.roots is None:
            return (
                Fault(
                    f"Secret {ISSUER}",
                    "no such Secret",
                    f"a Secret of type kubernetes.io/tls with {', '.join((*TLS_KEYS, TLS_ROOTS_KEY))}",
                    "create it first (cert-manager: a Certificate with isCA: true and secretName: " + ISSUER + ")",
                ),
            )
        if faults := check_roots(given.roots, now):
            return faults
        return Decision(TrustMaterial(given.roots.decode("ascii")), ("the issuer's Secret was not checked",))
    pair = _issuer_of(True, existing.issuer)
    if isinstance(pair, Fault):
        return (pair,)
    roots = existing.roots.encode() if existing.roots else given.roots or existing.issuer.get(TLS_ROOTS_KEY)
    if not roots:
        return (
            Fault(
                f"Secret {ISSUER}",
                f"no key {TLS_ROOTS_KEY}",
                f"{TLS_ROOTS_KEY} with the trust roots",
                "add it, or give --identity-trust-anchors-file",
            ),
        )
    checked = check_trust(roots, *pair, now)
    if not isinstance(checked, Sound):
        return checked
    return Decision(TrustMaterial(checked.roots, emit_roots=existing.roots is None), checked.warnings)


def _issuer_of(external: bool, secret: Mapping[str, bytes]) -> tuple[bytes, bytes] | Fault:
    """Certificate and key out of the Secret, or which key is missing."""
    keys, others = (TLS_KEYS, OWN_KEYS) if external else (OWN_KEYS, TLS_KEYS)
    missing = [key for key in keys if not secret.get(key)]
    if not missing:
        return secret[keys[0]], secret[keys[1]]
    fix = f"create the Secret with {' and '.join(keys)}"
    if all(secret.get(key) for key in others):
        fix = "leave --identity-external-issuer out" if external else "give --identity-external-issuer"
    return Fault(
        f"Secret {ISSUER}",
        f"the keys {', '.join(sorted(secret)) or '(none)'}",
        f"{' and '.join(keys)}, as identity.externalIssuer is {'true' if external else 'false'}",
        fix,
    )


def _fresh(values: InstallValues, now: datetime, entropy: Callable[[int], bytes]) -> Decision:
    names = mesh_names(values.control_namespace, values.trust_domain)
    assert not isinstance(names, BadName), "install values are checked"
    serials = (entropy(ca.SERIAL_BYTES), entropy(ca.SERIAL_BYTES))
    made = ca.make_trust(names, now, serials, skew=BACKDATED)
    return Decision(TrustMaterial(made.roots_pem.decode(), made.issuer_pem.decode(), made.issuer_key_pem.decode()))
