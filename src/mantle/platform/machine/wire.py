"""Frames on the runtime's Unix sockets: four bytes of length, JSON, and descriptors beside it (SCM_RIGHTS).

Shared by the node, the supervisors and their clients. A conversation is a request and its answers; an answer with
`error` is a refusal: {"reason", "message", "fix"}.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Frame = tuple[Message, list[int]]

_HEADER = struct.Struct(">I")
_MOST = 16 << 20
_MOST_FDS = 16


class Closed(ConnectionError):
    """The other side went away in the middle of a conversation."""


class Refused(Exception):
    """The other side answered with a refusal. `reason` is one word, `fix` may be empty."""

    def __init__(self, reason: str, message: str, fix: str = "") -> None:
        super().__init__(message + (f"; {fix}" if fix else ""))
        self.reason, self.message, self.fix = reason, message, fix

    def as_message(self) -> Message:
        return {"error": {"reason": self.reason, "message": self.message, "fix": self.fix}}


def pack(message: Message) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return _HEADER.pack(len(body)) + body


def check(message: Message) -> Message:
    """The answer itself, or raises the refusal in it."""
    if error := message.get("error"):
        raise Refused(str(error.get("reason", "error")), str(error.get("message", "")), str(error.get("fix", "")))
    return message


class Decoder:
    """Bytes and descriptors in, frames out. The kernel ends a read after the data that descriptors came with, so
    those of one read belong to the last frame it touched."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._fds: list[int] = []

    def feed(self, data: bytes, fds: Iterable[int] = ()) -> list[Frame]:
        """Raises ValueError on something that is not a frame; the descriptors received so far are then closed."""
        self._data += data
        frames: list[Frame] = []
        new = list(fds)
        try:
            while len(self._data) >= _HEADER.size:
                (length,) = _HEADER.unpack_from(self._data)
                if length > _MOST:
                    raise ValueError(f"a frame of {length} bytes")
                if len(self._data) < _HEADER.size + length:
                    break
                message = json.loads(self._data[_HEADER.size : _HEADER.size + length])
                del self._data[: _HEADER.size + length]
                if not isinstance(message, dict):
                    raise ValueError("a frame is a JSON object")
                frames.append((message, self._fds))
                self._fds = []
        except ValueError:
            close_all([*new, *self._fds, *(fd for _, held in frames for fd in held)])
            raise
        if self._data or not frames:
            self._fds += new
        else:
            frames[-1][1].extend(new)
        return frames

    def close(self) -> None:
        close_all(self._fds)
        self._fds = []


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One read with the descriptors that came along (close-on-exec). Empty bytes: the other side closed."""
    data, ancillary, _, _ = sock.recvmsg(1 << 16, socket.CMSG_SPACE(_MOST_FDS * 4), socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
            fds += numbers
    return data, fds


def send(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Sends a whole frame. On a non-blocking socket whose buffer is full: BlockingIOError, and the stream is broken."""
    data = memoryview(pack(message))
    if fds:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        data = data[sock.sendmsg([data], rights) :]
    if data:
        sock.sendall(data)


class Connection:
    """A blocking conversation, for commands and for helpers without an event loop."""

    def __init__(self, path: str | Path, timeout: float | None = 10.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout)
        try:
            connect(self.socket, path)
        except OSError:
            self.socket.close()
            raise
        self._decoder = Decoder()
        self._frames: list[Frame] = []

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        send(self.socket, message, fds)

    def receive(self) -> Frame:
        """The next frame; raises `Closed` at the end and `Refused` for a refusal."""
        while not self._frames:
            data, fds = receive(self.socket)
            if not data:
                raise Closed("the other side closed the connection")
            self._frames = self._decoder.feed(data, fds)
        message, fds = self._frames.pop(0)
        return check(message), fds

    def call(self, message: Message, fds: Sequence[int] = ()) -> Frame:
        self.send(message, fds)
        return self.receive()

    def close(self) -> None:
        self._decoder.close()
        self.socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(sock: socket.socket, path: str | Path) -> None:
    """Connects to a path of any length: a socket address holds only 107 bytes of it."""
    with _short(path) as short:
        sock.connect(short)


def listen(path: str | Path) -> socket.socket:
    """A listening socket at `path`, mode 0600, in place of what was there."""
    path = Path(path)
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with _short(path) as short:
            sock.bind(short)
    finally:
        os.umask(before)
    sock.listen(128)
    sock.setblocking(False)
    return sock


@contextlib.contextmanager
def _short(path: str | Path) -> Iterator[str]:
    path = Path(path)
    if len(os.fsencode(path)) < 100:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def peer_is(sock: socket.socket, uid: int) -> bool:
    """Is the process at the other end one of `uid` (as seen from our user namespace)?"""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("iII", credentials)[1]) == uid
