"""Requests to a Kubernetes API server as the CLI makes them: few, with the standard library only.

Importing a client library costs a command more than its whole time to start, and nothing here watches or caches. Every
failure is a `Failure` that names what the server said. What a request means is the caller's; the views of the mesh are
in `target.py`.

Questions follow each other on a connection that is kept, as its handshake costs more than most answers. The server may
end it at any moment: such a question is asked once more, on a new one. What changes something must not be sent twice,
so it has a connection of its own.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import mantle
from mantle.cli.kubeconfig import Access, Plugin
from mantle.cli.output import Failure

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0
PLUGIN_SECONDS = 120.0
"""A credential plugin may open a browser and wait for its user."""
KEPT_SECONDS = 10.0
"""An idle connection is used again within this time: what lies between may forget it without a word after a while."""
REVIEWS = "/apis/authorization.k8s.io/"
"""What is posted there is a question, too: nothing is stored."""
ENDED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""How a connection shows that its server has ended it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back when it was not what was wanted."""

    status: int
    reason: str
    """The word of the API server's `Status` object: `Forbidden`, `NotFound`, …; empty if there was none."""
    message: str
    body: Any


class Refused(Exception):
    """The server answered with an error; `answer` says which."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.message)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    target: str
    headers: list[tuple[str, str]]
    payload: bytes | None
    timeout: float | None

    def is_question(self) -> bool:
        """Whether it may be sent twice."""
        return self.method == "GET" or REVIEWS in self.target


class KubeClient:
    """A client of one API server with one set of credentials."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._context: ssl.SSLContext | None = None
        self._ready: Access | None = None
        self._idle: list[tuple[float, HTTPConnection]] = []
        """At most one, with the time since when (`time.monotonic`): its last answer was read to its end."""
        weakref.finalize(self, _close, self._idle)

    def get(self, path: str, query: Mapping[str, str | int] | None = None) -> Any:
        """The decoded JSON answer of a GET. Raises `Refused` for an error answer, `Failure` if there is none."""
        return self.request("GET", path, query)

    def request(self, method: str, path: str, query: Mapping[str, str | int] | None = None, body: Any = None) -> Any:
        """As `get`, with a method and a JSON body."""
        with self.answer(method, path, query, body, ANSWER_SECONDS) as response:
            try:
                data = response.read()
                return _decoded(data) if data else None
            except (OSError, HTTPException, ValueError) as error:
                raise Failure(f"{self.access.server} gave an answer that cannot be read: {error}") from error

    def text(self, path: str, query: Mapping[str, str | int] | None = None) -> str:
        """The text of a GET, whatever its type."""
        with self.answer("GET", path, query, None, ANSWER_SECONDS) as response:
            return response.read().decode("utf-8", "replace")

    def lines(self, method: str, path: str, body: Any = None) -> Iterator[Any]:
        """The objects of an NDJSON answer, each as it comes; closing the iterator ends the request."""
        with self.answer(method, path, None, body, None) as response:
            try:
                for line in response:
                    if line.strip():
                        yield json.loads(line)
            except (OSError, HTTPException, ValueError) as error:
                raise Failure(f"the stream from {self.access.server} broke off: {error}") from error

    @contextmanager
    def answer(
        self, method: str, path: str, query: Mapping[str, str | int] | None, body: Any, timeout: float | None
    ) -> Iterator[HTTPResponse]:
        """A good answer, closed afterwards."""
        access = self._with_credentials()
        payload = None if body is None else json.dumps(body).encode()
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        target = urlsplit(access.server).path.rstrip("/") + path + (f"?{urlencode(query)}" if query else "")
        headers = _headers(access, kind if payload is not None else None)
        try:
            connection, response = self._send(access, _Request(method, target, headers, payload, timeout))
        except ssl.SSLError as error:
            raise Failure(
                f"the API server {access.server} is not who context {access.context!r} expects: "
                f"{getattr(error, 'verify_message', '') or error.reason or error}",
                fix="check server, certificate-authority and tls-server-name of the kubeconfig",
            ) from error
        except (OSError, HTTPException) as error:
            raise Failure(
                f"the API server {access.server} (context {access.context!r}) does not answer: {error}",
                fix="check that the cluster runs, or choose another with --context",
            ) from error
        try:
            if response.status >= 400:
                raise Refused(_answer(response.status, response.read()))
            yield response
        finally:
            end_was_read = response.isclosed()
            if end_was_read and not response.will_close and not self._idle:
                self._idle.append((time.monotonic(), connection))
            else:
                response.close()
                connection.close()

    def _send(self, access: Access, request: _Request) -> tuple[HTTPConnection, HTTPResponse]:
        """The head of the answer, and the connection it comes on. Raises what the connection does."""
        if request.is_question() and (kept := self._kept()) is not None:
            with suppress(*ENDED):
                return kept, _exchange(kept, request)
        connection = self._connection(access)
        return connection, _exchange(connection, request)

    def _kept(self) -> HTTPConnection | None:
        while self._idle:
            since, connection = self._idle.pop()
            if time.monotonic() - since < KEPT_SECONDS:
                return connection
            connection.close()
        return None

    def _with_credentials(self) -> Access:
        """The access with what its credential plugin gave, asked once."""
        if self._ready is None:
            plugin = self.access.plugin
            has_own = self.access.token or self.access.token_file or self.access.certificate
            self._ready = self.access if plugin is None or has_own else _ask(plugin, self.access)
        return self._ready

    def _connection(self, access: Access) -> HTTPConnection:
        url = urlsplit(access.server)
        if url.scheme == "http":
            return HTTPConnection(url.hostname or "", url.port or 80, timeout=CONNECT_SECONDS)
        if self._context is None:
            self._context = _tls(access)
        return _NamedConnection(
            url.hostname or "", url.port or 443, timeout=CONNECT_SECONDS, context=self._context,
            name=access.tls_server_name or url.hostname or "",
        )  # fmt: skip


