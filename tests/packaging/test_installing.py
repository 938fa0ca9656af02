"""`make install` and the lock: what a fresh machine is told, and that the lock is the project's."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def preflight(path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = "source scripts/preflight.sh; preflight && echo $PYTHON"
    command = ["/bin/bash", "-c", script]
    return subprocess.run(
        command, cwd=ROOT, env={"PATH": path, **environment}, capture_output=True, text=True, timeout=120
    )


def test_a_machine_that_has_everything_passes():
    done = preflight(os.environ["PATH"], HOME=os.environ.get("HOME", "/"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_what_is_missing_is_said_in_one_sentence(tmp_path: Path):
    for tool in ("id", "uname"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    done = preflight(str(tmp_path))
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence == (
        "Mantle needs what this machine does not have: git; make; a C compiler (cc); "
        "Rust (cargo, from rustup or your distribution); Python 3.11 or newer (python3)."
    )


def test_the_lock_has_every_dependency_with_hashes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[<>=!~ \[]", line)[0].lower().replace(".", "-").replace("_", "-") for line in wanted}
    lock = (ROOT / "requirements.lock").read_text()
    locked = {name.replace(".", "-") for name in re.findall(r"^([a-z0-9._-]+)==", lock, re.M)}
    assert names - locked == {"mantle-proxy"}, "run `make lock` after changing dependencies"
    assert lock.count("--hash=sha256:") >= len(locked)


def test_the_two_distributions_and_the_package_agree_on_the_version():
    mesh = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    proxy = tomllib.loads((ROOT / "proxy/Cargo.toml").read_text())["workspace"]["package"]
    package = re.search(r'__version__ = "(.*)"', (ROOT / "src/mantle/__init__.py").read_text())
    assert package and mesh["version"] == proxy["version"] == package[1]
    assert f"mantle-proxy=={proxy['version']}" in mesh["dependencies"]
