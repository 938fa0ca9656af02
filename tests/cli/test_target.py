"""Which platform a command means, and the views of a cluster: real requests to an API server that exists only here."""

from __future__ import annotations

import base64
import json
import ssl
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from certificates import Certificate
from click.testing import CliRunner, Result

from mantle.cli import machine_client
from mantle.cli.main import cli

ROOT = "/apis/tap.mantle.dev/v1alpha1"
FORBIDDEN = {
    "kind": "Status",
    "code": 403,
    "reason": "Forbidden",
    "message": 'pods.tap.mantle.dev "-" is forbidden: User "alice" cannot watch resource "pods/tap" in API group '
    '"tap.mantle.dev" in the namespace "emojivoto"',
}


class ApiServer(ThreadingHTTPServer):
    """Answers views, and tap as two events; keeps (method, path, query or body, headers, client's name)."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, list[str]]] = []
        self.clients: list[str] = []
        self.status: tuple[int, Any] | None = None
        self.ca = Certificate("a cluster's CA")
        server = Certificate("kube.example", self.ca)
        server.write(directory / "server.pem")
        (directory / "ca.pem").write_bytes(self.ca.pem)
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "server.pem")
        context.load_verify_locations(directory / "ca.pem")
        context.verify_mode = ssl.CERT_OPTIONAL
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.keep("GET", url.path, dict(parse_qsl(url.query)))
        view = url.path.rpartition("/")[2]
        config = {"data": {"values": json.dumps({"version": "9.9"})}}
        self.answer(200, {"edges": {"edges": []}, "stat": {"rows": []}, "mantle-config": config}.get(view, {}))

    def do_POST(self) -> None:
        self.keep("POST", self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer(200, {"notice": {"pod": "emojivoto/web-1", "message": "gone"}})

    def keep(self, *asked: Any) -> None:
        self.server.asked.append(asked)
        self.server.headers.append({name: self.headers.get_all(name) or [] for name in self.headers})
        assert isinstance(self.connection, ssl.SSLSocket)
        shown: Any = self.connection.getpeercert() or {"subject": [[("", "")]]}
        self.server.clients.append(shown["subject"][0][0][1])

    def answer(self, status: int, body: Any) -> None:
        status, body = self.server.status or (status, body)
        data = (body if isinstance(body, str) else json.dumps(body)).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """An API server, no mesh on this machine, and $KUBECONFIG a file `config` with the context `dev`."""
    monkeypatch.setattr(machine_client, "state_root", lambda: tmp_path / "no-meshes")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with ApiServer(tmp_path) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        write(tmp_path / "config", found, user={"token": "t0ken"})
        yield found
        found.shutdown()
        thread.join()


def write(
    path: Path,
    server: ApiServer,
    *,
    user: Any = None,
    context: Any = None,
    name: str = "dev",
    current: str | None = None,
    cluster: Any = None,
) -> None:
    """A kubeconfig with one context; YAML is a superset of JSON."""
    ca = {"certificate-authority-data": base64.b64encode(server.ca.pem).decode()}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name if current is None else current,
        "clusters": [{"name": "c", "cluster": {"server": server.url, **ca, **(cluster or {})}}],
        "users": [{"name": "u", "user": user or {}}],
        "contexts": [{"name": name, "context": {"cluster": "c", "user": "u", **(context or {})}}],
    }
    path.write_text(json.dumps(document))


def mantle(*words: str) -> Result:
    return CliRunner().invoke(cli, [word for text in words for word in text.split()], prog_name="mantle")


def test_without_a_mesh_here_the_current_kubeconfig_is_meant_and_said(server: ApiServer) -> None:
    ended = mantle("edges deploy -n emojivoto")
    assert (ended.exit_code, ended.stdout) == (0, "No edges found.\n")
    assert ended.stderr == f"cluster {server.url} (context dev)\n"
    query = {"resource": "deployment", "window": "300"}
    assert server.asked == [("GET", f"{ROOT}/namespaces/emojivoto/edges", query)]
    assert server.headers[0]["Authorization"] == ["Bearer t0ken"]


def test_programs_that_read_json_are_not_disturbed(server: ApiServer) -> None:
    ended = mantle("edges deploy -o json")
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_the_contexts_namespace_is_the_default_and_A_means_all(server: ApiServer, tmp_path: Path) -> None:
    write(tmp_path / "config", server, context={"namespace": "emojivoto"})
    mantle("stat deploy"), mantle("stat deploy -n other"), mantle("stat deploy -A"), mantle("stat ns")
    assert [path.removeprefix(ROOT) for _, path, _ in server.asked] == [
        "/namespaces/emojivoto/stat",
        "/namespaces/other/stat",
        "/stat",
        "/stat",
    ]


def test_tap_watches_below_watch_so_that_rbac_sees_the_verb(server: ApiServer) -> None:
    ended = mantle("tap deploy/web -n emojivoto --path /api -l app=web,tier!=db")
    assert ended.exit_code == 0
    assert ended.stderr.endswith("warning: emojivoto/web-1: gone\n")
    for line in ("tap po -n emojivoto", "tap ns/emojivoto", "tap ns -n emojivoto", "tap deploy -A", "top ns -A"):
        mantle(line)
    assert [path.removeprefix(ROOT) for _, path, _ in server.asked] == [
        "/watch/namespaces/emojivoto/deployments/web/tap",
        "/watch/namespaces/emojivoto/pods/-/tap",
        "/watch/namespaces/emojivoto/namespaces/emojivoto/tap",
        "/watch/namespaces/emojivoto/namespaces/emojivoto/tap",
        "/watch/deployments/-/tap",
        "/watch/namespaces/-/tap",
    ]
    body = server.asked[0][2]
    assert (body["path"], body["selector"], "target" in body) == ("/api", "app=web,tier!=db", False)


@pytest.mark.parametrize(
    "line",
    [
        "edges deploy --context two --as alice --as-group devs --as-group ops",
        "--context two --as alice --as-group devs edges deploy --as-group ops",
        "--context dev edges --as-group devs deploy --context two --as bob --as-group ops --as alice",
    ],
)
def test_context_and_impersonation_before_or_after_the_command(
    line: str, server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "two", server, name="two")
    files = tmp_path / "config", tmp_path / "missing", tmp_path / "two"
    monkeypatch.setenv("KUBECONFIG", ":".join(map(str, files)))
    ended = mantle(line)
    assert ended.stderr == f"cluster {server.url} (context two, as alice)\n"
    headers = server.headers[0]
    assert (headers["Impersonate-User"], sorted(set(headers["Impersonate-Group"]))) == (["alice"], ["devs", "ops"])
    assert "Authorization" in headers  # the user `u` of the first file: the first one that has a name wins


def test_a_mesh_on_this_machine_comes_before_the_kubeconfig(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_client, "running_meshes", lambda _root: ["default"])
    assert mantle("edges deploy").stderr.startswith("mesh default on this machine\n")
    assert mantle("edges deploy --context dev").stderr.startswith("cluster ")
    monkeypatch.setenv("MANTLE_MESH", "default")
    assert mantle("edges deploy").stderr.startswith("mesh default on this machine\n")
    assert mantle("edges deploy --context dev").stderr.startswith("cluster ")  # a flag outweighs the environment


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("edges deploy --mesh a --context b", "--mesh is a mesh of this machine and --context a cluster"),
        ("--kubeconfig x edges deploy --mesh a", "--mesh is a mesh of this machine and --kubeconfig a cluster"),
        ("edges deploy --as-group devs", "--as-group needs --as USER"),
        ("edges deploy -l a=(", "--selector: the selector has 'a=('"),
        ("tap deploy/web -A", "a resource cannot be named across all namespaces: leave out web, or -A"),
        ("up a.yml --context dev", "on a cluster use `kubectl apply -f FILE`"),
    ],
)
def test_contradictions_are_usage_errors(line: str, said: str, server: ApiServer) -> None:
    ended = mantle(line)
    assert ended.exit_code == 2
    assert said in ended.stderr
    assert server.asked == []


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (403, FORBIDDEN, "user 'alice' may not watch pods/tap in API group tap.mantle.dev in namespace emojivoto\n"
         "  fix: somebody who may grant rights gives it with: kubectl create rolebinding alice-mantle-viz-tap-admin "
         "-n emojivoto --clusterrole=mantle-viz-tap-admin --user=alice\n"),
        (401, {"kind": "Status", "message": "Unauthorized"}, "does not accept the credentials of context 'dev'"),
        (404, "404 page not found", "does not serve tap.mantle.dev: Mantle is not installed"),
        (503, "service unavailable", "kubectl get apiservice v1alpha1.tap.mantle.dev"),
        (404, {"errors": [{"message": "no pods to tap", "fix": "choose"}]}, "error: no pods to tap\n  fix: choose\n"),
        (500, {"kind": "Status", "message": "boom"}, "answered 500: boom"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(status: int, body: Any, said: str, server: ApiServer) -> None:
    server.status = (status, body)
    ended = mantle("tap po -n emojivoto")
    assert ended.exit_code == 1
    assert said in ended.stderr


def test_a_client_certificate_from_data_or_from_files_beside_the_kubeconfig(server: ApiServer, tmp_path: Path) -> None:
    client = Certificate("bob", server.ca)
    data = {"client-certificate-data": client.pem, "client-key-data": client.key_pem}
    write(tmp_path / "config", server, user={k: base64.b64encode(v).decode() for k, v in data.items()})
    assert mantle("edges deploy").exit_code == 0
    (tmp_path / "bob.crt").write_bytes(client.pem)
    (tmp_path / "bob.key").write_bytes(client.key_pem)
    write(tmp_path / "config", server, user={"client-certificate": "bob.crt", "client-key": "bob.key"})
    assert mantle("edges deploy").exit_code == 0
    assert server.clients == ["bob", "bob"]


def test_a_token_file_and_a_credential_plugin(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("from-a-file\n")
    write(tmp_path / "config", server, user={"tokenFile": "token"})
    assert mantle("edges deploy").exit_code == 0
    plugin = tmp_path / "login"
    plugin.write_text(
        '#!/bin/sh\necho "$KUBERNETES_EXEC_INFO" > info.json\n'
        'echo "{\\"kind\\":\\"ExecCredential\\",\\"status\\":{\\"token\\":\\"$WHO-$1\\"}}"\n'
    )
    plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
    exec_ = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "./login",
        "args": ["x"],
        "env": [{"name": "WHO", "value": "carol"}],
        "provideClusterInfo": True,
    }
    write(tmp_path / "config", server, user={"exec": exec_})
    monkeypatch.chdir(tmp_path)
    assert mantle("edges deploy").exit_code == 0
    assert [h["Authorization"] for h in server.headers] == [["Bearer from-a-file"], ["Bearer carol-x"]]
    assert json.loads((tmp_path / "info.json").read_text())["spec"]["cluster"]["server"] == server.url
    write(tmp_path / "config", server, user={"exec": {**exec_, "command": "no-such-login", "installHint": "get it"}})
    ended = mantle("edges deploy")
    assert "plugin 'no-such-login' of context 'dev' is not installed\n  fix: get it\n" in ended.stderr


def test_the_servers_certificate_is_checked(server: ApiServer, tmp_path: Path) -> None:
    other = base64.b64encode(Certificate("another CA").pem).decode()
    write(tmp_path / "config", server, cluster={"certificate-authority-data": other})
    ended = mantle("edges deploy")
    assert (ended.exit_code, server.asked) == (1, [])
    assert f"the API server {server.url} is not who context 'dev' expects: " in ended.stderr
    write(tmp_path / "config", server, cluster={"tls-server-name": "kube.example"})
    assert mantle("edges deploy").exit_code == 0
    write(tmp_path / "config", server, cluster={"tls-server-name": "wrong.example"})
    assert "wrong.example" in mantle("edges deploy").stderr
    write(tmp_path / "config", server, cluster={"certificate-authority-data": "", "insecure-skip-tls-verify": True})
    assert mantle("edges deploy").exit_code == 0


def test_all_mistakes_of_a_context_at_once(server: ApiServer, tmp_path: Path) -> None:
    user = {"client-certificate": "gone.crt", "auth-provider": {"name": "gcp"}, "exec": {"apiVersion": "v1"}}
    write(tmp_path / "config", server, user=user, cluster={"proxy-url": "http://p:1", "server": "kube.example"})
    ended = mantle("edges deploy")
    for said in ("has proxy-url", "has auth-provider", "gone.crt cannot be read", "exec has no command", "HOST:PORT"):
        assert said in ended.stderr
    assert (ended.exit_code, ended.stderr.count("error: ")) == (1, 5)


def test_what_is_no_configuration(server: ApiServer, tmp_path: Path) -> None:
    assert "there is no context 'nope'\n  fix: use one of: dev\n" in mantle("edges deploy --context nope").stderr
    assert f"there is no file {tmp_path / 'x'}" in mantle(f"edges deploy --kubeconfig {tmp_path / 'x'}").stderr
    (tmp_path / "bad").write_text("a: [")
    assert "bad is not YAML" in mantle(f"edges deploy --kubeconfig {tmp_path / 'bad'}").stderr
    write(tmp_path / "config", server, current="")
    assert "no context is current\n  fix: choose one with --context; there are: dev" in mantle("edges deploy").stderr
    (tmp_path / "config").unlink()
    assert "no mesh is running on this machine, and no kubeconfig names a cluster" in mantle("edges deploy").stderr


def test_a_server_that_is_not_there(server: ApiServer, tmp_path: Path) -> None:
    write(tmp_path / "config", server, cluster={"server": "https://127.0.0.1:1"})
    ended = mantle("edges deploy")
    assert "the API server https://127.0.0.1:1 (context 'dev') does not answer: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_version_of_a_cluster(server: ApiServer) -> None:
    said = mantle("version").stdout
    assert "Mesh version: 9.9 (context dev)\nThe mesh was installed by another version: `mantle upgrade`" in said
    found = json.loads(mantle("version -o json --context dev").stdout)["mesh"]
    assert found == {"name": "dev", "version": "9.9", "platform": "cluster"}
    server.status = (403, FORBIDDEN)
    assert "Mesh version: unavailable\n" in mantle("version").stdout
    assert mantle("version --context dev").exit_code == 1
    server.status = (404, {"kind": "Status", "message": "not found"})
    assert "Mesh version: unavailable\n" in mantle("version --context dev").stdout
