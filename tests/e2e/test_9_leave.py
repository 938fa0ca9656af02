"""Leaving: uninject gives the original back, uninstall leaves nothing, and the applications go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.stage import EMOJIVOTO, Cluster, until
from page_blocks import blocks, desk, pages

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
OURS = "clusterroles,clusterrolebindings,mutatingwebhookconfigurations,apiservices"


def test_uninject_restores_the_exact_original(cluster: Cluster) -> None:
    assert cluster.mantle("uninject", "-", given=cluster.mantle("inject", "-", given=EMOJIVOTO)) == EMOJIVOTO


def test_uninstall_leaves_nothing_and_emojivoto_runs_on(emojivoto: Cluster, tmp_path: Path) -> None:
    """With the page's own commands: uninject, restart, uninstall."""
    (page,) = pages("leave")
    (block,) = blocks(page, "leave")
    emojivoto.run(*block.command, timeout=400, cwd=desk(tmp_path, page))
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

    emojivoto.rolled_out("emojivoto")
    until(plain, "emojivoto runs without proxies", 60)
    until(
        lambda: "Voting for" in emojivoto.kubectl("logs", "-n", "emojivoto", "deploy/vote-bot", "--since=5s"),
        "the bot votes",
        60,
    )
