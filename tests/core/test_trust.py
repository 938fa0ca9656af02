"""Which trust a mesh is installed with, and everything that keeps material from carrying one, said at once."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from mantle.core import ca
from mantle.core.names import MeshNames
from mantle.core.trust import Fault, Sound, check_trust
from mantle.manifests.config import InstallValues
from mantle.manifests.facts import Facts, obstacles, parse_version
from mantle.manifests.inventory import still_meshed
from mantle.manifests.render import TrustMaterial
from mantle.manifests.trust import Decision, Existing, Given, decide

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
NAMES = MeshNames("mantle", "cluster.local")
VALUES = InstallValues()
EXTERNAL = InstallValues(external_issuer=True)


def made(now: datetime = NOW) -> ca.Trust:
    return ca.make_trust(NAMES, now, (b"a" * 16, b"b" * 16))


GOOD, OTHER = made(), made()


def entropy(size: int) -> bytes:
    return b"e" * size


def given(trust: ca.Trust = GOOD) -> Given:
    return Given(trust.roots_pem, trust.issuer_pem, trust.issuer_key_pem)


def secret(trust: ca.Trust = GOOD, *, tls: bool = False, roots: bool = True) -> dict[str, bytes]:
    names = ("tls.crt", "tls.key") if tls else ("crt.pem", "key.pem")
    pair = dict(zip(names, (trust.issuer_pem, trust.issuer_key_pem), strict=True))
    return {**pair, **({"ca.crt": trust.roots_pem} if tls and roots else {})}


def certificate(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, signer: object = None, *, is_ca: bool = True, name: str = "x"
) -> bytes:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(5)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=100))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .sign(signer or key, hashes.SHA256())  # type: ignore[arg-type]
        .public_bytes(serialization.Encoding.PEM)
    )


def key_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, password: bytes = b"") -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


RSA = rsa.generate_private_key(65537, 2048)
P384 = ec.generate_private_key(ec.SECP384R1())


def said(outcome: object) -> list[str]:
    assert isinstance(outcome, tuple), outcome
    assert all(isinstance(fault, Fault) and fault.fix for fault in outcome)
    return [str(fault) for fault in outcome]


# ---- the material ----


def test_material_made_together_is_sound_and_says_nothing():
    assert check_trust(GOOD.roots_pem, GOOD.issuer_pem, GOOD.issuer_key_pem, NOW) == Sound(
        GOOD.roots_pem.decode(),
        GOOD.issuer_pem.decode(),
        GOOD.issuer_key_pem.decode(),
        NOW + ca.CA_LIFETIME,
        (),
    )


def test_what_ends_within_sixty_days_is_a_warning_for_each_certificate():
    sound = check_trust(GOOD.roots_pem, GOOD.issuer_pem, GOOD.issuer_key_pem, NOW + timedelta(days=306))
    assert isinstance(sound, Sound)
    assert [w.split(" expires")[0] for w in sound.warnings] == [
        "the trust root CN=root.mantle.cluster.local",
        "the issuer CN=identity.mantle.cluster.local",
    ]


def test_an_issuer_of_another_root_is_refused():
    (one,) = said(check_trust(OTHER.roots_pem, GOOD.issuer_pem, GOOD.issuer_key_pem, NOW))
    assert "none of the trust roots" in one and "wanted one whose chain ends at CN=root.mantle" in one


def test_everything_that_is_wrong_is_said_at_once():
    late = NOW + timedelta(days=400)
    faults = said(check_trust(OTHER.roots_pem, GOOD.issuer_pem, OTHER.issuer_key_pem, late))
    assert len(faults) == 4
    for part in ("trust root 1", "issuer key: found the key of another", "expired on 2027-11-24", "none of the trust"):
        assert any(part in fault for fault in faults), part


@pytest.mark.parametrize(
    ("roots", "issuer", "key", "expected"),
    [
        (b"", GOOD.issuer_pem, GOOD.issuer_key_pem, "trust roots: found nothing; wanted PEM certificates"),
        (GOOD.roots_pem, b"\xff", GOOD.issuer_key_pem, "issuer: found something else"),
        (GOOD.roots_pem, GOOD.issuer_pem, b"no", "issuer key: found something else"),
        (GOOD.roots_pem, GOOD.issuer_pem, key_pem(P384, b"pw"), "issuer key: found an encrypted key"),
        (GOOD.roots_pem, GOOD.issuer_pem, key_pem(P384), "issuer key: found an EC secp384r1 key"),
        (certificate(P384), GOOD.issuer_pem, GOOD.issuer_key_pem, "(CN=x): found an EC secp384r1 key"),
        (certificate(RSA, is_ca=False), GOOD.issuer_pem, GOOD.issuer_key_pem, "found a certificate that is not a CA"),
    ],
)
def test_each_check_has_its_words(roots, issuer, key, expected):
    assert any(expected in fault for fault in said(check_trust(roots, issuer, key, NOW))), expected


def test_an_rsa_root_may_sign_a_p256_issuer_and_an_rsa_issuer_may_not_sign():
    key = ec.generate_private_key(ec.SECP256R1())
    assert isinstance(check_trust(certificate(RSA), certificate(key, RSA), key_pem(key), NOW), Sound)
    faults = said(check_trust(certificate(RSA), certificate(RSA, RSA), key_pem(RSA), NOW))
    assert [f.split(":")[0] for f in faults] == ["issuer key", "issuer (CN=x)"]


def test_an_issuer_that_is_no_ca_is_refused():
    key = ec.generate_private_key(ec.SECP256R1())
    (one,) = said(check_trust(certificate(RSA), certificate(key, RSA, is_ca=False), key_pem(key), NOW))
    assert "wanted an intermediate CA" in one


# ---- the decision ----


def test_a_cluster_without_trust_gets_a_fresh_root_whose_issuer_it_signed():
    decision = decide(VALUES, Given(), Existing(), NOW, entropy)
    assert isinstance(decision, Decision)
    material = decision.material
    assert isinstance(
        check_trust(material.roots.encode(), material.issuer.encode(), material.issuer_key.encode(), NOW), Sound
    )
    assert material.emit_roots


def test_what_the_cluster_has_is_kept_and_not_printed():
    existing = Existing(GOOD.roots_pem.decode(), secret())
    kept = Decision(TrustMaterial(GOOD.roots_pem.decode(), emit_roots=False))
    assert decide(VALUES, Given(), existing, NOW, entropy) == kept
    assert decide(VALUES, given(), existing, NOW, entropy) == kept  # the same again is no contradiction


def test_other_files_than_the_mesh_lives_with_are_refused_one_by_one():
    faults = said(decide(VALUES, given(OTHER), Existing(GOOD.roots_pem.decode(), secret()), NOW, entropy))
    assert [f.split(":")[0] for f in faults] == [
        "--identity-trust-anchors-file",
        "--identity-issuer-certificate-file",
        "--identity-issuer-key-file",
    ]


def test_a_cluster_whose_own_root_expired_is_refused():
    existing = Existing(GOOD.roots_pem.decode(), secret())
    faults = said(decide(VALUES, Given(), existing, NOW + timedelta(days=366), entropy))
    assert len(faults) == 2 and all("expired" in fault for fault in faults)


def test_files_come_all_three_or_none():
    faults = said(decide(VALUES, Given(roots=GOOD.roots_pem), Existing(), NOW, entropy))
    assert [f.split(":")[0] for f in faults] == ["--identity-issuer-certificate-file", "--identity-issuer-key-file"]


def test_files_that_are_sound_are_installed():
    decision = decide(VALUES, given(), Existing(), NOW, entropy)
    assert isinstance(decision, Decision)
    assert decision.material.issuer_key == GOOD.issuer_key_pem.decode()


def test_half_of_the_trust_is_refused():
    (no_issuer,) = said(decide(VALUES, Given(), Existing(roots="x"), NOW, entropy))
    (no_roots,) = said(decide(VALUES, Given(), Existing(issuer=secret()), NOW, entropy))
    assert "no Secret mantle-identity-issuer" in no_issuer and "no ConfigMap mantle-identity-trust-roots" in no_roots


def test_an_external_issuer_brings_its_roots_and_prints_no_key():
    decision = decide(EXTERNAL, Given(), Existing(issuer=secret(tls=True)), NOW, entropy)
    assert decision == Decision(TrustMaterial(GOOD.roots_pem.decode(), emit_roots=True))


def test_an_external_issuer_may_be_renewed_by_the_same_root():
    existing = Existing(GOOD.roots_pem.decode(), secret(tls=True, roots=False))
    decision = decide(EXTERNAL, Given(), existing, NOW, entropy)
    assert decision == Decision(TrustMaterial(GOOD.roots_pem.decode(), emit_roots=False))


def test_an_external_issuer_that_is_not_there_or_not_whole_is_refused():
    (absent,) = said(decide(EXTERNAL, Given(), Existing(), NOW, entropy))
    assert "no such Secret" in absent and "tls.crt, tls.key, ca.crt" in absent
    (rootless,) = said(decide(EXTERNAL, Given(), Existing(issuer=secret(tls=True, roots=False)), NOW, entropy))
    assert "no key ca.crt" in rootless
    both = Given(issuer=b"x", issuer_key=b"y")
    assert len(said(decide(EXTERNAL, both, Existing(issuer=secret(tls=True)), NOW, entropy))) == 2
    (offline,) = said(decide(EXTERNAL, Given(), Existing(), NOW, entropy, asked=False))
    assert "no cluster to read" in offline


def test_a_secret_of_the_other_form_says_which_flag_is_wrong():
    own_form, tls_form = Existing("x", secret()), Existing("x", secret(tls=True))
    (own,) = decide(EXTERNAL, Given(), own_form, NOW, entropy)  # type: ignore[misc]
    (tls,) = decide(VALUES, Given(), tls_form, NOW, entropy)  # type: ignore[misc]
    assert own.fix == "leave --identity-external-issuer out" and tls.fix == "give --identity-external-issuer"


# ---- the cluster around it ----


def test_nothing_stands_in_the_way_of_a_first_install():
    assert list(obstacles(Facts((1, 33)), VALUES)) == []


def test_everything_that_stands_in_the_way_is_said():
    facts = Facts(
        version=(1, 28),
        control_namespaces=("mantle", "older"),
        namespace_labels={"linkerd.io/is-control-plane": "true"},
        deployments=("istiod",),
        config={"values": '{"trustDomain": "example.org"}'},
        ip_family="IPv6",
    )
    found = said(tuple(obstacles(facts, VALUES)))
    assert [f.split(":")[0] for f in found] == [
        "control plane",
        "namespace mantle",
        "namespace mantle",
        "trustDomain",
        "the cluster's first address family",
        "Kubernetes",
    ]
    assert "Linkerd" in found[1] and "Istio" in found[2] and "found 1.28; wanted 1.29" in found[5]


def test_admission_policies_are_known_from_1_30_on_and_nothing_is_refused_for_want_of_them():
    optional = replace(VALUES, tls="optional")
    assert list(obstacles(Facts((1, 29)), optional)) == []
    assert [Facts(version).admission_policies for version in ((1, 29), (1, 30), (2, 0))] == [False, True, True]


def test_versions_as_clusters_write_them():
    assert parse_version({"major": "1", "minor": "29+"}) == (1, 29)
    assert parse_version({}) == (0, 0)


def test_pods_that_stay_behind_are_counted_and_the_first_named():
    def pod(name: str, namespace: str = "app", phase: str = "Running") -> dict[str, object]:
        return {"metadata": {"name": name, "namespace": namespace}, "status": {"phase": phase}}

    pods = [pod(f"p{i}") for i in range(4)]
    pods += [pod("identity", "mantle"), pod("done", phase="Succeeded")]
    (warning,) = still_meshed(pods, "mantle", shown=3)
    assert warning.startswith("4 pods still have a proxy: app/p0, app/p1, app/p2 and 1 more.")
    assert still_meshed(pods[4:], "mantle") == ()
