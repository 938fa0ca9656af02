"""`mantle inject` as a person runs it: text in, text out, the report on standard error."""

import contextlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from manifest_play import WEB
from ruamel.yaml import YAML

from mantle.cli import documents
from mantle.cli.inject import command
from mantle.cli.main import Globals


def inject(stdin: str, *arguments: str, flags: Globals | None = None) -> Result:
    return CliRunner().invoke(
        command, [*(arguments or ("-",))], input=stdin, obj=flags or Globals(), standalone_mode=False
    )


def test_it_only_annotates_and_keeps_comments_order_and_quotes():
    result = inject(WEB)
    assert result.return_value == 0
    assert result.stdout == WEB.replace(
        "      labels: {app: web}\n",
        "      labels: {app: web}\n      annotations:\n        mantle.dev/inject: enabled\n",
    )
    assert result.stderr == '\ndeployment "web" injected\n\n'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "metadata:\n  name: a  # it\n",
            "metadata:\n  name: a  # it\n  annotations:\n    mantle.dev/inject: enabled\n",
        ),
        ("metadata: {name:  a}\n", "metadata: {name:  a, annotations: {mantle.dev/inject: enabled}}\n"),
        ("metadata: {}\n", "metadata: {annotations: {mantle.dev/inject: enabled}}\n"),
        (
            "metadata:\n  annotations:\n    x: y\n\n  # the name\n  name: a\n",
            "metadata:\n  annotations:\n    x: y\n    mantle.dev/inject: enabled\n\n  # the name\n  name: a\n",
        ),
        (
            "metadata:\n  annotations: { x: 'y' }\n",
            "metadata:\n  annotations: { x: 'y', mantle.dev/inject: enabled }\n",
        ),
        (
            "metadata:\n  annotations:\n    mantle.dev/inject: 'ingress' # why\n",
            "metadata:\n  annotations:\n    mantle.dev/inject: enabled # why\n",
        ),
        (
            "metadata:\n    annotations:\n        note: |\n            two\n            lines\n\n    name: a\n",
            "metadata:\n    annotations:\n        note: |\n            two\n            lines\n"
            "        mantle.dev/inject: enabled\n\n    name: a\n",
        ),
        ("", "metadata:\n  annotations:\n    mantle.dev/inject: enabled\n"),
    ],
)
def test_only_the_annotation_changes_whatever_the_style(before: str, after: str):
    odd = "spec: {containers:   [ {name: a, ports: [{containerPort: 80}]} ]}   # odd, and kept\n"
    result = inject(f"{before}kind: Pod\n{odd}")
    assert result.stdout == f"{after}kind: Pod\n{odd}"


def test_line_ends_stay_what_they_are(tmp_path: Path):
    file = tmp_path / "dos.yml"
    file.write_bytes(WEB.replace("\n", "\r\n").encode())
    said = inject("", str(file)).stdout_bytes
    assert said.count(b"\r\n") == said.count(b"\n") == WEB.count("\n") + 2


def test_what_is_no_file_says_what_to_do(tmp_path: Path):
    binary = tmp_path / "binary.yml"
    binary.write_bytes(b"\xff\xfe")
    assert str(inject("", str(binary)).exception) == f"cannot read {binary}: it is not UTF-8 text"
    away = inject("", "ftp://example.com/app.yml").exception
    assert str(away) == "ftp://example.com/app.yml is neither an https nor an http URL"


def test_styles_that_only_a_writer_can_change_are_still_injected():
    for text in (
        "kind: Pod\nmetadata:\n  annotations:\nspec: {containers: []}\n",
        "kind: List\nitems:\n- &a {kind: Pod, spec: {containers: []}}\n- *a\n",
    ):
        result = inject(text)
        assert result.return_value == 0
        assert result.stdout.count("mantle.dev/inject: enabled") == 1


def test_what_is_not_touched_comes_out_byte_for_byte():
    service = "---\n# odd   spacing\nkind:   Service\nmetadata: {name:   web-svc}\n"
    result = inject(service + "---\n" + WEB)
    assert result.stdout.startswith(service + "---\n# the shop's front\n")
    assert result.stderr == '\nservice "web-svc" skipped\ndeployment "web" injected\n\n'


