"""web: the page people vote on, and the JSON API behind it. HTTP on WEB_PORT; asks EMOJISVC_HOST and VOTINGSVC_HOST.

The page is self-contained (`static/`): it loads nothing from elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from importlib import resources
from typing import Any

import grpc
import grpc.aio
from aiohttp import web

from mantle_emojivoto.emojis import vote_method
from mantle_emojivoto.gen.emojivoto.v1 import emoji_pb2 as emoji
from mantle_emojivoto.gen.emojivoto.v1 import voting_pb2 as voting

RPC_TIMEOUT_SECONDS = 10.0


class Backend:
    """One gRPC service that web asks."""

    def __init__(self, host: str, service: str) -> None:
        self._channel = grpc.aio.insecure_channel(host)
        self._service = service

    async def call(self, method: str, request: Any, response_class: type[Any]) -> Any:
        """Raises grpc.aio.AioRpcError."""
        rpc = self._channel.unary_unary(
            f"/{self._service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response_class.FromString,
        )
        return await rpc(request, timeout=RPC_TIMEOUT_SECONDS)

    async def close(self) -> None:
        await self._channel.close(None)


class Web:
    def __init__(self, emoji_svc: Backend, voting_svc: Backend, message_of_the_day: str) -> None:
        self._emoji, self._voting = emoji_svc, voting_svc
        page = _static("index.html").decode()
        self._page = page.replace("<!-- message -->", html.escape(message_of_the_day))

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/", self.page),
            web.get("/leaderboard", self.page),
            web.get("/js", static("app.js", "text/javascript")),
            web.get("/dist/style.css", static("style.css", "text/css")),
            web.get("/img/favicon.ico", static("favicon.svg", "image/svg+xml")),
            web.get("/api/list", self.list_emojis),
            web.get("/api/vote", self.vote),
            web.get("/api/leaderboard", self.leaderboard),
        ]

    async def page(self, _: web.Request) -> web.Response:
        return web.Response(text=self._page, content_type="text/html")

    async def list_emojis(self, _: web.Request) -> web.Response:
        answer = await self._emoji.call("ListAll", emoji.ListAllEmojiRequest(), emoji.ListAllEmojiResponse)
        return web.json_response([{"shortcode": e.shortcode, "unicode": e.unicode} for e in answer.list])

    async def vote(self, request: web.Request) -> web.Response:
        choice = request.query.get("choice", "")
        if not choice:
            return _error(400, f"Emoji choice [{choice}] is mandatory")
        if not (await self._find(choice)).HasField("emoji"):
            return _error(400, f"Choosen emoji shortcode [{choice}] doesnt exist")
        await self._voting.call(vote_method(choice), voting.VoteRequest(), voting.VoteResponse)
        return web.Response()

    async def leaderboard(self, _: web.Request) -> web.Response:
        answer = await self._voting.call("Results", voting.ResultsRequest(), voting.ResultsResponse)
        rows = []
        for result in answer.results:
            unicode = (await self._find(result.Shortcode)).emoji.unicode
            rows.append({"shortcode": result.Shortcode, "unicode": unicode, "votes": str(result.Votes)})
        return web.json_response(rows)

    async def _find(self, shortcode: str) -> emoji.FindByShortcodeResponse:
        request = emoji.FindByShortcodeRequest(Shortcode=shortcode)
        found = await self._emoji.call("FindByShortcode", request, emoji.FindByShortcodeResponse)
        assert isinstance(found, emoji.FindByShortcodeResponse)
        return found


@web.middleware
async def failures(request: web.Request, handler: Any) -> web.StreamResponse:
    """A backend that fails is a 500 with its message, as JSON."""
    try:
        response: web.StreamResponse = await handler(request)
    except grpc.aio.AioRpcError as error:
        message = f"rpc error: code = {_code_name(error.code())} desc = {error.details()}"
        print(f"{request.method} {request.path_qs}: {message}", flush=True)
        return _error(500, message)
    return response


def _code_name(code: grpc.StatusCode) -> str:
    """`DEADLINE_EXCEEDED` as gRPC's documents write it: `DeadlineExceeded`."""
    return "".join(part.capitalize() for part in code.name.split("_"))


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)


def _static(name: str) -> bytes:
    return resources.files("mantle_emojivoto").joinpath("static", name).read_bytes()


def static(name: str, content_type: str) -> Any:
    body = _static(name)

    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    return handle


async def application(environment: Mapping[str, str]) -> web.Application:
    """The HTTP application; its channels are closed with it."""
    emoji_svc = Backend(environment["EMOJISVC_HOST"], "emojivoto.v1.EmojiService")
    voting_svc = Backend(environment["VOTINGSVC_HOST"], "emojivoto.v1.VotingService")
    app = web.Application(middlewares=[failures])
    app.add_routes(Web(emoji_svc, voting_svc, environment.get("MESSAGE_OF_THE_DAY", "")).routes())

    async def close(_: web.Application) -> None:
        await emoji_svc.close()
        await voting_svc.close()

    app.on_cleanup.append(close)
    return app


def main(environment: Mapping[str, str]) -> None:
    port = int(environment["WEB_PORT"])
    web.run_app(
        application(environment),
        host="0.0.0.0",
        port=port,
        shutdown_timeout=5,
        print=lambda _: print(f"web: HTTP on {port}", flush=True),
        access_log=None,
    )
