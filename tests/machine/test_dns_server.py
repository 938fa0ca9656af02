"""DNS over real sockets of the loopback: both transports, other names upstream, and nobody who answers there."""

from __future__ import annotations

import asyncio
import socket
import struct

import dns.flags
import dns.message
import dns.rcode

from mantle.platform.machine import dns as cluster
from mantle.platform.machine import dns_server

MANY = cluster.View(
    a={"web.cluster.local": ("10.0.0.1",), "many.cluster.local": tuple(f"10.0.0.{i}" for i in range(200))},
)


async def ask_udp(port: int, data: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        await loop.sock_sendall(sock, data)
        async with asyncio.timeout(60):
            return await loop.sock_recv(sock, 65535)


async def ask_tcp(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(struct.pack(">H", len(data)) + data)
    async with asyncio.timeout(60):
        (length,) = struct.unpack(">H", await reader.readexactly(2))
        reply = await reader.readexactly(length)
    writer.close()
    return reply


def serve(upstream: list[str]) -> tuple[dns_server.DnsServer, int, int]:
    udp, tcp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket()
    udp.bind(("127.0.0.1", 0))
    tcp.bind(("127.0.0.1", 0))
    tcp.listen()
    return dns_server.DnsServer(udp, tcp, lambda: MANY, upstream), udp.getsockname()[1], tcp.getsockname()[1]


def test_both_transports_answer_and_garbage_is_ignored() -> None:
    async def scene() -> None:
        server, udp, tcp = serve([])
        running = asyncio.get_running_loop().create_task(server.run())
        web = dns.message.make_query("web.cluster.local", "A")
        many = dns.message.make_query("many.cluster.local", "A").to_wire()
        await asyncio.sleep(0)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for junk in (b"", b"\0" * 5, b"\xff" * 600, web.to_wire()[:-3]):
                stranger.sendto(junk, ("127.0.0.1", udp))
        reply = dns.message.from_wire(await ask_udp(udp, web.to_wire()))
        assert reply.answer[0].to_text().endswith("A 10.0.0.1")
        assert dns.message.from_wire(await ask_udp(udp, many)).flags & dns.flags.TC
        assert len(dns.message.from_wire(await ask_tcp(tcp, many)).answer[0]) == 200
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scene())


def test_without_a_resolver_upstream_the_answer_is_servfail() -> None:
    async def scene() -> None:
        server, udp, tcp = serve(["127.0.0.1"])
        running = asyncio.get_running_loop().create_task(server.run())
        query = dns.message.make_query("example.test", "A").to_wire()
        dns_server.UPSTREAM_TIMEOUT = 0.2
        for reply in (await ask_udp(udp, query), await ask_tcp(tcp, query)):
            assert dns.message.from_wire(reply).rcode() in (dns.rcode.SERVFAIL, dns.rcode.NXDOMAIN)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scene())


def test_the_hosts_resolver_is_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "resolv.conf"
    file.write_text("# x\nnameserver 10.0.0.53\nnameserver ::1\nsearch corp.example .\noptions ndots:1\nnonsense\n")
    assert dns_server.host_resolver(file) == (["10.0.0.53", "::1"], ["corp.example"])
    assert dns_server.host_resolver(tmp_path / "none") == ([], [])
