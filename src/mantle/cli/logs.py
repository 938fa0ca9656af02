"""`mantle logs`: what a container wrote, straight from the files that its supervisor keeps."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from mantle.cli.main import Globals, mesh_command
from mantle.cli.output import Failure
from mantle.cli.podnames import choose_container, find_pod

_FOLLOW_SECONDS = 0.2


@mesh_command(on_a_cluster="kubectl logs")
@click.argument("pod", metavar="POD|deploy/NAME")
@click.option("-c", "--container", metavar="NAME", help="Which container (default: the application's first).")
@click.option("-f", "--follow", is_flag=True, help="Go on as it writes, until Ctrl-C or the end of the pod.")
@click.option("--tail", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines.")
@click.option("-t", "--timestamps", is_flag=True, help="With the time of each line.")
def command(flags: Globals, pod: str, container: str | None, follow: bool, tail: int | None, timestamps: bool) -> None:
    """Print what a container of a pod wrote. Standard output and standard error are told apart by where they go
    here.
    """
    from mantle.cli.machine_client import MachineClient

    status = MachineClient(flags.mesh).get("/v1/status")
    found = find_pod(status, pod, flags.namespace)
    name = choose_container(found, container, running=False)
    path = Path(status["state_dir"]) / "pods" / found["uid"] / "logs" / f"{name}.log"
    if not path.exists() and not follow:
        state = next(c for c in found["containers"] if c["name"] == name)
        if state["state"] == "running":  # it is silent so far, which is no mistake (kubectl says the same: nothing)
            return
        raise Failure(
            f"container {name} has not written anything yet ({state['reason'] or state['state']})",
            fix="see `mantle ps`",
        )
    with contextlib.suppress(KeyboardInterrupt):  # how following ends
        for line in _lines(path, follow, tail):
            _print(line, timestamps)
        sys.stdout.flush()


def _lines(path: Path, follow: bool, tail: int | None) -> Iterator[bytes]:
    """Whole lines, oldest first, across the file that was full before; then new ones until the pod's directory is
    gone.
    """
    old = path.with_name(path.name + ".1")
    before = old.read_bytes().splitlines(keepends=True) if old.exists() else []
    current = _open(path, follow)
    if current is None:
        return
    with current:
        before += current.readlines()
        yield from before if tail is None else before[len(before) - min(tail, len(before)) :]
        stream = current
        while follow:
            line = stream.readline()
            if line:
                yield line
                continue
            sys.stdout.flush()
            if not path.exists():
                return
            if os.fstat(stream.fileno()).st_ino != path.stat().st_ino:  # it was full: the supervisor began a new one
                yield from stream.readlines()
                stream.close()
                stream = path.open("rb")
                continue
            time.sleep(_FOLLOW_SECONDS)


def _open(path: Path, follow: bool):  # type: ignore[no-untyped-def]
    while not path.exists():
        if not follow or not path.parent.parent.exists():
            return None
        time.sleep(_FOLLOW_SECONDS)
    return path.open("rb")


def _print(line: bytes, timestamps: bool) -> None:
    stamp, stream, text = [*line.rstrip(b"\n").split(b" ", 2), b"", b""][:3]
    out = sys.stderr if stream == b"stderr" else sys.stdout
    shown = stamp + b" " + text if timestamps else text
    out.flush()
    out.buffer.write(shown + b"\n")
