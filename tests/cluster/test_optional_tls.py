"""The experimental mode, from the command to the Secret: a real API server, the injector it calls, and the ca."""

import asyncio
import base64
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography import x509
from prometheus_client import CollectorRegistry

from mantle.control import ca as program
from mantle.control.ca_api import PODS, Api
from mantle.control.program import now
from mantle.core.names import MeshNames
from mantle.core.optional_names import OptionalNames
from mantle.manifests.config import InstallValues
from mantle.manifests.render import TrustMaterial, install_objects
from mantle.platform.kubernetes.client import from_kubeconfig
from mantle.platform.kubernetes.reflector import Reflector

from .apiserver import ApiServer
from .injecting import NAMESPACE, ROOTS, Mesh, deployment, eventually

SECONDS = 180
WISH = {"mantle.dev/inject": "enabled", "config.mantle.dev/tls": "optional"}


class WithCa(Mesh):
    """A mesh that was installed with `--tls=optional`."""

    def objects(self) -> list[dict[str, Any]]:
        made = install_objects(InstallValues(tls="optional"), TrustMaterial(ROOTS))
        for obj in made:
            for hook in obj.get("webhooks", []):
                hook["clientConfig"] = {"url": f"https://localhost:{self.port}/"}
        return [obj for obj in made if obj["kind"] not in ("Deployment", "Service", "APIService", "Secret")]


