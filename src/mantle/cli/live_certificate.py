"""The certificate a pod's proxy uses now: asked of the proxy itself, by a TLS handshake with its admin port.

The pod's supervisor gives a connection into the pod (`ctl.sock`), so neither the daemon nor the network has a part in
it. The key never leaves the proxy: what is read here is what any peer is shown.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mantle.cli.output import Failure

if TYPE_CHECKING:
    from cryptography import x509

ADMIN_PORT = 4191
TIMEOUT_SECONDS = 5.0
LOCAL_NAME = "IDENTITY_LOCAL_NAME"


@dataclass(frozen=True, slots=True)
class LiveCertificate:
    """What people want to know of a certificate. Times are UTC."""

    pem: str
    subject: str
    issuer: str
    serial: int
    not_before: datetime
    not_after: datetime
    dns_names: tuple[str, ...]
    uris: tuple[str, ...]
    key: str
    signature: str
    usages: tuple[str, ...]

    @property
    def spiffe_id(self) -> str:
        return next((uri for uri in self.uris if uri.startswith("spiffe://")), "")


def fetch(mesh_directory: Path, uid: str, name: str) -> LiveCertificate:
    """The certificate of the pod `uid`. `name` (`namespace/pod`) is for messages. Raises `Failure`."""
    identity = identity_of(mesh_directory / "pods" / uid / "spec.json", name)
    try:
        return parse(_handshake(mesh_directory / "pods" / uid / "ctl.sock", identity, name))
    except ssl.SSLError as error:
        raise Failure(
            f"the proxy of {name} did not show a certificate for {identity}: {error.reason or error}",
            fix=f"it may still wait for its first one: `mantle logs -c mantle-proxy {name.partition('/')[2]}`",
        ) from error
    except OSError as error:
        raise Failure(f"the proxy of {name} cannot be reached: {error.strerror or error}") from error


def identity_of(spec: Path, name: str) -> str:
    """The identity that injection gave a pod's proxy. Raises `Failure` if the pod is gone or has no proxy."""
    try:
        document: Mapping[str, Any] = json.loads(spec.read_text())
    except FileNotFoundError as error:
        raise Failure(f"pod {name} is gone", fix="`mantle ps` shows the pods there are") from error
    except (OSError, ValueError) as error:
        raise Failure(f"what was planned for pod {name} cannot be read: {error}") from error
    for container in document.get("containers", ()):
        for prefix in ("MANTLE_PROXY_", "LINKERD2_PROXY_"):
            if identity := container.get("env", {}).get(prefix + LOCAL_NAME):
                return str(identity)
    raise Failure(
        f"pod {name} is not in the mesh, so it has no certificate",
        fix="remove `mantle.dev/inject: disabled` from it and apply it again",
    )


def _handshake(control: Path, identity: str, name: str) -> bytes:
    """The proxy's certificate in DER. Nothing is verified: the point is to see what is there."""
    from mantle.platform.machine import wire

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = wire.Connection(control, TIMEOUT_SECONDS)
    try:
        _, descriptors = connection.call({"op": "dial", "port": ADMIN_PORT})
    except wire.Refused as error:
        raise Failure(f"the proxy of {name} cannot be reached: {error}") from error
    finally:
        connection.close()
    import socket

    with socket.socket(fileno=descriptors[0]) as plain:
        plain.settimeout(TIMEOUT_SECONDS)
        with context.wrap_socket(plain, server_hostname=identity) as secured:
            certificate = secured.getpeercert(binary_form=True)
    if certificate is None:  # TLS servers always show one
        raise Failure(f"the proxy of {name} showed no certificate")
    return certificate


def parse(der: bytes) -> LiveCertificate:
    """A certificate from DER. Raises `Failure` if it is none."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        certificate = x509.load_der_x509_certificate(der)
    except ValueError as error:
        raise Failure(f"what the proxy showed is no certificate: {error}") from error
    names = _extension(certificate, x509.SubjectAlternativeName)
    usages = _extension(certificate, x509.ExtendedKeyUsage)
    return LiveCertificate(
        pem=certificate.public_bytes(Encoding.PEM).decode(),
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        serial=certificate.serial_number,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        dns_names=tuple(names.get_values_for_type(x509.DNSName)) if names else (),
        uris=tuple(names.get_values_for_type(x509.UniformResourceIdentifier)) if names else (),
        key=_key(certificate),
        signature=certificate.signature_algorithm_oid._name,
        usages=tuple(usage._name for usage in usages) if usages else (),
    )


def _extension(certificate: x509.Certificate, kind: Any) -> Any:
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _key(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    key = certificate.public_key()
    return f"EC {key.curve.name}" if isinstance(key, EllipticCurvePublicKey) else type(key).__name__.strip("_")
