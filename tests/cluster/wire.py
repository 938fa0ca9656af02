"""A TCP relay between a client and the API server that a test can silence, cut, or have answer by itself."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Wire:
    """A listener on loopback that carries bytes to `port` until told otherwise."""

    def __init__(self, port: int) -> None:
        self.to = port
        self.port = 0
        self.connections = 0
        self._silent = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()

    def go_silent(self) -> None:
        """From now on nothing that connections carry now arrives, and nobody is told: a half-open connection."""
        self._silent = True

    def speak(self) -> None:
        """New connections work. Those that were silenced stay so."""
        self._silent = False

    def cut(self) -> None:
        """Every connection breaks."""
        for writer in list(self._open):
            writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.to)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, upstream_writer}
        swallowed = asyncio.Event()
        pumps = [
            asyncio.ensure_future(self._pump(reader, upstream_writer, swallowed)),
            asyncio.ensure_future(self._pump(upstream_reader, writer, swallowed)),
        ]
        self._tasks.update(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        for end in (writer, upstream_writer):
            end.transport.abort()
        self._open -= {writer, upstream_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, swallowed: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while octets := await reader.read(65536):
                if self._silent:
                    swallowed.set()
                if not swallowed.is_set():
                    writer.write(octets)
                    await writer.drain()


@asynccontextmanager
async def wire(port: int) -> AsyncIterator[Wire]:
    """A wire to `port` on loopback, ended with everything it carries."""
    relay = Wire(port)
    server = await asyncio.start_server(relay.carry, "127.0.0.1", 0)
    relay.port = server.sockets[0].getsockname()[1]
    try:
        yield relay
    finally:
        server.close()
        relay.cut()
        await server.wait_closed()