@pytest.fixture(scope="module")
def mesh(api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    mesh = WithCa(api_server, tmp_path_factory.mktemp("injector"))
    mesh.install()
    try:
        mesh.start()
        mesh.in_effect(mesh.namespace())
        yield mesh
    finally:
        for replica in list(mesh.replicas):
            mesh.stop(replica)
        mesh.uninstall()


async def distributed(api_server: ApiServer, pods: int) -> None:
    """The ca, with its own rights, until it has seen as many pods and done what is due."""
    names = OptionalNames(MeshNames(NAMESPACE, "cluster.local"))
    async with from_kubeconfig(api_server.kubeconfig_of(NAMESPACE, "mantle-ca")) as client:
        api = Api(client.http, NAMESPACE)
        authorities = program.Authorities(api, names, "1.2.3", now, os.urandom)
        changed = asyncio.Event()
        reflector = Reflector(client.http, PODS, lambda _: changed.set())
        metrics = program.Metrics(CollectorRegistry(), authorities)
        distributor = program.Distributor(api, authorities, reflector.objects, metrics, now, os.urandom)
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(reflector.run())
            await reflector.synced.wait()
            while len(reflector.objects) < pods:
                await changed.wait()
                changed.clear()
            await distributor.look()
            running.cancel()


def test_a_deployments_pods_mount_the_secret_that_the_ca_makes_for_it(api_server: ApiServer, mesh: Mesh) -> None:
    namespace = mesh.namespace(annotations=WISH)
    mesh.create(namespace, deployment("web", replicas=2))

    def both() -> list[dict[str, Any]]:
        items = json.loads(api_server.kubectl("-n", namespace, "get", "pods", "-o", "json"))["items"]
        return items if len(items) == 2 else []

    made = eventually(both)
    asyncio.run(distributed(api_server, 2))
    for pod in made:
        (volume,) = [v for v in pod["spec"]["volumes"] if v["name"] == "mantle-tls-optional"]
        assert volume["secret"]["secretName"] == "web-deployment-tls-mantle"
        assert volume["secret"]["optional"] is True
        (sidecar,) = [c for c in pod["spec"]["initContainers"] if c["name"] == "mantle-proxy"]
        env = {e["name"]: e.get("value") for e in sidecar["env"]}
    secret = json.loads(api_server.kubectl("-n", namespace, "get", "secret", "web-deployment-tls-mantle", "-o", "json"))
    leaf = x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))
    (name,) = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        x509.DNSName
    )
    assert env["MANTLE_PROXY_IDENTITY_LOCAL_NAME"].replace("$(_pod_ns)", namespace) == name
    (owner,) = secret["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("Deployment", "web")


def test_a_secret_ends_with_its_deployment(api_server: ApiServer, mesh: Mesh) -> None:
    namespace = mesh.namespace(annotations=WISH)
    mesh.create(namespace, deployment("gone", replicas=1))
    eventually(lambda: "pod/" in api_server.kubectl("-n", namespace, "get", "pods", "-o", "name"))
    asyncio.run(distributed(api_server, 1))
    secrets = ("-n", namespace, "get", "secrets", "-o", "name")
    assert "secret/gone-deployment-tls-mantle" in api_server.kubectl(*secrets)
    api_server.kubectl("-n", namespace, "delete", "deployment", "gone", "--wait=false")
    eventually(lambda: "gone-deployment" not in api_server.kubectl(*secrets), seconds=SECONDS)


def test_a_pod_whose_name_is_not_known_beforehand_is_refused_with_what_to_do(mesh: Mesh) -> None:
    """Its Secret could not be named."""
    spec = {"containers": [{"name": "app", "image": "acme/app"}]}
    bare = {"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "x-", "annotations": WISH}, "spec": spec}
    assert "a pod with a name or a controller" in mesh.refusal(mesh.namespace(), bare)


# ---- what the ca may write ----


class AsCa:
    """What the API server says to the ca's own account, whatever program speaks for it."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self._who = ("--kubeconfig", str(server.kubeconfig_of(NAMESPACE, "mantle-ca")))

    def says(self, *args: str, body: dict[str, Any] | None = None) -> str:
        """Why it is refused; empty if it is not."""
        text = None if body is None else json.dumps(body)
        try:
            self._server.kubectl(*self._who, *args, input=text)
        except AssertionError as error:
            return str(error)
        return ""

    def create(self, secret: dict[str, Any], dry: bool = False) -> str:
        path = f"/api/v1/namespaces/{secret['metadata']['namespace']}/secrets"
        return self.says("create", "--raw", path + ("?dryRun=All" if dry else ""), "-f", "-", body=secret)

    def replace(self, secret: dict[str, Any]) -> str:
        meta = secret["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/secrets/{meta['name']}"
        return self.says("replace", "--raw", path, "-f", "-", body=secret)


def a_secret(namespace: str, name: str, kind: str = "kubernetes.io/tls", labelled: bool = True) -> dict[str, Any]:
    labels = {"mantle.dev/tls": "optional"} if labelled else {}
    metadata = {"namespace": namespace, "name": name, "labels": labels}
    data = {"tls.crt": "", "tls.key": ""}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": kind, "data": data}


OWN_NAME, FOREIGN, ELSEWHERE = "may write Secrets of type", "not mantle-ca's", "in the control namespace"


@pytest.fixture
def as_ca(api_server: ApiServer, mesh: Mesh) -> AsCa:
    """The ca's account, once the API server narrows what it may do: a moment after the policy was applied."""
    ca = AsCa(api_server)
    for probe, refusal in (
        (a_secret("default", "anything", "Opaque"), OWN_NAME),
        (a_secret(NAMESPACE, "any-deployment-tls-mantle"), ELSEWHERE),
    ):
        eventually(lambda probe=probe, refusal=refusal: refusal in ca.create(probe, dry=True), seconds=SECONDS)  # type: ignore[misc]
    return ca


def test_the_ca_can_neither_read_nor_change_the_issuer_or_any_secret_that_is_not_its_own(
    api_server: ApiServer, mesh: Mesh, as_ca: AsCa
) -> None:
    namespace = mesh.namespace()
    issuer = a_secret(NAMESPACE, "mantle-identity-issuer", labelled=False)
    ingress = a_secret(namespace, "web-deployment-tls-mantle", labelled=False)
    theirs = a_secret(namespace, "password", "Opaque", labelled=False)
    for secret in (issuer, ingress, theirs):
        mesh.create(secret["metadata"]["namespace"], secret)
    try:
        before = [stored(api_server, secret) for secret in (issuer, ingress, theirs)]
        for secret in (issuer, ingress, theirs):
            where, name = ("-n", secret["metadata"]["namespace"]), f"secret/{secret['metadata']['name']}"
            for verb in (("get",), ("delete",), ("patch", "-p", "{}")):
                assert "forbidden" in as_ca.says(*where, verb[0], name, *verb[1:]), verb
        assert "forbidden" in as_ca.says("get", "secrets", "-A")
        # With its own name and label, or without, or passed off as one of the mode's.
        assert OWN_NAME in as_ca.replace(issuer)
        assert OWN_NAME in as_ca.replace(a_secret(NAMESPACE, "mantle-identity-issuer"))
        assert OWN_NAME in as_ca.replace(theirs)
        assert FOREIGN in as_ca.replace(a_secret(namespace, "web-deployment-tls-mantle"))
        token = a_secret(namespace, "default-tls-mantle", "kubernetes.io/service-account-token")
        token["metadata"]["annotations"] = {"kubernetes.io/service-account.name": "default"}
        assert OWN_NAME in as_ca.create(token), "the cluster would put a token into it"
        assert ELSEWHERE in as_ca.create(a_secret(NAMESPACE, "mantle-viz-tls-mantle"))
        assert [stored(api_server, secret) for secret in (issuer, ingress, theirs)] == before
    finally:
        api_server.kubectl("-n", NAMESPACE, "delete", "secret", "mantle-identity-issuer")


def test_the_ca_makes_and_replaces_what_is_its_own(mesh: Mesh, as_ca: AsCa) -> None:
    namespace = mesh.namespace()
    own = a_secret(namespace, "api-deployment-tls-mantle")
    assert as_ca.create(own) == ""
    assert as_ca.replace(own) == ""
    observer = a_secret(NAMESPACE, "mantle-viz-deployment-tls-mantle")
    assert "already exists" in as_ca.create(observer) or as_ca.replace(observer) == ""


def stored(server: ApiServer, secret: dict[str, Any]) -> str:
    meta = secret["metadata"]
    return server.kubectl("-n", meta["namespace"], "get", "secret", meta["name"], "-o", "json")
