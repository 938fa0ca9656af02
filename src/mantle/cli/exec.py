"""`mantle exec`: a command inside a pod's container, with its namespaces, user and files."""

from __future__ import annotations

from pathlib import Path

import click

from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure
from mantle.cli.podnames import choose_container, find_pod


@mesh_command(on_a_cluster="kubectl exec")
@click.argument("pod", metavar="POD|deploy/NAME")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="-- CMD [ARG…]")
@click.option("-c", "--container", metavar="NAME", help="Which container (default: the application's first).")
@click.option("-i", "--stdin", is_flag=True, help="Pass standard input on (it is anyway).")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
def command(flags: Globals, pod: str, argv: tuple[str, ...], container: str | None, stdin: bool, tty: bool) -> int:
    """Run a command inside a pod. Its exit code becomes ours; signals are passed on."""
    if not argv:
        raise click.UsageError("name a command after --, for example: mantle exec deploy/web -- sh")
    from mantle.cli.machine_client import MachineClient

    status = MachineClient(flags.mesh).get("/v1/status")
    found = find_pod(status, pod, flags.namespace)
    name = choose_container(found, container, running=True)
    directory = Path(status["state_dir"]) / "pods" / found["uid"]
    from mantle.platform.machine import direct, wire

    try:
        if tty:
            from mantle.cli.terminal import with_terminal

            return with_terminal(lambda stdio: direct.exec_in_pod(directory, name, argv, stdio, tty=True))
        return direct.exec_in_pod(directory, name, argv)
    except wire.Refused as refused:
        raise Failure(refused.message, fix=refused.fix or None) from refused
    except OSError as error:
        raise Failure(
            f"pod {found['name']} does not answer: {error.strerror or error}", fix="see `mantle ps`"
        ) from error
