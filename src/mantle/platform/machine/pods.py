"""One pod as the daemon follows it: its status from the supervisor, its probes, whether it is ready.

The pod runs without us; `PodFollower` only watches, asks and passes on what the answers mean. A restarted daemon takes
a
running pod over as it was: what had started is taken as ready until its probes say otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mantle.core.model import ContainerPort, Key, Owner, Pod
from mantle.platform.machine import prober
from mantle.platform.machine.probes import Ask, Kill, Kind, Probes
from mantle.platform.machine.reconcile import Running
from mantle.platform.machine.runtime import Runtime, RuntimeRefused
from mantle.platform.machine.spec import ContainerStatus, Phase, PodSpec, PodStatus, Role

log = logging.getLogger("mantle.pods")
FINISHED = (Phase.SUCCEEDED, Phase.FAILED)


@dataclass(slots=True)
class PodState:
    """What the daemon knows about a pod. `ended` is Unix time in seconds, 0 while it runs."""

    spec: PodSpec
    status: PodStatus
    starting: bool = False
    """The runtime has been asked for it and has not answered yet."""
    stopping: bool = False
    has_address: bool = True
    """Its address is not given to another pod."""
    ended: float = 0.0
    gone: bool = False
    """Its processes are gone."""
    why: str = ""
    """Why it is stopping."""
    probes: dict[str, Probes] = field(default_factory=dict)
    running_since: dict[str, float] = field(default_factory=dict)
    """When each container that runs was first seen running, in seconds of the event loop's clock."""

    @property
    def key(self) -> Key:
        return Key(self.spec.namespace, self.spec.name)

    @property
    def object(self) -> tuple[str, str, str]:
        kind, namespace, name = self.spec.meta["object"]
        return str(kind), str(namespace), str(name)

    def container_ready(self, status: ContainerStatus) -> bool:
        """Running, started, and its readiness probe (if any) says so."""
        probes = self.probes.get(status.name)
        return status.state == "running" and status.started and (probes.ready if probes else True)

    @property
    def ready(self) -> bool:
        if self.stopping or self.gone or self.status.phase is not Phase.RUNNING:
            return False
        serving = {c.name for c in self.spec.containers if c.role is not Role.INIT}
        found = [s for s in self.status.containers if s.name in serving]
        return len(found) == len(serving) and all(self.container_ready(s) for s in found)

    def unproved_since(self) -> float | None:
        """The youngest start of a container that no readiness probe vouches for; None if all are vouched for."""
        vouched = {c.name for c in self.spec.containers if c.readiness is not None}
        return max((at for name, at in self.running_since.items() if name not in vouched), default=None)

    def running(self) -> Running:
        """For `reconcile.decide`."""
        return Running(
            self.spec.uid,
            self.spec.name,
            self.object,
            self.spec.spec_hash,
            self.status.phase,
            self.ready,
            self.stopping,
            float(self.spec.meta["created"]),
            self.ended,
        )

    def model(self, node: str) -> Pod:
        """For the mesh."""
        meta = self.spec.meta
        proxy = next((s for s in self.status.containers if s.name == meta["proxy"]), None)
        phase = "Running" if self.status.phase is Phase.RUNNING else str(self.status.phase)
        return Pod(
            key=self.key,
            uid=self.spec.uid,
            ip=self.spec.ip,
            service_account=meta["service_account"],
            owner=Owner(*meta["owner"]),
            labels=dict(meta["labels"]),
            annotations=dict(meta["annotations"]),
            ports=tuple(ContainerPort(name, port, protocol) for name, port, protocol in meta["ports"]),
            phase=phase,
            ready=self.ready,
            node=node,
            # Also while it restarts: a pod that loses its identity is reached in plaintext.
            proxy_started=proxy is not None and (proxy.state == "running" or proxy.restarts > 0),
            probe_paths=tuple((port, path) for port, path in meta["probe_paths"]),
        )

    def trouble(self) -> str:
        """What keeps it from being ready, for people; empty if nothing does."""
        if self.ready or self.status.phase is Phase.SUCCEEDED:
            return ""
        if self.status.message:
            return self.status.message
        for status in self.status.containers:
            if status.state != "running" and status.reason not in ("Completed", "PodInitializing", "ContainerCreating"):
                detail = status.message or (f"exit code {status.exit_code}" if status.exit_code is not None else "")
                return f"container {status.name}: {status.reason}" + (f" ({detail})" if detail else "")
        for status in self.status.containers:
            probes = self.probes.get(status.name)
            if probes is not None and not probes.ready and probes.last_failure:
                return f"container {status.name}: {probes.last_failure}"
        waiting = [s.name for s in self.status.containers if s.state == "waiting"]
        return f"waiting for container {waiting[0]}" if waiting else "starting"


