"""`mantle check` and the experimental mode's `ca` against a real API server, each with the rights it is given."""

import asyncio
import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from prometheus_client import CollectorRegistry

from mantle.control import ca as program
from mantle.control.ca_api import PODS, Api, Refused
from mantle.core.names import MeshNames
from mantle.core.optional_names import OptionalNames
from mantle.platform.kubernetes.client import from_kubeconfig
from mantle.platform.kubernetes.reflector import Reflector

from .apiserver import ApiServer
from .injecting import eventually

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180


def mantle(api_server: ApiServer, *args: str, kubeconfig: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mantle", *args, f"--kubeconfig={kubeconfig or api_server.kubeconfig}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT, env=_environment())


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}


def checked(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """By id: result and reason."""
    assert done.stdout, done.stderr
    categories = json.loads(done.stdout)["categories"]
    return {c["id"]: (c["result"], c.get("error", "")) for category in categories for c in category["checks"]}


def install(api_server: ApiServer, namespace: str, *args: str) -> None:
    """The control plane's objects in a namespace of their own. Nothing of them runs here."""
    made = mantle(api_server, "install", "--set", f"controlNamespace={namespace}", *args)
    assert made.returncode == 0, made.stderr
    api_server.kubectl("apply", "-f", "-", input=made.stdout)


@pytest.fixture(scope="module")
def installed(api_server: ApiServer) -> str:
    """A control namespace with the experimental mode."""
    namespace = api_server.new_namespace("check")
    install(api_server, namespace, "--tls=optional")
    return namespace


def test_an_empty_namespace_is_ready_for_an_installation(api_server: ApiServer) -> None:
    done = mantle(api_server, "check", "--pre", "-o", "json", "-n", "not-there-yet")
    assert done.returncode == 0, done.stdout
    assert {result for result, _ in checked(done).values()} <= {"success", "warning"}


def test_who_may_not_install_is_told_each_right_that_is_missing(api_server: ApiServer) -> None:
    namespace = api_server.new_namespace("poor")
    kubeconfig = api_server.kubeconfig_of(namespace, "default")
    found = checked(mantle(api_server, "check", "--pre", "-o", "json", "-n", namespace, kubeconfig=kubeconfig))
    result, reason = found["pre-rights"]
    assert result == "error"
    assert f"create secrets in {namespace}" in reason and "create clusterroles.rbac" in reason


def test_nothing_installed_is_said_with_the_command_that_changes_it(api_server: ApiServer) -> None:
    namespace = api_server.new_namespace("empty")
    done = mantle(api_server, "check", "-n", namespace)
    assert done.returncode == 1
    assert "there is no ConfigMap mantle-config" in done.stdout
    assert "fix: `mantle install | kubectl apply -f -`" in done.stdout


def test_an_installation_is_compared_with_what_it_should_be(api_server: ApiServer, installed: str) -> None:
    found = checked(mantle(api_server, "check", "-o", "json", "-n", installed))
    good = ("install-config", "install-objects", "install-version", "issuer-chain", "trust-roots-valid", "clock-here")
    assert {id: found[id][0] for id in good} == dict.fromkeys(good, "success")
    assert found["install-optional"][0] == "warning"
    # Nothing runs here, and this is what is said of it.
    assert found["control-ready"][0] == "error"
    assert found["identity-ready"] == ("error", "it has no running pod")

    def views() -> bool:
        """The API server looks for the Service first, and for somebody behind it a moment later."""
        said = checked(mantle(api_server, "check", "-o", "json", "-n", installed))["views-api"][1]
        return "MissingEndpoints" in said or "never reached" in said

    eventually(views)
    api_server.kubectl("-n", installed, "delete", "service", "mantle-destination")
    found = checked(mantle(api_server, "check", "-o", "json", "-n", installed))
    assert found["install-objects"] == ("error", f"Service {installed}/mantle-destination is missing")


def test_pods_that_missed_the_injector_are_found(api_server: ApiServer, installed: str) -> None:
    namespace = api_server.new_namespace("missed")
    api_server.kubectl("annotate", "namespace", namespace, "mantle.dev/inject=enabled")
    api_server.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=baseline")
    api_server.kubectl("-n", namespace, "create", "serviceaccount", "web")
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web", "namespace": namespace},
        "spec": {"serviceAccountName": "web", "containers": [{"name": "app", "image": "acme/web"}]},
    }
    # As while the injector is away: the webhook fails open.
    api_server.kubectl("apply", "-f", "-", input=json.dumps(pod))
    found = checked(mantle(api_server, "check", "-o", "json", "-n", installed))
    assert found["pods-meshed"][0] == "error" and f"{namespace}/web" in found["pods-meshed"][1]
    assert found["pods-security"] == ("error", f"{namespace} enforces baseline")