def test_a_broken_document_is_reported_with_its_line_and_does_not_stop_the_others():
    broken = "kind: Pod\nmetadata:\n  name: [a\n"
    result = inject(f"{WEB}---\n{broken}---\n{WEB.replace('web', 'shop')}")
    assert result.return_value == 1
    assert broken in result.stdout and result.stdout.count("mantle.dev/inject: enabled") == 2
    assert "× stdin:17: this is not YAML: " in result.stderr
    assert 'deployment "shop" injected' in result.stderr


def test_lists_are_injected_item_by_item():
    result = inject(json.dumps({"kind": "List", "items": [YAML(typ="safe").load(WEB), {"kind": "Secret"}, {}]}))
    assert result.stderr == '\ndeployment "web" injected\nsecret "" skipped\ndocument missing "kind" field, skipped\n\n'
    items = YAML(typ="safe").load(result.stdout)["items"]
    assert items[0]["spec"]["template"]["metadata"]["annotations"] == {"mantle.dev/inject": "enabled"}


def test_the_report_says_what_keeps_pods_out():
    def deployment(name: str, pod: str, annotations: str = "") -> str:
        return (
            f"---\nkind: Deployment\nmetadata: {{name: {name}}}\n"
            f"spec:\n  template:\n    metadata: {{annotations: {{{annotations}}}}}\n    spec: {pod}\n"
        )

    text = (
        deployment("host", "{hostNetwork: true, containers: []}")
        + deployment("istio", "{containers: [{name: istio-proxy}]}")
        + deployment("off", "{containers: []}", "mantle.dev/inject: disabled")
    )
    result = inject(text)
    assert result.stdout == text
    assert result.stderr == (
        "\n"
        '‼ "hostNetwork: true" detected in deployment/host\n'
        "‼ known 3rd party sidecar detected in deployment/istio\n"
        '‼ "mantle.dev/inject: disabled" annotation set on deployment/off\n'
        "‼ no supported objects found\n"
        "\n"
        'deployment "host" skipped\n'
        'deployment "istio" skipped\n'
        'deployment "off" skipped\n'
        "\n"
    )
    udp = deployment("dns", "{containers: [{name: a, ports: [{containerPort: 53, protocol: UDP}]}]}")
    assert '‼ deployment/dns uses "protocol: UDP"\n\ndeployment "dns" injected\n' in inject(udp).stderr


def test_verbose_prints_the_good_news_too():
    assert inject(WEB, flags=Globals(verbose=True)).stderr == (
        "\n"
        "√ pods do not use host networking\n"
        "√ pods do not have a 3rd party proxy or initContainer already injected\n"
        "√ pods are not annotated to disable injection\n"
        "√ at least one resource can be injected or annotated\n"
        "√ pod specs do not include UDP ports\n"
        '√ pods do not have automountServiceAccountToken set to "false" or service account token projection'
        " is enabled\n"
        '\ndeployment "web" injected\n\n'
    )


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("DaemonSet", ("spec", "template")),
        ("StatefulSet", ("spec", "template")),
        ("ReplicaSet", ("spec", "template")),
        ("ReplicationController", ("spec", "template")),
        ("Job", ("spec", "template")),
        ("CronJob", ("spec", "jobTemplate", "spec", "template")),
        ("Pod", ()),
    ],
)
def test_every_kind_that_makes_pods(kind: str, path: tuple[str, ...]):
    workload: dict = {"spec": {"containers": [{"name": "a"}]}}
    for step in reversed(path):
        workload = {step: workload}
    result = inject(json.dumps({"kind": kind, "metadata": {"name": "x"}, **workload}))
    found = YAML(typ="safe").load(result.stdout)
    for step in path:
        found = found[step]
    assert found["metadata"]["annotations"] == {"mantle.dev/inject": "enabled"}
    assert f'{kind.lower()} "x" injected' in result.stderr


