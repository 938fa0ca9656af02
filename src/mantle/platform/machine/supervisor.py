"""PID 1 of a pod: starts its containers, writes their logs, restarts them, and answers on `ctl.sock`.

It carries out what `lifecycle.py` decides and knows nothing about images, services or the mesh. `podinit.py` makes
it in the pod's namespaces. It keeps its rights (applications have none) and needs nobody afterwards: the daemon may
come and go.

`ctl.sock` (frames of `wire.py`, one conversation a connection):
  {"op": "watch"}                                      → {"status": PodStatus} now and at every change
  {"op": "started" | "restart", "container", "why"}     → {"ok": true}
  {"op": "stop", "grace": seconds | null}              → {"ok": true}; the pod then ends
  {"op": "exec", "container", "argv", "env", "cwd", "tty"} + 3 descriptors → {"pid"}, later {"exit": code};
      {"signal": n} meanwhile is passed on; closing the connection kills the command
  {"op": "probe", "container", "argv", "timeout"}       → {"exit": code | null, "output": text}
  {"op": "dial", "port"}                                → {"ok": true} + a socket connected to 127.0.0.1:port in the pod
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from mantle.platform.machine import container, wire
from mantle.platform.machine.lifecycle import Action, Finish, Lifecycle, Signal, Start
from mantle.platform.machine.logs import Log
from mantle.platform.machine.loop import Loop, Peer, Ready, Server
from mantle.platform.machine.spec import ContainerSpec, to_json

_MOST_PROBE_OUTPUT = 4096


@dataclass(slots=True)
class _Running:
    """A container's processes, as the supervisor holds them."""

    init: int
    channel: socket.socket
    app: int = -1
    """pidfd of its program"""
    error: str = ""
    executing: bool = False
    streams: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Exec:
    """A command that somebody runs in a container."""

    peer: Peer
    kill_at: float | None = None
    output: int = -1
    """Where a probe's output is read; -1 for a command with descriptors of its own."""
    text: bytes = b""
    expired: bool = False