def test_proxies_of_one_namespace_are_asked_about_and_the_control_plane_is_found(
    api_server: ApiServer, installed: str
) -> None:
    namespace = api_server.new_namespace("shop")
    found = checked(mantle(api_server, "check", "--proxy", "-o", "json", "-n", namespace))
    assert found["install-config"][0] == "success", "the control plane is found by its label"
    assert found["proxy-namespace"] == ("error", f"no pod of {namespace} has a proxy")
    assert found["pods-meshed"][0] == "success", "pods of other namespaces are not asked about"
    assert found["views-answer"][0] == "error", "nothing runs here"
    assert "proxy-namespace" not in checked(mantle(api_server, "check", "--proxy", "-o", "json"))
    elsewhere = mantle(api_server, "check", "--proxy", "-o", "json", "--control-namespace", namespace)
    assert checked(elsewhere)["install-config"][0] == "error"


def test_an_applications_people_see_their_namespace_and_no_more(api_server: ApiServer, installed: str) -> None:
    namespace = api_server.new_namespace("shop")
    api_server.kubectl("-n", namespace, "create", "serviceaccount", "dev")
    api_server.kubectl("-n", namespace, "create", "rolebinding", "dev", "--clusterrole=view",
                       f"--serviceaccount={namespace}:dev")  # fmt: skip
    pod = {"name": "web", "namespace": namespace, "labels": {"mantle.dev/inject": "enabled"}}
    spec = {"containers": [{"name": "app", "image": "acme/web"}]}
    api_server.kubectl(
        "apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": pod, "spec": spec})
    )
    dev = api_server.kubeconfig_of(namespace, "dev")
    asking = "check", "--proxy", "-n", namespace, "-o", "json"
    # The API server learns of a new binding a moment after it was made.
    eventually(lambda: "pods-labels" in checked(mantle(api_server, *asking, kubeconfig=dev)), 60)
    found = checked(mantle(api_server, *asking, kubeconfig=dev))
    assert found["install-config"][0] == "warning" and "forbidden" in found["install-config"][1]
    assert found["pods-labels"] == ("warning", f"pod {namespace}/web has it as a label"), "its pods were read"
    assert found["proxy-namespace"] == ("error", f"no pod of {namespace} has a proxy")
    whole = mantle(api_server, "check", "-o", "json", kubeconfig=dev)
    assert (whole.returncode, checked(whole)["install-config"][0]) == (1, "error")


def test_the_meshs_version_is_found_wherever_its_control_plane_lives(api_server: ApiServer, installed: str) -> None:
    found = json.loads(mantle(api_server, "version", "-o", "json").stdout)
    assert found["mesh"]["version"] == found["client"]


# ---- the ca, as its own service account ----


