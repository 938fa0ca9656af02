"""The real cluster, with Mantle installed and emojivoto in the mesh: each once a run, by the commands that people type.

With MANTLE_E2E_KEEP set the cluster is used if it is up and stays up: for working on a test. MANTLE_E2E_PROFILE is
cargo's profile of the proxy in the image (dev). A failure ends with what the cluster looked like when it came.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from e2e.stage import COMPONENTS, TOOL, Cluster, environment, keep, load_images, meshed

UP: list[Cluster] = []
"""The cluster, once it is up."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Adds to a failure what a person would look at, as nobody can look at the cluster of another machine."""
    report = yield
    if report.failed and UP and hasattr(report.longrepr, "addsection"):
        try:
            report.longrepr.addsection("the cluster", UP[0].explained())
        except Exception as silent:  # a cluster that does not answer is what has failed
            report.longrepr.addsection("the cluster", f"does not answer: {str(silent)[:500]}")
    return report


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with our images and nothing else of ours."""
    if not keep():
        subprocess.run([TOOL, "down"], check=True, timeout=300)
    subprocess.run([TOOL, "up"], check=True, timeout=1800)
    try:
        load_images(("proxy", "control-plane", "debug", "emojivoto"), os.environ.get("MANTLE_E2E_PROFILE", "dev"))
        UP.append(Cluster(environment(tmp_path_factory.mktemp("programs"))))
        yield UP[0]
    finally:
        UP.clear()
        if not keep():
            subprocess.run([TOOL, "down"], check=True, timeout=300)


@pytest.fixture(scope="session")
def cluster(bare: Cluster) -> Cluster:
    """Mantle is installed: `mantle install | kubectl apply -f -`, every component is ready, and pods get proxies."""
    bare.apply(bare.mantle("install"))
    if keep():
        bare.kubectl("rollout", "restart", "deploy", "-n", "mantle")
    bare.rolled_out("mantle", *COMPONENTS)
    bare.injecting()
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
