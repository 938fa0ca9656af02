"""The frame: global flags in any place, commands imported only when called, exit codes, and errors with their fix."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

import mantle
from mantle.cli import main, output, resource
from mantle.cli.duration import seconds_of
from mantle.cli.main import Globals, cli, mesh_command


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> list[Globals]:
    """A command `probe` that only keeps the global flags it was given."""
    seen: list[Globals] = []

    @mesh_command("probe", selects="Al")
    @click.argument("words", nargs=-1)
    def command(flags: Globals, words: tuple[str, ...]) -> None:
        seen.append(flags)

    monkeypatch.setitem(main.COMMANDS, "probe", ("mantle.cli.version:command", ""))
    monkeypatch.setattr(main.MeshGroup, "get_command", lambda *_: command)
    return seen


@pytest.mark.parametrize(
    "line",
    [
        "-n mantle --mesh two -o json -v probe",
        "probe -n mantle --mesh two -o json -v",
        "-n mantle probe --mesh two a b --output json --verbose",
        "--namespace=mantle --mesh=one probe deploy --mesh=two -ojson -v",
        "-o wide -n other probe a -n mantle -o json --mesh two -v",
        "-n=mantle probe --mesh=two -o=json -v",
        "-n=other probe -n=mantle --mesh two --output=json -v",
    ],
)
def test_global_flags_may_stand_anywhere_and_the_last_wins(line: str, probe: list[Globals]) -> None:
    cli.main(line.split(), standalone_mode=False)
    assert probe == [Globals("mantle", "two", "json", True)]


def test_a_selector_may_begin_after_an_equals_sign_as_in_kubectl(probe: list[Globals]) -> None:
    for line in ("probe -l=app=web", "probe -l app=web", "-lapp=web probe", "probe --selector=app=web"):
        cli.main(line.split(), standalone_mode=False)
    assert [flags.selector for flags in probe] == ["app=web"] * 4


def test_flags_that_are_not_given_are_not_set(probe: list[Globals]) -> None:
    cli.main(["probe"], standalone_mode=False)
    assert probe == [Globals(None, None, None, False)]


def test_the_mesh_may_come_from_the_environment(probe: list[Globals], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTLE_MESH", "env")
    cli.main(["probe"], standalone_mode=False)
    cli.main(["--mesh", "flag", "probe"], standalone_mode=False)
    cli.main(["probe", "--mesh", "flag"], standalone_mode=False)
    assert [flags.mesh for flags in probe] == ["env", "flag", "flag"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mantle", *words], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["tapp"], 2, "there is no command 'tapp'; did you mean 'tap'?"),
        (["zzz"], 2, "commands are: demo, up,"),
        (["version", "-o", "wide"], 2, "use one of: table, json"),
        (["version", "--mesh", "no-such-mesh"], 1, "error: mesh no-such-mesh is not running\n  fix: "),
        (["tap"], 2, "Missing argument"),
        (["tap", "fish/x", "--mesh", "no-such-mesh"], 2, "there is no kind 'fish'"),
        (["edges", "deploy/web"], 2, "edges cannot be returned for a specific resource name; remove web"),
        (["edges", "svc"], 2, "resource type is not supported here: service"),
        (["stat", "deploy", "-t", "14s"], 2, "metrics time window needs to be at least 15s"),
        (["stat", "deploy", "--to", "po", "--from", "po"], 2, "exclude each other"),
        (["tap", "deploy", "--max-rps", "0"], 2, "0"),
        (["migrate-tls", "-l", "app=web"], 2, "--selector is not possible here"),
        (["-A", "version"], 2, "--all-namespaces is not possible here"),
        (["inject", "-A", "app.yml"], 2, "--all-namespaces is not possible here"),
        (["-l", "app=web", "uninject", "app.yml"], 2, "--selector is not possible here"),
        (["check", "-l", "app=web"], 2, "--selector is not possible here"),
    ],
)
def test_exit_codes_and_messages(words: list[str], code: int, said: str) -> None:
    ended = run(*words)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_version_as_every_program_tells_it() -> None:
    ended = run("--version")
    assert (ended.returncode, ended.stdout) == (0, f"mantle {mantle.__version__}\n")


def test_help_names_every_command_and_imports_none() -> None:
    ended = run("--help")
    assert ended.returncode == 0
    assert all(f"  {name} " in ended.stdout for name in main.COMMANDS)


@pytest.mark.parametrize("words", [["version", "--client"], ["--help"], ["tap", "--help"], ["completion", "bash"]])
def test_nothing_heavy_is_imported_to_start(words: list[str]) -> None:
    program = f"import sys; sys.argv[1:] = {words!r}\nfrom mantle.cli.main import main\n"
    program += "try: main()\nexcept SystemExit: pass\n"
    program += "print('|'.join(sys.modules), file=sys.stderr)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.partition(".")[0] for name in ended.stderr.split("|")}
    assert loaded.isdisjoint({"grpc", "aiohttp", "rich", "cryptography", "asyncio", "ruamel", "google", "http"})


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_call_the_program(shell: str) -> None:
    ended = run("completion", shell)
    assert "_MANTLE_COMPLETE" in ended.stdout
    assert ended.returncode == 0


def test_completion_completes_commands() -> None:
    environment = {"_MANTLE_COMPLETE": "bash_complete", "COMP_WORDS": "mantle ve", "COMP_CWORD": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "mantle"], capture_output=True, text=True, timeout=60, check=False, env=_env(environment)
    )
    assert ended.stdout == "plain,version\n"


def _env(more: dict[str, str]) -> dict[str, str]:
    import os

    return {**os.environ, **more}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("héllo 日本 🍩", "héllo 日本 🍩"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\tc\r", "a\\x0ab\\x09c\\x0d"),
        ("back\\slash", "back\\\\slash"),
        ("\u202eevil", "\\u{202e}evil"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("\u2028", "\\u{2028}"),
    ],
)
def test_what_a_peer_wrote_cannot_move_the_terminal(text: str, shown: str) -> None:
    assert output.escape(text) == shown


def test_a_failure_lists_every_problem_with_place_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    problems = [output.Problem("bad", "do this", "a.yml", 3), output.Problem("worse\x1b", None, "b.yml")]
    output.Failure.of(problems).show()
    assert capsys.readouterr().err == "error: a.yml:3: bad\n  fix: do this\nerror: b.yml: worse\\x1b\n"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["deploy"], "deployment/"),
        (["deployments/web"], "deployment/web"),
        (["DEPLOY", "web"], "deployment/web"),
        (["po/web-1"], "pod/web-1"),
        (["ns", "emojivoto"], "namespace/emojivoto"),
        (["svc/web-svc"], "service/web-svc"),
        (["au"], "authority/"),
        (["deployment.apps/web"], "deployment/web"),
        (["cronjobs.v1.batch", "nightly"], "cronjob/nightly"),
    ],
)
def test_resources_as_people_type_them(words: list[str], meant: str) -> None:
    found = resource.parse(words, tuple(resource.ALIASES))
    assert f"{found.kind}/{found.name}" == meant


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a", "b", "c"],
        ["deploy/"],
        ["deploy/a", "b"],
        ["deploy/a/b"],
        [""],
        ["fish"],
        ["svc"],
        ["deploy.x"],
        ["po.apps"],
    ],
)
def test_what_is_no_resource_is_a_usage_error(words: list[str]) -> None:
    with pytest.raises(click.UsageError):
        resource.parse(words, ("deployment", "pod"))


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("30s", 30), ("5m", 300), ("1h30m", 5400), ("0.5m", 30)])
def test_durations(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "5x", "5m3", "-5s", "5 m"])
def test_what_is_no_duration_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.UsageError):
        seconds_of(text)
