"""Blocks of the documentation that need an API server and no pod, run as they stand (```` ```sh api ````)."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_blocks import blocks, desk, pages

from .apiserver import ApiServer

SECONDS = 240


class Reader:
    """Somebody with the page, a kubeconfig, and kubectl, helm and mantle on the PATH."""

    def __init__(self, server: ApiServer, helm: Path, home: Path) -> None:
        self.home = home
        programs = home / ".programs"
        programs.mkdir()
        (programs / "mantle").symlink_to(Path(sys.executable).with_name("mantle"))
        kept = {name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ}
        # A runtime directory of its own: a mesh that happens to run on this machine is not meant.
        self.environment = kept | {
            "PATH": f"{programs}:{server.bins}:{helm.parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home),
            "KUBECONFIG": str(server.kubeconfig),
        }

    def runs(self, command: list[str]) -> None:
        done = subprocess.run(
            command, cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, f"{command[-1]}\n--- ended with {done.returncode}\n{done.stdout}{done.stderr}"

    def has_no_mantle(self) -> None:
        """Whatever a block before has left of Mantle is gone when this returns."""
        nothing = """grep -qE "has no control plane|nothing of Mantle's is installed" uninstall.log"""
        uninstall = "mantle uninstall 2>uninstall.log >uninstall.yml && kubectl delete -f uninstall.yml"
        self.runs(["bash", "-ec", f"{uninstall} || {nothing} || (cat uninstall.log; false)"])
        self.runs(["kubectl", "delete", "namespace", "mantle", "--ignore-not-found"])


@pytest.fixture
def reader(api_server: ApiServer, helm: Path, page: Path, tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(api_server, helm, desk(tmp_path, page))
    reader.runs(["kubectl", "apply", "-f", "app.yml"])
    try:
        yield reader
    finally:
        reader.has_no_mantle()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", pages("api"), ids=lambda page: page.stem)
def test_the_page_works_as_it_stands(page: Path, reader: Reader) -> None:
    for block in blocks(page, "api"):
        if block.fresh:
            reader.has_no_mantle()
        reader.runs(block.command)
