"""The page for beginners on a cluster, run block by block as it stands, up to where it takes everything away again."""

from __future__ import annotations

import re

import pytest
from e2e.stage import ROOT, Cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
BLOCK = re.compile(r"(?ms)^```sh\n(.*?)^```$")


def test_the_page_works_as_it_stands(emojivoto: Cluster) -> None:
    staying, leaving = (ROOT / "docs/cluster.md").read_text().split("\n## Leave\n")
    assert "mantle uninstall" in leaving, "what leaves is played by test_9_leave"
    blocks = BLOCK.findall(staying)
    assert len(blocks) == 5
    for block in blocks:
        until(lambda block=block: run(emojivoto, block), f"the block works:\n{block}", 120)


def run(cluster: Cluster, block: str) -> str:
    """What a block says. A block that says nothing where it should is no success."""
    # A pipe into `head` ends the left side early: that is no failure, so pipefail stays off.
    return cluster.run("bash", "-ec", block, timeout=300)
