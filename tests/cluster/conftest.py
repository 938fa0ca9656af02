"""A real API server for tests that need no running pod: etcd, kube-apiserver and controller-manager on loopback.

One for each file of tests, as files leave different control planes behind: 3-4 seconds, any user, nothing left behind.
`make e2e` runs these tests; the tool that starts the cluster is tests/e2e/cluster.
"""

import asyncio
import inspect
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mantle.platform.kubernetes import tokens

from .apiserver import TOOL, ApiServer, running


@pytest.fixture(scope="module")
def api_server() -> Iterator[ApiServer]:
    """The API server; ends with the file, also when tests failed."""
    with running() as server:
        yield server


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine's API server may take longer over a token than identity waits for it: here it is waited for."""
    monkeypatch.setattr(tokens, "REVIEW_TIMEOUT", 30.0)


def pytest_configure() -> None:
    """A run that is told to end takes its API server with it: teardown runs after Ctrl-C, not after SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def helm() -> Path:
    """Helm's program; built from Go modules on the first use on a machine."""
    done = subprocess.run([TOOL, "helm"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs tests that are coroutines, each on an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in wanted}))
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this directory needs the API server."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
