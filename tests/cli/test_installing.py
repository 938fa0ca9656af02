"""`mantle install` without a cluster: how values are written, what wins, and how mistakes are said."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from mantle.cli.installing import parse_set, read_all
from mantle.cli.main import cli
from mantle.cli.output import Failure
from mantle.cli.proxy_options import OPTIONS


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args))


def kept(result: Result, key: str) -> dict:
    documents = YAML(typ="safe", pure=True).load_all(result.stdout)
    (config,) = [d for d in documents if d["metadata"]["name"] == "mantle-config"]
    return json.loads(config["data"][key])


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("a.b=c", [("a.b", "c")]),
        ("a=1,b=2", [("a", "1"), ("b", "2")]),
        ("ports=25,587,ha=true", [("ports", "25,587"), ("ha", "true")]),
        (r"log=a=b\,c=d", [("log", "a=b,c=d")]),
        ("list={x, y},z=", [("list", ["x", "y"]), ("z", "")]),
    ],
)
def test_set_is_written_as_for_helm_and_commas_need_no_care(text, pairs):
    problems: list = []
    assert parse_set(text, problems) == pairs
    assert problems == []


def test_later_wins_and_a_flag_of_its_own_wins_over_all(tmp_path: Path):
    (tmp_path / "a.yml").write_text("ha: true\nproxy: {logLevel: info, adminPort: 4200}\n")
    (tmp_path / "b.yml").write_text("proxy: {logLevel: debug}\nregistry: b.example\n")
    files = [str(tmp_path / "a.yml"), str(tmp_path / "b.yml")]
    stored = {"registry": "stored.example", "trustDomain": "example.org", "proxy": {"gid": 7}}
    flags = {"registry": "flag.example"}
    given, values = read_all(stored, files, ["ha=false,registry=set.example"], flags, "mesh")
    assert values.registry == "flag.example" and not values.ha
    assert values.trust_domain == "example.org" and values.control_namespace == "mesh"
    assert values.proxy == {"proxy-log-level": "debug", "admin-port": "4200", "proxy-gid": "7"}
    assert given["proxy"] == {"gid": 7, "logLevel": "debug", "adminPort": 4200}
    assert stored["proxy"] == {"gid": 7}


def test_the_flags_of_inject_set_what_every_proxy_is_told():
    result = run(
        *("install", "--offline", "--proxy-log-level", "debug", "--proxy-cpu", "10m", "--proxy-memory-request", "30Mi"),
        *("--skip-outbound-ports", "25", "--no-native-sidecar", "--image-pull-policy", "Always"),
        *("--set", "proxy.logLevel=info"),
    )
    assert result.exit_code == 0, result.stderr
    values = kept(result, "values")
    assert values["imagePullPolicy"] == "Always"
    assert values["proxy"] == {
        "cpuRequest": "10m",
        "logLevel": "debug",
        "memoryRequest": "30Mi",
        "nativeSidecar": "false",
        "skipOutboundPorts": "25",
    }
    assert kept(result, "overrides")["proxy"] == values["proxy"], "an upgrade keeps them"
    assert "Flag --proxy-cpu has been deprecated, use --proxy-cpu-request instead" in result.stderr


def test_every_flag_of_proxies_is_a_value_of_an_install():
    for flag, (name, metavar) in OPTIONS.items():
        if flag != "--tls":
            text = {"QUANTITY": "10m", "PORTS": "80", "PORT": "80", "POLICY": "deny", "DURATION": "5s", "IMAGE": "a"}
            values = {"UID": "5", "GID": "5", "SECONDS": "5", "FILTER": "info", "FORMAT": "json", "TAG": "v1"} | text
            given = "Always" if flag == "--image-pull-policy" else values.get(metavar, True)
            _, made = read_all({}, [], [], {flag.removeprefix("--").replace("-", "_"): given}, None)
            assert name in made.proxy or (flag, made.image_pull_policy) == ("--image-pull-policy", "Always"), flag


def test_every_mistake_of_every_place_is_said_at_once(tmp_path: Path):
    (tmp_path / "list.yml").write_text("- a\n")
    (tmp_path / "broken.yml").write_text("a: [\n")
    files = [str(tmp_path / name) for name in ("list.yml", "broken.yml", "absent.yml")]
    with pytest.raises(Failure) as caught:
        read_all({}, files, ["nothing", "replicas=many"], {}, "Not A Label")
    said = [problem.message for problem in caught.value.problems]
    for part in ("wanted names with values", "is not YAML", "absent.yml", "'nothing'", "replicas", "controlNamespace"):
        assert sum(part in message for message in said) == 1, part
    assert len(said) == 6 and all(problem.fix for problem in caught.value.problems)


def test_what_was_given_is_kept_for_an_upgrade_and_all_values_for_the_injector():
    result = run("install", "--set", "proxy.logLevel=debug", "--ha")
    assert result.exit_code == 0
    assert kept(result, "overrides") == {"proxy": {"logLevel": "debug"}, "ha": True}
    assert kept(result, "values")["networks"][0] == "10.0.0.0/8"


def test_without_a_cluster_a_fresh_root_is_made_each_time_and_said():
    one, two = run("install"), run("install", "--offline")
    assert one.stdout != two.stdout
    for result in (one, two):
        assert "fresh trust root" in result.stderr
        assert result.stdout.count("BEGIN PRIVATE KEY") == 1


def test_what_is_printed_as_json_is_the_same_list():
    listed = json.loads(run("install", "-o", "json").stdout)
    assert listed["kind"] == "List"
    assert {"Namespace", "Deployment", "APIService"} <= {item["kind"] for item in listed["items"]}


def test_trust_of_ones_own_is_printed_and_nothing_is_made_up(tmp_path: Path):
    documents = YAML(typ="safe", pure=True).load_all(run("install").stdout)
    objects = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    issuer = objects["Secret", "mantle-identity-issuer"]["stringData"]
    roots = objects["ConfigMap", "mantle-identity-trust-roots"]["data"]["ca-bundle.crt"]
    for name, text in (("ca", roots), ("crt", issuer["crt.pem"]), ("key", issuer["key.pem"])):
        (tmp_path / name).write_text(text)
    flags = ("--identity-trust-anchors-file", "--identity-issuer-certificate-file", "--identity-issuer-key-file")
    paths = [str(tmp_path / name) for name in ("ca", "crt", "key")]
    result = run("install", *(word for pair in zip(flags, paths, strict=True) for word in pair))
    assert result.exit_code == 0 and result.stderr == ""
    assert run("install", *(word for pair in zip(flags, paths, strict=True) for word in pair)).stdout == result.stdout

    partial = run("install", flags[0], paths[0], flags[1], str(tmp_path / "absent"))
    assert partial.exit_code == 1 and partial.stdout == "" and "absent" in partial.stderr


def test_trust_that_cannot_carry_a_mesh_is_refused_before_anything_is_printed(tmp_path: Path):
    """An issuer of another root, and that root expired: both are said."""
    from datetime import UTC, datetime, timedelta

    from mantle.core import ca
    from mantle.core.names import MeshNames

    now, names = datetime.now(UTC), MeshNames("mantle", "cluster.local")
    issuer = ca.make_trust(names, now, (b"r" * 16, b"i" * 16))
    old = ca.make_trust(names, now - timedelta(days=400), (b"r" * 16, b"i" * 16))
    for name, pem in (("ca", old.roots_pem), ("crt", issuer.issuer_pem), ("key", issuer.issuer_key_pem)):
        (tmp_path / name).write_bytes(pem)
    result = run(
        "install",
        f"--identity-trust-anchors-file={tmp_path}/ca",
        f"--identity-issuer-certificate-file={tmp_path}/crt",
        f"--identity-issuer-key-file={tmp_path}/key",
    )
    assert result.exit_code == 1 and result.stdout == ""
    assert "trust root 1 (CN=root.mantle.cluster.local): found one that expired on" in result.stderr
    assert "which is none of the trust roots" in result.stderr
    assert result.stderr.count("fix: ") == 2


def test_the_weaker_mode_is_marked_where_it_is_chosen():
    assert "EXPERIMENTAL" in run("install", "--tls=optional").stderr
    assert "EXPERIMENTAL" not in run("install").stderr


def test_a_selection_of_objects_is_refused():
    for command in ("install", "upgrade", "uninstall"):
        result = run(command, "-A")
        assert result.exit_code == 2 and "--all-namespaces is not possible here" in result.stderr


def test_a_chart_is_written_only_where_nothing_else_is(tmp_path: Path):
    directory = tmp_path / "chart"
    for _ in range(2):
        assert run("install", "--helm-chart", str(directory)).exit_code == 0
    assert (directory / "templates/mantle.yaml").exists()
    other = run("install", "--helm-chart", str(tmp_path))
    assert other.exit_code == 1 and "holds other files" in other.stderr


def test_uninstall_without_a_cluster_names_everything_and_the_namespace_last():
    result = run("uninstall")
    assert result.exit_code == 0 and "--ignore-not-found" in result.stderr
    kinds = [d["kind"] for d in YAML(typ="safe", pure=True).load_all(result.stdout)]
    assert kinds[0] == "MutatingWebhookConfiguration" and kinds[-1] == "Namespace"
    assert "PodDisruptionBudget" in kinds and "name: mantle-ca\n" in result.stdout


def test_upgrade_needs_a_cluster():
    result = run("upgrade")
    assert result.exit_code == 1 and "--kubeconfig" in result.stderr
