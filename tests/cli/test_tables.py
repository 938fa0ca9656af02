"""The tables of `edges` and `stat` are those of the pages that promise them, to the byte."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mantle.cli import edges, stat
from mantle.cli.output import json_text

DOMAIN = ".serviceaccount.identity.linkerd.cluster.local"


def edge(src: str, dst: str, **changes: Any) -> dict[str, Any]:
    return {
        "src": src,
        "src_namespace": "linkerd",
        "dst": dst,
        "dst_namespace": "linkerd",
        "client_id": f"{src}.linkerd{DOMAIN}",
        "server_id": f"{dst}.linkerd{DOMAIN}",
        "no_tls_reason": "",
        "protocol": "http",
        "counts": {"secured": 3},
        "open": 1,
    } | changes


SEED_EDGES = """\
SRC                  DST                  CLIENT                       SERVER                       MSG
linkerd-controller   linkerd-prometheus   linkerd-controller.linkerd   linkerd-prometheus.linkerd   -
linkerd-web          linkerd-controller   linkerd-web.linkerd          linkerd-controller.linkerd   -
"""

SEED_STAT = """\
NAME                        MESHED   SUCCESS      RPS   LATENCY_P50   LATENCY_P95   LATENCY_P99    TLS
emoji-svc.emojivoto:8080         -   100.00%   0.6rps           1ms           1ms           1ms   100%
emoji-svc.emojivoto:8888         -   100.00%   0.8rps           1ms           1ms           9ms   100%
voting-svc.emojivoto:8080        -    45.45%   0.6rps           4ms          10ms          18ms   100%
web-svc.emojivoto:80             -     0.00%   0.6rps           8ms          33ms          39ms   100%
"""


def test_edges_as_the_page_shows_them() -> None:
    rows = [edge("linkerd-controller", "linkerd-prometheus"), edge("linkerd-web", "linkerd-controller")]
    assert edges.table(rows) == SEED_EDGES


@pytest.mark.parametrize(
    ("counts", "reasons", "message"),
    [
        ({"secured": 3}, "", "-"),
        ({"not_provided_by_remote": 2}, "not_provided_by_remote", "not_provided_by_remote"),
        (
            {"not_provided_by_remote": 2, "secured": 5},
            "not_provided_by_remote",
            "not_provided_by_remote (2), secured (5)",
        ),
        ({"a": 1, "b": 2}, "a,b", "a (1), b (2)"),
        ({}, "unknown", "unknown"),
    ],
)
def test_message_says_why_not_and_how_often(counts: dict[str, int], reasons: str, message: str) -> None:
    assert edges.message(edge("a", "b", counts=counts, no_tls_reason=reasons)) == message


def test_edges_without_identities_and_with_namespaces() -> None:
    row = edge("10.9.9.9", "web", src_namespace="", client_id="", server_id="", no_tls_reason="not_provided_by_remote")
    row["counts"] = {"not_provided_by_remote": 4}
    assert edges.table([row], namespaces=True) == (
        "SRC        DST   SRC_NS   DST_NS    CLIENT   SERVER   MSG\n"
        "10.9.9.9   web   -        linkerd   -        -        not_provided_by_remote\n"
    )
    assert edges.table([row], wide=True) == (
        "SRC        DST   SRC_NS   DST_NS    CLIENT   SERVER   PROTOCOL   OPEN   SECURED   MSG\n"
        "10.9.9.9   web   -        linkerd   -        -        http       1      0/4       not_provided_by_remote\n"
    )
    assert edges.table([]) == "No edges found.\n"


def stat_row(name: str, success: float, rps: float, *latency: int, **changes: Any) -> dict[str, Any]:
    return {
        "namespace": "emojivoto",
        "kind": "authority",
        "name": name,
        "meshed": None,
        "status": None,
        "success": success,
        "rps": rps,
        **{f"latency_ms_p{p}": value for p, value in zip((50, 95, 99), latency, strict=True)},
        "tcp_open_connections": None,
        "tcp_read_bytes_rate": None,
        "tcp_write_bytes_rate": None,
        "tls": 1.0,
    } | changes


def test_stat_as_the_page_shows_it() -> None:
    rows = [
        stat_row("emoji-svc.emojivoto:8080", 1.0, 0.6, 1, 1, 1),
        stat_row("emoji-svc.emojivoto:8888", 1.0, 0.8, 1, 1, 9),
        stat_row("voting-svc.emojivoto:8080", 5 / 11, 0.6, 4, 10, 18),
        stat_row("web-svc.emojivoto:80", 0.0, 0.6, 8, 33, 39),
    ]
    assert stat.table(rows) == SEED_STAT


def test_stat_of_pods_without_traffic() -> None:
    empty: dict[str, Any] = dict.fromkeys(("success", "rps", "tls", *(f"latency_ms_p{p}" for p in (50, 95, 99))))
    row = stat_row("web-1", 1.0, 1.0, 1, 1, 1, kind="pod", meshed="1/1", status="Running") | empty
    assert stat.table([row], namespaces=True) == (
        "NAMESPACE   NAME     STATUS   MESHED   SUCCESS   RPS   LATENCY_P50   LATENCY_P95   LATENCY_P99   TLS\n"
        "emojivoto   web-1   Running      1/1         -     -             -             -             -     -\n"
    )
    assert stat.table([]) == "No traffic found.\n"


@pytest.mark.parametrize(
    ("share", "shown"),
    [(1.0, "100%"), (0.9999, "99%"), (0.5, "50%"), (0.0001, "1%"), (0.0, "0%"), (None, "-")],
)
def test_a_share_short_of_all_is_never_shown_as_all(share: float | None, shown: str) -> None:
    assert stat.table([stat_row("a", 1.0, 1.0, 1, 1, 1, tls=share)]).split()[-1] == shown


def test_json_moves_no_cursor_and_means_the_same():
    """C1 controls (U+009B is a terminal's CSI), DEL, bidirectional marks: JSON itself lets them stand."""
    value = {"name": "\x1b[2J\x9b2J\x7f\u202e\U000e0001\ud800", "plain": 'köln "q" \\ 東京\n'}
    text = json_text(value)
    assert all(c == "\n" or c.isprintable() for c in text), text
    assert "köln" in text and "東京" in text
    assert json.loads(text) == value
