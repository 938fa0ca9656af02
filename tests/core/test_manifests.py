"""The control plane's manifests: no placeholder left, meshed like any pod, secrets where they belong."""

import json

from mantle.core.inject import Injected, inject_pod
from mantle.core.proxy_env import Values
from mantle.manifests.render import ControlPlane, control_plane

OBJECTS = control_plane(
    ControlPlane(
        version="1.2.3",
        trust_roots="ROOTS\n",
        issuer_certificate="CERT\nweird: {$\n",
        issuer_key="KEY\n",
        networks=("10.203.0.0/16",),
        platform="unix:/run/p.sock",
        control_namespace="mesh",
    )
)


def find(kind: str, name: str) -> dict:
    (found,) = [o for o in OBJECTS if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def test_no_placeholder_is_left_and_every_object_is_in_the_control_namespace():
    assert "${" not in json.dumps(OBJECTS)
    assert find("Namespace", "mesh")
    assert all(o["metadata"].get("namespace") == "mesh" for o in OBJECTS if o["kind"] != "Namespace")


def test_a_value_cannot_change_the_structure():
    assert find("Secret", "mantle-identity-issuer")["stringData"] == {
        "crt.pem": "CERT\nweird: {$\n",
        "key.pem": "KEY\n",
    }


def test_the_issuer_is_mounted_into_identity_only():
    mounts = {
        o["metadata"]["name"]: [v["name"] for v in o["spec"]["template"]["spec"].get("volumes", [])]
        for o in OBJECTS
        if o["kind"] == "Deployment"
    }
    assert mounts == {"mantle-identity": ["issuer", "trust-roots"], "mantle-destination": [], "mantle-viz": []}


def test_every_container_answers_ready_and_its_services_name_ports_that_exist():
    for name in ("identity", "destination", "viz"):
        (container,) = find("Deployment", f"mantle-{name}")["spec"]["template"]["spec"]["containers"]
        assert container["args"][0] == name
        assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "admin"}
        ports = {p["name"] for p in container["ports"]}
        assert {p["targetPort"] for p in find("Service", f"mantle-{name}")["spec"]["ports"]} <= ports
        assert find("ServiceAccount", f"mantle-{name}")


def meshed(component: str) -> tuple[dict, dict[str, str]]:
    template = find("Deployment", f"mantle-{component}")["spec"]["template"]
    result = inject_pod(template, {}, Values("1.2.3", "ROOTS\n", ("10.203.0.0/16",), control_namespace="mesh"))
    assert isinstance(result, Injected)
    spec = result.pod["spec"]
    (proxy,) = [c for c in spec["initContainers"] + spec["containers"] if c["name"] == "mantle-proxy"]
    return spec, {e["name"].removeprefix("MANTLE_PROXY_"): e.get("value", "") for e in proxy["env"]}


def test_identity_starts_before_its_proxy_which_certifies_over_loopback():
    spec, env = meshed("identity")
    assert [c["name"] for c in spec["initContainers"]] == ["mantle-init"]
    assert [c["name"] for c in spec["containers"]] == ["identity", "mantle-proxy"]
    assert env["IDENTITY_SVC_ADDR"] == "127.0.0.1:8080"
    assert env["DESTINATION_SVC_ADDR"] == "mantle-destination.mesh.svc.cluster.local:8086"
    assert env["INBOUND_CLIENT_ADDR_PORTS"] == "8080"
    assert env["INBOUND_PORTS"] == "8080,9990"


def test_destination_asks_itself_over_loopback_and_identity_by_name():
    spec, env = meshed("destination")
    assert [c["name"] for c in spec["initContainers"]] == ["mantle-init", "mantle-proxy"]
    assert env["IDENTITY_SVC_ADDR"] == "mantle-identity.mesh.svc.cluster.local:8080"
    assert env["DESTINATION_SVC_ADDR"] == "127.0.0.1:8086"
    assert env["POLICY_SVC_ADDR"] == "127.0.0.1:8090"
    assert "INBOUND_CLIENT_ADDR_PORTS" not in env


def test_viz_is_the_one_who_may_tap():
    _, env = meshed("viz")
    assert env["TAP_SVC_NAME"] == "mantle-viz.mesh.serviceaccount.identity.mesh.cluster.local"
    assert env["IDENTITY_LOCAL_NAME"] == "$(_pod_sa).$(_pod_ns).serviceaccount.identity.mesh.cluster.local"
