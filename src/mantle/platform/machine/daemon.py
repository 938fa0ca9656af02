"""The daemon of one mesh: `python -m mantle.platform.machine.daemon --state-dir DIR --mesh NAME …`. Wiring only.

Two processes. A small one stays in front and starts the daemon again when it dies; when that one dies too, the pods and
their connections go on, and the next command starts a daemon, which takes them over. Cluster DNS is the first thing
that
a daemon brings up. The one line it writes to the descriptor of `--ready-fd`: {"ok": true} or {"errors": […]}.

Exit codes: 0 told to end (SIGTERM, or the mesh is down), 1 it cannot start, 3 the node is gone, so everything starts
anew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mantle.platform.machine.state import POD_CIDR, SERVICE_CIDR, MeshConfig, StateDir

log = logging.getLogger("mantle.daemon")
CANNOT_START, NODE_GONE = 1, 3
RESTART_PAUSE = (0.05, 5.0)
"""Seconds before a daemon that died is started again; doubles while it keeps dying within 10 s."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    ready = os.fdopen(options.ready_fd, "w") if options.ready_fd is not None else None
    _warm_up()
    pause, first = RESTART_PAUSE[0], True
    while True:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            code = CANNOT_START
            try:
                code = _daemon(options, ready)
            except Exception:
                logging.getLogger("mantle").exception("the daemon failed")
            finally:
                logging.shutdown()
                os._exit(code)
        if ready is not None:
            ready.close()
            ready = None
        _pass_signals(child)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0 or (code == CANNOT_START and first) or not options.state_dir.exists():
            return code
        first = False
        pause = RESTART_PAUSE[0] if time.monotonic() - began > 10.0 else min(pause * 2, RESTART_PAUSE[1])
        time.sleep(pause)


def _warm_up() -> None:
    """Imports what a daemon needs, before it is forked: one that follows another answers DNS in a fraction of the time.

    Nothing that starts threads: grpc is imported by the daemon itself.
    """
    for name in ("ruamel.yaml", "aiohttp", *(f"mantle.platform.machine.{m}" for m in _OWN)):
        importlib.import_module(name)


_OWN = ("client", "controller", "controlplane", "dns_server", "host", "noderuntime", "tokenfiles", "trust", "world")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mantle-daemon", description="the daemon of one mesh on this machine")
    parser.add_argument("--mesh", required=True)
    parser.add_argument("--state-dir", required=True, type=Path)
    parser.add_argument("--pod-cidr", default=POD_CIDR)
    parser.add_argument("--service-cidr", default=SERVICE_CIDR)
    parser.add_argument("--issuance-lifetime", default="24h")
    parser.add_argument(
        "--proxy-env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="more for every proxy, without MANTLE_PROXY_",
    )
    parser.add_argument("--ready-fd", type=int)
    return parser


def _pass_signals(child: int) -> None:
    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)


def _daemon(options: argparse.Namespace, ready: Any) -> int:
    """One life of the daemon, in a process of its own."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    store = StateDir(options.state_dir)
    try:
        store.create()
        starting = store.lock()
        if _somebody_answers(store):
            _tell(ready, None)
            return 0
        logging.basicConfig(
            filename=store.log,
            level=logging.INFO,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            datefmt="%Y-%m-%dT%H:%M:%SZ",
        )
        logging.Formatter.converter = time.gmtime
        found = store.load_mesh()
        config = found[0] if found else _config(options)
        node_pid = _node(config, store, found[1] if found else {})
        _write_pids(store)
    except Exception as error:  # nothing runs yet: nothing is left behind, and whoever started us is told
        log.error("%s", error)
        if store.load_mesh() is None:
            _forget(store)
        _tell(ready, error)
        return CANNOT_START
    try:
        return asyncio.run(_serve(config, store, node_pid, ready, starting))
    except Exception as error:
        log.exception("the daemon cannot go on")
        if found is None and ready is not None and not ready.closed:  # it never came up
            from mantle.platform.machine.direct import kill_node

            kill_node(node_pid)
            _forget(store)
        _tell(ready, error)
        return CANNOT_START


def _forget(store: StateDir) -> None:
    """A mesh that never came up leaves nothing behind."""
    shutil.rmtree(store.path, ignore_errors=True)
    with contextlib.suppress(OSError):  # other meshes are there
        store.path.parent.rmdir()


def _somebody_answers(store: StateDir) -> bool:
    """Another daemon of this mesh was faster."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(store.api))
        except OSError:
            return False
    return True


def _write_pids(store: StateDir) -> None:
    """Who we are, for a `mantle down` that finds nobody to talk to."""
    from mantle.platform.machine.direct import process_start

    own, front = os.getpid(), os.getppid()
    pids = {
        "daemon_pid": own,
        "daemon_start": process_start(own),
        "supervisor_pid": front,
        "supervisor_start": process_start(front),
    }
    store.write("daemon.json", json.dumps(pids).encode())


def _config(options: argparse.Namespace) -> MeshConfig:
    proxy_env = dict(item.partition("=")[::2] for item in options.proxy_env)
    return MeshConfig(options.mesh, options.pod_cidr, options.service_cidr, options.issuance_lifetime, proxy_env)


