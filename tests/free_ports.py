"""Ports for programs that must be told one. Knows nothing of who listens there.

A port that the kernel gave and took back again can be given to somebody else before the program listens on it: every
connection of every other test takes one from the same range. Below that range a port belongs to who asks for it.
"""

import random
import socket
from pathlib import Path

LOWEST = 15_000
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The ports that the kernel gives: the first and the last. https://docs.kernel.org/networking/ip-sysctl.html"""


def free_port() -> int:
    """A port that nothing uses on any address of this machine, and that the kernel gives to nobody."""
    first = int(RANGE.read_text().split()[0])
    chance = random.SystemRandom()
    for _ in range(1000):
        port = chance.randrange(LOWEST, first) if first > LOWEST + 1000 else 0
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise AssertionError(f"no free port between {LOWEST} and {first}")
