"""`mantle top`: counting the requests of a tap, and what is printed of them."""

from __future__ import annotations

from typing import Any

import pytest

from mantle.cli.top_table import HEADER, Top, duration

WEB, EMOJI, OTHER = ("10.0.0.1", "web-1"), ("10.0.0.2", "emoji-1"), ("93.184.216.34", "")


def request(
    stream: int,
    source: tuple[str, str],
    destination: tuple[str, str],
    *,
    outbound: bool = False,
    path: str = "/a",
    status: int = 200,
    nanos: int = 2_000_000,
    end: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The three events of one request."""
    ends = {
        side: {"ip": ip, "port": 80, "metadata": {"pod": pod} if pod else {}}
        for side, (ip, pod) in (("source", source), ("destination", destination))
    }
    frame: dict[str, Any] = {**ends, "proxyDirection": "OUTBOUND" if outbound else "INBOUND"}
    number = {"id": {"base": 1, "stream": stream}}
    return [
        {**frame, "requestInitEvent": {**number, "method": "GET", "path": path}},
        {**frame, "responseInitEvent": {**number, "httpStatus": status}},
        {**frame, "responseEndEvent": {**number, "sinceRequestInit": {"nanos": nanos}, **(end or {})}},
    ]


def played(*requests: list[dict[str, Any]], hide_sources: bool = False) -> Top:
    top = Top(hide_sources)
    for events in requests:
        for event in events:
            top.add(event)
    return top


def test_requests_are_counted_by_who_asks_whom_for_what() -> None:
    top = played(
        request(1, WEB, EMOJI, nanos=900_000),
        request(2, WEB, EMOJI, nanos=3_000_000),
        request(3, WEB, EMOJI, status=500, nanos=1_000_000),
        request(4, WEB, EMOJI, path="/b", nanos=1_500_000_000),
    )
    assert top.header() == list(HEADER)
    assert top.table() == [
        ["web-1", "emoji-1", "GET", "/a", "3", "900µs", "3ms", "1ms", "66.67%"],
        ["web-1", "emoji-1", "GET", "/b", "1", "1.5s", "1.5s", "1.5s", "100.00%"],
    ]


def test_a_request_that_both_ends_report_is_counted_once() -> None:
    seen_by_client = request(1, WEB, EMOJI, outbound=True, nanos=3_000_000)
    seen_by_server = request(7, WEB, EMOJI, nanos=2_000_000)
    abroad = request(2, WEB, OTHER, outbound=True)
    for order in ((seen_by_client, seen_by_server, abroad), (abroad, seen_by_server, seen_by_client)):
        assert [row[:5] for row in played(*order).table()] == [
            ["web-1", "93.184.216.34", "GET", "/a", "1"],
            ["web-1", "emoji-1", "GET", "/a", "1"],
        ]


@pytest.mark.parametrize(
    ("status", "end", "rate"),
    [
        (404, {}, "100.00%"),
        (503, {}, "0.00%"),
        (200, {"grpcStatusCode": 0}, "100.00%"),
        (200, {"grpcStatusCode": 5}, "100.00%"),
        (200, {"grpcStatusCode": 13}, "0.00%"),
        (200, {"resetErrorCode": 8}, "0.00%"),
        (200, {"grpcStatusCode": None}, "100.00%"),
    ],
)
def test_what_success_is(status: int, end: dict[str, Any], rate: str) -> None:
    assert played(request(1, WEB, EMOJI, status=status, end=end)).table()[0][-1] == rate


def test_short_of_all_is_never_100_percent() -> None:
    requests = [request(number, WEB, EMOJI, status=500 if number == 0 else 200) for number in range(30_000)]
    assert played(*requests).table()[0][-1] == "99.99%"


def test_without_sources() -> None:
    top = played(request(1, WEB, EMOJI), request(2, OTHER, EMOJI), hide_sources=True)
    assert top.header()[0] == "Destination"
    assert [row[:4] for row in top.table()] == [["emoji-1", "GET", "/a", "2"]]


def test_requests_without_an_end_are_not_kept_for_ever() -> None:
    top = played(*(request(number, WEB, EMOJI)[:1] for number in range(10_100)))
    assert (len(top._pending), top.table()) == (10_000, [])


def test_durations() -> None:
    assert [duration(n) for n in (0, 482_300, 1_000_000, 999_400_000, 2_340_000_000)] == [
        "0µs", "482µs", "1ms", "999ms", "2.3s"
    ]  # fmt: skip
