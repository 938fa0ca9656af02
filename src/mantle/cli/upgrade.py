"""`mantle upgrade`: prints the control plane of this version with the values the mesh was installed with.

The trust of the mesh is never in the output, so that neither `kubectl apply` nor its `--prune` can touch it. A value
that is given changes what was stored; everything else stays, or takes the new version's default.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click

from mantle.cli.install import cluster_client, mode_notes, print_objects, refusal, say
from mantle.cli.installing import read_all, value_options
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure


@mesh_command()
@value_options
@click.option("--reset-values", is_flag=True, help="Start from the defaults instead of what was given before.")
def command(flags: Globals, files: Sequence[str], sets: Sequence[str], reset_values: bool, **named: Any) -> None:
    """Print the control plane of this version, with the mesh's own values, for kubectl apply:

    mantle upgrade | kubectl apply --prune -l mantle.dev/part-of=mantle -f -
    """
    from mantle.cli.cluster_facts import control_namespaces, read_facts
    from mantle.manifests.facts import obstacles
    from mantle.manifests.render import TrustMaterial, install_objects
    from mantle.manifests.trust import Decision, Given, decide

    output = flags.output_of("yaml", "json")
    client = cluster_client(flags)
    if client is None:
        raise Failure("no kubeconfig names a cluster", "choose one with --kubeconfig or --context")
    namespace = flags.namespace or the_one(control_namespaces(client))
    facts = read_facts(client, namespace)
    stored = facts.overrides
    if stored is None or facts.trust.roots is None:
        missing = "ConfigMap mantle-config" if stored is None else "ConfigMap mantle-identity-trust-roots"
        raise Failure(
            f"namespace {namespace} holds no mesh to upgrade: {missing} is not there",
            "`mantle install | kubectl apply -f -` installs one, and keeps the trust that is there",
        )
    given, values = read_all({} if reset_values else stored, files, sets, named, flags.namespace)
    if faults := list(obstacles(facts, values)):
        raise refusal(faults)
    trust = decide(values, Given(), facts.trust, datetime.now(UTC), secrets.token_bytes)
    # An upgrade changes no trust, so what is wrong with it must not keep anybody from one.
    notes = trust.notes if isinstance(trust, Decision) else [f"{fault}; {fault.fix}" for fault in trust]
    policies = facts.admission_policies
    say([*notes, *mode_notes(values, policies)])
    kept = TrustMaterial(facts.trust.roots, emit_roots=False)
    print_objects(install_objects(values, kept, given, admission_policies=policies), output)


def the_one(namespaces: Sequence[str]) -> str:
    """The control namespace of a cluster. `Failure` if there is none, or more than one."""
    if len(namespaces) == 1:
        return namespaces[0]
    if not namespaces:
        raise Failure(
            "this cluster has no control plane of Mantle", "`mantle install | kubectl apply -f -` installs it"
        )
    raise Failure(f"this cluster has several control planes: {', '.join(namespaces)}", "choose one with -n")
