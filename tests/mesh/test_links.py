"""The links between proxies: hostile frames of a peer with a good certificate, and HTTP/2 while certificates renew."""

from __future__ import annotations

import contextlib
import ssl
import struct
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from .apps import http_client, http_server
from .harness import WEB, Mesh, Pod, wait_for

pytestmark = [pytest.mark.mesh, pytest.mark.root]

WEB_NAME = "web.test.serviceaccount.identity.mantle.cluster.local"
SETTINGS = bytes([0, 0, 0, 6, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1])
OPEN = bytes([1, 0, 0, 7, 0, 0, 0, 1, 1, 2]) + struct.pack(">H", 8080) + bytes([2, 1, 1])


def data(stream: int, length: int) -> bytes:
    return struct.pack(">BBHI", 2, 0, length, stream) + bytes(length)


def peer_context(folder: Path, name: str) -> ssl.SSLContext:
    """TLS as a proxy of the mesh speaks it, with a certificate for `name` from the mesh's issuer."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    issuer = x509.load_pem_x509_certificate((folder / "issuer.pem").read_bytes())
    issuer_key = serialization.load_pem_private_key((folder / "issuer-key.pem").read_bytes(), None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    usages = [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH, x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    leaf = (
        x509.CertificateBuilder(issuer.subject, x509.Name([]), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(minutes=10))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    chain = folder / "peer.pem"
    chain.write_bytes(
        leaf.public_bytes(serialization.Encoding.PEM)
        + (folder / "issuer.pem").read_bytes()
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "roots.pem")
    context.load_cert_chain(chain)
    context.set_alpn_protocols(["mantle-mux/1"])
    return context


@pytest.fixture
def mesh(tmp_path: Path, mantle_proxy: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path, mantle_proxy) as mesh:
        _, web = mesh.pair({80: 8080})
        mesh.pod("plain", meshed=False)
        mesh.start()
        with http_server(web.listen(8080)):
            yield mesh


def test_a_peer_that_breaks_the_rules_of_the_mux_loses_its_link_only(mesh: Mesh, tmp_path: Path) -> None:
    client, web, stranger = mesh.pods["client"], mesh.pods["web"], mesh.pods["plain"]
    context = peer_context(tmp_path, "mallory.test.serviceaccount.identity.mantle.cluster.local")
    hostile = {
        "bad_settings": data(1, 1),
        "bad_frame": SETTINGS + bytes([9, 0, 0, 0, 0, 0, 0, 0]),
        "bad_stream": SETTINGS + OPEN + OPEN,
        "control_rate": SETTINGS + bytes([5, 0, 0, 8, *[0] * 12]) * 40_000,
    }
    with http_client(client.connect(WEB, 80)) as http:
        for reason, frames in hostile.items():
            http.request("GET", "/headers")
            assert http.getresponse().read()
            plain = stranger.connect(web.ip, 4143)
            with context.wrap_socket(plain, server_hostname=WEB_NAME) as link:
                assert link.selected_alpn_protocol() == "mantle-mux/1"
                with contextlib.suppress(OSError):  # it may be closed before all is sent
                    link.sendall(frames)
                drain(link)
            wait_for(counted(web, reason), reason, log=web.log)
        http.request("GET", "/headers")
        assert http.getresponse().status == 200


def counted(pod: Pod, reason: str) -> Callable[[], bool]:
    return lambda: pod.metric("inbound_tcp_errors_total", error=reason) == 1


def drain(link: ssl.SSLSocket) -> None:
    """Reads until the other side has closed."""
    link.settimeout(60)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while link.recv(65536):
            pass


def test_a_stream_reaches_no_port_of_the_proxy_and_no_other_address(mesh: Mesh, tmp_path: Path) -> None:
    web = mesh.pods["web"]
    context = peer_context(tmp_path, "mallory.test.serviceaccount.identity.mantle.cluster.local")
    for port in (4140, 4143, 4190, 4191):
        plain = mesh.pods["plain"].connect(web.ip, 4143)
        with context.wrap_socket(plain, server_hostname=WEB_NAME) as link:
            link.sendall(SETTINGS + OPEN[:10] + struct.pack(">H", port) + bytes([2, 1, 1]) + data(1, 1))
            assert reset_reason(link, stream=1) == 1, "denied"


def reset_reason(link: ssl.SSLSocket, stream: int) -> int:
    """The reason's number in the RST for `stream`."""
    link.settimeout(60)
    buffer = b""
    while True:
        while len(buffer) >= 8:
            kind, _, length, number = struct.unpack(">BBHI", buffer[:8])
            size = 8 + (length if kind in (0, 1, 2, 5) else 0)
            if len(buffer) < size:
                break
            if kind == 4 and number == stream:
                return int(length)
            buffer = buffer[size:]
        more = link.recv(65536)
        assert more, "closed without a reset"
        buffer += more


