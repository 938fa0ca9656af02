"""The experimental mode's proxies: key and certificate from files, plaintext without, and nobody else trusts them."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest

from mantle.core import ca
from mantle.core import optional_tls as tls
from mantle.core.names import MeshNames
from mantle.core.optional_names import OptionalNames, Owner

from .apps import http_client, http_server
from .harness import SRC, WEB, Mesh, Pod, wait_for

pytestmark = [pytest.mark.mesh, pytest.mark.root]

NAMES = OptionalNames(MeshNames("mantle", "cluster.local"))


class Authority:
    """The ca, without a cluster: it puts an owner's material where the pod's Secret would be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = tls.new_authority(NAMES, datetime.now(UTC), (secrets.token_bytes(16), secrets.token_bytes(16)))
        trust = self.authority.trust
        issuer = ca.load_issuer(trust.issuer_pem, trust.issuer_key_pem, trust.roots_pem)
        assert isinstance(issuer, ca.Issuer)
        valid = ca.check_issuer(issuer, datetime.now(UTC))
        assert isinstance(valid, ca.ValidIssuer)
        self.valid = valid

    def secret(self, name: str) -> Path:
        path = self.folder / f"secret-{name}"
        path.mkdir(exist_ok=True)
        return path

    def distribute(self, name: str, namespace: str = "test") -> None:
        now = datetime.now(UTC)
        owner = Owner(namespace, "deployment", name)
        made = tls.issue(self.valid, self.authority, owner, NAMES, now, secrets.token_bytes(16))
        assert isinstance(made, tls.Material)
        for file, content in ((tls.CERTIFICATE, made.chain_pem), (tls.KEY, made.key_pem), (tls.ROOTS, made.bundle)):
            (self.secret(name) / file).write_bytes(content)

    def pod(self, mesh: Mesh, name: str, ports: tuple[int, ...] = ()) -> Pod:
        env = {
            "IDENTITY_FILES": str(self.secret(name)),
            "IDENTITY_FILES_SUFFIX": NAMES.suffix,
            "IDENTITY_LOCAL_NAME": identity(name),
            "TAP_SVC_NAME": str(NAMES.identity(NAMES.observer)),
        }
        labels, annotations = {"mantle.dev/tls": "optional"}, {"mantle.dev/tls-owner": f"deployment/{name}"}
        return mesh.pod(name, ports=ports, labels=labels, annotations=annotations, env=env)


def identity(name: str) -> str:
    found = NAMES.identity(Owner("test", "deployment", name))
    assert isinstance(found, str)
    return found


@pytest.fixture
def mesh(tmp_path: Path, mantle_proxy: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path, mantle_proxy) as mesh:
        yield mesh


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def served(pod: Pod) -> bool:
    with http_client(pod.connect(WEB, 80)) as http:
        http.request("GET", "/headers")
        return http.getresponse().read() != b""


def requests(pod: Pod, **labels: str) -> float:
    return pod.metric("request_total", **labels)


def served_as(pod: Pod, **labels: str) -> None:
    """Asks until requests are counted with these labels: what was read of files arrives a moment after the log."""

    def so() -> bool:
        assert served(pod), "no request is lost"
        return requests(pod, direction="outbound", **labels) >= 1

    wait_for(so, f"a request with {labels}", log=pod.metrics)


def test_with_material_at_both_ends_it_is_mutual_tls(mesh: Mesh, authority: Authority) -> None:
    authority.distribute("client")
    authority.distribute("web")
    client, web = authority.pod(mesh, "client"), authority.pod(mesh, "web", (8080,))
    mesh.service("web", WEB, {80: 8080})
    mesh.start()
    with http_server(web.listen(8080)):
        assert served(client)
    client.counts(1, "request_total", direction="outbound", tls="true", server_id=identity("web"))
    web.counts(1, "request_total", direction="inbound", tls="true", client_id=identity("client"))


def test_without_material_it_is_plaintext_that_says_so_and_tls_as_soon_as_there_is_some(
    mesh: Mesh, authority: Authority
) -> None:
    authority.distribute("web")
    client, web = authority.pod(mesh, "client"), authority.pod(mesh, "web", (8080,))
    mesh.service("web", WEB, {80: 8080})
    mesh.start()
    with http_server(web.listen(8080)):
        assert served(client)
        client.counts(1, "request_total", direction="outbound", tls="no_identity", no_tls_reason="fail_open")
        web.counts(1, "request_total", direction="inbound", tls="no_identity", no_tls_reason="not_provided_by_remote")
        authority.distribute("client")
        wait_for(lambda: "TLS material read" in client.log(), "the client to read its Secret", log=client.log)
        served_as(client, tls="true", server_id=identity("web"))


def test_a_peer_without_material_is_spoken_to_in_plaintext(mesh: Mesh, authority: Authority) -> None:
    authority.distribute("client")
    client, web = authority.pod(mesh, "client"), authority.pod(mesh, "web", (8080,))
    mesh.service("web", WEB, {80: 8080})
    mesh.start()
    with http_server(web.listen(8080)):
        for _ in range(3):
            assert served(client), client.log()
    client.counts(3, "request_total", direction="outbound", no_tls_reason="fail_open")
    assert "no TLS with this peer" in client.log()


