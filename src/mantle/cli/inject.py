"""`mantle inject`: Kubernetes YAML in, the same YAML in the mesh out. The report goes to standard error.

By default it only annotates, and the platform that runs the pods injects them; `--manual` renders the sidecar with the
same pure function. A document that nothing is done to comes out as it was, byte for byte; a changed one keeps its
comments and order. A document that cannot be read is reported, passed through, and does not stop the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import click

from mantle.cli.documents import Document, print_documents, read, rewrite
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Problem
from mantle.cli.proxy_options import Settings, given, proxy_options
from mantle.core.annotations import CONFIG, INJECT
from mantle.core.inject_objects import Report, Verdict, Wish, inject_object
from mantle.core.pod_facts import Skip


@mesh_command()
@click.argument("files", metavar="FILE|DIRECTORY|URL|-", nargs=-1, required=True)
@click.option("--manual", is_flag=True, help="Render the sidecar instead of the annotation that asks for it.")
@click.option(
    "--ingress", is_flag=True, help="Ingress mode: the pod's own routing decides (mantle.dev/inject: ingress)."
)
@click.option("--ignore-cluster", is_flag=True, help="With --manual: ask no mesh for its settings.")
@click.option("--trust-anchors", metavar="FILE", help="With --manual: these roots, and ask no mesh.")
@click.option("--networks", metavar="CIDRS", help="With --manual, if no mesh is asked: its networks.")
@click.option("--control-namespace", metavar="NAME", help="With --manual: the namespace of the mesh (mantle).")
@click.option("--trust-domain", metavar="NAME", help="With --manual, if no mesh is asked: its trust domain.")
@click.option("--registry", metavar="NAME", help="Take Mantle's images from there.")
@click.option("--disable-identity", is_flag=True, hidden=True)
@proxy_options()
def command(
    flags: Globals,
    files: tuple[str, ...],
    manual: bool,
    ingress: bool,
    ignore_cluster: bool,
    trust_anchors: str | None,
    networks: str | None,
    control_namespace: str | None,
    trust_domain: str | None,
    registry: str | None,
    disable_identity: bool,
    **settings: str | bool | None,
) -> int:
    """Add the mesh to Kubernetes YAML: `mantle inject app.yml | kubectl apply -f -`."""
    output = flags.output_of("yaml", "json")
    if disable_identity:
        raise click.UsageError("--disable-identity is no longer supported; identity is always required")
    if registry:
        for name in ("proxy", "debug"):
            settings[f"{name}_image"] = settings[f"{name}_image"] or f"{registry}/mantle/{name}"
    accepted = _accepted(settings)
    values = None
    if manual:
        from mantle.cli.inject_manual import Given, manual_values

        mesh = Given(ignore_cluster, trust_anchors, networks, control_namespace, trust_domain, accepted.get("tls"))
        values = manual_values(flags, mesh, quiet=output == "json")
    documents, problems = read(files)
    reports = transform(documents, Wish(accepted, "ingress" if ingress else "enabled", values))
    print_documents(documents, output)
    sys.stderr.write(report_text(reports, problems, flags.verbose))
    return int(bool(problems) or any(report.verdict is Verdict.FAILED for report in reports))


def transform(documents: Sequence[Document], wish: Wish) -> list[Report]:
    """Injects every document in place."""
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
            rewrite(document, None if wish.manual else _annotating(made))
    return reports


def _annotating(reports: Sequence[Report]) -> Callable[[str], str]:
    from mantle.core.yaml_edit import annotate_text

    def edit(text: str) -> str:
        for report in reports:
            text = annotate_text(text, report.path, report.annotations) if report.annotations else text
        return text

    return edit


def _accepted(settings: Settings) -> dict[str, str]:
    """The given flags as annotation texts; a value that the annotation would not accept is a usage error."""
    accepted: dict[str, str] = {}
    wrong: list[str] = []
    for flag, name, text in given(settings):
        try:
            CONFIG[name].parse(text)
        except ValueError:
            wrong.append(f"{flag} {text!r} is not accepted; use {CONFIG[name].accepted}")
        accepted[name] = text
    if wrong:
        raise click.UsageError("\n".join(wrong))
    return accepted


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


_AUTOMOUNT = "automountServiceAccountToken"


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
    # Always so: the proxy's token is a projected one.
    yield line("", "", f'pods do not have {_AUTOMOUNT} set to "false" or service account token projection is enabled')
    for report in reports:
        if report.error:
            yield f"× failed to inject {report}: {report.error}"
        for mistake in report.mistakes:
            yield f"× failed to inject {report}: {mistake}"
