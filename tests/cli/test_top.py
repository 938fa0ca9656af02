"""`mantle top`: counting the requests of a tap, and what is printed of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
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


class Requests(BaseHTTPRequestHandler):
    """One request of a tap, then silence, as the daemon relays them."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in request(1, WEB, EMOJI):
            line = json.dumps(event).encode() + b"\n"
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.rfile.read()  # until the client goes

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def tapped(tmp_path: Path) -> Iterator[list[str]]:
    """The words that run `mantle` against a mesh whose tap shows one request."""
    (tmp_path / "default").mkdir()
    program = (
        "import pathlib\nfrom mantle.cli import machine_client, main\n"
        f"machine_client.state_root = lambda: pathlib.Path({str(tmp_path)!r})\nmain.main()"
    )
    with socketserver.ThreadingUnixStreamServer(str(tmp_path / "default" / "api.sock"), Requests) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield [sys.executable, "-c", program, "--mesh", "default"]
        server.shutdown()
        thread.join()


def test_on_a_terminal_a_table_that_renews_itself_until_ctrl_c(tapped: list[str]) -> None:
    reader, writer = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "20"}
    shown = b""
    with subprocess.Popen([*tapped, "top", "deploy"], stdout=writer, stderr=subprocess.PIPE, env=environment) as top:
        os.close(writer)
        while b"emoji-1" not in shown:
            shown += os.read(reader, 65536)
        top.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # EIO: nobody holds the other end any more
            while chunk := os.read(reader, 65536):
                shown += chunk
        assert top.stderr is not None
        assert (top.wait(20), top.stderr.read()) == (0, b"mesh default on this machine\n")
    os.close(reader)
    assert b"Success Rate" in shown
    assert shown.rstrip().endswith((b"\x1b[?1049l", b"\x1b[?25h")), "the terminal is as it was"


def test_elsewhere_lines_and_as_json_one_object_at_the_end(tapped: list[str]) -> None:
    for arguments, check in (
        ([], lambda text: text.splitlines()[-1].split()[:5] == ["web-1", "emoji-1", "GET", "/a", "1"]),
        (["-o", "json"], lambda text: json.loads(text)[0]["destination"] == "emoji-1"),
    ):
        words = [*tapped, "top", "deploy", "--for", "3s", *arguments]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert (ended.returncode, check(ended.stdout)) == (0, True), ended
