"""Edges: what two witnesses saw, joined; every unencrypted edge shows, and nothing is called secured without proof."""

from __future__ import annotations

from typing import Any

import pytest

from mantle.core.model import Key, Owner, Pod, Service, Snapshot
from mantle.viz.edges import Addresses, EdgeQuery, edge_rows
from mantle.viz.mesh import subject_of
from mantle.viz.promtext import Series
from mantle.viz.source import Point, Traffic

ID = ".serviceaccount.identity.mantle.cluster.local"
ROUTER = "10.203.0.1"


def pod(name: str, ip: str, *, kind: str = "Deployment", meshed: bool = True, namespace: str = "emojivoto") -> Pod:
    labels = {"mantle.dev/control-plane-ns": "mantle"} if meshed else {}
    owner = Owner(kind, name if kind != "Pod" else f"{name}-1")
    return Pod(Key(namespace, f"{name}-1"), f"uid-{name}", ip, name, owner, labels, ready=True, proxy_started=meshed)


WEB, EMOJI = pod("web", "10.203.0.10"), pod("emoji", "10.203.0.11")
BOT = pod("bot", "10.203.0.12", meshed=False)
CURL = pod("curl", "10.203.0.13", kind="Pod", meshed=False, namespace="default")
PODS = (WEB, EMOJI, BOT, CURL)
DATABASE = Service(Key("data", "db"), "10.203.128.9")
ADDRESSES = Addresses.of(Snapshot(1, {p.key: p for p in PODS}, {DATABASE.key: DATABASE}), router=(ROUTER,))

SECURE = {"tls": "true", "server_id": f"emoji.emojivoto{ID}"}
TO_EMOJI = {"direction": "outbound", "dst_namespace": "emojivoto", "dst_deployment": "emoji", "dst_pod": "emoji-1"}


def point(at: Pod, family: str, value: float, **labels: str) -> Point:
    return Point(subject_of(at), Series(family, tuple(sorted(labels.items()))), value)


def request(at: Pod, value: float, **labels: str) -> Point:
    return point(at, "request_total", value, **labels)


def opened(at: Pod, value: float, **labels: str) -> Point:
    return point(at, "tcp_open_total", value, peer="dst", **labels)


def is_open(at: Pod, value: float, **labels: str) -> Point:
    return point(at, "tcp_open_connections", value, peer="dst", **labels)


def client(at: Pod, value: float, ip: str, **labels: str) -> Point:
    tls = {"tls": "true"} if "client_id" in labels else {"tls": "no_identity"}
    return point(at, "mantle_edge_clients_total", value, client_ip=ip, port="8080", **tls, **labels)


def rows(*points: Point, namespace: str | None = "emojivoto", kind: str = "deployment") -> list[dict[str, Any]]:
    gauges = tuple(p for p in points if p.series.family == "tcp_open_connections")
    traffic = Traffic(60.0, tuple(p for p in points if p not in gauges), gauges)
    return edge_rows(traffic, ADDRESSES, EdgeQuery(kind, namespace))


def seen(*points: Point, **query: Any) -> list[tuple[str, str, dict[str, int]]]:
    return [(row["src"], row["dst"], row["counts"]) for row in rows(*points, **query)]


def test_a_secured_edge_has_both_identities() -> None:
    assert rows(request(WEB, 7, **TO_EMOJI, **SECURE), is_open(WEB, 1, **TO_EMOJI, **SECURE)) == [
        {
            "src": "web",
            "src_namespace": "emojivoto",
            "dst": "emoji",
            "dst_namespace": "emojivoto",
            "client_id": f"web.emojivoto{ID}",
            "server_id": f"emoji.emojivoto{ID}",
            "no_tls_reason": "",
            "protocol": "http",
            "counts": {"secured": 7},
            "open": 1,
            "control": False,
        }
    ]


def test_what_both_sides_saw_counts_once() -> None:
    both = (request(WEB, 7, **TO_EMOJI, **SECURE), client(EMOJI, 2, WEB.ip, client_id=f"web.emojivoto{ID}"))
    assert seen(*both) == [("web", "emoji", {"secured": 7})]
    plain = {"tls": "no_identity", "no_tls_reason": "not_provided_by_service_discovery"}
    both = (opened(WEB, 3, **TO_EMOJI, **plain), client(EMOJI, 3, WEB.ip, no_tls_reason="not_provided_by_remote"))
    assert seen(*both) == [("web", "emoji", {"not_provided_by_service_discovery": 3})]


def test_plaintext_past_a_client_s_own_proxy_is_not_hidden_by_its_encrypted_traffic() -> None:
    both = (request(WEB, 7, **TO_EMOJI, **SECURE), client(EMOJI, 2, WEB.ip, no_tls_reason="not_provided_by_remote"))
    (row,) = rows(*both)
    assert row["counts"] == {"not_provided_by_remote": 2, "secured": 7}
    assert row["no_tls_reason"] == "not_provided_by_remote"


@pytest.mark.parametrize(
    ("ip", "name", "namespace"),
    [
        (BOT.ip, "bot", "emojivoto"),
        (CURL.ip, "pod/curl-1", "default"),
        (ROUTER, "probe", ""),
        ("192.0.2.7", "192.0.2.7", ""),
    ],
)
def test_clients_outside_the_mesh_are_named_as_well_as_can_be(ip: str, name: str, namespace: str) -> None:
    (row,) = rows(client(EMOJI, 4, ip, no_tls_reason="not_provided_by_remote"))
    assert (row["src"], row["src_namespace"], row["dst"]) == (name, namespace, "emoji")
    assert (row["client_id"], row["server_id"]) == ("", "")
    assert row["counts"] == {"not_provided_by_remote": 4}


