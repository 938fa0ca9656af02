"""Identity's clock is five minutes off: proxies with a certificate notice nothing, new ones are told, none is plain."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e.stage import Cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
NAMESPACE = "clocks"
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime")


@contextmanager
def identity_off_by(cluster: Cluster, offset: str) -> Iterator[None]:
    """Identity runs under libfaketime, which it finds on the node; afterwards as before."""
    assert FAKETIME.is_dir(), f"{FAKETIME} is missing: tests/e2e/programs.txt names its package"
    env = {"LD_PRELOAD": "/faketime/libfaketime.so.1", "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    container = "/spec/template/spec/containers/0"
    patch = [
        {"op": "test", "path": f"{container}/name", "value": "identity"},
        {"op": "add", "path": f"{container}/env", "value": [{"name": k, "value": v} for k, v in env.items()]},
        {
            "op": "add",
            "path": f"{container}/volumeMounts/-",
            "value": {"name": "faketime", "mountPath": "/faketime", "readOnly": True},
        },
        {
            "op": "add",
            "path": "/spec/template/spec/volumes/-",
            "value": {"name": "faketime", "hostPath": {"path": str(FAKETIME)}},
        },
    ]
    cluster.kubectl("patch", "deploy", "-n", "mantle", "mantle-identity", "--type=json", "-p", json.dumps(patch))
    try:
        yield
    finally:
        cluster.kubectl("rollout", "undo", "-n", "mantle", "deploy/mantle-identity")
        cluster.rolled_out("mantle", "mantle-identity")


@pytest.fixture
def space(emojivoto: Cluster) -> Iterator[Cluster]:
    with emojivoto.namespace(NAMESPACE, **{"mantle.dev/inject": "enabled"}):
        yield emojivoto


def new_pod(cluster: Cluster) -> None:
    spec = {"terminationGracePeriodSeconds": 0, "containers": [{"name": "main", "image": "mantle.local/pause:1"}]}
    metadata = {"name": "new", "namespace": NAMESPACE}
    cluster.apply(json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}))


def names(cluster: Cluster) -> list[str]:
    return [pod["metadata"]["name"] for pod in cluster.pods("mantle", "mantle-identity")]


def test_a_slow_clock_of_identity_is_no_trouble_and_check_measures_it(space: Cluster) -> None:
    def measured() -> bool:
        said = json.loads(space.mantle("check", "-o", "json", code=None))
        checks = {check["id"]: check for category in said["categories"] for check in category["checks"]}
        found = checks["clock-identity"]
        return re.match(r"identity is (29\d|30\d) s behind the API server", found.get("error", "")) is not None

    with identity_off_by(space, "-300s"):
        space.rolled_out("mantle", "mantle-identity")
        until(measured, "check says how far identity's clock is behind")
        new_pod(space)
        space.ready(NAMESPACE, "new")


def test_an_identity_with_a_fast_clock_never_takes_over(space: Cluster) -> None:
    """What it signs is not valid yet. Its own proxy sees that first, so the pod never becomes ready, the rollout
    stops, and the identity before it goes on signing. The log says by how much the clocks differ.
    """
    old = space.pod("mantle", "mantle-identity")
    with identity_off_by(space, "+300s"):

        def told() -> bool:
            new = [name for name in names(space) if name != old]
            assert new, "the rollout has not begun"
            said = space.kubectl("logs", "-n", "mantle", new[0], "-c", "mantle-proxy", code=None)
            assert "certified name=" not in said, "a certificate of the future was accepted"
            assert "of this mesh" not in said, "a clock that is off is taken for another mesh"
            return "certificate is not valid before" in said and "compare the clock of this node" in said

        until(told, "the proxy beside it says how far the clocks differ")
        new_pod(space)
        space.ready(NAMESPACE, "new")
        assert old in names(space)
