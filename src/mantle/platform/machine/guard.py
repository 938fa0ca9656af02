"""The guard of one mesh: it stays in the host's network namespace, gives the node its way out, and takes it back.

It is the parent of the node, which is PID 1 of the mesh's PID namespace. When either dies the kernel ends everything.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from mantle.platform.machine import namespaces as ns
from mantle.platform.machine import wire
from mantle.platform.machine.outside import Helper
from mantle.platform.machine.spec import NodeConfig
from mantle.platform.machine.uplink import Uplink, refuse_overlap

_ALL_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


def guard(config: NodeConfig, said: TextIO, become_node: Callable[[socket.socket], NoReturn]) -> None:
    """Forks the node, gives it its uplink, says so, and stays until the node has ended. Raises before that.

    Without root everything but this process's network is in a user namespace first, and the uplink is a helper program
    if there is one.
    """
    rootless = os.geteuid() != 0
    ns.name_process("mantle-guard")
    refuse_overlap(config)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    uplink: Uplink | Helper | None = None
    if rootless:
        if config.uplink:
            uplink = Helper(Path(config.state_dir))
        ns.enter_user_namespace()
    ns.unshare(ns.NEWPID)
    node = os.fork()
    if node == 0:
        become_node(theirs)
    theirs.close()
    try:
        _heard(ours)
        addresses: dict[str, object] = {}
        if isinstance(uplink, Helper):
            uplink.serve(node)
        elif config.uplink:
            namespace = os.open(f"/proc/{node}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            uplink = Uplink(config, namespace)
            os.close(namespace)
            addresses = {"ours": uplink.ours, "theirs": uplink.theirs, "prefix": uplink.prefix}
        ours.send(json.dumps(addresses).encode())
        _heard(ours)
        with said:
            json.dump({"pid": os.getpid()}, said)
        while not _has_ended(node):
            if signal.sigwaitinfo(_ALL_SIGNALS).si_signo in (signal.SIGTERM, signal.SIGINT):
                os.kill(node, signal.SIGTERM)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(node, signal.SIGKILL)
        if uplink:
            uplink.close()
        (Path(config.state_dir) / "node.sock").unlink(missing_ok=True)


def _heard(node: socket.socket) -> None:
    """Waits for the node's next word. Raises its refusal."""
    early = b'{"error": {"reason": "node_setup", "message": "the node ended early"}}'
    wire.check(json.loads(node.recv(1 << 16) or early))


def _has_ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] == child
