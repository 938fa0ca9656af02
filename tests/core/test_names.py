"""Names of workloads: built, taken apart, refused with a reason."""

import pytest

from mantle.core.names import BadName, MeshNames, Workload, mesh_names
from mantle.core.reasons import NameRefused

MESH = MeshNames("mantle", "cluster.local")
SUFFIX = ".serviceaccount.identity.mantle.cluster.local"


@pytest.mark.parametrize(
    "workload",
    [
        Workload("emojivoto", "web"),
        Workload("emojivoto", "web.v2.blue"),
        Workload("serviceaccount", "identity"),
        Workload("a", "serviceaccount.identity.mantle.cluster.local"),
        Workload("n" * 63, "s" * 63),
    ],
)
def test_a_name_is_taken_apart_as_it_was_built(workload: Workload) -> None:
    name = MESH.identity(workload)
    assert isinstance(name, str)
    assert MESH.parse_identity(name) == workload
    assert MESH.parse_spiffe(MESH.spiffe(workload)) == workload


def test_the_form_is_linkerds_and_spiffes() -> None:
    web = Workload("emojivoto", "web")
    assert MESH.identity(web) == "web.emojivoto.serviceaccount.identity.mantle.cluster.local"
    assert MESH.spiffe(web) == "spiffe://cluster.local/ns/emojivoto/sa/web"
    assert str(web) == "web.emojivoto"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", NameRefused.EMPTY),
        ("web.emojivoto.serviceaccount.identity.linkerd.cluster.local", NameRefused.OTHER_MESH),
        ("web.emojivoto.serviceaccount.identity.mantle.cluster.local.evil", NameRefused.OTHER_MESH),
        ("web" + SUFFIX, NameRefused.MISSING_PART),
        (SUFFIX, NameRefused.MISSING_PART),
        ("web.Emojivoto" + SUFFIX, NameRefused.NOT_A_LABEL),
        ("web." + SUFFIX, NameRefused.NOT_A_LABEL),
        ("-web.emojivoto" + SUFFIX, NameRefused.NOT_A_SUBDOMAIN),
        ("web..emojivoto" + SUFFIX, NameRefused.NOT_A_SUBDOMAIN),
        ("web\n.emojivoto" + SUFFIX, NameRefused.NOT_A_SUBDOMAIN),
        ("*.emojivoto" + SUFFIX, NameRefused.NOT_A_SUBDOMAIN),
        ("a" * 250 + ".b" + SUFFIX, NameRefused.TOO_LONG),
    ],
)
def test_what_is_not_a_name_of_this_mesh_says_why(name: str, reason: NameRefused) -> None:
    parsed = MESH.parse_identity(name)
    assert isinstance(parsed, BadName)
    assert parsed.reason is reason
    assert parsed.wanted


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("", NameRefused.EMPTY),
        ("spiffe://other.example/ns/a/sa/b", NameRefused.OTHER_MESH),
        ("spiffe://cluster.local.evil/ns/a/sa/b", NameRefused.OTHER_MESH),
        ("spiffe://cluster.local/ns/a", NameRefused.MISSING_PART),
        ("spiffe://cluster.local/ns/a/sa/b/c", NameRefused.MISSING_PART),
        ("spiffe://cluster.local/ns/a.b/sa/c", NameRefused.NOT_A_LABEL),
        ("spiffe://cluster.local/ns/a/sa/", NameRefused.NOT_A_SUBDOMAIN),
    ],
)
def test_what_is_not_a_spiffe_id_of_this_mesh_says_why(uri: str, reason: NameRefused) -> None:
    parsed = MESH.parse_spiffe(uri)
    assert isinstance(parsed, BadName)
    assert parsed.reason is reason


def test_a_name_that_would_be_too_long_is_refused_before_a_certificate_carries_it() -> None:
    long = Workload("ns", ".".join(["a" * 60] * 4))
    name = MESH.identity(long)
    assert isinstance(name, BadName)
    assert name.reason is NameRefused.TOO_LONG


def test_the_parts_of_a_mesh_are_checked() -> None:
    assert mesh_names("mantle", "cluster.local") == MESH
    bad = mesh_names("man.tle", "cluster.local")
    assert isinstance(bad, BadName) and bad.reason is NameRefused.NOT_A_LABEL
    bad = mesh_names("mantle", "cluster..local")
    assert isinstance(bad, BadName) and bad.reason is NameRefused.NOT_A_SUBDOMAIN
