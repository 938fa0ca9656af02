"""What failed, in few lines: whoever reads the output of another machine sees its end only. Text in, text out."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence

WIDTH, EACH, ALL = 220, 36, 150
"""Characters of a line, lines of a failure, lines of all failures together."""
CLUSTER = "the cluster"
"""The section that tests/e2e adds to a failure."""


def of_suite(suite: ElementTree.Element) -> Iterator[str]:
    """The failures of one of pytest's suites (junit-xml): where, the assertion's own words, and what stood by."""
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            for found in case.iter(kind):
                yield "\n".join([f"{kind.upper()} {case.get('classname')}::{case.get('name')}", *_essence(found.text)])


def _essence(text: str | None) -> Iterator[str]:
    lines = (text or "").splitlines()
    heads = [n for n, line in enumerate(lines) if re.fullmatch(rf"[-_ ]*{CLUSTER}[-_ ]*", line)]
    own, section = (lines[: heads[0]], lines[heads[0] + 1 :]) if heads else (lines, [])
    yield from [line for line in own if re.match(r"(tests|src|scripts)/\S+:\d+: in ", line)][-4:]
    said = [line for line in own if line.startswith("E ")]
    yield from said[:12] if said else [line for line in own if line.strip()][-12:]
    if section:
        yield f"  {CLUSTER}:"
        yield from (f"  {line}" for line in section[:18])


def of_rust(output: str) -> list[str]:
    """The failures of `cargo test`: what each test printed, or why nothing was built."""
    blocks = re.findall(r"(?ms)^---- (\S+) stdout ----\n(.*?)(?=^----|^failures:|\Z)", output)
    errors = re.findall(r"(?m)^error.*(?:\n +-->.*)?", output)
    return [f"FAILURE {name}\n{_first(text, 12)}" for name, text in blocks] or [
        "FAILURE rust\n" + "\n".join(errors[:10])
    ]


def of_lint(output: str) -> list[str]:
    """What the checks that failed said, which stands before the line that says so."""
    blocks = re.split(r"(?m)^(lint: .*)\n", output)
    return [
        f"{line}\n{_first(said, 15)}" for said, line in zip(blocks[::2], blocks[1::2], strict=False) if "FAILED" in line
    ]


def of_end(output: str) -> list[str]:
    """The end of what a step said that broke without naming a test."""
    return ["FAILURE\n" + "\n".join(output.rstrip().splitlines()[-20:])]


def _first(text: str, count: int) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][:count])


def together(failures: Sequence[str]) -> str:
    """All failures, each cut to its first lines; where there are too many, the last ones' names only."""
    lines: list[str] = []
    for text in failures:
        head, *rest = text.splitlines()
        lines += [head, *(f"    {line}" for line in rest[: EACH if len(lines) < ALL else 0])]
    return "\n".join(line[:WIDTH] for line in lines)
