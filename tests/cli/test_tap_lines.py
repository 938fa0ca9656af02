"""Tap's lines are those of the pages that promise them, to the byte."""

from __future__ import annotations

from typing import Any

import pytest

from mantle.cli.tap import line_of


def end(text: str, **metadata: str) -> dict[str, Any]:
    ip, _, port = text.rpartition(":")
    return {"ip": ip, "port": int(port), "metadata": metadata}


def flow(direction: str, src: str, dst: str, tls: str) -> dict[str, Any]:
    inbound = direction == "INBOUND"
    return {
        "source": end(src, **({"tls": tls} if inbound else {})),
        "destination": end(dst, **({} if inbound else {"tls": tls})),
        "routeMeta": None,
        "proxyDirection": direction,
    }


def request(flow: dict[str, Any], base: int, stream: int, method: str, authority: str, path: str) -> dict[str, Any]:
    init = {"id": {"base": base, "stream": stream}, "method": method, "scheme": "", "authority": authority}
    return flow | {"requestInitEvent": init | {"path": path, "headers": None}}


def response(flow: dict[str, Any], stream: int, status: int, micros: int) -> dict[str, Any]:
    init = {"id": {"base": 0, "stream": stream}, "sinceRequestInit": {"nanos": micros * 1000 + 999}}
    return flow | {"responseInitEvent": init | {"httpStatus": status, "headers": None}}


def ended(flow: dict[str, Any], stream: int, micros: int, size: int, **how: int | None) -> dict[str, Any]:
    nanos = {"sinceRequestInit": {"nanos": 5}, "sinceResponseInit": {"nanos": micros * 1000}}
    record = {"id": {"base": 0, "stream": stream}, **nanos, "responseBytes": size, "trailers": None}
    return flow | {"responseEndEvent": record | {"grpcStatusCode": None} | how}


LIST_ALL = "/emojivoto.v1.EmojiService/ListAll"
WEB, EMOJI = "web-svc.emojivoto:80", "emoji-svc.emojivoto:8080"
OUT = flow("OUTBOUND", "10.1.17.29:33500", "10.1.17.28:80", "true")
IN = flow("INBOUND", "10.1.17.29:45960", "10.1.17.28:80", "true")
OUT_GRPC = flow("OUTBOUND", "10.1.17.28:59272", "10.1.17.27:8080", "true")
IN_GRPC = flow("INBOUND", "10.1.17.28:59344", "10.1.17.27:8080", "true")
PROBE = flow("INBOUND", "10.138.15.206:51558", "10.4.0.18:9998", "not_provided_by_remote")
QUERY = flow("INBOUND", "10.4.0.15:54740", "10.4.0.17:9090", "true")

SEED_LINES = [
    (
        request(OUT, 0, 1, "GET", WEB, "/api/list"),
        "req id=0:1 proxy=out src=10.1.17.29:33500 dst=10.1.17.28:80 tls=true :method=GET"
        " :authority=web-svc.emojivoto:80 :path=/api/list",
    ),
    (
        request(IN, 0, 1, "GET", WEB, "/api/list"),
        "req id=0:1 proxy=in  src=10.1.17.29:45960 dst=10.1.17.28:80 tls=true :method=GET"
        " :authority=web-svc.emojivoto:80 :path=/api/list",
    ),
    (
        request(OUT_GRPC, 0, 2, "POST", EMOJI, LIST_ALL),
        "req id=0:2 proxy=out src=10.1.17.28:59272 dst=10.1.17.27:8080 tls=true :method=POST"
        " :authority=emoji-svc.emojivoto:8080 :path=/emojivoto.v1.EmojiService/ListAll",
    ),
    (
        request(IN_GRPC, 0, 1, "POST", EMOJI, LIST_ALL),
        "req id=0:1 proxy=in  src=10.1.17.28:59344 dst=10.1.17.27:8080 tls=true :method=POST"
        " :authority=emoji-svc.emojivoto:8080 :path=/emojivoto.v1.EmojiService/ListAll",
    ),
    (
        request(PROBE, 0, 7, "GET", "10.4.0.18:9998", "/ready"),
        "req id=0:7 proxy=in  src=10.138.15.206:51558 dst=10.4.0.18:9998 tls=not_provided_by_remote :method=GET"
        " :authority=10.4.0.18:9998 :path=/ready",
    ),
    (
        response(PROBE, 7, 200, 482),
        "rsp id=0:7 proxy=in  src=10.138.15.206:51558 dst=10.4.0.18:9998 tls=not_provided_by_remote :status=200"
        " latency=482µs",
    ),
    (
        ended(PROBE, 7, 32, 3),
        "end id=0:7 proxy=in  src=10.138.15.206:51558 dst=10.4.0.18:9998 tls=not_provided_by_remote duration=32µs"
        " response-length=3B",
    ),
    (
        request(QUERY, 0, 11, "GET", "linkerd-prometheus.linkerd.svc.cluster.local:9090", "/api/v1/query"),
        "req id=0:11 proxy=in  src=10.4.0.15:54740 dst=10.4.0.17:9090 tls=true :method=GET"
        " :authority=linkerd-prometheus.linkerd.svc.cluster.local:9090 :path=/api/v1/query",
    ),
    (
        response(QUERY, 11, 200, 194886),
        "rsp id=0:11 proxy=in  src=10.4.0.15:54740 dst=10.4.0.17:9090 tls=true :status=200 latency=194886µs",
    ),
    (
        ended(QUERY, 11, 121, 375),
        "end id=0:11 proxy=in  src=10.4.0.15:54740 dst=10.4.0.17:9090 tls=true duration=121µs response-length=375B",
    ),
]


