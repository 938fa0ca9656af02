"""`io.linkerd.proxy.destination.Destination`: endpoints of a name, the profile of a destination.

`Get` sends the full set first, then what changed; a service without endpoints, or none of that name, is a message too.
`GetProfile` never says NotFound (proxies retry that for ever and hold the connection): a stranger has an empty profile,
a path that can never be ours is InvalidArgument.
"""

from __future__ import annotations

from typing import Any

import grpc

from mantle.control.answers import Answers, Context, Status
from mantle.control.wire import endpoints_bytes, profile_bytes
from mantle.core.endpoints import (
    AddressTarget,
    BadTarget,
    Profile,
    depends_on,
    parse_path,
    profile,
    service_endpoints,
    view_of,
)
from mantle.core.names import BadName
from mantle.core.reasons import NotADestination
from mantle.gen.io.linkerd.proxy import destination_pb2 as pb


def handler(answers: Answers) -> grpc.GenericRpcHandler[Any, Any]:
    """The service, to be given to `grpc.aio.Server.add_generic_rpc_handlers`."""

    async def get(request: pb.GetDestination, context: Context) -> None:
        caller = await answers.admit(context, "Get", request.context_token)
        target = parse_path(request.path, answers.topics.world.mesh.cluster_domain)
        if isinstance(target, AddressTarget):
            problem = f"{NotADestination.AN_ADDRESS}: found {request.path!r}, wanted a service's name"
            await answers.abort(context, "Get", Status(grpc.StatusCode.INVALID_ARGUMENT, problem))
        if isinstance(target, BadTarget):
            await answers.abort(context, "Get", Status(grpc.StatusCode.INVALID_ARGUMENT, str(target)))
        view = view_of(answers.topics.world, caller)
        await answers.stream(
            context,
            "Get",
            (target, view),
            lambda world: service_endpoints(world.seen_as(view), target),
            endpoints_bytes,
            lambda _: None,
            depends_on(target),
        )

    async def get_profile(request: pb.GetDestination, context: Context) -> None:
        caller = await answers.admit(context, "GetProfile", request.context_token)
        target = parse_path(request.path, answers.topics.world.mesh.cluster_domain)
        if isinstance(target, BadTarget):
            await answers.abort(context, "GetProfile", Status(grpc.StatusCode.INVALID_ARGUMENT, str(target)))
        view = view_of(answers.topics.world, caller)
        await answers.stream(
            context,
            "GetProfile",
            (target, view),
            lambda world: profile(world.seen_as(view), target),
            _profile_messages,
            _unnamed,
            depends_on(target),
        )

    return grpc.method_handlers_generic_handler(
        "io.linkerd.proxy.destination.Destination",
        {
            "Get": grpc.unary_stream_rpc_method_handler(get, pb.GetDestination.FromString, None),
            "GetProfile": grpc.unary_stream_rpc_method_handler(get_profile, pb.GetDestination.FromString, None),
        },
    )


def _profile_messages(_: Profile | BadName | None, now: Profile | BadName) -> tuple[bytes, ...]:
    """A profile replaces the one before."""
    return () if isinstance(now, BadName) else (profile_bytes(now),)


def _unnamed(value: Profile | BadName) -> Status | None:
    """A pod whose identity cannot be written is an error that is retried: an empty profile would mean plaintext."""
    return Status(grpc.StatusCode.UNAVAILABLE, str(value)) if isinstance(value, BadName) else None
