"""The commands against a daemon of our own on a real Unix socket: what they ask, what they print, how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from click.testing import CliRunner, Result

from mantle.cli import machine_client
from mantle.cli.main import cli

ANSWERS: dict[str, Any] = {
    "/v1/status": {"mesh": "default", "version": "0.1.0", "pods": []},
    "/v1/viz/edges": {"edges": []},
    "/v1/viz/stat": {"rows": []},
}
END = {"ip": "10.0.0.1", "port": 1, "metadata": {"tls": "true"}}
EVENT = {
    "source": END,
    "destination": END,
    "routeMeta": None,
    "proxyDirection": "INBOUND",
    "requestInitEvent": {
        "id": {"base": 0, "stream": 1},
        "method": "GET",
        "authority": "a",
        "path": "/",
        "headers": None,
    },
}


class Daemon(socketserver.ThreadingUnixStreamServer):
    """Answers from `ANSWERS`; remembers (method, path, query or body)."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        super().__init__(str(path), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Daemon

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.asked.append(("GET", url.path, dict(parse_qsl(url.query))))
        self.answer(200 if url.path in ANSWERS else 404, json.dumps(ANSWERS.get(url.path, ERROR)).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(("POST", self.path, body))
        if body["target"]["name"] == "nothing":
            self.answer(404, json.dumps(ERROR).encode())
        else:
            notice = {"notice": {"pod": "emojivoto/web-1", "message": "gone"}}
            self.answer(200, b"".join(json.dumps(line).encode() + b"\n" for line in (EVENT, notice, EVENT)))

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


ERROR = {"errors": [{"message": "no such thing", "fix": "ask for another", "file": "a.yml", "line": 2}]}


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.setattr(machine_client, "state_root", lambda: tmp_path)
    (tmp_path / "default").mkdir()
    with Daemon(tmp_path / "default" / "api.sock") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def mantle(line: str) -> Result:
    return CliRunner().invoke(cli, line.split(), prog_name="mantle")


@pytest.mark.parametrize("line", ["-n mantle edges deployment", "edges deployment -n mantle", "edges -n mantle deploy"])
def test_edges_asks_for_the_namespace_wherever_it_stood(line: str, daemon: Daemon) -> None:
    ended = mantle(line)
    assert (ended.exit_code, ended.stdout) == (0, "No edges found.\n")
    query = {"resource": "deployment", "window": "300", "namespace": "mantle"}
    assert daemon.asked == [("GET", "/v1/viz/edges", query)]


def test_stat_asks_for_what_it_was_asked(daemon: Daemon) -> None:
    ended = mantle("stat deploy/web -A -t 2m --to svc/emoji-svc --to-namespace other")
    assert (ended.exit_code, ended.stdout) == (0, "No traffic found.\n")
    assert daemon.asked[0][2] == {
        "resource": "deployment",
        "name": "web",
        "window": "120",
        "all": "1",
        "to": "service/emoji-svc",
        "to_namespace": "other",
    }
    assert mantle("stat au -o json").stdout == "[]\n"


def test_tap_prints_each_event_on_its_line_and_notices_aside(daemon: Daemon) -> None:
    ended = mantle("-n emojivoto tap deploy --path /api --to ns/other --max-rps 5")
    line = "req id=0:1 proxy=in  src=10.0.0.1:1 dst=10.0.0.1:1 tls=true :method=GET :authority=a :path=/\n"
    assert (ended.exit_code, ended.stdout) == (0, line * 2)
    assert ended.stderr == "mesh default on this machine\nwarning: emojivoto/web-1: gone\n"
    assert daemon.asked[0][2] == {
        "target": {"kind": "deployment", "name": "", "namespace": "emojivoto"},
        "to": {"kind": "namespace", "name": "other", "namespace": "emojivoto"},
        "method": "",
        "path": "/api",
        "authority": "",
        "scheme": "",
        "max_rps": 5.0,
        "headers": False,
    }


def test_tap_as_json_is_one_object_a_line_with_headers(daemon: Daemon) -> None:
    lines = mantle("tap po/web-1 -o json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [EVENT, EVENT]
    assert daemon.asked[0][2]["headers"] is True


def test_what_the_daemon_refuses_is_one_message_with_its_fix(daemon: Daemon) -> None:
    ended = mantle("tap deploy/nothing")
    assert ended.exit_code == 1
    assert ended.stderr == "mesh default on this machine\nerror: a.yml:2: no such thing\n  fix: ask for another\n"


def test_version_names_the_mesh(daemon: Daemon) -> None:
    assert "Mesh version: 0.1.0 (mesh default)\n" in mantle("version").stdout
    assert json.loads(mantle("version -o json").stdout)["mesh"] == {
        "name": "default",
        "version": "0.1.0",
        "platform": "machine",
    }


def test_which_mesh(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "dead").mkdir()
    with Daemon(tmp_path / "two" / "api.sock"):
        ended = mantle("edges deploy")
    assert ended.stderr == "error: several meshes are running: default, two\n  fix: say which one with --mesh NAME\n"
    ended = mantle("edges deploy --mesh dead")
    assert ended.stderr.endswith("error: mesh dead is not running\n  fix: running: default\n")
    assert ended.exit_code == 1


def test_no_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_client, "state_root", lambda: tmp_path / "nothing")
    assert mantle("ps").stderr == "error: no mesh is running\n  fix: start one with `mantle demo` or `mantle up FILE`\n"


class Endless(Handler):
    """One event, then silence, in chunks as the daemon relays them."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        line = json.dumps(EVENT).encode() + b"\n"
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.rfile.read()  # until the client goes


def test_ctrl_c_ends_a_tap_without_a_word(tmp_path: Path) -> None:
    program = (
        "import pathlib\nfrom mantle.cli import machine_client, main\n"
        f"machine_client.state_root = lambda: pathlib.Path({str(tmp_path)!r})\nmain.main()"
    )
    (tmp_path / "default").mkdir()
    with socketserver.ThreadingUnixStreamServer(str(tmp_path / "default" / "api.sock"), Endless) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        words = [sys.executable, "-c", program, "tap", "deploy", "--mesh", "default"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tap:
            assert tap.stdout is not None
            assert tap.stdout.readline().startswith("req id=0:1 proxy=in  src=")  # though the stream has not ended
            tap.send_signal(signal.SIGINT)
            rest, errors = tap.communicate(timeout=60)
        server.shutdown()
        thread.join()
    assert (tap.returncode, rest, errors) == (0, "", "mesh default on this machine\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen as somebody else")
def test_a_daemon_of_somebody_else_is_not_talked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the state of meshes lies in a directory that everybody may write to, somebody may be there first."""
    monkeypatch.setattr(machine_client, "state_root", lambda: tmp_path)
    (tmp_path / "default").mkdir()
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(tmp_path / "default" / "api.sock"))
        os.seteuid(12345)  # who listens is who asks the kernel to
        try:
            theirs.listen()
        finally:
            os.seteuid(0)
        assert machine_client.running_meshes(tmp_path) == []
        ended = mantle("--mesh default edges deployment")
        assert (ended.exit_code, ended.stdout) == (1, "")
        assert "mesh default belongs to another user" in ended.stderr
        theirs.settimeout(10)
        heard = []
        for _ in range(2):  # the look for meshes, and the command
            connection, _ = theirs.accept()
            with connection:
                heard.append(connection.recv(100))
        assert heard == [b"", b""], "not a word"
