"""YAML and JSON documents as `mantle inject` and `uninject` take them: where they come from, and how they go back.

A document is its own text: what is not changed goes out byte for byte, a document that cannot be read is a problem and
no obstacle to the others. What is done to the objects is the commands' business.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mantle.cli.output import Failure, Problem, json_text, write

MOST_BYTES = 16 * 1024 * 1024
"""Of a document that is fetched."""
FETCH_SECONDS = 20.0
"""For all of it."""
_WHAT_TO_NAME = "name a YAML file, a directory, a URL, or - for standard input"


@dataclass(slots=True)
class Document:
    """One document of a file: its text with the separator before it, where it starts, and what was read from it."""

    file: str
    line: int
    text: str
    value: Any = None


def read(names: Sequence[str]) -> tuple[list[Document], list[Problem]]:
    """The documents of files, of all YAML and JSON files of directories, of URLs, and of standard input (`-`).

    What cannot be read is a problem; raises `Failure` if nothing can.
    """
    documents: list[Document] = []
    problems: list[Problem] = []
    for name in names:
        try:
            for file, data in _sources(name):
                documents += split(file, _decoded(file, data))
        except Failure as failure:
            problems += failure.problems
    if problems and not documents:
        raise Failure.of(problems)
    for before, document in pairwise(documents):
        if not document.text.startswith("---"):  # the first of its file: it must not run into the one before
            document.text = "---\n" + document.text
            document.line -= 1
        if not before.text.endswith("\n"):
            before.text += "\n"
    problems += [problem for document in documents if (problem := _load(document)) is not None]
    return documents, problems


def _sources(name: str) -> Iterator[tuple[str, bytes]]:
    if name == "-":
        yield "stdin", sys.stdin.buffer.read()
        return
    if "://" in name:
        yield name, fetch(name)
        return
    path = Path(name)
    paths = sorted(p for p in path.rglob("*") if p.suffix in (".yml", ".yaml", ".json")) if path.is_dir() else [path]
    if not paths:
        raise Failure(f"cannot read {name}: no .yml, .yaml or .json file is in it", _WHAT_TO_NAME)
    for each in paths:
        try:
            yield str(each), each.read_bytes()
        except OSError as error:
            raise Failure(f"cannot read {each}: {error.strerror}", _WHAT_TO_NAME) from error


def fetch(url: str) -> bytes:
    """What is at an https or http URL: at most `MOST_BYTES`, within `FETCH_SECONDS`. Raises `Failure`.

    A redirect from https to http is refused: what is applied to a cluster must not be anybody's on the way.
    """
    import time
    import urllib.error
    import urllib.request
    from http.client import HTTPException
    from urllib.parse import urlsplit

    by_hand = f"fetch it yourself: curl -fL {url} | mantle inject -"
    if urlsplit(url).scheme not in ("https", "http"):
        raise Failure(f"{url} is neither an https nor an http URL", _WHAT_TO_NAME)
    until = time.monotonic() + FETCH_SECONDS
    data = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as answer:
            if url.startswith("https:") and not answer.url.startswith("https:"):
                raise Failure(f"{url} leads to {answer.url}, which anybody on the way could change", by_hand)
            while chunk := answer.read1(1 << 16):
                data += chunk
                if len(data) > MOST_BYTES:
                    raise Failure(f"{url} is larger than {MOST_BYTES >> 20} MiB", by_hand)
                if time.monotonic() > until:
                    raise Failure(f"{url} took longer than {FETCH_SECONDS:.0f} s", by_hand)
    except urllib.error.HTTPError as error:
        error.close()
        raise Failure(f"cannot read {url}: {error.code} {error.reason}", by_hand) from error
    except (OSError, HTTPException, ValueError) as error:  # urllib's other errors are OSErrors with a reason
        raise Failure(f"cannot read {url}: {getattr(error, 'reason', error)}", by_hand) from error
    return bytes(data)


def _decoded(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(f"cannot read {name}: it is not UTF-8 text", _WHAT_TO_NAME) from error


def split(file: str, text: str) -> Iterator[Document]:
    """Cuts a stream at its `---` lines, so that each document is read, and may be broken, by itself."""
    line = 1
    for part in re.split(r"(?m)^(?=---(?:\s|$))", text):
        if part:
            yield Document(file, line, part)
            line += part.count("\n")


def _load(document: Document) -> Problem | None:
    try:
        document.value = _yaml(document.text).load(document.text)
    except Exception as error:
        return _unreadable(document, error)
    return None


def _unreadable(document: Document, error: Exception) -> Problem:
    from ruamel.yaml.error import MarkedYAMLError

    if not isinstance(error, MarkedYAMLError):
        return Problem(f"this document cannot be read: {error}", None, document.file, document.line)
    mark = error.problem_mark
    if error.context_mark and (mark is None or mark.index >= len(document.text)):
        mark = error.context_mark  # what was opened and never closed, rather than the end of the file
    line = document.line + (mark.line if mark else 0)
    what = " ".join(filter(None, (error.context, error.problem)))
    return Problem(f"this is not YAML: {what}", "correct it, or check the indentation above", document.file, line)


def rewrite(document: Document, edit: Callable[[str], str] | None) -> None:
    """Makes the text say what the value says now: by `edit` (text in, text out), which leaves every other byte alone;
    else, or if that fails or leads elsewhere, by a writer, which keeps comments and order.
    """
    document.text = (_edited(document, edit) if edit else None) or _dump(document)


def _edited(document: Document, edit: Callable[[str], str]) -> str | None:
    from ruamel.yaml.error import MarkedYAMLError

    dos = "\r\n" in document.text  # line ends stay what they are, too
    text = document.text.replace("\r\n", "\n")
    head, _, body = text.partition("\n") if text.startswith("---\n") else ("", "", text)
    try:
        body = edit(body)
        same = _filled(_yaml(body).load(body)) == _filled(document.value)
    except (KeyError, MarkedYAMLError):
        return None
    text = (head + "\n" if head else "") + body
    return (text.replace("\n", "\r\n") if dos else text) if same else None


def _filled(value: Any) -> Any:
    """Without empty mappings: whether `metadata: {}` stood there is the text's to say."""
    if isinstance(value, Mapping):
        return {key: kept for key, item in value.items() if (kept := _filled(item)) != {}}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _yaml(text: str) -> Any:
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.width = 4096
    # Whether `- ` of a list under a key is indented is a matter of taste; keep the file's.
    style = re.search(r"(?m)^( *)[^\s#-][^\n]*:[ ]*\n( *)- ", text)
    if style and len(style[2]) > len(style[1]):
        offset = len(style[2]) - len(style[1])
        yaml.indent(mapping=2, sequence=offset + 2, offset=offset)
    return yaml


def _dump(document: Document) -> str:
    from io import StringIO

    out = StringIO()
    yaml = _yaml(document.text)
    separator = document.text.startswith("---")
    yaml.dump(document.value, out)
    text = out.getvalue()
    if separator and not text.startswith("---"):
        text = document.text.partition("\n")[0] + "\n" + text
    return text


def print_documents(documents: Sequence[Document], output: str) -> None:
    """To standard output: as they came (`yaml`), or as one JSON object (`json`), a List where there are several."""
    if output == "json":
        objects = [document.value for document in documents if document.value is not None]
        write(json_text(objects[0] if len(objects) == 1 else {"apiVersion": "v1", "kind": "List", "items": objects}))
    else:
        write("".join(document.text for document in documents))
