"""The certificate authority: a checked request becomes a template, the template a certificate, and that is checked
again.

`check_issuer` → `csr.check_csr` → `template` → `sign` → a `Leaf`, or a `Refusal` that names what was found, what was
wanted and what to do. Profile: X.509 v3 (RFC 5280), P-256 and ECDSA-with-SHA256, DNS SAN then SPIFFE URI SAN (SPIFFE
X509-SVID). Time and serial bytes are arguments; the only randomness in here is OpenSSL's, inside key generation and
ECDSA. Who may have which name is not decided here (`control/identity.py`), nor is anything read or written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mantle.core.csr import MAX_COMMON_NAME, CheckedCsr
from mantle.core.names import BadName
from mantle.core.reasons import CertifyRefused
from mantle.core.refusal import Refusal as Refusal  # what the authority answers is asked for here

LEAF_LIFETIME = timedelta(hours=24)
CLOCK_SKEW = timedelta(seconds=20)
"""Added at both ends of a leaf's validity."""
CA_LIFETIME = timedelta(days=365)
SERIAL_BYTES = 16
"""128 bits from a cryptographic source: RFC 5280 allows 20 octets, CA/B asks for 64 random bits."""


Subject = TypeVar("Subject", contravariant=True)


class CaNames(Protocol):
    """What an authority's own certificates are called (`names.MeshNames`, `optional_tls.OptionalNames`)."""

    @property
    def root(self) -> str: ...
    @property
    def issuer(self) -> str: ...
    @property
    def trust_domain(self) -> str: ...


class LeafNames(Protocol[Subject]):
    """What a leaf is called: its DNS name, or why it cannot have one, and its SPIFFE ID."""

    def identity(self, subject: Subject, /) -> str | BadName: ...
    def spiffe(self, subject: Subject, /) -> str: ...


@dataclass(frozen=True, slots=True)
class Trust:
    """A fresh trust anchor and the issuer it signed, as PEM. The anchor's key is in neither: it is gone."""

    roots_pem: bytes
    issuer_pem: bytes
    issuer_key_pem: bytes


@dataclass(frozen=True, slots=True)
class Issuer:
    """A signing certificate with its key, and the chain above it up to a trust root. Made by `load_issuer` only."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    public_key: ec.EllipticCurvePublicKey
    name: x509.Name
    key_identifier: x509.AuthorityKeyIdentifier
    """These three are the certificate's, taken out once: reading them again costs each leaf 100 µs."""
    intermediates: tuple[bytes, ...]
    """DER, this issuer first, without the root: what goes out with each leaf."""
    not_before: datetime
    not_after: datetime
    """The span in which the whole chain, root included, is valid."""


@dataclass(frozen=True, slots=True)
class ValidIssuer:
    """An issuer that is valid at the time it was checked for. Made by `check_issuer` only."""

    issuer: Issuer


@dataclass(frozen=True, slots=True)
class Template:
    """Everything a leaf will say, decided before anything is signed."""

    identity: str
    spiffe: str
    public_key: ec.EllipticCurvePublicKey
    serial: int
    not_before: datetime
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Leaf:
    """A signed certificate that passed its own check. Made by `sign` only."""

    der: bytes
    intermediates: tuple[bytes, ...]
    not_after: datetime
    sha256: str


