"""A container's log file: what it wrote, line by line, each with its time and stream; bounded.

A line is `2026-11-24T08:16:44.123456789Z stdout the text`. When `NAME.log` is full it becomes `NAME.log.1`, in place of
the one before. Bytes that are not UTF-8 are kept as they are.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

MOST_BYTES = 10 << 20
"""Of one file; there are at most two."""
_LONGEST_LINE = 64 << 10


def timestamp(nanoseconds: int) -> str:
    """RFC 3339 in UTC with nanoseconds, from nanoseconds since 1970."""
    seconds, fraction = divmod(nanoseconds, 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{fraction:09d}Z"


class Log:
    """The one writer of a container's log. Write errors (a full tmpfs) drop lines and are not fatal."""

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        self._path, self._most = path, most_bytes
        self._partial: dict[str, bytes] = {}
        self._fd = -1
        self._size = 0
        self._open()

    def _open(self) -> None:
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError:
            self._fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._fd).st_size

    def feed(self, stream: str, data: bytes, now_ns: int) -> None:
        """Bytes as they came from the pipe; only whole lines are written, except very long ones."""
        *lines, rest = (self._partial.pop(stream, b"") + data).split(b"\n")
        while len(rest) > _LONGEST_LINE:
            lines.append(rest[:_LONGEST_LINE])
            rest = rest[_LONGEST_LINE:]
        if rest:
            self._partial[stream] = rest
        if lines:
            head = f"{timestamp(now_ns)} {stream} ".encode()
            self._write(b"".join(head + line.removesuffix(b"\r") + b"\n" for line in lines))

    def end(self, stream: str, now_ns: int) -> None:
        """The pipe is closed: what has no newline is written too."""
        if stream in self._partial:
            self.feed(stream, b"\n", now_ns)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            if self._size and self._size + len(data) > self._most:
                self._path.replace(f"{self._path}.1")
                self.close()
                self._open()
            self._size += os.write(self._fd, data)
