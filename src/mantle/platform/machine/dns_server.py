"""Cluster DNS on the router's address: sockets around `dns.answer`. Other names are asked from the host's own
namespace.

Bounded: so many questions upstream at once, so long, so many TCP clients; one that does not fit is answered SERVFAIL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import dns.exception
import dns.message

from mantle.platform.machine import dns as cluster

log = logging.getLogger("mantle.dns")
UPSTREAM_TIMEOUT = 2.0
MOST_UPSTREAM = 256
MOST_TCP = 128
TCP_IDLE = 10.0


class DnsServer:
    """Answers on one UDP and one listening TCP socket. `view` gives what is known now."""

    def __init__(
        self, udp: socket.socket, tcp: socket.socket, view: Callable[[], cluster.View], upstream: list[str]
    ) -> None:
        self._udp, self._tcp, self._view, self._upstream = udp, tcp, view, upstream
        self._slots = asyncio.Semaphore(MOST_UPSTREAM)
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients = 0

    async def run(self) -> None:
        """Serves until cancelled."""
        loop = asyncio.get_running_loop()
        self._udp.setblocking(False)
        transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self._packet), sock=self._udp)
        self._datagrams = transport
        server = await asyncio.start_server(self._stream, sock=self._tcp)
        try:
            async with server:
                await server.serve_forever()
        finally:
            transport.close()
            for task in self._tasks:
                task.cancel()

    def _packet(self, data: bytes, peer: tuple[str, int]) -> None:
        query = _parse(data)
        if query is None:
            return
        reply = cluster.answer(query, self._view())
        if not isinstance(reply, cluster.Forward):
            self._datagrams.sendto(cluster.pack(reply, cluster.udp_limit(query)), peer)
        elif self._slots.locked():
            self._datagrams.sendto(cluster.failure(query).to_wire(), peer)
        else:
            task = asyncio.get_running_loop().create_task(self._forward_packet(query, data, peer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward_packet(self, query: dns.message.Message, data: bytes, peer: tuple[str, int]) -> None:
        async with self._slots:
            reply = await self._ask(data, False) or cluster.failure(query).to_wire()
        with contextlib.suppress(OSError):
            self._datagrams.sendto(reply, peer)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            while self._clients <= MOST_TCP:
                async with asyncio.timeout(TCP_IDLE):
                    (length,) = struct.unpack(">H", await reader.readexactly(2))
                    data = await reader.readexactly(length)
                query = _parse(data)
                if query is None:
                    break
                reply = cluster.answer(query, self._view())
                if isinstance(reply, cluster.Forward):
                    async with self._slots:
                        wire = await self._ask(data, True) or cluster.failure(query).to_wire()
                else:
                    wire = cluster.pack(reply, 65535)
                writer.write(struct.pack(">H", len(wire)) + wire)
                await writer.drain()
        except (asyncio.IncompleteReadError, TimeoutError, OSError):
            pass  # the client left, or was slow: both end the connection
        finally:
            self._clients -= 1
            writer.close()

    async def _ask(self, data: bytes, tcp: bool) -> bytes | None:
        """The first answer of the host's resolvers, asked one after the other; None when nobody answered."""
        for server in self._upstream[:3]:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(UPSTREAM_TIMEOUT):
                    reply = await (_ask_tcp if tcp else _ask_udp)(server, data)
                if reply[:2] == data[:2]:
                    return reply
        return None


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, packet: Callable[[bytes, tuple[str, int]], None]) -> None:
        self._packet = packet

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._packet(data, addr)


def _parse(data: bytes) -> dns.message.Message | None:
    try:
        message = dns.message.from_wire(data, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError):
        return None
    return message if isinstance(message, dns.message.QueryMessage) and not message.flags & 0x8000 else None


async def _ask_udp(server: str, data: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, (server, 53))
        await loop.sock_sendall(sock, data)
        while True:
            reply = await loop.sock_recv(sock, 65535)
            if reply[:2] == data[:2]:
                return reply


async def _ask_tcp(server: str, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(server, 53)
    try:
        writer.write(struct.pack(">H", len(data)) + data)
        (length,) = struct.unpack(">H", await reader.readexactly(2))
        return await reader.readexactly(length)
    finally:
        writer.close()


def host_resolver(path: Path = Path("/etc/resolv.conf")) -> tuple[list[str], list[str]]:
    """(nameservers, search domains) of the host. A file that cannot be read is an empty one."""
    servers: list[str] = []
    searches: list[str] = []
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) >= 2 and words[0] == "nameserver":
                servers.append(words[1])
            elif words and words[0] in ("search", "domain"):
                searches = words[1:]
    return servers, [s for s in searches if s != "."]
