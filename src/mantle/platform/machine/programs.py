"""Where Mantle's own programs are on this machine. Imports nothing that would slow a command down."""

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
