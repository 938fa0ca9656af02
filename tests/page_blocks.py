"""The shell blocks of the documentation: which test runs each, and what a reader of a page has beside it.

A block that begins with ```` ```sh WORD ```` is run as it stands by the test that `RUNNERS` names for WORD, with the
other blocks of its page that have the same word, in order. ```` ```sh nobody: WHY ```` is run by nobody, and says why.
tests/docs holds every page to that, so that no new block is forgotten.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mantle.core.ca import make_trust
from mantle.core.names import MeshNames

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
RUNNERS = {
    "api": "tests/cluster/test_docs.py",
    "pods": "tests/e2e/test_8_docs.py",
    "optional": "tests/e2e/test_6_optional.py",
    "leave": "tests/e2e/test_9_leave.py",
    "make": "tests/docs/test_examples.py",
}
"""api: an API server without pods is enough; pods: emojivoto is in the mesh; optional, leave: their own plays; make:
only what `make` is said to do is looked at."""
_FILE = re.compile(r"(?ms)^```yaml ([^\n]+)\n(.*?)^```$")
_BLOCK = re.compile(r"(?ms)^```sh (\w+)([^\n]*)\n(.*?)^```$")
_CAREFUL = 'head() { command head "$@" | grep .; }\n'
"""Who looks and sees nothing is not content: `head` of nothing fails."""


@dataclass(frozen=True)
class Block:
    """What stands between the fences, and what follows the word: `fresh` is a cluster without Mantle."""

    text: str
    fresh: bool

    @property
    def command(self) -> list[str]:
        # A pipe into `head` ends the left side early: that is no failure, so pipefail stays off.
        return ["bash", "-ec", _CAREFUL + self.text]


def blocks(page: Path, word: str) -> list[Block]:
    """The page's blocks for the runner that `word` names."""
    return [Block(text, rest.strip() == "fresh") for of, rest, text in _BLOCK.findall(page.read_text()) if of == word]


def pages(word: str) -> list[Path]:
    """The pages with such blocks."""
    return [page for page in PAGES if blocks(page, word)]


def desk(directory: Path, page: Path, app: str = "") -> Path:
    """A directory with what a page takes for granted: a checkout's `apps`, an application, a CA of one's own; and with
    the files that the page itself shows.

    `app`: the manifest `app.yml`; emojivoto if it is not given.
    """
    for name, text in _FILE.findall(page.read_text()):
        (directory / name.strip()).write_text(text)
    (directory / "apps").symlink_to(ROOT / "apps")
    (directory / "app.yml").write_text(app or (ROOT / "apps/emojivoto/emojivoto.yml").read_text())
    trust = make_trust(MeshNames("mantle", "cluster.local"), datetime.now(UTC), (b"r" * 16, b"i" * 16))
    for name, pem in (
        ("ca.crt", trust.roots_pem),
        ("issuer.crt", trust.issuer_pem),
        ("issuer.key", trust.issuer_key_pem),
    ):
        (directory / name).write_bytes(pem)
    return directory