@pytest.mark.parametrize(
    ("labels", "name", "namespace"),
    [
        ({"target_ip": BOT.ip}, "bot", "emojivoto"),
        ({"target_addr": f"{DATABASE.cluster_ip}:5432"}, "service/db", "data"),
        ({"target_addr": "192.0.2.7:443"}, "192.0.2.7", ""),
        ({"target_addr": "[2001:db8::1]:443"}, "2001:db8::1", ""),
        ({}, "unknown", ""),
        ({"dst_namespace": "other", "dst_job": "migrate"}, "job/migrate", "other"),
    ],
)
def test_servers_are_named_by_their_labels_else_their_address(
    labels: dict[str, str], name: str, namespace: str
) -> None:
    plain = {"tls": "no_identity", "no_tls_reason": "not_provided_by_service_discovery"}
    (row,) = rows(opened(WEB, 1, direction="outbound", **plain, **labels))
    assert (row["dst"], row["dst_namespace"], row["protocol"]) == (name, namespace, "tcp")


@pytest.mark.parametrize(
    ("labels", "state"),
    [
        ({"tls": "true", "server_id": "x"}, "secured"),
        ({"tls": "true"}, "unknown"),
        ({"tls": "true", "server_id": ""}, "unknown"),
        ({"tls": "no_identity", "no_tls_reason": "no_tls_from_remote"}, "not_provided_by_remote"),
        ({"tls": "no_identity", "no_tls_reason": "port_skipped"}, "port_skipped"),
        ({"tls": "no_identity", "no_tls_reason": "a reason of tomorrow"}, "a reason of tomorrow"),
        ({"tls": "no_identity"}, "unknown"),
        ({"tls": "opaque", "sni": "example.com"}, "passthru"),
        ({"tls": "disabled"}, "disabled"),
        ({"tls": "maybe"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_only_proof_is_called_secured(labels: dict[str, str], state: str) -> None:
    (row,) = rows(opened(WEB, 1, **TO_EMOJI, **labels))
    assert row["counts"] == {state: 1}
    assert row["no_tls_reason"] == ("" if state == "secured" else state)


def test_mesh_tls_without_a_client_certificate_is_not_secured() -> None:
    (row,) = rows(client(EMOJI, 2, CURL.ip, client_id=""))
    assert (row["counts"], row["no_tls_reason"]) == ({"no_client_identity": 2}, "no_client_identity")


def test_a_connection_opened_before_the_window_shows_while_it_is_open() -> None:
    assert seen(is_open(WEB, 2, **TO_EMOJI, **SECURE)) == [("web", "emoji", {"secured": 2})]
    assert seen(is_open(WEB, 0, **TO_EMOJI, **SECURE)) == []


def test_an_edge_belongs_to_both_its_namespaces() -> None:
    abroad = opened(WEB, 1, direction="outbound", dst_namespace="data", dst_deployment="db", tls="true", server_id="x")
    assert seen(abroad, namespace="data") == seen(abroad, namespace="emojivoto") == [("web", "db", {"secured": 1})]
    assert seen(abroad, namespace="default") == []
    assert len(seen(abroad, namespace=None)) == 1


def test_kinds_name_the_same_edge_differently() -> None:
    traffic = request(WEB, 7, **TO_EMOJI, **SECURE)
    assert seen(traffic, kind="pod") == [("web-1", "emoji-1", {"secured": 7})]
    assert seen(traffic, kind="namespace") == [("emojivoto", "emojivoto", {"secured": 7})]


IDENTITY = pod("mantle-identity", "10.203.0.20", namespace="mantle")


def test_a_proxy_s_own_calls_to_the_control_plane_show_there_only() -> None:
    calls = (client(IDENTITY, 1, WEB.ip, client_id=""), client(IDENTITY, 5, WEB.ip, client_id=f"web.emojivoto{ID}"))
    assert seen(*calls) == []
    (row,) = rows(*calls, namespace="mantle")
    assert (row["control"], row["counts"]) == (True, {"no_client_identity": 1, "secured": 5})
    assert rows(*calls, namespace=None) == [row]
    assert seen(client(IDENTITY, 1, BOT.ip, no_tls_reason="not_provided_by_remote")) == [
        ("bot", "mantle-identity", {"not_provided_by_remote": 1})
    ]
    plain = client(IDENTITY, 1, WEB.ip, no_tls_reason="not_provided_by_remote")
    assert seen(*calls, plain) == [
        ("web", "mantle-identity", {"no_client_identity": 1, "not_provided_by_remote": 1, "secured": 5})
    ]


def test_a_proxy_s_own_calls_do_not_blemish_its_workload_s() -> None:
    scrape = {"direction": "outbound", "dst_namespace": "mantle", "dst_deployment": "mantle-identity"}
    both = (request(WEB, 3, **scrape, tls="true", server_id="x"), client(IDENTITY, 1, WEB.ip, client_id=""))
    assert seen(*both) == [("web", "mantle-identity", {"secured": 3})]


def test_a_pod_that_is_gone_is_still_named_until_another_has_its_address() -> None:
    later = Addresses.of(Snapshot(2), before=ADDRESSES)
    assert later.pods[CURL.ip] == CURL
    heir = pod("heir", CURL.ip)
    assert Addresses.of(Snapshot(3, {heir.key: heir}), before=later).pods[CURL.ip] == heir


def test_loopback_clients_and_inbound_metrics_are_no_edges() -> None:
    inbound = request(EMOJI, 5, direction="inbound", tls="true", client_id="x")
    assert seen(inbound, client(EMOJI, 1, "127.0.0.1", no_tls_reason="loopback")) == []
