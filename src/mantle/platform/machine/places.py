"""Where Mantle's own programs and the meshes' files are on this machine. Imports nothing that slows a command down."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def own_programs() -> Path:
    """The directory of Mantle's own executables."""
    return Path(sys.executable).parent


def find_proxy() -> str:
    """mantle-proxy: MANTLE_PROXY_PATH, which must be right if it is set, else beside this interpreter, else on PATH.

    Raises FileNotFoundError with the fix.
    """
    if given := os.environ.get("MANTLE_PROXY_PATH"):
        if Path(given).is_file() and os.access(given, os.X_OK):
            return os.path.realpath(given)
        raise FileNotFoundError(f"MANTLE_PROXY_PATH names {given}, which is no program that may be executed")
    for candidate in (str(own_programs() / "mantle-proxy"), shutil.which("mantle-proxy")):
        if candidate and os.access(candidate, os.X_OK):
            return os.path.realpath(candidate)
    raise FileNotFoundError("mantle-proxy is not installed: run `make install`, or install the package mantle-proxy")


def state_root() -> Path:
    """Where this user's meshes live, one directory a mesh: in memory, because keys and tokens lie there. /run and
    XDG_RUNTIME_DIR are, but not in every container.
    """
    uid = os.geteuid()
    runtime = "/run" if uid == 0 else os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime, "mantle") if runtime and in_memory(runtime) else Path(f"/dev/shm/mantle-{uid}")


def in_memory(directory: str, mounts: str = "/proc/self/mounts") -> bool:
    """Does it lie on a tmpfs? Its own mount says so, or the one around it."""
    found, kind = "", ""
    try:
        lines = Path(mounts).read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        _, target, this, *_ = line.split(" ")
        if (directory == target or directory.startswith(target.rstrip("/") + "/")) and len(target) >= len(found):
            found, kind = target, this
    return kind in ("tmpfs", "ramfs")
