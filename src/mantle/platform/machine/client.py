"""Talking to a mesh's node and to its pods, with asyncio, for the daemon. `direct.py` has blocking calls for commands.

Every refusal is `wire.Refused` (reason, message, fix); a node or pod that is gone is an OSError of the connection
(`wire.Closed` in the middle of it). Sockets that come back are non-blocking and belong to the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

from mantle.platform.machine import wire
from mantle.platform.machine.direct import exec_request
from mantle.platform.machine.spec import (
    NodeConfig,
    PodSpec,
    PodStatus,
    RunningPod,
    ServicePort,
    status_from_json,
    to_json,
)


def start_node(config: NodeConfig, log: BinaryIO, timeout: float = 60.0) -> int:
    """Starts a node that outlives this process. Returns the guard's pid; `node.sock` answers then.

    What the node itself has to say later goes to `log` (a real file). Raises `wire.Refused` with the fix.
    """
    command = [sys.executable, "-m", "mantle.platform.machine.node"]
    text = json.dumps(to_json(config))
    try:
        done = subprocess.run(
            command, input=text, stdout=subprocess.PIPE, stderr=log, text=True, timeout=timeout, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        raise wire.Refused("node_setup", f"the node did not start within {timeout:g} s", f"see {log.name}") from None
    if not done.stdout:
        raise wire.Refused("node_setup", "the node ended before it was set up", f"see {log.name}")
    return int(wire.check(json.loads(done.stdout))["pid"])


class Channel:
    """One conversation on the running event loop. Use it as an async context manager."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._decoder = wire.Decoder()
        self._frames: list[wire.Frame] = []

    async def __aenter__(self) -> Channel:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            wire.connect(self._socket, self._path)
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        return self

    async def __aexit__(
        self, _t: type[BaseException] | None, _e: BaseException | None, _b: TracebackType | None
    ) -> None:
        self._decoder.close()
        wire.close_all(fd for _, fds in self._frames for fd in fds)
        self._socket.close()

    async def send(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        data = wire.pack(message)
        if fds:
            # The first byte carries the descriptors; a fresh connection's buffer always has room for it.
            socket.send_fds(self._socket, [data[:1]], fds)
            data = data[1:]
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def receive(self) -> wire.Frame:
        while not self._frames:
            try:
                data, fds = wire.receive(self._socket)
            except BlockingIOError:
                await _readable(self._socket)
                continue
            if not data:
                raise wire.Closed("the other side closed the connection")
            self._frames = self._decoder.feed(data, fds)
        message, fds = self._frames.pop(0)
        return wire.check(message), fds


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


async def _call(path: str | Path, message: wire.Message, fds: Sequence[int] = ()) -> wire.Frame:
    async with Channel(path) as channel:
        await channel.send(message, fds)
        return await channel.receive()


class NodeClient:
    """The node of the mesh in `state_dir`. Stateless: each call is a connection of its own (0.1 ms)."""

    def __init__(self, state_dir: str | Path) -> None:
        self._path = Path(state_dir) / "node.sock"

    async def start_pod(self, pod: PodSpec) -> None:
        """Returns when its supervisor answers on `pods/UID/ctl.sock`; containers start after that."""
        await _call(self._path, {"op": "start_pod", "pod": to_json(pod)})

    async def stop_pod(self, uid: str, grace: float | None = None) -> None:
        """Returns when the pod is gone. `grace` in seconds; None: the pod's own. Call again to shorten it."""
        await _call(self._path, {"op": "stop_pod", "uid": uid, "grace": grace})

    async def pods(self) -> list[RunningPod]:
        answer, _ = await _call(self._path, {"op": "pods"})
        return [RunningPod(**item) for item in answer["pods"]]

    async def socket(
        self, kind: Literal["tcp", "udp"], bind: tuple[str, int] | None = None, *, listen: bool = False
    ) -> socket.socket:
        """A non-blocking socket in the router's namespace: connect it to a pod, or serve DNS on it."""
        _, fds = await _call(self._path, {"op": "socket", "kind": kind, "bind": bind, "listen": listen})
        return socket.socket(fileno=fds[0])

    async def services(self, table: Sequence[ServicePort]) -> None:
        """Replaces the table of service addresses for pods outside the mesh."""
        await _call(self._path, {"op": "services", "table": to_json(tuple(table))})

    async def shutdown(self, grace: float | None = None) -> None:
        """Stops all pods, then the node. Returns when the last pod is gone."""
        await _call(self._path, {"op": "shutdown", "grace": grace})


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What an exec probe's command did. `exit_code` None: it did not end in time and was killed."""

    exit_code: int | None
    output: str


class PodClient:
    """The supervisor of one pod, by its `ctl.sock`. Stateless like `NodeClient`."""

    def __init__(self, pod_dir: str | Path) -> None:
        self._path = Path(pod_dir) / "ctl.sock"

    async def watch(self) -> AsyncIterator[PodStatus]:
        """The status now, then each change. Ends when the pod has, at once if it had before; the last status is also
        in `status.json`.
        """
        with contextlib.suppress(FileNotFoundError, ConnectionError):
            async with Channel(self._path) as channel:
                await channel.send({"op": "watch"})
                while True:
                    message, _ = await channel.receive()
                    yield status_from_json(message["status"])

    async def started(self, container: str) -> None:
        """Its startup probe has passed."""
        await _call(self._path, {"op": "started", "container": container})

    async def restart(self, container: str, why: str) -> None:
        """Its liveness or startup probe failed: it is ended and the restart policy applies."""
        await _call(self._path, {"op": "restart", "container": container, "why": why})

    async def stop(self, grace: float | None = None) -> None:
        await _call(self._path, {"op": "stop", "grace": grace})

    async def probe(self, container: str, argv: Sequence[str], timeout: float) -> ProbeResult:  # noqa: ASYNC109
        """Runs an exec probe for at most `timeout` seconds."""
        request = {"op": "probe", "container": container, "argv": list(argv), "timeout": timeout}
        answer, _ = await _call(self._path, request)
        return ProbeResult(answer["exit"], answer["output"])

    async def exec(
        self,
        container: str,
        argv: Sequence[str],
        stdio: tuple[int, int, int],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        tty: bool = False,
    ) -> int:
        """Runs a command in a container on these descriptors. Returns its exit code; cancelled, it is killed."""
        async with Channel(self._path) as channel:
            await channel.send(exec_request(container, argv, env, cwd, tty), stdio)
            while True:
                answer, _ = await channel.receive()
                if "exit" in answer:
                    return int(answer["exit"])

    async def dial(self, port: int) -> socket.socket:
        """A connection to 127.0.0.1:port inside the pod, past its proxy."""
        _, fds = await _call(self._path, {"op": "dial", "port": port})
        return socket.socket(fileno=fds[0])
