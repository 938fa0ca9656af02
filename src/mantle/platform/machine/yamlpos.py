"""YAML text -> plain values with the line of each, and every syntax mistake with its line.

For: reading files that strangers wrote. The parser's events are composed here, without recursion, so that aliases
(`billion laughs`), depth and size are bounded before anything is built. Must not know what Kubernetes is.

Plain scalars mean what Kubernetes' YAML reader makes of them: YAML 1.2's core schema, plus `yes/no/on/off` as booleans
and `0644` as octal, so that a file means the same here as on a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]

MAX_BYTES = 2 * 1024 * 1024
MAX_NODES = 200_000
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing a person has to change. `line` counts from 1; 0 means that no line is to blame."""

    file: str
    line: int
    message: str
    fix: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.line else (f"{self.file}: " if self.file else "")
        return f"{where}{self.message}" + (f"\n    fix: {self.fix}" if self.fix else "")


class Mistakes(ValueError):
    """Everything that is wrong, at once. `items` is never empty."""

    def __init__(self, items: list[Mistake]) -> None:
        super().__init__("\n".join(str(m) for m in items))
        self.items = items


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document: its value, and the line (from 1) of every value inside it by path."""

    value: Any
    lines: Mapping[Path, int]

    def line(self, path: Path) -> int:
        """The line of the value at `path`, or of its nearest ancestor that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read(file: str, text: str) -> tuple[list[Document], list[Mistake]]:
    """All documents of `text`, and what is wrong with it. Empty documents are left out.

    A mistake in the syntax ends its document only: reading goes on at the next `---`, which no scalar can contain.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return [], [Mistake(file, 0, f"the file is larger than {MAX_BYTES // 1024} KiB", "split it into several files")]
    composer = _Composer(file)
    lines = text.split("\n")
    start: int | None = 0
    while start is not None:
        start = _read_from(lines, start, composer)
    return composer.documents, composer.mistakes


def _read_from(lines: list[str], start: int, composer: _Composer) -> int | None:
    """Reads from line `start` (from 0) on; where to go on after a mistake in the syntax, None if nowhere."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    file, composer.first = composer.file, start + 1
    try:
        for event in YAML(typ="safe", pure=True).parse("\n".join(lines[start:])):
            composer.feed(event)
    except _TooMuch as stop:
        composer.mistakes.append(Mistake(file, stop.line, stop.message, stop.fix))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = " ".join(str(w) for w in (error.context, error.problem) if w)
        line = mark.line + composer.first if mark is not None else 0
        composer.mistakes.append(Mistake(file, line, f"this is not YAML: {words}", _syntax_fix(lines, line)))
        behind = range(max(line - 1, start + 1), len(lines))
        return next((n for n in behind if re.match(r"---(\s|\Z)", lines[n])), None)
    except (YAMLError, ValueError, RecursionError) as error:
        composer.mistakes.append(Mistake(file, 0, f"this is not YAML: {str(error).splitlines()[0]}"))
    return None


class _TooMuch(Exception):
    def __init__(self, line: int, message: str, fix: str) -> None:
        self.line, self.message, self.fix = line, message, fix


@dataclass(slots=True)
class _Node:
    """What one event made: its value, how many nodes it holds, its lines relative to itself."""

    value: Any
    size: int
    lines: dict[Path, int]


@dataclass(slots=True)
class _Open:
    """A mapping or sequence that is still being read."""

    node: _Node
    anchor: str | None
    is_map: bool
    key: Any = None
    key_line: int = 0
    has_key: bool = False
    merges: list[tuple[int, Any, dict[Path, int]]] | None = None


