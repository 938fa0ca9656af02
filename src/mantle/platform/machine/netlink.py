"""Talking to the kernel's rtnetlink: links, addresses and routes, with the standard library only.

A socket belongs for ever to the network namespace its thread was in when it was made: open it there and keep it, and
later changes need no `setns`. `nft.py` builds nf_tables transactions on the same socket class. Numbers are those of
linux/netlink.h and linux/rtnetlink.h; rtnetlink speaks host byte order, nf_tables big-endian.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

REQUEST, ACK, DUMP, CREATE, EXCL, APPEND = 0x1, 0x4, 0x300, 0x400, 0x200, 0x800
_ERROR, _DONE = 2, 3
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
_NEWLINK, _DELLINK, _NEWADDR, _NEWROUTE, _DELROUTE, _GETROUTE = 16, 17, 20, 24, 25, 26
_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 3, 4, 18, 28
ROUTE_UNICAST, ROUTE_UNREACHABLE = 1, 7
_MAIN_TABLE, _PROTO_STATIC, _ONLINK = 254, 4, 4

Attribute = bytes


class NetlinkError(OSError):
    """The kernel refused a message. `errno` is its code, the text has the kernel's own words where it gave some."""


def attr(kind: int, value: bytes | str | int | Sequence[Attribute]) -> Attribute:
    """One attribute: `bytes` as they are, `str` NUL-terminated, `int` as big-endian u32, a sequence nested."""
    if isinstance(value, str):
        data = value.encode() + b"\0"
    elif isinstance(value, int):
        data = struct.pack(">I", value & 0xFFFFFFFF)
    elif isinstance(value, bytes):
        data = value
    else:
        kind, data = kind | 0x8000, b"".join(value)
    out = struct.pack("HH", len(data) + 4, kind) + data
    return out + bytes(-len(out) % 4)


def u32(value: int) -> bytes:
    """A host-order u32, as rtnetlink wants it."""
    return struct.pack("I", value)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Walks over the attributes in `data`: (kind without the nested flag, value)."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("HH", data, offset)
        if length < 4:
            return
        yield kind & 0x3FFF, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


