"""Root only: the one link from a mesh's router to the host, and everything it changes on the host.

That is one veth pair, one nf_tables table that belongs to this process's socket (the kernel removes it when the process
ends, however it ends), and `net.ipv4.ip_forward`, which is put back when the last mesh has gone. The host's own
rules and routes stay as they are. Several meshes may use the same addresses inside: each leaves behind its own
link's address."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from mantle.platform.machine import nft, wire
from mantle.platform.machine.netlink import NetlinkError, Route
from mantle.platform.machine.router import UPLINK
from mantle.platform.machine.spec import NodeConfig

_PREFIX = "mantle"
_LINK = re.compile(rf"{_PREFIX}[0-9]+\Z")
_LINKS = ipaddress.IPv4Network("169.254.203.0/24")
"""Link-local, so that it is nobody's network: link number n has the n-th /30."""
_IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


def refuse_overlap(config: NodeConfig) -> None:
    """Raises `wire.Refused` if pods or services would hide a network that this host reaches."""
    route = Route()
    known = route.routes()
    route.close()
    flags = {config.pod_cidr: "--pod-cidr", config.service_cidr: "--service-cidr"}
    for cidr, flag in flags.items():
        for existing in known:
            if existing.network.overlaps(ipaddress.IPv4Network(cidr)):
                name = socket.if_indextoname(existing.interface) if existing.interface else "?"
                raise wire.Refused(
                    "cidr_overlap",
                    f"{cidr} overlaps {existing.network}, which this machine reaches through {name}",
                    f"choose a free network with {flag}",
                )


class Uplink:
    """Made in the host's namespace; `namespace` is the router's. `ours` and `theirs` are the link's two addresses."""

    prefix = 30

    def __init__(self, config: NodeConfig, namespace: int) -> None:
        self._records = Path(config.state_dir).parent
        self._route = Route()
        self._index, number = self._make_link(namespace)
        network = list(_LINKS.subnets(new_prefix=self.prefix))[number]
        self.theirs, self.ours = map(str, network.hosts())
        name = f"{_PREFIX}{number}"
        self._route.address(self._index, self.theirs, self.prefix)
        self._rules = nft.Batch(f"mantle-{config.mesh}", nft.FAMILY_IP)
        self._rules.table(nft.OWNER)
        self._rules.chain("leaving", "postrouting", 100, "nat")
        ours = nft.in_network(nft.source_address(), network.network_address.packed, self.prefix)
        elsewhere = nft.interface(nft.META_OIFNAME, name, equal=False)
        self._rules.rule("leaving", ours, elsewhere, nft.masquerade())
        # Other meshes of this host hang on the same range of links: they stay out of each other's reach.
        self._rules.chain("between", "forward", 0)
        others = nft.in_network(nft.destination_address(), _LINKS.network_address.packed, _LINKS.prefixlen)
        self._rules.rule("between", nft.interface(nft.META_IIFNAME, name), others, nft.verdict(nft.DROP))
        self._rules.commit()
        with _records_locked(self._records) as record:
            if _IP_FORWARD.read_text().strip() == "0":
                record.write_text("0")
                _IP_FORWARD.write_text("1")

    def _make_link(self, namespace: int) -> tuple[int, int]:
        count = 1 << (self.prefix - _LINKS.prefixlen)
        for number in range(count):
            try:
                return self._route.veth(f"{_PREFIX}{number}", UPLINK, namespace), number
            except NetlinkError as error:
                if not isinstance(error, FileExistsError) and error.errno != 17:
                    raise
        raise wire.Refused("too_many_meshes", f"{count} meshes have an uplink already", "`mantle down` one of them")

    def close(self) -> None:
        """Takes everything back."""
        with contextlib.suppress(NetlinkError):  # gone already, with the router's namespace
            self._route.delete_link(self._index)
        self._route.close()
        self._rules.close()
        restore(self._records)


def restore(records: Path) -> None:
    """Puts `ip_forward` back if a mesh changed it and none with an uplink is left (after a SIGKILL too)."""
    if not (records / "ip_forward").exists():
        return
    with _records_locked(records) as record:
        if not record.exists() or any(_LINK.match(name) for _, name in socket.if_nameindex()):
            return
        _IP_FORWARD.write_text(record.read_text())
        record.unlink()


@contextlib.contextmanager
def _records_locked(records: Path) -> Iterator[Path]:
    directory = os.open(records, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield records / "ip_forward"
    finally:
        os.close(directory)
