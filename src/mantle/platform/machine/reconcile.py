"""What is wanted beside what runs -> what to do. Pure, with the clock as an argument.

`merge` compares files with what was applied before, as `kubectl apply` does, and also removes what left a file.
`decide`
compares workloads with pods. A changed workload's pods are stopped first and started anew when the last old one is
gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mantle.platform.machine.manifest import Object, ObjectId
from mantle.platform.machine.spec import Phase

# ---- objects ----

Files = Mapping[str, tuple[Object, ...]]
"""What each file held when it was last applied, oldest file first."""


@dataclass(frozen=True, slots=True)
class Change:
    """`event`: created, updated, unchanged or removed."""

    event: str
    item: Object


def merge(applied: Files, given: Files) -> tuple[dict[str, tuple[Object, ...]], list[Change]]:
    """The files as they are after an `up`, and what that changes, in the order to say it.

    An object that a file given now used to hold and no longer does is removed; objects of other files stay. An object
    that
    moves from one file to another changes hands.
    """
    before = objects_of(applied)
    now_given = objects_of(given)
    after: dict[str, tuple[Object, ...]] = {}
    for file, held in applied.items():
        if file not in given and (kept := tuple(o for o in held if o.id not in now_given)):
            after[file] = kept
    after.update({file: tuple(held) for file, held in given.items()})
    changes = []
    for item in now_given.values():
        old = before.get(item.id)
        event = "created" if old is None else "unchanged" if old.doc == item.doc else "updated"
        changes.append(Change(event, item))
    left = objects_of(after)
    changes += [Change("removed", item) for key, item in before.items() if key not in left]
    return after, changes


def forget(applied: Files, names: Iterable[str] | None) -> tuple[dict[str, tuple[Object, ...]], list[Change]]:
    """Without the objects of these files (None: of all)."""
    gone = set(applied) if names is None else set(names)
    after = {file: held for file, held in applied.items() if file not in gone}
    left = objects_of(after)
    return after, [Change("removed", item) for key, item in objects_of(applied).items() if key not in left]


def objects_of(files: Files) -> dict[ObjectId, Object]:
    return {item.id: item for held in files.values() for item in held}


# ---- pods ----


@dataclass(frozen=True, slots=True)
class Running:
    """A pod as the runtime has it. `since` and `ended` are Unix times in seconds."""

    uid: str
    name: str
    object: ObjectId
    hash: str
    phase: Phase = Phase.RUNNING
    ready: bool = False
    stopping: bool = False
    since: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True, slots=True)
class Goal:
    """How many pods of which making a workload wants."""

    object: ObjectId
    hash: str
    replicas: int
    completions: int = 0
    """Of a Job."""
    backoff_limit: int = 6


@dataclass(frozen=True, slots=True)
class Stop:
    uid: str
    because: str


@dataclass(frozen=True, slots=True)
class Start:
    object: ObjectId


@dataclass(frozen=True, slots=True)
class Later:
    """Decide again at this time (a Job's back-off)."""

    at: float


@dataclass(frozen=True, slots=True)
class Decision:
    stop: tuple[Stop, ...] = ()
    start: tuple[Start, ...] = ()
    later: float | None = None
    """Unix time in seconds of the next thing that only time changes."""


JOB_BACKOFF = (10.0, 360.0)
"""Seconds before a failed Job pod is tried again: the first wait and the longest; it doubles (Kubernetes: Jobs)."""


def decide(goals: Iterable[Goal], pods: Iterable[Running], now: float) -> Decision:
    """What to stop and start so that the pods become what is wanted. Deciding again while that happens changes
    nothing.
    """
    by_object: dict[ObjectId, list[Running]] = {}
    for pod in pods:
        by_object.setdefault(pod.object, []).append(pod)
    stop: list[Stop] = []
    start: list[Start] = []
    later: list[float] = []
    for goal in goals:
        mine = by_object.pop(goal.object, [])
        outdated = [p for p in mine if p.hash != goal.hash]
        stop += [Stop(p.uid, "replaced") for p in outdated if not p.stopping]
        current = [p for p in mine if p.hash == goal.hash]
        if outdated or any(p.stopping for p in current):
            continue  # stop, then start: two makings of one workload never run side by side
        act = _job(goal, current, now) if goal.object[0] == "Job" else _steady(goal, current)
        stop += act.stop
        start += act.start
        later += [] if act.later is None else [act.later]
    stop += [Stop(p.uid, "removed") for rest in by_object.values() for p in rest if not p.stopping]
    return Decision(tuple(stop), tuple(start), min(later, default=None))


def _steady(goal: Goal, current: list[Running]) -> Decision:
    missing = goal.replicas - len(current)
    if missing >= 0:
        return Decision(start=(Start(goal.object),) * missing)
    worst_first = sorted(current, key=lambda p: (p.ready, -p.since))
    return Decision(stop=tuple(Stop(p.uid, "scaled down") for p in worst_first[:-missing]))


def _job(goal: Goal, current: list[Running], now: float) -> Decision:
    done = sum(p.phase is Phase.SUCCEEDED for p in current)
    failed = [p for p in current if p.phase is Phase.FAILED]
    active = [p for p in current if p.phase in (Phase.PENDING, Phase.RUNNING)]
    if done >= goal.completions or len(failed) > goal.backoff_limit:
        return Decision()
    missing = min(goal.replicas, goal.completions - done) - len(active)
    if missing <= 0:
        return Decision()
    if failed:
        first, longest = JOB_BACKOFF
        again = max(p.ended for p in failed) + min(longest, first * 2 ** (len(failed) - 1))
        if now < again:
            return Decision(later=again)
    return Decision(start=(Start(goal.object),) * missing)


def job_failed(goal: Goal, pods: Iterable[Running]) -> bool:
    """Has a Job used up its tries?"""
    return (
        sum(p.phase is Phase.FAILED and p.hash == goal.hash and p.object == goal.object for p in pods)
        > goal.backoff_limit
    )


# ---- names and addresses ----

ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
"""Kubernetes' own: without vowels, so that no word can appear."""


def letters(seed: bytes, count: int) -> str:
    """`count` characters of a hash or of random bytes."""
    value = int.from_bytes(seed, "big")
    out = ""
    for _ in range(count):
        value, rest = divmod(value, len(ALPHABET))
        out += ALPHABET[rest]
    return out


def pod_name(item: ObjectId, hash: str, random: bytes) -> str:
    """As Kubernetes names pods: `web-5d4f8b7c9x-abcde` of a Deployment, `job-abcde` of a Job, a Pod's own name."""
    kind, _, name = item
    if kind == "Pod":
        return name
    if kind == "Job":
        return f"{name[:57]}-{letters(random, 5)}"
    return f"{name[:46]}-{letters(bytes.fromhex(hash), 10)}-{letters(random, 5)}"


@dataclass(slots=True)
class Addresses:
    """Hands out IPv4 addresses of one network, never one again before the rest were used. Addresses are whole
    numbers.
    """

    first: int
    last: int
    taken: set[int] = field(default_factory=set)
    next: int = 0

    def take(self, wanted: int | None = None) -> int | None:
        """A free address: `wanted` if it is free, else the next one; None when all are taken."""
        size = self.last - self.first + 1
        start = wanted - self.first if wanted is not None and self.first <= wanted <= self.last else self.next
        for step in range(size):
            offset = (start + step) % size
            if self.first + offset not in self.taken:
                self.taken.add(self.first + offset)
                if wanted is None:
                    self.next = (offset + 1) % size
                return self.first + offset
        return None

    def give_back(self, address: int) -> None:
        self.taken.discard(address)