async def test_the_ca_makes_secrets_with_exactly_the_rights_it_is_given(api_server: ApiServer, installed: str) -> None:
    namespace = api_server.new_namespace("optional")
    api_server.kubectl("-n", namespace, "create", "serviceaccount", "web")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "web-1",
            "namespace": namespace,
            "labels": {"mantle.dev/tls": "optional"},
            "annotations": {"mantle.dev/tls-owner": "pod/web-1"},
        },
        "spec": {"serviceAccountName": "web", "containers": [{"name": "app", "image": "acme/web"}]},
    }
    names = OptionalNames(MeshNames(installed, "cluster.local"))
    kubeconfig = api_server.kubeconfig_of(installed, "mantle-ca")
    async with from_kubeconfig(kubeconfig) as client:
        api = Api(client.http, installed)
        authorities = program.Authorities(api, names, "1.2.3", program_now, os.urandom)
        changed = asyncio.Event()
        reflector = Reflector(client.http, PODS, lambda _: changed.set())
        distributor = program.Distributor(
            api,
            authorities,
            reflector.objects,
            program.Metrics(CollectorRegistry(), authorities),
            program_now,
            os.urandom,
        )
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(reflector.run())
            try:
                await reflector.synced.wait()
                await asyncio.to_thread(api_server.kubectl, "apply", "-f", "-", input=json.dumps(pod))
                while (namespace, "web-1") not in reflector.objects:
                    await changed.wait()
                    changed.clear()
                await distributor.look()
                secret = json.loads(
                    await asyncio.to_thread(
                        api_server.kubectl, "-n", namespace, "get", "secret", "web-1-pod-tls-mantle", "-o", "json"
                    )
                )
                leaf = x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))
                dns = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
                assert dns.get_values_for_type(x509.DNSName) == [
                    f"web-1.pod.{namespace}.optional.{installed}.cluster.local"
                ]
                assert [r["name"] for r in secret["metadata"]["ownerReferences"]] == ["web-1"]
                # Once more, as after a restart: the Secret there is replaced without having been read.
                distributor.issued.clear()
                await distributor.look()
                assert len(distributor.issued) >= 1
                with pytest.raises(Refused) as refused:
                    await api._ask("GET", f"/api/v1/namespaces/{namespace}/secrets/web-1-pod-tls-mantle")
                assert refused.value.code == 403
            finally:
                running.cancel()


def program_now() -> Any:
    from mantle.control.program import now

    return now()


def test_a_migration_moves_what_it_can_and_takes_the_list_away_again(api_server: ApiServer, installed: str) -> None:
    """No pod ever becomes ready here: the command must stop in time, say so, and leave nothing accepted."""
    namespace = api_server.new_namespace("moving")
    labels = {"app": "web", "mantle.dev/tls": "optional"}
    template = {
        "metadata": {"labels": labels, "annotations": {"mantle.dev/tls-owner": "deployment/web"}},
        "spec": {"containers": [{"name": "app", "image": "acme/web"}]},
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web", "namespace": namespace},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "web"}}, "template": template},
    }
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "web-deployment-tls-mantle", "namespace": namespace},
        "data": {"ca.crt": base64.b64encode(b"ROOTS").decode()},
    }
    api_server.kubectl(
        "apply", "-f", "-", input=json.dumps({"kind": "List", "apiVersion": "v1", "items": [deployment, secret]})
    )
    api_server.kubectl("-n", namespace, "wait", "--for=create", "--timeout=120s", "pod", "-l", "app=web")
    where = ("migrate-tls", "-n", namespace)  # where the mesh lives is found
    dry = mantle(api_server, *where, "--dry-run")
    assert (dry.returncode, dry.stdout) == (0, f"deployment/web of {namespace} is to be moved\n")
    done = mantle(api_server, *where, "--timeout", "2s")
    assert done.returncode == 1
    assert f"deployment/web of {namespace} was not moved in time" in done.stderr
    changed = json.loads(api_server.kubectl("-n", namespace, "get", "deployment", "web", "-o", "json"))
    annotations = changed["spec"]["template"]["metadata"]["annotations"]
    assert annotations["config.mantle.dev/tls"] == "required"
    assert annotations["mantle.dev/tls-migration"].startswith(f"sha256:{hashlib.sha256(b'ROOTS').hexdigest()} until:")
    assert "mantle-tls-migration" not in api_server.kubectl("-n", namespace, "get", "configmaps", "-o", "name")


@pytest.mark.parametrize("secret", ["mantle-identity-issuer", "mantle-injector-tls"])
def test_the_ca_may_read_no_secret_but_its_own(api_server: ApiServer, installed: str, secret: str) -> None:
    who = f"--as=system:serviceaccount:{installed}:mantle-ca"

    def may(name: str) -> str:
        command = [str(api_server.bins / "kubectl"), f"--kubeconfig={api_server.kubeconfig}", "auth", "can-i", "get",
                   f"secrets/{name}", "-n", installed, who]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False).stdout.strip()

    assert (may("mantle-ca"), may(secret)) == ("yes", "no")
