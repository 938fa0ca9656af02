"""Probes over real sockets: a server of gRPC's own library, one without health, and one that is no gRPC at all."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from mantle.platform.machine import grpc_health, prober
from mantle.platform.machine.spec import ProbeSpec

HEALTH = {b"": b"\x08\x01", b"\x0a\x04slow": b"\x08\x02"}
"""What the server answers to a request: 1 is SERVING, 2 is NOT_SERVING."""


@asynccontextmanager
async def server(method: str = "Check") -> AsyncIterator[int]:
    async def check(request: bytes, context: grpc.aio.ServicerContext) -> bytes:  # type: ignore[type-arg]
        if request not in HEALTH:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return HEALTH[request]

    handlers = {method: grpc.unary_unary_rpc_method_handler(check)}
    serving = grpc.aio.server()
    serving.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", handlers),))
    port = serving.add_insecure_port("127.0.0.1:0")
    await serving.start()
    try:
        yield port
    finally:
        await serving.stop(None)


async def ask(port: int, service: str = "", seconds: float = 30.0) -> tuple[bool, str]:
    async def open_socket() -> socket.socket:
        return socket.socket()

    return await prober.send(ProbeSpec(grpc=(port, service), timeout=seconds), "127.0.0.1", open_socket)


def test_a_grpc_probe_asks_the_health_service() -> None:
    async def scene() -> None:
        nothing = "the server has no health for this service, or no grpc.health.v1.Health at all"
        async with server() as port:
            assert await ask(port) == (True, "")
            assert await ask(port, "slow") == (False, "the health is NOT_SERVING")
            assert await ask(port, "x" * 300) == (False, nothing)
        assert (await ask(port))[0] is False
        async with server("Other") as port:
            assert await ask(port) == (False, nothing)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("says", "found"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the answer is not HTTP/2"),
        (b"", "the connection was closed without an answer"),
        (b"\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x02", "the server refused the call"),
    ],
)
def test_a_server_without_grpc_is_not_healthy(says: bytes, found: str) -> None:
    async def scene() -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(says)
            writer.close()

        async with await asyncio.start_server(talk, "127.0.0.1", 0) as listening:
            assert await ask(listening.sockets[0].getsockname()[1]) == (False, found)

    asyncio.run(scene())


def test_a_server_that_says_nothing_is_not_waited_for() -> None:
    async def scene() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            assert await ask(silent.getsockname()[1], seconds=0.05) == (False, "no answer within 0.05 s")

    asyncio.run(scene())


def test_an_answer_may_come_in_pieces_and_padded() -> None:
    answer = grpc_health.Answer()
    padded = b"\x02\x00\x00\x00\x00\x02\x08\x01\x00\x00"
    frames = b"\0\0\0\x04\0\0\0\0\0" + len(padded).to_bytes(3, "big") + b"\x00\x09\0\0\0\x01" + padded
    for byte in frames:
        assert not answer.over
        answer.feed(bytes([byte]))
    assert (answer.over, answer.outcome(), answer.reply[3:5]) == (True, (True, ""), b"\x04\x01")
