"""Both wheels, as a person without Rust meets them: an empty environment, `pip install`, and the programs run."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BARE_PATH = "/usr/local/bin:/usr/bin:/bin"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Built from what `make install` has compiled already, so this takes seconds."""
    out = tmp_path_factory.mktemp("wheels")
    profile = (ROOT / ".venv" / ".mantle-profile").read_text().strip()
    subprocess.run([ROOT / "scripts/wheels.sh", profile, out], check=True, capture_output=True, timeout=1500)
    return sorted(out.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_empty_environment_gets_both_programs_without_rust(wheels: list[Path], tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True, timeout=300)
    programs = tmp_path / "env" / "bin"
    install = [programs / "python", "-m", "pip", "install", "--quiet", *wheels]
    subprocess.run(install, check=True, timeout=300, cwd=tmp_path)

    def run(*command: str) -> str:
        environment = {"PATH": f"{programs}:{BARE_PATH}", "HOME": str(tmp_path)}
        environment |= {k: v for k, v in os.environ.items() if k == "LANG"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("mantle", "version", "--client") == "Client version: 0.1.0\n"
    assert run("mantle-proxy", "--version").split()[-1] == "0.1.0"
    assert "up" in run("mantle", "--help")
    place = run("python", "-c", "import mantle_emojivoto; print(mantle_emojivoto.directory())").strip()
    assert place.startswith(str(tmp_path))
    assert (
        'deployment "web" injected'
        in subprocess.run(
            [programs / "mantle", "inject", f"{place}/emojivoto.yml"], capture_output=True, text=True, timeout=60
        ).stderr
    )
    assert (Path(place) / "mantle.images.yml").exists()


def test_the_wheels_hold_what_they_should(wheels: list[Path]):
    mesh, proxy = wheels
    names = set(zipfile.ZipFile(mesh).namelist())
    for name in (
        "mantle/manifests/control-plane.yml",
        "mantle_emojivoto/static/app.js",
        "mantle_emojivoto/emojivoto.yml",
    ):
        assert name in names
    assert not [name for name in names if "test" in name or name.endswith((".rs", ".proto"))]
    (program,) = [name for name in zipfile.ZipFile(proxy).namelist() if "/scripts/" in name]
    assert program.endswith("/mantle-proxy")
    assert "py3-none-" in proxy.name, "one wheel for every Python"
