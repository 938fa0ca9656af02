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

SECONDS = 60
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
