"""Without root: the way out for pods, by `pasta` or `slirp4netns` if this machine has one of them.

They run as the user, beside the mesh, and translate between the router's `uplink` and sockets of the host. Neither is
needed: without them pods reach each other and nothing else, and `mantle check` says so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

from mantle.platform.machine import namespaces as ns
from mantle.platform.machine.router import UPLINK

PROGRAMS = ("pasta", "slirp4netns")


def command(node: int, exit_fd: int) -> list[str]:
    """The arguments for the router's namespace, which is process `node`'s; empty if there is no such program."""
    for name in PROGRAMS:
        if (program := shutil.which(name)) is None:
            continue
        if name == "slirp4netns":
            quits = f"--exit-fd={exit_fd}"
            return [program, "--configure", "--mtu=1500", "--disable-host-loopback", quits, str(node), UPLINK]
        # Nothing of the host's is mapped in, and no port of the router is offered on the host.
        closed = ["-t", "none", "-u", "none", "-T", "none", "-U", "none", "--no-map-gw"]
        return [program, "--config-net", "--foreground", "--quiet", "--ns-ifname", UPLINK, *closed, str(node)]
    return []


class Helper:
    """Forked before the guard enters its user namespace, because the program must join that from outside."""

    def __init__(self, state_dir: Path) -> None:
        waits, self._tell = os.pipe2(os.O_CLOEXEC)
        exit_fd, self._keep = os.pipe2(os.O_CLOEXEC)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                ns.die_with_parent()
                os.close(self._tell)
                os.close(self._keep)
                log = os.open(state_dir / "uplink.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                os.dup2(log, 1)
                os.dup2(log, 2)
                node = os.read(waits, 16)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # pasta takes an ignored one for an error
                os.set_inheritable(exit_fd, True)
                if node and (argv := command(int(node), exit_fd)):
                    os.execv(argv[0], argv)
            finally:
                os._exit(0)
        os.close(waits)
        os.close(exit_fd)

    def serve(self, node: int) -> None:
        """Starts the program for the network namespace of process `node`."""
        os.write(self._tell, str(node).encode())

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
