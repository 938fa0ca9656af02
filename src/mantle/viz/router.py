"""The addresses of the mesh's router as a pod sees them: probes come from there.

A pod's name server and its default gateway are both the router's, so the pod's own files answer. Parsing is pure; only
`router_addresses` reads files. Source: proc_pid_net(5) `route`, resolv.conf(5).
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from pathlib import Path


def router_addresses(
    resolv_conf: Path = Path("/etc/resolv.conf"),
    routes: Path = Path("/proc/net/route"),
    *,
    name_server: bool = True,
) -> tuple[str, ...]:
    """What this pod knows of its router, without duplicates. Files that cannot be read say nothing. `name_server`: it
    is the router, too (on a cluster it is a service).
    """
    found: dict[str, None] = {}
    for path, parse in (*(((resolv_conf, name_servers),) if name_server else ()), (routes, gateways)):
        with contextlib.suppress(OSError):
            found.update(dict.fromkeys(parse(path.read_text())))
    return tuple(found)


def name_servers(text: str) -> list[str]:
    """The `nameserver` addresses of a resolv.conf."""
    words = (line.split() for line in text.splitlines())
    return [w[1] for w in words if len(w) >= 2 and w[0] == "nameserver" and _is_address(w[1])]


def gateways(text: str) -> list[str]:
    """The default gateways of /proc/net/route (addresses there are hexadecimal, in the machine's byte order)."""
    rows = (line.split() for line in text.splitlines()[1:])
    return [
        socket.inet_ntoa(struct.pack("=I", int(row[2], 16)))
        for row in rows
        if len(row) > 2 and row[1] == "00000000" and row[2] != "00000000"
    ]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
