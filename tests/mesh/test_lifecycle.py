"""What happens to traffic while the world changes: policies, endpoints, certificates, control plane, the proxies."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from .apps import Telling, echo, greet, http_client, http_server
from .harness import PATIENCE, WEB, Mesh, Pod, nobody_waits, serving, wait_for

pytestmark = [pytest.mark.mesh, pytest.mark.root]

Start = Callable[..., Mesh]


@pytest.fixture
def start(tmp_path: Path, mantle_proxy: Path) -> Iterator[Start]:
    """Brings up client, web (HTTP on 8080, echo on 9000, greeting on 9001) and an unmeshed pod."""
    with contextlib.ExitStack() as stack:

        def up(
            env: dict[str, str] | None = None,
            handler: type[BaseHTTPRequestHandler] = Telling,
            files: int = 0,
            **plane: str,
        ) -> Mesh:
            mesh = stack.enter_context(Mesh(tmp_path, mantle_proxy, **plane))
            _, web = mesh.pair({80: 8080, 9000: 9000, 9001: 9001}, env=env, files=files)
            mesh.pod("plain", meshed=False)
            mesh.start()
            stack.enter_context(http_server(web.listen(8080), handler))
            stack.enter_context(serving(web.listen(9000), echo))
            stack.enter_context(serving(web.listen(9001), greet))
            return mesh

        yield up


def get(pod: Pod, host: str = WEB, port: int = 80, path: str = "/headers") -> tuple[int, bytes, dict[str, str]]:
    with http_client(pod.connect(host, port)) as http:
        http.request("GET", path)
        answer = http.getresponse()
        return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}


def is_closed(io: socket.socket, seconds: float = PATIENCE) -> bool:
    io.settimeout(seconds)
    try:
        return io.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_idle_connections_do_not_delay_the_next(start: Start) -> None:
    mesh = start()
    client = mesh.pods["client"]
    get(client)
    with contextlib.ExitStack() as stack:

        def connect() -> list[socket.socket]:
            return [socket.create_connection((WEB, 80 if n % 2 else 9000), PATIENCE) for n in range(500)]

        for io in client.net.inside(connect):
            stack.enter_context(io)
        nobody_waits(lambda: get(client)[0] == 200)


def test_a_policy_that_gets_stricter_cuts_open_connections_and_refuses_requests(start: Start) -> None:
    mesh = start()
    client, web, plain = mesh.pods["client"], mesh.pods["web"], mesh.pods["plain"]
    with (
        plain.connect(web.ip, 9000) as outsider,
        client.connect(WEB, 9000) as insider,
        contextlib.ExitStack() as stack,
    ):
        for each in (outsider, insider):
            each.sendall(b"\x00hello")
            assert each.recv(100) == b"\x00hello"
        kept = [stack.enter_context(http_client(plain.connect(web.ip, 8080)))]

        def is_refused() -> bool:
            """A request that is under way when the policy changes is cut; those after it are answered with 403."""
            try:
                kept[-1].request("GET", "/headers")
                answer = kept[-1].getresponse()
                body = answer.read()
            except (ConnectionError, http.client.HTTPException):
                kept.append(stack.enter_context(http_client(plain.connect(web.ip, 8080))))
                return False
            assert answer.status == 403 or (answer.status == 200 and body)
            return answer.status == 403 and answer.getheader("l5d-proxy-error") is None

        assert not is_refused() and len(kept) == 1
        web.spec["annotations"] = {"config.mantle.dev/default-inbound-policy": "all-authenticated"}
        mesh.change()
        assert is_closed(outsider)
        wait_for(is_refused, "the policy of port 8080, which comes on a stream of its own, at its own moment")
        assert len(kept) <= 2
        insider.sendall(b"still here")
        assert insider.recv(100) == b"still here"
        assert get(client)[0] == 200
        with plain.connect(web.ip, 9000) as late:
            late.sendall(b"\x00")
            assert is_closed(late)
    web.counts(1, "inbound_tcp_authz_terminate_total")
    web.counts_at_least(1, "inbound_http_authz_deny_total")


def test_endpoints_come_and_go(start: Start) -> None:
    mesh = start()
    client, web = mesh.pods["client"], mesh.pods["web"]
    assert get(client)[0] == 200

    def goes() -> None:
        web.spec["ready"] = False
        mesh.change()
        wait_for(lambda: get(client)[0] == 504, "the endpoint to go")

    goes()
    began = time.monotonic()
    status, _, headers = get(client)
    assert (status, headers["l5d-proxy-error"]) == (504, "no_endpoints")
    assert 2.5 < time.monotonic() - began < 30

    def waited() -> int:
        """The status of a request that was waiting when the endpoint came."""
        waiting: list[int] = []
        thread = threading.Thread(target=lambda: waiting.append(get(client)[0]))
        thread.start()
        web.spec["ready"] = True
        mesh.change()
        thread.join()
        return waiting[0]

    for _ in range(5):  # on a busy machine the endpoint may come later than three seconds after the request
        if (last := waited()) == 200:
            break
        goes()
    assert last == 200, "a request that waits for an endpoint gets the first one"


def test_a_server_with_another_identity_gets_nothing(start: Start) -> None:
    mesh = start()
    client, web = mesh.pods["client"], mesh.pods["web"]
    web.spec["account"] = "somebody-else"  # what discovery says; the proxy's certificate is for `web`
    mesh.change()
    status, _, headers = get(client)
    assert (status, headers["l5d-proxy-error"]) == (502, "identity_mismatch")
    with client.connect(WEB, 9000) as io:
        io.sendall(b"\x00")
        assert is_closed(io)
    assert web.metric("request_total", direction="inbound") == 0
    assert web.metric("tcp_open_total", direction="inbound", peer="dst") == 0


def test_traffic_goes_on_without_its_control_plane(start: Start) -> None:
    mesh = start()
    client, web = mesh.pods["client"], mesh.pods["web"]
    assert get(client)[0] == 200
    with client.connect(WEB, 9000) as io:
        io.sendall(b"\x00 before")
        assert io.recv(100)
        mesh.kill_plane()
        io.sendall(b"after")
        assert io.recv(100) == b"after"
        for _ in range(20):
            assert get(client)[0] == 200
        began = time.monotonic()
        with client.connect("10.203.128.77", 80) as unknown:
            unknown.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert is_closed(unknown), "inside the mesh's networks nothing passes unexplained"
        assert time.monotonic() - began < 30
        mesh.start_plane()
        io.sendall(b"again")
        assert io.recv(100) == b"again"
    wait_for(lambda: _reaches(client, web.ip, 8080), "discovery to answer again")


def _reaches(pod: Pod, host: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        return get(pod, host, port)[0] == 200
    return False


def test_certificates_renew_under_load_without_a_failed_request(start: Start) -> None:
    fast = {"IDENTITY_MIN_REFRESH": "1s", "IDENTITY_MAX_REFRESH": "2s"}
    mesh = start(env=fast, LEAF_SECONDS="12")
    client = mesh.pods["client"]
    end = time.monotonic() + 14  # longer than any certificate lives
    answers: list[int] = []
    failures: list[object] = []

    def load() -> None:
        try:
            with http_client(client.connect(WEB, 80)) as http:
                while time.monotonic() < end:
                    http.request("POST", "/", body=b"x" * 1000)
                    answer = http.getresponse()
                    assert len(answer.read()) == 1000
                    answers.append(answer.status)
                    time.sleep(0.005)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert set(answers) == {200} and len(answers) > 50
    wait_for(lambda: client.log().count("certified") >= 4, "renewals", log=client.log)


def test_a_proxy_that_is_told_to_stop_finishes_what_it_carries(start: Start) -> None:
    began, go_on = threading.Event(), threading.Event()

    class Slow(Telling):
        def do_GET(self) -> None:
            began.set()
            go_on.wait(PATIENCE)
            self.answer(b"late but whole")

    mesh = start(handler=Slow, env={"SHUTDOWN_GRACE_PERIOD": "60s"})
    client, web = mesh.pods["client"], mesh.pods["web"]
    got: list[tuple[int, bytes]] = []
    thread = threading.Thread(target=lambda: got.append(get(client)[:2]))
    thread.start()
    assert began.wait(PATIENCE)
    assert web.proxy
    web.proxy.send_signal(signal.SIGTERM)
    wait_for(lambda: "draining" in web.log(), "the drain", log=web.log)
    go_on.set()
    thread.join()
    assert got == [(200, b"late but whole")]
    assert web.proxy.wait(PATIENCE) == 0


def test_garbage_on_every_port_harms_nobody_else(start: Start) -> None:
    mesh = start()
    client, web, plain = mesh.pods["client"], mesh.pods["web"], mesh.pods["plain"]
    get(client)
    hello = bytes.fromhex("16030100f0010000ec0303") + os.urandom(40)  # half a ClientHello
    words = [hello, b"\x16", b"GET / HTTP/1.1\r\nx: ", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(200),
             os.urandom(3000), b"\r\n" * 5000, b"A" * 100_000,
             b"GET / HTTP/1.1\r\nhost: web\r\nx: " + b"a" * 1_000_000]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for word in words:
            for pod, address in (
                (client, (WEB, 80)),
                (plain, (web.ip, 8080)),
                (plain, (web.ip, 4143)),
                (plain, (web.ip, 4190)),
            ):
                for _ in range(5):
                    with contextlib.suppress(OSError):
                        io = stack.enter_context(pod.connect(*address, timeout=10))
                        io.sendall(word)
        nobody_waits(lambda: get(client)[0] == 200)
        for pod in (client, web):
            assert pod.proxy
            assert _rss_mib(pod.proxy.pid) < 40
    assert json.loads(get(client)[1])
    for reason in ("head_too_large", "malformed"):  # at its own proxy, and at the server's
        client.counts_at_least(1, "outbound_http_errors_total", error=reason)
        web.counts_at_least(1, "inbound_http_errors_total", error=reason)
    web.counts_at_least(21, "inbound_tcp_errors_total", error="identity_required")  # what came to 4143


def test_a_head_that_drips_is_answered_with_408_and_counted(start: Start) -> None:
    mesh = start()
    client, web, plain = mesh.pods["client"], mesh.pods["web"], mesh.pods["plain"]
    dripping = [client.connect(WEB, 80), plain.connect(web.ip, 8080)]
    answers: dict[socket.socket, bytes] = {}
    with contextlib.ExitStack() as stack:
        for io in dripping:
            stack.enter_context(io).sendall(b"GET / HTTP/1.1\r\nhost: web\r\nx: ")
        deadline = time.monotonic() + 90
        while len(answers) < len(dripping):
            assert time.monotonic() < deadline, "the drip is listened to for ever"
            for io in select.select(dripping, [], [], 0.2)[0]:
                answers.setdefault(io, io.recv(1000))
            for io in set(dripping) - set(answers):
                io.sendall(b"a")
    assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers.values()), answers
    client.counts(1, "outbound_http_errors_total", error="head_timeout")
    web.counts(1, "inbound_http_errors_total", error="head_timeout")


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


def test_at_its_file_limit_a_proxy_refuses_at_once_and_recovers(start: Start) -> None:
    mesh = start(files=120)
    web, plain = mesh.pods["web"], mesh.pods["plain"]
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(plain.connect(web.ip, 4143)) for _ in range(200)]
        wait_for(lambda: sum(is_closed(io, 0.01) for io in crowd) > 50, "those beyond the limit to be told")
        assert web.proxy and web.proxy.poll() is None
    wait_for(lambda: _reaches(plain, web.ip, 8080), "the proxy to serve again", log=web.log)
    web.counts_at_least(50, "inbound_tcp_errors_total", error="file_limit")


def test_a_pod_reaches_itself_through_its_service_without_tls(start: Start) -> None:
    web = start().pods["web"]
    status, body, _ = get(web)
    assert status == 200 and "l5d-client-id" not in dict(json.loads(body))
    web.counts(1, "request_total", direction="outbound", no_tls_reason="loopback")


def test_the_clients_address_is_vouched_for_where_it_is_asked_for(start: Start) -> None:
    mesh = start(env={"INBOUND_CLIENT_ADDR_PORTS": "8080"})
    for pod, host, port in ((mesh.pods["client"], WEB, 80), (mesh.pods["plain"], mesh.pods["web"].ip, 8080)):
        assert dict(json.loads(get(pod, host, port)[1]))["mantle-client-addr"] == pod.ip


def test_two_data_threads_share_the_work(start: Start) -> None:
    mesh = start(env={"CORES": "2"})
    client = mesh.pods["client"]
    for _ in range(30):
        assert get(client)[0] == 200
    with client.connect(WEB, 9000) as io:
        io.sendall(b"\x00hello")
        assert io.recv(100) == b"\x00hello"
    for pod in (client, mesh.pods["web"]):
        assert pod.proxy
        pod.proxy.send_signal(signal.SIGTERM)
        assert pod.proxy.wait(PATIENCE) == 0


def test_nothing_readable_is_on_the_wire_between_meshed_pods(start: Start) -> None:
    mesh = start()
    client, web = mesh.pods["client"], mesh.pods["web"]
    canary = b"canary-5f2e9c41"
    capture = mesh.router.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
    with capture:
        capture.setblocking(False)
        with http_client(client.connect(WEB, 80)) as http:
            http.request("POST", "/" + canary.decode(), body=canary)
            assert http.getresponse().read() == canary
        with client.connect(WEB, 9000) as io:
            io.sendall(b"\x00" + canary)
            assert io.recv(100) == b"\x00" + canary
        packets = []
        with contextlib.suppress(BlockingIOError):
            while True:
                packets.append(capture.recv(65536))
    between = [packet for packet in packets if socket.inet_aton(web.ip) in packet[26:34]]
    assert between
    assert not [packet for packet in between if canary in packet]
    assert [packet for packet in between if b"\x17\x03\x03" in packet], "TLS 1.3 records"


def test_transparent_transport_is_tls_on_the_applications_own_port(tmp_path: Path, mantle_proxy: Path) -> None:
    """What the annotation is for: `tshark -d tcp.port==8080,ssl` in the debug container shows TLS on 8080."""
    with Mesh(tmp_path, mantle_proxy) as mesh, contextlib.ExitStack() as apps:
        client = mesh.pod("client")
        web = mesh.pod("web", ports=[8080, 9000], annotations={"config.mantle.dev/transport-mode": "transparent"})
        plain = mesh.pod("plain", meshed=False)
        mesh.service("web", WEB, {80: 8080, 9000: 9000})
        mesh.start()
        apps.enter_context(http_server(web.listen(8080)))
        apps.enter_context(serving(web.listen(9000), echo))
        capture = mesh.router.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        with capture:
            capture.setblocking(False)
            status, body, _ = get(client)
            assert (status, b"client.test.serviceaccount.identity.mantle" in body) == (200, True)
            with client.connect(WEB, 9000) as io:
                io.sendall(b"\x00canary")
                assert io.recv(100) == b"\x00canary"
            packets = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    packets.append(capture.recv(65536))
        to_web = [p for p in packets if p[26:34] == socket.inet_aton(client.ip) + socket.inet_aton(web.ip)]
        ports = {int.from_bytes(packet[36:38], "big") for packet in to_web}
        assert ports == {8080, 9000}, "and nothing to the proxy's inbound port"
        for port in ports:
            to_port = b"".join(p[54:] for p in to_web if int.from_bytes(p[36:38], "big") == port)
            assert b"\x17\x03\x03" in to_port, "TLS application data"
            assert b"canary" not in to_port and b"GET " not in to_port
        web.counts_at_least(2, "tcp_open_total", direction="inbound", tls="true")
        assert get(plain, web.ip, 8080)[0] == 200  # who is not in the mesh still comes in plaintext