def make_trust(
    names: CaNames,
    now: datetime,
    serials: tuple[bytes, bytes],
    skew: timedelta = CLOCK_SKEW,
    permitted: str | None = None,
) -> Trust:
    """A new trust anchor and issuer, valid `CA_LIFETIME` from `now` (aware) and `skew` before it.

    `permitted`: the DNS domain below which alone they may sign names (RFC 5280 4.2.1.10); None: any.

    The anchor's private key is a local variable of this function: it signs the issuer and is dropped. `serials` are the
    two certificates' serial bytes (see `serial_of`).
    """
    root_key = ec.generate_private_key(ec.SECP256R1())
    issuer_key = ec.generate_private_key(ec.SECP256R1())
    begin, end = _seconds(now - skew), _seconds(now + CA_LIFETIME)
    trust_domain = x509.UniformResourceIdentifier(f"spiffe://{names.trust_domain}")
    extensions = [x509.NameConstraints([x509.DNSName(permitted)], None)] if permitted else []
    root = _sign_ca(
        names.root, names.root, root_key, root_key, serial_of(serials[0]), begin, end, trust_domain, None, extensions
    )
    issuer = _sign_ca(
        names.issuer, names.root, issuer_key, root_key, serial_of(serials[1]), begin, end, trust_domain, 0, extensions
    )
    return Trust(
        roots_pem=root.public_bytes(serialization.Encoding.PEM),
        issuer_pem=issuer.public_bytes(serialization.Encoding.PEM),
        issuer_key_pem=issuer_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


def load_issuer(issuer_pem: bytes, key_pem: bytes, roots_pem: bytes) -> Issuer | Refusal:
    """Reads an issuer: certificates (itself first, then those above it), its key, the trust roots.

    Accepts P-256 issuers only: a leaf must be signed with ECDSA-with-SHA256. Says nothing about time: `check_issuer`
    does.
    """
    fix = "give identity an issuer, its key and trust roots that were made together"
    try:
        chain = x509.load_pem_x509_certificates(issuer_pem)
        roots = x509.load_pem_x509_certificates(roots_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        return _unusable(f"files that cannot be read ({error})", "PEM certificates and an unencrypted PEM key", fix)
    leaf_signer = chain[0]
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        return _unusable("an issuer key that is not P-256", "an ECDSA P-256 key", fix)
    if key.public_key() != leaf_signer.public_key():
        return _unusable("an issuer key that is not the certificate's", "the key the certificate was made for", fix)
    if not _is_ca(leaf_signer):
        return _unusable(f"{_subject(leaf_signer)}, which is not a CA", "a certificate with CA:TRUE", fix)
    path = path_to_root(chain, roots)
    if isinstance(path, Refusal):
        return path
    return Issuer(
        certificate=leaf_signer,
        key=key,
        public_key=key.public_key(),
        name=leaf_signer.subject,
        key_identifier=x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()),
        intermediates=tuple(cert.public_bytes(serialization.Encoding.DER) for cert in chain if cert not in roots),
        not_before=max(cert.not_valid_before_utc for cert in path),
        not_after=min(cert.not_valid_after_utc for cert in path),
    )


def check_issuer(issuer: Issuer, now: datetime) -> ValidIssuer | Refusal:
    """Whether the issuer's chain is valid at `now` (aware)."""
    if now < issuer.not_before:
        return Refusal(
            CertifyRefused.ISSUER_NOT_YET_VALID,
            f"a clock at {_stamp(now)} and an issuer valid from {_stamp(issuer.not_before)}",
            "a clock inside the issuer's validity",
            "set this machine's clock, or install new trust material",
        )
    if now >= issuer.not_after:
        return Refusal(
            CertifyRefused.ISSUER_EXPIRED,
            f"a clock at {_stamp(now)} and an issuer valid until {_stamp(issuer.not_after)}",
            "an issuer that has not expired",
            "install new trust material: a mesh on one machine makes it at `mantle down` and `mantle up`",
        )
    return ValidIssuer(issuer)


def template(
    valid: ValidIssuer,
    csr: CheckedCsr,
    workload: Subject,
    names: LeafNames[Subject],
    now: datetime,
    serial: bytes,
    lifetime: timedelta = LEAF_LIFETIME,
    skew: timedelta = CLOCK_SKEW,
) -> Template | BadName:
    """What the leaf will say. Valid from `now - skew` to `now + lifetime + skew`, clamped to the issuer's chain.

    `serial` is `SERIAL_BYTES` of cryptographic randomness. A `BadName` means that the workload's name cannot be
    written.
    """
    identity = names.identity(workload)
    if isinstance(identity, BadName):
        return identity
    issuer = valid.issuer
    return Template(
        identity=identity,
        spiffe=names.spiffe(workload),
        public_key=csr.public_key,
        serial=serial_of(serial),
        not_before=max(_seconds(now - skew), issuer.not_before),
        not_after=min(_seconds(now + lifetime + skew), issuer.not_after),
    )


def sign(valid: ValidIssuer, wanted: Template) -> Leaf | Refusal:
    """Signs the template and checks the result as a peer would: what leaves here is what was decided, or nothing."""
    issuer = valid.issuer
    short = len(wanted.identity) <= MAX_COMMON_NAME
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, wanted.identity)] if short else []
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(subject))
        .issuer_name(issuer.name)
        .public_key(wanted.public_key)
        .serial_number(wanted.serial)
        .not_valid_before(wanted.not_before)
        .not_valid_after(wanted.not_after)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(wanted.identity), x509.UniformResourceIdentifier(wanted.spiffe)]),
            critical=not short,
        )
        .add_extension(_LEAF_USAGE, critical=True)
        .add_extension(_LEAF_EXTENDED_USAGE, critical=False)
        .add_extension(issuer.key_identifier, critical=False)
        .sign(issuer.key, hashes.SHA256())
    )
    return revalidate(certificate.public_bytes(serialization.Encoding.DER), wanted, issuer)


