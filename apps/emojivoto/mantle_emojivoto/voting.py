"""voting-svc: counts votes, in memory. gRPC on GRPC_PORT, metrics on PROM_PORT.

Voting for the doughnut always fails, on purpose: it is the failure that the demo lets people find. FAILURE_RATE (0 to
1) makes the other votes fail too.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping

import grpc
import prometheus_client

from mantle_emojivoto.emojis import DOUGHNUT, EMOJIS, vote_method
from mantle_emojivoto.gen.emojivoto.v1.voting_pb2 import (
    ResultsRequest,
    ResultsResponse,
    VoteRequest,
    VoteResponse,
    VotingResult,
)
from mantle_emojivoto.rpc import Method, RpcFailed, serve

VOTES = prometheus_client.Counter("emojivoto_votes", "Votes cast", ["emoji"])


class Ballot:
    """The votes so far. `chance()` is a number from 0 to 1, drawn for each vote."""

    def __init__(self, failure_rate: float, chance: Callable[[], float]) -> None:
        self.votes: Counter[str] = Counter()
        self._failure_rate = failure_rate
        self._chance = chance

    def vote(self, shortcode: str) -> VoteResponse:
        if shortcode == DOUGHNUT or self._chance() < self._failure_rate:
            raise RpcFailed(grpc.StatusCode.UNKNOWN, "ERROR")
        self.votes[shortcode] += 1
        VOTES.labels(shortcode).inc()
        return VoteResponse()

    def results(self, _: ResultsRequest) -> ResultsResponse:
        return ResultsResponse(
            results=[VotingResult(Shortcode=code, Votes=votes) for code, votes in self.votes.most_common()]
        )

    def methods(self) -> dict[str, Method]:
        """Every rpc of VotingService."""

        def voter(shortcode: str) -> Callable[[VoteRequest], VoteResponse]:
            return lambda _: self.vote(shortcode)

        votes: dict[str, Method] = {vote_method(code): (voter(code), VoteRequest) for code in EMOJIS}
        return votes | {"Results": (self.results, ResultsRequest)}


def main(environment: Mapping[str, str]) -> None:
    ballot = Ballot(float(environment.get("FAILURE_RATE", "0")), random.random)
    asyncio.run(serve("emojivoto.v1.VotingService", ballot.methods(), environment))
