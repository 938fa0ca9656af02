"""Every example of the documentation is run as it stands there.

A page's blocks run in order, in one fresh directory with this checkout's programs on the PATH:

- ```` ```yaml NAME ```` writes the file NAME;
- ```` ```console ```` runs each line that begins with `$ ` in bash; what follows up to the next one is what it must
  print (standard output, then standard error). `...` stands for anything within a line, and as a line of its own for
  any lines. `exit code N` as the last line is the exit code, 0 otherwise;
- other blocks are for reading.

$MANTLE_MESH names a mesh of the page's own. A page that says `<!-- makes: mesh -->` may start it; one that says
`<!-- needs: mesh -->` finds it running, with emojivoto in it. It is taken down in the end.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"(?ms)^```(yaml|console)([^\n]*)\n(.*?)^```$")
TIMEOUT_SECONDS = 120


def environment(home: Path, mesh: str) -> dict[str, str]:
    programs = str(Path(sys.executable).parent)
    kept = {key: os.environ[key] for key in ("LANG", "LC_ALL", "XDG_RUNTIME_DIR") if key in os.environ}
    path = f"{programs}:{ROOT / '.venv/bin'}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(home), "MANTLE_MESH": mesh, "COLUMNS": "110"} | kept


@pytest.fixture
def mesh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The name of the page's own mesh, running if the page needs it to, and gone afterwards."""
    page: Path = request.node.callspec.params["page"]
    name, text = f"docs-{page.stem}".lower(), page.read_text()
    env = environment(tmp_path, name)
    mantle = str(Path(sys.executable).with_name("mantle"))
    try:
        if "<!-- needs: mesh -->" in text:
            up = [mantle, "up", "-d", str(ROOT / "apps/emojivoto/emojivoto.yml")]
            subprocess.run(up, env=env, check=True, timeout=TIMEOUT_SECONDS, capture_output=True, text=True)
        yield name
    finally:
        if "<!-- needs: mesh -->" in text or "<!-- makes: mesh -->" in text:
            subprocess.run([mantle, "down"], env=env, timeout=TIMEOUT_SECONDS, capture_output=True, check=True)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_do_what_the_page_says(page: Path, mesh: str, tmp_path: Path):
    for language, argument, body in BLOCK.findall(page.read_text()):
        if language == "yaml" and argument.strip():
            (tmp_path / argument.strip()).write_text(body)
        elif language == "console":
            for command, expected in re.findall(r"(?ms)^\$ ([^\n]*)\n(.*?)(?=^\$ |\Z)", body):
                check(command, expected, tmp_path, environment(tmp_path, mesh))


def check(command: str, expected: str, directory: Path, env: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", command], cwd=directory, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    got = done.stdout + done.stderr
    if done.returncode:
        got = f"{got.rstrip()}\nexit code {done.returncode}\n"
    pattern = "".join(
        r"(?:[^\n]*\n)*?"
        if line.strip() == "..."
        else re.escape(line.rstrip()).replace(r"\.\.\.", r"[^\n]*") + r"\s*?\n"
        for line in expected.strip().splitlines()
    )
    assert re.fullmatch(pattern, got.strip() + "\n"), f"$ {command}\n--- the page says\n{expected}--- it printed\n{got}"


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme, f"README.md should link {page.name}"


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("*.md"))], ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links {target}"
