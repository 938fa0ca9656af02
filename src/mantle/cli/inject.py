"""`mantle inject`: Kubernetes YAML in, the same YAML in the mesh out. The report goes to standard error.

By default it only annotates, and the platform that runs the pods injects them; `--manual` renders the sidecar with the
same pure function. A document that nothing is done to comes out as it was, byte for byte; a changed one keeps its
comments and order. A document that cannot be read is reported, passed through, and does not stop the others.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mantle import __version__
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure, Problem, json_text, write
from mantle.core.annotations import CONFIG, INJECT
from mantle.core.inject_objects import Report, Verdict, Wish, inject_object
from mantle.core.pod_facts import Skip
from mantle.core.proxy_env import Values

NETWORKS = "10.0.0.0/8,100.64.0.0/10,172.16.0.0/12,192.168.0.0/16"
OPTIONS: Mapping[str, tuple[str, str]] = {
    "--opaque-ports": ("opaque-ports", "PORTS"),
    "--skip-inbound-ports": ("skip-inbound-ports", "PORTS"),
    "--skip-outbound-ports": ("skip-outbound-ports", "PORTS"),
    "--require-identity-on-inbound-ports": ("proxy-require-identity-inbound-ports", "PORTS"),
    "--default-inbound-policy": ("default-inbound-policy", "POLICY"),
    "--tls": ("tls", "MODE"),
    "--enable-debug-sidecar": ("enable-debug-sidecar", ""),
    "--enable-external-profiles": ("enable-external-profiles", ""),
    "--native-sidecar": ("proxy-enable-native-sidecar", ""),
    "--wait-before-exit-seconds": ("proxy-wait-before-exit-seconds", "SECONDS"),
    "--close-wait-timeout": ("close-wait-timeout", "SECONDS"),
    "--shutdown-grace-period": ("shutdown-grace-period", "DURATION"),
    "--access-log": ("access-log", "FORMAT"),
    "--inbound-port": ("inbound-port", "PORT"),
    "--outbound-port": ("outbound-port", "PORT"),
    "--control-port": ("control-port", "PORT"),
    "--admin-port": ("admin-port", "PORT"),
    "--proxy-image": ("proxy-image", "IMAGE"),
    "--proxy-version": ("proxy-version", "TAG"),
    "--image-pull-policy": ("image-pull-policy", "POLICY"),
    "--proxy-uid": ("proxy-uid", "UID"),
    "--proxy-gid": ("proxy-gid", "GID"),
    "--proxy-log-level": ("proxy-log-level", "FILTER"),
    "--proxy-cpu-request": ("proxy-cpu-request", "QUANTITY"),
    "--proxy-cpu-limit": ("proxy-cpu-limit", "QUANTITY"),
    "--proxy-memory-request": ("proxy-memory-request", "QUANTITY"),
    "--proxy-memory-limit": ("proxy-memory-limit", "QUANTITY"),
}
"""Flags that become an annotation `config.mantle.dev/NAME`; without a metavar they are switches."""


def annotation_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for flag, (name, metavar) in reversed(list(OPTIONS.items())):
        about = CONFIG[name].help
        if metavar:
            function = click.option(flag, name.replace("-", "_"), metavar=metavar, help=about)(function)
        else:
            function = click.option(flag, name.replace("-", "_"), is_flag=True, help=about)(function)
    return function


@mesh_command()
@click.argument("files", metavar="FILE|DIRECTORY|-", nargs=-1, required=True)
@click.option("--manual", is_flag=True, help="Render the sidecar instead of the annotation that asks for it.")
@click.option(
    "--ingress", is_flag=True, help="Ingress mode: the pod's own routing decides (mantle.dev/inject: ingress)."
)
@click.option("--trust-anchors", metavar="FILE", help="With --manual: the mesh's roots (default: the running mesh's).")
@click.option("--networks", metavar="CIDRS", default=NETWORKS, help="With --manual: the mesh's networks.")
@click.option("--control-namespace", metavar="NAME", default="mantle", help="With --manual: where the mesh lives.")
@click.option("--trust-domain", metavar="NAME", default="cluster.local", help="With --manual: its trust domain.")
@annotation_options
def command(
    flags: Globals,
    files: tuple[str, ...],
    manual: bool,
    ingress: bool,
    trust_anchors: str | None,
    networks: str,
    control_namespace: str,
    trust_domain: str,
    **settings: str | bool | None,
) -> int:
    """Add the mesh to Kubernetes YAML: `mantle inject app.yml > meshed.yml`."""
    output = flags.output_of("yaml", "json")
    values = None
    if manual:
        anchors = _trust_anchors(flags, trust_anchors)
        values = Values(
            version=__version__,
            trust_anchors=anchors,
            networks=tuple(networks.split(",")),
            control_namespace=control_namespace,
            trust_domain=trust_domain,
            inject_by_default=True,
            created_by=f"mantle/cli {__version__}",
            tls=str(settings.get("tls") or "required"),
        )
    wish = Wish(_accepted(settings), "ingress" if ingress else "enabled", values)
    documents = [document for name in files for document in read(name)]
    reports, problems = transform(documents, wish)
    if output == "json":
        objects = [document.value for document in documents if document.value is not None]
        whole = objects[0] if len(objects) == 1 else {"apiVersion": "v1", "kind": "List", "items": objects}
        write(json_text(whole))
    else:
        write("".join(document.text for document in documents))
    sys.stderr.write(report_text(reports, problems, flags.verbose))
    return int(bool(problems) or any(report.verdict is Verdict.FAILED for report in reports))


@dataclass(slots=True)
class Document:
    """One document of a file: its text with the separator before it, where it starts, and what was read from it."""

    file: str
    line: int
    text: str
    value: Any = None


def read(name: str) -> Iterator[Document]:
    """The documents of a file, of all YAML and JSON files of a directory, or of standard input (`-`)."""
    if name == "-":
        yield from split("stdin", _text("standard input", sys.stdin.buffer.read()))
        return
    if "://" in name:
        raise Failure(f"{name} is not a file", f"let another program fetch it: curl -sL {name} | mantle inject -")
    path = Path(name)
    paths = sorted(p for p in path.rglob("*") if p.suffix in (".yml", ".yaml", ".json")) if path.is_dir() else [path]
    for each in paths:
        try:
            data = each.read_bytes()
        except OSError as error:
            raise Failure(f"cannot read {each}: {error.strerror}", _WHAT_TO_NAME) from error
        yield from split(str(each), _text(str(each), data))


_WHAT_TO_NAME = "name a YAML file, a directory, or - for standard input"


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(f"cannot read {name}: it is not UTF-8 text", _WHAT_TO_NAME) from error


def split(file: str, text: str) -> Iterator[Document]:
    """Cuts a stream at its `---` lines, so that each document is read, and may be broken, by itself."""
    line = 1
    for part in re.split(r"(?m)^(?=---(?:\s|$))", text):
        if part:
            yield Document(file, line, part if part.endswith("\n") else part + "\n")
            line += part.count("\n")


def transform(documents: Sequence[Document], wish: Wish) -> tuple[list[Report], list[Problem]]:
    """Injects every document in place. A document that cannot be read is a problem and stays as it is."""
    problems: list[Problem] = []
    for document in documents:
        try:
            document.value = _yaml(document.text).load(document.text)
        except Exception as error:
            problems.append(_unreadable(document, error))
    namespaces = {
        str((d.value.get("metadata") or {}).get("name")): d.value
        for d in documents
        if isinstance(d.value, Mapping) and d.value.get("kind") == "Namespace"
    }
    reports: list[Report] = []
    for document in documents:
        if document.value is None:
            continue
        made = list(inject_object(document.value, wish, namespaces))
        reports += made
        if any(report.verdict in (Verdict.INJECTED, Verdict.ANNOTATED) for report in made):
            document.text = (None if wish.manual else _edited(document, made)) or _dump(document)
    return reports, problems


def _edited(document: Document, reports: Sequence[Report]) -> str | None:
    """The document's text with only the annotations changed. None if that cannot be had: then a writer does it."""
    from ruamel.yaml.error import MarkedYAMLError

    from mantle.core.yaml_edit import annotate_text

    dos = "\r\n" in document.text  # line ends stay what they are, too
    text = document.text.replace("\r\n", "\n")
    head, _, body = text.partition("\n") if text.startswith("---\n") else ("", "", text)
    try:
        for report in reports:
            body = annotate_text(body, report.path, report.annotations) if report.annotations else body
        same = _yaml(body).load(body) == document.value
    except (KeyError, MarkedYAMLError):
        return None
    text = (head + "\n" if head else "") + body
    return (text.replace("\n", "\r\n") if dos else text) if same else None


