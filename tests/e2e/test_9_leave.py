"""Leaving: uninject gives the original back, uninstall leaves nothing, and the applications go on."""

from __future__ import annotations

import pytest
from e2e.stage import EMOJIVOTO, Cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
OURS = "clusterroles,clusterrolebindings,mutatingwebhookconfigurations,apiservices"


def test_uninject_restores_the_exact_original(cluster: Cluster) -> None:
    assert cluster.mantle("uninject", "-", given=cluster.mantle("inject", "-", given=EMOJIVOTO)) == EMOJIVOTO


def test_uninstall_leaves_nothing_and_emojivoto_runs_on(emojivoto: Cluster) -> None:
    emojivoto.apply(emojivoto.mantle("uninject", "-", given=emojivoto.mantle("inject", "-", given=EMOJIVOTO)))
    emojivoto.kubectl("annotate", "ns", "emojivoto", "mantle.dev/inject-")
    emojivoto.kubectl("delete", "-f", "-", "--timeout=120s", given=emojivoto.mantle("uninstall"), timeout=180)
    left = [
        f"{item['kind']}/{item['metadata']['name']}"
        for item in emojivoto.get(OURS)["items"]
        if "mantle" in item["metadata"]["name"]
    ]
    assert left == []
    until(lambda: "mantle" not in emojivoto.kubectl("get", "ns", "-o", "name"), "the namespace is gone", 90)

    def plain() -> bool:
        pods = emojivoto.pods("emojivoto")
        return bool(pods) and not [p for p in pods if len(p["spec"].get("initContainers", []))]

    emojivoto.kubectl("rollout", "restart", "deploy", "-n", "emojivoto")
    emojivoto.rolled_out("emojivoto")
    until(plain, "emojivoto runs without proxies", 60)
    until(
        lambda: "Voting for" in emojivoto.kubectl("logs", "-n", "emojivoto", "deploy/vote-bot", "--since=5s"),
        "the bot votes",
        60,
    )
