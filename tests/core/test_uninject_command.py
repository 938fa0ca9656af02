"""`mantle uninject` as a person runs it: it gives back what `mantle inject` was given."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from manifest_play import WEB
from ruamel.yaml import YAML

from mantle.cli.inject import command as inject_command
from mantle.cli.main import Globals
from mantle.cli.uninject import command as uninject_command

POD = "spec: {containers:   [ {name: a, ports: [{containerPort: 80}]} ]}   # odd, and kept\n"


def run(command: object, stdin: str, *arguments: str, output: str | None = None) -> Result:
    flags = Globals(output=output)
    return CliRunner().invoke(command, [*(arguments or ("-",))], input=stdin, obj=flags, standalone_mode=False)


def inject(text: str, *arguments: str) -> str:
    result = run(inject_command, text, "-", *arguments)
    assert result.return_value == 0, result.stderr
    return result.stdout_bytes.decode()


def uninject(text: str) -> str:
    result = run(uninject_command, text)
    assert result.return_value == 0, result.stderr
    return result.stdout_bytes.decode()


@pytest.mark.parametrize(
    "settings", [(), ("--opaque-ports", "3306", "--ingress", "--access-log", "json", "--enable-debug-sidecar")]
)
@pytest.mark.parametrize(
    "text",
    [
        WEB,
        WEB.rstrip("\n"),
        "---\n" + WEB + "---\n# another\n" + WEB,
        WEB.replace("\n", "\r\n"),
        f"metadata:\n  name: a  # it\nkind: Pod\n{POD}",
        f"metadata: {{name:  a}}\nkind: Pod\n{POD}",
        f"metadata: {{}}\nkind: Pod\n{POD}",
        f"kind: Pod\n{POD}",
        f"# why\nkind: Pod\n{POD}",
        f"metadata:\n  annotations:\n    x: y\n\n  # the name\n  name: a\nkind: Pod\n{POD}",
        f"metadata:\n  annotations: {{ x: 'y' }}\nkind: Pod\n{POD}",
        f"metadata:\n    annotations:\n        note: |\n            two\n\n    name: a\nkind: Pod\n{POD}",
        f"metadata:\n  annotations:\n    config.mantle.dev/proxy-log-level: debug  # mine\n  name: a\nkind: Pod\n{POD}",
        "kind: List\nitems:\n- kind: Pod\n  spec: {containers: []}\n# between\n- kind: Pod\n  metadata:\n    name: b\n"
        "  spec: {containers: []}\n- kind: Secret\n",
        "kind: Namespace\nmetadata: {name: shop}\n---\nkind: Service\nmetadata:\n  name: db\nspec: {}\n",
        '{"kind": "Pod", "spec": {"containers": []}}\n',
        '{"kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": []}}\n',
    ],
)
def test_what_was_annotated_comes_back_byte_for_byte(text: str, settings: tuple[str, ...]):
    injected = inject(text, *settings)
    assert "mantle.dev/inject" in injected
    assert uninject(injected).encode() == text.encode()


def test_it_takes_back_what_two_runs_with_other_settings_wrote():
    twice = inject(inject(WEB, "--opaque-ports", "3306"), "--access-log", "json")
    assert uninject(twice) == WEB


def test_what_was_rendered_comes_back_as_the_same_object_with_its_comments(tmp_path: Path):
    roots = tmp_path / "roots.pem"
    roots.write_text("PEM\n")
    text = WEB.replace("name: web\n", "name: web\n        ports: [{containerPort: 3306}]\n")
    flags = ("--manual", "--trust-anchors", str(roots), "--close-wait-timeout", "60", "--enable-debug-sidecar")
    rendered = inject(text, *flags)
    assert "mantle-proxy" in rendered and "mantle-debug" in rendered
    back = uninject(rendered)
    assert YAML(typ="safe").load(back) == YAML(typ="safe").load(text)
    assert "mantle" not in back
    assert "# the shop's front" in back and "# keep me" in back and "'acme/web:1.4'" in back


def test_what_has_nothing_of_ours_stays_and_so_does_what_opted_out():
    off = WEB.replace("labels: {app: web}", "annotations: {mantle.dev/inject: disabled}")
    text = f"{off}---\nkind:   Secret\nmetadata: {{name: s}}\n---\nx: 1\n"
    result = run(uninject_command, text)
    assert result.stdout == text
    assert result.stderr == (
        '\ndeployment "web" skipped\nsecret "s" skipped\ndocument missing "kind" field, skipped\n\n'
    )


def test_the_report_and_the_exit_code():
    result = run(uninject_command, inject(WEB) + "---\nkind: [\n")
    assert result.return_value == 1
    assert '\ndeployment "web" uninjected\n\n' in result.stderr and "× stdin:" in result.stderr
    as_json = run(uninject_command, inject(WEB), output="json")
    assert json.loads(as_json.stdout) == YAML(typ="safe").load(WEB)


def test_the_control_plane_stays_in_its_mesh():
    text = WEB.replace(
        "{app: web}", "{mantle.dev/control-plane-component: viz}\n      annotations: {mantle.dev/inject: enabled}"
    )
    result = run(uninject_command, text)
    assert result.stdout == text and '"web" skipped' in result.stderr


def test_several_files_do_not_run_into_each_other_and_one_that_is_gone_stops_nobody(tmp_path: Path):
    (tmp_path / "a.yml").write_text(WEB.rstrip("\n"))
    (tmp_path / "b.yml").write_text(WEB.replace("name: web ", "name: shop"))
    names = [str(tmp_path / name) for name in ("a.yml", "gone.yml", "b.yml")]
    result = run(inject_command, "", *names)
    assert result.return_value == 1
    assert [d["metadata"]["name"] for d in YAML(typ="safe").load_all(result.stdout)] == ["web", "shop"]
    assert "gone.yml" in result.stderr and result.stderr.count(" injected") == 2