class Supervisor:
    def __init__(self, place: container.Place, backoff: float, node: socket.socket) -> None:
        self._place, self._node = place, node
        self._specs = {c.name: c for c in place.pod.containers}
        self._life = Lifecycle(place.pod, backoff)
        self._running: dict[str, _Running] = {}
        self._execs: dict[int, _Exec] = {}
        self._watchers: set[Peer] = set()
        self._logs: dict[str, Log] = {}
        self._last_status = ""
        self._loop = Loop()
        (place.directory / "logs").mkdir(mode=0o700, exist_ok=True)
        self._server = Server(self._loop, place.directory / "ctl.sock", self._handle)
        self._report()

    def run(self) -> None:
        """Until every container has ended for good."""
        self._loop.on_signal(signal.SIGCHLD, self._children)
        self._loop.on_signal(signal.SIGTERM, lambda: self._do(self._life.stop(None, time.monotonic())))
        self._loop.read(self._node.fileno(), self._from_node)
        self._do(self._life.tick(time.monotonic()))
        self._loop.run(self._deadline, self._due)
        self._server.close()

    # Time

    def _deadline(self) -> float | None:
        times = [e.kill_at for e in self._execs.values() if e.kill_at is not None]
        if self._life.deadline is not None:
            times.append(self._life.deadline)
        return min(times, default=None)

    def _due(self) -> None:
        now = time.monotonic()
        for pid, running in self._execs.items():
            if running.kill_at is not None and now >= running.kill_at:
                running.kill_at, running.expired = None, True
                os.kill(pid, signal.SIGUSR1)
        self._do(self._life.tick(now))

    # Carrying out

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Start(name):
                    self._start(self._specs[name])
                case Signal(name, number):
                    if running := self._running.get(name):
                        os.kill(running.init, number)
                case Finish():
                    self._loop.stop()
        self._report()

    def _start(self, spec: ContainerSpec) -> None:
        try:
            launched = container.launch(self._place, spec)
        except OSError as error:
            now = time.monotonic()
            self._do(self._life.ended(spec.name, container.START_FAILED, now, error=str(error)))
            return
        running = _Running(launched.init, launched.channel)
        self._running[spec.name] = running
        self._loop.read(launched.channel.fileno(), lambda: self._hear(spec.name, running))
        for fd, stream in ((launched.stdout, "stdout"), (launched.stderr, "stderr")):
            os.set_blocking(fd, False)
            running.streams[fd] = stream
            self._loop.read(fd, self._copier(spec.name, running, fd))

    def _copier(self, name: str, running: _Running, fd: int) -> Ready:
        return lambda: self._copy(name, running, fd)

    def _hear(self, name: str, running: _Running) -> None:
        """What the container's starting processes have to say."""
        while running.channel.fileno() >= 0:
            try:
                data, fds, _, _ = socket.recv_fds(running.channel, 1 << 16, 1)
            except BlockingIOError:
                return
            if not data:
                self._loop.forget(running.channel.fileno())
                running.channel.close()
                if not running.error:
                    running.executing = True
                    self._do(self._life.running(name, running.init, time.monotonic()))
                return
            message = json.loads(data)
            running.error = message.get("error", running.error)
            if fds:
                running.app = fds[0]

    def _log(self, name: str) -> Log:
        if name not in self._logs:
            self._logs[name] = Log(self._place.directory / "logs" / f"{name}.log")
        return self._logs[name]

    def _copy(self, name: str, running: _Running, fd: int) -> None:
        log, stream = self._log(name), running.streams[fd]
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        if data:
            log.feed(stream, data, time.time_ns())
        else:
            log.end(stream, time.time_ns())
            del running.streams[fd]
            self._loop.forget(fd)
            os.close(fd)

    # What has ended

    def _children(self) -> None:
        for pid, code in container.reap():
            name = next((n for n, r in self._running.items() if r.init == pid), None)
            if name is not None:
                self._container_ended(name, code)
            elif pid in self._execs:
                self._exec_ended(self._execs.pop(pid), code)

    def _container_ended(self, name: str, code: int) -> None:
        running = self._running[name]
        self._hear(name, running)
        del self._running[name]
        for fd in list(running.streams):
            while fd in running.streams and _readable(fd):
                self._copy(name, running, fd)
        wire.close_all([running.app] if running.app >= 0 else [])
        self._do(self._life.ended(name, code, time.monotonic(), error=running.error))

    def _exec_ended(self, ended: _Exec, code: int) -> None:
        if ended.output >= 0:
            self._read_output(ended)
            self._loop.forget(ended.output)
            os.close(ended.output)
            text = ended.text.decode(errors="replace").strip()
            ended.peer.send({"exit": None if ended.expired else code, "output": text})
        else:
            ended.peer.send({"exit": code})
        ended.peer.on_close = lambda: None

    def _read_output(self, probe: _Exec) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(probe.output, 1 << 16):
                probe.text = (probe.text + data)[:_MOST_PROBE_OUTPUT]
            self._loop.forget(probe.output)  # its end

    # Telling

    def _report(self) -> None:
        status = to_json(self._life.status())
        text = json.dumps(status)
        if text == self._last_status:
            return
        self._last_status = text
        with contextlib.suppress(OSError):  # a full disk must not end a pod; the next change is written again
            write_status(self._place.directory, text)
        for peer in list(self._watchers):
            peer.send({"status": status})

    def _from_node(self) -> None:
        """The node asks the pod to end, or is gone (then the kernel ends us anyway)."""
        data = self._node.recv(1 << 16)
        if not data:
            self._loop.forget(self._node.fileno())
            return
        message = json.loads(data)
        self._do(self._life.stop(message["stop"], time.monotonic()))

    # Asked on ctl.sock

    def _handle(self, peer: Peer, message: wire.Message, fds: list[int]) -> None:
        now = time.monotonic()
        if "signal" in message:
            for pid, running in self._execs.items():
                if running.peer is peer:
                    os.kill(pid, signal.Signals(message["signal"]))
            return
        match message["op"]:
            case "watch":
                self._watchers.add(peer)
                peer.on_close = lambda: self._watchers.discard(peer)
                peer.send({"status": to_json(self._life.status())})
            case "started":
                self._do(self._life.probed(self._named(message), now))
                peer.send({"ok": True})
            case "restart":
                self._do(self._life.restart(self._named(message), str(message["why"]), now))
                peer.send({"ok": True})
            case "stop":
                peer.send({"ok": True})
                self._do(self._life.stop(message["grace"], now))
            case "exec" | "probe":
                self._exec(peer, message, fds)
            case "dial":
                self._dial(peer, int(message["port"]))
            case other:
                raise wire.Refused("bad_request", f"no such operation: {other}")

    def _named(self, message: wire.Message) -> str:
        name = str(message["container"])
        if name not in self._specs:
            names = ", ".join(self._specs)
            raise wire.Refused("unknown_container", f"the pod has no container {name}", f"it has {names}")
        return name

    def _exec(self, peer: Peer, message: wire.Message, fds: list[int]) -> None:
        name = self._named(message)
        spec, running = self._specs[name], self._running.get(name)
        if running is None or not running.executing:
            raise wire.Refused("not_running", f"container {name} is not running")
        command = container.Command(
            argv=tuple(message["argv"]),
            env={**spec.env, **message.get("env", {})},
            cwd=message.get("cwd") or spec.cwd,
            tty=bool(message.get("tty")),
        )
        if message["op"] == "exec":
            if len(fds) != 3:
                raise wire.Refused("bad_request", "exec needs three descriptors")
            pid = container.execute(self._place, spec, running.app, command, fds)
            execution = _Exec(peer)
            peer.send({"pid": pid})
        else:
            reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            fds += (writer, null)
            pid = container.execute(self._place, spec, running.app, command, (null, writer, writer))
            execution = _Exec(peer, time.monotonic() + float(message["timeout"]), reader)
            self._loop.read(reader, lambda: self._read_output(execution))
        self._execs[pid] = execution
        peer.on_close = lambda: self._kill_exec(pid)

    def _kill_exec(self, pid: int) -> None:
        if pid in self._execs:
            os.kill(pid, signal.SIGUSR1)

    def _dial(self, peer: Peer, port: int) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        code = sock.connect_ex(("127.0.0.1", port))
        if code != errno.EINPROGRESS:
            self._dialled(peer, sock, port, code)
            return

        def connected() -> None:
            self._loop.forget(sock.fileno())
            self._dialled(peer, sock, port, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

        self._loop.write(sock.fileno(), connected)

    def _dialled(self, peer: Peer, sock: socket.socket, port: int, code: int) -> None:
        with sock:
            if code == 0:
                peer.send({"ok": True}, (sock.fileno(),))
            elif code == errno.ECONNREFUSED:
                peer.refuse(wire.Refused("nothing_listens", f"nothing listens on port {port} of the pod"))
            else:
                peer.refuse(wire.Refused("kernel", f"port {port} of the pod: {os.strerror(code)}"))


def write_status(directory: Path, text: str) -> None:
    """Replaces `status.json` in one step."""
    part = directory / "status.part"
    part.write_text(text)
    part.replace(directory / "status.json")


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])
