"""What the daemon needs from the node runtime, and nothing more; the tests' fake implements it too."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

from mantle.platform.machine.services import Row
from mantle.platform.machine.spec import PodSpec, PodStatus


class RuntimeRefused(Exception):
    """The runtime could not do what was asked; the text says why and what to do."""


class Runtime(Protocol):
    async def pods(self) -> list[tuple[PodSpec, PodStatus, bool]]:
        """Every pod it has: (spec, last status, do its processes run)."""
        ...

    async def start(self, spec: PodSpec) -> None:
        """Starts a pod whose volumes are written. Raises `RuntimeRefused`."""
        ...

    def watch(self, uid: str) -> AsyncIterator[PodStatus]:
        """The status now and at each change; ends when the pod's processes are gone."""
        ...

    async def stop(self, uid: str, grace: float | None) -> None:
        """Tells a pod to end within `grace` seconds (None: its own); does not wait for that."""
        ...

    async def remove(self, uid: str) -> None:
        """Forgets a pod whose processes are gone, and its files."""
        ...

    async def started(self, uid: str, container: str) -> None:
        """A container's startup probe has passed."""
        ...

    async def restart(self, uid: str, container: str, why: str) -> None:
        """A probe found a container dead."""
        ...

    async def exec_probe(self, uid: str, container: str, argv: Iterable[str], seconds: float) -> tuple[int | None, str]:
        """(exit code or None when it took too long, what it printed)."""
        ...

    async def dial(self, uid: str, port: int) -> socket.socket:
        """A socket connected to 127.0.0.1:port inside the pod."""
        ...

    async def router_socket(self) -> socket.socket:
        """A new TCP socket in the router's network namespace."""
        ...

    async def services(self, rows: Iterable[Row]) -> None:
        """Replaces the router's table."""
        ...
