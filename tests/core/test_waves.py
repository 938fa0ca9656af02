"""Waves on virtual time: who is woken when."""

import itertools
from collections.abc import Iterator

from mantle.core.waves import SLICE, SLICE_PAUSE, WAVE_INTERVAL, Waves


def run(
    waves: Waves[str, str], start: float, changes: list[tuple[float, str]], until: float
) -> list[tuple[float, str]]:
    """Plays changes at their times and collects (time, reader) of every wake-up, exactly as an event loop would ask."""
    woken: list[tuple[float, str]] = []
    pending: Iterator[tuple[float, str]] = iter([*changes, (until, "")])
    now, change = start, next(pending)
    while now <= until:
        while change[0] <= now and change[1]:
            waves.changed(change[1], change[0])
            change = next(pending)
        woken += [(now, reader) for reader in waves.take(now)]
        following = waves.next_at()
        if following is not None:
            assert following > now or waves.take(now) == [], "the scheduler would spin"
        now = min([t for t in (following, change[0]) if t is not None and t > now], default=until + 1)
    return woken


def joined(topic: str, count: int) -> Waves[str, str]:
    waves: Waves[str, str] = Waves()
    for number in range(count):
        waves.join(topic, f"{topic}{number}")
    return waves


def test_the_first_change_wakes_at_once() -> None:
    assert run(joined("t", 3), 0.0, [(5.0, "t")], 6.0) == [(5.0, "t0"), (5.0, "t1"), (5.0, "t2")]


def test_later_changes_come_in_waves() -> None:
    changes = [(1.0 + n * 0.01, "t") for n in range(100)]
    times = sorted({time for time, _ in run(joined("t", 1), 0.0, changes, 3.0)})
    assert times[0] == 1.0
    assert all(b - a >= WAVE_INTERVAL - 1e-9 for a, b in itertools.pairwise(times))
    assert times[-1] >= 1.99, "the last change is never lost"
    assert len(times) <= 7


def test_a_wave_is_cut_into_slices() -> None:
    woken = run(joined("t", 1000), 0.0, [(1.0, "t")], 3.0)
    assert len({reader for _, reader in woken}) == len(woken) == 1000
    times = sorted({time for time, _ in woken})
    assert len(times) == 1000 // SLICE
    assert times[-1] - 1.0 <= 1000 / SLICE * SLICE_PAUSE + 1e-9


def test_the_slice_budget_is_shared_by_all_topics() -> None:
    waves: Waves[str, str] = Waves()
    for topic in ("a", "b", "c", "d"):
        for number in range(SLICE):
            waves.join(topic, f"{topic}{number}")
    woken = run(waves, 0.0, [(1.0, topic) for topic in ("a", "b", "c", "d")], 3.0)
    for time in {time for time, _ in woken}:
        assert sum(1 for t, _ in woken if t == time) <= SLICE
    assert len(woken) == 4 * SLICE


def test_one_reader_waits_once_however_often_its_topic_changes() -> None:
    waves = joined("t", 60)
    waves.changed("t", 1.0)
    first = waves.take(1.0)
    waves.changed("t", 1.2)
    second = waves.take(1.2)
    third = waves.take(1.3)
    assert len(first) == len(second) == SLICE
    # 35 were still queued from the first wave; of the second wave only the 25 already woken are added behind them.
    assert first != second and not set(second) & set(third)
    rest = [*waves.take(1.4), *waves.take(1.5)]
    assert len({*second, *third, *rest}) == 60


def test_who_left_is_not_woken_and_an_empty_topic_costs_nothing() -> None:
    waves = joined("t", 2)
    waves.changed("t", 1.0)
    waves.leave("t", "t0")
    assert waves.take(1.0) == ["t1"]
    waves.changed("t", 2.0)
    waves.leave("t", "t1")
    assert waves.next_at() is None
    assert waves.take(10.0) == []
    waves.changed("t", 11.0)
    assert waves.next_at() is None
