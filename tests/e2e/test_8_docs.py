"""Blocks of the documentation that need pods, run as they stand (```` ```sh pods ````), with emojivoto in the mesh."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.stage import Cluster, until
from page_blocks import Block, blocks, desk, pages

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.mark.parametrize("page", pages("pods"), ids=lambda page: page.stem)
def test_the_page_works_as_it_stands(page: Path, emojivoto: Cluster, tmp_path: Path) -> None:
    """A reader who does not see yet what the page speaks of tries the block again: each is such that this is right."""
    desk(tmp_path, page)

    def works(block: Block) -> bool:
        emojivoto.run(*block.command, timeout=300, cwd=tmp_path)
        return True

    try:
        for block in blocks(page, "pods"):
            until(lambda block=block: works(block), f"the block works:\n{block.text}", 180)
    finally:
        emojivoto.kubectl("annotate", "ns", "emojivoto", "config.mantle.dev/transport-mode-")
