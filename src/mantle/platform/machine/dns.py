"""Cluster DNS: a question and what is known -> the answer, or `Forward`. Pure; sockets are in `dns_server.py`.

The schema is Kubernetes' (https://github.com/kubernetes/dns/blob/master/docs/specification.md): services, headless
services, hostnames of pods, SRV, PTR, `IP.NAMESPACE.pod`. IPv6 is off on one machine, so every AAAA answer is empty.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from mantle.core.model import Key, Pod, Service
from mantle.platform.machine.services import behind, target

ZONE = "cluster.local"
TTL = 5
"""Seconds, Kubernetes' default."""
_TYPES = {"A": dns.rdatatype.A, "SRV": dns.rdatatype.SRV, "PTR": dns.rdatatype.PTR, "SOA": dns.rdatatype.SOA}


@dataclass(frozen=True, slots=True)
class Forward:
    """Not ours: ask the host's resolvers."""


@dataclass(frozen=True, slots=True)
class View:
    """Every name of one mesh. Names are in small letters, without the last dot."""

    a: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    srv: Mapping[str, tuple[tuple[int, str], ...]] = field(default_factory=dict)
    """name -> (port, target) …"""
    ptr: Mapping[str, str] = field(default_factory=dict)
    """Address -> name."""
    parents: frozenset[str] = frozenset()
    """Names that exist only because something is below them (RFC 8020)."""
    networks: tuple[ipaddress.IPv4Network, ...] = ()
    """Addresses of this mesh: asking the host about them would leak."""


def view(services: Mapping[Key, Service], pods: Iterable[tuple[Pod, str, str]], networks: Iterable[str]) -> View:
    """Names of everything. `pods`: (pod, its `hostname` field, its `subdomain` field), both may be empty."""
    pods = list(pods)
    named = {p.key: (hostname, subdomain) for p, hostname, subdomain in pods}
    a: dict[str, tuple[str, ...]] = {"localhost": ("127.0.0.1",), f"ns.dns.{ZONE}": ()}
    srv: dict[str, list[tuple[int, str]]] = {}
    ptr: dict[str, str] = {}
    for pod, _, _ in pods:
        a[f"{_dashed(pod.ip)}.{pod.key.namespace}.pod.{ZONE}"] = (pod.ip,)
    for svc in services.values():
        base = f"{svc.key.name}.{svc.key.namespace}.svc.{ZONE}"
        if svc.cluster_ip != "None":
            a[base] = (svc.cluster_ip,)
            ptr[svc.cluster_ip] = base
            for port in svc.ports:
                if port.name:
                    srv[f"_{port.name}._{port.protocol.lower()}.{base}"] = [(port.port, base)]
            continue
        chosen = behind(svc, (p for p, _, _ in pods))
        a[base] = tuple(p.ip for p in chosen)
        for pod in chosen:
            hostname, subdomain = named[pod.key]
            label = hostname if hostname and subdomain == svc.key.name else _dashed(pod.ip)
            name = f"{label}.{base}"
            a[name] = (*a.get(name, ()), pod.ip)
            ptr.setdefault(pod.ip, name)
            for port in svc.ports:
                number = target(port, pod)
                if port.name and number is not None:
                    srv.setdefault(f"_{port.name}._{port.protocol.lower()}.{base}", []).append((number, name))
    parents = {".".join(name.split(".")[i:]) for name in (*a, *srv) for i in range(1, name.count(".") + 1)}
    networks_ = tuple(ipaddress.IPv4Network(n) for n in networks)
    return View(a, {k: tuple(v) for k, v in srv.items()}, ptr, frozenset({*parents, ZONE}), networks_)


