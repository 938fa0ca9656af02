"""The certificate that the API server sees when it calls us, and the authority behind it: when each is made anew.

`renewed` looks at what there is and says what there should be: a pure step that every replica may take, because whoever
comes second finds nothing left to do. A new authority first only joins the trusted ones; it signs once everybody has
had `propagation` to learn of it, so at no moment is a certificate served that its readers do not trust yet. This is not
the mesh's trust: workloads never see these certificates, and the mesh's roots never sign them (`core/ca.py`).

Profile: ECDSA P-256 with SHA-256, DNS SANs, serverAuth (RFC 5280). `now` is an argument; keys come from OpenSSL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

RENEW_AT = 0.7
"""Share of a certificate's life after which it is made anew."""
BACKDATED = timedelta(hours=1)
"""How far a certificate reaches into the past, for readers whose clock is behind; at most a tenth of its life."""
CA_CERTIFICATE, CA_KEY, CERTIFICATE, KEY = "ca.crt", "ca.key", "tls.crt", "tls.key"
"""The keys of the Secret: authorities oldest first, their keys in the same order; then the certificate in use."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the certificates should be like."""

    common_name: str
    dns_names: tuple[str, ...]
    lifetime: timedelta = timedelta(days=30)
    authority_lifetime: timedelta = timedelta(days=360)
    propagation: timedelta = timedelta(minutes=1)
    """How long readers may take to see a new authority."""


@dataclass(frozen=True, slots=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Material:
    """Everything the Secret holds."""

    authorities: tuple[Authority, ...]
    """Oldest first, at least one."""
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def bundle(self) -> bytes:
        """Every trusted authority, as PEM."""
        return b"".join(a.certificate.public_bytes(serialization.Encoding.PEM) for a in self.authorities)


@dataclass(frozen=True, slots=True)
class Unusable:
    """Why the Secret's content cannot be served."""

    found: str

    def __str__(self) -> str:
        return self.found


def load(data: Mapping[str, bytes]) -> Material | Unusable:
    """Reads the Secret's data. Says nothing about time."""
    if missing := [name for name in (CA_CERTIFICATE, CA_KEY, CERTIFICATE, KEY) if not data.get(name)]:
        return Unusable(f"there is no {', '.join(missing)}")
    try:
        authorities = x509.load_pem_x509_certificates(data[CA_CERTIFICATE])
        keys = [_key(part) for part in _keys(data[CA_KEY])]
        certificate = x509.load_pem_x509_certificate(data[CERTIFICATE])
        key = _key(data[KEY])
    except (ValueError, TypeError) as error:
        return Unusable(f"it is not PEM of certificates and P-256 keys ({error})")
    pairs = [*zip(authorities, keys, strict=False), (certificate, key)]
    if len(authorities) != len(keys) or any(c.public_key() != k.public_key() for c, k in pairs):
        return Unusable("its keys are not those of its certificates")
    if not any(_signed(certificate, authority) for authority in authorities):
        return Unusable("none of its authorities signed its certificate")
    return Material(tuple(Authority(c, k) for c, k in zip(authorities, keys, strict=True)), certificate, key)


def dump(material: Material) -> dict[str, bytes]:
    """The Secret's data."""
    return {
        CA_CERTIFICATE: material.bundle,
        CA_KEY: b"".join(_pem(a.key) for a in material.authorities),
        CERTIFICATE: material.certificate.public_bytes(serialization.Encoding.PEM),
        KEY: _pem(material.key),
    }


def renewed(material: Material | Unusable, plan: Plan, now: datetime) -> Material | None:
    """What should replace `material` at `now` (aware). None if it is good as it is."""
    authorities = () if isinstance(material, Unusable) else material.authorities
    kept = tuple(a for a in authorities if now < a.certificate.not_valid_after_utc)
    if not kept or _due(kept[-1].certificate, now):
        kept = (*kept, _make_authority(plan, now))
    if isinstance(material, Material):
        current = material.certificate
        trusted = any(_signed(current, a.certificate) for a in kept)
        if trusted and not _due(current, now) and _names(current) == plan.dns_names:
            return None if kept == authorities else Material(kept, current, material.key)
    known = [a for a in kept if now >= _begun(a.certificate) + plan.propagation]
    return Material(kept, *_make_certificate(plan, (known or list(kept))[-1], now))


def _due(certificate: x509.Certificate, now: datetime) -> bool:
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return not certificate.not_valid_before_utc <= now < certificate.not_valid_before_utc + RENEW_AT * life


def _begun(certificate: x509.Certificate) -> datetime:
    """When it was made: its beginning lies before that."""
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return certificate.not_valid_before_utc + _backdated(life)


def _backdated(life: timedelta) -> timedelta:
    return min(life / 10, BACKDATED)


def _make_authority(plan: Plan, now: datetime) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{plan.common_name} authority")])
    certificate = (
        _builder(name, name, key, plan.authority_lifetime, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def _make_certificate(
    plan: Plan, authority: Authority, now: datetime
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, plan.common_name[:64])])
    issuer = authority.certificate
    builder = _builder(subject, issuer.subject, key, plan.lifetime, now, until=issuer.not_valid_after_utc)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in plan.dns_names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return certificate, key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    lifetime: timedelta,
    now: datetime,
    until: datetime | None = None,
) -> x509.CertificateBuilder:
    begin = (now - _backdated(lifetime)).astimezone(UTC).replace(microsecond=0)
    end = begin + lifetime if until is None else min(begin + lifetime, until)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(names.get_values_for_type(x509.DNSName))


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _keys(pem: bytes) -> list[bytes]:
    end = b"-----END PRIVATE KEY-----\n"
    return [part + end for part in pem.split(end) if part.strip()]


def _key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("a key that is not P-256")
    return key
