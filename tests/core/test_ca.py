"""The certificate authority: profile of what it signs, and each of its refusals. Time and serials are the test's."""

from __future__ import annotations

import warnings
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store

from mantle.core import ca
from mantle.core.ca import Issuer, Leaf, Refusal, Template, Trust, ValidIssuer
from mantle.core.csr import CheckedCsr, check_csr
from mantle.core.names import MeshNames, Workload
from mantle.core.reasons import CertifyRefused

NOW = datetime(2026, 11, 24, 8, 0, 0, 123456, tzinfo=UTC)
NAMES = MeshNames("mantle", "cluster.local")
WEB = Workload("emojivoto", "web")
IDENTITY = "web.emojivoto.serviceaccount.identity.mantle.cluster.local"
DER, PEM = serialization.Encoding.DER, serialization.Encoding.PEM


@pytest.fixture(scope="module")
def trust() -> Trust:
    return ca.make_trust(NAMES, NOW, (b"\xff" * 16, b"\x01" * 16))


@pytest.fixture(scope="module")
def issuer(trust: Trust) -> Issuer:
    loaded = ca.load_issuer(trust.issuer_pem, trust.issuer_key_pem, trust.roots_pem)
    assert isinstance(loaded, Issuer)
    return loaded


def request(key: object = None, names: list[x509.GeneralName] | None = None, common_name: str | None = None) -> bytes:
    """A request as a proxy makes it, or bent in one place."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = [] if common_name is None else [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    wanted = [x509.DNSName(IDENTITY)] if names is None else names
    if wanted:
        builder = builder.add_extension(x509.SubjectAlternativeName(wanted), critical=False)
    hashed = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, hashed).public_bytes(DER)  # type: ignore[arg-type]


def certificate_for(issuer: Issuer, now: datetime = NOW, lifetime: timedelta = ca.LEAF_LIFETIME) -> x509.Certificate:
    valid = ca.check_issuer(issuer, now)
    assert isinstance(valid, ValidIssuer)
    csr = check_csr(request(), IDENTITY)
    assert isinstance(csr, CheckedCsr)
    wanted = ca.template(valid, csr, WEB, NAMES, now, b"\x80" + b"\x07" * 15, lifetime)
    assert isinstance(wanted, Template)
    leaf = ca.sign(valid, wanted)
    assert isinstance(leaf, Leaf), leaf
    return x509.load_der_x509_certificate(leaf.der)


# ---- trust anchor and issuer ----


def test_root_and_issuer_live_a_year_and_the_roots_key_is_nowhere(trust: Trust) -> None:
    root, issuer = x509.load_pem_x509_certificate(trust.roots_pem), x509.load_pem_x509_certificate(trust.issuer_pem)
    for certificate in (root, issuer):
        assert certificate.not_valid_after_utc == (NOW + timedelta(days=365)).replace(microsecond=0)
        assert certificate.not_valid_before_utc == (NOW - timedelta(seconds=20)).replace(microsecond=0)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical and constraints.value.ca
    assert issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    issuer.verify_directly_issued_by(root)
    key = serialization.load_pem_private_key(trust.issuer_key_pem, None)
    assert key.public_key() == issuer.public_key() != root.public_key()
    assert trust.roots_pem.count(b"-----BEGIN") == trust.issuer_pem.count(b"-----BEGIN") == 1
    assert b"PRIVATE" not in trust.roots_pem + trust.issuer_pem


def test_serials_are_positive_and_of_all_their_random_bits(trust: Trust) -> None:
    assert x509.load_pem_x509_certificate(trust.roots_pem).serial_number == (1 << 127) - 1
    assert ca.serial_of(b"\x00" * 16) == 1
    assert ca.serial_of(b"\x80" + b"\x00" * 14 + b"\x05") == 5
    with pytest.raises(ValueError, match="16 random bytes"):
        ca.serial_of(b"\x01" * 8)


def test_an_issuer_is_valid_only_inside_its_chains_time(issuer: Issuer) -> None:
    for moment, reason in (
        (NOW - timedelta(seconds=22), CertifyRefused.ISSUER_NOT_YET_VALID),
        (NOW + timedelta(days=365), CertifyRefused.ISSUER_EXPIRED),
    ):
        refused = ca.check_issuer(issuer, moment)
        assert isinstance(refused, Refusal) and refused.reason is reason
        assert "2026-11-24T07:59:40Z" in str(refused) or "2027-11-24T08:00:00Z" in str(refused)
    assert isinstance(ca.check_issuer(issuer, NOW + timedelta(days=364)), ValidIssuer)


def pem_of(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("garbage certificate", "cannot be read"),
        ("garbage key", "cannot be read"),
        ("another key", "not the certificate's"),
        ("an RSA key", "not P-256"),
        ("a P-384 key", "not P-256"),
        ("other roots", "none of the trust roots"),
        ("not a CA", "not a CA"),
    ],
)
def test_an_issuer_that_cannot_be_used_says_why(trust: Trust, issuer: Issuer, what: str, words: str) -> None:
    files = {"issuer": trust.issuer_pem, "key": trust.issuer_key_pem, "roots": trust.roots_pem}
    match what:
        case "garbage certificate":
            files["issuer"] = b"-----BEGIN CERTIFICATE-----\nnonsense\n"
        case "garbage key":
            files["key"] = b"nothing"
        case "another key":
            files["key"] = pem_of(ec.generate_private_key(ec.SECP256R1()))
        case "an RSA key":
            files["key"] = pem_of(rsa.generate_private_key(65537, 2048))
        case "a P-384 key":
            files["key"] = pem_of(ec.generate_private_key(ec.SECP384R1()))
        case "other roots":
            files["roots"] = ca.make_trust(NAMES, NOW, (b"\x02" * 16, b"\x03" * 16)).roots_pem
        case "not a CA":
            key = ec.generate_private_key(ec.SECP256R1())
            leaf = certificate_for(issuer)
            forged = (
                x509.CertificateBuilder()
                .subject_name(leaf.subject)
                .issuer_name(leaf.issuer)
                .public_key(key.public_key())
                .serial_number(9)
                .not_valid_before(NOW)
                .not_valid_after(NOW + timedelta(hours=1))
                .sign(issuer.key, hashes.SHA256())
            )
            files["issuer"], files["key"] = forged.public_bytes(PEM), pem_of(key)
    refused = ca.load_issuer(files["issuer"], files["key"], files["roots"])
    assert isinstance(refused, Refusal)
    assert refused.reason is CertifyRefused.ISSUER_UNUSABLE
    assert words in refused.found and refused.wanted and refused.fix


def authority(
    name: str, by: str, public: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePrivateKey, days: int
) -> x509.Certificate:
    """A CA's certificate, valid for so many days."""

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = x509.CertificateBuilder().subject_name(named(name)).issuer_name(named(by)).public_key(public)
    builder = builder.serial_number(days).not_valid_before(NOW).not_valid_after(NOW + timedelta(days=days))
    return builder.add_extension(x509.BasicConstraints(True, None), critical=True).sign(signer, hashes.SHA256())


