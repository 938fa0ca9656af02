"""Annotations that somebody wrote to break Mantle: whoever may change one pod or service must not stop the whole mesh.

Injection sees a pod once. What is written on it afterwards, or on one that asks for no injection, or on a service, is
read by destination all the same: every text has a meaning or is a mistake, and none is an exception.
"""

from __future__ import annotations

import pytest

from mantle.core.admission import Outcome, decide
from mantle.core.annotations import CONFIG, PREFIX, read_config
from mantle.core.endpoints import ServiceTarget, pod_endpoint, profile
from mantle.core.inject import Injected, inject_pod
from mantle.core.model import ContainerPort, Key, Namespace, Owner, Pod, Service, ServicePort, Snapshot
from mantle.core.names import MeshNames
from mantle.core.proxy_env import Values
from mantle.core.world import Mesh, World

MESH = Mesh(MeshNames("mantle", "cluster.local"))
NASTY = (
    "",
    ",",
    "8x",
    "9p,x-1",
    "1-",
    "-",
    "2-1",
    "99999",
    "\u0663\u0663",  # digits, of another script
    "\u00b2",
    "9" * 5000,
    "[" * 3_000,
    '{"a":' * 3_000,
    "[{}]",
    '[{"name": 1}]',
    '[{"name": ["A"]}]',
    '[{"name": {"A": 1}}]',
    '[{"name": "A"}, null]',
    "NaN",
    "0.0",
    "::/129",
    "10.0.0.1/8",
    "\x00\x1b[2J\ud800",
    "true\n",
)


@pytest.mark.parametrize("name", sorted(CONFIG))
def test_every_text_is_a_value_or_a_mistake(name: str) -> None:
    for text in NASTY:
        obj = {
            "kind": "Pod",
            "metadata": {"name": "p", "annotations": {PREFIX + name: text, "mantle.dev/inject": "enabled"}},
            "spec": {"containers": [{"name": "c", "image": "i"}]},
        }
        request = {"uid": "1", "operation": "CREATE", "namespace": "shop", "object": obj}
        review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
        decision = decide(review, {"metadata": {"name": "shop"}}, Values("1", "ROOTS", ()))
        assert decision.outcome in (Outcome.INJECTED, Outcome.REFUSED)


@pytest.mark.parametrize("text", NASTY)
def test_every_name_is_a_setting_or_a_mistake(text: str) -> None:
    (mistake,) = read_config({f"{PREFIX}opaque-port{text}": "x"}, {})[1]
    assert "opaque-ports" in str(mistake) or "docs/annotations.md" in str(mistake)


@pytest.mark.parametrize("name", sorted(CONFIG))
def test_discovery_goes_on_whatever_a_pod_a_service_or_a_namespace_says(name: str) -> None:
    key, service = Key("shop", "web"), Key("shop", "svc")
    for text in NASTY:
        for where in ("pod", "service", "namespace"):
            said = {where: {PREFIX + name: text}}
            pod = Pod(
                key,
                "u1",
                "10.0.0.9",
                "web",
                Owner("Deployment", "web"),
                {"app": "web", "mantle.dev/control-plane-ns": "mantle"},
                said.get("pod", {}),
                (ContainerPort("http", 8080),),
                proxy_started=True,
                ready=True,
                phase="Running",
            )
            svc = Service(
                service, "10.1.0.9", (ServicePort("http", 80, 8080),), {"app": "web"}, said.get("service", {})
            )
            namespaces = {"shop": Namespace("shop", {}, said.get("namespace", {}))}
            world = World.empty(MESH).next(Snapshot(1, {key: pod}, {service: svc}, namespaces))
            assert profile(world, ServiceTarget(service, 80)) is not None
            assert pod_endpoint(world, world.pods[key], 8080) is not None


def test_a_name_that_is_no_port_of_the_pod_means_nothing_to_it() -> None:
    """A namespace names the ports of some of its pods; names may begin with a digit."""
    ns = {"metadata": {"annotations": {f"{PREFIX}opaque-ports": "9p,mysql-x,7000-7001"}}}
    spec = {"containers": [{"name": "c", "ports": [{"name": "9p", "containerPort": 564}]}]}
    made = inject_pod({"metadata": {}, "spec": spec}, ns, Values("1", "ROOTS", (), inject_by_default=True))
    assert isinstance(made, Injected)
    env = {e["name"]: e.get("value") for e in made.pod["spec"]["initContainers"][-1]["env"]}
    assert env["MANTLE_PROXY_INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION"] == "564,7000-7001"


@pytest.mark.parametrize("kind", ["Namespace", "Pod", "ServiceAccount", "Control_Plane_Ns"])
def test_an_owner_cannot_pass_for_what_the_platform_says(kind: str) -> None:
    """Owner references are written by whoever creates the pod."""
    key = Key("shop", "web")
    labels = {"mantle.dev/control-plane-ns": "mantle"}
    pod = Pod(key, "u1", "10.0.0.9", "web", Owner(kind, "prod"), labels, proxy_started=True, phase="Running")
    world = World.empty(MESH).next(Snapshot(1, {key: pod}, {}, {}))
    told = dict(pod_endpoint(world, world.pods[key], 80).labels)  # type: ignore[union-attr]
    wanted = {"namespace": "shop", "pod": "web", "serviceaccount": "web", "control_plane_ns": "mantle"}
    assert told == wanted, told