def answer(query: dns.message.Message, known: View) -> dns.message.Message | Forward:
    """The answer to one query message."""
    if query.opcode() != dns.opcode.QUERY or len(query.question) != 1:
        return _empty(query, dns.rcode.NOTIMP if query.opcode() != dns.opcode.QUERY else dns.rcode.FORMERR)
    question = query.question[0]
    name = question.name.to_text(omit_final_dot=True).lower()
    ours = name == ZONE or name.endswith("." + ZONE) or name == "localhost"
    if question.rdclass != dns.rdataclass.IN:
        return _empty(query, dns.rcode.REFUSED)
    if name.endswith(".in-addr.arpa"):
        return _reverse(query, question, name, known)
    if not ours:
        if question.rdtype == dns.rdatatype.AAAA:
            return _empty(query, dns.rcode.NOERROR)
        return Forward()
    response = _empty(query, dns.rcode.NOERROR)
    response.flags |= dns.flags.AA
    if question.rdtype in (dns.rdatatype.A, dns.rdatatype.ANY) and known.a.get(name):
        response.answer.append(dns.rrset.from_text(question.name, TTL, "IN", "A", *known.a[name]))
    elif question.rdtype in (dns.rdatatype.SRV, dns.rdatatype.ANY) and known.srv.get(name):
        weight = max(1, 100 // len(known.srv[name]))
        response.answer.append(
            dns.rrset.from_text(
                question.name, TTL, "IN", "SRV", *(f"0 {weight} {port} {host}." for port, host in known.srv[name])
            )
        )
        for host in {host for _, host in known.srv[name]}:
            if known.a.get(host):
                response.additional.append(dns.rrset.from_text(host + ".", TTL, "IN", "A", *known.a[host]))
    elif question.rdtype == dns.rdatatype.SOA and name == ZONE:
        response.answer.append(_soa())
    else:
        exists = name in known.a or name in known.srv or name in known.parents
        response.set_rcode(dns.rcode.NOERROR if exists else dns.rcode.NXDOMAIN)
        response.authority.append(_soa())
    return response


def _reverse(
    query: dns.message.Message, question: dns.rrset.RRset, name: str, known: View
) -> dns.message.Message | Forward:
    labels = name.removesuffix(".in-addr.arpa").split(".")
    try:
        address = ipaddress.IPv4Address(".".join(reversed(labels)))
    except ValueError:
        return _empty(query, dns.rcode.NXDOMAIN)
    if not any(address in network for network in known.networks):
        return Forward()
    response = _empty(query, dns.rcode.NOERROR)
    response.flags |= dns.flags.AA
    target_name = known.ptr.get(str(address))
    if target_name is None:
        response.set_rcode(dns.rcode.NXDOMAIN)
    elif question.rdtype in (dns.rdatatype.PTR, dns.rdatatype.ANY):
        response.answer.append(dns.rrset.from_text(question.name, TTL, "IN", "PTR", target_name + "."))
    return response


def failure(query: dns.message.Message) -> dns.message.Message:
    """SERVFAIL: nobody upstream answered."""
    return _empty(query, dns.rcode.SERVFAIL)


def pack(response: dns.message.Message, limit: int) -> bytes:
    """Wire form within `limit` bytes; what does not fit is cut and the client told to use TCP (RFC 2181, 9)."""
    wire: bytes = response.to_wire(max_size=65535)
    if len(wire) <= limit:
        return wire
    short = dns.message.Message(response.id)
    short.flags = response.flags | dns.flags.TC
    short.question = response.question
    return bytes(short.to_wire())


def udp_limit(query: dns.message.Message) -> int:
    """How many bytes this client takes over UDP (EDNS, RFC 6891); never more than avoids fragments."""
    return min(max(512, query.payload), 1232) if query.edns >= 0 else 512


def _empty(query: dns.message.Message, code: dns.rcode.Rcode) -> dns.message.Message:
    response = dns.message.make_response(query, recursion_available=True)
    response.set_rcode(code)
    return response


def _soa() -> dns.rrset.RRset:
    return dns.rrset.from_text(
        ZONE + ".", TTL, "IN", "SOA", f"ns.dns.{ZONE}. hostmaster.{ZONE}. 1 7200 1800 86400 {TTL}"
    )


def _dashed(ip: str) -> str:
    return ip.replace(".", "-")
