"""`exec -t`: a terminal of its own for a command in a pod, joined to the one the person sits at."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import threading
import tty
from collections.abc import Mapping, Sequence
from pathlib import Path

from mantle.platform.machine.client import exec_in_pod


def exec_on_terminal(
    pod_dir: str | Path,
    container: str,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str = "",
    stdin: int = 0,
    stdout: int = 1,
) -> int:
    """Runs a command in a container on a new pseudo-terminal and relays it. Returns its exit code.

    If `stdin` is a terminal it is put in raw mode meanwhile, so keys such as Ctrl-C reach the command, and its size is
    followed. Must be called from the main thread.
    """
    ours, theirs = pty.openpty()
    is_terminal = os.isatty(stdin)
    before = termios.tcgetattr(stdin) if is_terminal else None
    done_r, done_w = os.pipe()

    def follow_size(*_: object) -> None:
        with contextlib.suppress(OSError):
            size = fcntl.ioctl(stdin, termios.TIOCGWINSZ, bytes(8))
            if struct.unpack("HHHH", size)[0]:
                fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)

    follow_size()
    relay = threading.Thread(target=_relay, args=(ours, stdin, stdout, done_r))
    resized = signal.signal(signal.SIGWINCH, follow_size)
    try:
        if is_terminal:
            tty.setraw(stdin)
        relay.start()
        return exec_in_pod(pod_dir, container, argv, (theirs, theirs, theirs), env=env, cwd=cwd, tty=True)
    finally:
        os.close(theirs)
        os.close(done_w)
        if relay.ident is not None:
            relay.join()
        signal.signal(signal.SIGWINCH, resized)
        if before is not None:
            termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        os.close(ours)
        os.close(done_r)


def _relay(terminal: int, stdin: int, stdout: int, done: int) -> None:
    """Keys to the terminal, its output to us; when the command is done, what is left of the output."""
    sources = [terminal, stdin, done]
    while True:
        ready = select.select(sources, [], [], 0 if done not in sources else None)[0]
        if terminal in ready:
            try:
                data = os.read(terminal, 1 << 16)
            except OSError:  # nobody holds the other end any more
                return
            os.write(stdout, data)
        elif done not in sources:
            return
        if stdin in ready:
            keys = os.read(stdin, 1 << 12)
            # The end of our input is the terminal's own end-of-file key.
            os.write(terminal, keys or b"\x04")
            if not keys:
                sources.remove(stdin)
        if done in ready:
            sources = [terminal]