def _yaml(text: str) -> Any:
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.width = 4096
    # Whether `- ` of a list under a key is indented is a matter of taste; keep the file's.
    style = re.search(r"(?m)^( *)[^\s#-][^\n]*:[ ]*\n( *)- ", text)
    if style and len(style[2]) > len(style[1]):
        offset = len(style[2]) - len(style[1])
        yaml.indent(mapping=2, sequence=offset + 2, offset=offset)
    return yaml


def _dump(document: Document) -> str:
    from io import StringIO

    out = StringIO()
    yaml = _yaml(document.text)
    separator = document.text.startswith("---")
    yaml.dump(document.value, out)
    text = out.getvalue()
    if separator and not text.startswith("---"):
        text = document.text.partition("\n")[0] + "\n" + text
    return text


def _unreadable(document: Document, error: Exception) -> Problem:
    from ruamel.yaml.error import MarkedYAMLError

    if not isinstance(error, MarkedYAMLError):
        return Problem(f"this document cannot be read: {error}", None, document.file, document.line)
    mark = error.problem_mark
    if error.context_mark and (mark is None or mark.index >= len(document.text)):
        mark = error.context_mark  # what was opened and never closed, rather than the end of the file
    line = document.line + (mark.line if mark else 0)
    what = " ".join(filter(None, (error.context, error.problem)))
    return Problem(f"this is not YAML: {what}", "correct it, or check the indentation above", document.file, line)