CALLS = """
import sys, time, grpc
sys.path.insert(0, sys.argv[3])
end, calls = time.monotonic() + float(sys.argv[2]), 0
with grpc.insecure_channel(sys.argv[1]) as channel:
    unary = channel.unary_unary("/test.Echo/Unary")
    while time.monotonic() < end:
        assert unary(b"hello", timeout=30).startswith(b"hello from client.")
        calls += 1
        time.sleep(0.005)
print(calls)
"""


def test_calls_of_one_connection_outlive_the_certificates_of_both_sides(tmp_path: Path, mantle_proxy: Path) -> None:
    fast = {"IDENTITY_MIN_REFRESH": "1s", "IDENTITY_MAX_REFRESH": "2s"}
    with Mesh(tmp_path, mantle_proxy, LEAF_SECONDS="12") as mesh:
        client, web = mesh.pair({80: 8080}, env=fast)
        mesh.start()
        tests = Path(__file__).resolve().parents[1]
        serve = f"import sys; sys.path.insert(0, {str(tests)!r}); from mesh.apps import grpc_server; grpc_server(8080)"
        web.spawn(sys.executable, "-c", serve)
        wait_for(lambda: answers(web.ip, web), "the gRPC server")
        done = client.run(sys.executable, "-c", CALLS, f"{WEB}:80", "16", str(tests))
        assert done.returncode == 0, done.stderr + client.log()[-4000:]
        assert int(done.stdout) > 50
        for pod in (client, web):
            wait_for(lambda pod=pod: pod.log().count("certified") >= 4, "renewals", log=pod.log)  # type: ignore[misc]


def test_an_identity_that_was_restarted_certifies_proxies_that_run(tmp_path: Path, mantle_proxy: Path) -> None:
    """While it is away renewals fail and certificates stay; once it is back nobody has to start a proxy anew."""
    fast = {"IDENTITY_MIN_REFRESH": "1s", "IDENTITY_MAX_REFRESH": "2s"}

    def refreshes(pod: Pod, result: str) -> float:
        return pod.metric("control_identity_cert_refreshes_total", result=result)

    with Mesh(tmp_path, mantle_proxy) as mesh:
        pods = mesh.pair({80: 8080}, env=fast)
        mesh.start()
        mesh.kill_plane()
        for pod in pods:
            wait_for(lambda pod=pod: refreshes(pod, "error") >= 1, "a renewal that fails", log=pod.log)  # type: ignore[misc]
        before = [refreshes(pod, "ok") for pod in pods]
        mesh.start_plane()
        for pod, count in zip(pods, before, strict=True):
            wait_for(lambda pod=pod, n=count: refreshes(pod, "ok") > n, "a renewal", log=pod.log)  # type: ignore[misc]
            assert pod.proxy is not None and pod.proxy.poll() is None


def answers(ip: str, pod: Pod) -> bool:
    with contextlib.suppress(OSError):
        pod.connect(ip, 8080, 5.0).close()
        return True
    return False
