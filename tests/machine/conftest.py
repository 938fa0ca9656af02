"""A host of its own for every test that makes namespaces: nothing it does can reach the real one or outlive it.

`host.play(scene)` runs an async scene in a forked child that is PID 1 of a new PID namespace, with network and mount
namespaces of its own, a fresh /proc and an empty /run. When the scene ends, or the test is killed, the kernel ends
everything in it. `host` comes twice: as root, and as a user who only has what every user has.
"""

import asyncio
import contextlib
import faulthandler
import gc
import os
import pickle
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from machine_play import ASK, ECHO, IDLE, PATIENCE, PYTHON, python

from mantle.platform.machine import client, direct
from mantle.platform.machine import namespaces as ns
from mantle.platform.machine.mounts import View
from mantle.platform.machine.netlink import Route
from mantle.platform.machine.spec import (
    ContainerSpec,
    NodeConfig,
    Phase,
    PodSpec,
    PodStatus,
    Restart,
)

ROOT = Path(__file__).resolve().parent.parent.parent
REACHABLE = tuple(sorted({sys.base_prefix, sys.prefix, str(ROOT)}))
"""What the programs of tests need of a host on which the checkout may lie in a private directory."""


@dataclass
class Mesh:
    """A running node and shorthands to play with it."""

    state: Path
    guard: int
    node: client.NodeClient
    _count: int = field(default=0)

    def dir(self, uid: str) -> Path:
        return self.state / "pods" / uid

    def pod(self, uid: str) -> client.PodClient:
        return client.PodClient(self.dir(uid))

    async def start(self, uid: str, ip: str, *containers: ContainerSpec, **more: Any) -> client.PodClient:
        more.setdefault("expose", REACHABLE)
        more.setdefault("restart", Restart.ALWAYS)
        more.setdefault("grace", 5.0)
        await self.node.start_pod(PodSpec(uid, "ns", f"pod-{uid}", ip, containers=containers, **more))
        return self.pod(uid)

    def log(self, uid: str, container: str) -> list[str]:
        """The text of its lines, without time and stream."""
        path = self.dir(uid) / "logs" / f"{container}.log"
        return [line.split(" ", 2)[2] for line in path.read_text().splitlines()] if path.exists() else []

    async def says(self, uid: str, line: str, container: str = "app") -> None:
        """Waits until the container has printed `line`."""
        while line not in self.log(uid, container):
            assert direct.read_status(self.dir(uid)) is not None
            await asyncio.sleep(0.01)

    async def ask(self, uid: str, code: str, container: str = "app") -> str:
        """What Python code prints in the container; `tcp` and `udp` of ASK are at hand."""
        done = await self.pod(uid).probe(container, [PYTHON, "-c", ASK + code], PATIENCE)
        assert done.exit_code == 0, done
        return done.output

    async def until(self, uid: str, wanted: Callable[[PodStatus], bool]) -> PodStatus:
        """The first status that satisfies `wanted`; fails with the last one seen if the pod ends before that."""
        last = None
        async for last in self.pod(uid).watch():
            if wanted(last):
                return last
        last = direct.read_status(self.dir(uid)) or last
        assert last is not None and wanted(last), f"the pod ended as {last}"
        return last

    async def running(self, uid: str) -> PodStatus:
        return await self.until(uid, lambda s: all(c.state == "running" for c in s.containers))

    async def ended(self, uid: str) -> PodStatus:
        return await self.until(uid, lambda s: s.phase in (Phase.SUCCEEDED, Phase.FAILED))


