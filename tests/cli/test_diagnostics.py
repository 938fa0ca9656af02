"""`mantle diagnostics` and `mantle identity` of a cluster: what they ask, what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from certificates import Certificate
from click.testing import CliRunner, Result

from mantle.cli import target
from mantle.cli.controller_metrics import ADMIN_PORTS
from mantle.cli.kube_client import Answer, Refused
from mantle.cli.main import cli
from mantle.cli.output import Failure
from mantle.cli.target import Cluster
from mantle.core.annotations import LABEL_COMPONENT
from mantle.manifests.config import InstallValues
from mantle.manifests.render import TrustMaterial, install_objects

ENDPOINT = {
    "namespace": "emojivoto",
    "ip": "10.0.0.1",
    "port": 8080,
    "pod": "web-1",
    "service": "web-svc",
    "identity": "web.emojivoto.serviceaccount.identity.mantle.cluster.local",
    "opaque_transport_port": 4143,
}
PLAIN = {**ENDPOINT, "ip": "10.0.0.2", "pod": "", "identity": None, "opaque_transport_port": None}
TRANSPARENT = {**ENDPOINT, "ip": "10.0.0.3", "pod": "web-3", "opaque_transport_port": None}


class FakeViews:
    """Answers by view; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}

    def get(self, view: str, namespace: str | None, **query: Any) -> Any:
        self.asked.append((view, namespace, query))
        if query.get("authority", "").startswith("nope"):
            raise Failure("there is no service port", fix="see the services")
        return self.answers[view]


class FakeAccess:
    namespace, server, context = "from-context", "https://kube", "dev"


class FakeClient:
    access = FakeAccess()


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> FakeViews:
    found = FakeViews()
    monkeypatch.setattr(Cluster, "__str__", lambda _self: "a cluster")
    monkeypatch.setattr(target, "_target", lambda _flags: Cluster(FakeClient(), found))  # type: ignore[arg-type]
    return found


def mantle(line: str) -> Result:
    return CliRunner().invoke(cli, line.split(), prog_name="mantle")


def test_endpoints_with_who_must_be_there(views: FakeViews) -> None:
    views.answers["endpoints"] = {"endpoints": [ENDPOINT, PLAIN, TRANSPARENT]}
    ended = mantle("diagnostics endpoints web-svc.emojivoto:80")
    assert ended.stdout == (
        "NAMESPACE   IP         PORT   POD     SERVICE\n"
        "emojivoto   10.0.0.1   8080   web-1   web-svc\n"
        "emojivoto   10.0.0.2   8080   -       web-svc\n"
        "emojivoto   10.0.0.3   8080   web-3   web-svc\n"
    )
    assert views.asked == [("endpoints", "emojivoto", {"authority": "web-svc.emojivoto:80"})]
    mantle("diagnostics endpoints web-svc:80 -n emojivoto")
    mantle("diagnostics endpoints web-svc:80 web-svc.other.svc.cluster.local:80")
    assert [(namespace, query["authority"]) for _, namespace, query in views.asked[1:]] == [
        ("emojivoto", "web-svc.emojivoto:80"),
        ("from-context", "web-svc.from-context:80"),
        ("other", "web-svc.other.svc.cluster.local:80"),
    ]
    wide = mantle("diagnostics endpoints web-svc.emojivoto:80 -o wide").stdout.splitlines()
    assert [line.split()[5:] for line in wide[1:]] == [
        ["web.emojivoto", "link", "to", "4143"], ["-", "plaintext"], ["web.emojivoto", "TLS"]
    ]  # fmt: skip


def test_one_name_that_is_wrong_does_not_hide_the_others(views: FakeViews) -> None:
    views.answers["endpoints"] = {"endpoints": [ENDPOINT]}
    ended = mantle("diagnostics endpoints nope.a:1 web-svc.emojivoto:80")
    assert ended.exit_code == 1
    assert "web-1" in ended.stdout
    assert "error: there is no service port\n  fix: see the services\n" in ended.stderr


