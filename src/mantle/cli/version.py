"""`mantle version`: the versions of both programs and of the running mesh.

`--client` must start in 80 ms, so nothing is imported or run for it but this package's own version.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

import mantle
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure, json_text, write

if TYPE_CHECKING:
    from mantle.cli.target import Cluster


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
        word = "context" if mesh and mesh["platform"] == "cluster" else "mesh"
        where = f"{mesh['version']} ({word} {mesh['name']})" if mesh else "unavailable"
        lines.append(f"Mesh version: {where}")
        if mesh and mesh["version"] != versions["client"]:
            lines.append(
                "The mesh was started by another version: stop it with `mantle down` and start it again."
                if word == "mesh"
                else "The mesh was installed by another version: `mantle upgrade` brings it to this one."
            )
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
    """Where the mesh is, and its version; None if there is none. A named one that does not answer is a failure."""
    from mantle.cli.target import Machine, target

    try:
        found = target(flags, json=True)
        if isinstance(found, Machine):
            status = found.client.get("/v1/status")
            return {"name": status["mesh"], "version": status["version"], "platform": "machine"}
        return _on_cluster(found)
    except Failure:
        if flags.mesh is not None or flags.cluster_flags:
            raise
        return None


def _on_cluster(cluster: Cluster) -> dict[str, str] | None:
    """What `mantle install` wrote down of itself. Raises `Failure` if it cannot be read."""
    import json

    from mantle.cli.kube_client import Refused

    namespace = "mantle"
    with suppress(Refused):  # who may not list namespaces can still look into the usual one
        labelled = {"labelSelector": "mantle.dev/is-control-plane=true"}
        for found in cluster.client.get("/api/v1/namespaces", labelled).get("items") or ():
            namespace = found["metadata"]["name"]
    path = f"/api/v1/namespaces/{namespace}/configmaps/mantle-config"
    try:
        values = json.loads(cluster.client.get(path)["data"]["values"])
        version = str(values["version"])
        return {"name": cluster.client.access.context, "version": version, "platform": "cluster"}
    except Refused as refused:
        if refused.answer.status == 404:
            return None
        raise Failure(f"the mesh's version cannot be read: {refused.answer.message}") from refused
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"ConfigMap {namespace}/mantle-config has no version", fix="run `mantle upgrade`") from error
