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
    emojivoto.run(*block.command, timeout=800, cwd=desk(tmp_path, page))

    def nothing_left() -> bool:
        found = emojivoto.get(OURS)["items"]
        names = [f"{item['kind']}/{item['metadata']['name']}" for item in found]
        left = [name for name in names if "mantle" in name]
        assert not left, left
        return True

    until(nothing_left, "nothing of Mantle is left")
    until(lambda: "mantle" not in emojivoto.kubectl("get", "ns", "-o", "name"), "the namespace is gone", 300)

    def plain() -> bool:
        pods = emojivoto.pods("emojivoto")
        left = [p["metadata"]["name"] for p in pods if p["spec"].get("initContainers")]
        assert pods and not left, f"with a proxy: {left}"
        return True

    emojivoto.rolled_out("emojivoto")
    until(plain, "emojivoto runs without proxies")
    until(
        lambda: "Voting for" in emojivoto.kubectl("logs", "-n", "emojivoto", "deploy/vote-bot", "--since=5s"),
        "the bot votes",
    )
