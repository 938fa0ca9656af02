"""Blocking calls to a pod's supervisor, past the daemon, for commands: quick to import, no event loop.

Every refusal is `wire.Refused` (reason, message, fix); a pod that is gone is an OSError of the connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from mantle.platform.machine import wire
from mantle.platform.machine.spec import PodStatus, status_from_json


def dial(pod_dir: str | Path, port: int) -> socket.socket:
    """A blocking connection to 127.0.0.1:port inside the pod, past its proxy."""
    with wire.Connection(Path(pod_dir) / "ctl.sock") as connection:
        _, fds = connection.call({"op": "dial", "port": port})
    sock = socket.socket(fileno=fds[0])
    sock.setblocking(True)
    return sock


def exec_in_pod(
    pod_dir: str | Path,
    container: str,
    argv: Sequence[str],
    stdio: tuple[int, int, int] = (0, 1, 2),
    *,
    env: Mapping[str, str] | None = None,
    cwd: str = "",
    tty: bool = False,
) -> int:
    """Runs a command in a container and waits for it. Returns its exit code (128 + signal if one ended it).

    SIGINT, SIGTERM and SIGHUP to this process are passed on to it. With `tty`, `stdio` must be a terminal's slave
    that is nobody's controlling terminal yet.
    """
    with wire.Connection(Path(pod_dir) / "ctl.sock", timeout=None) as connection:
        early: list[int] = []
        begun = False

        def forward(number: int, _frame: object) -> None:
            if not begun:
                early.append(number)
                return
            with contextlib.suppress(OSError):
                connection.send({"signal": number})

        passed_on = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, forward) for number in passed_on}
        try:
            connection.call(exec_request(container, argv, env, cwd, tty), stdio)
            begun = True
            for number in early:
                connection.send({"signal": number})
            answer, _ = connection.receive()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return int(answer["exit"])


def read_status(pod_dir: str | Path) -> PodStatus | None:
    """The pod's last status, from its file; None if it has none yet."""
    try:
        return status_from_json(json.loads((Path(pod_dir) / "status.json").read_text()))
    except FileNotFoundError:
        return None


def process_start(pid: int) -> int | None:
    """When a process started (clock ticks since boot), to tell it from a later one with its pid; None: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])  # a zombie is gone, whatever its parent does
    except (FileNotFoundError, ProcessLookupError):
        return None


def kill_node(guard: int) -> None:
    """Ends a whole mesh at once; the kernel takes every process, namespace, mount and link with it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(guard, signal.SIGKILL)


def exec_request(
    container: str, argv: Sequence[str], env: Mapping[str, str] | None, cwd: str, tty: bool
) -> wire.Message:
    env = dict(env or {})
    return {"op": "exec", "container": container, "argv": list(argv), "env": env, "cwd": cwd, "tty": tty}
