"""The node of one mesh: `python -m mantle.platform.machine.node`, a NodeConfig as JSON on stdin.

Two processes. The *guard* (`guard.py`) stays in the host's network namespace with nothing but the uplink. The *node* is
PID 1 of the mesh's PID namespace, in the router's network namespace: it forks the pods and answers on `node.sock`.
When either dies the kernel ends everything. Without root both are in a user namespace first.

`node.sock` (frames of `wire.py`):
  {"op": "start_pod", "pod": PodSpec}                    → {"ok": true}; `pods/UID/ctl.sock` answers from then on
  {"op": "stop_pod", "uid", "grace": seconds | null}    → {"ok": true} when it is gone
  {"op": "pods"}                                         → {"pods": [RunningPod]}
  {"op": "socket", "kind": "tcp" | "udp", "bind": [ip, port] | null, "listen": bool} → {"ok": true} + a router's socket
  {"op": "services", "table": [ServicePort]}             → {"ok": true}
  {"op": "shutdown", "grace": seconds | null}           → {"ok": true} when all pods are gone; the node then ends
On stdout, once: {"pid": of the guard} or {"error": {reason, message, fix}}.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mantle.platform.machine import container, podinit, wire
from mantle.platform.machine import namespaces as ns
from mantle.platform.machine.guard import guard
from mantle.platform.machine.loop import Loop, Peer, Server
from mantle.platform.machine.router import Router
from mantle.platform.machine.spec import (
    NodeConfig,
    Phase,
    PodSpec,
    PodStatus,
    RunningPod,
    ServicePort,
    node_config_from_json,
    pod_from_json,
    to_json,
)
from mantle.platform.machine.supervisor import write_status

_ALL_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
_POD_READY = 10.0
"""Seconds a pod's supervisor may take to set itself up."""
_SEE_CHECK = "`mantle check` names what this machine lacks"


@dataclass(slots=True)
class _Pod:
    spec: PodSpec
    pid: int
    channel: socket.socket
    waiting: list[Peer] = field(default_factory=list)
    alive: bool = True


