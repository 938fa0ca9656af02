"""`mantle version`: the versions of both programs and of the running mesh.

`--client` must start in 80 ms, so nothing is imported or run for it but this package's own version.
"""

from __future__ import annotations

from typing import Any

import click

import mantle
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure, json_text, write


@mesh_command()
@click.option("--client", is_flag=True, help="Only this program's version; asks nothing and nobody.")
def command(flags: Globals, client: bool) -> None:
    """Show the versions of both programs and of the running mesh."""
    output = flags.output_of("table", "json")
    versions: dict[str, Any] = {"client": mantle.__version__}
    if not client:
        versions["proxy"] = proxy_version()
        versions["mesh"] = mesh_version(flags)
    write(json_text(versions) if output == "json" else text_of(versions))


def text_of(versions: dict[str, Any]) -> str:
    lines = [f"Client version: {versions['client']}"]
    if "proxy" in versions:
        lines.append(f"Proxy version: {versions['proxy'] or 'unavailable (mantle-proxy is not installed)'}")
        mesh = versions["mesh"]
        lines.append(f"Mesh version: {mesh['version']} (mesh {mesh['name']})" if mesh else "Mesh version: unavailable")
        if mesh and mesh["version"] != versions["client"]:
            lines.append("The mesh was started by another version: stop it with `mantle down` and start it again.")
    return "\n".join(lines) + "\n"


def proxy_version() -> str | None:
    """What `mantle-proxy --version` says, None if there is no such program."""
    import subprocess

    from mantle.platform.machine.places import find_proxy

    try:
        program = find_proxy()
    except FileNotFoundError:
        return None
    try:
        run = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = run.stdout.split()
    return words[-1] if run.returncode == 0 and words else None


def mesh_version(flags: Globals) -> dict[str, str] | None:
    """Name and version of the running mesh; None if no mesh runs. A named mesh that does not answer is a failure."""
    from mantle.cli.machine_client import MachineClient

    try:
        status = MachineClient(flags.mesh).get("/v1/status")
    except Failure:
        if flags.mesh is not None:
            raise
        return None
    return {"name": status["mesh"], "version": status["version"]}
