"""Whether trust material that somebody hands in can carry a mesh: trust roots, an issuer, its key.

`check_trust` finds everything that is wrong at once, each with what was found, what was wanted and the fix;
`core/ca.py` then signs with what passed. Pure: PEM and a time in, a verdict out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from mantle.core.ca import Refusal, path_to_root

EXPIRING = timedelta(days=60)
"""Sooner than this is worth a warning."""
RSA_BITS = 2048
"""A trust root may be an RSA key of at least this size; an issuer must be P-256."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with trust material."""

    what: str
    """Which part: `trust root 1 (CN=…)`, `issuer`, `issuer key`."""
    found: str
    wanted: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}: found {self.found}; wanted {self.wanted}"


@dataclass(frozen=True, slots=True)
class Sound:
    """Material that passed every check; `warnings` says what will be wrong before long. Made by `check_trust` only."""

    roots: str
    issuer: str
    issuer_key: str
    not_after: datetime
    """When the first certificate of it ends."""
    warnings: tuple[str, ...]


_MATCH = "use an issuer, a key and trust roots that were made together"
_NEW = "make new trust material (`mantle install` on a cluster without any makes its own)"


def check_trust(roots_pem: bytes, issuer_pem: bytes, key_pem: bytes, now: datetime) -> Sound | tuple[Fault, ...]:
    """Every check of the material at `now` (aware). The issuer's chain may hold intermediates, itself first."""
    faults: list[Fault] = []
    roots = _certificates(roots_pem, "trust roots", faults)
    chain = _certificates(issuer_pem, "issuer", faults)
    key = _key(key_pem, faults)
    for position, root in enumerate(roots, 1):
        faults += _root_faults(root, f"trust root {position} ({_name(root)})", now)
    if chain:
        faults += _issuer_faults(chain, key, roots, now)
    if faults:
        return tuple(faults)
    ends = [(f"trust root {_name(cert)}", cert.not_valid_after_utc) for cert in roots]
    ends += [(f"issuer {_name(cert)}", cert.not_valid_after_utc) for cert in chain]
    return Sound(
        roots_pem.decode("ascii"),
        issuer_pem.decode("ascii"),
        key_pem.decode("ascii"),
        min(end for _, end in ends),
        tuple(f"the {what} expires on {_stamp(end)}" for what, end in ends if end - now < EXPIRING),
    )


def check_roots(roots_pem: bytes, now: datetime) -> tuple[Fault, ...]:
    """What is wrong with trust roots alone."""
    faults: list[Fault] = []
    for position, root in enumerate(_certificates(roots_pem, "trust roots", faults), 1):
        faults += _root_faults(root, f"trust root {position} ({_name(root)})", now)
    return tuple(faults)


def _certificates(pem: bytes, what: str, faults: list[Fault]) -> list[x509.Certificate]:
    try:
        pem.decode("ascii")
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        found = f"something else ({str(error).splitlines()[0]})" if pem.strip() else "nothing"
        faults.append(Fault(what, found, "PEM certificates", f"give the {what} as PEM, without keys between"))
        return []


def _key(pem: bytes, faults: list[Fault]) -> ec.EllipticCurvePrivateKey | None:
    wanted, fix = "an unencrypted ECDSA P-256 private key in PEM", "make the issuer with a P-256 key and no password"
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        found = "an encrypted key" if isinstance(error, TypeError) else "something else" if pem.strip() else "nothing"
        faults.append(Fault("issuer key", found, wanted, fix))
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        faults.append(Fault("issuer key", _kind(key.public_key()), wanted, fix))
        return None
    return key


def _root_faults(root: x509.Certificate, what: str, now: datetime) -> Iterator[Fault]:
    key = root.public_key()
    if not (_is_p256(key) or (isinstance(key, rsa.RSAPublicKey) and key.key_size >= RSA_BITS)):
        yield Fault(what, _kind(key), f"ECDSA P-256, or RSA of at least {RSA_BITS} bits", _NEW)
    if not _is_ca(root):
        yield Fault(what, "a certificate that is not a CA", "CA:TRUE in its basic constraints", _NEW)
    yield from _validity(root, what, now)


def _issuer_faults(
    chain: Sequence[x509.Certificate],
    key: ec.EllipticCurvePrivateKey | None,
    roots: Sequence[x509.Certificate],
    now: datetime,
) -> Iterator[Fault]:
    issuer = chain[0]
    what = f"issuer ({_name(issuer)})"
    if not _is_p256(issuer.public_key()):
        yield Fault(what, _kind(issuer.public_key()), "an ECDSA P-256 key", "make the issuer with a P-256 key")
    elif key is not None and key.public_key() != issuer.public_key():
        yield Fault("issuer key", "the key of another certificate", f"that of the {what}", _MATCH)
    if not _is_ca(issuer):
        yield Fault(
            what,
            "a certificate that is not a CA",
            "an intermediate CA (CA:TRUE)",
            "make it with the profile of an intermediate CA (cert-manager: isCA: true)",
        )
    for position, certificate in enumerate(chain):
        yield from _validity(certificate, what if position == 0 else f"intermediate ({_name(certificate)})", now)
    if roots and isinstance(path_to_root(chain, roots), Refusal):
        yield Fault(
            what,
            f"one signed by {issuer.issuer.rfc4514_string() or '(no name)'}, which is none of the trust roots",
            f"one whose chain ends at {' or '.join(_name(root) for root in roots)}",
            "give the trust roots that signed this issuer, and the intermediates between in the issuer's file",
        )


def _validity(certificate: x509.Certificate, what: str, now: datetime) -> Iterator[Fault]:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now >= end:
        yield Fault(what, f"one that expired on {_stamp(end)}", f"one that is valid now ({_stamp(now)})", _NEW)
    elif now < begin:
        yield Fault(
            what,
            f"one that is not valid before {_stamp(begin)}",
            f"one that is valid now ({_stamp(now)})",
            "check this machine's clock, or wait",
        )


def _is_p256(key: object) -> bool:
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _kind(key: object) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"an EC {key.curve.name} key"
    if isinstance(key, rsa.RSAPublicKey):
        return f"an RSA key of {key.key_size} bits"
    return f"a key of type {type(key).__name__.lstrip('_').removesuffix('PublicKey')}"


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or "(no name)"


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
