"""The applications of the proxy's tests: an HTTP/1.1 server that tells what it saw, small TCP servers, a gRPC server
and client, and crowds of silent connections. These are programs, because gRPC makes threads and a crowd needs files:
`apps.py grpc-server PORT|grpc-client TARGET SERVER_ID|crowd HOST PORT SIZE|hold PORT`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import selectors
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Telling(BaseHTTPRequestHandler):
    """`/headers`: what arrived, as JSON. `/chunked`: three chunks and a trailer. `/until-close`. `/upgrade`: an echo
    tunnel. POST: the body comes back."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        match self.path:
            case "/chunked":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for part in (b"one", b"two", b"three"):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                    self.wfile.flush()
                self.wfile.write(b"0\r\nx-trailer: yes\r\n\r\n")
            case "/until-close":
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(b"to the end")
                self.close_connection = True
            case "/upgrade":
                self.send_response(101)
                self.send_header("Connection", "upgrade")
                self.send_header("Upgrade", "echo")
                self.end_headers()
                while data := self.rfile.read1(65536):  # type: ignore[attr-defined]
                    self.wfile.write(data)
                self.close_connection = True
            case _:
                self.answer(json.dumps([[k.lower(), v] for k, v in self.headers.items()]).encode())

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "12345")
        self.end_headers()

    def do_POST(self) -> None:
        self.answer(self.body())

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def http_server(listener: socket.socket, handler: type[BaseHTTPRequestHandler] = Telling) -> Iterator[None]:
    server = Server(("", 0), handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def http_client(io: socket.socket, host: str = "web") -> Iterator[http.client.HTTPConnection]:
    """An HTTP client on a connection that is there already."""
    with io:
        connection = http.client.HTTPConnection(host)
        connection.sock = io
        yield connection
        connection.close()


def echo(io: socket.socket) -> None:
    while data := io.recv(65536):
        io.sendall(data)


def greet(io: socket.socket) -> None:
    """A protocol in which the server speaks first."""
    io.sendall(b"220 hello\r\n")
    echo(io)


def self_signed(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS contexts of an application of its own: server and client."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "app.pem").write_bytes(
        pem
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "app.pem")
    client = ssl.create_default_context(cadata=pem.decode())
    return server, client


def tls_echo(context: ssl.SSLContext) -> Callable[[socket.socket], None]:
    def handle(io: socket.socket) -> None:
        with context.wrap_socket(io, server_side=True) as tls:
            echo(tls)

    return handle


# ---- crowds ----


def crowd(host: str, port: int, size: int) -> None:
    """Opens `size` connections and says nothing on them until its standard input ends. Prints how many came about."""
    _all_files()
    opened = []
    for _ in range(size):
        with contextlib.suppress(OSError):
            opened.append(socket.create_connection((host, port), 60))
    print(len(opened), flush=True)
    sys.stdin.read()


def hold(port: int) -> None:
    """Accepts whatever comes, says nothing and hangs up only after the other side has."""
    _all_files()
    listener = socket.create_server(("0.0.0.0", port), backlog=4096)
    print("ready", flush=True)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    selector.register(listener.accept()[0], selectors.EVENT_READ)
                else:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]


def _all_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ---- gRPC ----


def grpc_server(port: int) -> None:
    """`/test.Echo/Unary` answers with what it heard and the caller's identity; `/test.Echo/Both` echoes a stream and
    ends with NOT_FOUND and a trailer after `stop`; `/test.Echo/Slow` answers when the call before it was given up, and
    at once if that never came here."""
    import grpc

    begun, given_up = threading.Event(), threading.Semaphore(0)

    def identity(context: Any) -> bytes:
        return dict(context.invocation_metadata()).get("l5d-client-id", "nobody").encode()

    def unary(request: bytes, context: Any) -> bytes:
        return request + b" from " + identity(context)

    def both(requests: Any, context: Any) -> Iterator[bytes]:
        for request in requests:
            if request == b"stop":
                context.set_trailing_metadata((("x-trailer", "yes"),))
                context.abort(grpc.StatusCode.NOT_FOUND, "stopped")
            yield request

    def slow(request: bytes, context: Any) -> bytes:
        if request == b"never":
            over = threading.Event()
            begun.set()
            if context.add_callback(over.set):
                over.wait(60)
            given_up.release()
            return b""
        if not begun.is_set():
            return b"never begun"
        return b"given up" if given_up.acquire(timeout=30) else b"still waited for"

    server = grpc.server(ThreadPoolExecutor(8))
    handlers = {
        "Slow": grpc.unary_unary_rpc_method_handler(slow),
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Both": grpc.stream_stream_rpc_method_handler(both),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    server.add_insecure_port(f"0.0.0.0:{port}")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


def grpc_client(target: str, server_id: str) -> None:
    """Talks to `grpc_server`, whose proxy is `server_id`; prints what happened as JSON."""
    import grpc

    seen: dict[str, Any] = {}
    with grpc.insecure_channel(target) as channel:
        unary = channel.unary_unary("/test.Echo/Unary")
        both = channel.stream_stream("/test.Echo/Both")
        spoofed = (("l5d-client-id", "someone-else"),)
        seen["unary"] = [unary(b"hello %d" % n, timeout=60, metadata=spoofed).decode() for n in range(20)]
        echoed = []
        try:
            for answer in both(iter([b"one", b"x" * 300_000, b"stop"]), timeout=60):
                echoed.append(len(answer))
        except grpc.RpcError as error:
            seen["code"], seen["details"] = error.code().name, error.details()
            seen["trailer"] = dict(error.trailing_metadata()).get("x-trailer")
        seen["echoed"] = echoed
        try:
            channel.unary_unary("/test.Echo/Missing")(b"", timeout=60)
        except grpc.RpcError as error:
            seen["missing"] = error.code().name
        slow = channel.unary_unary("/test.Echo/Slow")
        seen["given up"] = []
        for seconds in (0.3, 3, 20):  # on a busy machine the time may be over before the call has come there
            try:
                slow(b"never", timeout=seconds)
            except grpc.RpcError as error:
                seen["slow"] = error.code().name
            seen["given up"].append(slow(b"was it?", timeout=60).decode())
            if seen["given up"][-1] != "never begun":
                break
        seen["required"] = {}
        for name in (server_id, "somebody-else"):
            try:
                unary(b"", timeout=60, metadata=(("l5d-require-id", name),))
                seen["required"][name] = "OK"
            except grpc.RpcError as error:
                seen["required"][name] = error.code().name
    print(json.dumps(seen))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["grpc-server", port]:
            grpc_server(int(port))
        case ["grpc-client", target, server_id]:
            grpc_client(target, server_id)
        case ["crowd", host, port, size]:
            crowd(host, int(port), int(size))
        case ["hold", port]:
            hold(int(port))
