"""The sliding window: what each pod's counters grew by, in slots of time, bounded in length and in size.

Only growth is stored, so an idle series costs nothing. A counter that went back was reset by a restart: its whole value
is growth. The first scrape of a pod that was there before us is a baseline; one that came later started from zero.
Pure: `now` is an argument, in seconds of any monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mantle.viz.promtext import Series
from mantle.viz.source import CLIENTS_OPEN, GAUGES, Point, Subject, Traffic

LENGTH_SECONDS = 15 * 60.0
SLOT_SECONDS = 5.0
MAX_ENTRIES = 400_000
"""Entries over all slots (about 100 bytes each); beyond it the oldest slots go and the window is shorter."""

MOST = 1e18
"""The largest number that is believed: an exabyte, or a request each nanosecond for thirty years."""

_GAUGE_FAMILIES = frozenset((*GAUGES, CLIENTS_OPEN))


@dataclass(slots=True)
class _Slot:
    start: float
    growth: dict[Subject, dict[Series, float]] = field(default_factory=dict)
    entries: int = 0


@dataclass(slots=True)
class _PodState:
    subject: Subject
    counters: dict[Series, float]
    gauges: dict[Series, float]


class Window:
    """Written by the scraper only; every read is a copy."""

    def __init__(
        self,
        started: float,
        *,
        length: float = LENGTH_SECONDS,
        slot: float = SLOT_SECONDS,
        max_entries: int = MAX_ENTRIES,
    ) -> None:
        self._begin = self._latest = started
        self._length, self._slot, self._max_entries = length, slot, max_entries
        self._slots: deque[_Slot] = deque()
        self._pods: dict[str, _PodState] = {}
        self._entries = 0

    def observe(self, now: float, uid: str, subject: Subject, samples: Mapping[Series, float], *, new: bool) -> None:
        """Takes all samples of one origin: a pod's metrics, or its table of clients; `uid` names pod and origin.

        Numbers that nothing can count (NaN, infinity) are left out: one pod's word must not spoil the sums of all.

        `new`: the pod appeared while we watched, so its counters began at zero.
        """
        counted = {series: value for series, value in samples.items() if 0 <= value <= MOST}
        gauges = {series: value for series, value in counted.items() if series.family in _GAUGE_FAMILIES}
        counters = {series: value for series, value in counted.items() if series.family not in _GAUGE_FAMILIES}
        before = self._pods.get(uid)
        if before is not None or new:
            last = {} if before is None else before.counters
            slot = self._slot_at(now)
            grown = slot.growth.setdefault(subject, {})
            known = len(grown)
            for series, value in counters.items():
                growth = _growth(last.get(series, 0.0), value)
                if growth > 0:
                    grown[series] = grown.get(series, 0.0) + growth
            slot.entries += len(grown) - known
            self._entries += len(grown) - known
        self._pods[uid] = _PodState(subject, counters, gauges)
        self._latest = now
        self._expire(now)

    def keep_only(self, uids: Collection[str]) -> None:
        """Forgets the gauges and baselines of origins that are gone; what they did stays until it is too old."""
        for uid in self._pods.keys() - set(uids):
            del self._pods[uid]

    def read(self, now: float, seconds: float) -> Traffic:
        """Growth in the last `seconds` (at most the window's length; whole slots) and the newest gauges."""
        self._expire(now)
        first = self._boundary(now - min(seconds, self._length))
        total: dict[Subject, dict[Series, float]] = {}
        for slot in self._slots:
            if slot.start >= first:
                for subject, growth in slot.growth.items():
                    sums = total.setdefault(subject, {})
                    for series, value in growth.items():
                        sums[series] = sums.get(series, 0.0) + value
        return Traffic(
            seconds=max(self._latest - max(self._begin, first), 1.0),
            increases=tuple(
                Point(subject, series, value) for subject, sums in total.items() for series, value in sums.items()
            ),
            gauges=tuple(
                Point(pod.subject, series, value) for pod in self._pods.values() for series, value in pod.gauges.items()
            ),
        )

    @property
    def entries(self) -> int:
        return self._entries

    def _slot_at(self, now: float) -> _Slot:
        start = self._boundary(now)
        if not self._slots or self._slots[-1].start < start:
            self._slots.append(_Slot(start))
        return self._slots[-1]

    def _boundary(self, time: float) -> float:
        return time - time % self._slot

    def _expire(self, now: float) -> None:
        while self._slots and self._slots[0].start + self._slot <= now - self._length:
            self._entries -= self._slots.popleft().entries
        while self._entries > self._max_entries and len(self._slots) > 1:
            dropped = self._slots.popleft()
            self._entries -= dropped.entries
            self._begin = max(self._begin, dropped.start + self._slot)


def _growth(last: float, value: float) -> float:
    """How much a counter grew; the whole value after a reset. A NaN is no growth."""
    return value - last if value >= last else value if value >= 0 else 0.0
