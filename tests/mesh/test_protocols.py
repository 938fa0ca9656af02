"""Every protocol of the data path, through two real proxies in real namespaces, with clients and servers not ours."""

from __future__ import annotations

import contextlib
import json
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .apps import echo, greet, http_client, http_server, self_signed, tls_echo
from .harness import CLIENT_ID, WEB, Mesh, Pod, serving

pytestmark = [pytest.mark.mesh, pytest.mark.root]

PLAIN = "10.203.128.2"
APPS = str(Path(__file__).with_name("apps.py"))
WEB_ID = "web.test.serviceaccount.identity.mantle.cluster.local"


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return self_signed(tmp_path_factory.mktemp("tls"), "app.example")


@pytest.fixture(scope="module")
def mesh(
    tmp_path_factory: pytest.TempPathFactory, mantle_proxy: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("mesh"), mantle_proxy) as mesh, ExitStack() as stack:
        _, web = mesh.pair({80: 8080, 9000: 9000, 9001: 9001, 9443: 9443, 50051: 50051})
        plain = mesh.pod("plain", meshed=False, ports=[8080])
        mesh.service("plain", PLAIN, {80: 8080})
        mesh.start()
        for pod in (web, plain):
            stack.enter_context(http_server(pod.listen(8080)))
        stack.enter_context(serving(web.listen(9000), echo))
        stack.enter_context(serving(web.listen(9001), greet))
        stack.enter_context(serving(web.listen(9443), tls_echo(tls[0])))
        yield mesh


def test_http_requests_carry_the_proved_identity_and_no_other(client: Pod, web: Pod) -> None:
    with http_client(client.connect(WEB, 80)) as http:
        for _ in range(50):
            http.request("GET", "/headers", headers={"l5d-client-id": "someone-else", "mantle-client-addr": "1.2.3.4"})
            seen = json.loads(http.getresponse().read())
            assert [value for name, value in seen if name == "l5d-client-id"] == [CLIENT_ID]
            assert not [name for name, _ in seen if name.startswith("mantle-")]
        web.counts_at_least(50, "request_total", direction="inbound", tls="true", client_id=CLIENT_ID)
        client.counts_at_least(50, "request_total", direction="outbound", tls="true", server_id=WEB_ID)


def test_a_client_that_requires_an_identity_reaches_no_other(client: Pod, web: Pod) -> None:
    before = web.metric("request_total", direction="inbound")
    for host, required, status in ((WEB, WEB_ID, 200), (WEB, CLIENT_ID, 502), (PLAIN, WEB_ID, 502)):
        with http_client(client.connect(host, 80)) as http:
            http.request("GET", "/headers", headers={"L5D-Require-Id": required})
            answer = http.getresponse()
            body = answer.read()
            assert answer.status == status, (host, required, body)
            if status == 200:
                assert "l5d-require-id" not in dict(json.loads(body))
            else:
                assert answer.getheader("l5d-proxy-error") == "identity_mismatch"
    web.counts(before + 1, "request_total", direction="inbound")


