"""`mantle down`: stops a mesh and removes every trace of it, whatever happened to it before."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from mantle.cli.launch import DEFAULT_MESH, check_name, is_running, refuse_foreign
from mantle.cli.machine_client import MachineClient, running_meshes, state_root
from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure

_GONE_TIMEOUT = 10.0
_LINKS_TIMEOUT = 3.0


@mesh_command(on_a_cluster="mantle uninstall | kubectl delete -f -")
@click.option("--all", "every", is_flag=True, help="Every mesh of this user.")
def command(flags: Globals, every: bool) -> int:
    """Stop a mesh and remove every trace of it: processes, namespaces, mounts, links, rules, files.

    Works after anything, a `kill -9` of every process of the mesh included. Taking down what is not there succeeds.
    """
    root = state_root()
    found = _meshes(root) if root.is_dir() else []
    if every:
        meshes = found
    elif flags.mesh:
        meshes = [check_name(flags.mesh)]
        if flags.mesh not in found:
            refuse_foreign(flags.mesh)
    else:
        running = running_meshes(root)
        candidates = running or found
        if len(candidates) > 1:
            raise Failure(
                f"several meshes are running: {', '.join(candidates)}", fix="say which one with --mesh NAME, or --all"
            )
        meshes = candidates or [DEFAULT_MESH]
    for mesh in meshes:
        if (root / mesh).exists():
            take_down(mesh, click.echo)
            click.echo(f"mesh {mesh} is down")
        else:
            click.echo(f"mesh {mesh} is not running")
    sweep(root)
    return 0


def take_down(mesh: str, say: Callable[[str], None]) -> None:
    """Asks the daemon to end everything, or does it when there is none. `say` gets a line for each pod that is gone."""
    directory = state_root() / mesh
    lock = _lock(directory)
    if lock >= 0:
        os.close(lock)
    asked = is_running(mesh)
    if asked:
        try:
            for event in MachineClient(mesh).stream("/v1/down", {}):
                if event["event"] == "removed":
                    say(f"{event['object']} (namespace {event['namespace']}) removed")
        except Failure:
            asked = False  # it ended while it spoke: what is left is removed below
    clean_up(directory, asked)
    sweep(state_root())


def clean_up(directory: Path, ending: bool) -> None:
    """Ends what still runs of a mesh and forgets its directory. `ending`: its processes are about to leave by
    themselves.

    Killing the node's guard takes every pod with it.
    """
    from mantle.platform.machine.direct import kill_node, process_start

    lock = _lock(directory)  # a daemon that is starting holds it: let it come up, then end it
    known = _known(directory)
    for pid_key, start_key in (
        ("supervisor_pid", "supervisor_start"),
        ("daemon_pid", "daemon_start"),
        ("node_pid", "node_start"),
    ):
        pid = int(known.get(pid_key) or 0)
        if pid and process_start(pid) == known.get(start_key) and not (ending and _wait_gone(pid)):
            kill_node(pid)
            _wait_gone(pid)
    shutil.rmtree(directory, ignore_errors=True)
    if lock >= 0:
        os.close(lock)
    if directory.exists():
        raise Failure(f"{directory} could not be removed", fix="remove it by hand")


def _lock(directory: Path) -> int:
    """The directory locked, waiting for whoever has it for so long at most; -1 if that was too long or it is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    deadline = time.monotonic() + _GONE_TIMEOUT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                return -1
            time.sleep(0.05)


def sweep(root: Path) -> None:
    """What belongs to no mesh in particular: the host's ip_forward, and the empty directory of all meshes."""
    if not root.is_dir() or root.lstat().st_uid != os.geteuid():
        return
    if os.geteuid() == 0:
        from mantle.platform.machine.uplink import restore

        deadline = time.monotonic() + _LINKS_TIMEOUT
        restore(root)
        # The kernel removes a killed mesh's link a moment after its last process; nothing tells us when.
        while not _meshes(root) and (root / "ip_forward").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
            restore(root)
    if not any(root.iterdir()):
        root.rmdir()


def _meshes(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir())


def _known(directory: Path) -> Mapping[str, Any]:
    known: dict[str, Any] = {}
    for name in ("mesh.json", "daemon.json"):
        try:
            if (directory / name).lstat().st_uid != os.geteuid():
                continue  # a process that somebody else names is not ours to end
            value = json.loads((directory / name).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(value, dict):
            known |= value
    return known


def _wait_gone(pid: int) -> bool:
    """Has it ended? Waits until the process has ended (its descriptor becomes readable then), for so many seconds at
    most.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        return bool(select.select([descriptor], [], [], _GONE_TIMEOUT)[0])
    finally:
        os.close(descriptor)
