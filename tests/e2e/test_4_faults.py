"""What breaks on a cluster, broken on purpose while requests flow: what has to go on goes on, and what must not happen
does not. Each play leaves the cluster as it found it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e.stage import COMPONENTS, EMOJIVOTO, Cluster, Failed, meshed, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
NAMESPACE = "faults"
PAUSE = "mantle.local/pause:1"
PYTHON = next(line.split()[-1] for line in EMOJIVOTO.splitlines() if "image: mantle/emojivoto" in line)


def pod(name: str, image: str = PAUSE, command: list[str] | None = None, **annotations: str) -> str:
    container = {"name": "main", "image": image} | ({"command": command} if command else {})
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE, "annotations": annotations},
            "spec": {"terminationGracePeriodSeconds": 0, "containers": [container]},
        }
    )


def has_proxy(cluster: Cluster, name: str) -> bool:
    spec = cluster.get("pod", name, "-n", NAMESPACE)["spec"]
    return any(c["name"] == "mantle-proxy" for c in [*spec["containers"], *spec.get("initContainers", [])])


@pytest.fixture(scope="module")
def faults(emojivoto: Cluster) -> Iterator[Cluster]:
    """A namespace that is meshed by its annotation, with a pod that asks emojivoto's page without end."""
    space = {"name": NAMESPACE, "annotations": {"mantle.dev/inject": "enabled"}}
    emojivoto.apply(json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": space}))
    try:
        program = Path(__file__).with_name("load.py").read_text()
        url = "http://web-svc.emojivoto/api/list"
        emojivoto.apply(pod("load", PYTHON, ["/usr/bin/python3", "-c", program, url]))
        emojivoto.kubectl("wait", "-n", NAMESPACE, "pod/load", "--for=condition=Ready", "--timeout=90s")
        assert has_proxy(emojivoto, "load"), "the namespace's annotation puts its pods into the mesh"
        yield emojivoto
    finally:
        emojivoto.kubectl("delete", "ns", NAMESPACE, "--timeout=60s")


def counted(cluster: Cluster) -> tuple[int, int, str]:
    """Requests so far, failed ones, and the last failure."""
    lines = cluster.kubectl("logs", "-n", NAMESPACE, "load", "-c", "main", "--tail=1").split()
    assert len(lines) == 3, "no requests yet"
    return int(lines[0]), int(lines[1]), lines[2]


@contextmanager
def no_request_fails(cluster: Cluster) -> Iterator[None]:
    """Within this block requests go on, and every one is answered."""
    before = until(lambda: counted(cluster), "the load runs")
    yield
    middle = counted(cluster)
    after = until(lambda: (now := counted(cluster))[0] > middle[0] + 20 and now, "requests go on")
    assert after[1] == before[1], f"{after[1] - before[1]} of {after[0] - before[0]} requests failed: {after[2]}"


def process(cluster: Cluster, namespace: str, name: str, container: str) -> str:
    """The host's number of a container's first process."""
    status = cluster.get("pod", name, "-n", namespace)["status"]
    every = [*status["containerStatuses"], *status.get("initContainerStatuses", [])]
    found = next(item for item in every if item["name"] == container)["containerID"].removeprefix("containerd://")
    lines = cluster.node("ctr", "-n", "k8s.io", "tasks", "ls").splitlines()
    return next(line.split()[1] for line in lines if line.startswith(found))


def restarts(cluster: Cluster, namespace: str, name: str, container: str) -> int:
    status = cluster.get("pod", name, "-n", namespace)["status"]
    every = [*status["containerStatuses"], *status.get("initContainerStatuses", [])]
    return int(next(item["restartCount"] for item in every if item["name"] == container))


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_killed_component_costs_no_request(faults: Cluster, component: str) -> None:
    name = faults.pods("mantle", component)[0]["metadata"]["name"]
    container = component.removeprefix("mantle-")
    with no_request_fails(faults):
        before = restarts(faults, "mantle", name, container)
        faults.node("kill", "-9", process(faults, "mantle", name, container))
        until(lambda: restarts(faults, "mantle", name, container) > before, "the kubelet restarts it")
        faults.rolled_out("mantle", component)


def test_the_injector_is_down_open_namespaces_go_on_and_closed_ones_wait(faults: Cluster) -> None:
    faults.kubectl("scale", "-n", "mantle", "deploy/mantle-injector", "--replicas=0")
    try:
        until(lambda: not faults.pods("mantle", "mantle-injector"), "the injector is gone")
        with no_request_fails(faults):
            until(lambda: faults.apply(pod("plain")), "an open namespace takes pods")
            assert not has_proxy(faults, "plain")
            faults.kubectl("label", "ns", NAMESPACE, "mantle.dev/injector-failure=closed")
            with pytest.raises(Failed, match="failed calling webhook"):
                faults.apply(pod("refused"))
    finally:
        faults.kubectl("label", "ns", NAMESPACE, "mantle.dev/injector-failure-")
        faults.kubectl("scale", "-n", "mantle", "deploy/mantle-injector", "--replicas=1")
        faults.rolled_out("mantle", "mantle-injector")
    said = faults.mantle("check", code=None)
    assert f"{NAMESPACE}/plain" in said, "check names the pod that should be meshed and is not"
    faults.kubectl("delete", "pod", "-n", NAMESPACE, "plain")


def test_the_api_server_is_away(faults: Cluster) -> None:
    """It hangs with its connections open, which is harder than being gone; afterwards changes arrive again."""
    server = next(
        line.split()[0] for line in faults.node("ps", "-eo", "pid,comm").splitlines() if "kube-apiserver" in line
    )
    before = until(lambda: counted(faults), "the load runs")
    faults.node("kill", "-STOP", server)
    try:
        # Nothing can be asked of kubectl now: the time is given, and what happened meanwhile is counted afterwards.
        faults.node("timeout", "20", "tail", "-f", "/dev/null", code=124)
    finally:
        faults.node("kill", "-CONT", server)
    after = until(lambda: (now := counted(faults))[0] > before[0] + 200 and now, "requests went on")
    assert after[1] == before[1], f"{after[1] - before[1]} requests failed: {after[2]}"
    faults.kubectl("rollout", "restart", "-n", "emojivoto", "deploy/emoji")
    with no_request_fails(faults):
        faults.rolled_out("emojivoto")
        meshed(faults, "emojivoto")


def test_rules_that_were_flushed_are_never_silently_missing(faults: Cluster) -> None:
    """As after a node's reboot: the pod's rules come back, or its proxy says that it is not ready."""
    name = faults.pods("emojivoto", "web-")[0]["metadata"]["name"]
    inside = ["nsenter", "--target", process(faults, "emojivoto", name, "web-svc"), "--net"]
    faults.node(*inside, "nft", "delete", "table", "inet", "mantle")

    def noticed() -> bool:
        if "table inet mantle" in faults.node(*inside, "nft", "list", "tables", code=None):
            return True
        conditions = faults.get("pod", name, "-n", "emojivoto")["status"]["conditions"]
        return any(c["type"] == "Ready" and c["status"] == "False" for c in conditions)

    try:
        until(noticed, "the missing rules are repaired or the pod is not ready", 90)
    finally:
        faults.kubectl("delete", "pod", "-n", "emojivoto", name, "--ignore-not-found")
        faults.rolled_out("emojivoto")


def test_a_pod_that_asks_twice_is_meshed_once(faults: Cluster) -> None:
    """Rendered by hand, and then seen by the webhook."""
    rendered = faults.mantle("inject", "--manual", "-", given=pod("twice", **{"mantle.dev/inject": "enabled"}))
    faults.apply(rendered)
    try:
        spec = faults.get("pod", "twice", "-n", NAMESPACE)["spec"]
        names = [c["name"] for c in [*spec["containers"], *spec["initContainers"]]]
        assert names.count("mantle-proxy") == 1 and names.count("mantle-init") == 1, names
        faults.kubectl("wait", "-n", NAMESPACE, "pod/twice", "--for=condition=Ready", "--timeout=60s")
    finally:
        faults.kubectl("delete", "pod", "-n", NAMESPACE, "twice", "--ignore-not-found")


def test_wrong_annotations_are_all_named_with_what_is_accepted(faults: Cluster) -> None:
    wrong = {"config.mantle.dev/proxy-cpu-limit": "lots", "config.mantle.dev/default-inbound-policy": "open"}
    with pytest.raises(Failed) as refused:
        faults.apply(pod("wrong", **wrong))
    said = str(refused.value)
    assert all(re.search(re.escape(name), said) for name in wrong), said
    assert "all-unauthenticated" in said, "the accepted values are named"