def test_http_bodies_of_every_framing(client: Pod) -> None:
    with http_client(client.connect(WEB, 80)) as http:
        http.request("GET", "/chunked")
        assert http.getresponse().read() == b"onetwothree"
        http.request("HEAD", "/")
        head = http.getresponse()
        assert head.read() == b"" and head.getheader("Content-Length") == "12345"
        for size in (0, 1, 70_000, 1_000_000):
            http.request("POST", "/", body=b"x" * size)
            assert len(http.getresponse().read()) == size
            http.request("POST", "/", body=iter([b"y" * (size // 2), b"z" * (size - size // 2)]), encode_chunked=True)
            assert len(http.getresponse().read()) == size
        http.request("GET", "/until-close")
        last = http.getresponse()
        assert last.getheader("Connection") == "close" and last.read() == b"to the end"


def test_http_1_0_and_curl(client: Pod) -> None:
    for flag in ("--http1.0", "--http1.1", "--expect100-timeout"):
        extra = ["5", "-H", "Expect: 100-continue"] if flag == "--expect100-timeout" else []
        curl = client.run("curl", "-fsS", "-m60", flag, *extra, "-d", "a body", f"http://{WEB}/a", f"http://{WEB}/b")
        assert (curl.returncode, curl.stdout) == (0, "a bodya body"), curl.stderr


def test_pipelined_requests_are_answered_in_order(client: Pod) -> None:
    with client.connect(WEB, 80) as io:
        bodies = [b"first", b"second", b"third"]
        io.sendall(
            b"".join(b"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: %d\r\n\r\n%s" % (len(b), b) for b in bodies)
        )
        got = b""
        while got.count(b"HTTP/1.1 200") < 3 or not got.endswith(b"third"):
            data = io.recv(65536)
            assert data, got
            got += data
        assert [part.split(b"\r\n\r\n")[1] for part in got.split(b"HTTP/1.1 200")[1:]] == bodies


def test_an_upgraded_connection_is_a_tunnel(client: Pod) -> None:
    with client.connect(WEB, 80) as io:
        io.sendall(b"GET /upgrade HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += io.recv(1)
        assert head.startswith(b"HTTP/1.1 101") and b"echo" in head
        io.sendall(b"\x00\x01 not http")
        assert io.recv(100) == b"\x00\x01 not http"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nhost: web\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: web\r\nx: a\r\n b\r\n\r\n",
        b"GET / HTTP/1.1\nhost: web\n\n",
        b"GET / HTTP/1.1\r\nhost: web\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
)
def test_ambiguous_http_is_refused(client: Pod, plain: Pod, web: Pod, request_bytes: bytes) -> None:
    """By the client's proxy, and by the server's when the client has none."""
    for pod, address in ((client, (WEB, 80)), (plain, (web.ip, 8080))):
        with pod.connect(*address) as io:
            io.sendall(request_bytes)
            answer = io.recv(65536)
            assert answer.startswith(b"HTTP/1.1 400 "), (pod.name, answer)
            assert (b"l5d-proxy-error" in answer) == (pod is client)


def test_opaque_bytes_pass_in_both_directions(client: Pod, web: Pod) -> None:
    payload = bytes(range(256)) * 20_000
    with client.connect(WEB, 9000) as io:
        threading.Thread(target=lambda: io.sendall(payload)).start()
        got = b""
        while len(got) < len(payload):
            data = io.recv(65536)
            assert data
            got += data
        assert got == payload
        io.shutdown(1)
        assert io.recv(1) == b""
    labels = {"direction": "inbound", "peer": "src", "target_port": "9000", "tls": "true"}
    web.counts_at_least(len(payload), "tcp_read_bytes_total", **labels)


def test_a_server_that_speaks_first_is_heard_at_once(client: Pod, plain: Pod, web: Pod) -> None:
    for _ in range(3):
        for pod, address in ((client, (WEB, 9001)), (plain, (web.ip, 9001))):
            with pod.connect(*address) as io:
                began = time.monotonic()
                assert io.recv(100) == b"220 hello\r\n"
                took = time.monotonic() - began
                assert took < 9, f"{took}: detection waited for the client, which waits for the server"
                io.sendall(b"QUIT\r\n")
                assert io.recv(100) == b"QUIT\r\n"


def test_tls_of_the_application_passes_untouched(
    client: Pod, plain: Pod, web: Pod, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    for pod, address in ((client, (WEB, 9443)), (plain, (web.ip, 9443))):
        with tls[1].wrap_socket(pod.connect(*address), server_hostname="app.example") as io:
            io.sendall(b"secret")
            assert io.recv(100) == b"secret"
    web.counts_at_least(1, "tcp_open_total", direction="inbound", peer="src", tls="opaque", sni="app.example")


def test_grpc_unary_streams_statuses_and_trailers(client: Pod, plain: Pod, web: Pod) -> None:
    server = web.spawn(sys.executable, APPS, "grpc-server", "50051", stdout=-1)
    assert server.stdout
    with server.stdout:
        assert server.stdout.readline() == b"ready\n"
    asked = 0
    for pod, target, who in ((client, f"{WEB}:50051", CLIENT_ID), (plain, f"{web.ip}:50051", "nobody")):
        ran = pod.run(sys.executable, APPS, "grpc-client", target, WEB_ID)
        assert ran.returncode == 0, ran.stderr
        seen = json.loads(ran.stdout)
        assert seen["unary"] == [f"hello {n} from {who}" for n in range(20)]
        assert seen["echoed"] == [3, 300_000]
        assert (seen["code"], seen["details"], seen["trailer"]) == ("NOT_FOUND", "stopped", "yes")
        assert seen["missing"] == "UNIMPLEMENTED"
        assert seen["slow"] == "DEADLINE_EXCEEDED" and seen["given up"][-1] == "given up", seen["given up"]
        asked = len(seen["given up"]) if pod is client else asked
        wanted = {WEB_ID: "OK", "somebody-else": "UNAVAILABLE"} if pod is client else {}
        assert {name: seen["required"][name] for name in wanted} == wanted
    web.counts(21 + asked, "response_total", direction="inbound", grpc_status="0", client_id=CLIENT_ID)


def test_a_client_without_mesh_reaches_a_meshed_server_in_plaintext_with_the_reason(plain: Pod, web: Pod) -> None:
    with http_client(plain.connect(web.ip, 8080)) as http:
        http.request("GET", "/headers", headers={"l5d-client-id": "someone-else"})
        seen = json.loads(http.getresponse().read())
        assert not [name for name, _ in seen if name.startswith("l5d-")]
        labels = {"direction": "inbound", "tls": "no_identity", "no_tls_reason": "not_provided_by_remote"}
        web.counts_at_least(1, "request_total", **labels)


def test_a_meshed_client_reaches_a_server_without_mesh_in_plaintext_with_the_reason(client: Pod) -> None:
    with http_client(client.connect(PLAIN, 80)) as http:
        for _ in range(3):
            http.request("GET", "/headers")
            assert json.loads(http.getresponse().read())
        labels = {"direction": "outbound", "tls": "no_identity", "no_tls_reason": "not_provided_by_service_discovery"}
        client.counts_at_least(3, "request_total", **labels)


def test_a_pod_is_reached_by_its_own_address_over_the_mesh(client: Pod, web: Pod) -> None:
    with http_client(client.connect(web.ip, 8080)) as http:
        http.request("GET", "/headers")
        seen = dict(json.loads(http.getresponse().read()))
        assert seen["l5d-client-id"] == CLIENT_ID


def test_what_nobody_serves_is_a_502_or_a_closed_connection(client: Pod, mesh: Mesh) -> None:
    web = mesh.pods["web"]
    with client.connect(web.ip, 7999) as io:
        io.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = io.recv(65536)
        assert answer.startswith(b"HTTP/1.1 502") and b"l5d-proxy-error: connect_failed" in answer, answer
    with client.connect(web.ip, 7999) as io:
        io.sendall(b"\x00\x01")
        with contextlib.suppress(ConnectionResetError):
            assert io.recv(1) == b""


def test_the_proxys_own_ports_are_refused(client: Pod, plain: Pod, web: Pod) -> None:
    for port in (4140, 4143):
        with plain.connect(web.ip, port) as io:
            began = time.monotonic()
            io.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                while answer := io.recv(100):
                    assert answer[0] == 0x15  # a TLS alert, and that is all
            assert time.monotonic() - began < 9, "garbage is not listened to until the handshake's time is over"
