"""The issuer as the kubelet mounts it: a Secret of cert-manager's form, swapped under the running program."""

from datetime import UTC, datetime
from pathlib import Path

from mantle.control.identity import IssuerFiles
from mantle.core import ca
from mantle.core.names import MeshNames
from mantle.manifests.config import InstallValues
from mantle.manifests.render import TrustMaterial, install_objects
from mantle.platform.port import Event

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
NAMES = MeshNames("mantle", "cluster.local")


def trust(serial: bytes) -> ca.Trust:
    return ca.make_trust(NAMES, NOW, (b"r" * 16, serial * 16))


def mount(directory: Path, revision: int, secret: dict[str, bytes], items: list[dict[str, str]]) -> None:
    """What the kubelet does: a new directory, links through `..data`, which is replaced by a rename."""
    fresh = directory / f"..{revision}"
    fresh.mkdir(parents=True)
    for item in items:
        (fresh / item["path"]).write_bytes(secret[item["key"]])
        link = directory / item["path"]
        if not link.is_symlink():
            link.symlink_to(Path("..data") / item["path"])
    (directory / "..data_tmp").symlink_to(fresh.name)
    (directory / "..data_tmp").rename(directory / "..data")


def test_a_renewed_secret_of_cert_managers_form_is_taken_without_a_restart(tmp_path: Path):
    objects = install_objects(InstallValues(external_issuer=True), TrustMaterial("-"))
    (identity,) = [o for o in objects if o["kind"] == "Deployment" and o["metadata"]["name"] == "mantle-identity"]
    (volume,) = [v for v in identity["spec"]["template"]["spec"]["volumes"] if v["name"] == "issuer"]
    items = volume["secret"]["items"]
    one, two = trust(b"1"), trust(b"2")
    roots = tmp_path / "ca-bundle.crt"
    roots.write_bytes(one.roots_pem + two.roots_pem)

    def secret(issuer: bytes, key: bytes) -> dict[str, bytes]:
        return {"tls.crt": issuer, "tls.key": key, "ca.crt": one.roots_pem}

    told: list[Event] = []
    mounted = tmp_path / "issuer"
    mount(mounted, 1, secret(one.issuer_pem, one.issuer_key_pem), items)
    assert sorted(path.name for path in mounted.iterdir()) == [
        "..1",
        "..data",
        "crt.pem",
        "key.pem",
    ]  # no roots, no other names
    files = IssuerFiles(mounted / "crt.pem", mounted / "key.pem", roots, told.append)

    files.refresh()
    first = files.current
    assert isinstance(first, ca.Issuer)
    files.refresh()
    assert files.current is first

    mount(mounted, 2, secret(two.issuer_pem, two.issuer_key_pem), items)
    files.refresh()
    second = files.current
    assert isinstance(second, ca.Issuer) and second.certificate != first.certificate

    mount(mounted, 3, secret(one.issuer_pem, two.issuer_key_pem), items)
    files.refresh()
    assert files.current is second, "a Secret whose key is another's must not replace an issuer that works"
    assert [(event.reason, event.warning) for event in told] == [
        ("IssuerUpdated", False),
        ("IssuerUpdateSkipped", True),
    ]