def test_an_intermediate_between_issuer_and_root_goes_out_with_each_leaf() -> None:
    root_key, middle_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    root = authority("root", "root", root_key.public_key(), root_key, 30)
    middle = authority("middle", "root", middle_key.public_key(), root_key, 3)
    bottom = authority("bottom", "middle", key.public_key(), middle_key, 20)
    chain = bottom.public_bytes(PEM) + middle.public_bytes(PEM) + root.public_bytes(PEM)
    loaded = ca.load_issuer(chain, pem_of(key), root.public_bytes(PEM))
    assert isinstance(loaded, Issuer), loaded
    assert loaded.intermediates == (bottom.public_bytes(DER), middle.public_bytes(DER))
    assert loaded.not_after == (NOW + timedelta(days=3)).replace(microsecond=0), "the shortest of the chain counts"
    gap = ca.load_issuer(bottom.public_bytes(PEM), pem_of(key), root.public_bytes(PEM))
    assert isinstance(gap, Refusal) and gap.reason is CertifyRefused.ISSUER_UNUSABLE


# ---- requests ----

GOOD = request()
TWO_NAMES: list[x509.GeneralName] = [x509.DNSName(IDENTITY), x509.DNSName("x.y")]
WITH_URI: list[x509.GeneralName] = [x509.DNSName(IDENTITY), x509.UniformResourceIdentifier("spiffe://a/b")]
WITH_EMAIL: list[x509.GeneralName] = [x509.DNSName(IDENTITY), x509.RFC822Name("a@b.c")]


