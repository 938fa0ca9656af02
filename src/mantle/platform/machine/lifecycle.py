"""What should happen next in a pod: the supervisor's decisions. Events and `now` in, actions out; no I/O, no clock.

Start order: init containers one after the other, sidecars among them (each waited for until it has started), then the
applications together. Restarts by policy with back-off; a pod whose applications have all ended for good is finished:
its sidecars are stopped last first, then it has succeeded or failed. Times are seconds of any steady clock.
The rules are the kubelet's (kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle and sidecar-containers).
"""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass

from mantle.platform.machine.spec import ContainerSpec, ContainerStatus, Phase, PodSpec, PodStatus, Restart, Role

RESET_AFTER = 600.0
"""A container that ran this long starts its back-off anew."""
_CAP = 30
"""The longest back-off, in multiples of the first (10 s and 5 min in Kubernetes)."""


@dataclass(frozen=True, slots=True)
class Start:
    name: str


@dataclass(frozen=True, slots=True)
class Signal:
    name: str
    number: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Everything has ended; the supervisor leaves."""


Action = Start | Signal | Finish


class _State(enum.Enum):
    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True)
class _Container:
    spec: ContainerSpec
    state: _State = _State.WAITING
    pid: int = 0
    started: bool = False
    begun_at: float = 0.0
    """When it was last started."""
    retry_at: float | None = None
    """When it is to be started again; None: it is not."""
    delay: float = 0.0
    streak: int = 0
    """Restarts since it last ran for long."""
    restarts: int = 0
    exit_code: int | None = None
    reason: str = "PodInitializing"
    message: str = ""
    killed_for: str = ""
    """Why we told it to end, for its status."""
    kill_at: float | None = None
    told: bool = False

    @property
    def alive(self) -> bool:
        return self.state in (_State.STARTING, _State.RUNNING)

    @property
    def completed(self) -> bool:
        return self.state is _State.ENDED and self.exit_code == 0 and self.retry_at is None


class Lifecycle:
    """One pod. Call an event method, carry out the actions it returns, come back at `deadline` with `tick`."""

    def __init__(self, spec: PodSpec, backoff: float = 10.0) -> None:
        self._spec = spec
        self._backoff = backoff
        self._containers = {c.name: _Container(c) for c in spec.containers}
        self._initialized = False
        self._stopping = False
        self._kill_at: float | None = None
        self._verdict: Phase | None = None
        self._message = ""
        self._finished = False

    # Events

    def tick(self, now: float) -> list[Action]:
        """Time has passed (also the first call)."""
        return self._advance(now)

    def running(self, name: str, pid: int, now: float) -> list[Action]:
        """The container's program is executing."""
        c = self._containers[name]
        c.state, c.pid, c.begun_at = _State.RUNNING, pid, now
        c.reason, c.message = "", ""
        c.started = c.spec.startup is None
        return self._advance(now)

    def ended(self, name: str, code: int, now: float, error: str = "") -> list[Action]:
        """The container is gone: `code` as a shell would show it (128 + signal), `error` if it could not be started."""
        c = self._containers[name]
        ran = now - c.begun_at if c.state is _State.RUNNING else 0.0
        c.state, c.pid, c.started, c.exit_code, c.told, c.kill_at = _State.ENDED, 0, False, code, False, None
        c.reason = "StartError" if error else "Completed" if code == 0 else "Error"
        c.message, c.killed_for = error or c.killed_for, ""
        c.retry_at = None
        if not self._stopping and self._wants_restart(c):
            c.streak = 0 if ran >= RESET_AFTER else c.streak
            c.delay = 0.0 if c.streak == 0 else min(self._backoff * 2 ** (c.streak - 1), self._backoff * _CAP)
            c.streak += 1
            c.retry_at = now + c.delay
        elif not self._stopping and c.spec.role is Role.INIT and code != 0:
            self._message = f"init container {name} failed: {c.message or f'exit code {code}'}"
            self._begin_stop(now, self._spec.grace, Phase.FAILED)
        return self._advance(now)

    def probed(self, name: str, now: float) -> list[Action]:
        """The startup probe has passed."""
        c = self._containers[name]
        c.started = c.state is _State.RUNNING
        return self._advance(now)

    def restart(self, name: str, why: str, now: float) -> list[Action]:
        """A probe found the container dead: end it; the restart policy then applies."""
        c = self._containers[name]
        if not c.alive or c.told:
            return []
        c.told, c.killed_for, c.kill_at = True, why, now + self._spec.grace
        return [Signal(name, signal.SIGTERM), *self._advance(now)]

    def stop(self, grace: float | None, now: float) -> list[Action]:
        """The pod is to go, within `grace` seconds (its own if None). A second call can only shorten it."""
        self._begin_stop(now, self._spec.grace if grace is None else grace, None)
        return self._advance(now)

    # Questions

    @property
    def deadline(self) -> float | None:
        """When `tick` is next needed."""
        times = [c.retry_at for c in self._containers.values() if c.retry_at is not None and not self._stopping]
        times += [c.kill_at for c in self._containers.values() if c.kill_at is not None]
        if self._stopping and self._kill_at is not None:
            times.append(self._kill_at)
        return min(times, default=None)

    def status(self) -> PodStatus:
        return PodStatus(self._spec.uid, self._phase(), tuple(map(_status, self._containers.values())), self._message)

    def _phase(self) -> Phase:
        if self._finished:
            apps = self._role(Role.APP)
            good = all(c.exit_code == 0 for c in apps)
            return self._verdict or (Phase.SUCCEEDED if good else Phase.FAILED)
        return Phase.RUNNING if self._initialized else Phase.PENDING

    # Decisions

    def _role(self, *roles: Role) -> list[_Container]:
        return [c for c in self._containers.values() if c.spec.role in roles]

    def _wants_restart(self, c: _Container) -> bool:
        if c.spec.role is Role.SIDECAR:
            return True
        if c.spec.role is Role.INIT:
            return c.exit_code != 0 and self._spec.restart is not Restart.NEVER
        if self._spec.restart is Restart.ON_FAILURE:
            return c.exit_code != 0
        return self._spec.restart is Restart.ALWAYS

    def _begin_stop(self, now: float, grace: float, verdict: Phase | None) -> None:
        kill_at = now + grace
        self._kill_at = kill_at if self._kill_at is None else min(self._kill_at, kill_at)
        if not self._stopping:
            self._stopping, self._verdict = True, verdict
            for c in self._containers.values():
                c.retry_at = None

    def _advance(self, now: float) -> list[Action]:
        actions: list[Action] = []
        if not self._stopping:
            actions += self._start_what_is_due(now)
            if self._initialized and all(c.state is _State.ENDED and c.retry_at is None for c in self._role(Role.APP)):
                self._begin_stop(now, self._spec.grace, None)
        if self._stopping:
            actions += self._stop_what_is_left(now)
        for c in self._containers.values():
            if c.alive and c.kill_at is not None and now >= c.kill_at:
                c.kill_at = None
                actions.append(Signal(c.spec.name, signal.SIGKILL))
        return actions

    def _start_what_is_due(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for c in self._role(Role.INIT, Role.SIDECAR):
            if c.spec.role is Role.INIT and (self._initialized or c.completed):
                continue
            actions += self._start(c, now)
            if not self._initialized and not (c.spec.role is Role.SIDECAR and c.started):
                return actions
        self._initialized = True
        for c in self._role(Role.APP):
            actions += self._start(c, now)
        return actions

    def _start(self, c: _Container, now: float) -> list[Action]:
        again = c.retry_at is not None and now >= c.retry_at
        if not (again or c.state is _State.WAITING):
            return []
        c.restarts += int(again)
        c.state, c.retry_at, c.reason = _State.STARTING, None, "ContainerCreating"
        return [Start(c.spec.name)]

    def _stop_what_is_left(self, now: float) -> list[Action]:
        """Applications together, then the sidecars one after the other, the last started first; the clock ends it."""
        alive = [c for c in self._containers.values() if c.alive]
        if not alive:
            if self._finished:
                return []
            self._finished, self._kill_at = True, None
            return [Finish()]
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            return [Signal(c.spec.name, signal.SIGKILL) for c in alive]
        first = [c for c in alive if c.spec.role is not Role.SIDECAR] or alive[-1:]
        actions: list[Action] = []
        for c in first:
            if not c.told:
                c.told = True
                actions.append(Signal(c.spec.name, signal.SIGTERM))
        return actions


def _status(c: _Container) -> ContainerStatus:
    state, reason, message = c.state.value, c.reason, c.message
    if c.state is _State.STARTING:
        state = "waiting"
    elif c.state is _State.ENDED:
        state = "terminated"
        if c.retry_at is not None and c.delay > 0:
            state = "waiting"
            waits = f"back-off {c.delay:g}s restarting failed container"
            reason = reason if reason == "StartError" else "CrashLoopBackOff"
            message = f"{message}; {waits}" if message else waits
    return ContainerStatus(c.spec.name, state, reason, message, c.pid, c.started, c.exit_code, c.restarts)
