"""The views of a mesh through a real API server: aggregation, RBAC, and the commands that a user types.

viz runs on the host, as the service account and with the rules that `mantle install` gives it; no pod runs here.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_port

from mantle.manifests.config import InstallValues
from mantle.manifests.render import TrustMaterial, install_objects

from .apiserver import ApiServer
from .injecting import Replica, eventually

CONTROL = "views-control"
API_SERVICE = "v1alpha1.tap.mantle.dev"
ROOTS = "-----BEGIN CERTIFICATE-----\nroots\n-----END CERTIFICATE-----\n"


def own_address() -> str:
    """An address of this machine that is not loopback: an API server takes no other for an endpoint. What is sent there
    does not leave the machine.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return str(probe.getsockname()[0])


class Views:
    """A cluster with viz in it, and a namespace with one meshed pod that nobody answers for."""

    def __init__(self, api: ApiServer, directory: Path) -> None:
        self.api, self.port, self.admin = api, free_port(), free_port()
        self.host = own_address()
        self.log = directory / "viz.log"

    def objects(self) -> list[dict[str, Any]]:
        """What `mantle install` makes of viz; its Service leads to the host, where it runs."""
        made = install_objects(InstallValues(control_namespace=CONTROL), TrustMaterial(ROOTS))
        kinds = (
            "Namespace",
            "ServiceAccount",
            "ClusterRole",
            "ClusterRoleBinding",
            "Role",
            "RoleBinding",
            "APIService",
        )
        chosen = [obj for obj in made if obj["kind"] in kinds]
        for obj in chosen:
            if obj["kind"] == "APIService":
                obj["spec"]["service"]["port"] = self.port
        port = {"name": "tap-api", "port": self.port, "protocol": "TCP"}
        named = {"name": "mantle-viz", "namespace": CONTROL}
        service = {"apiVersion": "v1", "kind": "Service", "metadata": named, "spec": {"ports": [port]}}
        # The aggregator of this version asks for Endpoints, not for slices.
        subset = {"addresses": [{"ip": self.host}], "ports": [{"name": "tap-api", "port": self.port}]}
        leads_here = {"apiVersion": "v1", "kind": "Endpoints", "metadata": named, "subsets": [subset]}
        return [*chosen, service, leads_here]

    def apply(self) -> None:
        items = {"apiVersion": "v1", "kind": "List", "items": self.objects()}
        self.api.kubectl("apply", "-f", "-", input=json.dumps(items))

    def program(self) -> subprocess.Popen[bytes]:
        kubeconfig = self.api.kubeconfig_of(CONTROL, "mantle-viz")
        command = [sys.executable, "-m", "mantle.control_plane", "viz", "--platform=kubernetes"]
        command += [
            f"--listen={self.host}:{self.port}",
            f"--admin=127.0.0.1:{self.admin}",
            f"--kubeconfig={kubeconfig}",
        ]
        command += [f"--control-namespace={CONTROL}", "--scrape-interval=60"]
        with self.log.open("ab") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, env=dict(os.environ))

    def available(self) -> str:
        """The status of the APIService's condition."""
        condition = '{.status.conditions[?(@.type=="Available")].status}'
        return self.api.kubectl("get", "apiservice", API_SERVICE, "-o", f"jsonpath={condition}")

    def mantle(self, line: str, kubeconfig: Path | None = None) -> subprocess.CompletedProcess[str]:
        """One `mantle` command, as the administrator or with another kubeconfig."""
        words = [
            sys.executable,
            "-m",
            "mantle",
            *shlex.split(line),
            f"--kubeconfig={kubeconfig or self.api.kubeconfig}",
        ]
        return subprocess.run(words, capture_output=True, text=True, timeout=180, check=False)

    def meshed_pod(self, namespace: str) -> None:
        """A pod that says it is in the mesh; its address is of a network for documents, which nobody has."""
        pod: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": "web-1",
                "namespace": namespace,
                "labels": {"app": "web", "mantle.dev/control-plane-ns": CONTROL},
            },
            "spec": {"containers": [{"name": "mantle-proxy", "image": "x:1"}, {"name": "web", "image": "x:1"}]},
        }
        self.api.kubectl("create", "-f", "-", input=json.dumps(pod))
        started = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
        container = {"image": "x:1", "imageID": "", "ready": True, "restartCount": 0, "started": True, "state": started}
        status = {
            "phase": "Running",
            "podIP": "127.0.0.9",
            "podIPs": [{"ip": "127.0.0.9"}],
            "containerStatuses": [{"name": name, **container} for name in ("mantle-proxy", "web")],
        }
        patch = json.dumps({"status": status})
        self.api.kubectl("-n", namespace, "patch", "pod", "web-1", "--subresource=status", "--type=merge", "-p", patch)


