"""Writes what lies in a pod's volumes, on tmpfs, each file whole or not at all.

Volumes lie in the pod's state directory, which only the mesh's owner may enter; inside the pod a volume is what the
supervisor binds. A file of a Secret, and every token, belongs to the user who reads it and to nobody else, unless the
manifest lets containers of several users share it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from mantle.platform.machine.volumes import File, Volume

Owners = tuple[tuple[int, int], ...]


def write_volumes(
    root: Path,
    volumes: Iterable[Volume],
    owners: Mapping[str, Owners],
    sub_paths: Iterable[tuple[str, str]],
    chown: bool,
) -> None:
    """Makes every volume under `root`. `chown`: we are root, so files can belong to their readers."""
    made: dict[str, Volume] = {}
    for volume in volumes:
        made[volume.name] = volume
        if volume.source:
            _host_path(volume)
            continue
        directory = root / volume.name
        directory.mkdir(parents=True, exist_ok=True)
        if not volume.writable:  # what lies in an emptyDir is the application's
            tokens = {directory / token.path for token in volume.tokens}
            write_files(directory, volume.files, owners.get(volume.name, ()), volume.secret, chown, tokens)
        directory.chmod(0o777 if volume.writable else 0o755)
    for name, sub in sub_paths:
        volume = made[name]
        if volume.writable and not volume.source:
            with contextlib.suppress(OSError):  # the application put something else there: its start says so
                _make_below(root / name, sub)


def _make_below(directory: Path, sub: str) -> None:
    """Makes the directories `sub` in a volume that applications may write to: nothing that is there already is
    followed or changed, for it may be a symbolic link to anywhere. Raises OSError if a part is no directory.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        parts = [part for part in sub.split("/") if part]
        for number, part in enumerate(parts, 1):
            made = True
            try:
                os.mkdir(part, dir_fd=fd)
            except FileExistsError:
                made = False
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = inner
            if made and number == len(parts):
                os.fchmod(fd, 0o777)
    finally:
        os.close(fd)


def _host_path(volume: Volume) -> None:
    path = Path(volume.source)
    if volume.create == "dir":
        path.mkdir(parents=True, exist_ok=True)
    elif volume.create == "file" and not path.exists():
        path.touch()


def write_files(
    directory: Path, files: Iterable[File], owners: Owners, secret: bool, chown: bool, keep: Iterable[Path]
) -> None:
    """The volume's files, and nothing that it no longer has. `keep`: its tokens, which `write_token` writes."""
    wanted: set[Path] = set(keep)
    for file in files:
        path = directory / file.path
        wanted.add(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path.is_file() and path.read_bytes() == file.data):
            _put(path, file.data, file.mode, owners, secret, chown)
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_file() and path not in wanted and not path.name.startswith("."):
            path.unlink()


def write_token(path: Path, token: str, owners: Owners, chown: bool) -> None:
    """A token in place of the one before, readable by its user only. A reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _put(path, token.encode(), 0o400, owners, True, chown)


def _put(path: Path, data: bytes, mode: int, owners: Owners, secret: bool, chown: bool) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _all(descriptor, data)
        if chown and owners:
            os.fchown(descriptor, *owners[0])
        if secret:
            mode = mode & ~0o007 if len(owners) < 2 else mode
            mode |= 0o400
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)
    temporary.rename(path)


def _all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def remove_pod(directory: Path) -> None:
    """A pod's directory, once its processes are gone."""
    shutil.rmtree(directory, ignore_errors=True)
