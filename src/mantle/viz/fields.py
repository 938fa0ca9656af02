"""The fields of a view's query: read once, every mistake collected. Pure."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mantle.core.selector import EVERYTHING, BadSelector, Selector
from mantle.core.selector import parse as parse_selector

MIN_WINDOW_SECONDS = 15
MAX_WINDOW_SECONDS = 15 * 60.0

View = Callable[[Mapping[str, str]], Awaitable[dict[str, Any]]]
"""A view: from the fields of a query to an object. Raises `BadRequest`."""


class BadRequest(Exception):
    """Mistakes in a request: (message, fix) each; `status` is that of the answer (HTTP)."""

    def __init__(self, mistakes: list[tuple[str, str]], status: int = 400) -> None:
        super().__init__("; ".join(message for message, _ in mistakes))
        self.mistakes, self.status = mistakes, status


class Fields:
    """Reads the fields of a query, collecting mistakes."""

    def __init__(self, query: Mapping[str, str]) -> None:
        self._query = query
        self._mistakes: list[tuple[str, str]] = []

    def wrong(self, message: str, fix: str) -> None:
        self._mistakes.append((message, fix))

    def text(self, name: str) -> str:
        return self._query.get(name, "")

    def one_of(self, name: str, allowed: tuple[str, ...], default: str = "") -> str:
        value = self._query.get(name, default)
        if value not in allowed:
            self.wrong(f"{name} is {value!r}", f"use one of: {', '.join(allowed)}")
        return value

    def namespace(self) -> str | None:
        """None if all are asked for."""
        return None if self.text("all") in ("1", "true") else self.text("namespace") or "default"

    def window(self, default: float) -> float:
        text = self.text("window")
        try:
            value = float(text) if text else default
        except ValueError:
            value = -1.0
        if not MIN_WINDOW_SECONDS <= value <= MAX_WINDOW_SECONDS:
            self.wrong(
                f"metrics time window needs to be at least {MIN_WINDOW_SECONDS}s and at most 15m, not {text}",
                "choose another one with -t",
            )
        return value

    def port(self, name: str) -> int:
        text = self.text(name)
        if not text.isdecimal() or not 0 < int(text) < 65536:
            self.wrong(f"{name} is {text!r}", "give it a number from 1 to 65535")
            return 0
        return int(text)

    def selector(self) -> Selector:
        found = parse_selector(self.text("selector"))
        if isinstance(found, BadSelector):
            self.wrong(str(found), "give -l another selector")
            return EVERYTHING
        return found

    def done(self) -> None:
        """Raises `BadRequest` if anything was wrong."""
        if self._mistakes:
            raise BadRequest(self._mistakes)
