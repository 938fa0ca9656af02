"""Token buckets per peer, on a clock of the test."""

from mantle.core.ratelimit import Admitted, Limited, RateLimiter


def test_a_burst_passes_then_one_a_period() -> None:
    limiter = RateLimiter(rate=2.0, burst=3)
    assert [type(limiter.admit("a", 10.0)) for _ in range(4)] == [Admitted, Admitted, Admitted, Limited]
    refused = limiter.admit("a", 10.0)
    assert isinstance(refused, Limited) and refused.retry_after == 0.5
    assert isinstance(limiter.admit("a", 10.4), Limited)
    assert isinstance(limiter.admit("a", 10.5), Admitted)
    assert isinstance(limiter.admit("a", 10.5), Limited)


def test_peers_do_not_share() -> None:
    limiter = RateLimiter(rate=1.0, burst=1)
    assert isinstance(limiter.admit("a", 0.0), Admitted)
    assert isinstance(limiter.admit("a", 0.0), Limited)
    assert isinstance(limiter.admit("b", 0.0), Admitted)


def test_a_rested_peer_has_its_burst_again_and_no_more() -> None:
    limiter = RateLimiter(rate=1.0, burst=2)
    for _ in range(2):
        limiter.admit("a", 0.0)
    assert [type(limiter.admit("a", 1000.0)) for _ in range(3)] == [Admitted, Admitted, Limited]


def test_the_table_stays_bounded_and_forgets_the_rested_first() -> None:
    limiter = RateLimiter(rate=1.0, burst=2, peers=3)
    limiter.admit("rested", 0.0)
    for peer in ("x", "y"):
        for _ in range(2):
            limiter.admit(peer, 10.0)
    limiter.admit("new", 10.0)
    assert len(limiter) == 3
    assert isinstance(limiter.admit("x", 10.0), Limited), "a peer that owes was not forgotten for one that rested"


def test_at_the_limit_with_nobody_rested_the_longest_unused_goes() -> None:
    limiter = RateLimiter(rate=0.001, burst=1, peers=2)
    for peer in ("old", "young", "newest"):
        assert isinstance(limiter.admit(peer, 0.0), Admitted)
    assert len(limiter) == 2
    assert isinstance(limiter.admit("young", 0.0), Limited)
