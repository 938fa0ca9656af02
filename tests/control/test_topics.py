"""Live answers on virtual time: no second passes while these tests play seconds."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from discovery_play import MESH, pod, snapshot
from virtual_time import play

from mantle.control.topics import KEPT_PAIRS, RECOMPUTE_INTERVAL, Topic, Topics
from mantle.core.model import Snapshot
from mantle.core.waves import SLICE, SLICE_PAUSE, WAVE_INTERVAL
from mantle.core.world import World


def version_of(world: World) -> int:
    return world.snapshot.version


@dataclass
class Encoder:
    """Counts how often the bytes of a pair were made."""

    made: Counter[tuple[int | None, int]] = field(default_factory=Counter)

    def __call__(self, before: int | None, now: int) -> tuple[bytes, ...]:
        self.made[(before, now)] += 1
        return (f"{before}->{now}".encode(),)


def world(version: int) -> World:
    return World.empty(MESH).next(snapshot(version, pod("web-1", "10.0.0.1")))


@dataclass
class Subscriber:
    """Reads a topic and remembers when which version came."""

    seen: list[tuple[float, int]] = field(default_factory=list)

    async def read(self, topics: Topics, encoder: Encoder, key: str = "t") -> None:
        loop, sent = asyncio.get_running_loop(), None
        with topics.read(key, version_of, encoder) as reader:
            async for now in reader.states():
                for _ in reader.topic.messages(sent, now):
                    self.seen.append((loop.time(), now.value))
                sent = now


def test_a_thousand_readers_cost_one_encoding_and_one_wave() -> None:
    async def script() -> None:
        loop, topics, encoder = asyncio.get_running_loop(), Topics(world(1)), Encoder()
        subscribers = [Subscriber() for _ in range(1000)]
        tasks = [loop.create_task(s.read(topics, encoder)) for s in subscribers]
        await asyncio.sleep(0.01)
        changed = loop.time()
        await topics.publish(world(2))
        await asyncio.sleep(1.0)
        arrivals = [s.seen[-1] for s in subscribers]
        assert {version for _, version in arrivals} == {2}
        assert max(time for time, _ in arrivals) - changed <= 1000 / SLICE * SLICE_PAUSE + 0.001
        assert encoder.made == {(None, 1): 1, (1, 2): 1}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert topics.counts() == (0, 0)

    play(script())


def test_under_constant_change_readers_skip_but_stay_fresh() -> None:
    async def script() -> None:
        loop, topics, encoder = asyncio.get_running_loop(), Topics(world(0)), Encoder()
        subscribers = [Subscriber() for _ in range(1000)]
        tasks = [loop.create_task(s.read(topics, encoder)) for s in subscribers]
        await asyncio.sleep(0.01)
        made_at = {}
        for version in range(1, 201):
            made_at[version] = loop.time()
            await topics.publish(world(version))
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)
        for subscriber in subscribers:
            assert subscriber.seen[-1][1] == 200, "the last change arrives"
            assert len(subscriber.seen) <= 2 + 2.2 / WAVE_INTERVAL
            for (earlier, _), (later, _) in zip(subscriber.seen[1:], subscriber.seen[2:], strict=False):
                assert later - earlier >= WAVE_INTERVAL - 1000 / SLICE * SLICE_PAUSE - 0.001
        last = max(s.seen[-1][0] for s in subscribers)
        assert last - made_at[200] <= WAVE_INTERVAL + 1000 / SLICE * SLICE_PAUSE + 0.001
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    play(script())


def test_equal_values_keep_their_version_and_wake_nobody() -> None:
    async def script() -> None:
        loop, topics, encoder = asyncio.get_running_loop(), Topics(world(7)), Encoder()
        subscriber = Subscriber()
        task = loop.create_task(subscriber.read(topics, encoder))
        await asyncio.sleep(0)
        await topics.publish(world(7))
        await asyncio.sleep(1.0)
        assert [version for _, version in subscriber.seen] == [7]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    play(script())


def test_bytes_of_old_pairs_are_forgotten() -> None:
    encoder = Encoder()
    topic = Topic(world(1), version_of, encoder)
    states = [topic.state]
    for version in range(2, KEPT_PAIRS + 4):
        topic.update(world(version))
        states.append(topic.state)
        topic.messages(states[-2], states[-1])
        topic.messages(states[-2], states[-1])
    assert set(encoder.made.values()) == {1}
    topic.messages(states[0], states[1])
    assert encoder.made[(1, 2)] == 2


def test_a_busy_platform_is_followed_at_its_newest_and_not_chased() -> None:
    async def script() -> None:
        loop, topics, encoder = asyncio.get_running_loop(), Topics(World.empty(MESH)), Encoder()
        taken = []

        async def snapshots() -> AsyncIterator[Snapshot]:
            for version in range(1, 4):
                taken.append(loop.time())
                yield snapshot(version)
            await asyncio.sleep(1e6)

        subscriber = Subscriber()
        follower = loop.create_task(topics.follow(snapshots()))
        reader = loop.create_task(subscriber.read(topics, encoder))
        await asyncio.sleep(2.0)
        assert topics.known.is_set()
        gaps = [later - earlier for earlier, later in itertools.pairwise(taken)]
        assert all(gap >= RECOMPUTE_INTERVAL - 1e-6 for gap in gaps)
        assert subscriber.seen[-1][1] == 3
        follower.cancel()
        reader.cancel()
        await asyncio.gather(follower, reader, return_exceptions=True)

    play(script())
