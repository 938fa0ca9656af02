"""Every example of the documentation is run as it stands there.

A page's blocks run in order, in one fresh directory with this checkout's programs on the PATH:

- ```` ```yaml NAME ```` writes the file NAME;
- ```` ```console ```` runs each line that begins with `$ ` in bash; what follows up to the next one is what it must
  print (standard output, then standard error). `...` stands for anything within a line, and as a line of its own for
  any lines. `exit code N` as the last line is the exit code, 0 otherwise;
- ```` ```sh WORD ```` needs a cluster; `page_blocks.RUNNERS` says which test runs it there, and rules below hold
  each block to that;
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
from page_blocks import PAGES, ROOT, RUNNERS

BLOCK = re.compile(r"(?ms)^```(yaml|console)([^\n]*)\n(.*?)^```$")
TIMEOUT_SECONDS = 300


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


@pytest.mark.timeout(1200)
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
    got = f"{got.strip()}\n" if got.strip() else ""
    assert re.fullmatch(pattern, got), f"$ {command}\n--- the page says\n{expected}--- it printed\n{got}"


ELSEWHERE = {"observe.md", "check.md"}
"""Pages whose commands are run by tests/cli/test_docs.py, with the values of the page."""
FROM_A_CHECKOUT = {"README.md"}
"""What it shows of `make demo` is compared with the demo by tests/machine/test_demo.py."""
COMMANDS = "demo up down ps logs exec port-forward inject tap edges stat check identity version completion"


LANGUAGES = {"console", "sh", "text", "yaml"}
SHELL = re.compile(r"(?m)^(?:\$ |(?:    |\t)(?:mantle|kubectl|helm|make) )")
"""A line that shows a command outside of the blocks that are run: after a prompt, or indented as code."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_shows_a_command_that_nobody_runs(page: Path):
    text = page.read_text()
    for language, argument, body in re.findall(r"(?ms)^```(\w*)([^\n]*)\n(.*?)^```$", text):
        assert language in LANGUAGES, f"{page.name}: say what this block is, with one of {LANGUAGES}:\n{body}"
        if language == "sh":
            word, _, rest = argument.strip().partition(" ")
            claimed = word in RUNNERS and rest in ("", "fresh")
            assert claimed or (word == "nobody:" and rest), f"{page.name}: who runs this block? {set(RUNNERS)}\n{body}"
            assert (word == "make") == (page.name in FROM_A_CHECKOUT and body.startswith("make ")), body
        elif language == "text" and SHELL.search(body):
            ours = page.name in ELSEWHERE and re.findall(r"(?m)^\$ (?!mantle )", body) == []
            assert ours or page.name in FROM_A_CHECKOUT, f"{page.name}: mark the block as console or sh:\n{body}"
    outside = re.sub(r"(?ms)^```.*?^```$", "", text)
    assert not SHELL.search(outside), f"{page.name}: put the command into a block of its own"


@pytest.mark.parametrize("word", RUNNERS)
def test_each_word_of_a_block_has_a_test_that_runs_all_of_its_pages(word: str):
    runner = (ROOT / RUNNERS[word]).read_text()
    assert word == "make" or (f'pages("{word}")' in runner and f', "{word}")' in runner), RUNNERS[word]


def test_every_command_has_its_help_on_a_page():
    pages = "".join(page.read_text() for page in PAGES)
    assert [name for name in COMMANDS.split() if f"<!-- generated: help {name} -->" not in pages] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_what_make_is_said_to_do_it_can_do(page: str):
    targets = set(re.findall(r"(?m)^([a-z0-9]+):", (ROOT / "Makefile").read_text()))
    shown = re.findall(r"(?ms)^```sh(?: make)?\n(.*?)^```$", (ROOT / page).read_text())
    lines = [line for block in shown for line in block.splitlines() if line.startswith("make ")]
    words = {word for line in lines for word in line.partition("#")[0].split()[1:] if "=" not in word}
    assert lines and words <= targets


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme, f"README.md should link {page.name}"


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("*.md"))], ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links {target}"