@pytest.fixture(scope="module")
def views(api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Views]:
    found = Views(api_server, tmp_path_factory.mktemp("viz"))
    found.apply()
    viz = found.program()
    try:
        replica = Replica(found.admin, viz, found.log)
        eventually(lambda: replica.get("/ready")[0] == 200 or viz.poll() is not None)
        assert viz.poll() is None, found.log.read_text()
        eventually(lambda: found.available() == "True")
        yield found
    finally:
        viz.send_signal(signal.SIGTERM)
        try:
            viz.wait(60)
        finally:
            viz.kill()
            viz.wait(60)
        everything = [obj for obj in found.objects()[::-1] if obj["kind"] != "Namespace"]
        items = {"apiVersion": "v1", "kind": "List", "items": everything}
        api_server.kubectl("delete", "--ignore-not-found", "-f", "-", input=json.dumps(items))


@pytest.fixture
def namespace(views: Views) -> str:
    name = views.api.new_namespace("app")
    views.meshed_pod(name)
    eventually(lambda: "web-1" in views.mantle(f"stat po -n {name}").stdout)  # viz follows the API server
    return name


def test_the_api_server_takes_viz_for_an_api(views: Views) -> None:
    eventually(lambda: views.available() == "True")

    def resources() -> set[str]:
        return set(views.api.kubectl("api-resources", "--api-group=tap.mantle.dev", "-o", "name").split())

    eventually(lambda: resources() >= {"edges.tap.mantle.dev", "stat.tap.mantle.dev"})
    answer = json.loads(views.api.kubectl("get", "--raw", "/apis/tap.mantle.dev/v1alpha1/namespaces/default/edges"))
    assert answer["edges"] == []


def test_applying_the_manifests_again_keeps_the_bundle(views: Views) -> None:
    views.apply()
    assert views.api.kubectl("get", "apiservice", API_SERVICE, "-o", "jsonpath={.spec.caBundle}")
    eventually(lambda: views.available() == "True")


def test_the_views_of_the_administrator(views: Views, namespace: str) -> None:
    ended = views.mantle(f"edges deploy -n {namespace}")
    assert (ended.returncode, ended.stdout) == (0, "No edges found.\n"), ended.stderr
    assert ended.stderr.startswith(f"cluster {views.api.url} (context ")
    ended = views.mantle(f"stat po -n {namespace}")
    assert re.fullmatch(r"NAME +STATUS +MESHED .*\nweb-1 +Running +1/1 .*\n", ended.stdout), ended
    assert views.mantle(f"stat po -n {namespace} -l app=web").stdout == ended.stdout
    assert views.mantle(f"stat po -n {namespace} -l app!=web").stdout == "No traffic found.\n"
    assert f"\n{namespace} " in views.mantle("stat po -A").stdout
    rows = json.loads(views.mantle(f"stat all -n {namespace} -o json").stdout)
    assert [(row["kind"], row["name"]) for row in rows] == [("pod", "web-1")]


