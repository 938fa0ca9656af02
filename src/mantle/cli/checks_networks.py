"""What `mantle check` concludes of a cluster's addresses: are they in the networks that the mesh takes for its own?

A proxy lets a destination outside `networks` pass at once, in plaintext (proxy/src/discovery.rs). Clusters whose
services or pods have public addresses exist (the services of a new GKE cluster are in 34.118.224.0/20). Pure: facts
in, one finding out.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence

from mantle.cli.checks import Finding, Result, good_unless
from mantle.cli.checks_objects import Listed, Object, Unread, alive, full_of, name_of, unread

SHOWN = 3
"""Of each kind: what is wrong is wrong with all of them."""

_Networks = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]


def networks(known: Sequence[str], nodes: Listed, services: Listed, pods: Listed, *, installing: bool) -> Finding:
    """`known`: the mesh's networks; `installing`: those of an installation without values, so it is a warning only.
    What could not be read is said only if nothing else is wrong.
    """
    description, id = "every pod and service is in the mesh's networks", "networks"
    mesh = [ipaddress.ip_network(text) for text in known]
    reasons: list[str] = []
    for listed, addresses in ((nodes, _of_node), (services, _of_service), (pods, _of_pod)):
        if not isinstance(listed, Unread):
            reasons += _some([said for obj in listed for text, said in addresses(obj) if not _inside(text, mesh)])
    if not reasons:
        for listed in (nodes, services, pods):
            if isinstance(listed, Unread):
                return unread(description, listed, id)
    value = f"--set 'networks={{{','.join(known)},NETWORK}}'"
    fix = (
        f"`mantle install {value}`, with theirs for NETWORK"
        if installing
        else f"`mantle upgrade {value} | kubectl apply -f -`, with theirs for NETWORK; then restart what is meshed"
    )
    return good_unless(description, reasons, fix, Result.WARNING if installing else Result.ERROR, id)


def _inside(text: str, mesh: _Networks) -> bool:
    """Whether an address or network is in one of the mesh's; what is neither is nobody's to judge."""
    try:
        found = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return True
    return any(
        (isinstance(found, ipaddress.IPv4Network) and isinstance(net, ipaddress.IPv4Network) and found.subnet_of(net))
        or (
            isinstance(found, ipaddress.IPv6Network) and isinstance(net, ipaddress.IPv6Network) and found.subnet_of(net)
        )
        for net in mesh
    )


def _of_node(node: Object) -> Iterator[tuple[str, str]]:
    spec = node.get("spec") or {}
    for cidr in spec.get("podCIDRs") or filter(None, [spec.get("podCIDR")]):
        yield cidr, f"pods of node {name_of(node)} are given {cidr}"


def _of_service(service: Object) -> Iterator[tuple[str, str]]:
    spec = service.get("spec") or {}
    for ip in spec.get("clusterIPs") or filter(None, [spec.get("clusterIP")]):
        if ip != "None":
            yield ip, f"service {full_of(service)} is {ip}"


def _of_pod(pod: Object) -> Iterator[tuple[str, str]]:
    """Pods with the network of their node are never meshed, and their address is the node's."""
    if (pod.get("spec") or {}).get("hostNetwork") or not alive([pod]):
        return
    status = pod.get("status") or {}
    for item in status.get("podIPs") or filter(None, [status.get("podIP") and {"ip": status["podIP"]}]):
        yield item["ip"], f"pod {full_of(pod)} is {item['ip']}"


def _some(reasons: Iterable[str]) -> list[str]:
    found = list(reasons)
    more = len(found) - SHOWN
    return [*found[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