@pytest.mark.parametrize(("event", "line"), SEED_LINES, ids=[line[:30] for _, line in SEED_LINES])
def test_the_lines_of_the_pages(event: dict[str, Any], line: str) -> None:
    assert line_of(event) == line


ODD_LINES = [
    (
        ended(OUT_GRPC, 3, 7, 11, grpcStatusCode=0),
        "end id=0:3 proxy=out src=10.1.17.28:59272 dst=10.1.17.27:8080 tls=true grpc-status=OK duration=7µs"
        " response-length=11B",
    ),
    (
        ended(OUT_GRPC, 3, 7, 0, grpcStatusCode=2),
        "end id=0:3 proxy=out src=10.1.17.28:59272 dst=10.1.17.27:8080 tls=true grpc-status=Unknown duration=7µs"
        " response-length=0B",
    ),
    (
        ended(OUT_GRPC, 3, 7, 0, grpcStatusCode=99),
        "end id=0:3 proxy=out src=10.1.17.28:59272 dst=10.1.17.27:8080 tls=true grpc-status=Code(99) duration=7µs"
        " response-length=0B",
    ),
    (
        ended(OUT, 3, 7, 0, resetErrorCode=8),
        "end id=0:3 proxy=out src=10.1.17.29:33500 dst=10.1.17.28:80 tls=true reset-error=8 duration=7µs"
        " response-length=0B",
    ),
    (
        request(flow("UNKNOWN", "10.0.0.1:1", "::1:2", "true"), 3, 4, "GET", "a", "/"),
        "req id=3:4 proxy=??? src=10.0.0.1:1 dst=[::1]:2 tls= :method=GET :authority=a :path=/",
    ),
    (
        request(OUT, 0, 1, "GET", "a b", "/\x1b[2J\n\\x"),
        "req id=0:1 proxy=out src=10.1.17.29:33500 dst=10.1.17.28:80 tls=true :method=GET :authority=a\\x20b"
        " :path=/\\x1b[2J\\x0a\\\\x",
    ),
    (flow("INBOUND", "10.0.0.1:1", "10.0.0.2:2", "true"), "unknown proxy=in  src=10.0.0.1:1 dst=10.0.0.2:2 tls=true"),
]


@pytest.mark.parametrize(("event", "line"), ODD_LINES, ids=[line[:40] for _, line in ODD_LINES])
def test_other_lines(event: dict[str, Any], line: str) -> None:
    assert line_of(event) == line


def test_wide_appends_sorted_labels() -> None:
    event = request(OUT, 0, 1, "GET", WEB, "/")
    event["source"] = end("10.1.17.29:33500", pod="web-1", namespace="emojivoto")
    event["routeMeta"] = {"name": "http"}
    assert line_of(event, wide=True).endswith(
        " :path=/ src_namespace=emojivoto src_pod=web-1 dst_tls=true rt_name=http"
    )
