"""nf_tables from Python: expressions as byte strings and batches that the kernel takes whole or not at all.

Only what the router and the uplink need. The pods' own redirect is installed by `mantle-proxy redirect`, not from here.
Numbers are those of linux/netfilter/nf_tables.h. Registers: 1 is sixteen bytes, 8 to 11 are its four-byte quarters.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Sequence

from mantle.platform.machine.netlink import ACK, APPEND, CREATE, NETLINK_NETFILTER, Attribute, Netlink, attr

ACCEPT, DROP = 1, 0
FAMILY_INET, FAMILY_IP = 1, 2
OWNER = 2
"""Table flag: the table vanishes with the socket that made it, and nobody else may change it."""

META_OIFNAME, META_IIFNAME, META_L4PROTO, META_NFPROTO = 7, 6, 16, 15
TYPE_IPV4, TYPE_IFNAME, TYPE_PORT, TYPE_PROTO, TYPE_INTEGER = 7, 41, 13, 12, 4
_SET_MAP, _SET_CONCAT = 0x8, 0x80
_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_ELEMENTS_PER_MESSAGE = 400  # one nested attribute is at most 64 KiB

Expression = bytes


def _expression(name: str, *attrs: Attribute) -> Expression:
    return attr(1, [attr(1, name), attr(2, list(attrs))])


def _data(value: bytes) -> list[Attribute]:
    return [attr(1, value)]


def meta(key: int, register: int = 1) -> Expression:
    return _expression("meta", attr(2, key), attr(1, register))


def compare(value: bytes, register: int = 1, *, equal: bool = True) -> Expression:
    return _expression("cmp", attr(1, register), attr(2, 0 if equal else 1), attr(3, _data(value)))


def network_header(offset: int, length: int, register: int = 1) -> Expression:
    return _expression("payload", attr(1, register), attr(2, 1), attr(3, offset), attr(4, length))


def transport_header(offset: int, length: int, register: int = 1) -> Expression:
    return _expression("payload", attr(1, register), attr(2, 2), attr(3, offset), attr(4, length))


def source_address(register: int = 1) -> Expression:
    return network_header(12, 4, register)


def destination_address(register: int = 1) -> Expression:
    return network_header(16, 4, register)


def masked(mask: bytes, register: int = 1) -> Expression:
    length = len(mask)
    return _expression(
        "bitwise",
        attr(1, register),
        attr(2, register),
        attr(3, length),
        attr(4, _data(mask)),
        attr(5, _data(bytes(length))),
    )


def in_network(load: Expression, address: bytes, prefix: int, *, equal: bool = True) -> Expression:
    mask = struct.pack(">I", (0xFFFFFFFF << (32 - prefix)) & 0xFFFFFFFF)
    return load + masked(mask) + compare(address, equal=equal)


def interface(key: int, name: str, *, equal: bool = True) -> Expression:
    return meta(key) + compare(name.encode().ljust(16, b"\0"), equal=equal)


def ipv6() -> Expression:
    return meta(META_NFPROTO) + compare(bytes([socket.AF_INET6]))


def lookup(name: str, register: int = 1, *, result: int | None = None, inverted: bool = False) -> Expression:
    into = [attr(3, result)] if result is not None else []
    return _expression("lookup", attr(1, name), attr(2, register), *into, attr(5, int(inverted)))


def random_slot(slots: int, register: int) -> Expression:
    return _expression("numgen", attr(1, register), attr(2, slots), attr(3, 1), attr(4, 0))


def load(value: bytes, register: int = 1) -> Expression:
    return _expression("immediate", attr(1, register), attr(2, _data(value)))


def verdict(code: int) -> Expression:
    return _expression("immediate", attr(1, 0), attr(2, [attr(2, [attr(1, code)])]))


def destination_nat(address_register: int, port_register: int) -> Expression:
    return _expression(
        "nat", attr(1, 1), attr(2, socket.AF_INET), attr(3, address_register), attr(5, port_register), attr(7, 3)
    )


def source_nat(address: bytes) -> Expression:
    return load(address) + _expression("nat", attr(1, 0), attr(2, socket.AF_INET), attr(3, 1), attr(7, 1))


def masquerade() -> Expression:
    return _expression("masq")


def connection_is_known() -> Expression:
    """Connection-tracking state established or related."""
    return _expression("ct", attr(2, 0), attr(1, 1)) + masked(struct.pack("I", 2 | 4)) + compare(bytes(4), equal=False)


class Batch(Netlink):
    """One table, changed in transactions: collect messages, then `commit`."""

    def __init__(self, table: str, family: int) -> None:
        super().__init__(NETLINK_NETFILTER)
        self._table, self._family = table, family
        self._pending: list[tuple[int, int, bytes]] = []
        self._set_id = 0

    def _put(self, kind: int, flags: int, *attrs: Attribute) -> None:
        header = struct.pack("BBH", self._family, 0, 0)
        self._pending.append((10 << 8 | kind, flags, header + b"".join(attrs)))

    def table(self, flags: int = 0) -> None:
        self._put(0, CREATE, attr(1, self._table), attr(2, flags))

    def chain(self, name: str, hook: str, priority: int, kind: str = "filter", policy: int = ACCEPT) -> None:
        base = [attr(4, [attr(1, _HOOKS[hook]), attr(2, priority)]), attr(5, policy), attr(7, kind)]
        self._put(3, CREATE, attr(1, self._table), attr(3, name), *base)

    def rule(self, chain: str, *expressions: Expression) -> None:
        self._put(6, CREATE | APPEND, attr(1, self._table), attr(2, chain), attr(4, list(expressions)))

    def set(self, name: str, key: Sequence[tuple[int, int]], value: Sequence[tuple[int, int]] = ()) -> None:
        """A set, or a map if `value` is given. Key and value are concatenations of (type, length in bytes)."""

        def combined(parts: Sequence[tuple[int, int]]) -> tuple[int, int]:
            kind = 0
            for part, _ in parts:
                kind = kind << 6 | part
            # Only the parts of a concatenation fill whole registers of four bytes.
            return kind, parts[0][1] if len(parts) == 1 else sum((length + 3) & ~3 for _, length in parts)

        key_type, key_length = combined(key)
        flags = (_SET_MAP if value else 0) | (_SET_CONCAT if len(key) > 1 else 0)
        self._set_id += 1
        attrs = [attr(1, self._table), attr(2, name), attr(3, flags), attr(4, key_type), attr(5, key_length)]
        if value:
            value_type, value_length = combined(value)
            attrs += [attr(6, value_type), attr(7, value_length)]
        if len(key) > 1:
            attrs.append(attr(9, [attr(2, [attr(1, [attr(1, length)]) for _, length in key])]))
        self._put(9, CREATE, *attrs, attr(10, self._set_id))

    def elements(self, name: str, items: Iterable[tuple[bytes, bytes | None]], *, remove: bool = False) -> None:
        """Adds or removes (key, value) pairs; value None for a set. Parts of a key are padded to four bytes each."""
        encoded = [attr(1, [attr(1, _data(k))] + ([attr(2, _data(v))] if v is not None else [])) for k, v in items]
        for start in range(0, len(encoded), _ELEMENTS_PER_MESSAGE):
            part = encoded[start : start + _ELEMENTS_PER_MESSAGE]
            self._put(14 if remove else 12, 0 if remove else CREATE, attr(1, self._table), attr(2, name), attr(3, part))

    def commit(self) -> None:
        """Sends what was collected as one transaction. Raises `NetlinkError`; then nothing of it was done."""
        pending, self._pending = self._pending, []
        if not pending:
            return  # an empty batch would never be answered
        subsystem = struct.pack("BBH", 0, 0, socket.htons(10))
        first = self.sequence + 1
        data = bytearray(self.message(16, 0, subsystem))
        for index, (kind, flags, body) in enumerate(pending):
            # Only the last asks for an answer: refusals come anyway, and hundreds of answers could overflow the buffer.
            data += self.message(kind, flags | (ACK if index == len(pending) - 1 else 0), body)
        last = self.sequence
        data += self.message(17, 0, subsystem)
        self.exchange(bytes(data), first, last)