class PodFollower:
    """Follows one pod until it is gone. `changed` is called after anything about it changed."""

    def __init__(self, state: PodState, runtime: Runtime, changed: Callable[[], None], taken_over: bool) -> None:
        self._state, self._runtime, self._changed = state, runtime, changed
        self._taken_over = taken_over
        self._specs = {c.name: c for c in state.spec.containers}
        self._wake = asyncio.Event()
        self._asks: set[asyncio.Task[None]] = set()
        self._seen: Mapping[str, tuple[int, int]] = {}

    async def run(self) -> None:
        """Returns when the pod's processes are gone; its last status is then in the state."""
        probing = asyncio.get_running_loop().create_task(self._probe())
        try:
            async for status in self._runtime.watch(self._state.spec.uid):
                self._take(status)
                self._changed()
        finally:
            probing.cancel()
            for task in self._asks:
                task.cancel()
            await asyncio.gather(probing, *self._asks, return_exceptions=True)

    def _take(self, status: PodStatus) -> None:
        """Probes begin when a container runs, anew each time it was started."""
        now = asyncio.get_running_loop().time()
        running = {c.name: (c.pid, c.restarts) for c in status.containers if c.state == "running"}
        for name in list(self._state.probes):
            if self._seen.get(name) != running.get(name):
                del self._state.probes[name]
        for container in status.containers:
            if container.name in running and container.name not in self._state.probes:
                spec = self._specs[container.name]
                if spec.startup or spec.readiness or spec.liveness:
                    probes = self._state.probes[container.name] = Probes(spec, now)
                    if self._taken_over:
                        probes.resume(container.started, container.started, now)
        since = self._state.running_since
        self._state.running_since = {
            name: since[name] if name in since and self._seen.get(name) == made else now
            for name, made in running.items()
        }
        self._seen, self._taken_over = running, False
        self._state.status = status
        self._wake.set()

    async def _probe(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            for name, probes in self._state.probes.items():
                for ask in probes.poll(now):
                    task = loop.create_task(self._ask(name, probes, ask))
                    self._asks.add(task)
                    task.add_done_callback(self._asks.discard)
            due = [at for p in self._state.probes.values() if (at := p.next_due()) is not None]
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(due, default=None) if due else None):
                    await self._wake.wait()

    async def _ask(self, name: str, probes: Probes, ask: Ask) -> None:
        uid = self._state.spec.uid
        try:
            if ask.spec.exec is not None:
                code, output = await self._runtime.exec_probe(uid, name, ask.spec.exec, ask.spec.timeout)
                ok, detail = (
                    code == 0,
                    output or (f"exit code {code}" if code is not None else "it did not end in time"),
                )
            else:
                ok, detail = await prober.send(ask.spec, self._state.spec.ip, self._runtime.router_socket)
        except (RuntimeRefused, OSError) as error:
            ok, detail = False, str(error)
        if self._state.probes.get(name) is not probes:
            return  # the container was restarted meanwhile
        before = (probes.started, probes.ready)
        verdict = probes.answer(ask.kind, ok, detail, asyncio.get_running_loop().time())
        with contextlib.suppress(RuntimeRefused, OSError):
            if isinstance(verdict, Kill):
                await self._runtime.restart(uid, name, f"{verdict.kind} probe failed: {verdict.detail}")
            elif ask.kind is Kind.STARTUP and probes.started:
                await self._runtime.started(uid, name)
        if before != (probes.started, probes.ready):
            self._changed()
        self._wake.set()
