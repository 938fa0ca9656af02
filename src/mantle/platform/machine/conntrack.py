"""Forgetting flows that the kernel tracks: a UDP conversation with a service stays with its first endpoint otherwise,
long after that one has gone, because every datagram renews it. (TCP connections end with their endpoint.)

Numbers are those of linux/netfilter/nfnetlink_conntrack.h. As kube-proxy does when endpoints go.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterator

from mantle.platform.machine.netlink import ACK, DUMP, NETLINK_NETFILTER, Attribute, Netlink, attr, attributes

_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2
_ORIGINAL, _REPLY = 1, 2
_HEADER = struct.pack("BBH", socket.AF_INET, 0, 0)
_NESTED = 0x8000

Endpoint = tuple[str, int]


class Flows(Netlink):
    """The tracked flows of the network namespace this was made in."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)

    def forget_udp(self, service: Endpoint, gone: Collection[Endpoint]) -> int:
        """Ends the conversations with these endpoints of a service; how many. Raises NetlinkError where the kernel was
        built without conntrack's netlink.
        """
        count = 0
        for original, asked, answers in list(self._udp()):
            if asked == service and answers in gone:
                data = self.message(_DELETE, ACK, _HEADER + attr(_ORIGINAL | _NESTED, original))
                self.exchange(data, self.sequence, self.sequence)
                count += 1
        return count

    def _udp(self) -> Iterator[tuple[Attribute, Endpoint, Endpoint]]:
        """(the original direction as the kernel writes it, whom it asked, who answers) of every UDP flow."""
        data = self.message(_GET, DUMP, _HEADER)
        for _, answer in self.exchange(data, self.sequence, self.sequence):
            found = dict(attributes(answer[len(_HEADER) :]))
            original, reply = _tuple(found[_ORIGINAL]), _tuple(found[_REPLY])
            if original is not None and reply is not None:
                yield found[_ORIGINAL], original[1], reply[0]


def _tuple(data: bytes) -> tuple[Endpoint, Endpoint] | None:
    """(source, destination) of one direction; None unless it is UDP."""
    parts = dict(attributes(data))
    ip, protocol = dict(attributes(parts[1])), dict(attributes(parts[2]))
    if protocol[1][0] != socket.IPPROTO_UDP:
        return None
    source, destination = (struct.unpack(">H", protocol[n])[0] for n in (2, 3))
    return (socket.inet_ntoa(ip[1]), source), (socket.inet_ntoa(ip[2]), destination)
