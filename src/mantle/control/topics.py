"""Live answers: one topic for each thing that is asked for, computed by one writer, read by many streams.

A reader is a version, not a queue: it keeps the state it was last sent and is given what leads from there to the newest
one, so memory does not grow with changes and slow readers skip. The bytes of one pair of versions are made once. Who is
woken when is `core.waves`' decision; this file carries it out on the event loop. Knows no message and no service.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from mantle.core.model import Snapshot
from mantle.core.waves import Waves
from mantle.core.world import Tag, World

T = TypeVar("T")

RECOMPUTE_INTERVAL = 0.050
"""Seconds at least between two computations of all topics: a busy platform is followed, not chased."""
SLICE_BUDGET = 0.003
"""Seconds of computing before new calls get their turn (bench/RESULTS.md: a long turn is every new call's latency)."""
KEPT_PAIRS = 8
"""Pairs of versions whose bytes are kept: healthy readers all share the newest one."""


@dataclass(frozen=True, slots=True)
class State(Generic[T]):
    """What a topic says, at one version. Equal values keep their version."""

    version: int
    value: T


class Topic(Generic[T]):
    """One thing that is asked for. `compute` is its meaning in a world, `encode` the messages from one value to the
    next.
    """

    def __init__(
        self,
        world: World,
        compute: Callable[[World], T],
        encode: Callable[[T | None, T], tuple[bytes, ...]],
    ) -> None:
        self._compute = compute
        self._encode = encode
        self._bytes: dict[tuple[int, int], tuple[bytes, ...]] = {}
        self.state = State(1, compute(world))

    def update(self, world: World) -> bool:
        """Computes the value anew; True if it is another one."""
        value = self._compute(world)
        if value == self.state.value:
            return False
        self.state = State(self.state.version + 1, value)
        return True

    def messages(self, sent: State[T] | None, now: State[T]) -> tuple[bytes, ...]:
        """What brings a reader from `sent` (None: nothing yet) to `now`."""
        pair = (sent.version if sent is not None else 0, now.version)
        if pair not in self._bytes:
            if len(self._bytes) >= KEPT_PAIRS:
                del self._bytes[next(iter(self._bytes))]
            self._bytes[pair] = self._encode(sent.value if sent is not None else None, now.value)
        return self._bytes[pair]


class Reader(Generic[T]):
    """One stream's place in a topic."""

    def __init__(self, topic: Topic[T]) -> None:
        self.topic = topic
        self.wake = asyncio.Event()

    async def states(self) -> AsyncIterator[State[T]]:
        """The state now, then the newest one after each wake-up that brought another version."""
        sent = self.topic.state
        yield sent
        while True:
            await self.wake.wait()
            self.wake.clear()
            now = self.topic.state
            if now.version != sent.version:
                sent = now
                yield now


class Topics:
    """Every topic somebody reads. `follow` is the one writer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.known = asyncio.Event()
        """Set once the platform has said anything: before that, every answer would be wrong."""
        self._topics: dict[Hashable, Topic[object]] = {}
        self._by_tag: dict[Tag | None, dict[Hashable, None]] = {}
        """The topics that depend on a tag; under None those that depend on anything."""
        self._readers: dict[Hashable, int] = {}
        self._waves: Waves[Hashable, Reader[object]] = Waves()
        self._timer: asyncio.TimerHandle | None = None

    async def follow(self, snapshots: AsyncIterator[Snapshot]) -> None:
        """Takes each newer snapshot in, for ever: topics are computed anew, readers of changed ones woken."""
        loop = asyncio.get_running_loop()
        async for snapshot in snapshots:
            begun = loop.time()
            await self.publish(self.world.next(snapshot))
            await asyncio.sleep(max(0.0, begun + RECOMPUTE_INTERVAL - loop.time()))

    async def publish(self, world: World) -> None:
        """Makes `world` the one that all answers come from. Only what depends on something touched is computed."""
        loop = asyncio.get_running_loop()
        self.world = world
        self.known.set()
        turn = loop.time()
        concerned = {key: None for tag in (None, *world.touched) for key in self._by_tag.get(tag, ())}
        for key in concerned:
            topic = self._topics.get(key)
            if topic is not None and topic.update(world):
                self._waves.changed(key, loop.time())
                self._arm()
            if loop.time() - turn > SLICE_BUDGET:
                await asyncio.sleep(0)
                turn = loop.time()

    @contextmanager
    def read(
        self,
        key: Hashable,
        compute: Callable[[World], T],
        encode: Callable[[T | None, T], tuple[bytes, ...]],
        tags: tuple[Tag | None, ...] = (None,),
    ) -> Iterator[Reader[T]]:
        """A reader of the topic `key`, which is made if nobody reads it yet and forgotten when the last one leaves.

        `tags` is what the answer depends on: it is computed anew when one of them is touched (None: at every change).
        """
        topic: Topic[T] = self._topics.get(key)  # type: ignore[assignment]  # a key always has one type of value
        if topic is None:
            topic = Topic(self.world, compute, encode)
            self._topics[key] = topic
            for tag in tags:
                self._by_tag.setdefault(tag, {})[key] = None
        reader = Reader(topic)
        self._readers[key] = self._readers.get(key, 0) + 1
        self._waves.join(key, reader)  # type: ignore[arg-type]
        try:
            yield reader
        finally:
            self._waves.leave(key, reader)  # type: ignore[arg-type]
            self._readers[key] -= 1
            if not self._readers[key]:
                del self._readers[key], self._topics[key]
                for tag in tags:
                    del self._by_tag[tag][key]
                    if not self._by_tag[tag]:
                        del self._by_tag[tag]

    def counts(self) -> tuple[int, int]:
        """(topics, readers), for metrics."""
        return len(self._topics), sum(self._readers.values())

    def _arm(self) -> None:
        """Sees to it that `_wake` runs when there is somebody to wake."""
        due = self._waves.next_at()
        if due is None or (self._timer is not None and self._timer.when() <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due, self._wake)

    def _wake(self) -> None:
        self._timer = None
        for reader in self._waves.take(asyncio.get_running_loop().time()):
            reader.wake.set()
        self._arm()