def test_a_certificate_of_another_root_is_worth_nothing_and_breaks_nothing(mesh: Mesh, authority: Authority) -> None:
    authority.distribute("client")
    other = Authority(authority.folder)
    other.distribute("web")
    client, web = authority.pod(mesh, "client"), authority.pod(mesh, "web", (8080,))
    mesh.service("web", WEB, {80: 8080})
    mesh.start()
    with http_server(web.listen(8080)):
        assert served(client)
    client.counts(0, "request_total", direction="outbound", tls="true")
    web.counts(0, "request_total", direction="inbound", tls="true")


@pytest.mark.parametrize("optional", ["client", "web"])
def test_the_two_modes_speak_plaintext_with_each_other(mesh: Mesh, authority: Authority, optional: str) -> None:
    authority.distribute(optional)
    client = authority.pod(mesh, "client") if optional == "client" else mesh.pod("client")
    web = authority.pod(mesh, "web", (8080,)) if optional == "web" else mesh.pod("web", ports=[8080])
    mesh.service("web", WEB, {80: 8080})
    mesh.start()
    with http_server(web.listen(8080)):
        assert served(client)
    reason = "not_provided_by_service_discovery"
    client.counts(1, "request_total", direction="outbound", tls="no_identity", no_tls_reason=reason)


def test_a_pod_on_its_way_to_the_default_mode_accepts_the_listed_identities_until_the_list_is_gone(
    mesh: Mesh, authority: Authority, tmp_path: Path
) -> None:
    authority.distribute("client")
    client = authority.pod(mesh, "client")
    listed = tmp_path / "migration"
    listed.mkdir()
    (listed / "ca.crt").write_bytes(authority.authority.bundle)
    (listed / "identities").write_text(identity("client") + "\n")
    until = datetime.now(UTC) + timedelta(minutes=10)
    env = {
        "IDENTITY_MIGRATION": str(listed),
        "IDENTITY_MIGRATION_ROOTS": sha256(authority.authority.bundle).hexdigest(),
        "IDENTITY_MIGRATION_UNTIL": str(int(until.timestamp())),
        "IDENTITY_FILES_SUFFIX": NAMES.suffix,
    }
    annotations = {"mantle.dev/tls-migration": f"sha256:{'a' * 64} until:{until.isoformat()}"}
    web = mesh.pod("web", ports=[8080], annotations=annotations, env=env)
    mesh.service("web", WEB, {80: 8080})
    mesh.start()
    web_name = "web.test.serviceaccount.identity.mantle.cluster.local"
    with http_server(web.listen(8080)):
        assert served(client)
        client.counts(1, "request_total", direction="outbound", tls="true", server_id=web_name)
        web.counts(1, "request_total", direction="inbound", tls="true", client_id=identity("client"))
        (listed / "identities").unlink()
        wait_for(lambda: "accepted, or no more" in web.log(), "the migration to end", log=web.log)
        served_as(client, no_tls_reason="fail_open")
        over = requests(web, direction="inbound", tls="true")
        assert served(client) and served(client)
    assert requests(web, direction="inbound", tls="true") == over, "its identity is accepted no more"


LOOK = """
import asyncio, sys
from pathlib import Path
from mantle.core.model import Key, Owner, Pod
from mantle.core.names import MeshNames
from mantle.viz.observer import Observer
from mantle.viz.proxies import Proxies

async def main():
    names = MeshNames("mantle", "cluster.local")
    labels, annotations = {"mantle.dev/tls": "optional"}, {"mantle.dev/tls-owner": "deployment/web"}
    pod = Pod(Key("test", "web"), "u", sys.argv[2], "web", Owner("Deployment", "web"), labels, annotations)
    async with Proxies(names, Observer(names, Path(sys.argv[1]))) as proxies:
        for row in await proxies._clients(pod):
            print(row.client_id, row.total)

asyncio.run(main())
"""


def test_only_viz_with_its_certificate_of_this_mode_may_look_into_a_proxy_of_it(
    mesh: Mesh, authority: Authority
) -> None:
    authority.distribute("client")
    authority.distribute("web")
    authority.distribute("mantle-viz", "mantle")
    client, web = authority.pod(mesh, "client"), authority.pod(mesh, "web", (8080,))
    viz = mesh.pod("viz", meshed=False)
    mesh.service("web", WEB, {80: 8080})
    mesh.start()
    environment = {"PYTHONPATH": str(SRC), "PATH": os.environ["PATH"]}
    with http_server(web.listen(8080)):
        assert served(client)
    look = (sys.executable, "-c", LOOK, str(authority.secret("mantle-viz")), web.ip)
    looked = lambda: viz.run(*look, env=environment)  # noqa: E731
    wait_for(
        lambda: looked().stdout == f"{identity('client')} 1\n", "viz to see it", log=lambda: looked().stderr[-2000:]
    )
    other = viz.run(sys.executable, "-c", LOOK, str(authority.secret("client")), web.ip, env=environment)
    assert other.returncode != 0 and other.stdout == ""
    assert "Unreachable" in other.stderr
