"""How commands print: escaping of what peers wrote, tables like Go's tabwriter, JSON, and failures with their fix.

Pure but for `write` and `Failure.show`. Everything that a peer controls (paths, header values, names from the wire)
passes through `escape` before it reaches a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import click

PADDING = 3
"""Spaces between columns."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake or failure: what it is, what to do, and where it is if it is in a file (`line` starts at 1)."""

    message: str
    fix: str | None = None
    file: str | None = None
    line: int | None = None

    def text(self) -> str:
        where = "" if self.file is None else f"{self.file}: " if self.line is None else f"{self.file}:{self.line}: "
        return where + self.message + (f"\n  fix: {self.fix}" if self.fix else "")


class Failure(click.ClickException):
    """A command could not do what it was asked: every problem found, each with its fix. Exit code 1."""

    exit_code = 1

    def __init__(self, message: str, fix: str | None = None, *, more: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = (Problem(message, fix), *more)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Failure:
        """A failure of at least one problem."""
        failure = cls(problems[0].message)
        failure.problems = tuple(problems)
        return failure

    def show(self, file: IO[Any] | None = None) -> None:
        for problem in self.problems:
            click.echo("error: " + escape(problem.text(), keep="\n"), file=file or sys.stderr)


def escape(text: str, *, keep: str = "") -> str:
    """`text` with everything that could move a terminal's cursor or forge a line written as `\\xNN` or `\\u{NNNN}`.

    Printable characters of any script stay; control, format, surrogate and separator characters other than the space
    do not, and neither does the backslash, so that the result is unambiguous. `keep` names characters to leave alone.
    """
    if text.isascii() and text.isprintable() and "\\" not in text:
        return text
    return "".join(c if c in keep or (c.isprintable() and c != "\\") else _escaped(c) for c in text)


def _escaped(char: str) -> str:
    code = ord(char)
    if char == "\\":
        return "\\\\"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{{{code:x}}}"


def left_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned left, padded by three spaces; the last one unpadded. Ends with a line end."""
    table = [list(header), *([escape(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) + PADDING for i in range(len(header) - 1)]
    lines = ("".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + row[-1] for row in table)
    return "\n".join(lines) + "\n"


def right_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """The first `left` columns aligned left, the others right, three spaces between. Ends with a line end."""
    table = [list(header), *([escape(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    gap = " " * PADDING
    lines = (
        gap.join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in table
    )
    return "\n".join(lines) + "\n"


def json_text(value: Any) -> str:
    """Indented JSON for people and tools, with a line end. What could move a cursor is written as `\\uNNNN`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if text.isascii() and "\x7f" not in text:
        return text  # JSON escapes the other control characters itself
    return "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1].replace("\x7f", "\\u007f") for c in text)


def json_line(value: Any) -> str:
    """One object on one line, with a line end. Line ends inside strings are escaped by JSON itself."""
    return json.dumps(value, separators=(",", ":")) + "\n"


def write(text: str, *, flush: bool = True) -> None:
    """To standard output, at once: a pipe must see a tap line when it happens."""
    sys.stdout.write(text)
    if flush:
        sys.stdout.flush()


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