class Netlink:
    """A netlink socket with request and answer."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._socket.bind((0, 0))
        # The kernel answers within `send`; silence means a kernel that does not know the protocol.
        self._socket.settimeout(5.0)
        self.sequence = 0

    def close(self) -> None:
        self._socket.close()

    def message(self, kind: int, flags: int, body: bytes) -> bytes:
        """A message with its header and the next sequence number."""
        self.sequence += 1
        return struct.pack("IHHII", 16 + len(body), kind, flags | REQUEST, self.sequence, 0) + body

    def exchange(self, data: bytes, first: int, last: int) -> list[tuple[int, bytes]]:
        """Sends `data` and reads until message `last` is answered, or `first`, which refuses them all.

        Returns (kind, body) of the answers that are not acknowledgements. Raises `NetlinkError` for the first refusal.
        """
        self._socket.send(data)
        refused: NetlinkError | None = None
        answers: list[tuple[int, bytes]] = []
        while True:
            received = self._socket.recv(1 << 17)
            while len(received) >= 16:
                length, kind, flags, sequence, _ = struct.unpack_from("IHHII", received)
                body, received = received[16:length], received[(length + 3) & ~3 :]
                if kind == _DONE:
                    return answers
                if kind != _ERROR:
                    answers.append((kind, body))
                    continue
                refused = refused or _refusal(body, flags, sequence - first)
                if sequence in (first, last):
                    if refused:
                        raise refused
                    return answers


def _refusal(body: bytes, flags: int, index: int) -> NetlinkError | None:
    code = -int(struct.unpack_from("i", body)[0])
    if code == 0:
        return None
    words = ""
    if flags & 0x200:  # NLM_F_ACK_TLVS: after the error code and the header of the message it is about
        words = next((" " + v.rstrip(b"\0").decode() for k, v in attributes(body[20:]) if k == 1), "")
    return NetlinkError(code, f"{os.strerror(code)}{words} (message {index})")


def _packed(ip: str) -> bytes:
    return ipaddress.ip_address(ip).packed


@dataclass(frozen=True, slots=True)
class HostRoute:
    """A route of the main table."""

    network: ipaddress.IPv4Network
    interface: int


class Route(Netlink):
    """Links, addresses and routes of the namespace this was made in."""

    def __init__(self) -> None:
        super().__init__(NETLINK_ROUTE)

    def _do(self, kind: int, flags: int, body: bytes) -> None:
        data = self.message(kind, flags | ACK, body)
        self.exchange(data, self.sequence, self.sequence)

    def _link(self, kind: int, flags: int, *attrs: Attribute, index: int = 0, up: bool = False) -> None:
        header = struct.pack("BxHiII", 0, 0, index, int(up), int(up))
        self._do(kind, flags, header + b"".join(attrs))

    def veth(self, name: str, peer: str, peer_namespace: int, mtu: int = 0) -> int:
        """Makes a veth pair, `name` here and up, `peer` born inside the namespace of the descriptor. Returns our
        index."""
        size = [attr(_IFLA_MTU, u32(mtu))] if mtu else []
        other = struct.pack("BxHiII", 0, 0, 0, 0, 0) + b"".join(
            [attr(_IFLA_IFNAME, peer), attr(_IFLA_NET_NS_FD, u32(peer_namespace)), *size]
        )
        info = attr(_IFLA_LINKINFO, [attr(1, "veth"), attr(2, [attr(1, other)])])
        self._link(_NEWLINK, CREATE | EXCL, attr(_IFLA_IFNAME, name), *size, info, up=True)
        return socket.if_nametoindex(name)

    def up(self, index: int) -> None:
        self._link(_NEWLINK, 0, index=index, up=True)

    def delete_link(self, index: int) -> None:
        self._link(_DELLINK, 0, index=index)

    def address(self, index: int, ip: str, prefix: int) -> None:
        packed = _packed(ip)
        family = socket.AF_INET6 if len(packed) == 16 else socket.AF_INET
        body = struct.pack("BBBBI", family, prefix, 0, 0, index) + attr(2, packed) + attr(1, packed)
        self._do(_NEWADDR, CREATE | EXCL, body)

    def route(
        self,
        destination: str = "0.0.0.0/0",
        *,
        via: str = "",
        interface: int = 0,
        source: str = "",
        kind: int = ROUTE_UNICAST,
        onlink: bool = False,
        remove: bool = False,
    ) -> None:
        """Adds (or removes) a route. `source` is the address preferred for what this host itself sends along it."""
        network = ipaddress.ip_network(destination)
        family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        scope = 253 if interface and not via else 0  # link scope: the destination is on the link itself
        header = (family, network.prefixlen, 0, 0, _MAIN_TABLE, _PROTO_STATIC, scope, kind, _ONLINK if onlink else 0)
        body = struct.pack("BBBBBBBBI", *header)
        if network.prefixlen:
            body += attr(1, network.network_address.packed)
        if via:
            body += attr(5, _packed(via))
        if interface:
            body += attr(4, u32(interface))
        if source:
            body += attr(7, _packed(source))
        if remove:
            self._do(_DELROUTE, 0, body)
        else:
            self._do(_NEWROUTE, CREATE | EXCL, body)

    def routes(self) -> list[HostRoute]:
        """The IPv4 unicast routes of the main table, the default route left out."""
        body = struct.pack("BBBBBBBBI", socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
        data = self.message(_GETROUTE, DUMP, body)
        found = []
        for _, answer in self.exchange(data, self.sequence, self.sequence):
            _, prefix, _, _, table, _, _, kind, _ = struct.unpack_from("BBBBBBBBI", answer)
            values = dict(attributes(answer[12:]))
            if table == _MAIN_TABLE and kind == ROUTE_UNICAST and prefix and 1 in values:
                network = ipaddress.IPv4Network((int.from_bytes(values[1], "big"), prefix))
                found.append(HostRoute(network, struct.unpack("I", values.get(4, bytes(4)))[0]))
        return found
