"""`mantle ps`: the pods of a mesh, with what keeps each from being ready."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import json_text, left_table, write

WIDE = ("IP", "SERVICE ACCOUNT", "UID")


@mesh_command(on_a_cluster="kubectl get pods", selects="A")
@click.option("--no-control-plane", is_flag=True, help="Leave Mantle's own pods out.")
def command(flags: Globals, no_control_plane: bool) -> None:
    """List the pods of a mesh, of every namespace unless -n names one."""
    output = flags.output_of("table", "wide", "json")
    namespace = None if flags.all_namespaces else flags.namespace
    from mantle.cli.machine_client import MachineClient

    status = MachineClient(flags.mesh).get("/v1/status")
    pods = [p for p in status["pods"] if namespace in (None, p["namespace"])]
    if no_control_plane:
        pods = [p for p in pods if p["namespace"] != "mantle"]
    if output == "json":
        write(json_text({**status, "pods": pods}))
        return
    if not pods:
        where = f" in namespace {namespace}" if namespace else ""
        click.echo(f"no pods{where} in mesh {status['mesh']}", err=True)
        return
    header = ["NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS", "AGE", "MESHED", *(WIDE if output == "wide" else ())]
    write(left_table(header, [_row(p, output == "wide") for p in pods]))


def _row(pod: Mapping[str, Any], wide: bool) -> list[str]:
    serving = [c for c in pod["containers"] if c["role"] != "init"]
    ready = sum(c["ready"] for c in serving)
    row = [
        pod["namespace"],
        pod["name"],
        f"{ready}/{len(serving)}",
        state(pod),
        str(pod["restarts"]),
        age(pod["age_seconds"]),
        "yes" if pod["meshed"] else "no",
    ]
    return row + ([pod["ip"], pod["service_account"], pod["uid"]] if wide else [])


def state(pod: Mapping[str, Any]) -> str:
    """The word kubectl shows: the phase, or the reason of the container that keeps the pod from running."""
    if pod["phase"] in ("Terminating", "Failed"):
        return "Error" if pod["phase"] == "Failed" else "Terminating"
    if pod["phase"] == "Succeeded":
        return "Completed"
    inits = [c for c in pod["containers"] if c["role"] == "init"]
    done = sum(c["exit_code"] == 0 for c in inits)
    for container in pod["containers"]:
        if container["state"] == "waiting" and container["reason"] in ("CrashLoopBackOff", "StartError"):
            return f"{'Init:' if container['role'] == 'init' else ''}{container['reason']}"
        if container["state"] == "terminated" and container["exit_code"] != 0:
            return f"{'Init:' if container['role'] == 'init' else ''}{container['reason'] or 'Error'}"
    if pod["phase"] == "Pending":
        return f"Init:{done}/{len(inits)}" if done < len(inits) else "PodInitializing"
    return str(pod["phase"])


def age(seconds: float) -> str:
    """`45s`, `3m12s`, `2h5m`, `3d4h`."""
    whole = int(seconds)
    for big, small, per_big, per_small in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if whole >= per_big:
            rest = whole % per_big // per_small
            return f"{whole // per_big}{big}" + (f"{rest}{small}" if rest else "")
    return f"{whole}s"
