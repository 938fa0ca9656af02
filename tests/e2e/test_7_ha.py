"""High availability: three pods of everything, on one node, too; any of them may go; nobody is elected; the way back.

Requests go on all the while, and none may fail. The plays follow each other; the last one, and in any case the end of
the file, leaves the cluster as it was.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from e2e.loaded import has_proxy, loaded, metric, no_request_fails, pod
from e2e.stage import COMPONENTS, Cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
NAMESPACE = "available"
BUDGETS = "--prune-allowlist=policy/v1/PodDisruptionBudget"
SECRET, WRITES = "mantle-injector-tls", "mantle_injector_certificate_writes_total"
LISTED = "deployments,services,configmaps,secrets,serviceaccounts,roles,rolebindings,poddisruptionbudgets"


def objects(cluster: Cluster) -> list[str]:
    """What there is of Mantle's."""
    return sorted(cluster.kubectl("get", LISTED, "-n", "mantle", "-o", "name").split())


def back_to_one(cluster: Cluster) -> None:
    upgrade = cluster.mantle("upgrade", "--reset-values")
    cluster.apply(upgrade, "--prune", "-l", "mantle.dev/part-of=mantle", BUDGETS)
    cluster.rolled_out("mantle", *COMPONENTS)
    cluster.injecting()


@pytest.fixture(scope="module")
def available(emojivoto: Cluster) -> Iterator[tuple[Cluster, list[str]]]:
    """Installed with `--ha` over what was there, while requests go on; what was there."""
    before = objects(emojivoto)
    with loaded(emojivoto, NAMESPACE):
        try:
            with no_request_fails(emojivoto, NAMESPACE):
                emojivoto.apply(emojivoto.mantle("install", "--ha"))
                emojivoto.rolled_out("mantle", *COMPONENTS)
                emojivoto.injecting()
            yield emojivoto, before
        finally:
            if objects(emojivoto) != before:
                back_to_one(emojivoto)


def test_three_pods_of_each_run_on_one_node_and_one_at_a_time_may_be_away(
    available: tuple[Cluster, list[str]],
) -> None:
    cluster, _ = available
    for component in COMPONENTS:
        assert len(cluster.pods("mantle", component)) == 3
        budget = ("poddisruptionbudget", component, "-n", "mantle")
        assert cluster.get(*budget)["spec"]["maxUnavailable"] == 1

        def allowed(budget: tuple[str, ...] = budget) -> bool:
            status = cluster.get(*budget)["status"]
            return bool(status["disruptionsAllowed"] == 1 and status["currentHealthy"] == 3)

        until(allowed, "the budget counts them")
    webhooks = cluster.get("mutatingwebhookconfiguration", "mantle-injector")["webhooks"]
    (closed,) = (hook for hook in webhooks if hook["name"].startswith("closed."))
    assert closed["failurePolicy"] == "Fail"
    rules = closed["namespaceSelector"]["matchExpressions"]
    wanted = {"key": "mantle.dev/injector-failure", "operator": "NotIn", "values": ["open"]}
    assert wanted in rules, "no pod starts past the mesh, but in a namespace that says so"


def test_one_pod_of_each_ends_and_nobody_notices(available: tuple[Cluster, list[str]]) -> None:
    cluster, _ = available
    with no_request_fails(cluster, NAMESPACE):
        ending = [cluster.pod("mantle", component) for component in COMPONENTS]
        cluster.kubectl("delete", "pod", "-n", "mantle", *ending, "--wait=false")
        until(lambda: cluster.apply(pod(NAMESPACE, "meanwhile")), "pods can be made meanwhile")
        assert has_proxy(cluster, NAMESPACE, "meanwhile"), "and none starts without the mesh"
        cluster.ready(NAMESPACE, "meanwhile")
        cluster.rolled_out("mantle", *COMPONENTS)
    until(lambda: "web" in cluster.mantle("stat", "deploy", "-n", "emojivoto"), "the views are answered")


def writes(cluster: Cluster) -> dict[str, float]:
    """How often each injector wrote the certificate's Secret, by pod."""
    injectors = cluster.pods("mantle", "mantle-injector")
    counts = {item["metadata"]["name"]: metric(item, 9991, WRITES) for item in injectors}
    return {name: count[""] for name, count in counts.items()}


def made_anew(cluster: Cluster) -> str:
    """The Secret is lost; the name of the one injector that made it anew."""
    before = until(lambda: writes(cluster), "how often they wrote")
    cluster.kubectl("delete", "secret", "-n", "mantle", SECRET)

    def writers() -> list[str]:
        now = writes(cluster)
        return [name for name, count in before.items() if now[name] > count]

    until(writers, "one of them makes it anew")

    def trusted() -> bool:
        bundle = cluster.get("secret", SECRET, "-n", "mantle")["data"]["ca.crt"]
        webhooks = cluster.get("mutatingwebhookconfiguration", "mantle-injector")["webhooks"]
        return all(hook["clientConfig"]["caBundle"] == bundle for hook in webhooks)

    until(trusted, "the API server is told whom to trust")
    cluster.injecting()
    (writer,) = until(writers, "who made it")
    return writer


def test_whoever_comes_first_writes_the_certificate_and_another_when_that_one_is_gone(
    available: tuple[Cluster, list[str]],
) -> None:
    """Nobody is elected. Of two that write at once, one is refused, and finds nothing left to do."""
    cluster, _ = available
    first = made_anew(cluster)
    with no_request_fails(cluster, NAMESPACE):
        cluster.deleted("pod", "-n", "mantle", first)
        assert made_anew(cluster) in [item["metadata"]["name"] for item in cluster.pods("mantle", "mantle-injector")]
        cluster.rolled_out("mantle", "mantle-injector")


def test_the_way_back_leaves_nothing_behind(available: tuple[Cluster, list[str]]) -> None:
    cluster, before = available
    with no_request_fails(cluster, NAMESPACE):
        back_to_one(cluster)
    until(lambda: objects(cluster) == before, f"what was there before, and nothing else: {before}")
    until(lambda: len(cluster.get("pods", "-n", "mantle")["items"]) == len(COMPONENTS), "one pod of each")
