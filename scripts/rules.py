"""House rules that no other linter knows. Prints every breach with what to do; exit code 1 if there is one.

- a source file has at most 600 lines (350 is the aim: few, deep files, but files one can read);
- a source file begins by saying what it is for;
- proxy/core has no I/O and no clock;
- `unsafe` stays in the files that talk to the kernel.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src/**/*.py", "apps/**/*.py", "tests/**/*.py", "bench/**/*.py")
SOURCES = (*FOLDERS, "scripts/*.py", "images/*.py", "proxy/**/*.rs")
HARD_LIMIT = 600
UNSAFE_ALLOWED = ("proxy/src/socket.rs", "proxy/src/redirect.rs", "proxy/src/redirect/", "proxy/src/main.rs")
IMPURE = re.compile(
    r"\btokio::|\bstd::(fs|process|thread|env)\b|\b(Instant|SystemTime)::now\b|\b(TcpStream|TcpListener|UdpSocket)\b"
)


def sources() -> Iterator[Path]:
    """Every source file that people write: no generated code, no build output."""
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            parts = path.relative_to(ROOT).parts
            if "gen" not in parts and "target" not in parts and "__pycache__" not in parts:
                yield path


def breaches(path: Path) -> Iterator[str]:
    name = str(path.relative_to(ROOT))
    text = path.read_text()
    lines = text.splitlines()
    if len(lines) > HARD_LIMIT:
        yield f"{name}: {len(lines)} lines, the limit is {HARD_LIMIT}: split it by what its parts are for"
    begins = text.removeprefix("#!/usr/bin/env python3\n").lstrip()
    if text.strip() and not begins.startswith(('"""', "//!", 'r"""')):
        yield f"{name}: begins without saying what it is for (a docstring, or //! in Rust)"
    if name.startswith("proxy/core/src/"):
        product = text.split("#[cfg(test)]")[0]
        for number, line in enumerate(product.splitlines(), 1):
            if IMPURE.search(line.split("//")[0]):
                yield f"{name}:{number}: the core has no I/O and no clock: {line.strip()}"
    if path.suffix == ".rs" and not name.startswith(UNSAFE_ALLOWED) and re.search(r"\bunsafe\s*[{fi]", text):
        yield f"{name}: unsafe code belongs into {', '.join(UNSAFE_ALLOWED[:2])}"


def main() -> None:
    found = [breach for path in sources() for breach in breaches(path)]
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