def _decoded(data: bytes) -> Any:
    """Any JSON. An object of somebody's may be nested by the thousand where nobody looks (`managedFields`)."""
    try:
        return json.loads(data)
    except RecursionError:
        from mantle.platform.kubernetes.reading import shallow

        return json.loads(shallow(data))


class _NamedConnection(HTTPSConnection):
    """HTTPS whose certificate must be for `name`, whatever the address (kubeconfig's `tls-server-name`)."""

    def __init__(self, *args: Any, name: str, context: ssl.SSLContext, **kwargs: Any) -> None:
        super().__init__(*args, context=context, **kwargs)
        self._name, self._tls = name, context

    def connect(self) -> None:
        HTTPConnection.connect(self)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._name)


def _exchange(connection: HTTPConnection, request: _Request) -> HTTPResponse:
    """Sends a request and reads the head of its answer. A connection on which that fails is closed."""
    try:
        if connection.sock is None:
            connection.connect()
        connection.sock.settimeout(request.timeout)
        connection.putrequest(request.method, request.target)
        for name, value in request.headers:
            connection.putheader(name, value)
        if request.payload is not None:
            connection.putheader("Content-Length", str(len(request.payload)))
        connection.endheaders(request.payload)
        return connection.getresponse()
    except BaseException:
        connection.close()
        raise


def _close(idle: list[tuple[float, HTTPConnection]]) -> None:
    for _, connection in idle:
        connection.close()


def _tls(access: Access) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=_pem_text(access.ca) if access.ca else None)
    if access.insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if access.certificate and access.key:
        # OpenSSL reads files only. This one is memory without a name in any directory.
        with os.fdopen(os.memfd_create("mantle", os.MFD_CLOEXEC), "wb") as file:
            file.write(access.certificate + b"\n" + access.key)
            file.flush()
            try:
                context.load_cert_chain(f"/proc/self/fd/{file.fileno()}", password=_no_password)
            except (ssl.SSLError, ValueError) as error:
                raise Failure(
                    f"the client certificate of context {access.context!r} cannot be used: {error}",
                    fix="client-certificate and client-key must be PEM without a password, and belong together",
                ) from error
    return context


