"""The platform as a control-plane pod on one machine sees it: a client of `mantle.v1.Platform` over a Unix socket.

Implements `platform.port.Platform`. The socket's other end (the machine's daemon) may go away and come back: a watch
keeps what it knows and connects again, a token review fails with `PlatformUnavailable` at once, for the caller to
refuse.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from mantle.core.model import Snapshot
from mantle.gen.mantle.v1 import platform_pb2 as pb
from mantle.platform.port import Count, Event, PlatformUnavailable, TokenClaims, TokenRejected
from mantle.platform.wire import Mirror, review_from_proto

log = logging.getLogger(__name__)

SERVICE = "/mantle.v1.Platform"
REVIEW_TIMEOUT = 2.0
"""Seconds a token review may take before the caller refuses the certificate (the proxy retries)."""
RETRY = 0.2
"""Seconds between two attempts to reach the platform. One machine, one socket: nobody is spared by waiting longer."""
MAX_MESSAGE = 64 * 1024 * 1024
"""Octets of one change: the first holds everything."""


class RemotePlatform:
    """A connection to the platform's socket. Close it with `async with` or `close`."""

    def __init__(self, socket: Path) -> None:
        self._spoke = False
        self._channel = grpc.aio.insecure_channel(
            f"unix:{socket}",
            options=[
                ("grpc.default_authority", "platform"),
                ("grpc.enable_http_proxy", 0),
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 500),
            ],
        )
        self._watch = self._channel.unary_stream(
            f"{SERVICE}/Watch",
            request_serializer=pb.WatchRequest.SerializeToString,
            response_deserializer=pb.Change.FromString,
        )
        self._reviews = _Reviews(
            self._channel.stream_stream(
                f"{SERVICE}/ReviewTokens",
                request_serializer=pb.ReviewTokensRequest.SerializeToString,
                response_deserializer=pb.ReviewTokensResponse.FromString,
            )
        )

    async def __aenter__(self) -> RemotePlatform:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends watches and reviews."""
        self._reviews.close()
        await self._channel.close(None)

    async def watch(self) -> AsyncIterator[Snapshot]:
        """Yields the newest snapshot, then each newer one. Changes that come while the consumer works are merged."""
        mirror, news = Mirror(), asyncio.Event()
        # Not a TaskGroup: it would turn the GeneratorExit of a consumer that leaves into an error.
        follower = asyncio.get_running_loop().create_task(self._follow(mirror, news))
        follower.add_done_callback(lambda _: news.set())
        try:
            while True:
                await news.wait()
                news.clear()
                if follower.done():
                    follower.result()  # it never ends but by an error, which belongs to the consumer
                yield mirror.snapshot()
        finally:
            follower.cancel()

    async def review_token(self, token: bytes, audiences: Sequence[str]) -> TokenClaims | TokenRejected:
        """Asks the platform about a token. Raises `PlatformUnavailable` if it does not answer."""
        return review_from_proto(await self._reviews.ask(pb.ReviewTokenRequest(token=token, audiences=audiences)))

    def tell(self, event: Event) -> None:
        """One machine keeps no events: they are lines of the log."""
        log.log(
            logging.WARNING if event.warning else logging.INFO,
            "%s: %s/%s/%s: %s", event.reason, event.kind, event.namespace, event.name, event.message,
        )  # fmt: skip

    def missing(self) -> str:
        """Nothing but the daemon itself."""
        return "" if self._spoke else "no word from the machine's daemon"

    def denied(self) -> str:
        """The socket is the right."""
        return ""

    def counts(self) -> Iterable[Count]:
        """The daemon counts for itself."""
        return ()

    async def _follow(self, mirror: Mirror, news: asyncio.Event) -> None:
        """Keeps the mirror true to the platform, for ever."""
        complaint = ""
        while True:
            try:
                async for change in self._watch(pb.WatchRequest()):
                    if complaint:
                        log.info("the platform answers again")
                        complaint = ""
                    mirror.apply(change)
                    self._spoke = True
                    news.set()
                problem = "it ended the watch"
            except grpc.aio.AioRpcError as error:
                problem = f"{error.code().name.lower()}: {error.details()}"
            if problem != complaint:
                log.warning("the platform is away (%s): going on with what is known, trying again", problem)
                complaint = problem
            await asyncio.sleep(RETRY)


class _Reviews:
    """The stream of token reviews: one task writes what is asked, one hands the answers to those who wait, in order.

    It is opened by the first question and, after it broke, by the next one: whoever waited then is told.
    """

    def __init__(self, open_stream: Any) -> None:
        self._open = open_stream
        self._questions: asyncio.Queue[pb.ReviewTokenRequest] = asyncio.Queue()
        self._waiting: deque[asyncio.Future[pb.ReviewTokenResponse]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def ask(self, question: pb.ReviewTokenRequest) -> pb.ReviewTokenResponse:
        """The answer. Raises `PlatformUnavailable` if the stream breaks or `REVIEW_TIMEOUT` passes first."""
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._questions = asyncio.Queue()
            self._task = loop.create_task(self._run(self._questions))
        answer: asyncio.Future[pb.ReviewTokenResponse] = loop.create_future()
        self._waiting.append(answer)
        self._questions.put_nowait(question)
        try:
            async with asyncio.timeout(REVIEW_TIMEOUT):
                return await answer
        except TimeoutError:
            self.close()
            raise PlatformUnavailable(f"no answer in {REVIEW_TIMEOUT:.0f} s") from None

    def close(self) -> None:
        """Ends the stream; whoever waits is told."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self, questions: asyncio.Queue[pb.ReviewTokenRequest]) -> None:
        call = self._open()
        writer = asyncio.get_running_loop().create_task(_write_all(call, questions))
        problem = "it ended the reviews"
        try:
            async for message in call:
                for answer in message.answers:
                    waiting = self._waiting.popleft()
                    if not waiting.done():
                        waiting.set_result(answer)
        except grpc.aio.AioRpcError as error:
            problem = f"{error.code().name.lower()}: {error.details()}"
        finally:
            self._task = None
            writer.cancel()
            call.cancel()
            waiting_now, self._waiting = self._waiting, deque()
            for waiting in waiting_now:
                if not waiting.done():
                    waiting.set_exception(PlatformUnavailable(problem))


async def _write_all(call: Any, questions: asyncio.Queue[pb.ReviewTokenRequest]) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader learns of it, too
        while True:
            batch = [await questions.get()]
            while not questions.empty():
                batch.append(questions.get_nowait())
            await call.write(pb.ReviewTokensRequest(questions=batch))
