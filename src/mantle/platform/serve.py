"""The platform's end of the socket: `mantle.v1.Platform` over anything that implements the port.

The daemon registers `handler(platform)` with its grpc.aio server on `control/platform.sock`. A watcher that reads
slowly is sent the difference to the newest snapshot when it is ready for it, never a backlog.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc.aio

from mantle.core.model import Snapshot
from mantle.gen.mantle.v1 import platform_pb2 as pb
from mantle.platform.port import Platform
from mantle.platform.wire import between, full, review_to_proto


class ServedPlatform(Platform, Protocol):
    """What the socket serves: the port, and the keys that tokens are signed with."""

    def jwks(self) -> str:
        """The token issuer's JSON Web Key Set (RFC 7517), public keys only."""
        ...


def handler(platform: ServedPlatform) -> grpc.GenericRpcHandler[Any, Any]:
    """The service, to be given to `grpc.aio.Server.add_generic_rpc_handlers`."""

    async def watch(_: pb.WatchRequest, __: Any) -> AsyncIterator[bytes]:
        before: Snapshot | None = None
        async for now in platform.watch():
            change = full(now) if before is None else between(before, now)
            before = now
            yield change.SerializeToString()

    async def review_tokens(requests: AsyncIterator[pb.ReviewTokensRequest], _: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            outcomes = [await platform.review_token(one.token, list(one.audiences)) for one in request.questions]
            yield pb.ReviewTokensResponse(answers=map(review_to_proto, outcomes)).SerializeToString()

    async def jwks(_: pb.JwksRequest, __: Any) -> bytes:
        return pb.JwksResponse(json=platform.jwks()).SerializeToString()

    return grpc.method_handlers_generic_handler(
        "mantle.v1.Platform",
        {
            "Watch": grpc.unary_stream_rpc_method_handler(watch, pb.WatchRequest.FromString, None),
            "ReviewTokens": grpc.stream_stream_rpc_method_handler(
                review_tokens, pb.ReviewTokensRequest.FromString, None
            ),
            "Jwks": grpc.unary_unary_rpc_method_handler(jwks, pb.JwksRequest.FromString, None),
        },
    )