@dataclass
class Host:
    """Where a scene plays. `uid` 0 is root."""

    uid: int

    @property
    def rootless(self) -> bool:
        return self.uid != 0

    def state(self, mesh: str = "m") -> Path:
        base = Path(f"/run/user/{self.uid}/mantle" if self.rootless else "/run/mantle")
        path = base / mesh
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    @contextlib.asynccontextmanager
    async def mesh(self, name: str = "m", **more: Any) -> Any:
        more.setdefault("uplink", False)
        more.setdefault("backoff", 0.05)
        state = self.state(name)
        with (state / "node.log").open("ab") as log:
            guard = client.start_node(NodeConfig(name, str(state), **more), log)
        try:
            yield Mesh(state, guard, client.NodeClient(state))
            said = (state / "node.log").read_text()
            assert not said, said
        finally:
            direct.kill_node(guard)

    def play(
        self,
        scene: Callable[[], Awaitable[None]],
        seconds: float = 180.0,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs the scene; fails with what it raised. `prepare` changes the new host before, as root."""
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside the test runner's threads: see below
            outer = os.fork()
        if outer == 0:
            # Only this thread exists here, and nothing of the runner is used any more.
            with contextlib.suppress(BaseException):
                gc.freeze()  # what the runner left behind (gRPC's objects need its threads) is not for us to collect
                ns.die_with_parent()
                os.close(reader)
                ns.unshare(ns.NEWPID | ns.NEWNET | ns.NEWNS | ns.NEWIPC | ns.NEWUTS)
                inner = os.fork()
                if inner == 0:
                    self._first_process(scene, writer, seconds, prepare)
                os.waitpid(inner, 0)
            os._exit(0)
        os.close(writer)
        try:
            # A scene that is cancelled still takes its mesh down: it gets the time to say what it waited for.
            assert select.select([reader], [], [], seconds + 25)[0], f"the scene was not over after {seconds} s"
            with os.fdopen(reader, "rb", closefd=False) as said:
                outcome = said.read()
        finally:
            os.close(reader)
            os.kill(outer, signal.SIGKILL)
            os.waitpid(outer, 0)
        failure = pickle.loads(outcome) if outcome else "the scene ended without a word"
        if failure:
            pytest.fail(failure, pytrace=False)

    def _first_process(
        self, scene: Callable[[], Awaitable[None]], writer: int, seconds: float, prepare: Callable[[], None]
    ) -> None:
        failure = ""
        # One that is stuck shows where, without a thread: threads may not exist before namespaces are entered.
        faulthandler.register(signal.SIGALRM, all_threads=True, chain=False)
        signal.alarm(int(seconds) + 3)
        try:
            ns.die_with_parent()
            self._furnish(prepare)
            asyncio.run(asyncio.wait_for(scene(), seconds))
        except BaseException:
            failure = traceback.format_exc()
        os.write(writer, pickle.dumps(failure)[:60000])
        os._exit(0)

    def _furnish(self, prepare: Callable[[], None]) -> None:
        ns.mount(None, "/", None, ns.MS_REC | ns.MS_PRIVATE)
        ns.mount("proc", "/proc", "proc")
        ns.mount("sysfs", "/sys", "sysfs")
        ns.mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
        ns.mount("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777")
        Route().up(1)
        prepare()
        os.environ.setdefault("PYTHONPATH", str(ROOT / "src"))
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        if self.rootless:
            view = View()
            view.expose([(path, view.open(path)) for path in REACHABLE], self.uid, [self.uid])
            home = Path(f"/run/user/{self.uid}")
            home.mkdir(parents=True)
            os.chown(home, self.uid, self.uid)
            home.chmod(0o700)
            os.environ.update(HOME=str(home), XDG_RUNTIME_DIR=str(home))
            os.chdir("/")
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)


def _needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("makes a host of its own, which only root can")


@pytest.fixture(params=[0, 12345], ids=["root", "user"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    _needs_root()
    yield Host(request.param)


@pytest.fixture
def root_host() -> Host:
    _needs_root()
    return Host(0)


@pytest.fixture
def user_host() -> Host:
    _needs_root()
    return Host(12345)


@pytest.fixture
def echo() -> ContainerSpec:
    return python("app", ECHO)


@pytest.fixture
def idle() -> ContainerSpec:
    return python("app", IDLE)
