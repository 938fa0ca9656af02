"""Which fields of which Kubernetes objects a machine accepts: a table, and the walk that compares a value with it.

For: unknown fields, wrong types and missing fields, all at once. Must not know about other objects (`manifest.py`
compares those). The table follows the Kubernetes API reference, v1.31
(https://kubernetes.io/docs/reference/generated/kubernetes-api/v1.31/): every field of the kinds that a machine plays is
named here, as taken, ignored (said once where it could surprise) or refused with the way out.
"""

from __future__ import annotations

import base64
import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mantle.platform.machine.yamlpos import Path


@dataclass(frozen=True, slots=True)
class Wrong:
    """A mistake at `path` in one document."""

    path: Path
    message: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Ignored:
    """A field that has no meaning on one machine. `said` is empty where nobody needs to hear of it."""

    said: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that would change what runs and cannot be honoured. `unless`: the values that mean the same as leaving
    it out.
    """

    why: str
    fix: str
    unless: tuple[Any, ...] = (None, False, {})


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value; `check` returns what is wrong with it, or an empty text."""

    wanted: str
    types: tuple[type, ...]
    check: Callable[[Any], str] = lambda _: ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Map:
    of: Scalar


@dataclass(frozen=True, slots=True)
class Seq:
    of: Node


@dataclass(frozen=True, slots=True)
class Obj:
    fields: dict[str, Node] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    """Exactly one of these must be there."""


Node = Scalar | Map | Seq | Obj | Ignored | Refused


def walk(node: Node, value: Any, path: Path = ()) -> Iterator[Wrong | tuple[Path, str]]:
    """Every difference between `value` and `node`, in document order; a tuple names an ignored field."""
    if isinstance(node, Ignored):
        if node.said and value not in (None, {}, []):
            yield path, node.said
    elif isinstance(node, Refused):
        if not any(value is u or (type(value) is type(u) and value == u) for u in node.unless):
            yield Wrong(path, f"{node.why}", node.fix)
    elif value is None:
        return  # `key:` without a value is the same as leaving it out, as on a cluster
    elif isinstance(node, Scalar):
        yield from _scalar(node, value, path)
    elif isinstance(node, Map):
        if not isinstance(value, dict):
            yield Wrong(path, f"{spell(path)}: found {kind_of(value)}, wanted a mapping of names to values")
            return
        for key, item in value.items():
            yield from _scalar(node.of, item, (*path, key))
    elif isinstance(node, Seq):
        if not isinstance(value, list):
            yield Wrong(path, f"{spell(path)}: found {kind_of(value)}, wanted a list", "put `- ` before each entry")
            return
        for index, item in enumerate(value):
            if item is None:
                yield Wrong(
                    (*path, index), f"{spell((*path, index))}: an empty entry in the list", "remove it or fill it in"
                )
            yield from walk(node.of, item, (*path, index))
    else:
        yield from _obj(node, value, path)


def _obj(node: Obj, value: Any, path: Path) -> Iterator[Wrong | tuple[Path, str]]:
    if not isinstance(value, dict):
        yield Wrong(path, f"{spell(path)}: found {kind_of(value)}, wanted a mapping")
        return
    for key, item in value.items():
        known = node.fields.get(key)
        if known is None:
            near = difflib.get_close_matches(key, node.fields, n=1, cutoff=0.6) or [
                f for f in node.fields if f.lower() == key.lower()
            ]
            fix = (
                f"write {near[0]}" if near else f"remove it; known here: {', '.join(sorted(node.fields)) or 'nothing'}"
            )
            yield Wrong((*path, key), f"unknown field {spell((*path, key))}", fix)
        else:
            yield from walk(known, item, (*path, key))
    for key in node.required:
        if value.get(key) in (None, ""):
            yield Wrong(path, f"{spell((*path, key))} is missing", f"add `{key}:`")
    if node.one_of:
        found = [key for key in node.one_of if value.get(key) is not None]
        if len(found) != 1:
            what = " and ".join(found) if found else "none"
            yield Wrong(
                path, f"{spell(path)}: found {what}, wanted exactly one of {', '.join(node.one_of)}", "keep one"
            )