@pytest.mark.parametrize(
    ("csr", "reason", "words"),
    [
        (b"", CertifyRefused.CSR_MALFORMED, "not a DER sequence"),
        (b"-----BEGIN CERTIFICATE REQUEST-----", CertifyRefused.CSR_MALFORMED, "not a DER sequence"),
        (b"\x30\x03\x02\x01", CertifyRefused.CSR_MALFORMED, "cannot be parsed"),
        (GOOD + b"\x00", CertifyRefused.CSR_MALFORMED, "cannot be parsed"),
        (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), CertifyRefused.CSR_NOT_PROVEN, "did not make"),
        (request(rsa.generate_private_key(65537, 2048)), CertifyRefused.CSR_KEY_UNSUPPORTED, "RSA"),
        (request(ec.generate_private_key(ec.SECP384R1())), CertifyRefused.CSR_KEY_UNSUPPORTED, "EC secp384r1"),
        (request(ed25519.Ed25519PrivateKey.generate()), CertifyRefused.CSR_KEY_UNSUPPORTED, "Ed25519"),
        (request(names=[]), CertifyRefused.CSR_NAMES, "no name at all"),
        (request(names=[x509.DNSName("other.example")]), CertifyRefused.CSR_NAMES, "DNS:other.example"),
        (request(names=TWO_NAMES), CertifyRefused.CSR_NAMES, f"DNS:{IDENTITY}, DNS:x.y"),
        (request(names=WITH_URI), CertifyRefused.CSR_NAMES, "URI:spiffe://a/b"),
        (request(names=WITH_EMAIL), CertifyRefused.CSR_NAMES, "email:a@b.c"),
        (request(common_name="other"), CertifyRefused.CSR_NAMES, "CN:other"),
    ],
)
def test_a_request_that_is_refused_says_what_was_found(csr: bytes, reason: CertifyRefused, words: str) -> None:
    refused = check_csr(csr, IDENTITY)
    assert isinstance(refused, Refusal)
    assert refused.reason is reason
    assert words in refused.found
    assert refused.wanted and refused.fix
    assert str(refused).startswith(f"{reason}: found ")


def test_a_bent_bit_anywhere_is_noticed() -> None:
    for position in range(4, len(GOOD), 7):
        bent = GOOD[:position] + bytes([GOOD[position] ^ 0x10]) + GOOD[position + 1 :]
        assert isinstance(check_csr(bent, IDENTITY), Refusal), position


def test_the_common_name_may_be_empty_or_the_identity() -> None:
    for common_name in (None, IDENTITY):
        assert isinstance(check_csr(request(common_name=common_name), IDENTITY), CheckedCsr)


def test_a_common_name_longer_than_64_characters_is_read_in_silence() -> None:
    """Proxies write their whole identity there, and cryptography warns of it: warnings are errors in these tests."""
    identity = "mantle-destination.mantle.serviceaccount.identity.mantle.cluster.local"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        long = x509.NameAttribute(NameOID.COMMON_NAME, identity, _validate=False)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([long]))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(identity)]), critical=False)
    der = builder.sign(key, hashes.SHA256()).public_bytes(DER)
    assert isinstance(check_csr(der, identity), CheckedCsr)


# ---- leaves ----


