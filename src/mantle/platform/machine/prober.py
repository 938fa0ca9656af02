"""Sends HTTP, gRPC and TCP probes from the router's address, as a kubelet does from its node: outside the mesh.

What the answers mean is `probes.py`. A probe uses one connection, never redirects, and reads no more than a head.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable

from mantle import __version__
from mantle.platform.machine import grpc_health
from mantle.platform.machine.spec import ProbeSpec

OpenSocket = Callable[[], Awaitable[socket.socket]]
"""A new, unconnected TCP socket in the router's network namespace."""
_MOST_HEAD = 16 * 1024


async def send(spec: ProbeSpec, ip: str, open_socket: OpenSocket) -> tuple[bool, str]:
    """(did it pass, what was found). Exec probes are not sent from here."""
    try:
        async with asyncio.timeout(spec.timeout):
            if spec.tcp is not None:
                await _connect(ip, spec.tcp, open_socket, lambda _: _nothing())
                return True, ""
            if spec.grpc is not None:
                return await _grpc(*spec.grpc, ip, open_socket)
            if spec.http is None:
                return False, "an exec probe has no address"
            return await _http(spec, ip, open_socket)
    except TimeoutError:
        return False, f"no answer within {spec.timeout:g} s"
    except (OSError, ValueError) as error:
        return False, (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


async def _nothing() -> None:
    return None


async def _connect(
    ip: str, port: int, open_socket: OpenSocket, use: Callable[[socket.socket], Awaitable[None]]
) -> None:
    sock = await open_socket()
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (ip, port))
        await use(sock)
    finally:
        sock.close()


async def _grpc(port: int, service: str, ip: str, open_socket: OpenSocket) -> tuple[bool, str]:
    answer = grpc_health.Answer()

    async def talk(sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, grpc_health.request(f"{ip}:{port}", service))
        while not answer.over:
            answer.feed(await loop.sock_recv(sock, _MOST_HEAD))
            reply, answer.reply = answer.reply, b""
            await loop.sock_sendall(sock, reply)

    await _connect(ip, port, open_socket, talk)
    return answer.outcome()


async def _http(spec: ProbeSpec, ip: str, open_socket: OpenSocket) -> tuple[bool, str]:
    assert spec.http is not None
    scheme, port, path = spec.http
    headers = {
        "Host": f"{ip}:{port}",
        "User-Agent": f"mantle-probe/{__version__}",
        "Accept": "*/*",
        "Connection": "close",
    }
    headers.update(spec.http_headers)
    if not path.startswith("/"):
        path = "/" + path
    head = f"GET {path} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in headers.items()) + "\r\n"
    context = None
    if scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = (
            False,
            ssl.CERT_NONE,
        )  # as a kubelet: a probe asks for life, not identity
    found = b""

    async def talk(sock: socket.socket) -> None:
        nonlocal found
        reader, writer = await asyncio.open_connection(
            sock=sock.dup(), ssl=context, server_hostname="" if context else None, limit=_MOST_HEAD
        )
        try:
            writer.write(head.encode("latin-1", "replace"))
            await writer.drain()
            found = await reader.readline()
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()

    await _connect(ip, port, open_socket, talk)
    parts = found.split(None, 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/") or not parts[1].isdigit():
        return False, "the answer is not HTTP" if found else "the connection was closed without an answer"
    status = int(parts[1])
    return 200 <= status < 400, "" if 200 <= status < 400 else f"HTTP status {status} from {path}"
