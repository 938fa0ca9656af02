"""What breaks on a cluster, broken on purpose while requests flow: what has to go on goes on, and what must not happen
does not. Each play leaves the cluster as it found it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from e2e.loaded import counted, has_proxy, loaded, metric, no_request_fails, pod, requests_go_on
from e2e.stage import COMPONENTS, Cluster, Failed, meshed, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
NAMESPACE = "faults"


@pytest.fixture(scope="module")
def faults(emojivoto: Cluster) -> Iterator[Cluster]:
    """A namespace that is meshed by its annotation, with a pod that asks emojivoto's page without end."""
    with loaded(emojivoto, NAMESPACE):
        yield emojivoto


def container_status(cluster: Cluster, namespace: str, name: str, container: str) -> dict[str, Any]:
    status = cluster.get("pod", name, "-n", namespace)["status"]
    every = [*status["containerStatuses"], *status.get("initContainerStatuses", [])]
    found: dict[str, Any] = next(item for item in every if item["name"] == container)
    return found


def process(cluster: Cluster, namespace: str, name: str, container: str) -> str:
    """The host's number of a container's first process."""
    found = container_status(cluster, namespace, name, container)["containerID"].removeprefix("containerd://")
    lines = cluster.node("ctr", "-n", "k8s.io", "tasks", "ls").splitlines()
    return next(line.split()[1] for line in lines if line.startswith(found))


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_killed_component_costs_no_request(faults: Cluster, component: str) -> None:
    name, container = faults.pod("mantle", component), component.removeprefix("mantle-")
    with no_request_fails(faults, NAMESPACE):
        before = container_status(faults, "mantle", name, container)["restartCount"]
        faults.node("kill", "-9", until(lambda: process(faults, "mantle", name, container), "its process"))

        def back() -> bool:
            now = container_status(faults, "mantle", name, container)
            return bool(now["restartCount"] > before and now["ready"])

        until(back, "the kubelet restarts it, and it is ready")
    faults.rolled_out("mantle", component)


def test_the_injector_is_down_open_namespaces_go_on_and_closed_ones_wait(faults: Cluster) -> None:
    ours = ("pods", "-n", "mantle", "-l", "mantle.dev/control-plane-component=injector")
    faults.kubectl("scale", "-n", "mantle", "deploy/mantle-injector", "--replicas=0")
    try:
        # While it ends it still answers, so the last trace of it counts.
        until(lambda: not faults.get(*ours)["items"], "the injector is gone")
        with no_request_fails(faults, NAMESPACE):
            until(lambda: faults.apply(pod(NAMESPACE, "plain")), "an open namespace takes pods")
            assert not has_proxy(faults, NAMESPACE, "plain")
            faults.kubectl("label", "ns", NAMESPACE, "mantle.dev/injector-failure=closed")

            def refused() -> bool:
                try:
                    faults.apply(pod(NAMESPACE, "refused"), "--dry-run=server")
                except Failed as failed:
                    return "failed calling webhook" in str(failed)
                return False

            until(refused, "a closed namespace takes none")
    finally:
        faults.kubectl("label", "ns", NAMESPACE, "mantle.dev/injector-failure-")
        faults.kubectl("scale", "-n", "mantle", "deploy/mantle-injector", "--replicas=1")
        faults.rolled_out("mantle", "mantle-injector")
        faults.injecting()
    said = faults.mantle("check", code=None)
    assert f"{NAMESPACE}/plain" in said, "check names the pod that should be meshed and is not"
    faults.deleted("pod", "-n", NAMESPACE, "plain")


def lists(cluster: Cluster) -> dict[str, float]:
    """How often destination has listed each kind of object."""
    destination = cluster.pods("mantle", "mantle-destination")[0]
    return metric(destination, 9996, "mantle_platform_lists_total")