def test_flags_become_annotations_and_wrong_ones_are_usage_errors():
    flags = (
        "-",
        "--opaque-ports",
        "3306,1000-2000",
        "--enable-debug-sidecar",
        "--ingress",
        "--proxy-log-level",
        "debug",
    )
    result = inject("kind: Service\nmetadata: {name: db}\n---\n" + WEB, *flags)
    service, deployment = YAML(typ="safe").load_all(result.stdout)
    assert service["metadata"]["annotations"] == {"config.mantle.dev/opaque-ports": "3306,1000-2000"}
    assert deployment["spec"]["template"]["metadata"]["annotations"] == {
        "mantle.dev/inject": "ingress",
        "config.mantle.dev/opaque-ports": "3306,1000-2000",
        "config.mantle.dev/enable-debug-sidecar": "true",
        "config.mantle.dev/proxy-log-level": "debug",
    }
    assert 'service "db" annotated' in result.stderr
    wrong = inject(WEB, "-", "--inbound-port", "x", "--access-log", "xml")
    assert str(wrong.exception) == (
        "--access-log 'xml' is not accepted; use apache or json\n"
        "--inbound-port 'x' is not accepted; use a port from 1 to 65535"
    )


def test_deprecated_flags_work_and_say_what_to_use_and_the_newer_name_wins():
    result = inject(WEB, "-", "--proxy-cpu", "10m", "--proxy-memory", "20Mi", "--proxy-memory-request", "30Mi")
    (deployment,) = YAML(typ="safe").load_all(result.stdout)
    assert deployment["spec"]["template"]["metadata"]["annotations"] == {
        "mantle.dev/inject": "enabled",
        "config.mantle.dev/proxy-cpu-request": "10m",
        "config.mantle.dev/proxy-memory-request": "30Mi",
    }
    for old in ("cpu", "memory"):
        assert f"Flag --proxy-{old} has been deprecated, use --proxy-{old}-request instead\n" in result.stderr
    assert "deprecated" not in inject(WEB, "-", "--proxy-cpu-request", "10m").stderr
    wrong = inject(WEB, "-", "--proxy-cpu", "much")
    assert "--proxy-cpu-request 'much' is not accepted" in str(wrong.exception)


def test_a_wrong_annotation_in_the_file_fails_that_object():
    result = inject(WEB.replace("labels: {app: web}", "annotations: {config.mantle.dev/proxy-await: maybe}"))
    assert result.return_value == 1
    assert "× failed to inject deployment/web: pod annotation config.mantle.dev/proxy-await: 'maybe'" in result.stderr
    assert 'deployment "web" failed' in result.stderr


def test_manual_renders_the_sidecar_and_can_be_repeated(tmp_path: Path):
    roots = tmp_path / "roots.pem"
    roots.write_text("PEM\n")
    once = inject(WEB, "-", "--manual", "--trust-anchors", str(roots))
    template = YAML(typ="safe").load(once.stdout)["spec"]["template"]
    assert [c["name"] for c in template["spec"]["initContainers"]] == ["mantle-init", "mantle-guard", "mantle-proxy"]
    assert template["metadata"]["labels"]["mantle.dev/proxy-deployment"] == "web"
    assert "# keep me" in once.stdout and "'acme/web:1.4'" in once.stdout
    twice = inject(once.stdout, "-", "--manual", "--trust-anchors", str(roots))
    assert YAML(typ="safe").load(twice.stdout) == YAML(typ="safe").load(once.stdout)


def test_manual_without_roots_says_where_to_get_them(tmp_path: Path):
    result = inject(WEB, "-", "--manual", "--trust-anchors", str(tmp_path / "none.pem"))
    assert "cannot read the trust anchors" in str(result.exception)


def test_the_control_plane_is_injected_by_hand_only():
    result = inject(WEB.replace("{app: web}", "{mantle.dev/control-plane-component: viz}"))
    assert result.return_value == 1
    assert "--manual must be set when injecting control plane components" in result.stderr


def test_directories_json_output_and_files_that_are_not_there(tmp_path: Path):
    (tmp_path / "b.yaml").write_text(WEB)
    (tmp_path / "a.yml").write_text("kind: Namespace\nmetadata: {name: shop}\n")
    (tmp_path / "notes.txt").write_text(": not yaml [")
    result = inject("", str(tmp_path), flags=Globals(output="json"))
    assert [item["kind"] for item in json.loads(result.stdout)["items"]] == ["Namespace", "Deployment"]
    assert result.stderr == '\nnamespace "shop" annotated\ndeployment "web" injected\n\n'
    assert str(inject("", str(tmp_path / "gone.yml")).exception).startswith("cannot read ")


