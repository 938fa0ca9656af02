"""Who is woken when a topic changes: paced waves, cut into slices, so that a busy topic never starves a new call.

A loop that wakes every subscriber at every change leaves no room for new calls: they waited for seconds (measured, see
bench/RESULTS.md). So a topic's first change wakes at once, later ones at most every `WAVE_INTERVAL`; and inside waves
at most `SLICE` readers are woken, then nothing for `SLICE_PAUSE`. The slice budget is the process's, not the topic's,
or ten topics would multiply it. Pure: the caller brings the time (seconds, monotonic) and does the waking.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

Topic = TypeVar("Topic", bound=Hashable)
Reader = TypeVar("Reader", bound=Hashable)

WAVE_INTERVAL = 0.200
SLICE = 25
SLICE_PAUSE = 0.003


class Waves(Generic[Topic, Reader]):
    """Decides the order and the time of wake-ups. A reader belongs to one topic and waits at most once in the queue."""

    def __init__(self) -> None:
        self._readers: dict[Topic, dict[Reader, None]] = {}
        self._last_wave: dict[Topic, float] = {}
        self._due: list[tuple[float, int, Topic]] = []
        self._changed: set[Topic] = set()
        self._queue: deque[Reader] = deque()
        self._queued: set[Reader] = set()
        self._next_slice = float("-inf")
        self._order = 0

    def join(self, topic: Topic, reader: Reader) -> None:
        """`reader` wants to be woken for changes of `topic` from now on."""
        self._readers.setdefault(topic, {})[reader] = None

    def leave(self, topic: Topic, reader: Reader) -> None:
        """`reader` is gone: it is never returned again."""
        readers = self._readers.get(topic, {})
        readers.pop(reader, None)
        self._queued.discard(reader)
        if not readers:
            self._readers.pop(topic, None)
            self._last_wave.pop(topic, None)
            self._changed.discard(topic)

    def changed(self, topic: Topic, now: float) -> None:
        """`topic` has a newer value. Its readers' wave starts now, or when the pace allows."""
        if topic in self._changed or topic not in self._readers:
            return
        self._changed.add(topic)
        self._order += 1
        due = max(now, self._last_wave.get(topic, float("-inf")) + WAVE_INTERVAL)
        heapq.heappush(self._due, (due, self._order, topic))

    def take(self, now: float) -> list[Reader]:
        """The readers to wake at `now`: at most one slice, and none before the pause after the last one is over."""
        self._start_due(now)
        if now < self._next_slice:
            return []
        taken: list[Reader] = []
        while self._queue and len(taken) < SLICE:
            reader = self._queue.popleft()
            if reader in self._queued:
                self._queued.remove(reader)
                taken.append(reader)
        if taken:
            self._next_slice = now + SLICE_PAUSE
        return taken

    def next_at(self) -> float | None:
        """When `take` has something to do again; None while nothing changed."""
        if self._queued:
            return self._next_slice
        while self._due and self._due[0][2] not in self._changed:
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def _start_due(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            _, _, topic = heapq.heappop(self._due)
            if topic not in self._changed:
                continue
            self._changed.discard(topic)
            self._last_wave[topic] = now
            for reader in self._readers[topic]:
                if reader not in self._queued:
                    self._queued.add(reader)
                    self._queue.append(reader)