class Node:
    """Made in the router's namespaces, by their PID 1."""

    def __init__(self, config: NodeConfig, router: Router, *, rootless: bool) -> None:
        self._config, self._router, self._rootless = config, router, rootless
        self._pods: dict[str, _Pod] = {}
        self._last_call: list[Peer] | None = None
        self._loop = Loop()
        (Path(config.state_dir) / "pods").mkdir(mode=0o700, exist_ok=True)
        self._server = Server(self._loop, Path(config.state_dir) / "node.sock", self._handle)

    def run(self) -> None:
        self._loop.on_signal(signal.SIGCHLD, self._children)
        self._loop.on_signal(signal.SIGTERM, lambda: self._shutdown(None))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._loop.run(lambda: None, lambda: None)
        self._server.close()

    def _handle(self, peer: Peer, message: wire.Message, fds: list[int]) -> None:
        match message["op"]:
            case "start_pod":
                self._start_pod(pod_from_json(message["pod"]))
                peer.send({"ok": True})
            case "stop_pod":
                self._stop_pod(peer, str(message["uid"]), message["grace"])
            case "pods":
                peer.send({"pods": [to_json(RunningPod(u, p.spec.ip, p.alive)) for u, p in self._pods.items()]})
            case "socket":
                bind = message["bind"]
                with self._router.socket(
                    message["kind"], (bind[0], bind[1]) if bind else None, listen=bool(message["listen"])
                ) as sock:
                    peer.send({"ok": True}, (sock.fileno(),))
            case "services":
                self._router.services([_service(entry) for entry in message["table"]])
                peer.send({"ok": True})
            case "shutdown":
                self._shutdown(message["grace"], peer)
            case other:
                raise wire.Refused("bad_request", f"no such operation: {other}")

    def _start_pod(self, spec: PodSpec) -> None:
        if (known := self._pods.get(spec.uid)) and known.alive:
            raise wire.Refused("exists", f"pod {spec.namespace}/{spec.name} ({spec.uid}) is running already")
        if any(pod.alive and pod.spec.ip == spec.ip for pod in self._pods.values()):
            raise wire.Refused("address_in_use", f"another pod has the address {spec.ip}")
        if self._last_call is not None:
            raise wire.Refused("shutting_down", "the mesh is going down")
        directory = Path(self._config.state_dir) / "pods" / spec.uid
        directory.mkdir(mode=0o700, exist_ok=True)
        hidden = (self._config.state_dir, *self._config.cover)
        place = container.Place(spec, directory, hidden, self._rootless)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_POD_READY)
        try:
            pid = self._fork_supervisor(place, theirs)
        except OSError:
            ours.close()
            raise
        try:
            namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._router.attach(spec.ip, namespace)
            finally:
                os.close(namespace)
            ours.send(b"go")
            answer = json.loads(ours.recv(1 << 16) or b'{"error": "its supervisor ended early"}')
            if "error" in answer:
                raise wire.Refused("pod_setup", f"pod {spec.namespace}/{spec.name}: {answer['error']}")
        except (OSError, wire.Refused):
            os.kill(pid, signal.SIGKILL)
            self._router.detach(spec.ip)
            ours.close()
            raise
        ours.settimeout(None)
        self._pods[spec.uid] = _Pod(spec, pid, ours)

    def _fork_supervisor(self, place: container.Place, channel: socket.socket) -> int:
        """The pid of the pod's PID 1, an (adopted) child of ours, in namespaces of its own."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS)
        middle = os.fork()
        if middle == 0:
            code = 1
            try:
                signal.set_wakeup_fd(-1)
                ns.unshare(ns.NEWNS | ns.NEWPID | ns.NEWIPC | ns.NEWUTS | ns.NEWNET)
                pid = os.fork()
                if pid == 0:
                    ns.close_other_fds((channel.fileno(),))
                    podinit.main(place, self._config.router_ip, self._config.backoff, channel)
                os.write(writer, str(pid).encode())
                code = 0
            except OSError as error:
                os.write(writer, f"!{error}".encode())
            finally:
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(writer)
        channel.close()
        os.waitpid(middle, 0)
        with os.fdopen(reader) as said:
            text = said.read()
        if not text.isdigit():
            raise OSError(f"the pod's namespaces could not be made: {text.removeprefix('!')}")
        return int(text)

    def _stop_pod(self, peer: Peer, uid: str, grace: float | None) -> None:
        pod = self._pods.get(uid)
        if pod is None:
            raise wire.Refused("unknown_pod", f"there is no pod {uid}")
        if not pod.alive:
            del self._pods[uid]
            peer.send({"ok": True})
            return
        pod.waiting.append(peer)
        self._tell_to_stop(pod, grace)

    def _tell_to_stop(self, pod: _Pod, grace: float | None) -> None:
        with contextlib.suppress(OSError):  # it has just ended by itself
            pod.channel.send(json.dumps({"stop": grace}).encode())

    def _shutdown(self, grace: float | None, peer: Peer | None = None) -> None:
        self._last_call = [*(self._last_call or []), *([peer] if peer else [])]
        for pod in self._pods.values():
            if pod.alive:
                self._tell_to_stop(pod, grace)
        self._leave_if_empty()

    def _leave_if_empty(self) -> None:
        if self._last_call is not None and not any(pod.alive for pod in self._pods.values()):
            for peer in self._last_call:
                peer.send({"ok": True})
            self._loop.stop()

    def _children(self) -> None:
        for pid, code in container.reap():
            for uid, pod in list(self._pods.items()):
                if pod.pid == pid and pod.alive:
                    pod.alive = False
                    if code:
                        self._has_crashed(pod, code)
                    pod.channel.close()
                    self._router.detach(pod.spec.ip)
                    for peer in pod.waiting:
                        peer.send({"ok": True})
                    if pod.waiting:
                        del self._pods[uid]
        self._leave_if_empty()

    def _has_crashed(self, pod: _Pod, code: int) -> None:
        """A supervisor that left without a word took its containers with it: its last status is not true any more."""
        how = f"killed by signal {code - 128}" if code > 128 else f"exit code {code}"
        status = PodStatus(pod.spec.uid, Phase.FAILED, (), f"the pod's supervisor ended: {how}")
        with contextlib.suppress(OSError):
            write_status(Path(self._config.state_dir) / "pods" / pod.spec.uid, json.dumps(to_json(status)))


def _service(entry: dict[str, Any]) -> ServicePort:
    endpoints = tuple((str(ip), int(port)) for ip, port in entry["endpoints"])
    return ServicePort(str(entry["ip"]), int(entry["port"]), endpoints, str(entry["protocol"]))


def _node(config: NodeConfig, channel: socket.socket, *, rootless: bool) -> NoReturn:
    """From the first moment as PID 1 to the end of the mesh."""
    code = 1
    try:
        ns.die_with_parent()
        ns.name_process("mantle-node")
        ns.close_other_fds((channel.fileno(),))
        ns.unshare(ns.NEWNS | ns.NEWNET | ns.NEWUTS | ns.NEWIPC)
        ns.mount(None, "/", None, ns.MS_REC | ns.MS_PRIVATE)
        with contextlib.suppress(OSError):
            ns.mount("proc", "/proc", "proc", ns.MS_NOSUID | ns.MS_NODEV | ns.MS_NOEXEC)
        router = Router(config)
        channel.send(b'{"router": true}')
        uplink = json.loads(channel.recv(4096))
        if uplink:
            router.uplink(uplink["ours"], uplink["theirs"], uplink["prefix"])
        node = Node(config, router, rootless=rootless)
        channel.send(b'{"ready": true}')
        channel.close()
        node.run()
        code = 0
    except Exception as error:  # the guard is told why; this process has nobody above it
        text = container.explained(error)
        traceback.print_exc()
        with contextlib.suppress(OSError):
            channel.send(json.dumps(wire.Refused("node_setup", text, _SEE_CHECK).as_message()).encode())
    finally:
        os._exit(code)


def main() -> int:
    """Starts the node, says so on stdout, and guards it until it ends."""
    config = node_config_from_json(json.load(sys.stdin))
    if os.fork():
        os._exit(0)  # whoever started us is not our parent any more, and need not wait
    os.setsid()
    said = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    try:
        rootless = os.geteuid() != 0  # asked here: in the user namespace everybody is 0
        guard(config, said, lambda channel: _node(config, channel, rootless=rootless))
    except (OSError, wire.Refused) as error:
        refusal = error if isinstance(error, wire.Refused) else wire.Refused("namespaces", str(error), _SEE_CHECK)
        with contextlib.suppress(OSError, ValueError):
            json.dump(refusal.as_message(), said)
            said.close()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
