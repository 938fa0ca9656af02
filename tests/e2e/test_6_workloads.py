"""Kinds of pods that people run, in the mesh on the real cluster: Jobs, classic sidecars, dotted names, a balancer."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

import pytest
from certificates import Certificate
from e2e.stage import EMOJIVOTO, Cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
NAMESPACE = "workloads"
NODE_IP = "10.86.0.2"
PYTHON = next(line.split()[-1] for line in EMOJIVOTO.splitlines() if "image: mantle/emojivoto" in line)
ASK = """
import sys, urllib.request
print(urllib.request.urlopen("http://web-svc.emojivoto/api/list", timeout=60).status, flush=True)
"""

PROBED = """
import http.server, signal, sys, threading
well = True
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global well
        if self.client_address[0] == "127.0.0.1":
            well = self.path == "/well"
        self.send_response(200 if well or self.path != "/ready" else 503)
        self.end_headers()
server = http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Page)
signal.signal(15, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
"""


@pytest.fixture(scope="module")
def space(emojivoto: Cluster) -> Iterator[Cluster]:
    """A namespace that is meshed by its annotation."""
    with emojivoto.namespace(NAMESPACE, **{"mantle.dev/inject": "enabled"}):
        emojivoto.kubectl("create", "serviceaccount", "team.web", "-n", NAMESPACE)
        yield emojivoto


def asking(once: bool, **spec: Any) -> dict[str, Any]:
    """A pod's spec that asks emojivoto's page, and then ends or stays."""
    program = ASK if once else ASK + "import signal; signal.signal(15, lambda *_: sys.exit()); signal.pause()"
    container = {"name": "ask", "image": PYTHON, "command": ["/usr/bin/python3", "-c", program]}
    return {"containers": [container], **spec}


def apply(cluster: Cluster, kind: str, version: str, name: str, spec: dict[str, Any], **annotations: str) -> None:
    meta = {"name": name, "namespace": NAMESPACE} | ({"annotations": annotations} if annotations else {})
    cluster.apply(json.dumps({"apiVersion": version, "kind": kind, "metadata": meta, "spec": spec}))


def reasons(cluster: Cluster, kind: str) -> dict[str, str]:
    """Events of the injector about objects of this kind: name → reason and message."""
    items = cluster.get("events", "-n", NAMESPACE, f"--field-selector=involvedObject.kind={kind}")["items"]
    return {
        item["involvedObject"]["name"]: f"{item['reason']}: {item['message']}"
        for item in items
        if item["source"].get("component") == "mantle-injector"
    }


def test_a_job_completes_beside_its_proxy_and_its_init_container_is_meshed(space: Cluster) -> None:
    spec = asking(True, restartPolicy="Never")
    spec["initContainers"] = [spec["containers"][0] | {"name": "first"}]
    apply(space, "Job", "batch/v1", "once", {"backoffLimit": 0, "template": {"spec": spec}})
    space.kubectl("wait", "-n", NAMESPACE, "job/once", "--for=condition=Complete", "--timeout=300s", timeout=330)
    for container in ("first", "ask"):
        said = until(lambda c=container: space.kubectl("logs", "-n", NAMESPACE, "job/once", "-c", c), "its answer")  # type: ignore[misc]
        assert said == "200\n"


def test_an_account_with_dots_and_no_token_has_an_identity(space: Cluster) -> None:
    spec = asking(False, serviceAccountName="team.web", automountServiceAccountToken=False)
    apply(space, "Pod", "v1", "dots", spec)
    space.ready(NAMESPACE, "dots")
    until(
        lambda: "automountServiceAccountToken is false, which is fine" in reasons(space, "Pod").get("dots", ""), "said"
    )
    identity = f"team.web.{NAMESPACE}.serviceaccount.identity.mantle.cluster.local"
    until(lambda: identity in space.mantle("identity", "-n", NAMESPACE, "dots"), "its identity")


def test_a_classic_sidecar_is_ready_before_the_application_starts(space: Cluster) -> None:
    """Its hook holds the kubelet back: the very first request of the application is answered."""
    classic = {"config.mantle.dev/proxy-enable-native-sidecar": "false"}
    apply(space, "Pod", "v1", "classic", asking(False), **classic)
    space.ready(NAMESPACE, "classic")
    spec = space.get("pod", "classic", "-n", NAMESPACE)["spec"]
    assert [c["name"] for c in spec["containers"]] == ["mantle-proxy", "mantle-guard", "ask"]
    assert until(lambda: space.kubectl("logs", "-n", NAMESPACE, "classic", "-c", "ask"), "it has asked") == "200\n"
    status = space.get("pod", "classic", "-n", NAMESPACE)["status"]["containerStatuses"]
    assert {item["name"]: item["restartCount"] for item in status} == {"ask": 0, "mantle-guard": 0, "mantle-proxy": 0}


def test_probes_reach_an_application_that_takes_meshed_clients_only(space: Cluster) -> None:
    """The kubelet is not in the mesh: what it probes, and nothing else, is open to it, and the application answers."""
    # Patient where a failure would restart the container: a busy machine is no fault of a probe.
    patient = {"periodSeconds": 1, "timeoutSeconds": 10, "failureThreshold": 30}
    http = {
        "httpGet": {"path": "/ready", "port": "http"},
        "periodSeconds": 1,
        "timeoutSeconds": 10,
        "failureThreshold": 1,
    }
    container = {
        "name": "main",
        "image": PYTHON,
        "command": ["/usr/bin/python3", "-c", PROBED],
        "ports": [{"name": "http", "containerPort": 8080}],
        "startupProbe": {"exec": {"command": ["/usr/bin/python3", "-c", ""]}, **patient},
        "readinessProbe": http,
        "livenessProbe": {"tcpSocket": {"port": 8080}, **patient},
    }
    policy = {"config.mantle.dev/default-inbound-policy": "all-authenticated"}
    apply(space, "Pod", "v1", "probed", {"containers": [container]}, **policy)

    def ready(wanted: str) -> None:
        space.kubectl(
            "wait", "-n", NAMESPACE, "pod/probed", f"--for=condition=Ready={wanted}", "--timeout=120s", timeout=150
        )

    def tell(word: str) -> None:
        ask = f"import urllib.request as r; r.urlopen('http://127.0.0.1:8080/{word}', timeout=20)"
        space.kubectl("exec", "-n", NAMESPACE, "probed", "-c", "main", "--", "/usr/bin/python3", "-c", ask)

    ready("true")
    address = space.get("pod", "probed", "-n", NAMESPACE)["status"]["podIP"]
    status = ("curl", "-s", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", f"http://{address}:8080")
    assert space.node(*status[:-1], f"{status[-1]}/ready") == "200"
    assert space.node(*status[:-1], f"{status[-1]}/secret") == "403", "nobody else gets in from outside the mesh"
    tell("sick")
    ready("false")
    tell("well")
    ready("true")
    (main,) = (
        item for item in space.get("pod", "probed", "-n", NAMESPACE)["status"]["containerStatuses"]
        if item["name"] == "main"
    )  # fmt: skip
    assert main["restartCount"] == 0
    space.kubectl("delete", "pod", "-n", NAMESPACE, "probed", "--wait=false")


def test_why_a_pod_is_not_meshed_stands_on_it_and_on_its_workload(space: Cluster) -> None:
    template = {"metadata": {"labels": {"app": "host"}}, "spec": asking(False, hostNetwork=True)}
    apply(space, "Deployment", "apps/v1", "host", {"selector": {"matchLabels": {"app": "host"}}, "template": template})
    name = space.pod(NAMESPACE, "host-")
    said = "InjectionSkipped: not in the mesh, its traffic is plain: hostNetwork is enabled"
    until(lambda: reasons(space, "Pod").get(name) == said, "the pod's event")
    until(lambda: reasons(space, "Deployment").get("host") == said, "the Deployment's event")
    annotations = space.get("pod", name, "-n", NAMESPACE)["metadata"]["annotations"]
    assert annotations["mantle.dev/injection-skipped"] == "host_network_enabled: hostNetwork is enabled"
    space.kubectl("delete", "deploy", "host", "-n", NAMESPACE)


SERVE_TLS = """
import http.server, os, ssl
pem = os.memfd_create("pem")
os.write(pem, os.environ["PEM"].encode())
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(f"/proc/self/fd/{pem}")
server = http.server.ThreadingHTTPServer(("", 8443), http.server.SimpleHTTPRequestHandler)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


def test_a_load_balancer_that_hides_its_clients_delays_no_server_hello(space: Cluster) -> None:
    """`externalTrafficPolicy: Cluster`: in the first meshes the Server Hello came seconds after the Client Hello."""
    serving = asking(False)["containers"][0] | {
        "command": ["/usr/bin/python3", "-c", SERVE_TLS],
        "env": [{"name": "PEM", "value": Certificate("outside").both.decode()}],
    }
    template = {"metadata": {"labels": {"app": "outside"}}, "spec": {"containers": [serving]}}
    selector = {"app": "outside"}
    apply(space, "Deployment", "apps/v1", "outside", {"selector": {"matchLabels": selector}, "template": template})
    ports = [{"port": 443, "targetPort": 8443}]
    service = {"type": "LoadBalancer", "externalTrafficPolicy": "Cluster", "selector": selector, "ports": ports}
    apply(space, "Service", "v1", "outside", service)
    space.rolled_out(NAMESPACE, "outside")
    until(lambda: space.mantle("identity", "-n", NAMESPACE, "deploy/outside"), "it is in the mesh")
    port = space.get("service", "outside", "-n", NAMESPACE)["spec"]["ports"][0]["nodePort"]
    anybody = ssl.create_default_context()
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE

    def seconds() -> float:
        with socket.create_connection((NODE_IP, port), timeout=10) as plain:
            began = time.monotonic()
            with anybody.wrap_socket(plain):
                return time.monotonic() - began

    def quick() -> bool:
        try:
            # On a busy machine one may take long; the delay that is meant was there every time.
            return min(seconds() for _ in range(5)) < 1
        except OSError as error:
            raise AssertionError(str(error)) from None

    until(quick, "a Server Hello within a second")


def test_a_pod_with_another_meshs_sidecar_is_left_alone_and_says_so(space: Cluster) -> None:
    spec = asking(False)
    spec["containers"].append({"name": "istio-proxy", "image": "mantle.local/pause:1"})
    apply(space, "Pod", "v1", "foreign", spec)
    said = "InjectionSkipped: not in the mesh, its traffic is plain: pod has a sidecar injected already"
    until(lambda: reasons(space, "Pod").get("foreign") == said, "the pod's event")
    found = space.get("pod", "foreign", "-n", NAMESPACE)
    assert [c["name"] for c in found["spec"]["containers"]] == ["ask", "istio-proxy"]
    annotation = found["metadata"]["annotations"]["mantle.dev/injection-skipped"]
    assert annotation == "sidecar_already_exists: pod has a sidecar injected already"