def _node(config: MeshConfig, store: StateDir, known: dict[str, Any]) -> int:
    """The pid of the node's guard: the one that runs, or a new one beside an empty house."""
    from mantle.platform.machine.client import start_node
    from mantle.platform.machine.direct import process_start
    from mantle.platform.machine.spec import NodeConfig

    pid = int(known.get("node_pid", 0))
    if pid and known.get("node_start") == process_start(pid) and store.node.exists():
        return pid
    for old in store.pods.iterdir():
        shutil.rmtree(old, ignore_errors=True)
    made = NodeConfig(config.name, str(store.path), config.pod_cidr, config.service_cidr, config.dns_ip)
    with store.log.open("ab") as out:
        pid = start_node(made, out)
    store.save_mesh(config, {"node_pid": pid, "node_start": process_start(pid), "rootless": os.geteuid() != 0})
    return pid


def _tell(ready: Any, error: Exception | None) -> None:
    """To whoever started us, once."""
    if ready is None or ready.closed:
        return
    message: dict[str, Any] = {"ok": True}
    if error is not None:
        text, fix = getattr(error, "message", str(error)), getattr(error, "fix", "")
        message = {"errors": [{"message": text or type(error).__name__, "fix": fix or None}]}
    with contextlib.suppress(OSError):
        ready.write(json.dumps(message) + "\n")
        ready.close()


async def _serve(config: MeshConfig, store: StateDir, node_pid: int, ready: Any, starting: int) -> int:
    """Everything, in the order in which it comes up: DNS first, the API last, then the lock on starting is given up."""
    from mantle.core.names import MeshNames
    from mantle.platform.machine import host, trust
    from mantle.platform.machine.controller import Controller
    from mantle.platform.machine.controlplane import control_objects
    from mantle.platform.machine.dns_server import DnsServer, host_resolver
    from mantle.platform.machine.noderuntime import NodeRuntime
    from mantle.platform.machine.tokenfiles import TokenFiles
    from mantle.platform.machine.world import World

    loop = asyncio.get_running_loop()
    end: asyncio.Future[int] = loop.create_future()

    def ended(code: int) -> None:
        if not end.done():
            end.set_result(code)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended, 0)
    runtime = NodeRuntime(store.path)
    tasks: list[asyncio.Task[Any]] = []

    def keep(work: Any, name: str) -> None:
        task = loop.create_task(work, name=name)
        task.add_done_callback(lambda t: _watch_task(t, ended))
        tasks.append(task)

    try:
        proxy = host.find_proxy()
        secrets = trust.ensure(store, MeshNames("mantle", "cluster.local"), datetime.now(UTC))
        machine = host.machine(config, store, secrets.roots, proxy)
        token_files = TokenFiles(secrets.token_key, store, chown=not machine.rootless)
        world = World(config, machine.node_name)
        control = control_objects(config, secrets, machine.control_target)
        controller = Controller(config, store, runtime, machine, token_files, control, world)
        await controller.resume()
        controller.publish()
        udp, tcp = await runtime.dns_sockets(config.dns_ip)
        keep(DnsServer(udp, tcp, lambda: world.names, host_resolver()[0]).run(), "dns")
        if not machine.rootless:
            os.chown(store.control, trust.CONTROL_UID, trust.CONTROL_UID)

        from mantle.platform.machine import api, platform_server

        platform = platform_server.MachinePlatform(controller, secrets.token_key)
        server = await platform_server.start(platform, store.control / "platform.sock", chown=not machine.rootless)
        keep(controller.run(), "controller")
        keep(token_files.run(), "tokens")
        keep(_node_gone(runtime, controller, ended), "node")

        async def down() -> AsyncIterator[dict[str, Any]]:
            async for event in _down(controller, runtime, store):
                yield event
            loop.call_later(0.2, ended, 0)

        runner = await api.serve(api.Api(config, store, controller, proxy, node_pid, down), store.api)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
    os.close(starting)
    _tell(ready, None)
    log.info("mesh %s: ready", config.name)
    code = await end
    await api.closed(runner)
    await server.stop(0.2)
    for task in tasks:
        task.cancel()
    await controller.shutdown()
    log.info("mesh %s: the daemon ends with code %d", config.name, code)
    return code


def _watch_task(task: asyncio.Task[Any], ended: Any) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the task %s failed", task.get_name(), exc_info=error)
        ended(4)


async def _node_gone(runtime: Any, controller: Any, ended: Any) -> None:
    await runtime.wait_gone()
    if not controller.closing:
        log.error("the node is gone")
    ended(0 if controller.closing else NODE_GONE)


async def _down(controller: Any, runtime: Any, store: StateDir) -> AsyncIterator[dict[str, Any]]:
    """Stops every pod, then the node, then forgets the mesh."""
    from mantle.platform.machine.runtime import RuntimeRefused

    stopping = asyncio.get_running_loop().create_task(controller.close_pods())
    said: set[str] = set()
    while not stopping.done():
        left = {f"{p.spec.namespace}/{p.spec.name}" for p in controller.pods.values()}
        for name in sorted(said - left):
            yield {
                "event": "removed",
                "object": f"pod/{name.partition('/')[2]}",
                "namespace": name.partition("/")[0],
                "message": "",
            }
        said = left
        await controller.moved(0.2)
    for name in sorted(said):
        yield {
            "event": "removed",
            "object": f"pod/{name.partition('/')[2]}",
            "namespace": name.partition("/")[0],
            "message": "",
        }
    with contextlib.suppress(RuntimeRefused, OSError):
        await runtime.shutdown(5.0)
    yield {"event": "done", "object": "", "namespace": "", "message": ""}


if __name__ == "__main__":
    sys.exit(main())