def _no_password() -> str:
    raise ValueError("the key has a password")


def _pem_text(pem: bytes) -> str:
    try:
        return pem.decode("ascii")
    except UnicodeDecodeError as error:
        raise Failure("certificate-authority is not PEM", fix="give it a PEM file") from error


def _headers(access: Access, body_type: str | None) -> list[tuple[str, str]]:
    headers = [("Accept", "application/json"), ("User-Agent", f"mantle/{mantle.__version__}")]
    if body_type is not None:
        headers.append(("Content-Type", body_type))
    token = access.token
    if access.token_file is not None:
        try:
            token = access.token_file.read_text().strip()
        except OSError as error:
            raise Failure(f"the token file {access.token_file} cannot be read: {error.strerror}") from error
    if token:
        headers.append(("Authorization", f"Bearer {token}"))
    elif access.basic is not None:
        encoded = base64.b64encode(":".join(access.basic).encode()).decode()
        headers.append(("Authorization", f"Basic {encoded}"))
    acting = access.acting_as
    if acting.user:
        headers.append(("Impersonate-User", acting.user))
    headers += [("Impersonate-Group", group) for group in acting.groups]
    if acting.uid:
        headers.append(("Impersonate-Uid", acting.uid))
    headers += [(f"Impersonate-Extra-{quote(key, safe='')}", value) for key, value in acting.extra]
    return headers


def _ask(plugin: Plugin, access: Access) -> Access:
    """The access with the credentials of a plugin. Raises `Failure`.

    Source: https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins
    """
    spec: dict[str, Any] = {"interactive": os.isatty(0)}
    if plugin.provide_cluster_info:
        spec["cluster"] = {
            "server": access.server,
            **({"tls-server-name": access.tls_server_name} if access.tls_server_name else {}),
            **({"insecure-skip-tls-verify": True} if access.insecure else {}),
            **({"certificate-authority-data": base64.b64encode(access.ca).decode()} if access.ca else {}),
            **({"config": plugin.config} if plugin.config is not None else {}),
        }
    info = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": spec}
    environment = {**os.environ, **dict(plugin.env), "KUBERNETES_EXEC_INFO": json.dumps(info)}
    what = f"the credential plugin {plugin.command!r} of context {access.context!r}"
    try:
        run = subprocess.run(
            [plugin.command, *plugin.args], env=environment, stdout=subprocess.PIPE, timeout=PLUGIN_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise Failure(f"{what} is not installed", fix=plugin.install_hint or "install it, or put it on PATH") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(f"{what} could not be run: {error}") from error
    if run.returncode != 0:
        raise Failure(f"{what} ended with {run.returncode}", fix="see what it printed above; log in again")
    try:
        status = json.loads(run.stdout)["status"]
        token, certificate, key = (
            str(status.get(name) or "") for name in ("token", "clientCertificateData", "clientKeyData")
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{what} did not print an ExecCredential with a status") from error
    if not token and not (certificate and key):
        raise Failure(f"{what} gave neither a token nor a client certificate with its key")
    return replace(access, token=token, certificate=certificate.encode() or None, key=key.encode() or None)


def _answer(status: int, data: bytes) -> Answer:
    """An error answer: the API server's `Status`, or whatever came."""
    try:
        body = json.loads(data)
    except ValueError:
        return Answer(status, "", data.decode("utf-8", "replace").strip() or f"status {status}", None)
    if not isinstance(body, dict):
        return Answer(status, "", f"status {status}", body)
    return Answer(status, str(body.get("reason") or ""), str(body.get("message") or f"status {status}"), body)