def test_policy_of_pods_as_yaml_and_json(views: FakeViews) -> None:
    views.answers["policies"] = {
        "pods": [
            {"namespace": "emojivoto", "pod": "web-1", "inbound": {"protocol": {"detect": {"timeout": "10s"}}}},
            {"namespace": "emojivoto", "pod": "web-2", "error": "gone"},
        ]
    }
    ended = mantle("-n emojivoto diagnostics policy deploy/web 8080 -l app=web")
    assert ended.stdout.startswith("emojivoto/web-1:\n  protocol:\n    detect: {timeout: 10s}\nemojivoto/web-2:")
    query = {"resource": "deployment", "name": "web", "port": 8080, "selector": "app=web"}
    assert views.asked == [("policies", "emojivoto", query)]
    found = json.loads(mantle("diagnostics policy po/web-1 8080 -o json").stdout)
    assert found["emojivoto/web-2"] == {"error": "gone"}
    assert views.asked[-1][1] == "from-context"


def test_metrics_with_a_head_for_each_pod_and_the_missing_ones_named(views: FakeViews) -> None:
    views.answers["proxymetrics"] = {
        "pods": [
            {"namespace": "emojivoto", "pod": "web-1", "text": "# TYPE up gauge\nup 1\n"},
            {"namespace": "emojivoto", "pod": "web-2", "error": "no answer"},
        ]
    }
    ended = mantle("diagnostics proxy-metrics deploy/web -A")
    assert ended.stdout == (
        "#\n# POD web-1 (1 of 2)\n#\n# TYPE up gauge\nup 1\n#\n# POD web-2 (2 of 2)\n#\n# no answer\n"
    )
    assert (ended.exit_code, views.asked[0][1]) == (1, None)
    assert "error: emojivoto/web-2: no answer\n" in ended.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("diagnostics endpoints web-svc", "write NAME.NAMESPACE:PORT"),
        ("diagnostics endpoints web-svc.:80", "write NAME.NAMESPACE:PORT"),
        ("diagnostics endpoints a.b:1 -l x", "--selector is not possible here"),
        ("diagnostics policy deploy/web", "end with a port"),
        ("diagnostics policy svc 80", "name one service"),
        ("diagnostics policy deploy/web 8080 -o table", "use one of: yaml, json"),
        ("diagnostics nothing", "No such command 'nothing'"),
        ("identity", "name a pod or a workload, or select pods with -l"),
    ],
)
def test_usage(line: str, said: str, views: FakeViews) -> None:
    ended = mantle(line)
    assert (ended.exit_code, views.asked) == (2, [])
    assert said in ended.stderr


def test_the_certificates_of_a_cluster_come_through_viz(views: FakeViews, tmp_path: Path) -> None:
    shown = Certificate("web.emojivoto.serviceaccount.identity.mantle.cluster.local")
    row = {"namespace": "emojivoto", "pod": "web-1", "pem": shown.pem.decode()}
    views.answers["certificates"] = {"certificates": [row]}
    ended = mantle("identity web-1 -n emojivoto")
    assert "POD web-1 (1 of 1)" in ended.stdout
    assert "CN=web.emojivoto.serviceaccount.identity.mantle.cluster.local" in ended.stdout
    assert mantle("identity web-1 -n emojivoto --pem").stdout == row["pem"]
    mantle("identity deploy -A"), mantle("identity -l app=web"), mantle("identity ns/other")
    assert [(namespace, query) for _, namespace, query in views.asked[2:]] == [
        (None, {"resource": "deployment", "name": ""}),
        ("from-context", {"resource": "pod", "name": "", "selector": "app=web"}),
        ("other", {"resource": "namespace", "name": ""}),
    ]
    views.answers["certificates"] = {"certificates": [row, {"namespace": "a", "pod": "b", "error": "no answer"}]}
    for line in ("identity po", "identity po -o json"):
        ended = mantle(line)
        assert (ended.exit_code, ended.stdout) == (1, "")
        assert "error: a/b: no answer\n" in ended.stderr