class _Composer:
    def __init__(self, file: str) -> None:
        self.file = file
        self.first = 1
        """The line that the parser's first one is in the file."""
        self.documents: list[Document] = []
        self.mistakes: list[Mistake] = []
        self.stack: list[_Open] = []
        self.anchors: dict[str, _Node] = {}
        self.total = 0
        self.root: _Node | None = None

    def feed(self, event: Any) -> None:
        kind = type(event).__name__
        line = event.start_mark.line + self.first if event.start_mark is not None else 0
        if kind == "DocumentStartEvent":
            self.anchors, self.root, self.stack = {}, None, []
        elif kind == "DocumentEndEvent":
            if self.root is not None and self.root.value is not None:
                self.documents.append(Document(self.root.value, self.root.lines))
        elif kind == "ScalarEvent":
            value = _scalar(event)
            self._put(_Node(value, 1, {(): line}), line, event.anchor)
        elif kind == "AliasEvent":
            node = self.anchors.get(event.anchor)
            if node is None:
                raise _TooMuch(
                    line,
                    f"the alias *{event.anchor} has no anchor before it",
                    "define &anchor first, or write the value out",
                )
            self._put(node, line, None)
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            if len(self.stack) >= MAX_DEPTH:
                raise _TooMuch(
                    line,
                    f"nested deeper than {MAX_DEPTH} levels",
                    "no Kubernetes object is this deep: check the indentation",
                )
            is_map = kind == "MappingStartEvent"
            self.stack.append(_Open(_Node({} if is_map else [], 1, {(): line}), event.anchor, is_map))
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            done = self.stack.pop()
            if done.merges:
                self._merge(done)
            self._put(done.node, done.node.lines[()], done.anchor)

    def _put(self, node: _Node, line: int, anchor: str | None) -> None:
        self.total += node.size
        if self.total > MAX_NODES:
            raise _TooMuch(
                line, f"more than {MAX_NODES} values once aliases are expanded", "write less, or without nested aliases"
            )
        if anchor:
            self.anchors[anchor] = node
        if not self.stack:
            self.root = node
            return
        top = self.stack[-1]
        if top.is_map and not top.has_key:
            if isinstance(node.value, dict | list):
                raise _TooMuch(line, "a mapping or list is used as a key", "keys are plain text")
            top.key, top.key_line, top.has_key = node.value, line, True
            return
        if top.is_map:
            top.has_key = False
            key = top.key if isinstance(top.key, str) else _spell(top.key)
            if key == "<<" and isinstance(node.value, dict | list):
                top.merges = [*(top.merges or []), (line, node.value, node.lines)]
                return
            if key in top.node.value:
                first = top.node.lines.get((key,), 0)
                self.mistakes.append(
                    Mistake(
                        self.file,
                        top.key_line,
                        f"the key {key!r} is written twice (first on line {first})",
                        "keep one of them",
                    )
                )
                return
            top.node.value[key] = node.value
            self._adopt(top, key, node, top.key_line if isinstance(node.value, dict | list) else line)
        else:
            top.node.value.append(node.value)
            self._adopt(top, len(top.node.value) - 1, node, line)

    def _adopt(self, top: _Open, step: str | int, node: _Node, line: int) -> None:
        # Lines are kept by path from the root of each node; the cost is depth times nodes, both bounded.
        top.node.size += node.size
        for path, at in node.lines.items():
            top.node.lines[(step, *path)] = at
        top.node.lines[(step,)] = line

    def _merge(self, done: _Open) -> None:
        for line, value, lines in done.merges or []:
            sources = value if isinstance(value, list) else [value]
            for index, source in enumerate(sources):
                if not isinstance(source, dict):
                    self.mistakes.append(
                        Mistake(self.file, line, "`<<` merges mappings only", "write an alias of a mapping after `<<:`")
                    )
                    continue
                prefix: Path = (index,) if isinstance(value, list) else ()
                for key, item in source.items():
                    if key in done.node.value:
                        continue
                    done.node.value[key] = item
                    start = (*prefix, key)
                    for path, at in lines.items():
                        if path[: len(start)] == start:
                            done.node.lines[path[len(prefix) :]] = at


_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")
_OCTAL = re.compile(r"([-+]?)0o?([0-7]+)\Z")
_HEX = re.compile(r"[-+]?0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
}


def _scalar(event: Any) -> Any:
    text: str = event.value
    tag = str(event.tag) if event.tag is not None else ""
    if tag.endswith(":str") or tag in ("!", "!!str") or (event.style and not tag):
        return text
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > 64:  # no number is this long; Python's int() would be quadratic
        return text
    if _INT.match(text):
        return int(text)
    if octal := _OCTAL.match(text):
        return int(octal[1] + octal[2], 8)
    if _HEX.match(text):
        return int(text, 16)
    if _FLOAT.match(text):
        return float(text)
    return text


def _spell(value: Any) -> str:
    """A key that YAML read as a number or boolean, as the text it was most likely meant to be."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _syntax_fix(lines: list[str], line: int) -> str:
    if 0 < line <= len(lines) and "\t" in lines[line - 1]:
        return "indent with spaces: YAML does not allow tabs"
    return "look at the indentation and quotes of this line and the one before it"