def test_the_api_server_is_away_for_a_minute(faults: Cluster) -> None:
    """It hangs with its connections open, which is harder than being gone; then it is killed, and gone; then it comes
    back. What is known goes on all the while, without a failed request, and afterwards changes arrive again.

    The controllers are away, too. Elsewhere they end by themselves when they have not reached the API server for 10 s
    and so lose their lease. Here they hold none, and one that lives on takes a minute without news of the kubelet for a
    dead node (grace: 50 s) the moment it is back, before it has read that the kubelet lives: no outage looks like that.
    """
    server, controllers = "kube-apiserver", "kube-controller-manager"
    running = faults.node("ps", "-eo", "pid,comm").splitlines()
    number = next(line.split()[0] for line in running if server in line)
    listed = until(lambda: lists(faults), "what destination has listed")
    before = until(lambda: counted(faults, NAMESPACE), "the load runs")
    try:
        faults.component("stop", controllers)
        # Nothing can be asked of kubectl now: the times are given, and what happened meanwhile is counted afterwards.
        faults.node("kill", "-STOP", number)
        faults.node("timeout", "45", "tail", "-f", "/dev/null", code=124)
        faults.component("stop", server)
        faults.node("timeout", "20", "tail", "-f", "/dev/null", code=124)
    finally:
        faults.component("start", server)
        faults.component("start", controllers)  # without the API server they would give up after some seconds
    after = until(lambda: counted(faults, NAMESPACE), "the load's log can be read again")
    assert after[0] > before[0] + 50, "requests went on"
    assert after[1] == before[1], f"{after[1] - before[1]} requests failed: {after[2]}"
    until(lambda: all(now > listed[kind] for kind, now in lists(faults).items()), "destination has listed all anew")
    faults.injecting()
    # Afterwards changes arrive. Kubernetes does not wait for everybody to know before it ends a pod that was replaced,
    # least of all now: what is asked of that pod may be lost, and then its successor answers.
    faults.kubectl("rollout", "restart", "-n", "emojivoto", "deploy/emoji")
    faults.rolled_out("emojivoto")
    meshed(faults, "emojivoto")
    requests_go_on(faults, NAMESPACE)


def test_rules_that_were_flushed_are_back_and_the_pod_says_so(faults: Cluster) -> None:
    """The guard in the pod puts back exactly what belongs there, and its log has a line for it."""
    name = faults.pod("emojivoto", "web-")
    logs = ("logs", "-n", "emojivoto", name, "-c", "mantle-guard")
    inside = ("nsenter", "--target", process(faults, "emojivoto", name, "web-svc"), "--net")
    table = ("nft", "list", "table", "inet", "mantle")
    before, said = faults.node(*inside, *table), faults.kubectl(*logs).count("redirect repaired")
    assert "redirect to :4140" in before and "redirect to :4143" in before
    faults.node(*inside, "nft", "flush", "ruleset")
    until(lambda: faults.node(*inside, *table, code=None) == before, "the rules are back as they were")
    until(lambda: faults.kubectl(*logs).count("redirect repaired") > said, "the guard says that it repaired them")
    requests_go_on(faults, NAMESPACE)  # what was sent meanwhile is lost (docs/injector.md)


def test_a_pod_that_asks_twice_is_meshed_once(faults: Cluster) -> None:
    """Rendered by hand, and then seen by the webhook."""
    asks = pod(NAMESPACE, "twice", **{"mantle.dev/inject": "enabled"})
    faults.apply(faults.mantle("inject", "--manual", "-", given=asks))
    try:
        spec = faults.get("pod", "twice", "-n", NAMESPACE)["spec"]
        names = [c["name"] for c in [*spec["containers"], *spec["initContainers"]]]
        assert names.count("mantle-proxy") == 1 and names.count("mantle-init") == 1, names
        faults.ready(NAMESPACE, "twice")
    finally:
        faults.deleted("pod", "-n", NAMESPACE, "twice")


def test_wrong_annotations_are_all_named_with_what_is_accepted(faults: Cluster) -> None:
    wrong = {"config.mantle.dev/proxy-cpu-limit": "lots", "config.mantle.dev/default-inbound-policy": "open"}
    with pytest.raises(Failed) as refused:
        faults.apply(pod(NAMESPACE, "wrong", **wrong))
    said = str(refused.value)
    assert all(name in said for name in wrong), said
    assert "all-unauthenticated" in said, "the accepted values are named"
