"""`mantle check`: is this machine or cluster able, is the mesh healthy, does everything encrypt that should?

Facts are gathered (here for the machine, in `check_cluster.py` for a cluster), the checks conclude, this prints. With
neither a running mesh nor a cluster only the machine is checked. Exit code 1 if anything is broken; warnings alone
leave it at 0.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import mantle
from mantle.cli import checks
from mantle.cli.checks import Finding, Result, Validity
from mantle.cli.duration import seconds_of
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure, escape, json_text, write

if TYPE_CHECKING:
    from mantle.cli.target import Cluster

WAIT_STEP_SECONDS = 2.0
MARKS = {Result.GOOD: "√", Result.WARNING: "‼", Result.ERROR: "×"}

Category = tuple[str, Sequence[Finding]]


@mesh_command(selects="A")
@click.option("--pre", is_flag=True, help="On a cluster: can Mantle be installed?")
@click.option("--proxy", "proxies", is_flag=True, help="On a cluster: every proxy too, and its traffic.")
@click.option("--control-namespace", metavar="NAME", help="On a cluster: where Mantle lives, if it is not found.")
@click.option("--wait", metavar="DURATION", default="0s", help="On a cluster: how long a fresh installation may take.")
def command(flags: Globals, pre: bool, proxies: bool, control_namespace: str | None, wait: str) -> int:
    """Find what is wrong with this machine or cluster, the mesh or its traffic.

    \b
    mantle check --pre      before `mantle install`
    mantle check            what is installed
    mantle check --proxy    and every proxy, with -n those of one namespace
    """
    output = flags.output_of("table", "short", "json")
    if pre and proxies:
        raise click.UsageError("--pre is before an installation and --proxy after it: leave one of them out")
    meant = pre or proxies or bool(flags.cluster_flags)
    home = control_namespace or (None if proxies else flags.namespace)
    only = flags.namespace if proxies and not flags.all_namespaces else None
    if (cluster := _cluster(flags, wanted=pre or proxies)) is not None:
        try:
            return _on_cluster(cluster, output, home, only, pre=pre, proxies=proxies, wait=seconds_of(wait))
        except Failure as failure:
            if meant:
                raise
            # Nobody asked for a cluster: an old kubeconfig must not keep this machine from being checked.
            sys.stderr.write(f"{escape(failure.message)}: checking this machine instead\n")
    found: list[Category] = [("machine", _machine())]
    mesh = _mesh(flags)
    found += mesh
    write(json_text(object_of(found)) if output == "json" else text(found, short=output == "short", mesh=bool(mesh)))
    return 0 if succeeded(found) else 1


def _cluster(flags: Globals, *, wanted: bool) -> Cluster | None:
    """The cluster that is meant, as `target` decides; None: this machine, which is checked without a mesh, too."""
    from mantle.cli.machine_client import running_meshes, state_root
    from mantle.cli.target import access_of, cluster

    if flags.mesh is not None and not (flags.mesh_from_environment and flags.cluster_flags):
        if wanted:
            raise click.UsageError("--pre and --proxy are for clusters; a mesh of this machine is always checked whole")
        return None
    if wanted or flags.cluster_flags:
        return cluster(flags)
    return None if running_meshes(state_root()) or access_of(flags) is None else cluster(flags)


def _on_cluster(
    cluster: Cluster, output: str, home: str | None, only: str | None, *, pre: bool, proxies: bool, wait: float
) -> int:
    """`home`: the control plane's namespace, if it is given; `only`: the one namespace whose proxies are meant."""
    from mantle.cli import check_cluster

    if output != "json":
        sys.stderr.write(f"{escape(str(cluster))}\n")
    until = time.monotonic() + wait
    while True:
        if pre:
            found = check_cluster.pre(cluster, home or "mantle")
        else:
            found = check_cluster.installed(cluster, home, only, proxies=proxies)
        if time.monotonic() >= until or not check_cluster.waits(found):
            break
        time.sleep(WAIT_STEP_SECONDS)
    write(json_text(object_of(found)) if output == "json" else text(found, short=output == "short", mesh=True))
    return 0 if succeeded(found) else 1


def succeeded(found: Sequence[Category]) -> bool:
    return all(finding.result is not Result.ERROR for _, findings in found for finding in findings)


