"""Starting a mesh's daemon from a command, after everything that could keep it from working has been looked at.

A daemon that runs is used as it is. One that died while its pods live is started again, and takes them over.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mantle.cli.machine_client import MachineClient, running_meshes, state_root
from mantle.cli.output import Failure, Problem

DEFAULT_MESH = "default"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,29}[a-z0-9])?\Z")


@dataclass(frozen=True, slots=True)
class Launch:
    """How a new mesh is to be; ignored for one that runs."""

    pod_cidr: str | None = None
    service_cidr: str | None = None
    issuance_lifetime: str | None = None
    proxy_env: Sequence[str] = ()

    def arguments(self) -> list[str]:
        named = {
            "--pod-cidr": self.pod_cidr,
            "--service-cidr": self.service_cidr,
            "--issuance-lifetime": self.issuance_lifetime,
        }
        words = [word for flag, value in named.items() if value for word in (flag, value)]
        return words + [word for item in self.proxy_env for word in ("--proxy-env", item)]


def check_name(mesh: str) -> str:
    """The name itself. Raises a usage error for one that cannot name a directory, a link and a table."""
    if not _NAME.match(mesh):
        raise click.UsageError(f"--mesh {mesh!r}: use at most 31 small letters, digits and `-`")
    return mesh


def refuse_foreign(mesh: str) -> None:
    """Raises a `Failure` if the mesh of that name is another user's."""
    own = state_root()
    places = [Path("/run/mantle"), *Path("/run/user").glob("*/mantle"), *Path("/dev/shm").glob("mantle-*")]
    for place in places:
        if place == own:
            continue
        try:
            owner = (place / mesh).stat().st_uid
        except OSError:
            continue
        if not (own / mesh).exists():
            raise Failure(
                f"mesh {mesh} belongs to {_user(owner)}",
                fix=f"run the command as {_user(owner)}, or choose another --mesh",
            )


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def is_running(mesh: str) -> bool:
    return mesh in running_meshes(state_root())


def ensure(mesh: str, launch: Launch) -> tuple[MachineClient, bool]:
    """The client of a mesh whose daemon answers, and whether it was started just now. Raises `Failure`, and then
    nothing runs.
    """
    check_name(mesh)
    if is_running(mesh):
        return MachineClient(mesh), False
    refuse_foreign(mesh)
    preflight()
    start(mesh, launch)
    return MachineClient(mesh), True


def preflight() -> None:
    """Raises `Failure` with all that this machine lacks for a mesh."""
    if lacks := obstacles():
        raise Failure.of(lacks)


def obstacles() -> list[Problem]:
    """What this machine lacks for a mesh, all of it at once."""
    if sys.platform != "linux":
        fix = "use a Linux machine, or a Linux virtual machine on this one"
        return [Problem("a mesh on one machine needs Linux", fix)]
    from mantle.platform.machine.namespaces import probe

    return [Problem(f.message, f.fix) for f in probe() if f.fatal]


def start(mesh: str, launch: Launch) -> None:
    """Starts the daemon, and returns when it answers. Raises `Failure` with what it says is wrong."""
    reader, writer = os.pipe()
    command = [
        sys.executable,
        "-m",
        "mantle.platform.machine.daemon",
        "--mesh",
        mesh,
        "--state-dir",
        str(state_root() / mesh),
    ]
    command += ["--ready-fd", str(writer), *launch.arguments()]
    null = subprocess.DEVNULL
    subprocess.Popen(
        command,
        pass_fds=(writer,),
        stdin=null,
        stdout=null,
        stderr=null,
        start_new_session=True,
        cwd="/",
        env=_environment(),
    )
    os.close(writer)
    with os.fdopen(reader) as said:
        try:
            line = said.readline()
        except KeyboardInterrupt:
            said.read()  # whoever removes the mesh now must find all of it: one half up would come up behind their back
            raise
    answer: dict[str, Any] = (
        json.loads(line) if line else {"errors": [{"message": "the daemon ended at once", "fix": None}]}
    )
    if errors := answer.get("errors"):
        raise Failure.of([Problem(e["message"], e.get("fix")) for e in errors])


def _environment() -> dict[str, str]:
    """The daemon's: with absolute import paths, because it runs in `/`."""
    environment = dict(os.environ)
    if paths := environment.get("PYTHONPATH"):
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(p).resolve()) for p in paths.split(os.pathsep) if p)
    return environment
