"""When a container is probed and what the answers mean: a state machine on virtual time, without I/O.

Semantics of https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/: liveness and
readiness begin when the startup probe has passed; a failing readiness makes a container unready, a failing startup or
liveness probe kills it. One addition: until a probe has passed for the first time it is asked more often than its
period
(`EAGER`), and only the tries that the period allows count as failures, so a pod is ready when its application is.

Times are seconds of any monotonic clock. `Probes` is the state of one container, made anew each time it starts.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from mantle.platform.machine.spec import ContainerSpec, ProbeSpec

EAGER = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Seconds between the first tries; the last one repeats until the period is shorter."""


class Kind(enum.StrEnum):
    STARTUP = "startup"
    READINESS = "readiness"
    LIVENESS = "liveness"


@dataclass(frozen=True, slots=True)
class Ask:
    """Send this probe now, and give the answer to `Probes.answer`."""

    kind: Kind
    spec: ProbeSpec


@dataclass(frozen=True, slots=True)
class Kill:
    """The container must be restarted, and why."""

    kind: Kind
    detail: str


@dataclass(slots=True)
class _One:
    kind: Kind
    spec: ProbeSpec
    due: float
    counted: float
    """When a failure counts next."""
    asked: bool = False
    passed_once: bool = False
    tries: int = 0
    successes: int = 0
    failures: int = 0
    good: bool = False


@dataclass(slots=True)
class Probes:
    """One container's probes since it started at `began`."""

    container: ContainerSpec
    began: float
    started: bool = False
    ready: bool = False
    last_failure: str = ""
    _all: dict[Kind, _One] = field(default_factory=dict)

    def __post_init__(self) -> None:
        box = self.container
        if box.startup is not None:
            self._add(Kind.STARTUP, box.startup, self.began)
        else:
            self._start(self.began)

    def poll(self, now: float) -> list[Ask]:
        """The probes to send now."""
        asks = []
        for one in self._all.values():
            if not one.asked and now >= one.due:
                one.asked = True
                asks.append(Ask(one.kind, one.spec))
        return asks

    def next_due(self) -> float | None:
        """When `poll` has something next; None while every probe is on its way or there is none."""
        return min((one.due for one in self._all.values() if not one.asked), default=None)

    def answer(self, kind: Kind, ok: bool, detail: str, now: float) -> Kill | None:
        """Takes in the outcome of a probe. `detail` says what was found when it failed."""
        one = self._all.get(kind)
        if one is None:
            return None
        one.asked = False
        one.tries += 1
        if ok:
            one.passed_once = True
            one.failures, one.successes = 0, one.successes + 1
            one.due = now + one.spec.period
            one.counted = one.due
            if one.successes >= one.spec.success:
                one.good = True
            else:
                one.due = now + min(one.spec.period, EAGER[-1])
        else:
            self.last_failure = f"{kind} probe: {detail}"
            one.successes = 0
            if now >= one.counted:
                one.failures += 1
                one.counted = now + one.spec.period
            eager = EAGER[min(one.tries, len(EAGER)) - 1]
            one.due = now + (one.spec.period if one.passed_once else min(one.spec.period, eager))
            if one.failures >= one.spec.failure:
                one.good = False
                one.failures = one.spec.failure
                if kind is not Kind.READINESS:
                    return Kill(kind, detail)
        if kind is Kind.STARTUP and one.good:
            del self._all[Kind.STARTUP]
            self._start(now)
        elif kind is Kind.READINESS:
            self.ready = one.good
        return None

    def resume(self, started: bool, ready: bool, now: float) -> None:
        """A restarted daemon takes a running container over as it left it."""
        if started and Kind.STARTUP in self._all:
            del self._all[Kind.STARTUP]
            self._start(now)
        if ready and (one := self._all.get(Kind.READINESS)):
            one.good = one.passed_once = self.ready = True

    def _start(self, now: float) -> None:
        self.started = True
        self.ready = self.container.readiness is None
        for kind, spec in ((Kind.READINESS, self.container.readiness), (Kind.LIVENESS, self.container.liveness)):
            if spec is not None:
                # A startup probe that asks the same thing has just been answered.
                self._add(kind, spec, now)
                if self.container.startup is not None and _same(self.container.startup, spec):
                    one = self._all[kind]
                    one.passed_once, one.due = True, now + spec.period
                    if kind is Kind.READINESS and spec.success == 1:
                        one.good = self.ready = True

    def _add(self, kind: Kind, spec: ProbeSpec, now: float) -> None:
        first = max(now, self.began + spec.initial_delay)
        self._all[kind] = _One(kind, spec, first, first + (spec.period if kind is not Kind.LIVENESS else 0.0))


def _same(a: ProbeSpec, b: ProbeSpec) -> bool:
    return (a.http, a.tcp, a.grpc, a.exec) == (b.http, b.tcp, b.grpc, b.exec)
