"""Questions to an API server share a connection, whatever becomes of it; what changes something never does."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from certificates import Certificate

from mantle.cli import kube_client
from mantle.cli.kube_client import REVIEWS, KubeClient, Refused
from mantle.cli.kubeconfig import Access
from mantle.cli.output import Failure


class ApiServer(ThreadingHTTPServer):
    """HTTP/1.1 over TLS; notes for each connection what was asked on it."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        self.connections: list[list[str]] = []
        self.ends_after_answer = False
        """Without saying so in the answer, as a server does that is restarted or finds a connection idle."""
        self.answers = True
        self.ca = Certificate("a cluster's CA")
        Certificate("kube.example", self.ca).write(directory / "server.pem")
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "server.pem")
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def client(self) -> KubeClient:
        return KubeClient(Access("dev", f"https://127.0.0.1:{self.server_port}", "default", ca=self.ca.pem))


class Handler(BaseHTTPRequestHandler):
    server: ApiServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.asked: list[str] = []
        self.server.connections.append(self.asked)

    def serve(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        if not self.server.answers:
            self.close_connection = True
            return
        missing = self.path.startswith("/missing")
        data = json.dumps({"message": "no such thing"} if missing else {"path": self.path}).encode()
        if self.path == "/deep":
            data = b'{"kind": "Pod", "managedFields": ' + b'{"f:a":' * 9000 + b"{}" + b"}" * 9000 + b"}"
        self.send_response(404 if missing else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection |= self.server.ends_after_answer

    do_GET = do_POST = do_PATCH = do_DELETE = serve

    def finish(self) -> None:
        with suppress(OSError):  # the client may be gone
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tmp_path) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_questions_share_a_connection_whatever_is_answered(server: ApiServer) -> None:
    client = server.client()
    assert client.get("/a", {"limit": 1}) == {"path": "/a?limit=1"}
    with pytest.raises(Refused, match="no such thing"):
        client.get("/missing")
    client.request("POST", f"{REVIEWS}v1/selfsubjectaccessreviews", None, {})
    assert client.text("/b") == '{"path": "/b"}'
    review = f"POST {REVIEWS}v1/selfsubjectaccessreviews"
    assert server.connections == [["GET /a?limit=1", "GET /missing", review, "GET /b"]]


@pytest.mark.parametrize("method", ["POST", "PATCH", "DELETE"])
def test_what_changes_something_has_a_connection_of_its_own(method: str, server: ApiServer) -> None:
    client = server.client()
    client.get("/a")
    client.request(method, "/b", None, {})
    client.get("/c")
    assert server.connections == [["GET /a", "GET /c"], [f"{method} /b"]]


def test_a_question_on_a_connection_that_its_server_has_ended_is_asked_again(server: ApiServer) -> None:
    client = server.client()
    server.ends_after_answer = True
    for path in ("/a", "/b", "/c"):
        assert client.get(path) == {"path": path}
    # A request may have come just before the end: then it was read, and not answered.
    assert [asked[0] for asked in server.connections] == ["GET /a", "GET /b", "GET /c"]


def test_a_question_is_asked_again_only_once(server: ApiServer) -> None:
    client = server.client()
    client.get("/a")
    server.answers = False
    with pytest.raises(Failure, match="does not answer"):
        client.get("/b")
    assert server.connections == [["GET /a", "GET /b"], ["GET /b"]]
    with pytest.raises(Failure, match="does not answer"):
        client.request("POST", "/c", None, {})
    assert server.connections[2:] == [["POST /c"]]


def test_an_answer_that_was_not_read_to_its_end_leaves_no_connection(server: ApiServer) -> None:
    client = server.client()
    with client.answer("GET", "/a", None, None, 10.0) as response:
        assert response.read(1) == b"{"
    assert client.get("/b") == {"path": "/b"}
    assert server.connections == [["GET /a"], ["GET /b"]]


def test_a_connection_that_was_idle_for_long_is_not_used_again(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_client, "KEPT_SECONDS", 0.0)
    client = server.client()
    client.get("/a")
    client.get("/b")
    assert server.connections == [["GET /a"], ["GET /b"]]


def test_what_somebody_nested_deep_where_nobody_looks_is_read_over(server: ApiServer) -> None:
    """As any user may write the managedFields of an object of theirs."""
    assert server.client().get("/deep")["kind"] == "Pod"
