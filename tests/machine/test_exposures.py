"""Which directories a pod is shown because its user could not reach them on the host."""

from pathlib import Path

from mantle.platform.machine.images import Viewer, exposures

STRANGER = Viewer(54321, frozenset({54321}))


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_a_script_needs_its_interpreter_and_that_ones_libraries(tmp_path: Path) -> None:
    """A console script of a virtual environment whose Python lies in a private home."""
    home = tmp_path / "home"
    python = program(home / "versions" / "3" / "bin" / "python3", "an ELF file")
    (home / "versions" / "3" / "lib").mkdir()
    venv = tmp_path / "checkout" / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "lib").mkdir()
    (venv / "bin" / "python").symlink_to(python)
    script = program(venv / "bin" / "web", f"#!{venv}/bin/python -I\nimport web\n")
    for directory in (home, tmp_path / "checkout"):
        directory.chmod(0o700)
    assert exposures(str(script), "/", STRANGER) == [str(venv), str(home / "versions" / "3")]


def test_a_checkout_that_an_environment_is_linked_to_is_shown_too(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "src").mkdir(parents=True)
    packages = checkout / ".venv" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "web.pth").write_text(f"import web_hook\n{checkout}/src\n")
    script = program(checkout / ".venv" / "bin" / "web", "an ELF file")
    (tmp_path / "more").mkdir(mode=0o700)
    checkout.chmod(0o700)
    shown = exposures(str(script), "/", STRANGER, f"{tmp_path}/more:relative")
    assert shown == sorted([str(checkout / ".venv"), str(checkout / "src"), str(tmp_path / "more")])
