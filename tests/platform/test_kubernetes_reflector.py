"""What follows the end of a watch, and what a new list changes: decided without a server and without a clock."""

from __future__ import annotations

import pytest

from mantle.core.reasons import WatchEnded
from mantle.platform.kubernetes.reflector import BACKOFF, Change, Copy, Ended, Step, next_step

TROUBLE = [why for why in WatchEnded if why is not WatchEnded.IN_TIME]


def test_a_watch_that_ends_in_time_goes_on_at_once_from_where_it_was() -> None:
    assert next_step(Ended(WatchEnded.IN_TIME), 0, 0.7) == Step(relist=False, wait=0.0)


@pytest.mark.parametrize("why", TROUBLE)
def test_after_trouble_everything_is_listed_again(why: WatchEnded) -> None:
    assert next_step(Ended(why), 1, 0.5).relist is (why is not WatchEnded.TOO_SHORT)


@pytest.mark.parametrize("why", TROUBLE)
def test_waits_grow_to_a_bound_and_no_two_clients_wait_alike(why: WatchEnded) -> None:
    least, most = BACKOFF
    waits = [next_step(Ended(why), failures, 1.0).wait for failures in range(1, 40)]
    assert waits == sorted(waits)
    assert waits[0] <= 2 * least
    assert waits[-1] == most
    early, late = (next_step(Ended(why), 40, chance).wait for chance in (0.0, 1.0))
    assert late - early >= most / 2, "a server that comes back meets its clients one by one"


def test_a_throttled_client_waits_as_long_as_it_was_told() -> None:
    for chance in (0.0, 0.5, 1.0):
        assert 30.0 <= next_step(Ended(WatchEnded.THROTTLED, retry_after=30.0), 1, chance).wait <= 36.0


def test_a_new_list_tells_only_what_is_another() -> None:
    copy: Copy[str, list[int]] = Copy()
    one, two = [1], [2]
    assert copy.replace({"a": one, "b": two, "c": [3]}) == (
        Change("a", None, one),
        Change("b", None, two),
        Change("c", None, [3]),
    )
    changes = copy.replace({"a": [1], "b": [22], "d": [4]})
    assert changes == (Change("b", [2], [22]), Change("d", None, [4]), Change("c", [3], None))
    assert copy.objects["a"] is one, "an equal object is kept as it is"


def test_an_object_that_was_never_known_goes_without_a_word() -> None:
    copy: Copy[str, int] = Copy()
    assert copy.put("a", None) == ()
    assert copy.put("a", 1) == (Change("a", None, 1),)
    assert copy.put("a", 1) == ()
    assert copy.put("a", None) == (Change("a", 1, None),)
