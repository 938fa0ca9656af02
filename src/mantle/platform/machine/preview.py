"""An `up` checked without a mesh: what the daemon would refuse, before one is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mantle.platform.machine import host
from mantle.platform.machine.applying import prepare, request_of
from mantle.platform.machine.controller import RESERVED
from mantle.platform.machine.places import state_root
from mantle.platform.machine.state import MeshConfig, StateDir
from mantle.platform.machine.yamlpos import Mistake


def mistakes(body: Mapping[str, Any]) -> list[Mistake]:
    """Everything wrong with the body of an apply request, for a mesh that has nothing yet."""
    try:
        proxy = host.find_proxy()
    except FileNotFoundError as error:
        return [Mistake("", 0, str(error))]
    machine = host.machine(MeshConfig("preview"), StateDir(state_root() / "preview"), "", proxy)
    result = prepare(request_of(body), {}, machine, RESERVED)
    return result if isinstance(result, list) else []
