"""`mantle uninject`: the inverse of `mantle inject`. The YAML goes to standard output, a report to standard error.

What `mantle inject` annotated comes back byte for byte; what it rendered (`--manual`) comes back as the same object,
with its comments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import click

from mantle.cli.documents import print_documents, read, rewrite
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Problem
from mantle.core.inject_objects import Report, Verdict, uninject_object


@mesh_command()
@click.argument("files", metavar="FILE|DIRECTORY|URL|-", nargs=-1, required=True)
def command(flags: Globals, files: tuple[str, ...]) -> int:
    """Take Kubernetes YAML out of the mesh again: `mantle uninject app.yml | kubectl apply -f -`."""
    output = flags.output_of("yaml", "json")
    documents, problems = read(files)
    reports: list[Report] = []
    for document in documents:
        made = [] if document.value is None else list(uninject_object(document.value))
        reports += made
        changed = [report for report in made if report.verdict is Verdict.UNINJECTED]
        if changed:
            by_text = all(report.removed for report in changed)
            rewrite(document, _without(changed) if by_text else None)
    print_documents(documents, output)
    sys.stderr.write(report_text(reports, problems))
    return int(bool(problems))


def _without(reports: Sequence[Report]) -> Callable[[str], str]:
    from mantle.core.yaml_edit import unannotate_text

    def edit(text: str) -> str:
        for report in reports:
            text = unannotate_text(text, report.path, report.removed)
        return text

    return edit


def report_text(reports: Sequence[Report], problems: Sequence[Problem]) -> str:
    """One line an object, between blank lines."""
    lines = ["", *(f"× {problem.text()}" for problem in problems)]
    lines += [
        f'{report.kind} "{report.name}" {report.verdict}' if report.kind else 'document missing "kind" field, skipped'
        for report in reports
    ]
    return "\n".join([*lines, "", ""])
