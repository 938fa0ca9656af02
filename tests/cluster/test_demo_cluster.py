"""`mantle demo --context`: what it makes, what it waits for, and that nothing of it stays. No pod runs here: the test
says of the Deployments what a kubelet would, or nothing.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .apiserver import ApiServer
from .injecting import eventually
from .test_views import Views, views  # noqa: F401  (a fixture)

DEPLOYMENTS = {"emoji", "vote-bot", "voting", "web"}


@pytest.fixture
def demo(views: Views, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:  # noqa: F811
    context = json.loads(views.api.kubeconfig.read_text())["current-context"]
    command = [sys.executable, "-m", "mantle", "demo", "--context", context, "--for", "2s"]
    environment = {**os.environ, "KUBECONFIG": str(views.api.kubeconfig)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def exists(api: ApiServer) -> bool:
    return "emojivoto" in api.kubectl("get", "namespaces", "-o", "name")


def test_the_demo_makes_emojivoto_in_the_mesh_and_takes_it_away(
    views: Views,  # noqa: F811
    demo: subprocess.Popen[str],
) -> None:
    api = views.api

    def made() -> bool:
        assert demo.poll() is None, demo.communicate()
        if not exists(api):
            return False
        names = api.kubectl("-n", "emojivoto", "get", "deploy", "-o", "jsonpath={.items[*].metadata.name}").split()
        return set(names) >= DEPLOYMENTS

    eventually(made)
    annotation = "jsonpath={.metadata.annotations.mantle\\.dev/inject}"
    assert api.kubectl("get", "namespace", "emojivoto", "-o", annotation) == "enabled"
    # A second demo does not take over what the first one made.
    ended = views.mantle("demo --for 1s")
    assert "namespace emojivoto exists already" in ended.stderr
    demo.send_signal(signal.SIGINT)
    _, errors = demo.communicate(timeout=400)
    assert demo.returncode == 1  # no traffic was seen
    assert "creating namespace emojivoto on cluster " in errors
    assert "error: no traffic was seen from vote-bot to web" in errors
    assert not exists(api)


def test_without_the_right_to_make_it_nothing_is_made(api_server: ApiServer, views: Views) -> None:  # noqa: F811
    api_server.kubectl("create", "clusterrolebinding", "erin-view", "--clusterrole=view", "--user=erin")
    ended = views.mantle("demo --for 1s --as erin")
    assert ended.returncode == 1
    assert "Namespace emojivoto was refused" in ended.stderr
    assert "was not deleted" not in ended.stderr
    assert not exists(api_server)
