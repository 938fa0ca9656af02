"""A gRPC health check as bytes: what a probe sends, and what the answer means. Sans-IO.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md over HTTP/2 (RFC 9113), one request on a connection of
its own. A library would want to open the connection itself, and probes leave from the router's network namespace.
Headers of the answer are not decoded: the one message says it all.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from mantle.core.policy import GRPC_HEALTH

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _GOAWAY = 0, 1, 3, 4, 7
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 1, 1, 4, 8
_STATUS = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
_MOST_BYTES = 64 * 1024


def request(authority: str, service: str) -> bytes:
    """Preface, settings and the call of `Check` for a service; an empty name asks about the whole server."""
    name = service.encode()
    message = b"\x0a" + _varint(len(name)) + name if name else b""
    # Literals without indexing (RFC 7541, 6.2.2); 3 and 6 are `:method: POST` and `:scheme: http` of the static table.
    block = b"\x83\x86" + b"\x04" + _text(GRPC_HEALTH) + b"\x01" + _text(authority)
    block += b"\x0f\x10" + _text("application/grpc") + b"\x00" + _text("te") + _text("trailers")
    body = b"\0" + struct.pack(">I", len(message)) + message
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, 1, block)
        + _frame(_DATA, _END_STREAM, 1, body)
    )


@dataclass(slots=True)
class Answer:
    """Takes the server's bytes in until `over`; `reply` is what must be sent back meanwhile."""

    over: bool = False
    broken: str = ""
    reply: bytes = b""
    _rest: bytes = b""
    _taken: int = 0
    _message: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> None:
        """The next bytes; none when the server has closed."""
        if not data:
            self._end("the connection was closed without an answer")
        self._rest += data
        self._taken += len(data)
        if self._taken > _MOST_BYTES:
            self._end("the answer is too long for a health check")
        while not self.over and len(self._rest) >= 9:
            length, kind, flags = int.from_bytes(self._rest[:3], "big"), self._rest[3], self._rest[4]
            stream = int.from_bytes(self._rest[5:9], "big") & 0x7FFFFFFF
            if length > _MOST_BYTES:
                self._end("the answer is not HTTP/2")
            if len(self._rest) < 9 + length:
                return
            payload, self._rest = self._rest[9 : 9 + length], self._rest[9 + length :]
            self._frame(kind, flags, stream, payload)

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            self.reply += _frame(_SETTINGS, _ACK, 0, b"")
        elif kind == _GOAWAY or (kind == _RST_STREAM and stream == 1):
            self._end("the server refused the call")
        elif kind == _DATA and stream == 1:
            padding = payload[0] if flags & _PADDED and payload else 0
            self._message += payload[1 : len(payload) - padding] if flags & _PADDED else payload
        if kind in (_DATA, _HEADERS) and stream == 1 and flags & _END_STREAM:
            self.over = True

    def _end(self, why: str) -> None:
        if not self.over:
            self.over, self.broken = True, why

    def outcome(self) -> tuple[bool, str]:
        """(is it serving, what was found)."""
        if self.broken:
            return False, self.broken
        if len(self._message) < 5:
            return False, "the server has no health for this service, or no grpc.health.v1.Health at all"
        message = bytes(self._message[5 : 5 + int.from_bytes(self._message[1:5], "big")])
        number = message[1] if len(message) == 2 and message[0] == 0x08 else 0
        return number == 1, "" if number == 1 else f"the health is {_STATUS.get(number, number)}"


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _text(text: str) -> bytes:
    """A string literal of HPACK, shorter than 127 bytes, not Huffman-coded."""
    data = text.encode()
    assert len(data) < 127
    return bytes([len(data)]) + data


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