def _accepted(settings: Mapping[str, str | bool | None]) -> dict[str, str]:
    """The given flags as annotation texts; a value that the annotation would not accept is a usage error."""
    accepted: dict[str, str] = {}
    wrong: list[str] = []
    for flag, (name, _) in OPTIONS.items():
        value = settings.get(name.replace("-", "_"))
        if value is None or value is False:
            continue
        text = "true" if value is True else str(value)
        try:
            CONFIG[name].parse(text)
        except ValueError:
            wrong.append(f"{flag} {text!r} is not accepted; use {CONFIG[name].accepted}")
        accepted[name] = text
    if wrong:
        raise click.UsageError("\n".join(wrong))
    return accepted


def _trust_anchors(flags: Globals, file: str | None) -> str:
    from mantle.cli.machine_client import MachineClient

    try:
        if file:
            return Path(file).read_text(encoding="ascii")
        client = MachineClient(flags.mesh)
        return (client.root / client.mesh / "trust-roots.pem").read_text(encoding="ascii")
    except Failure as failure:
        raise Failure(
            f"--manual needs the roots that the mesh trusts, and {failure.problems[0].message}",
            "give them with --trust-anchors FILE, or start the mesh first",
        ) from failure
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"cannot read the trust anchors: {error}", "name a PEM file with --trust-anchors") from error


def report_text(reports: Sequence[Report], problems: Sequence[Problem], verbose: bool) -> str:
    """What goes to standard error: warnings first, then one line an object."""
    warnings = [line for line in _warnings(reports, verbose) if line]
    warnings += [f"× {problem.text()}" for problem in problems]
    lines = [""]
    lines += [*warnings, ""] if warnings else []
    for report in reports:
        if not report.kind:
            lines.append('document missing "kind" field, skipped')
        else:
            lines.append(f'{report.kind} "{report.name}" {report.verdict}')
    return "\n".join([*lines, "", ""])


def _warnings(reports: Sequence[Report], verbose: bool) -> Iterator[str]:
    def named(skip: Skip) -> str:
        return ", ".join(str(report) for report in reports if skip in report.skips)

    def line(names: str, warning: str, good: str) -> str:
        return f"‼ {warning}" if names else f"√ {good}" if verbose else ""

    host, foreign, disabled = named(Skip.HOST_NETWORK), named(Skip.FOREIGN_SIDECAR), named(Skip.DISABLED)
    yield line(host, f'"hostNetwork: true" detected in {host}', "pods do not use host networking")
    yield line(
        foreign,
        f"known 3rd party sidecar detected in {foreign}",
        "pods do not have a 3rd party proxy or initContainer already injected",
    )
    yield line(
        disabled,
        f'"{INJECT}: disabled" annotation set on {disabled}',
        "pods are not annotated to disable injection",
    )
    touched = any(report.verdict in (Verdict.INJECTED, Verdict.ANNOTATED) for report in reports)
    yield line(
        "" if touched else "all", "no supported objects found", "at least one resource can be injected or annotated"
    )
    udp = [str(report) for report in reports if report.udp]
    verb = "uses" if len(udp) == 1 else "use"
    yield line(", ".join(udp), f'{", ".join(udp)} {verb} "protocol: UDP"', "pod specs do not include UDP ports")
    for report in reports:
        if report.error:
            yield f"× failed to inject {report}: {report.error}"
        for mistake in report.mistakes:
            yield f"× failed to inject {report}: {mistake}"