def _scalar(node: Scalar, value: Any, path: Path) -> Iterator[Wrong]:
    if value is None:
        return
    right = isinstance(value, node.types) and (not isinstance(value, bool) or bool in node.types)
    if not right:
        fix = node.fix
        if str in node.types and isinstance(value, bool | int | float):
            spelled = str(value).lower() if isinstance(value, bool) else str(value)
            fix = f'quote it: "{spelled}" (or as you wrote it, between quotes)'
        yield Wrong(path, f"{spell(path)}: found {kind_of(value)}, wanted {node.wanted}", fix)
    elif problem := node.check(value):
        yield Wrong(path, f"{spell(path)}: {problem}", node.fix)


def spell(path: Path) -> str:
    """`spec.containers[0].image`"""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else (f".{step}" if text else str(step))
    return text or "the document"


def kind_of(value: Any) -> str:
    """A value in a message: its kind, and itself when it is short."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    names = {bool: "the boolean", int: "the number", float: "the number", str: "the text"}
    shown = str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, str) else str(value)
    return f"{names.get(type(value), 'the value')} {shown if len(shown) <= 60 else shown[:57] + '…'}"


LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
SERVICE_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?\Z")
SUBDOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z")
PORT_NAME = re.compile(r"(?=.{1,15}\Z)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*\Z")
ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*\Z")
QUALIFIED = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?\Z")
FILE_KEY = re.compile(r"(?!\.\.)[-._a-zA-Z0-9]{1,253}\Z")


def _matches(pattern: re.Pattern[str], what: str) -> Callable[[Any], str]:
    return lambda value: "" if pattern.match(value) else f"{value[:80]!r} is not {what}"


def _between(low: int, high: int) -> Callable[[Any], str]:
    return lambda value: "" if low <= value <= high else f"{value} is not between {low} and {high}"


def _base64(value: str) -> str:
    try:
        base64.b64decode("".join(value.split()), validate=True)
    except ValueError:
        return "this is not base64"
    return ""


def _path(value: str) -> str:
    if not value.startswith("/"):
        return f"{value!r} is not an absolute path"
    return "a NUL byte in a path" if "\0" in value else ""


def _relative(value: str) -> str:
    return f"{value!r} leaves the volume" if value.startswith("/") or ".." in value.split("/") or "\0" in value else ""


def _port(value: Any) -> str:
    if isinstance(value, int):
        return _between(1, 65535)(value)
    return (
        ""
        if PORT_NAME.match(value)
        else f"{value!r} is neither a port number nor the name of one (at most 15 of a-z 0-9 -)"
    )


def enum(*values: str) -> Scalar:
    return Scalar(
        "one of " + ", ".join(values), (str,), lambda v: "" if v in values else f"{v!r} is none of {', '.join(values)}"
    )


TEXT = Scalar("text", (str,), lambda v: "a NUL byte in text" if "\0" in v else "")
BOOL = Scalar("true or false", (bool,))
NUMBER = Scalar("a whole number, 0 or more", (int,), _between(0, 2**31 - 1))
USER = Scalar("a user number", (int,), _between(0, 2**31 - 1))
POSITIVE = Scalar("a whole number, 1 or more", (int,), _between(1, 2**31 - 1))
PORT = Scalar("a port number", (int,), _between(1, 65535))
PORT_OR_NAME = Scalar("a port number or the name of a port", (int, str), _port)
MODE = Scalar("a file mode such as 0644", (int,), _between(0, 0o777))
QUANTITY = Scalar("a quantity such as 64Mi", (str, int, float))
ABSOLUTE = Scalar("an absolute path", (str,), _path)
RELATIVE = Scalar("a relative path without `..`", (str,), _relative)
NAME = Scalar(
    "a name",
    (str,),
    _matches(SUBDOMAIN, "a Kubernetes name"),
    "small letters, digits, `-` and `.`; it begins and ends with a letter or digit",
)
LABEL_NAME = Scalar(
    "a name",
    (str,),
    _matches(LABEL, "a name here"),
    "at most 63 small letters, digits and `-`; it begins and ends with a letter or digit",
)
PORT_LABEL = Scalar(
    "the name of a port",
    (str,),
    _matches(PORT_NAME, "the name of a port"),
    "at most 15 small letters, digits and single `-`, one letter at least",
)
ENV = Scalar("the name of a variable", (str,), _matches(ENV_NAME, "the name of a variable"))
KEY = Scalar("a key", (str,), _matches(FILE_KEY, "a key"), "letters, digits, `-`, `_` and `.`")
BASE64 = Scalar(
    "text in base64", (str,), _base64, "encode it with `base64 -w0`, or put the plain text under stringData"
)
LABEL_VALUE = Scalar(
    "a label's value",
    (str,),
    _matches(re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?\Z"), "a label's value"),
)