def text(found: Sequence[Category], *, short: bool, mesh: bool) -> str:
    """The page for people; `short` leaves out what is good."""
    blocks = []
    for name, findings in found:
        lines = [_line(finding) for finding in findings if not short or finding.result is not Result.GOOD]
        if lines:
            blocks.append("\n".join([name, "-" * len(name), *lines]))
    if not mesh and not short:
        blocks.append("No mesh is running: start one with `mantle demo` or `mantle up FILE` to check it.")
    blocks.append(f"Status check results are {MARKS[Result.GOOD if succeeded(found) else Result.ERROR]}")
    return "\n\n".join(blocks) + "\n"


def _line(finding: Finding) -> str:
    lines = [f"{MARKS[finding.result]} {finding.description}"]
    lines += [f"    {reason}" for reason in finding.reason.split("; ") if reason]
    if finding.result is not Result.GOOD:
        lines += [f"    fix: {finding.fix}"] if finding.fix else []
        lines += [f"    see docs/check.md#{finding.id}"] if finding.id else []
    return "\n".join(map(escape, lines))


def object_of(found: Sequence[Category]) -> dict[str, Any]:
    """The JSON shape of `linkerd check`; `hint` holds the fix itself."""
    return {
        "success": succeeded(found),
        "categories": [
            {
                "categoryName": name,
                "checks": [
                    {
                        "description": finding.description,
                        "result": str(finding.result),
                        **({"id": finding.id} if finding.id else {}),
                        **({"error": finding.reason, "hint": finding.fix} if finding.reason else {}),
                    }
                    for finding in findings
                ],
            }
            for name, findings in found
        ],
    }


def _machine() -> list[Finding]:
    from mantle.platform.machine import firewall, namespaces
    from mantle.platform.machine.places import find_proxy

    proxy = ""
    try:
        find_proxy()
    except FileNotFoundError as error:
        proxy = str(error)
    return checks.machine(
        [(f.message, f.fix, f.fatal) for f in namespaces.probe()],
        proxy=proxy,
        firewall=[] if os.geteuid() else firewall.dropping(),
        rootless=os.geteuid() != 0,
        outside=any(shutil.which(program) for program in ("pasta", "slirp4netns")),
    )


def _mesh(flags: Globals) -> list[Category]:
    """The mesh's two categories; none if no mesh runs. Raises `Failure` if a named one does not, or several do."""
    from mantle.cli.machine_client import MachineClient, running_meshes, state_root

    if flags.mesh is None and not running_meshes(state_root()):
        return []
    client = MachineClient(flags.mesh)
    status = client.get("/v1/status")
    directory, now = client.socket_path.parent, datetime.now(UTC)
    roots, issuer, signed = _authorities(directory)
    summary: Mapping[str, Any] | None = None
    with suppress(Failure):
        summary = client.get("/v1/viz/summary")
    healthy = checks.mesh(
        status,
        client_version=mantle.__version__,
        node_alive=Path(f"/proc/{status['node_pid']}").exists(),
        roots=roots,
        issuer=issuer,
        issuer_signed=signed,
        now=now,
    )
    encrypting = checks.data_plane(status, certificates=_certificates(directory, status), summary=summary, now=now)
    return [("mesh", healthy), ("data plane", encrypting)]


def _certificates(directory: Path, status: Mapping[str, Any]) -> dict[str, Validity | str]:
    """What every proxy shows now."""
    from mantle.cli.live_certificate import fetch

    found: dict[str, Validity | str] = {}
    for pod in status["pods"]:
        if pod["meshed"] and pod["phase"] not in ("Succeeded", "Failed"):
            name = f"{pod['namespace']}/{pod['name']}"
            try:
                live = fetch(directory, pod["uid"], name)
                found[name] = Validity(name, live.not_before, live.not_after)
            except Failure as error:
                found[name] = error.message
    return found


def _authorities(directory: Path) -> tuple[list[Validity], Validity | None, bool]:
    """Trust roots, issuer, and whether a root signed the issuer."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    def load(path: Path) -> list[x509.Certificate]:
        try:
            return x509.load_pem_x509_certificates(path.read_bytes())
        except (OSError, ValueError):
            return []

    def validity(what: str, certificate: x509.Certificate) -> Validity:
        name = f"{what} {certificate.subject.rfc4514_string()}"
        return Validity(name, certificate.not_valid_before_utc, certificate.not_valid_after_utc)

    roots, issuers = load(directory / "trust-roots.pem"), load(directory / "issuer" / "crt.pem")
    signed = False
    for root in roots:
        with suppress(ValueError, TypeError, InvalidSignature):
            for issuer in issuers[:1]:
                issuer.verify_directly_issued_by(root)
                signed = True
    return (
        [validity("trust root", root) for root in roots],
        validity("issuer", issuers[0]) if issuers else None,
        signed,
    )
