"""Cluster DNS as a table of questions and answers."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.rcode
import pytest

from mantle.core.model import ContainerPort, Key, Owner, Pod, Service, ServicePort
from mantle.platform.machine import dns as cluster


def pod(name: str, ip: str, ready: bool = True) -> Pod:
    return Pod(
        Key("shop", name),
        name,
        ip,
        "default",
        Owner("Pod", name),
        {"app": "db"},
        {},
        (ContainerPort("sql", 5432),),
        "Running",
        ready,
    )


WEB = Service(Key("shop", "web"), "10.203.128.7", (ServicePort("http", 80, 8080),), {"app": "web"})
DB = Service(Key("shop", "db"), "None", (ServicePort("sql", 5432, "sql"),), {"app": "db"})
VIEW = cluster.view(
    {s.key: s for s in (WEB, DB)},
    [
        (pod("db-0", "10.203.0.3"), "db-0", "db"),
        (pod("db-1", "10.203.0.4"), "", ""),
        (pod("db-2", "10.203.0.5", ready=False), "", ""),
    ],
    ["10.203.0.0/16"],
)


@pytest.mark.parametrize(
    ("name", "kind", "code", "answers"),
    [
        ("web.shop.svc.cluster.local", "A", "NOERROR", ["10.203.128.7"]),
        ("WEB.Shop.svc.cluster.local", "A", "NOERROR", ["10.203.128.7"]),
        ("web.shop.svc.cluster.local", "AAAA", "NOERROR", []),
        ("db.shop.svc.cluster.local", "A", "NOERROR", ["10.203.0.3", "10.203.0.4"]),
        ("db-0.db.shop.svc.cluster.local", "A", "NOERROR", ["10.203.0.3"]),
        ("10-203-0-4.db.shop.svc.cluster.local", "A", "NOERROR", ["10.203.0.4"]),
        ("10-203-0-5.shop.pod.cluster.local", "A", "NOERROR", ["10.203.0.5"]),
        ("_http._tcp.web.shop.svc.cluster.local", "SRV", "NOERROR", ["0 100 80 web.shop.svc.cluster.local."]),
        (
            "_sql._tcp.db.shop.svc.cluster.local",
            "SRV",
            "NOERROR",
            ["0 50 5432 10-203-0-4.db.shop.svc.cluster.local.", "0 50 5432 db-0.db.shop.svc.cluster.local."],
        ),
        ("7.128.203.10.in-addr.arpa", "PTR", "NOERROR", ["web.shop.svc.cluster.local."]),
        ("3.0.203.10.in-addr.arpa", "PTR", "NOERROR", ["db-0.db.shop.svc.cluster.local."]),
        ("9.9.203.10.in-addr.arpa", "PTR", "NXDOMAIN", []),
        ("shop.svc.cluster.local", "A", "NOERROR", []),
        ("none.shop.svc.cluster.local", "A", "NXDOMAIN", []),
        ("example.com.shop.svc.cluster.local", "A", "NXDOMAIN", []),
        ("localhost", "A", "NOERROR", ["127.0.0.1"]),
        ("example.com", "AAAA", "NOERROR", []),
    ],
)
def test_answers(name: str, kind: str, code: str, answers: list[str]) -> None:
    reply = cluster.answer(dns.message.make_query(name, kind), VIEW)
    assert isinstance(reply, dns.message.Message)
    assert dns.rcode.to_text(reply.rcode()) == code
    assert sorted(r.to_text() for rrset in reply.answer for r in rrset) == answers
    assert dns.message.from_wire(cluster.pack(reply, 512)).id == reply.id


@pytest.mark.parametrize("name", ["example.com", "8.8.8.8.in-addr.arpa", "cluster.local.evil.org"])
def test_other_names_are_asked_upstream(name: str) -> None:
    kind = "PTR" if name.endswith("arpa") else "A"
    assert isinstance(cluster.answer(dns.message.make_query(name, kind), VIEW), cluster.Forward)


def test_an_answer_that_does_not_fit_says_so() -> None:
    many = cluster.View({"many.cluster.local": tuple(f"10.0.0.{i}" for i in range(200))})
    query = dns.message.make_query("many.cluster.local", "A")
    reply = cluster.answer(query, many)
    assert isinstance(reply, dns.message.Message)
    short = dns.message.from_wire(cluster.pack(reply, cluster.udp_limit(query)))
    assert short.flags & dns.flags.TC and not short.answer
    assert len(dns.message.from_wire(cluster.pack(reply, 65535)).answer[0]) == 200
