"""Token buckets per peer: how often one may ask, decided on the caller's clock.

The table is bounded: at the limit, the buckets that are full again are forgotten first (forgetting a full bucket
changes nothing), then the one unused longest. Knows nothing of what is being limited.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limited:
    """The peer must wait so many seconds."""

    retry_after: float


@dataclass(frozen=True, slots=True)
class Admitted:
    """The peer may go on."""


class RateLimiter:
    """`rate` requests per second and peer on average, `burst` at once; at most `peers` are remembered."""

    def __init__(self, rate: float, burst: int, peers: int = 10_000) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._peers = peers
        # peer -> (tokens, when counted); a dict keeps the order of last use because each use re-inserts.
        self._buckets: dict[str, tuple[float, float]] = {}

    def admit(self, peer: str, now: float) -> Admitted | Limited:
        """Takes one token of `peer`'s bucket. `now` is in seconds of any monotonic clock."""
        tokens, counted = self._buckets.pop(peer, (self._burst, now))
        tokens = min(self._burst, tokens + (now - counted) * self._rate)
        if len(self._buckets) >= self._peers:
            self._forget(now)
        if tokens < 1.0:
            self._buckets[peer] = (tokens, now)
            return Limited((1.0 - tokens) / self._rate)
        self._buckets[peer] = (tokens - 1.0, now)
        return Admitted()

    def __len__(self) -> int:
        return len(self._buckets)

    def _forget(self, now: float) -> None:
        full = [
            peer
            for peer, (tokens, counted) in self._buckets.items()
            if tokens + (now - counted) * self._rate >= self._burst
        ]
        for peer in full or [next(iter(self._buckets))]:
            del self._buckets[peer]
