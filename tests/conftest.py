"""Rules for every test: in CI nothing is quietly skipped, and everybody finds the same proxy."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Tests of one worker use gRPC, later ones fork it. gRPC's own handlers for that wait for threads which the child lacks.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With CI=true a skip is a failure: what CI does not run, nobody does. `may_skip("why")` is the written way out."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and _in_ci() and not item.get_closest_marker("may_skip"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, which is a failure in CI: {reason}"
    return report


def pytest_configure() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that; tests press Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_ci() -> bool:
    return os.environ.get("CI") == "true"


@pytest.fixture(scope="session")
def mantle_proxy() -> Path:
    """The proxy under test: $MANTLE_PROXY, else the one that `make install` left."""
    named = os.environ.get("MANTLE_PROXY")
    found = Path(named) if named else ROOT / ".venv" / "bin" / "mantle-proxy"
    assert found.exists(), f"{found} does not exist: run `make install`"
    return found


@pytest.fixture
def program() -> object:
    """`program("curl")`: the path of a third-party program; tests/programs.txt lists them all."""

    def find(name: str) -> str:
        path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        assert path, f"{name} is missing: `.ci/run` installs what tests/programs.txt lists"
        return path

    return find
