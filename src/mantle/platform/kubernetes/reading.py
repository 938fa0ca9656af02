"""One object of the API as text: read to the depth that is needed, sketched when it does not fit, named once when it
is passed over.

A cluster's objects are written by many. One that is not what is read of its kind must not stop the others of its kind:
it is passed over, and what is kept in its place is the kind's own decision (`unfit`). Knows no kind and no server.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

log = logging.getLogger(__name__)

Read = TypeVar("Read")
Name = TypeVar("Name", bound=Hashable)

DEEPEST = 64
"""Levels of nesting that are read: a pod with everything in it has 15. `managedFields` may have thousands."""
NAMED = 256
"""Objects of one kind that the log names; the metric counts all."""
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class Unfit(ValueError):
    """An object that cannot be taken. The text says what was found and what was wanted."""


def decode(decoder: msgspec.json.Decoder[Read], octets: bytes | msgspec.Raw) -> Read:
    """Reads JSON, however deep it is nested: below `DEEPEST` levels everything is null.

    Raises msgspec's errors, which are ValueErrors.
    """
    try:
        return decoder.decode(octets)
    except RecursionError:
        return decoder.decode(shallow(bytes(octets)))


def shallow(octets: bytes) -> bytes:
    """The same JSON with null for what is nested deeper than `DEEPEST` levels. Does not recurse itself."""
    kept: list[bytes] = []
    depth = begin = 0
    for token in _TOKEN.finditer(octets):
        match token.group():
            case b"[" | b"{":
                depth += 1
                if depth == DEEPEST + 1:
                    kept.append(octets[begin : token.start()])
            case b"]" | b"}":
                if depth == DEEPEST + 1:
                    kept.append(b"null")
                    begin = token.end()
                depth -= 1
    kept.append(octets[begin:])
    return b"".join(kept)


@dataclass(frozen=True, slots=True)
class Sketch:
    """What can be said of an object that does not fit: who it is, and its JSON."""

    namespace: str
    name: str
    uid: str
    document: Any

    def at(self, *path: str) -> Any:
        """What stands at a path of members; None if nothing does."""
        found = self.document
        for member in path:
            if not isinstance(found, dict):
                return None
            found = found.get(member)
        return found


_ANYTHING: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


def anything(octets: bytes | msgspec.Raw) -> Any:
    """Any JSON, however deep. Raises ValueError."""
    return decode(_ANYTHING, octets)


def sketch_of(raw: bytes | msgspec.Raw) -> Sketch | None:
    """Who an object is; None if it has no name, so that it is no object of Kubernetes."""
    try:
        document = anything(raw)
    except ValueError:
        return None
    meta = document.get("metadata") if isinstance(document, dict) else None
    if not isinstance(meta, dict):
        return None
    namespace, name, uid = (_text(meta.get(member)) for member in ("namespace", "name", "uid"))
    return Sketch(namespace, name, uid, document) if name else None


def _text(found: Any) -> str:
    return found if isinstance(found, str) else ""


class PassedOver(Generic[Name]):
    """The objects of one kind that are passed over now, and how many ever were."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._now: dict[Name, str] = {}
        self._named: set[Name] = set()
        self.total = 0
        """How often an object became one that cannot be read."""

    @property
    def now(self) -> Mapping[Name, str]:
        """Name and problem of each."""
        return self._now

    def put(self, name: Name, who: str, problem: str) -> None:
        """An object does not fit. The log says so once for each name, and for `NAMED` names."""
        if name not in self._now:
            self.total += 1
        self._now[name] = problem
        if name in self._named or len(self._named) >= NAMED:
            return
        self._named.add(name)
        last = "; further ones are only counted" if len(self._named) == NAMED else ""
        log.warning(
            "%s: %s cannot be read and is passed over (%s); everything else goes on. Its last good version counts, or "
            "it is unreachable for meshed clients: correct it, or whatever writes it%s",
            self._path,
            who[:300],
            problem[:300],
            last,
        )

    def fits(self, name: Name) -> None:
        """An object can be read (again), or is gone."""
        self._now.pop(name, None)

    def only(self, names: Container[Name]) -> None:
        """All others are gone."""
        for name in [name for name in self._now if name not in names]:
            del self._now[name]
