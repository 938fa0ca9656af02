"""The window counts growth: through resets, restarts, pods that come and go, and never without bound."""

from __future__ import annotations

import math

import pytest

from mantle.core.model import Owner
from mantle.viz.promtext import Series
from mantle.viz.source import Subject
from mantle.viz.window import Window

REQUESTS = Series("request_total", ())
OPEN = Series("tcp_open_connections", ())


def subject(name: str) -> Subject:
    return Subject("emojivoto", name, "10.203.0.9", Owner("Deployment", "web"), "web")


def grown(window: Window, now: float, seconds: float) -> float:
    return sum(point.value for point in window.read(now, seconds).grown("request_total"))


def play(*values: float, new: bool = True, every: float = 5.0) -> tuple[Window, float]:
    """A window after a pod was seen with these counter values, and the time of the last."""
    window = Window(0.0)
    for number, value in enumerate(values):
        window.observe(number * every, "web", subject("web-1"), {REQUESTS: value}, new=new)
    return window, (len(values) - 1) * every


def test_growth_is_what_a_counter_gained() -> None:
    window, now = play(10, 13, 20, new=False)
    assert grown(window, now, 900) == 10


def test_a_pod_that_came_later_started_from_zero() -> None:
    window, now = play(10, 13, new=True)
    assert grown(window, now, 900) == 13


def test_a_counter_that_went_back_was_reset() -> None:
    window, now = play(100, 104, 3, 5, new=False)
    assert grown(window, now, 900) == 4 + 5


def test_a_series_that_disappears_and_comes_back_starts_from_zero() -> None:
    window = Window(0.0)
    for now, samples in ((0.0, {REQUESTS: 7.0}), (5.0, {}), (10.0, {REQUESTS: 2.0})):
        window.observe(now, "web", subject("web-1"), samples, new=False)
    assert grown(window, 10.0, 900) == 2


def test_only_what_is_inside_the_window_counts() -> None:
    window, now = play(0, 1, 2, 4, 8, 16, every=30.0)
    assert now == 150.0
    assert grown(window, now, 45) == 16 - 4
    assert grown(window, now, 900) == 16


def test_the_time_observed_is_less_after_a_start() -> None:
    window, now = play(0, 5)
    assert window.read(now, 60).seconds == 5
    window, now = play(*range(100))
    assert window.read(now, 60).seconds == 60


def test_what_is_older_than_the_window_is_forgotten() -> None:
    window = Window(0.0, length=60.0)
    window.observe(0.0, "web", subject("web-1"), {REQUESTS: 5.0}, new=True)
    window.observe(66.0, "web", subject("web-1"), {REQUESTS: 6.0}, new=True)
    assert grown(window, 66.0, 900) == 1
    assert window.entries == 1


def test_a_pod_that_is_gone_loses_its_gauges_and_keeps_its_past() -> None:
    window = Window(0.0)
    window.observe(1.0, "web", subject("web-1"), {REQUESTS: 5.0, OPEN: 2.0}, new=True)
    assert [point.value for point in window.read(1.0, 60).now("tcp_open_connections")] == [2.0]
    window.keep_only(set())
    assert list(window.read(1.0, 60).now("tcp_open_connections")) == []
    assert grown(window, 1.0, 60) == 5


def test_too_many_series_shorten_the_window_instead_of_filling_memory() -> None:
    window = Window(0.0, max_entries=100)
    for second in range(0, 100, 5):
        samples = {Series("request_total", (("n", str(n)),)): float(second + 1) for n in range(30)}
        window.observe(float(second), "web", subject("web-1"), samples, new=True)
    assert window.entries <= 100
    kept = window.read(95.0, 900)
    assert kept.seconds == 10
    assert sum(point.value for point in kept.grown("request_total")) == 3 * 30 * 5


def test_not_a_number_is_no_growth() -> None:
    window, now = play(1, float("nan"), 3, new=False)
    assert grown(window, now, 60) == 3


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e308, -5.0])
def test_a_number_that_nothing_can_count_spoils_no_sum(odd: float) -> None:
    """What a pod's metrics say is the pod's own word."""
    window, now = play(10, odd, 13, odd, new=True)
    window.observe(now, "liar", subject("liar"), {OPEN: odd, REQUESTS: odd}, new=True)
    window.observe(now, "web/open", subject("web-1"), {OPEN: 3.0}, new=True)
    traffic = window.read(now, 900)
    assert all(0 <= point.value < 1e18 for point in (*traffic.increases, *traffic.gauges))
    assert sum(point.value for point in traffic.gauges) == 3
    assert grown(window, now, 900) >= 13
