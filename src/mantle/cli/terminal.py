"""A terminal for a command in a pod: a pseudo-terminal between it and ours, with our size, in raw mode while it
runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable


def with_terminal(run: Callable[[tuple[int, int, int]], int]) -> int:
    """Calls `run` with the descriptors of a new terminal and copies between it and ours until `run` returns."""
    master, slave = os.openpty()
    stdin, stdout = sys.stdin.fileno(), sys.stdout.fileno()
    ours = os.isatty(stdin)
    saved = termios.tcgetattr(stdin) if ours else None
    stop_reader, stop_writer = os.pipe()

    def resize(*_: object) -> None:
        with contextlib.suppress(OSError):
            fcntl.ioctl(master, termios.TIOCSWINSZ, fcntl.ioctl(stdin, termios.TIOCGWINSZ, b"\0" * 8))

    copier = threading.Thread(target=_copy, args=(master, stdin, stdout, stop_reader), daemon=True)
    before = signal.signal(signal.SIGWINCH, resize) if ours else None
    try:
        if ours:
            resize()
            tty.setraw(stdin, termios.TCSANOW)  # what was typed already is for the command
        copier.start()
        code = run((slave, slave, slave))
        os.close(slave)
        slave = -1
        os.write(stop_writer, b"x")
        copier.join(2.0)
        return code
    finally:
        if saved is not None:
            termios.tcsetattr(stdin, termios.TCSADRAIN, saved)
        if before is not None:
            signal.signal(signal.SIGWINCH, before)
        for descriptor in (master, slave, stop_reader, stop_writer):
            if descriptor >= 0:
                os.close(descriptor)


def _copy(master: int, stdin: int, stdout: int, stop: int) -> None:
    """Both ways; what the command wrote last is still read after it ended."""
    stopping = False
    with selectors.DefaultSelector() as selector:
        for descriptor in (master, stop, stdin):
            with contextlib.suppress(PermissionError):  # a file as standard input cannot be waited for
                selector.register(descriptor, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select(0.0 if stopping else None)}
            if stop in ready:
                stopping = True
                selector.unregister(stop)
            if stdin in ready:
                data = os.read(stdin, 4096)
                if data:
                    os.write(master, data)
                else:
                    selector.unregister(stdin)
            if master in ready:
                try:
                    data = os.read(master, 65536)
                except OSError:  # EIO: the other side is closed
                    return
                if not data:
                    return
                os.write(stdout, data)
            elif stopping:
                return
