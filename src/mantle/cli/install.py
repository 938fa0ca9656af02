"""`mantle install`: prints the control plane as Kubernetes YAML, for `kubectl apply -f -`.

The same every time but for the trust root, which is made only where the cluster has none: a second run prints what is
there already, without the trust. What is said to people goes to standard error.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mantle.cli.installing import TRUST_FILES, read_all, read_trust_files, value_options
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure, Problem, escape, json_text, write

if TYPE_CHECKING:
    from mantle.cli.kube_client import KubeClient
    from mantle.core.trust import Fault
    from mantle.manifests.config import InstallValues


def _trust_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for flag, about in reversed(TRUST_FILES):
        function = click.option(flag, metavar="FILE", help=about)(function)
    return function


@mesh_command()
@value_options
@_trust_options
@click.option("--offline", is_flag=True, help="Ask no cluster: print a fresh trust root, or the one that is given.")
@click.option("--helm-chart", metavar="DIRECTORY", help="Write a Helm chart with these values instead of printing.")
def command(
    flags: Globals, files: Sequence[str], sets: Sequence[str], offline: bool, helm_chart: str | None, **named: Any
) -> None:
    """Print the control plane: `mantle install | kubectl apply -f -`.

    With a cluster (the kubeconfig's, or --context) its trust root is kept, and what stands in the way is said.
    """
    output = flags.output_of("yaml", "json")
    given, values = read_all({}, files, sets, named, flags.namespace)
    if helm_chart is not None:
        write_chart(Path(helm_chart), values)
        return
    contents = read_trust_files([named[flag.removeprefix("--").replace("-", "_")] for flag, _ in TRUST_FILES])
    client = None if offline else cluster_client(flags)

    from mantle.manifests.facts import obstacles
    from mantle.manifests.render import install_objects
    from mantle.manifests.trust import Decision, Existing, Given, decide

    existing, policies = Existing(), True
    faults: list[Fault] = []
    if client is not None:
        from mantle.cli.cluster_facts import read_facts

        facts = read_facts(client, values.control_namespace)
        existing, faults = facts.trust, list(obstacles(facts, values))
        policies = facts.admission_policies
    trust = decide(values, Given(*contents), existing, datetime.now(UTC), secrets.token_bytes, client is not None)
    if faults or not isinstance(trust, Decision):
        raise refusal([*faults, *(() if isinstance(trust, Decision) else trust)])
    notes = list(trust.notes)
    if client is None and trust.material.issuer_key and contents[0] is None:
        notes.append(
            "no cluster was asked, so this is a fresh trust root: keep this output. "
            "A second one, applied over it, would cut off every pod that is in the mesh by then"
        )
    say([*notes, *mode_notes(values, policies)])
    print_objects(install_objects(values, trust.material, given, admission_policies=policies), output)


def write_chart(directory: Path, values: InstallValues) -> None:
    """Writes the chart; a directory that holds something else is left alone."""
    from mantle.manifests.helm import chart

    fix = "name a directory that is empty, or holds a chart of Mantle, or does not exist yet"
    try:
        there = list(directory.iterdir()) if directory.exists() else []
        ours = (directory / "Chart.yaml").exists() and "name: mantle\n" in (directory / "Chart.yaml").read_text()
        if there and not ours:
            raise Failure(f"{directory} holds other files ({there[0].name})", fix)
        for name, text in chart(values).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise Failure(f"cannot write the chart to {directory}: {error.strerror}", fix) from error
    sys.stderr.write(f"wrote a chart to {escape(str(directory))}; {CHART_HINT}\n")


CHART_HINT = (
    "install it with --set-file identity.trustAnchorsPEM=ca.crt,identity.issuer.crtPEM=issuer.crt,"
    "identity.issuer.keyPEM=issuer.key"
)


def cluster_client(flags: Globals) -> KubeClient | None:
    """The cluster that the flags and the kubeconfig mean, said on standard error; None if there is no kubeconfig."""
    from mantle.cli.kube_client import KubeClient
    from mantle.cli.target import access_of, refuse_contradictions

    if flags.mesh is not None and not flags.mesh_from_environment:
        raise click.UsageError("--mesh is a mesh of this machine, which `mantle up` starts with its control plane")
    refuse_contradictions(flags)
    access = access_of(flags)
    if access is None:
        return None
    acting = f", as {access.acting_as.user}" if access.acting_as.user else ""
    sys.stderr.write(escape(f"cluster {access.server} (context {access.context}{acting})") + "\n")
    return KubeClient(access)


def mode_notes(values: InstallValues, admission_policies: bool) -> list[str]:
    """What people must know about the mode they chose."""
    if values.tls != "optional":
        return []
    weaker = (
        "tls=optional adds the EXPERIMENTAL mode, which is weaker: its ca makes the private keys and hands them out as "
        "Secrets, and its proxies fall back to plaintext (docs/optional-tls.md). The default mode stays as it is"
    )
    unguarded = (
        "before Kubernetes 1.30 no admission policy can keep the ca's account from Secrets that are not of this mode: "
        "whoever takes over the ca can replace any, the issuer's too"
    )
    return [weaker] if admission_policies else [weaker, unguarded]


def refusal(faults: Sequence[Fault]) -> Failure:
    """Everything that stands in the way, as one failure."""
    return Failure.of([Problem(str(fault), fault.fix) for fault in faults])


def say(notes: Sequence[str]) -> None:
    """Warnings, to standard error."""
    for note in notes:
        sys.stderr.write(f"‼ {escape(note)}\n")


def print_objects(objects: Sequence[Any], output: str) -> None:
    """To standard output, as YAML documents or one JSON list."""
    from mantle.manifests.render import yaml_text

    if output == "json":
        write(json_text({"apiVersion": "v1", "kind": "List", "items": list(objects)}))
    else:
        write(yaml_text(objects))