def granted(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """The words of the kubectl command that a refusal names."""
    assert ended.returncode == 1, ended
    found = re.search(r"  fix: somebody who may grant rights gives it with: kubectl (.*)\n", ended.stderr)
    assert found, ended.stderr
    return shlex.split(found[1])


def test_a_refusal_names_the_command_that_grants_it(views: Views, namespace: str) -> None:
    user = "alice@example.com"
    ended = views.mantle(f"tap po -n {namespace} --as {user}")
    assert f"error: user '{user}' may not watch pods/tap in API group tap.mantle.dev in namespace {namespace}\n" in (
        ended.stderr
    )
    views.api.kubectl(*granted(ended))
    # Allowed, which the API server knows a moment after it was granted: nobody answers at the pod's address.
    eventually(lambda: tapped(views, f"tap po -n {namespace} --as {user}").startswith(f"warning: {namespace}/web-1: "))
    # The right is of this namespace only, and of no other kind of thing.
    assert views.mantle(f"tap po -n default --as {user}").returncode == 1
    granted_all = granted(views.mantle(f"edges deploy -A --as {user}"))
    assert granted_all[:2] == ["create", "clusterrolebinding"]
    eventually(lambda: views.mantle(f"edges deploy -n {namespace} --as {user}").returncode == 0)
    everywhere = granted(views.mantle(f"tap po -A --as {user}"))
    assert everywhere[:2] == ["create", "clusterrolebinding"]
    views.api.kubectl(*everywhere)
    eventually(lambda: "/web-1: " in tapped(views, f"tap po -A --as {user}"))
    can = views.api.kubectl("auth", "can-i", "watch", "pods.tap.mantle.dev", "--subresource=tap", f"--as={user}",
                            "-n", namespace)  # fmt: skip
    assert can.strip() == "yes"


def tapped(views: Views, line: str) -> str:
    """What a tap that may watch says second on standard error: the first is where it watches."""
    words = [sys.executable, "-m", "mantle", *shlex.split(line), f"--kubeconfig={views.api.kubeconfig}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tap:
        try:
            assert tap.stderr is not None
            assert tap.stderr.readline().startswith("cluster ")
            return tap.stderr.readline()
        finally:
            tap.send_signal(signal.SIGINT)
            tap.wait(60)


def test_who_may_view_a_namespace_sees_its_edges_but_no_requests(views: Views, namespace: str) -> None:
    views.api.kubectl("-n", namespace, "create", "serviceaccount", "bob")
    views.api.kubectl("-n", namespace, "create", "rolebinding", "bob", "--clusterrole=view",
                      f"--serviceaccount={namespace}:bob")  # fmt: skip
    bob = views.api.kubeconfig_of(namespace, "bob")
    eventually(lambda: views.mantle(f"edges deploy -n {namespace}", bob).returncode == 0)
    ended = views.mantle(f"tap deploy/web -n {namespace}", bob)
    assert f"user 'system:serviceaccount:{namespace}:bob' may not watch deployments/tap" in ended.stderr
    views.api.kubectl(*granted(ended))
    nothing = "no pods to tap for type=deployment name=web"
    eventually(lambda: nothing in views.mantle(f"tap deploy/web -n {namespace}", bob).stderr)


def test_a_right_to_one_resource_is_a_right_to_that_one(views: Views, namespace: str) -> None:
    views.api.kubectl("-n", namespace, "create", "role", "one", "--verb=watch", "--resource=pods.tap.mantle.dev/tap",
                      "--resource-name=web-1")  # fmt: skip
    views.api.kubectl("-n", namespace, "create", "rolebinding", "one", "--role=one", "--user=carol")
    eventually(lambda: tapped(views, f"tap po/web-1 -n {namespace} --as carol").startswith("warning: "))
    granted(views.mantle(f"tap po/web-2 -n {namespace} --as carol"))
    granted(views.mantle(f"tap po -n {namespace} --as carol"))
    granted(views.mantle(f"tap ns/{namespace} --as carol"))


def test_groups_count(views: Views, namespace: str) -> None:
    views.api.kubectl("-n", namespace, "create", "rolebinding", "devs", "--clusterrole=mantle-viz-view", "--group=devs")
    eventually(lambda: views.mantle(f"edges deploy -n {namespace} --as dave --as-group devs").returncode == 0)
    granted(views.mantle(f"edges deploy -n {namespace} --as dave"))


@pytest.mark.parametrize("view", ["certificates", "proxymetrics", "policies"])
def test_a_right_in_one_namespace_reaches_no_pod_of_another(views: Views, namespace: str, view: str) -> None:
    """As somebody asks who writes the request by hand: one namespace in the path, another in the query."""
    mine = views.api.new_namespace("mine")
    views.api.kubectl("-n", mine, "create", "rolebinding", "eve", "--clusterrole=mantle-viz-view", "--user=eve")
    path = f"/apis/tap.mantle.dev/v1alpha1/namespaces/{mine}/{view}?resource=namespace&name={namespace}&port=80"
    words = [str(views.api.bins / "kubectl"), f"--kubeconfig={views.api.kubeconfig}", "get", "--raw", path, "--as=eve"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert f"namespace {namespace} is asked for in namespace {mine}" in ended.stderr


def test_nobody_but_the_api_server_says_who_asks(views: Views) -> None:
    url = f"https://{views.host}:{views.port}/apis/tap.mantle.dev/v1alpha1/edges"
    headers = ["-H", "X-Remote-User: admin", "-H", "X-Remote-Group: system:masters"]
    said = subprocess.run(["curl", "-sk", url, *headers], capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(said)["code"] == 401
    # A certificate of the cluster's own CA is a user's, even with the front proxy's name; only its own CA will do.
    pki = views.api.state / "pki"
    for name, code in (("admin", None), ("front-proxy", 200)):
        files = ["--cert", f"{pki / name}.crt", "--key", f"{pki / name}.key"]
        assert Path(files[1]).exists(), sorted(pki.iterdir())
        ended = subprocess.run(["curl", "-sk", *files, url, *headers], capture_output=True, text=True, timeout=60)
        answer = json.loads(ended.stdout or "{}")
        assert (200 if "edges" in answer else None) == code, ended


def test_viz_may_do_what_it_does_and_no_more(views: Views) -> None:
    def can(*what: str) -> str:
        words = [str(views.api.bins / "kubectl"), f"--kubeconfig={views.api.kubeconfig}", "auth", "can-i", *what]
        words += [f"--as=system:serviceaccount:{CONTROL}:mantle-viz"]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout.strip()

    assert can("create", "subjectaccessreviews.authorization.k8s.io") == "yes"
    assert can("get", "secrets/mantle-viz-tls", "-n", CONTROL) == "yes"
    for no in (
        ("get", "secrets/mantle-identity-issuer", "-n", CONTROL),
        ("list", "secrets", "-n", CONTROL),
        ("patch", "apiservices/v1.apps"),
        ("create", "pods", "-n", CONTROL),
        ("impersonate", "users"),
    ):
        assert can(*no) == "no", no