def test_the_certificates_of_several_pods(views: FakeViews) -> None:
    shown = Certificate("web.emojivoto.serviceaccount.identity.mantle.cluster.local")
    row = {"namespace": "emojivoto", "pod": "web-1", "pem": shown.pem.decode()}
    views.answers["certificates"] = {"certificates": [row]}
    ended = mantle("identity web-1 pod/web-2 deploy/emoji -n emojivoto")
    assert [line for line in ended.stdout.splitlines() if line.startswith("POD ")] == [
        f"POD web-1 ({number} of 3)" for number in (1, 2, 3)
    ]
    assert [query["resource"] + "/" + query["name"] for _, _, query in views.asked] == [
        "pod/web-1",
        "pod/web-2",
        "deployment/emoji",
    ]
    assert mantle("identity deploy web -n emojivoto").exit_code == 0
    assert views.asked[-1][2] == {"resource": "deployment", "name": "web"}


# ---- controller-metrics ----


class ControlPlane:
    """An API server with pods of a control plane; `answers` by the pod's name."""

    access = FakeAccess()

    def __init__(self, answers: dict[str, str | Refused | Failure]) -> None:
        self.answers = answers

    def get(self, path: str, query: dict[str, str] | None = None) -> Any:
        if path == "/api/v1/namespaces":
            return {"items": [{"metadata": {"name": "mesh"}}]}
        assert (path, query) == ("/api/v1/namespaces/mesh/pods", {"labelSelector": LABEL_COMPONENT})
        return {
            "items": [
                {
                    "metadata": {"name": name, "labels": {LABEL_COMPONENT: name.split("-")[1]}},
                    "status": {"phase": "Failed" if name.endswith("-old") else "Running"},
                }
                for name in self.answers
            ]
        }

    def text(self, path: str) -> str:
        name, port = path.removeprefix("/api/v1/namespaces/mesh/pods/").removesuffix("/proxy/metrics").split(":")
        assert int(port) == ADMIN_PORTS[name.split("-")[1]]
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer


def asked(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], *args: str) -> Result:
    monkeypatch.setattr(Cluster, "__str__", lambda _self: "a cluster")
    made = Cluster(ControlPlane(answers), FakeViews())  # type: ignore[arg-type]
    monkeypatch.setattr(target, "_target", lambda _flags: made)
    return CliRunner().invoke(cli, ["diagnostics", *args])


def test_the_metrics_of_each_component_with_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"mantle-identity-1": "# HELP a\na 1\n", "mantle-viz-2": "b 2\x1b\n", "mantle-ca-old": ""}
    result = asked(monkeypatch, answers, "controller-metrics")
    assert result.exit_code == 0
    assert result.stdout == (
        "#\n# POD mantle-identity-1 (1 of 2)\n# CONTAINER identity\n#\n# HELP a\na 1\n"
        "#\n# POD mantle-viz-2 (2 of 2)\n# CONTAINER viz\n#\nb 2\\x1b\n"
    )
    as_json = asked(monkeypatch, answers, "cp-metrics", "-n", "mesh", "-o", "json")
    assert json.loads(as_json.stdout)["mesh/mantle-identity-1/identity"] == "# HELP a\na 1\n"


def test_a_component_that_does_not_answer_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    denied = Refused(Answer(403, "Forbidden", "pods is forbidden", None))
    answers = {"mantle-identity-1": denied, "mantle-destination-1": Failure("it is gone"), "mantle-viz-2": "b 2\n"}
    result = asked(monkeypatch, answers, "controller-metrics")
    assert "# CONTAINER viz\n#\nb 2\n" in result.stdout
    assert result.exit_code == 1
    assert "mesh/mantle-identity-1: pods is forbidden" in result.stderr
    assert "this needs `get` on pods/proxy in namespace mesh" in result.stderr
    assert "mesh/mantle-destination-1: it is gone" in result.stderr


def test_admin_ports_are_those_of_the_manifests() -> None:
    objects = install_objects(InstallValues(tls="optional"), TrustMaterial("-"))
    found = {
        container["name"]: port["containerPort"]
        for obj in objects
        if obj["kind"] == "Deployment"
        for container in obj["spec"]["template"]["spec"]["containers"]
        for port in container.get("ports", [])
        if port["name"] == "admin"
    }
    assert found == ADMIN_PORTS
