"""The real cluster, with Mantle installed and emojivoto in the mesh: each once a run, by the commands that people type.

With MANTLE_E2E_KEEP set the cluster is used if it is up and stays up: for working on a test. MANTLE_E2E_PROFILE is
cargo's profile of the proxy in the image (dev).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
from e2e.stage import COMPONENTS, TOOL, Cluster, environment, keep, load_images, meshed


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with our images and nothing else of ours."""
    if not keep():
        subprocess.run([TOOL, "down"], check=True, timeout=120)
    subprocess.run([TOOL, "up"], check=True, timeout=1800)
    try:
        load_images(("proxy", "control-plane", "debug", "emojivoto"), os.environ.get("MANTLE_E2E_PROFILE", "dev"))
        yield Cluster(environment(tmp_path_factory.mktemp("programs")))
    finally:
        if not keep():
            subprocess.run([TOOL, "down"], check=True, timeout=120)


@pytest.fixture(scope="session")
def cluster(bare: Cluster) -> Cluster:
    """Mantle is installed: `mantle install | kubectl apply -f -`, and every component is ready."""
    bare.apply(bare.mantle("install"))
    if keep():
        bare.kubectl("rollout", "restart", "deploy", "-n", "mantle")
    bare.rolled_out("mantle", *COMPONENTS)
    return bare


@pytest.fixture(scope="session")
def emojivoto(cluster: Cluster) -> Cluster:
    """emojivoto in the mesh: `mantle inject emojivoto.yml | kubectl apply -f -`, every pod ready with its proxy."""
    cluster.apply(cluster.mantle("inject", "apps/emojivoto/emojivoto.yml"))
    if keep():  # images of the same name may be newer than what runs
        cluster.kubectl("rollout", "restart", "deploy", "-n", "emojivoto")
    cluster.rolled_out("emojivoto")
    meshed(cluster, "emojivoto")
    return cluster
