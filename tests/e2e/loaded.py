"""A pod of the mesh that asks one page without end: by it the plays that break or replace something are measured.

Knows how requests are counted, not what is done meanwhile.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from e2e.stage import EMOJIVOTO, Cluster, until

PAUSE = "mantle.local/pause:1"
PYTHON = next(line.split()[-1] for line in EMOJIVOTO.splitlines() if "image: mantle/emojivoto" in line)
URL = "http://web-svc.emojivoto/api/list"


def pod(namespace: str, name: str, image: str = PAUSE, command: list[str] | None = None, **annotations: str) -> str:
    """A pod of one container, which ends at once when it is told to."""
    container = {"name": "main", "image": image} | ({"command": command} if command else {})
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "annotations": annotations},
            "spec": {"terminationGracePeriodSeconds": 0, "containers": [container]},
        }
    )


def has_proxy(cluster: Cluster, namespace: str, name: str) -> bool:
    spec = cluster.get("pod", name, "-n", namespace)["spec"]
    return any(c["name"] == "mantle-proxy" for c in [*spec["containers"], *spec.get("initContainers", [])])


@contextmanager
def loaded(cluster: Cluster, namespace: str, url: str = URL) -> Iterator[None]:
    """A namespace that is meshed by its annotation, with the pod `load`; afterwards it is gone."""
    with cluster.namespace(namespace, **{"mantle.dev/inject": "enabled"}):
        program = Path(__file__).with_name("load.py").read_text()
        cluster.apply(pod(namespace, "load", PYTHON, ["/usr/bin/python3", "-c", program, url]))
        cluster.ready(namespace, "load")
        assert has_proxy(cluster, namespace, "load"), "the namespace's annotation puts its pods into the mesh"
        yield


def counted(cluster: Cluster, namespace: str) -> tuple[int, int, str]:
    """Requests so far, failed ones, and the last failure. AssertionError if there are none yet."""
    lines = cluster.kubectl("logs", "-n", namespace, "load", "-c", "main", "--tail=1").split()
    assert len(lines) == 3, "no requests yet"
    return int(lines[0]), int(lines[1]), lines[2]


@contextmanager
def no_request_fails(cluster: Cluster, namespace: str) -> Iterator[None]:
    """Within this block requests go on, and every one is answered."""
    before = until(lambda: counted(cluster, namespace), "the load runs")
    yield
    middle = until(lambda: counted(cluster, namespace), "the load's log can be read")
    after = until(lambda: (now := counted(cluster, namespace))[0] > middle[0] + 20 and now, "requests go on")
    assert after[1] == before[1], f"{after[1] - before[1]} of {after[0] - before[0]} requests failed: {after[2]}"


def requests_go_on(cluster: Cluster, namespace: str) -> None:
    """Waits until some requests in a row are answered, whatever was lost before."""

    def answered() -> bool:
        before = counted(cluster, namespace)
        after = until(lambda: (now := counted(cluster, namespace))[0] > before[0] + 20 and now, "requests go on")
        return after[1] == before[1]

    until(answered, "requests are answered")


def metric(found: dict[str, Any], port: int, name: str) -> dict[str, float]:
    """The values of a metric that a pod (as the API has it) serves at this port, by their labels. AssertionError if it
    does not answer.
    """
    url = f"http://{found['status'].get('podIP')}:{port}/metrics"
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as answer:
            text = answer.read().decode()
    except OSError as error:
        raise AssertionError(f"{url}: {error}") from None
    return {labels: float(value) for labels, value in re.findall(rf"^{name}(\S*) (\S+)$", text, re.MULTILINE)}
