"""The experimental mode: names, the weaker authority's limits, what is issued when, and what a pod becomes."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from mantle.core import ca
from mantle.core import optional_tls as tls
from mantle.core.callers import Caller, CallerDenied, Presented, check_caller
from mantle.core.csr import CheckedCsr
from mantle.core.endpoints import AddressTarget, Profile, profile, view_of
from mantle.core.inject import Injected, Refused, inject_pod, uninject_pod
from mantle.core.model import Key, Pod, Snapshot
from mantle.core.model import Owner as PodOwner
from mantle.core.names import BadName, MeshNames, Workload
from mantle.core.optional_names import OptionalNames, Owner, owner_of
from mantle.core.proxy_env import Values
from mantle.core.reasons import NoIdentity
from mantle.core.world import Mesh, World
from mantle.manifests.config import load
from mantle.manifests.render import TrustMaterial, install_objects

NOW = datetime(2026, 11, 24, 8, 0, 0, tzinfo=UTC)
MESH = MeshNames("mantle", "cluster.local")
NAMES = OptionalNames(MESH)
WEB = Owner("emojivoto", "deployment", "web")
VALUES = Values("1.2.3", "ROOTS", ("10.203.0.0/16",), tls="optional")
POD = {
    "metadata": {"labels": {"app": "web"}, "annotations": {"mantle.dev/inject": "enabled"}},
    "spec": {"serviceAccountName": "web", "containers": [{"name": "app", "image": "acme/web"}]},
}


@pytest.fixture(scope="module")
def authority() -> tls.Authority:
    return tls.new_authority(NAMES, NOW, (b"\x11" * 16, b"\x12" * 16))


def valid(authority: tls.Authority, now: datetime = NOW) -> ca.ValidIssuer:
    trust = authority.trust
    issuer = ca.load_issuer(trust.issuer_pem, trust.issuer_key_pem, trust.roots_pem)
    assert isinstance(issuer, ca.Issuer)
    checked = ca.check_issuer(issuer, now)
    assert isinstance(checked, ca.ValidIssuer)
    return checked


def issued(authority: tls.Authority, owner: Owner = WEB, now: datetime = NOW) -> tls.Material:
    material = tls.issue(valid(authority), authority, owner, NAMES, now, b"\x13" * 16)
    assert isinstance(material, tls.Material)
    return material


@pytest.mark.parametrize("owner", [WEB, Owner("a", "statefulset", "db.of.it"), Owner("a", "pod", "deployment")])
def test_an_identity_says_owner_kind_and_namespace_and_reads_back(owner: Owner) -> None:
    name = NAMES.identity(owner)
    assert name == f"{owner.name}.{owner.kind}.{owner.namespace}.optional.mantle.cluster.local"
    assert NAMES.parse_identity(name) == owner
    assert isinstance(MESH.parse_identity(name), BadName), "never a name of the default mode"


@pytest.mark.parametrize(
    "bad",
    [Owner("a.b", "deployment", "web"), Owner("a", "Deployment", "web"), Owner("a", "deployment", "we_b"),
     Owner("a", "deployment", "x" * 250), Owner("a", "deployment", "")],
)  # fmt: skip
def test_what_cannot_be_named_is_refused(bad: Owner) -> None:
    assert isinstance(NAMES.identity(bad), BadName)


def test_default_names_are_not_names_of_this_mode() -> None:
    default = MESH.identity(Workload("emojivoto", "web"))
    assert isinstance(default, str)
    assert isinstance(NAMES.parse_identity(default), BadName)
    assert isinstance(NAMES.parse_identity("web" + NAMES.suffix), BadName)


def test_an_owners_certificate_verifies_under_this_root_and_names_the_owner(authority: tls.Authority) -> None:
    material = issued(authority)
    leaf, *above = x509.load_pem_x509_certificates(material.chain_pem)
    roots = x509.load_pem_x509_certificates(material.bundle)
    verifier = PolicyBuilder().store(Store(roots)).time(NOW + timedelta(hours=1))
    chain = verifier.build_server_verifier(x509.DNSName(material.identity)).verify(leaf, above)
    assert chain[-1] == roots[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
        "spiffe://optional.mantle.cluster.local/ns/emojivoto/deployment/web"
    ]
    assert load_pem_private_key(material.key_pem, None).public_key() == leaf.public_key()


def test_this_root_cannot_vouch_for_a_name_of_the_default_mode(authority: tls.Authority) -> None:
    """Even its own key in wrong hands signs nothing that a verifier takes for a service account."""
    from cryptography.hazmat.primitives.asymmetric import ec

    identity = MESH.identity(Workload("emojivoto", "web"))
    assert isinstance(identity, str)
    key = ec.generate_private_key(ec.SECP256R1())
    wanted = ca.template(
        valid(authority), CheckedCsr(identity, key.public_key()), Workload("emojivoto", "web"), MESH, NOW, b"1" * 16
    )
    assert isinstance(wanted, ca.Template)
    forged = ca.sign(valid(authority), wanted)
    assert isinstance(forged, ca.Leaf)
    store = Store(x509.load_pem_x509_certificates(authority.bundle))
    verifier = PolicyBuilder().store(store).time(NOW + timedelta(hours=1)).build_server_verifier(x509.DNSName(identity))
    above = [x509.load_der_x509_certificate(der) for der in forged.intermediates]
    with pytest.raises(VerificationError):
        verifier.verify(x509.load_der_x509_certificate(forged.der), above)


def test_each_issue_has_a_new_key(authority: tls.Authority) -> None:
    assert issued(authority).key_pem != issued(authority).key_pem


def test_the_secret_is_what_a_proxy_reads_and_goes_with_its_owner(authority: tls.Authority) -> None:
    reference = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "uid": "u1"}
    secret = tls.material_secret(issued(authority), "mantle", reference)
    assert (secret["metadata"]["name"], secret["metadata"]["namespace"]) == ("web-deployment-tls-mantle", "emojivoto")
    assert secret["type"] == "kubernetes.io/tls"
    assert set(secret["data"]) == {"tls.crt", "tls.key", "ca.crt"}
    assert base64.b64decode(secret["data"]["ca.crt"]) == authority.bundle
    assert secret["metadata"]["ownerReferences"][0]["uid"] == "u1"


def test_the_authority_reads_back_and_a_broken_secret_says_what_to_do(authority: tls.Authority) -> None:
    secret = tls.authority_secret(authority, "mantle", "1.2.3")
    assert tls.read_authority(secret["data"]) == authority
    broken = tls.read_authority({**secret["data"], "tls.key": "%%%"})
    assert isinstance(broken, ca.Refusal)
    assert "delete the Secret mantle-ca" in str(broken)
    del secret["data"]["ca.crt"]
    assert isinstance(tls.read_authority(secret["data"]), ca.Refusal)


def test_what_is_due_missing_late_or_of_an_older_bundle(authority: tls.Authority) -> None:
    api = Owner("emojivoto", "deployment", "api")
    known = {WEB: issued(authority)}
    both = frozenset({WEB, api})
    assert tls.due(both, known, authority, NOW).issue == (api,)
    renew = known[WEB].renew
    assert renew == NOW + (known[WEB].not_after - NOW) * 0.7
    assert tls.due(frozenset({WEB}), known, authority, renew - timedelta(seconds=1)) == tls.Due((), (), renew)
    assert tls.due(frozenset({WEB}), known, authority, renew).issue == (WEB,)
    assert tls.due(frozenset(), known, authority, NOW).forget == (WEB,)
    newer = tls.new_authority(NAMES, NOW, (b"\x21" * 16, b"\x22" * 16), authority)
    assert tls.due(frozenset({WEB}), known, newer, NOW).issue == (WEB,), "the bundle must reach every pod"


def test_a_new_root_keeps_the_old_one_trusted_until_it_ends(authority: tls.Authority) -> None:
    issuer = valid(authority).issuer
    assert not tls.root_due(issuer, NOW)
    later = NOW + timedelta(days=260)
    assert tls.root_due(issuer, later)
    second = tls.new_authority(NAMES, later, (b"\x21" * 16, b"\x22" * 16), authority)
    assert authority.trust.roots_pem in second.bundle
    third = tls.new_authority(NAMES, NOW + timedelta(days=400), (b"\x31" * 16, b"\x32" * 16), second)
    assert authority.trust.roots_pem not in third.bundle
    assert second.trust.roots_pem in third.bundle


# ---- a pod of this mode ----


def meshed(annotations: dict[str, str], owner: tuple[str, str] | None = ("Deployment", "web")) -> dict:
    pod = {
        **POD,
        "metadata": {"labels": {"app": "web"}, "annotations": {"mantle.dev/inject": "enabled", **annotations}},
    }
    result = inject_pod(pod, {"metadata": {"name": "shop"}}, VALUES, owner)
    assert isinstance(result, Injected), result
    return result.pod


def sidecar(pod: dict) -> dict:
    return next(c for c in pod["spec"]["initContainers"] if c["name"] == "mantle-proxy")


def env(pod: dict) -> dict[str, str]:
    return {e["name"].removeprefix("MANTLE_PROXY_"): e.get("value", "") for e in sidecar(pod)["env"]}


def test_an_optional_pod_mounts_its_owners_secret_and_no_token() -> None:
    pod = meshed({"config.mantle.dev/tls": "optional"})
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    secret = volumes["mantle-tls-optional"]["secret"]
    assert (secret["secretName"], secret["optional"]) == ("web-deployment-tls-mantle", True)
    assert "mantle-identity-token" not in volumes
    assert env(pod)["IDENTITY_FILES"] == "/var/run/secrets/mantle.dev/tls-optional"
    assert env(pod)["IDENTITY_LOCAL_NAME"] == "web.deployment.$(_pod_ns).optional.mantle.cluster.local"
    assert "IDENTITY_TOKEN_FILE" not in env(pod)
    labels, annotations = pod["metadata"]["labels"], pod["metadata"]["annotations"]
    assert owner_of(labels, annotations, "shop") == Owner("shop", "deployment", "web")


def test_a_default_pod_has_nothing_of_it() -> None:
    pod = meshed({})
    assert not [name for name in env(pod) if "FILES" in name or "MIGRATION" in name]
    assert "mantle.dev/tls" not in pod["metadata"]["labels"]
    assert owner_of(pod["metadata"]["labels"], pod["metadata"]["annotations"], "shop") is None
    assert [v["name"] for v in pod["spec"]["volumes"]] == ["mantle-identity-end-entity", "mantle-identity-token"]


def test_injecting_again_changes_nothing_and_uninject_takes_all_of_it_out() -> None:
    pod = meshed({"config.mantle.dev/tls": "optional"})
    again = inject_pod(pod, {"metadata": {"name": "shop"}}, VALUES, ("Deployment", "web"))
    assert isinstance(again, Injected)
    assert again.pod == pod
    bare = uninject_pod(pod)
    assert bare["spec"] == POD["spec"]
    assert bare["metadata"]["labels"] == {"app": "web"}
    assert set(bare["metadata"]["annotations"]) <= {
        "mantle.dev/inject", "config.mantle.dev/tls", "config.mantle.dev/opaque-ports"
    }  # fmt: skip


def refused(pod: dict, values: Values, owner: tuple[str, str] | None) -> str:
    result = inject_pod(pod, {}, values, owner)
    assert isinstance(result, Refused), result
    return "\n".join(map(str, result.mistakes))


def test_it_is_refused_where_it_could_only_ever_be_plaintext() -> None:
    wanted = {**POD, "metadata": {"annotations": {"mantle.dev/inject": "enabled", "config.mantle.dev/tls": "optional"}}}
    without = Values("1.2.3", "ROOTS", ("10.203.0.0/16",))
    said = refused(wanted, without, None)
    assert "mantle install --tls=optional" in said
    assert "a pod with a name or a controller" in said, "every mistake at once"
    component = {"metadata": {**wanted["metadata"], "labels": {"mantle.dev/control-plane-component": "viz"}}}
    assert "the control plane is always" in refused({**POD, **component}, VALUES, ("Deployment", "mantle-viz"))
    assert "one of deployment" in refused(wanted, VALUES, ("Rollout", "web"))


def test_a_pod_being_migrated_accepts_the_listed_identities_until_a_deadline() -> None:
    pod = meshed({"mantle.dev/tls-migration": f"sha256:{'a' * 64} until:2026-11-24T09:00:00Z"})
    assert env(pod)["IDENTITY_MIGRATION_ROOTS"] == "a" * 64
    assert env(pod)["IDENTITY_MIGRATION_UNTIL"] == str(int(datetime(2026, 11, 24, 9, tzinfo=UTC).timestamp()))
    config = next(v for v in pod["spec"]["volumes"] if v["name"] == "mantle-tls-migration")["configMap"]
    assert config == {"name": "mantle-tls-migration", "optional": True}
    broken = {**POD, "metadata": {"annotations": {"mantle.dev/inject": "enabled", "mantle.dev/tls-migration": "yes"}}}
    assert "what `mantle migrate-tls` writes" in refused(broken, VALUES, ("Deployment", "web"))


# ---- who sees whom ----

WORLD_MESH = Mesh(MESH)


def seen_pod(name: str, mode: str) -> Pod:
    labels = {"app": name, "mantle.dev/control-plane-ns": "mantle"}
    annotations = {}
    if mode == "optional":
        labels["mantle.dev/tls"], annotations["mantle.dev/tls-owner"] = "optional", f"deployment/{name}"
    if mode == "migrating":
        annotations["mantle.dev/tls-migration"] = f"sha256:{'a' * 64} until:2026-11-24T09:00:00Z"
    number = {"required": 1, "optional": 2, "migrating": 3}[mode]
    return Pod(
        Key("shop", name), f"u-{name}", f"10.203.0.{number}", name, PodOwner("Deployment", name), labels, annotations,
        ready=True, proxy_started=True,
    )  # fmt: skip


REQUIRED, OPTIONAL, MIGRATING = (seen_pod(mode, mode) for mode in ("required", "optional", "migrating"))
WORLD = World.empty(WORLD_MESH).next(Snapshot(1, {pod.key: pod for pod in (REQUIRED, OPTIONAL, MIGRATING)}))
AS_OPTIONAL = "optional.deployment.shop.optional.mantle.cluster.local"
AS_REQUIRED = "required.shop.serviceaccount.identity.mantle.cluster.local"
AS_MIGRATING = "migrating.shop.serviceaccount.identity.mantle.cluster.local"


@pytest.mark.parametrize(
    ("caller", "callee", "identity"),
    [
        (REQUIRED, REQUIRED, AS_REQUIRED),
        (REQUIRED, OPTIONAL, NoIdentity.OPTIONAL_TLS),
        (REQUIRED, MIGRATING, AS_MIGRATING),
        (OPTIONAL, REQUIRED, NoIdentity.OPTIONAL_TLS),
        (OPTIONAL, OPTIONAL, AS_OPTIONAL),
        (OPTIONAL, MIGRATING, AS_MIGRATING),
        (MIGRATING, REQUIRED, AS_REQUIRED),
        (MIGRATING, OPTIONAL, AS_OPTIONAL),
        (MIGRATING, MIGRATING, AS_MIGRATING),
        (None, OPTIONAL, NoIdentity.OPTIONAL_TLS),
    ],
)
def test_a_caller_is_told_only_identities_that_it_can_verify_and_that_accept_it(
    caller: Pod | None, callee: Pod, identity: object
) -> None:
    view = view_of(WORLD, caller.key if caller else None)
    found = profile(WORLD.seen_as(view), AddressTarget(callee.ip, 8080))
    assert isinstance(found, Profile)
    assert found.endpoint is not None
    assert found.endpoint.tls == identity


def test_without_a_certificate_of_the_mesh_only_pods_of_this_mode_are_answered_and_only_where_it_is_installed() -> None:
    stranger = Presented("", False)

    def asked(pod: Pod, optional_tls: bool) -> object:
        return check_caller(WORLD, stranger, pod.key, None, False, optional_tls)

    assert isinstance(asked(OPTIONAL, True), Caller)
    assert isinstance(asked(OPTIONAL, False), CallerDenied)
    assert isinstance(asked(REQUIRED, True), CallerDenied)
    assert isinstance(asked(MIGRATING, True), CallerDenied)
    assert isinstance(check_caller(WORLD, stranger, None, None, False, True), CallerDenied)


# ---- what is installed ----


def installed(tls: str) -> list[dict]:
    trust = TrustMaterial("ROOTS\n", "ISSUER\n", "KEY\n")
    return install_objects(load({"tls": tls, "ha": True}), trust)


def test_the_ca_and_its_rights_are_there_only_when_asked_for() -> None:
    assert not [o for o in installed("required") if o["metadata"]["name"] == "mantle-ca"]
    kinds = sorted(o["kind"] for o in installed("optional") if o["metadata"]["name"] == "mantle-ca")
    narrowed = ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"]
    rights = ["ClusterRole", "ClusterRoleBinding", "Deployment", "Role", "RoleBinding", "ServiceAccount"]
    assert kinds == rights + narrowed


def test_the_ca_is_one_pod_that_reads_no_secret_but_its_own() -> None:
    ca_objects = {o["kind"]: o for o in installed("optional") if o["metadata"]["name"] == "mantle-ca"}
    assert ca_objects["Deployment"]["spec"]["replicas"] == 1
    for rule in ca_objects["ClusterRole"]["rules"]:
        assert "*" not in json.dumps(rule)
        if "secrets" in rule["resources"]:
            assert set(rule["verbs"]) == {"create", "update"}
    (own,) = ca_objects["Role"]["rules"]
    assert own["resourceNames"] == ["mantle-ca"]


def test_destination_answers_this_mode_only_where_it_is_installed() -> None:
    def args(tls: str) -> list[str]:
        (deployment,) = [
            o for o in installed(tls) if o["kind"] == "Deployment" and o["metadata"]["name"] == "mantle-destination"
        ]
        return next(
            c["args"] for c in deployment["spec"]["template"]["spec"]["containers"] if c["name"] == "destination"
        )

    assert "--tls=optional" in args("optional")
    assert not [arg for arg in args("required") if arg.startswith("--tls")]
