"""The one writer of a mesh: objects and pods come in, what to do goes out to the runtime, the world is told.

Everything is decided in `applying`, `plan` and `reconcile`; this file carries it out, in one task (`run`), and keeps
what
a restarted daemon needs. It knows no sockets: `Runtime` and `World` are arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mantle.platform.machine import podfiles
from mantle.platform.machine import volumes as vol
from mantle.platform.machine.applying import CONTROL_FILE, Prepared, Request, machine_of, plan_all, prepare
from mantle.platform.machine.manifest import Object, ObjectId
from mantle.platform.machine.plan import Machine, Wanted, build
from mantle.platform.machine.pods import FINISHED, PodFollower, PodState
from mantle.platform.machine.reconcile import Addresses, Change, Decision, Goal, decide, forget, objects_of, pod_name
from mantle.platform.machine.runtime import Runtime, RuntimeRefused
from mantle.platform.machine.spec import Phase, PodStatus
from mantle.platform.machine.state import Applied, MeshConfig, StateDir
from mantle.platform.machine.tokenfiles import TokenFiles
from mantle.platform.machine.world import ServiceAddresses, World
from mantle.platform.machine.yamlpos import Mistake, Mistakes

log = logging.getLogger("mantle.controller")
RESERVED = frozenset({"mantle"})
RETRY = (0.5, 30.0)
"""Seconds before a pod that could not be started is tried again: the first wait and the longest; it doubles."""
AT_ONCE = 4
"""Pods that are being started at the same time."""


@dataclass(slots=True)
class Trouble:
    """A workload whose pod could not even be started."""

    message: str
    again: float
    wait: float


class Controller:
    def __init__(
        self,
        config: MeshConfig,
        store: StateDir,
        runtime: Runtime,
        machine: Machine,
        tokens: TokenFiles,
        control: tuple[Object, ...],
        world: World,
    ) -> None:
        self._config, self._store, self._runtime, self._machine = config, store, runtime, machine
        self._tokens, self.world = tokens, world
        self.files: dict[str, Applied] = {CONTROL_FILE: Applied(CONTROL_FILE, control)}
        self.pods: dict[str, PodState] = {}
        self.wants: Mapping[ObjectId, Wanted] = {}
        self._ips = Addresses(*config.pod_range())
        self._service_ips = ServiceAddresses(config, {})
        self.troubles: dict[ObjectId, Trouble] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._dirty = asyncio.Event()
        self._moved = asyncio.Event()
        self._table: object = None
        self._lock = asyncio.Lock()
        self.closing = False

    # ---- objects ----

    @property
    def objects(self) -> dict[ObjectId, Object]:
        return objects_of({key: a.objects for key, a in self.files.items()})

    async def resume(self) -> None:
        """Takes over what an earlier daemon left: its objects, and every pod that runs. Nothing is started twice."""
        saved, addresses = self._store.load_objects()
        self.files.update({key: a for key, a in saved.items() if key != CONTROL_FILE})
        self._service_ips = ServiceAddresses(self._config, addresses)
        for spec, status, alive in await self._runtime.pods():
            state = PodState(spec, status, gone=not alive)
            if not alive and status.phase not in FINISHED:
                await self._runtime.remove(spec.uid)
                continue
            state.ended = time.time_ns() / 1e9 if state.gone else 0.0
            state.has_address = alive
            self.pods[spec.uid] = state
            if alive:
                self._ips.take(int(ipaddress.IPv4Address(spec.ip)))
                self._follow(state, taken_over=True)
        self.wants, wrong = plan_all(self.files, self._machine)
        for mistake in wrong:
            log.error("%s", mistake)
        if control_wrong := [m for m in wrong if m.file == CONTROL_FILE]:
            raise Mistakes(control_wrong)
        self._addresses_changed()
        self.changed()

    async def apply(self, request: Request) -> Prepared:
        """Checks an `up` and makes it what the mesh wants. Raises `Mistakes`, and then nothing has changed."""
        async with self._lock:
            present = dict(self.files)
            loop = asyncio.get_running_loop()
            if self.closing:
                raise Mistakes([Mistake("", 0, "the mesh is going down", "wait until `mantle down` has ended")])
            result = await loop.run_in_executor(None, prepare, request, present, self._machine, RESERVED)
            if isinstance(result, list):
                raise Mistakes(result)
            self._take(dict(result.files), result.wants)
            self._refresh_volumes(result.changes)
            return result

    async def delete(self, names: list[str] | None) -> list[Change]:
        """Removes the objects of these files (None: of every file of the user)."""
        async with self._lock:
            user = {key: a.objects for key, a in self.files.items() if key != CONTROL_FILE}
            after, changes = forget(user, names)
            files = {key: a for key, a in self.files.items() if key == CONTROL_FILE or key in after}
            wants, _ = plan_all(files, self._machine)
            self._take(files, wants)
            return changes

    def _take(self, files: dict[str, Applied], wants: Mapping[ObjectId, Wanted]) -> None:
        self.files, self.wants = files, wants
        self.troubles.clear()
        self._addresses_changed()
        self.changed()

    def _addresses_changed(self) -> None:
        self._service_ips.assign(item for item in self.objects.values() if item.kind == "Service")
        user = {key: a for key, a in self.files.items() if key != CONTROL_FILE}
        self._store.save_objects(user, self._service_ips.given)

    def _refresh_volumes(self, changes: tuple[Change, ...]) -> None:
        """A changed ConfigMap or Secret reaches the volumes of running pods, as on a cluster."""
        touched = {c.item.namespace for c in changes if c.event == "updated" and c.item.kind in ("ConfigMap", "Secret")}
        for state in self.pods.values():
            want = self.wants.get(state.object)
            if (
                state.spec.namespace in touched
                and want is not None
                and want.hash == state.spec.spec_hash
                and not state.gone
            ):
                meta = state.spec.meta
                planned = build(
                    want,
                    self._machine_for(state.object),
                    self.objects,
                    name=state.spec.name,
                    uid=state.spec.uid,
                    ip=state.spec.ip,
                    created=meta["created"],
                    service_ips=self._service_ips.given,
                )
                self._write_volumes(planned.spec.uid, planned.volumes, planned.owners, planned.sub_paths)

    # ---- pods ----

    def changed(self) -> None:
        """Something is different: decide again, and tell the world."""
        self._dirty.set()

    async def run(self) -> None:
        """Makes what runs what is wanted, until cancelled."""
        while True:
            self._dirty.clear()
            decision = self._decide()
            for stop in decision.stop:
                self._spawn(self._stop(self.pods[stop.uid], stop.because))
            for start in decision.start:
                self._spawn(self._start(start.object))
            await self._tell()
            times = [t.again for t in self.troubles.values()] + ([decision.later] if decision.later else [])
            delay = max(0.0, min(times) - time.time_ns() / 1e9) + 0.01 if times else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._dirty.wait()

    def _decide(self) -> Decision:
        now = time.time_ns() / 1e9
        goals = [] if self.closing else [self.goal(want) for want in self.wants.values()]
        decision = decide(goals, [p.running() for p in self.pods.values()], now)
        start = tuple(s for s in decision.start if (t := self.troubles.get(s.object)) is None or now >= t.again)
        return Decision(decision.stop, start, decision.later)

    @staticmethod
    def goal(want: Wanted) -> Goal:
        spec = want.item.doc["spec"]
        job = want.item.kind == "Job"
        completions = int(spec.get("completions") or spec.get("parallelism") or 1) if job else 0
        return Goal(want.item.id, want.hash, want.replicas, completions, int(spec.get("backoffLimit", 6)) if job else 0)

    def publish(self) -> None:
        """Tells the world what is; DNS answers from it at once."""
        self.world.publish(self.objects.values(), list(self.pods.values()), self._service_ips.given)

    async def _tell(self) -> None:
        self.publish()
        if self.world.table != self._table:
            self._table = self.world.table
            try:
                await self._runtime.services(self.world.table)
            except (RuntimeRefused, OSError) as error:
                self._table = None
                log.error("the router's service table could not be written: %s", error)
        self._moved.set()
        self._moved = asyncio.Event()

    async def moved(self, seconds: float | None) -> bool:
        """Waits for the next change; False if so many seconds passed first."""
        following = self._moved
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await following.wait()
                return True
        return False

    def _machine_for(self, item: ObjectId) -> Machine:
        key, applied = next((k, a) for k, a in self.files.items() if any(o.id == item for o in a.objects))
        return machine_of(self._machine, key, applied)

    async def _start(self, item: ObjectId) -> None:
        """One new pod of a workload: files, then processes."""
        want = self.wants.get(item)
        if want is None:
            return  # it was removed meanwhile
        address = self._ips.take()
        if address is None:
            self._trouble(item, "the network of the pods has no free address: start the mesh with a larger --pod-cidr")
            return
        uid, now = str(uuid.uuid4()), time.time_ns() / 1e9
        name = pod_name(item, want.hash, os.urandom(8))
        planned = build(
            want,
            self._machine_for(item),
            self.objects,
            name=name,
            uid=uid,
            ip=str(ipaddress.IPv4Address(address)),
            created=now,
            service_ips=self._service_ips.given,
        )
        state = PodState(planned.spec, PodStatus(uid, Phase.PENDING), starting=True)
        self.pods[uid] = state
        try:
            async with self._slots:
                self._write_volumes(uid, planned.volumes, planned.owners, planned.sub_paths)
                self._tokens.issue(planned.spec)
                await self._runtime.start(planned.spec)
        except (RuntimeRefused, OSError) as error:
            log.error("pod %s could not be started: %s", state.key, error)
            await self._forget(state)
            self._trouble(item, str(error))
            return
        self.troubles.pop(item, None)
        state.starting = False
        self._follow(state, taken_over=False)
        if state.stopping:
            await self._end(state)
        self.changed()

    def _write_volumes(
        self,
        uid: str,
        volumes: tuple[vol.Volume, ...],
        owners: Mapping[str, podfiles.Owners],
        sub_paths: tuple[tuple[str, str], ...],
    ) -> None:
        podfiles.write_volumes(
            self._store.pods / uid / "volumes", volumes, owners, sub_paths, not self._machine.rootless
        )

    def _trouble(self, item: ObjectId, message: str) -> None:
        before = self.troubles.get(item)
        wait = RETRY[0] if before is None else min(before.wait * 2, RETRY[1])
        self.troubles[item] = Trouble(message, time.time_ns() / 1e9 + wait, wait)
        self.changed()

    async def _stop(self, state: PodState, why: str) -> None:
        if state.stopping:
            return
        state.stopping, state.why = True, why
        if state.gone:
            await self._forget(state)
        elif not state.starting:  # else `_start` ends it when it is there
            await self._tell()  # its endpoints go before its processes
            await self._end(state)

    async def _end(self, state: PodState) -> None:
        try:
            await self._runtime.stop(state.spec.uid, None)
        except (RuntimeRefused, OSError) as error:
            log.warning("pod %s: %s", state.key, error)

    def _follow(self, state: PodState, taken_over: bool) -> None:
        if taken_over:
            self._tokens.issue(state.spec)
        self._spawn(self._live(state, PodFollower(state, self._runtime, self.changed, taken_over)))

    async def _live(self, state: PodState, follower: PodFollower) -> None:
        """From start to end of one pod's processes."""
        try:
            await follower.run()
        except (RuntimeRefused, OSError) as error:
            log.warning("pod %s: its supervisor does not answer: %s", state.key, error)
        state.gone, state.ended = True, time.time_ns() / 1e9
        self._tokens.forget(state.spec.uid)
        finished = state.status.phase in FINISHED and state.object[0] in ("Job", "Pod")
        if finished and not state.stopping:
            self._give_back(state)
            self.changed()
        else:
            await self._forget(state)

    def _give_back(self, state: PodState) -> None:
        if state.has_address:
            state.has_address = False
            self._ips.give_back(int(ipaddress.IPv4Address(state.spec.ip)))

    async def _forget(self, state: PodState) -> None:
        """Nothing is left of a pod, here, in the runtime and on disk."""
        self.pods.pop(state.spec.uid, None)
        self._tokens.forget(state.spec.uid)
        with contextlib.suppress(RuntimeRefused, OSError):
            await self._runtime.remove(state.spec.uid)
        podfiles.remove_pod(self._store.pods / state.spec.uid)
        self._give_back(state)
        self.changed()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the controller failed", exc_info=error)
            self.changed()

    async def close_pods(self) -> None:
        """Stops every pod and returns when all are gone."""
        self.closing = True
        self.changed()
        while self.pods:
            for state in list(self.pods.values()):
                if state.gone:
                    await self._forget(state)
            if self.pods:
                await self.moved(1.0)

    async def shutdown(self) -> None:
        """The daemon ends; the pods stay."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