def revalidate(der: bytes, wanted: Template, issuer: Issuer) -> Leaf | Refusal:
    """Reads a signed leaf back and compares it with what was decided: signature, key, names, times, usages."""
    leaf = x509.load_der_x509_certificate(der)
    try:
        issuer.public_key.verify(leaf.signature, leaf.tbs_certificate_bytes, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return _not_as_decided("a leaf that its issuer did not sign")
    extensions = leaf.extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    compared = {
        "issuer": (leaf.issuer, issuer.name),
        "names": (list(names), [x509.DNSName(wanted.identity), x509.UniformResourceIdentifier(wanted.spiffe)]),
        "key": (leaf.public_key(), wanted.public_key),
        "serial": (leaf.serial_number, wanted.serial),
        "validity": (
            (leaf.not_valid_before_utc, leaf.not_valid_after_utc),
            (wanted.not_before, wanted.not_after),
        ),
        "usages": (
            (
                extensions.get_extension_for_class(x509.KeyUsage).value,
                extensions.get_extension_for_class(x509.ExtendedKeyUsage).value,
            ),
            (_LEAF_USAGE, _LEAF_EXTENDED_USAGE),
        ),
        "CA flag": (_is_ca(leaf), False),
    }
    for part, (found, expected) in compared.items():
        if found != expected:
            return _not_as_decided(f"a leaf whose {part} differ from what was decided")
    if not leaf.not_valid_before_utc < leaf.not_valid_after_utc:
        return _not_as_decided("a leaf that would never be valid")
    return Leaf(der, issuer.intermediates, leaf.not_valid_after_utc, hashlib.sha256(der).hexdigest())


def serial_of(random: bytes) -> int:
    """A positive serial of `SERIAL_BYTES` random bytes: the first bit is cleared, so that it is never negative; 0
    becomes 1.

    Raises ValueError unless there are exactly `SERIAL_BYTES` bytes: fewer would be guessable.
    """
    if len(random) != SERIAL_BYTES:
        raise ValueError(f"a serial is made of {SERIAL_BYTES} random bytes, not {len(random)}")
    return int.from_bytes(bytes([random[0] & 0x7F]) + random[1:], "big") or 1


# ---- details ----

_LEAF_USAGE = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=True,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
_CA_USAGE = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)
_LEAF_EXTENDED_USAGE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])


def _sign_ca(
    subject: str,
    issuer: str,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    serial: int,
    begin: datetime,
    end: datetime,
    trust_domain: x509.UniformResourceIdentifier,
    path_length: int | None,
    constraints: Sequence[x509.NameConstraints],
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_CA_USAGE, critical=True)
        .add_extension(x509.SubjectAlternativeName([trust_domain]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    for constraint in constraints:
        builder = builder.add_extension(constraint, critical=True)
    return builder.sign(signer, hashes.SHA256())


def _name(common_name: str) -> x509.Name:
    """A subject of one common name; names of over 64 characters keep their first 64 (a CA is found by its key, not by
    this).
    """
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:MAX_COMMON_NAME])])


def path_to_root(
    chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]
) -> list[x509.Certificate] | Refusal:
    """The certificates from the issuer up to a trust root, that root included."""
    fix = "give identity the trust roots that its issuer was signed by"
    path: list[x509.Certificate] = []
    for position, certificate in enumerate(chain):
        path.append(certificate)
        if certificate in roots:
            return path
        for root in roots:
            if _issued_by(certificate, root):
                return [*path, root]
        above = chain[position + 1 : position + 2]
        if not above or not _issued_by(certificate, above[0]):
            break
    return _unusable(
        f"{_subject(path[-1])}, signed by none of the trust roots", "a chain that ends at a trust root", fix
    )


def _issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return _is_ca(issuer)


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _subject(certificate: x509.Certificate) -> str:
    return f"the certificate {certificate.subject.rfc4514_string() or '(no subject)'}"


def _unusable(found: str, wanted: str, fix: str) -> Refusal:
    return Refusal(CertifyRefused.ISSUER_UNUSABLE, found, wanted, fix)


def _not_as_decided(found: str) -> Refusal:
    return Refusal(
        CertifyRefused.SIGNING_FAILED,
        found,
        "the leaf that was decided",
        "report this: it is a fault of Mantle's identity",
    )


def _seconds(moment: datetime) -> datetime:
    """Certificates have whole seconds."""
    return moment.replace(microsecond=0)


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
