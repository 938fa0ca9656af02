"""`make test`: lint, the Rust tests, the Python tests (real proxies in real namespaces and the demo among
them). What needs a cluster is `make e2e`.

Every step runs even when an earlier one failed. The last lines say shortly what failed (`digest.py`), then one table
and, for machines, `tests: N passed, N failed`. Arguments go to pytest: `python scripts/test.py -k inject`. With CI=true
a skipped test is a failure.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import digest

ROOT = Path(__file__).resolve().parent.parent
WORKERS = os.environ.get("MANTLE_TEST_WORKERS", "4")
"""Most tests of real proxies wait more than they compute, so there are more workers than cores."""


@dataclass
class Step:
    """What came of one step. `failed` counts tests; a step that breaks without any counts as one, and `failures` has
    a few lines about each.
    """

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    failures: list[str] = field(default_factory=list)


def missing_programs() -> str:
    """The sentence about third-party programs that tests talk to and this machine lacks; empty if there are none."""
    lines = (ROOT / "tests" / "programs.txt").read_text().splitlines()
    wanted = [line.split() for line in lines if line and not line.startswith("#")]
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [(program, package) for program, package in wanted if not shutil.which(program, path=path)]
    if not missing:
        return ""
    programs = ", ".join(program for program, _ in missing)
    packages = " ".join(sorted({package for _, package in missing}))
    return (
        f"The tests need programs that this machine does not have: {programs} (on Debian: apt-get install {packages})."
    )


def run(name: str, command: Sequence[str], **environment: str) -> tuple[int, str, float]:
    """Runs a step, shows its output line by line as it comes; returns exit code, output, seconds."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines), time.monotonic() - began


def lint() -> Step:
    code, output, seconds = run("lint", ["scripts/lint.sh"])
    failed = len(re.findall(r"^lint: .* FAILED$", output, re.M))
    passed = len(re.findall(r"^lint: .* ok ", output, re.M))
    return Step("lint", passed, failed or int(code != 0), 0, seconds, digest.of_lint(output) if code else [])


def rust() -> Step:
    command = ["cargo", "test", "--manifest-path", "proxy/Cargo.toml", "--workspace", "--locked", "--quiet"]
    code, output, seconds = run("rust", command)
    results = re.findall(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", output, re.M)
    passed, failed, ignored = (sum(int(row[column]) for row in results) for column in range(3))
    if os.environ.get("CI") == "true":  # what CI does not run, nobody does
        failed, ignored = failed + ignored, 0
    return Step("rust", passed, failed or int(code != 0), ignored, seconds, digest.of_rust(output) if code else [])


def python(arguments: Sequence[str], name: str = "python") -> Step:
    """Runs pytest; `arguments` say what, `name` is the step's in the summary."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "junit.xml"
        command = [".venv/bin/pytest", "-q", f"--junit-xml={report}", "--durations=8", "--tb=short", *arguments]
        code, output, seconds = run(name, command)
        suites = list(ElementTree.parse(report).getroot()) if report.exists() else []
    total, failures, errors, skipped = (
        sum(int(suite.get(key, "0")) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    said = [text for suite in suites for text in digest.of_suite(suite)] or digest.of_end(output)
    return Step(name, total - failed - skipped, failed or int(code != 0), skipped, seconds, said if code else [])


def without_cluster(arguments: Sequence[str]) -> Step:
    workers = ["-n", WORKERS, "--dist", "worksteal"]
    return python(["--ignore=tests/e2e", "--ignore=tests/cluster", *workers, *arguments])


def elsewhere() -> int:
    """Tests a copy of this checkout outside /tmp: pods have a /tmp of their own, and some tests replace the host's."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="mantle-test.") as directory:
        Path(directory).chmod(0o755)
        copy = Path(directory) / "checkout"
        print(f"this checkout lies below /tmp, which the tests replace: testing a copy in {copy}", flush=True)
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv", "target", "__pycache__"))
        return subprocess.run(["make", "test"], cwd=copy, check=False).returncode


def main() -> None:
    # A shell starts background jobs with SIGINT and SIGQUIT ignored, and children inherit that; tests press Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    if sentence := missing_programs():
        print(sentence, file=sys.stderr)
        sys.exit(1)
    if ROOT.is_relative_to("/tmp"):
        sys.exit(elsewhere())
    if "CARGO_TARGET_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        os.environ["CARGO_TARGET_DIR"] = f"{cache}/mantle/target"
    began = time.monotonic()
    steps = [lint(), rust(), without_cluster(sys.argv[1:])]
    summary(steps, time.monotonic() - began)


def summary(steps: Sequence[Step], seconds: float) -> None:
    """What failed, the table, the line for machines, and the end of the program. `seconds`: what all of it took. What
    failed goes into the file $MANTLE_FAILURES, too: for the end of a run that goes on.
    """
    if told := digest.together([text for step in steps for text in step.failures]):
        print(f"\n== what failed\n{told}")
        if where := os.environ.get("MANTLE_FAILURES"):
            with Path(where).open("a") as file:
                print(told, file=file)
    print("\n== summary")
    for step in steps:
        counts = f"{step.passed:5} passed {step.failed:4} failed {step.skipped:4} skipped"
        print(f"   {step.name:8} {counts} {step.seconds:8.1f} s")
    print(f"   {'all':8} {seconds:52.1f} s")
    passed, failed, skipped = (sum(getattr(s, k) for s in steps) for k in ("passed", "failed", "skipped"))
    print(f"tests: {passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
