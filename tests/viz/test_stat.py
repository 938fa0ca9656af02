"""Stat: the right traffic in the right row, and numbers as Prometheus would compute them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mantle.core.model import Key, Owner, Pod, Service, Snapshot
from mantle.viz.mesh import subject_of
from mantle.viz.promtext import Series
from mantle.viz.source import Point, Traffic
from mantle.viz.stat import Peer, StatQuery, quantile, short_authority, stat_rows


def pod(workload: str, number: int = 1, *, meshed: bool = True, namespace: str = "emojivoto") -> Pod:
    labels = {"mantle.dev/control-plane-ns": "mantle"} if meshed else {}
    name = f"{workload}-{number}"
    return Pod(Key(namespace, name), name, f"10.203.0.{number}", workload, Owner("Deployment", workload), labels)


WEB, WEB2, EMOJI, OLD = pod("web"), pod("web", 2, meshed=False), pod("emoji"), pod("old", meshed=False)
BOT = pod("bot", namespace="load")
SERVICE = Service(Key("emojivoto", "web-svc"), "10.203.128.1")
WORLD = Snapshot(1, {p.key: p for p in (WEB, WEB2, EMOJI, OLD, BOT)}, {SERVICE.key: SERVICE})
IN = {"direction": "inbound"}
TO_WEB = {
    "direction": "outbound",
    "authority": "web-svc.emojivoto.svc.cluster.local:80",
    "dst_namespace": "emojivoto",
    "dst_deployment": "web",
    "dst_pod": "web-1",
    "dst_service": "web-svc",
}


def point(at: Pod, family: str, value: float, **labels: str) -> Point:
    return Point(subject_of(at), Series(family, tuple(sorted(labels.items()))), value)


def response(at: Pod, value: float, outcome: str = "success", tls: str = "true", **labels: str) -> Point:
    return point(at, "response_total", value, classification=outcome, tls=tls, **labels)


def ask(kind: str, *points: Point, namespace: str | None = "emojivoto", **query: Any) -> dict[str, dict[str, Any]]:
    gauges = tuple(p for p in points if p.series.family == "tcp_open_connections")
    traffic = Traffic(60.0, tuple(p for p in points if p not in gauges), gauges)
    return {row["name"]: row for row in stat_rows(traffic, WORLD, StatQuery(kind, namespace, **query))}


def test_a_deployment_counts_what_came_in_to_its_pods() -> None:
    rows = ask(
        "deployment",
        response(WEB, 45, **IN),
        response(WEB, 15, "failure", "no_identity", **IN),
        response(WEB, 1000, **TO_WEB),
    )
    assert list(rows) == ["emoji", "old", "web"]
    web = rows["web"]
    assert (web["success"], web["rps"], web["tls"], web["meshed"]) == (0.75, 1.0, 0.75, "1/2")
    assert (rows["old"]["meshed"], rows["old"]["rps"], rows["old"]["success"], rows["old"]["tls"]) == (
        "0/1", None, None, None
    )  # fmt: skip


def test_an_authority_counts_what_the_namespace_sent_there() -> None:
    other = {"direction": "outbound", "authority": "other"}
    points = (response(WEB, 30, **other), response(BOT, 12, **TO_WEB), response(EMOJI, 3, **TO_WEB))
    rows = ask("authority", *points)
    assert {name: row["rps"] for name, row in rows.items()} == {"other": 0.5, "web-svc.emojivoto:80": 0.05}
    assert rows["other"]["meshed"] is None
    assert ask("authority", *points, namespace="load")["web-svc.emojivoto:80"]["rps"] == 0.2


def test_a_service_counts_what_was_sent_to_it_from_anywhere() -> None:
    rows = ask("service", response(BOT, 60, **TO_WEB))
    assert (rows["web-svc"]["rps"], rows["web-svc"]["meshed"]) == (1.0, None)


def test_pods_namespaces_and_all_namespaces() -> None:
    points = (response(WEB, 60, **IN), response(BOT, 30, **IN))
    pods = ask("pod", *points)
    assert (pods["web-1"]["rps"], pods["web-1"]["status"], pods["web-2"]["rps"]) == (1.0, "Running", None)
    assert {name: row["rps"] for name, row in ask("namespace", *points, namespace=None).items()} == {
        "emojivoto": 1.0,
        "load": 0.5,
    }
    assert list(ask("namespace", *points)) == ["emojivoto"]
    assert ask("deployment", *points, namespace=None)["bot"]["namespace"] == "load"


def test_to_and_from_follow_one_edge() -> None:
    points = (response(BOT, 60, **TO_WEB), response(WEB, 600, **IN))
    to = ask("deployment", *points, namespace="load", to=Peer("service", "web-svc", "emojivoto"))
    assert {name: row["rps"] for name, row in to.items()} == {"bot": 1.0}
    sent = ask("deployment", *points, from_=Peer("deployment", "bot", "load"))
    assert {name: row["rps"] for name, row in sent.items()} == {"web": 1.0}
    assert ask("deployment", *points, from_=Peer("deployment", "nobody", "load")) == {}


def test_a_name_asks_for_one_row() -> None:
    assert list(ask("deployment", response(WEB, 60, **IN), name="web")) == ["web"]


def test_connections_and_bytes_are_those_of_the_accepting_side() -> None:
    accepted, dialled = {"direction": "inbound", "peer": "src"}, {"direction": "inbound", "peer": "dst"}
    web = ask(
        "deployment",
        point(WEB, "tcp_open_connections", 3, **accepted),
        point(WEB, "tcp_open_connections", 9, **dialled),
        point(WEB, "tcp_read_bytes_total", 120, **accepted),
        point(WEB, "tcp_write_bytes_total", 6, **accepted),
        point(WEB, "tcp_write_bytes_total", 999, **dialled),
    )["web"]
    assert (web["tcp_open_connections"], web["tcp_read_bytes_rate"], web["tcp_write_bytes_rate"]) == (3, 2.0, 0.1)
    assert web["rps"] is None


def test_latency_comes_from_the_buckets() -> None:
    buckets = {"1": 0, "2": 50, "10": 90, "+Inf": 100}
    points = [point(WEB, "response_latency_ms_bucket", v, le=le, **IN) for le, v in buckets.items()]
    web = ask("deployment", response(WEB, 100, **IN), *points)["web"]
    assert (web["latency_ms_p50"], web["latency_ms_p95"], web["latency_ms_p99"]) == (2, 10, 10)


@pytest.mark.parametrize(
    ("authority", "shown"),
    [
        ("web-svc.emojivoto.svc.cluster.local:80", "web-svc.emojivoto:80"),
        ("web-svc.emojivoto:80", "web-svc.emojivoto:80"),
        ("web-svc.emojivoto.svc.cluster.local", "web-svc.emojivoto"),
        ("0.web.emojivoto.svc.cluster.local:80", "0.web.emojivoto.svc.cluster.local:80"),
        ("example.com:443", "example.com:443"),
        ("other", "other"),
        ("", ""),
    ],
)
def test_authorities_are_short(authority: str, shown: str) -> None:
    assert short_authority(authority) == shown


@pytest.mark.parametrize(
    ("buckets", "q", "answer"),
    [
        ({1.0: 10, math.inf: 10}, 0.5, 1),  # 0.5 ms, rounded half up as the model system does
        ({1.0: 10, math.inf: 10}, 0.99, 1),
        ({10.0: 0, 20.0: 100, math.inf: 100}, 0.25, 13),  # 12.5
        ({10.0: 0, 20.0: 100, math.inf: 100}, 0.95, 20),  # 19.5
        ({10.0: 1, math.inf: 100}, 0.95, 10),  # above every bound
        ({10.0: 5, 20.0: 4, math.inf: 5}, 0.99, 10),  # a scrape caught between two buckets
        ({math.inf: 3}, 0.5, 0),
        ({1.0: 0, math.inf: 0}, 0.5, None),
        ({1.0: 5}, 0.5, None),
        ({}, 0.5, None),
    ],
)
def test_quantile(buckets: dict[float, float], q: float, answer: int | None) -> None:
    assert quantile(buckets, q) == answer


@pytest.mark.parametrize("le", ["abc", "nan", "-1", "1e", "\u0663x"])
def test_a_bucket_without_a_bound_is_left_out(le: str) -> None:
    buckets = [("10", 5), ("+Inf", 10)]
    points = [point(WEB, "response_latency_ms_bucket", value, le=bound, **IN) for bound, value in [*buckets, (le, 99)]]
    row = ask("deployment", response(WEB, 10, **IN), *points)["web"]
    assert row["latency_ms_p50"] == 10
