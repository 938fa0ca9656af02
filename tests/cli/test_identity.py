"""`mantle identity` against a supervisor and an admin port of our own: a real handshake, a real certificate."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mantle.cli import identity
from mantle.cli.live_certificate import LiveCertificate, fetch
from mantle.cli.output import Failure
from mantle.cli.resource import Resource
from mantle.platform.machine import wire

NAME = "web.emojivoto.serviceaccount.identity.mantle.cluster.local"
SPIFFE = "spiffe://cluster.local/ns/emojivoto/sa/web"
START = datetime(2026, 11, 24, 8, 0, tzinfo=UTC)


def certificate() -> tuple[bytes, bytes]:
    """(certificate, key) in PEM, as identity issues them."""
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.DNSName(NAME), x509.UniformResourceIdentifier(SPIFFE)]
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "identity.mantle.cluster.local")]))
        .serial_number(0x0ABC12)
        .public_key(key.public_key())
        .not_valid_before(START)
        .not_valid_after(START + timedelta(hours=24))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return made.public_bytes(serialization.Encoding.PEM), private


class Pod:
    """A pod's state directory with a supervisor that dials `answers`: a proxy with a certificate, or a refusal."""

    def __init__(self, mesh: Path, env: dict[str, str]) -> None:
        self.directory = mesh / "pods" / "uid-1"
        self.directory.mkdir(parents=True)
        (self.directory / "spec.json").write_text(
            json.dumps({"containers": [{"name": "app", "env": {}}, {"env": env}]})
        )
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.directory / "ctl.sock"))
        self.listener.listen()
        self.names: list[str | None] = []

    def serve(self, context: ssl.SSLContext | None) -> None:
        """One conversation: `dial`, then a handshake on the descriptor that was sent."""
        peer, _ = self.listener.accept()
        with peer:
            decoder = wire.Decoder()
            ((message, _),) = decoder.feed(*wire.receive(peer))
            assert message == {"op": "dial", "port": 4191}
            if context is None:
                wire.send(peer, wire.Refused("nothing_listens", "nothing listens on port 4191 of the pod").as_message())
                return
            ours, theirs = socket.socketpair()
            with theirs:
                wire.send(peer, {"ok": True}, [theirs.fileno()])
        context.sni_callback = lambda _sock, name, _context: self.names.append(name)
        with ours, context.wrap_socket(ours, server_side=True) as secured:
            secured.recv(1)


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    made = Pod(tmp_path, {"MANTLE_PROXY_IDENTITY_LOCAL_NAME": NAME})
    with made.listener:
        yield made


def fetched(pod: Pod, mesh: Path, context: ssl.SSLContext | None) -> LiveCertificate:
    server = threading.Thread(target=pod.serve, args=(context,))
    server.start()
    try:
        return fetch(mesh, "uid-1", "emojivoto/web-1")
    finally:
        server.join(10)


@pytest.fixture
def context(tmp_path: Path) -> ssl.SSLContext:
    pem, key = certificate()
    (tmp_path / "crt.pem").write_bytes(pem)
    (tmp_path / "key.pem").write_bytes(key)
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_cert_chain(tmp_path / "crt.pem", tmp_path / "key.pem")
    return made


def test_what_the_proxy_shows_is_read_and_printed(pod: Pod, tmp_path: Path, context: ssl.SSLContext) -> None:
    live = fetched(pod, tmp_path, context)
    assert pod.names == [NAME]
    assert (live.dns_names, live.spiffe_id) == ((NAME,), SPIFFE)
    assert identity.page("web-1", 1, 2, live, START + timedelta(hours=0.5)) == (
        "\nPOD web-1 (1 of 2)\n"
        "\n"
        "Certificate:\n"
        "    Serial Number: 0a:bc:12\n"
        "    Signature Algorithm: ecdsa-with-SHA256\n"
        "    Issuer: CN=identity.mantle.cluster.local\n"
        "    Validity\n"
        "        Not Before: 2026-11-24T08:00:00Z\n"
        "        Not After : 2026-11-25T08:00:00Z (expires in 23h 30m)\n"
        f"    Subject: CN={NAME}\n"
        "    Subject Public Key: EC secp256r1\n"
        "    Extended Key Usage: serverAuth, clientAuth\n"
        f"    Subject Alternative Name: DNS:{NAME}, URI:{SPIFFE}\n"
        f"    SPIFFE ID: {SPIFFE}\n"
    )
    assert "(EXPIRED)" in identity.page("web-1", 1, 1, live, START + timedelta(hours=24))
    record = identity.object_of("web-1", live)
    assert (record["serial"], record["not_after"]) == ("0a:bc:12", "2026-11-25T08:00:00Z")
    assert x509.load_pem_x509_certificate(record["pem"].encode()).serial_number == 0x0ABC12


def test_a_proxy_that_is_not_there(pod: Pod, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="cannot be reached: nothing listens on port 4191"):
        fetched(pod, tmp_path, None)


def test_a_proxy_without_a_certificate_yet(pod: Pod, tmp_path: Path) -> None:
    empty = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def serve() -> None:
        with pytest.raises(ssl.SSLError):
            pod.serve(empty)

    server = threading.Thread(target=serve)
    server.start()
    with pytest.raises(Failure) as failure:
        fetch(tmp_path, "uid-1", "emojivoto/web-1")
    server.join(10)
    assert "did not show a certificate" in failure.value.message
    assert failure.value.problems[0].fix == "it may still wait for its first one: `mantle logs -c mantle-proxy web-1`"


def test_pods_that_are_gone_or_not_meshed(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="pod a/b is gone"):
        fetch(tmp_path, "uid-2", "a/b")
    with Pod(tmp_path, {}).listener, pytest.raises(Failure, match="pod a/b is not in the mesh"):
        fetch(tmp_path, "uid-1", "a/b")


def row(namespace: str, name: str, kind: str, owner: str) -> dict[str, Any]:
    return {"namespace": namespace, "name": name, "owner": {"kind": kind, "name": owner}}


PODS = [row("a", "web-2", "Deployment", "web"), row("a", "web-1", "Deployment", "web"), row("b", "x", "Pod", "x")]


@pytest.mark.parametrize(
    ("target", "namespace", "names"),
    [
        (Resource("pod", "web-1"), "a", ["web-1"]),
        (Resource("deployment", "web"), "a", ["web-1", "web-2"]),
        (Resource("deployment"), "a", ["web-1", "web-2"]),
        (Resource("namespace", "b"), "a", ["x"]),
    ],
)
def test_which_pods_are_meant(target: Resource, namespace: str, names: list[str]) -> None:
    assert [pod["name"] for pod in identity.choose(PODS, target, namespace)] == names


def test_a_pod_of_another_namespace_is_pointed_at() -> None:
    with pytest.raises(Failure) as failure:
        identity.choose(PODS, Resource("pod", "x"), "a")
    assert failure.value.problems[0].text() == ("there is no pod x in namespace a\n  fix: it is in b: use -n")
