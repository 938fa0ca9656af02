"""A small event loop for processes that fork: one thread, descriptors and deadlines, nothing hidden.

The node and the supervisors use it (asyncio's loop does not survive a fork). `Server` speaks `wire` frames on it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from mantle.platform.machine import wire

Ready = Callable[[], None]


class Loop:
    """Calls back when a descriptor is readable or writable, when a signal came, and asks for the next deadline."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signals: dict[int, Ready] = {}
        self._running = True
        self.read(self._wake_r, self._woken)

    def read(self, fd: int, ready: Ready) -> None:
        self._selector.register(fd, selectors.EVENT_READ, ready)

    def write(self, fd: int, ready: Ready) -> None:
        self._selector.register(fd, selectors.EVENT_WRITE, ready)

    def forget(self, fd: int) -> None:
        """Before the descriptor is closed. One that is not watched is fine."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def on_signal(self, number: int, ready: Ready) -> None:
        self._signals[number] = ready
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        signal.signal(number, lambda *_: None)

    def stop(self) -> None:
        self._running = False

    def run(self, deadline: Callable[[], float | None], due: Ready) -> None:
        """Until `stop`. `deadline` is in seconds of `time.monotonic`; `due` is called when it has passed."""
        while self._running:
            at = deadline()
            wait = None if at is None else max(0.0, at - time.monotonic())
            for key, _ in self._selector.select(wait):
                # An earlier callback may have closed it, and another file may have its number by now.
                if self._selector.get_map().get(key.fileobj) is key:
                    key.data()
            at = deadline()
            if at is not None and time.monotonic() >= at:
                due()

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in set(os.read(self._wake_r, 4096)):
                self._signals.get(number, lambda: None)()


class Peer:
    """One conversation on a `Server`. A peer that does not read what it is sent is dropped."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self._server, self._socket = server, sock
        self._decoder = wire.Decoder()
        self.on_close: Ready = lambda: None
        self.open = True

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: wire.Message, fds: tuple[int, ...] = ()) -> None:
        if self.open:
            try:
                wire.send(self._socket, message, fds)
            except OSError:
                self.close()

    def refuse(self, refusal: wire.Refused) -> None:
        self.send(refusal.as_message())

    def close(self) -> None:
        if self.open:
            self.open = False
            self._server.forget(self)
            self._decoder.close()
            self._socket.close()
            self.on_close()

    def readable(self) -> None:
        try:
            data, fds = wire.receive(self._socket)
            frames = self._decoder.feed(data, fds) if data else []
        except BlockingIOError:
            return
        except (OSError, ValueError):
            data, frames = b"", []
        for message, fds in frames:
            self._server.handle(self, message, fds)
        if not data:
            self.close()


Handler = Callable[[Peer, wire.Message, list[int]], None]


class Server:
    """A Unix socket that only processes of our own user may use."""

    def __init__(self, loop: Loop, path: Path, handler: Handler) -> None:
        self._loop, self._path, self._handler = loop, path, handler
        self._listener = wire.listen(path)
        self._peers: set[Peer] = set()
        loop.read(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # gone again, or out of descriptors: the next one gets another chance
            return
        if not wire.peer_is(sock, os.geteuid()):
            sock.close()
            return
        sock.setblocking(False)
        peer = Peer(self, sock)
        self._peers.add(peer)
        self._loop.read(sock.fileno(), peer.readable)

    def handle(self, peer: Peer, message: wire.Message, fds: list[int]) -> None:
        """Descriptors that the handler takes over it removes from the list; the others are closed."""
        try:
            self._handler(peer, message, fds)
        except wire.Refused as refusal:
            peer.refuse(refusal)
        except (KeyError, TypeError, ValueError) as error:
            peer.refuse(wire.Refused("bad_request", f"{message.get('op')}: {type(error).__name__}: {error}"))
        except OSError as error:
            peer.refuse(wire.Refused("kernel", f"{message.get('op')}: {error.strerror or error}"))
        finally:
            wire.close_all(fds)

    def forget(self, peer: Peer) -> None:
        self._loop.forget(peer.fileno())
        self._peers.discard(peer)

    def close(self) -> None:
        """Ends every conversation and removes the socket."""
        for peer in list(self._peers):
            peer.close()
        self._loop.forget(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)
