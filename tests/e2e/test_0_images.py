"""The images: the same bytes when they are built again, and no larger than promised."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from e2e.stage import IMAGES, ROOT, Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
PROXY_LIMIT = 15_000_000
"""Bytes, as docs/images.md promises."""


def test_built_again_every_image_has_the_same_bytes(bare: Cluster, tmp_path: Path) -> None:
    profile = os.environ.get("MANTLE_E2E_PROFILE", "dev")
    build = [sys.executable, ROOT / "images/build.py", "--profile", profile, "--output", tmp_path]
    subprocess.run(build, check=True, timeout=600)
    made = sorted(path.name for path in tmp_path.glob("*.tar"))
    assert len(made) == 4
    for name in made:
        assert (tmp_path / name).read_bytes() == (IMAGES / name).read_bytes(), name


def test_the_proxy_image_is_one_small_file(bare: Cluster) -> None:
    (path,) = IMAGES.glob("mantle-proxy-*.tar")
    assert path.stat().st_size <= PROXY_LIMIT
    with tarfile.open(path) as archive:
        layers = [m for m in archive if m.name.startswith("blobs/") and m.size > 10_000]
        assert len(layers) == 1
        layer = archive.extractfile(layers[0])
        assert layer
        with tarfile.open(fileobj=layer) as files:
            found = [member for member in files if member.isfile()]
            assert [member.name for member in found] == ["usr/bin/mantle-proxy"]
            assert "SCHILY.xattr.security.capability" in found[0].pax_headers, "the init container needs NET_ADMIN"
