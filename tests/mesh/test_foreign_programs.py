"""Clients and servers that are not ours, on both ends of two proxies: redis, nghttp2, curl and openssl."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .harness import CLIENT_ID, WEB, Mesh, Pod

pytestmark = [pytest.mark.mesh, pytest.mark.root]

REDIS, H2, TLS = 6379, 8443, 9443
Find = Callable[[str], str]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, mantle_proxy: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("mesh"), mantle_proxy) as mesh:
        mesh.pair({port: port for port in (REDIS, H2, TLS)})
        mesh.start()
        yield mesh


def listening(pod: Pod, port: int, seconds: float = 60.0) -> None:
    """Returns as soon as something in the pod listens on the port."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            pod.connect("127.0.0.1", port, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on {port}"
            time.sleep(0.02)


def said(pod: Pod, *argv: str, **options: object) -> str:
    """What a program printed inside the pod; it must succeed."""
    done = pod.run(*argv, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_redis(client: Pod, web: Pod, tmp_path: Path, program: Find) -> None:
    web.spawn(program("redis-server"), "--port", str(REDIS), "--bind", "0.0.0.0", "--protected-mode", "no",
              "--save", "", "--dir", str(tmp_path), stdout=-3)  # fmt: skip
    listening(web, REDIS)
    cli = (program("redis-cli"), "-h", WEB, "-p", str(REDIS))
    assert said(client, *cli, "ping") == "PONG\n"
    big = "x" * 1_000_000
    assert said(client, *cli, "-x", "set", "big", input=big) == "OK\n"
    assert said(client, *cli, "get", "big").rstrip("\n") == big
    many = "".join(f"SET key{n} {n}\r\n" for n in range(2000))
    assert "errors: 0, replies: 2000" in said(client, *cli, "--pipe", input=many)
    # A connection that only listens, with the server speaking whenever it likes.
    subscriber = client.spawn(*cli, "subscribe", "news", stdout=-1)
    assert subscriber.stdout
    with subscriber.stdout:
        assert [subscriber.stdout.readline() for _ in range(3)] == [b"subscribe\n", b"news\n", b"1\n"]
        assert said(client, *cli, "publish", "news", "hello") == "1\n"
        assert [subscriber.stdout.readline() for _ in range(3)] == [b"message\n", b"news\n", b"hello\n"]
        subscriber.terminate()
        subscriber.wait(60)
    web.counts_at_least(5, "tcp_open_total", direction="inbound", peer="src", tls="true", client_id=CLIENT_ID)


def test_nghttp2_and_curl_speak_http2(client: Pod, web: Pod, tmp_path: Path, program: Find) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(str(number) * 50_000)
    web.spawn(program("nghttpd"), "--no-tls", "-d", str(tmp_path), "--trailer", "x-end: yes", str(H2), stdout=-3)
    listening(web, H2)
    urls = [f"http://{WEB}:{H2}/{number}.txt" for number in range(20)]
    everything = said(client, program("nghttp"), *urls)
    assert sorted(everything) == sorted("".join(str(number) * 50_000 for number in range(20)))
    told = said(client, program("nghttp"), "-v", "-n", urls[0])
    assert ":status: 200" in told and "x-end: yes" in told
    curl = (program("curl"), "-sS", "-m60", "--http2-prior-knowledge", "-w", "%{http_version} %{response_code}")
    assert said(client, *curl, "-o", "/dev/null", urls[3]) == "2 200"
    assert said(client, *curl, "-o", "/dev/null", f"http://{WEB}:{H2}/none") == "2 404"
    labels = {"direction": "inbound", "tls": "true", "client_id": CLIENT_ID}
    web.counts_at_least(22, "response_total", status_code="200", **labels)
    web.counts(1, "response_total", status_code="404", **labels)


def test_tls_of_openssl_passes_untouched(client: Pod, web: Pod, tmp_path: Path, program: Find) -> None:
    openssl = program("openssl")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "crt.pem")
    said(client, openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-days", "1", "-subj", "/CN=app.example", "-addext", "subjectAltName=DNS:app.example",
         "-keyout", key, "-out", certificate)  # fmt: skip
    web.spawn(openssl, "s_server", "-accept", str(TLS), "-cert", certificate, "-key", key, "-www", "-quiet", stdout=-3)
    listening(web, TLS)
    for version in ("-tls1_2", "-tls1_3"):
        seen = said(client, openssl, "s_client", version, "-connect", f"{WEB}:{TLS}", "-servername", "app.example",
                    "-verify_return_error", "-CAfile", certificate, "-brief", input="")  # fmt: skip
        assert "CN = app.example" in seen or "CN=app.example" in seen, "the application's certificate, not the mesh's"
    curl = (program("curl"), "-sS", "-m60", "--cacert", certificate, "--resolve", f"app.example:{TLS}:{WEB}")
    assert "s_server" in said(client, *curl, f"https://app.example:{TLS}/")
    web.counts_at_least(3, "tcp_open_total", direction="inbound", peer="src", tls="true", client_id=CLIENT_ID)
