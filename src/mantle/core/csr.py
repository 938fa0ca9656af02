"""A certificate request as a peer sends it (PKCS#10, RFC 2986): parsed, proven to be its key's, and for one name only.

The first thing that hostile bytes meet: whatever they are, the answer is a `CheckedCsr` or a `Refusal`. Who may have
which name is not decided here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mantle.core.reasons import CertifyRefused
from mantle.core.refusal import Refusal

MAX_COMMON_NAME = 64
"""ub-common-name of RFC 5280: longer names stand in the SAN only, which is then critical."""
_TAG_SEQUENCE = b"\x30"


@dataclass(frozen=True, slots=True)
class CheckedCsr:
    """A request signed by its own key, for one identity and nothing else. Made by `check_csr` only."""

    identity: str
    public_key: ec.EllipticCurvePublicKey


def check_csr(der: bytes, identity: str) -> CheckedCsr | Refusal:
    """Checks a PKCS#10 request: P-256, signed by its own key (proof of possession), and for `identity` alone."""
    fix = "send a PKCS#10 request in DER, of a P-256 key, signed by that key"
    # A trailing byte after the outer SEQUENCE is refused by the parser; anything else than a SEQUENCE is said plainly.
    if der[:1] != _TAG_SEQUENCE:
        return Refusal(
            CertifyRefused.CSR_MALFORMED, "bytes that are not a DER sequence", "PKCS#10 in DER, not PEM", fix
        )
    try:
        csr = x509.load_der_x509_csr(der)
        key = csr.public_key()
        names = _requested_names(csr)
        common_names = _common_names(csr, long=len(identity) > MAX_COMMON_NAME)
        algorithm = csr.signature_hash_algorithm
    except Exception as error:
        # The parser's errors for hostile bytes are many (ValueError, UnsupportedAlgorithm, ParseError, …), and all mean
        # this.
        return Refusal(
            CertifyRefused.CSR_MALFORMED, f"a request that cannot be parsed ({error})", "PKCS#10 in DER", fix
        )
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        return Refusal(CertifyRefused.CSR_KEY_UNSUPPORTED, f"a key of type {_key_kind(key)}", "an ECDSA P-256 key", fix)
    if algorithm is None:
        return Refusal(CertifyRefused.CSR_NOT_PROVEN, "a signature without a hash", "ECDSA with SHA-256", fix)
    try:
        key.verify(csr.signature, csr.tbs_certrequest_bytes, ec.ECDSA(algorithm))
    except InvalidSignature:
        return Refusal(
            CertifyRefused.CSR_NOT_PROVEN,
            "a signature that the requested key did not make",
            "a request signed by the key it is for",
            fix,
        )
    if names != [("DNS", identity)] or any(name != identity for name in common_names if name):
        found = ", ".join(
            [f"{kind}:{value}" for kind, value in names] + [f"CN:{name}" for name in common_names if name]
        )
        return Refusal(
            CertifyRefused.CSR_NAMES,
            found or "no name at all",
            f"exactly DNS:{identity}, and a common name that is empty or the same",
            "ask for the identity of the proxy's own service account, and put nothing else into the request",
        )
    return CheckedCsr(identity, key)


def _requested_names(csr: x509.CertificateSigningRequest) -> list[tuple[str, str]]:
    """Every alternative name of the request, as (kind, text), in order."""
    try:
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    kinds: dict[type[x509.GeneralName], str] = {
        x509.DNSName: "DNS",
        x509.UniformResourceIdentifier: "URI",
        x509.IPAddress: "IP",
        x509.RFC822Name: "email",
    }
    return [(kinds.get(type(name), type(name).__name__), str(name.value)) for name in names]


def _common_names(csr: x509.CertificateSigningRequest, long: bool) -> list[str]:
    """The request's common names. `long`: over 64 characters are expected, as proxies write their identity."""
    if not long:
        return [str(attribute.value) for attribute in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    with warnings.catch_warnings():  # cryptography warns of such names, each time anew
        warnings.filterwarnings("ignore", "Attribute's length must be", UserWarning)
        return _common_names(csr, long=False)


def _key_kind(key: object) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    return type(key).__name__.lstrip("_").removesuffix("PublicKey")