def test_a_leaf_has_the_profile(issuer: Issuer) -> None:
    leaf = certificate_for(issuer)
    assert isinstance(leaf.signature_hash_algorithm, hashes.SHA256)
    assert leaf.serial_number == int.from_bytes(b"\x00" + b"\x07" * 15, "big")
    assert leaf.not_valid_before_utc == datetime(2026, 11, 24, 7, 59, 40, tzinfo=UTC)
    assert leaf.not_valid_after_utc == datetime(2026, 11, 25, 8, 0, 20, tzinfo=UTC)
    names = list(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    spiffe = x509.UniformResourceIdentifier("spiffe://cluster.local/ns/emojivoto/sa/web")
    assert names == [x509.DNSName(IDENTITY), spiffe]
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.digital_signature and usage.value.key_encipherment
    assert not usage.value.key_cert_sign
    with pytest.raises(x509.ExtensionNotFound):
        leaf.extensions.get_extension_for_class(x509.BasicConstraints)
    assert leaf.subject.rfc4514_string() == f"CN={IDENTITY}"


def test_an_independent_verifier_accepts_the_leaf_as_server_and_client(trust: Trust, issuer: Issuer) -> None:
    leaf = certificate_for(issuer)
    store = Store([x509.load_pem_x509_certificate(trust.roots_pem)])
    chain = [x509.load_pem_x509_certificate(trust.issuer_pem)]
    builder = PolicyBuilder().store(store).time(NOW.replace(tzinfo=None))
    assert builder.build_server_verifier(x509.DNSName(IDENTITY)).verify(leaf, chain)
    assert builder.build_client_verifier().verify(leaf, chain).subjects


def test_a_leaf_never_outlives_its_issuer(issuer: Issuer) -> None:
    late = certificate_for(issuer, now=NOW + timedelta(days=364, hours=12))
    assert late.not_valid_after_utc == issuer.not_after
    young = certificate_for(issuer, now=NOW)
    assert young.not_valid_before_utc >= issuer.not_before


def test_lifetimes_go_down_to_seconds(issuer: Issuer) -> None:
    leaf = certificate_for(issuer, now=NOW + timedelta(hours=1), lifetime=timedelta(seconds=3))
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(seconds=43)


def signed(issuer: Issuer, workload: Workload, identity: str) -> tuple[Template, Leaf]:
    valid = ca.check_issuer(issuer, NOW)
    csr = check_csr(request(names=[x509.DNSName(identity)]), identity)
    assert isinstance(valid, ValidIssuer) and isinstance(csr, CheckedCsr)
    wanted = ca.template(valid, csr, workload, NAMES, NOW, b"\x01" * 16)
    assert isinstance(wanted, Template)
    leaf = ca.sign(valid, wanted)
    assert isinstance(leaf, Leaf)
    return wanted, leaf


def test_a_name_too_long_for_a_common_name_stands_in_a_critical_san(issuer: Issuer) -> None:
    long = Workload("emojivoto", "a-service-account-with-a-very-long.name")
    identity = NAMES.identity(long)
    assert isinstance(identity, str)
    _, leaf = signed(issuer, long, identity)
    certificate = x509.load_der_x509_certificate(leaf.der)
    assert not list(certificate.subject)
    assert certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical


def test_what_was_signed_is_compared_with_what_was_decided(issuer: Issuer) -> None:
    wanted, leaf = signed(issuer, WEB, IDENTITY)
    for part, value in {
        "identity": "other." + IDENTITY,
        "spiffe": "spiffe://cluster.local/ns/emojivoto/sa/other",
        "public_key": ec.generate_private_key(ec.SECP256R1()).public_key(),
        "serial": 77,
        "not_after": NOW + timedelta(days=10),
    }.items():
        fields = {name: getattr(wanted, name) for name in Template.__slots__} | {part: value}
        refused = ca.revalidate(leaf.der, Template(**fields), issuer)
        assert isinstance(refused, Refusal) and refused.reason is CertifyRefused.SIGNING_FAILED, part
    other = ca.make_trust(NAMES, NOW, (b"\x05" * 16, b"\x06" * 16))
    stranger = ca.load_issuer(other.issuer_pem, other.issuer_key_pem, other.roots_pem)
    assert isinstance(stranger, Issuer)
    refused = ca.revalidate(leaf.der, wanted, stranger)
    assert isinstance(refused, Refusal) and "did not sign" in refused.found
