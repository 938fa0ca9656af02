"""Certificates for tests of TLS: made when asked for, valid for an hour, P-256."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat


class Certificate:
    """A certificate for `name` and 127.0.0.1; `parent` None: an authority that signed itself."""

    def __init__(self, name: str, parent: Certificate | None = None, address: str = "127.0.0.1") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer, now = parent or self, datetime.now(UTC)
        names = [x509.IPAddress(ip_address(address)), x509.DNSName(name.replace(" ", "-"))]
        key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(issuer.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=parent is None, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .add_extension(key_id, critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        self.certificate = builder.sign(issuer.key, hashes.SHA256())
        self.pem = self.certificate.public_bytes(Encoding.PEM)
        self.key_pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def both(self) -> bytes:
        """The certificate and its key."""
        return self.pem + self.key_pem

    def write(self, path: Path) -> Path:
        """Both, into a file."""
        path.write_bytes(self.both)
        return path
