"""`mantle install`: prints the control plane as Kubernetes YAML, for `kubectl apply -f -`.

Deterministic but for the trust root, which is made only where the cluster has none: a second run prints what is
there. What it says to people goes to standard error.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click

from mantle.cli.installing import TRUST_FILES, checked_values, given_values, read_trust_files, value_options
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure, Problem, json_text, write


def _trust_options(function: Any) -> Any:
    for flag, about in reversed(TRUST_FILES):
        function = click.option(flag, metavar="FILE", help=about)(function)
    return function


@mesh_command()
@value_options
@_trust_options
@click.option("--offline", is_flag=True, help="Ask no cluster: print a fresh trust root, or the one that is given.")
def command(flags: Globals, files: Sequence[str], sets: Sequence[str], offline: bool, **named: Any) -> None:
    """Print the control plane: `mantle install | kubectl apply -f -`."""
    output = flags.output_of("yaml", "json")
    given = given_values({}, files, sets, named, flags.namespace)
    values = checked_values(given)
    contents = read_trust_files([named[flag.removeprefix("--").replace("-", "_")] for flag, _ in TRUST_FILES])

    from mantle.manifests.render import install_objects
    from mantle.manifests.trust import Decision, Existing, Given, decide

    trust = decide(values, Given(*contents), Existing(), datetime.now(UTC), secrets.token_bytes, asked=False)
    if not isinstance(trust, Decision):
        raise Failure.of([Problem(str(fault), fault.fix) for fault in trust])
    notes = list(trust.notes)
    if trust.material.issuer_key and contents[0] is None:
        notes.append(
            "no cluster was asked: this is a fresh trust root. Apply it once; applied again, it would replace the first"
        )
    for note in notes:
        sys.stderr.write(f"‼ {note}\n")
    print_objects(install_objects(values, trust.material, given), output)


def print_objects(objects: Sequence[Any], output: str) -> None:
    """To standard output, as YAML documents or one JSON list."""
    from mantle.manifests.render import yaml_text

    if output == "json":
        write(json_text({"apiVersion": "v1", "kind": "List", "items": list(objects)}))
    else:
        write(yaml_text(objects))