class Page(BaseHTTPRequestHandler):
    """Serves WEB, and what is too much of it."""

    def do_GET(self) -> None:
        if self.path == "/gone.yml":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # who has had enough hangs up
            self.wfile.write(WEB.encode() if self.path == "/web.yml" else b"# too much\n" * (2 << 20))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_urls_are_read_within_bounds(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(documents, "FETCH_SECONDS", 200.0)  # it is about the bytes, also on a busy machine
    result = inject("", f"{url}/web.yml")
    assert result.stdout == inject(WEB).stdout and 'deployment "web" injected' in result.stderr
    assert "404 Not Found" in str(inject("", f"{url}/gone.yml").exception)
    assert "is larger than 16 MiB" in str(inject("", f"{url}/huge.yml").exception)


def test_a_redirect_from_https_to_http_is_refused(monkeypatch: pytest.MonkeyPatch):
    class Answer(io.BytesIO):
        url = "http://example.org/web.yml"

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Answer(WEB.encode()))
    result = inject("", "https://example.org/web.yml")
    assert "leads to http://example.org/web.yml, which anybody on the way could change" in str(result.exception)
    assert inject("", "http://example.org/web.yml").stdout == inject(WEB).stdout, "who says http means it"


def test_the_same_key_twice_is_a_broken_document_and_says_where():
    twice = WEB.replace("{app: web}", "{app: web}\n      labels: {app: web}")
    result = inject(twice)
    assert result.return_value == 1 and result.stdout == twice
    assert "× stdin:10: this is not YAML: " in result.stderr and "duplicate key" in result.stderr


@pytest.mark.parametrize(
    ("metadata", "spec", "says"),
    [
        ("{name: a}", "{containers: [null]}", "spec.containers[0]: 'None' is not accepted; use a mapping"),
        ("{name: a}", "{containers: x}", "spec.containers: 'x' is not accepted; use a list"),
        ("{name: a}", "{containers: [{ports: [8080]}]}", "spec.containers[0].ports[0]: '8080' is not accepted"),
        (
            "{name: a}",
            "{containers: [{ports: [{name: x}]}]}",
            "ports[0].containerPort: 'None' is not accepted; use a number",
        ),
        (
            "{name: a}",
            "{containers: [{livenessProbe: [1]}]}",
            "spec.containers[0].livenessProbe: '[1]' is not accepted",
        ),
        ("{name: a}", "{volumes: {a: b}}", "spec.volumes: "),
        ("{name: a}", "[1]", "spec is missing"),
        ("{name: a, annotations: [x]}", "{}", "metadata.annotations: "),
        ("x", "{}", "metadata: 'x' is not accepted; use a mapping"),
    ],
)
def test_a_pod_of_another_form_is_a_failure_and_no_obstacle(
    metadata: str, spec: str, says: str, tmp_path: Path
) -> None:
    bad = f"apiVersion: v1\nkind: Pod\nmetadata: {metadata}\nspec: {spec}\n"
    (tmp_path / "ca.crt").write_text("PEM\n")
    for arguments in ([], ["--manual", "--trust-anchors", str(tmp_path / "ca.crt")]):
        result = inject(f"{bad}---\n{WEB}", *arguments, "-")
        assert result.return_value == 1 and says in result.stderr, result.stderr
        assert result.stdout.startswith(bad) and 'deployment "web" injected' in result.stderr


@pytest.mark.parametrize("empty", ["initContainers", "volumes", "securityContext", "containers"])
def test_what_is_there_and_empty_is_as_if_it_were_not(empty: str, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("PEM\n")
    said = 'metadata: {name: a, annotations: {config.mantle.dev/close-wait-timeout: "5"}}'
    text = f"apiVersion: v1\nkind: Pod\n{said}\nspec:\n  {empty}:\n"
    result = inject(text, "--manual", "--enable-debug-sidecar", "--trust-anchors", str(tmp_path / "ca.crt"), "-")
    assert result.return_value == 0 and 'pod "a" injected' in result.stderr, result.stderr
