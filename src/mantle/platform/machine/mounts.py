"""What a container sees of the file system: the host's, with the pod's files bound over it and the mesh hidden.

Runs as the container's init, alone in its new mount namespace, before privileges are dropped. Nothing is ever
created on the host's file systems: a missing path appears on a tmpfs that stands in for its nearest ancestor
(`View.ensure`)."""

# Paths here are arguments of system calls, and many of them descriptors under /proc.

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from mantle.platform.machine.namespaces import (
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    mount,
    pivot_root,
)

_HOLD = "/tmp"
"""A directory that every host has, where a new root is put together."""


class View:
    """The mounts of one container, made in order: `make_root_ours`, `open` all, `scratch`, `expose`, `hide`, `bind`,
    `seal`."""

    def __init__(self) -> None:
        self._ours: set[str] = set()
        """Directories that are our own tmpfs: there entries can be made."""
        self._scratch: set[str] = set()
        """Those of them that the container may write to."""

    def hide(self, directory: str) -> None:
        """An empty, read-only directory in its place. Nothing to hide is fine."""
        if os.path.isdir(directory):
            mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, "mode=755,size=4k")

    def scratch(self, directory: str) -> None:
        """An empty directory of the container's own that everyone may write to (/tmp, /dev/shm)."""
        if os.path.isdir(directory):
            mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
            self._scratch.add(os.path.realpath(directory))
            self._ours |= self._scratch

    def open(self, path: str) -> int:
        """A descriptor that still leads to `path` when something is mounted over its ancestors."""
        return os.open(path, os.O_PATH | os.O_CLOEXEC)

    def open_below(self, path: str, below: str) -> int:
        """As `open`, of `below` in the directory `path`. Raises OSError for a symbolic link on the way there: whoever
        may write in `path` could lead us, who have all rights, to any file of the host.
        """
        fd = self.open(path)
        for part in filter(None, below.split("/")):
            outer = fd
            try:
                fd = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=outer)
            except OSError as error:
                raise OSError(error.errno, error.strerror, f"{path}/{below}") from None
            finally:
                os.close(outer)
            if part == ".." or stat.S_ISLNK(os.fstat(fd).st_mode):
                os.close(fd)
                raise OSError(errno.ELOOP, f"{part} is no directory or file of the volume itself", f"{path}/{below}")
        return fd

    def expose(self, opened: Sequence[tuple[str, int]], uid: int, gids: Iterable[int]) -> None:
        """Makes directories reachable for `uid` though an ancestor is private or was replaced.

        The topmost ancestor that the user may not enter becomes a tmpfs on which only these directories appear.
        """
        groups = set(gids)
        for path, fd in opened:
            if self._same(path, fd) and _private_ancestor(path, uid, groups) is None:
                continue
            ancestor = _private_ancestor(path, uid, groups)
            if ancestor and ancestor not in self._ours:
                mount("tmpfs", ancestor, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
                self._ours.add(ancestor)
            self._make(path, directory=stat.S_ISDIR(os.fstat(fd).st_mode))
            mount(f"/proc/self/fd/{fd}", path, None, MS_BIND | MS_REC)

    def bind(self, fd: int, target: str, *, read_only: bool = False) -> None:
        """Shows an opened file or directory at `target`, which need not exist."""
        target = self.ensure(target, directory=stat.S_ISDIR(os.fstat(fd).st_mode))
        mount(f"/proc/self/fd/{fd}", target, None, MS_BIND | MS_REC)
        if read_only:
            # Flags that the file system already has are locked in a user namespace and must be said again.
            kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
            mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)

    def seal(self) -> None:
        """The last step: what stands in for a directory of the host cannot be written to, whoever the container is.

        Neither can /proc/sys: without root, the owner of the network namespace could change the pod's network there.
        """
        mount("/proc/sys", "/proc/sys", None, MS_BIND | MS_REC)
        mount(None, "/proc/sys", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
        for directory in self._ours - self._scratch:
            mount(None, directory, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)

    def ensure(self, target: str, *, directory: bool) -> str:
        """The real path of `target`, made if it is missing. Raises OSError if a file is in the way."""
        real = os.path.realpath(target)
        if os.path.lexists(real):
            if os.path.isdir(real) != directory:
                kind = "a file" if directory else "a directory"
                raise OSError(f"{target} cannot be mounted: it is {kind} on this machine")
            return real
        ancestor = os.path.dirname(real)
        while not os.path.isdir(ancestor):
            ancestor = os.path.dirname(ancestor)
        if not self._inside_ours(ancestor):
            self._replace(ancestor)
        self._make(real, directory=directory)
        return real

    def _same(self, path: str, fd: int) -> bool:
        """Is what was opened still what the path leads to?"""
        try:
            return os.path.samestat(os.stat(path), os.fstat(fd))
        except OSError:
            return False

    def _inside_ours(self, directory: str) -> bool:
        return any(directory == ours or _same_mount(directory, ours) for ours in self._ours if _under(directory, ours))

    def _make(self, path: str, *, directory: bool) -> None:
        before = os.umask(0o022)
        try:
            os.makedirs(path if directory else os.path.dirname(path), 0o755, exist_ok=True)
            if not directory and not os.path.lexists(path):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        finally:
            os.umask(before)

    def _replace(self, directory: str) -> None:
        """A tmpfs in place of `directory` that shows everything that was there."""
        held = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            mode = stat.S_IMODE(os.fstat(held).st_mode)
            mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode:o},size=4m")
            for name in os.listdir(f"/proc/self/fd/{held}"):
                _show_entry(f"/proc/self/fd/{held}/{name}", f"{directory}/{name}")
        finally:
            os.close(held)
        self._ours.add(directory)

    def make_root_ours(self, targets: Iterable[str]) -> None:
        """If one of `targets` is below a missing top-level directory: a tmpfs becomes the root, with every entry shown.

        Do this before anything is opened: the old root and what was reached through it leave the namespace.
        """
        tops = {Path(os.path.realpath(target)).parts[1] for target in targets if os.path.realpath(target) != "/"}
        if all(os.path.lexists(f"/{top}") for top in tops):
            return
        held = os.open(_HOLD, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            mount("tmpfs", _HOLD, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=4m")
            for name in os.listdir("/"):
                if f"/{name}" == _HOLD:
                    os.mkdir(f"{_HOLD}/{name}")
                    mount(f"/proc/self/fd/{held}", f"{_HOLD}/{name}", None, MS_BIND | MS_REC)
                else:
                    _show_entry(f"/{name}", f"{_HOLD}/{name}")
            pivot_root(_HOLD)
        finally:
            os.close(held)
        self._ours.add("/")


def _show_entry(source: str, target: str) -> None:
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    try:
        if os.path.isdir(source):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        mount(source, target, None, MS_BIND | MS_REC)
    except OSError:
        # Something that this user may not even bind (a stale FUSE mount): it is missing from the view.
        with contextlib.suppress(OSError):
            os.rmdir(target) if os.path.isdir(target) else os.unlink(target)


def _under(path: str, directory: str) -> bool:
    return directory == "/" or path == directory or path.startswith(directory + "/")


def _same_mount(path: str, directory: str) -> bool:
    return os.stat(path).st_dev == os.stat(directory).st_dev


def _private_ancestor(path: str, uid: int, groups: set[int]) -> str | None:
    """The topmost directory above `path` that the user may not enter."""
    for ancestor in [*reversed(Path(path).parents)]:
        try:
            status = os.stat(ancestor)
        except OSError:
            return None
        if status.st_uid == uid:
            allowed = status.st_mode & stat.S_IXUSR
        elif status.st_gid in groups:
            allowed = status.st_mode & stat.S_IXGRP
        else:
            allowed = status.st_mode & stat.S_IXOTH
        if not allowed:
            return str(ancestor)
    return None
