"""The mesh's router: a network namespace in which every pod hangs on a veth of its own, and nothing is bridged.

It has the address that is the pods' gateway, where the daemon's DNS listens and from where probes come; it refuses
source addresses that are not the pod's own; and it sends connections to service addresses to their endpoints, which
only pods outside the mesh need (a proxy picks endpoints itself). Service addresses without endpoints are unreachable
at once."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from mantle.platform.machine import nft
from mantle.platform.machine.conntrack import Flows
from mantle.platform.machine.netlink import ROUTE_UNREACHABLE, NetlinkError, Route
from mantle.platform.machine.spec import NodeConfig, ServicePort

UPLINK = "uplink"
_SLOTS = 60
"""Random numbers drawn for a service: exactly even for one to six endpoints, ten, twelve …"""
_CHANGES_PER_BATCH = 25
"""Services of which all slots are replaced: a transaction must fit the socket's send buffer (208 KiB)."""
_PROTOCOLS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP}

Elements = list[tuple[bytes, bytes | None]]


class Router:
    """Sets up the namespace it is made in. Keeps its netlink sockets, so it may be used from anywhere afterwards."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._route = Route()
        self._rules = nft.Batch("router", nft.FAMILY_INET)
        self._flows = Flows()
        self._links: dict[str, int] = {}
        self._services: dict[ServicePort, Elements] = {}
        for name, value in (
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/rp_filter", "1"),
            ("ipv4/conf/default/rp_filter", "1"),
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/default/send_redirects", "0"),
            ("ipv6/conf/all/disable_ipv6", "1"),
            ("ipv6/conf/default/disable_ipv6", "1"),
        ):
            path = Path("/proc/sys/net", name)
            if path.exists():
                path.write_text(value)
        loopback = socket.if_nametoindex("lo")
        self._route.up(loopback)
        self._route.address(loopback, config.router_ip, 32)
        for cidr in (config.pod_cidr, config.service_cidr):
            self._route.route(cidr, kind=ROUTE_UNREACHABLE)
        self._install()

    def _install(self) -> None:
        rules = self._rules
        rules.table()
        rules.set("pods", [(nft.TYPE_IFNAME, 16), (nft.TYPE_IPV4, 4)])
        rules.set("hairpins", [(nft.TYPE_IPV4, 4), (nft.TYPE_IPV4, 4)])
        key = [(nft.TYPE_IPV4, 4), (nft.TYPE_PROTO, 1), (nft.TYPE_PORT, 2), (nft.TYPE_INTEGER, 4)]
        rules.set("services", key, [(nft.TYPE_IPV4, 4), (nft.TYPE_PORT, 2)])

        rules.chain("arriving", "prerouting", -300)
        rules.rule("arriving", nft.interface(nft.META_IIFNAME, "lo"), nft.verdict(nft.ACCEPT))
        rules.rule("arriving", nft.ipv6(), nft.verdict(nft.DROP))
        rules.rule("arriving", nft.interface(nft.META_IIFNAME, UPLINK), nft.verdict(nft.ACCEPT))
        sender = nft.meta(nft.META_IIFNAME, 1) + nft.source_address(12)  # 12 follows the sixteen bytes of 1
        rules.rule("arriving", sender, nft.lookup("pods", 1, inverted=True), nft.verdict(nft.DROP))

        rules.chain("services", "prerouting", -100, "nat")
        wanted = nft.destination_address(8) + nft.meta(nft.META_L4PROTO, 9) + nft.transport_header(2, 2, 10)
        slot = nft.random_slot(_SLOTS, 11)
        rules.rule("services", wanted, slot, nft.lookup("services", 1, result=1), nft.destination_nat(1, 9))

        rules.chain("leaving", "postrouting", 100, "nat")
        # A pod that reaches itself through its service would get a packet from its own address.
        both = nft.source_address(8) + nft.destination_address(9)
        own = socket.inet_aton(self._config.router_ip)
        rules.rule("leaving", both, nft.lookup("hairpins", 1), nft.source_nat(own))
        rules.rule("leaving", nft.interface(nft.META_OIFNAME, UPLINK), nft.masquerade())

        for chain, hook in (("to-router", "input"), ("through-router", "forward")):
            rules.chain(chain, hook, 0)
            from_outside = nft.interface(nft.META_IIFNAME, UPLINK)
            rules.rule(chain, from_outside, nft.connection_is_known(), nft.verdict(nft.ACCEPT))
            rules.rule(chain, from_outside, nft.verdict(nft.DROP))
        rules.commit()

    def attach(self, ip: str, namespace: int) -> None:
        """Gives the pod its `eth0`, born inside `namespace`, and routes its address there. Raises NetlinkError."""
        name = _link_name(ip)
        index = self._route.veth(name, "eth0", namespace)
        self._links[ip] = index
        for attempt in (f"ipv4/conf/{name}/rp_filter", f"ipv4/conf/{name}/send_redirects"):
            Path("/proc/sys/net", attempt).write_text("1" if attempt.endswith("rp_filter") else "0")
        self._route.route(f"{ip}/32", interface=index, source=self._config.router_ip)
        self._rules.elements("pods", _pod_element(ip))
        self._rules.elements("hairpins", [(socket.inet_aton(ip) * 2, None)])
        self._rules.commit()

    def detach(self, ip: str) -> None:
        """The pod is gone (its link with it) or is to be cut off."""
        index = self._links.pop(ip, None)
        if index is None:
            return
        self._rules.elements("pods", _pod_element(ip), remove=True)
        self._rules.elements("hairpins", [(socket.inet_aton(ip) * 2, None)], remove=True)
        self._rules.commit()
        with contextlib.suppress(NetlinkError):  # the kernel took it away with the pod's namespace
            self._route.delete_link(index)

    def uplink(self, ours: str, theirs: str, prefix: int) -> None:
        """The way out: `UPLINK` has been born here; it gets our address, and the default route leads to the host's."""
        index = socket.if_nametoindex(UPLINK)
        self._route.address(index, ours, prefix)
        self._route.up(index)
        self._route.route(via=theirs, interface=index)

    def services(self, table: Sequence[ServicePort]) -> None:
        """Replaces the whole table; only what differs is sent, each service's ports in one transaction."""
        new = {entry: _service_elements(entry) for entry in table if entry.endpoints}
        gone = [entry for entry in self._services if entry not in new]
        come = [entry for entry in new if entry not in self._services]
        # An old entry and the new one of the same address and port share keys: they must change in one transaction.
        groups: dict[tuple[str, int, str], list[tuple[ServicePort, bool]]] = {}
        for entry, remove in [(e, True) for e in gone] + [(e, False) for e in come]:
            groups.setdefault((entry.ip, entry.port, entry.protocol), []).append((entry, remove))
        pending = list(groups.values())
        for start in range(0, len(pending), _CHANGES_PER_BATCH):
            for changes in pending[start : start + _CHANGES_PER_BATCH]:
                for entry, remove in changes:
                    elements = self._services.pop(entry) if remove else new[entry]
                    self._rules.elements("services", elements, remove=remove)
                    if not remove:
                        self._services[entry] = elements
            self._rules.commit()
        stay = {(entry.ip, entry.port): set(entry.endpoints) for entry in come if entry.protocol == "UDP"}
        for entry in gone:
            if entry.protocol == "UDP":
                service = (entry.ip, entry.port)
                with contextlib.suppress(
                    NetlinkError
                ):  # a kernel without this: they end when nobody speaks for a while
                    self._flows.forget_udp(service, set(entry.endpoints) - stay.get(service, set()))

    def socket(self, kind: str, bind: tuple[str, int] | None, *, listen: bool) -> socket.socket:
        """A socket of this namespace (`tcp` or `udp`), non-blocking, for whoever it is passed to."""
        flags = socket.SOCK_NONBLOCK | (socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
        sock = socket.socket(socket.AF_INET, flags)
        try:
            if bind:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(bind)
            if listen:
                sock.listen(128)
        except OSError:
            sock.close()
            raise
        return sock


def _link_name(ip: str) -> str:
    return f"p{int(ipaddress.IPv4Address(ip)):08x}"


def _pod_element(ip: str) -> Elements:
    return [(_link_name(ip).encode().ljust(16, b"\0") + socket.inet_aton(ip), None)]


def _service_elements(entry: ServicePort) -> Elements:
    def key(slot: int) -> bytes:
        protocol = bytes([_PROTOCOLS[entry.protocol], 0, 0, 0])
        return socket.inet_aton(entry.ip) + protocol + struct.pack(">HH", entry.port, 0) + struct.pack("I", slot)

    def value(slot: int) -> bytes:
        ip, port = entry.endpoints[slot % len(entry.endpoints)]
        return socket.inet_aton(ip) + struct.pack(">HH", port, 0)

    return [(key(slot), value(slot)) for slot in range(_SLOTS)]
