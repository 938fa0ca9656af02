"""The daemon's runtime: the node and the supervisors of one mesh, behind `Runtime`. Translates, and decides nothing."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

from mantle.platform.machine import wire
from mantle.platform.machine.client import Channel, NodeClient, PodClient
from mantle.platform.machine.direct import read_status
from mantle.platform.machine.runtime import RuntimeRefused
from mantle.platform.machine.services import Row
from mantle.platform.machine.spec import Phase, PodSpec, PodStatus, ServicePort, pod_from_json, to_json

_SPEC = "spec.json"


class NodeRuntime:
    """`state_dir` is the mesh's directory. Every failure is an OSError (nobody answers) or `RuntimeRefused`."""

    def __init__(self, state_dir: Path) -> None:
        self._pods = state_dir / "pods"
        self._socket = state_dir / "node.sock"
        self._node = NodeClient(state_dir)

    async def pods(self) -> list[tuple[PodSpec, PodStatus, bool]]:
        alive = {p.uid for p in await self._node.pods() if p.alive}
        found = []
        for directory in self._pods.iterdir() if self._pods.is_dir() else ():
            try:
                spec = pod_from_json(json.loads((directory / _SPEC).read_text()))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # half written by a daemon that was killed: its pod never started
            status = read_status(directory) or PodStatus(spec.uid, Phase.PENDING)
            found.append((spec, status, spec.uid in alive))
        return found

    async def start(self, spec: PodSpec) -> None:
        path = self._pods / spec.uid / _SPEC
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(json.dumps(to_json(spec)))
        with _refusals():
            await self._node.start_pod(spec)

    async def watch(self, uid: str) -> AsyncIterator[PodStatus]:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            async for status in PodClient(self._pods / uid).watch():
                yield status
        last = read_status(self._pods / uid)
        if last is not None:
            yield last

    async def stop(self, uid: str, grace: float | None) -> None:
        with _refusals():
            await self._node.stop_pod(uid, grace)

    async def remove(self, uid: str) -> None:
        with contextlib.suppress(wire.Refused):  # the node has forgotten it already
            await self._node.stop_pod(uid, 0)

    async def started(self, uid: str, container: str) -> None:
        with _refusals():
            await PodClient(self._pods / uid).started(container)

    async def restart(self, uid: str, container: str, why: str) -> None:
        with _refusals():
            await PodClient(self._pods / uid).restart(container, why)

    async def exec_probe(self, uid: str, container: str, argv: Iterable[str], seconds: float) -> tuple[int | None, str]:
        with _refusals():
            result = await PodClient(self._pods / uid).probe(container, list(argv), seconds)
            return result.exit_code, result.output

    async def dial(self, uid: str, port: int) -> socket.socket:
        with _refusals():
            return await PodClient(self._pods / uid).dial(port)

    async def router_socket(self) -> socket.socket:
        with _refusals():
            return await self._node.socket("tcp")

    async def services(self, rows: Iterable[Row]) -> None:
        table = [ServicePort(r.vip, r.port, tuple((e.ip, e.port) for e in r.endpoints), r.protocol) for r in rows]
        with _refusals():
            await self._node.services(table)

    async def dns_sockets(self, ip: str) -> tuple[socket.socket, socket.socket]:
        """(UDP, listening TCP) on port 53 of the router."""
        with _refusals():
            udp = await self._node.socket("udp", (ip, 53))
            return udp, await self._node.socket("tcp", (ip, 53), listen=True)

    async def shutdown(self, grace: float | None) -> None:
        with _refusals():
            await self._node.shutdown(grace)

    async def wait_gone(self) -> None:
        """Returns when the node is gone."""
        with contextlib.suppress(OSError, wire.Refused):
            async with Channel(self._socket) as channel:
                await channel.receive()


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except wire.Refused as refused:
        raise RuntimeRefused(str(refused)) from refused
