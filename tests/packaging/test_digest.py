"""What `make test` says at its end of what failed: names first, few lines, and the cluster as it was."""

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

SUITE = """<testsuite>
<testcase classname="tests.e2e.test_x" name="test_fine"/>
<testcase classname="tests.e2e.test_x" name="test_broken"><failure message="long">tests/e2e/test_x.py:7: in test_broken
    until(seen, "seen")
tests/e2e/stage.py:99: in until
    raise AssertionError()
E   AssertionError: seen: not within 180 s
----------- the cluster -----------
pod emojivoto/web-1: Pending, restarts {}
</failure></testcase></testsuite>"""
RUST = """
failures:

---- control::tests::one stdout ----
thread 'one' panicked at src/control/tests.rs:7:9:
in time

failures:
    control::tests::one
"""
LINT = """lint: ruff                         ok      0 s
src/x.py:1: error: no
lint: mypy                         FAILED
lint: clippy                       ok      3 s
"""


@pytest.fixture(scope="module")
def digest() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "digest.py"
    spec = importlib.util.spec_from_file_location("digest", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_failure_is_its_name_its_words_and_the_cluster(digest: ModuleType):
    (text,) = digest.of_suite(ElementTree.fromstring(SUITE))
    assert text.splitlines() == [
        "FAILURE tests.e2e.test_x::test_broken",
        "tests/e2e/test_x.py:7: in test_broken",
        "tests/e2e/stage.py:99: in until",
        "E   AssertionError: seen: not within 180 s",
        "  the cluster:",
        "  pod emojivoto/web-1: Pending, restarts {}",
    ]


def test_rust_and_lint_say_what_broke(digest: ModuleType):
    (rust,) = digest.of_rust(RUST)
    assert rust.startswith("FAILURE control::tests::one\nthread 'one' panicked at src/control/tests.rs:7:9:\nin time")
    (nothing_built,) = digest.of_rust("error[E0308]: mismatched types\n  --> src/x.rs:1:2\n")
    assert nothing_built == "FAILURE rust\nerror[E0308]: mismatched types\n  --> src/x.rs:1:2"
    (lint,) = digest.of_lint(LINT)
    assert lint.splitlines() == ["lint: mypy                         FAILED", "src/x.py:1: error: no"]


def test_however_much_fails_every_name_is_there_and_lines_are_few(digest: ModuleType):
    failures = [f"FAILURE {number}\n" + "x" * 1000 + "\nmore" * 1000 for number in range(50)]
    lines = digest.together(failures).splitlines()
    assert [line for line in lines if line.startswith("FAILURE")] == [f"FAILURE {number}" for number in range(50)]
    assert len(lines) < 250 and max(map(len, lines)) <= 220
