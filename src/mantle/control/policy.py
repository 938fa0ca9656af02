"""`io.linkerd.proxy.outbound.OutboundPolicies` and `io.linkerd.proxy.inbound.InboundServerPolicies`.

Outbound: a service's address or name has a policy; anything else is NotFound at once, which every proxy reads as "pass
it through, or use the profile's endpoint". Inbound: every port of a known pod has an answer at once. Each message
replaces the one before; a policy that did not change is not sent again.
"""

from __future__ import annotations

from typing import Any

import grpc

from mantle.control.answers import Answers, Context, Status
from mantle.control.wire import read_address, server_policy_bytes, service_policy_bytes
from mantle.core.endpoints import AddressTarget, BadTarget, ServiceTarget, depends_on, parse_path
from mantle.core.model import Key
from mantle.core.names import BadName
from mantle.core.policy import NotOurs, ServerPolicy, ServicePolicy, inbound, outbound
from mantle.core.world import World
from mantle.gen.io.linkerd.proxy import inbound_pb2, outbound_pb2

# ---- outbound ----


def outbound_handler(answers: Answers) -> grpc.GenericRpcHandler[Any, Any]:
    """The service, to be given to `grpc.aio.Server.add_generic_rpc_handlers`."""

    async def get(request: outbound_pb2.TrafficSpec, context: Context) -> bytes:
        target = await _traffic(answers, context, "OutboundGet", request)
        return await answers.once(
            context, "OutboundGet", lambda world: outbound(world, target), _service_messages, _not_ours
        )

    async def watch(request: outbound_pb2.TrafficSpec, context: Context) -> None:
        target = await _traffic(answers, context, "OutboundWatch", request)
        await answers.stream(
            context,
            "OutboundWatch",
            target,
            lambda world: outbound(world, target),
            _service_messages,
            _not_ours,
            depends_on(target),
        )

    return grpc.method_handlers_generic_handler(
        "io.linkerd.proxy.outbound.OutboundPolicies",
        {
            "Get": grpc.unary_unary_rpc_method_handler(get, outbound_pb2.TrafficSpec.FromString, None),
            "Watch": grpc.unary_stream_rpc_method_handler(watch, outbound_pb2.TrafficSpec.FromString, None),
        },
    )


async def _traffic(
    answers: Answers, context: Context, method: str, request: outbound_pb2.TrafficSpec
) -> ServiceTarget | AddressTarget:
    """What a request asks about. Aborts for callers that may not ask, for half an address, and for strangers' names."""
    await answers.admit(context, method, request.source_workload)
    if request.WhichOneof("target") == "addr":
        address = read_address(request.addr)
        if address is None:
            problem = Status(grpc.StatusCode.INVALID_ARGUMENT, "found an address without IP or port, wanted both")
            await answers.abort(context, method, problem)
        return AddressTarget(*address)
    target = parse_path(request.authority, answers.topics.world.mesh.cluster_domain)
    if isinstance(target, BadTarget):
        await answers.abort(context, method, Status(grpc.StatusCode.NOT_FOUND, str(target)))
    return target


Outbound = ServicePolicy | NotOurs | BadName


def _service_messages(_: Outbound | None, now: Outbound) -> tuple[bytes, ...]:
    return () if isinstance(now, NotOurs | BadName) else (service_policy_bytes(now),)


def _not_ours(value: Outbound) -> Status | None:
    if isinstance(value, BadName):
        return Status(grpc.StatusCode.UNAVAILABLE, str(value))
    return Status(grpc.StatusCode.NOT_FOUND, "not a service of this mesh") if isinstance(value, NotOurs) else None


# ---- inbound ----


def inbound_handler(answers: Answers) -> grpc.GenericRpcHandler[Any, Any]:
    """The service, to be given to `grpc.aio.Server.add_generic_rpc_handlers`."""

    async def get_port(request: inbound_pb2.PortSpec, context: Context) -> bytes:
        pod, port = await _port(answers, context, "GetPort", request)
        return await answers.once(context, "GetPort", lambda world: _inbound(world, pod, port), _server_messages, _gone)

    async def watch_port(request: inbound_pb2.PortSpec, context: Context) -> None:
        pod, port = await _port(answers, context, "WatchPort", request)
        await answers.stream(
            context,
            "WatchPort",
            (pod, port),
            lambda world: _inbound(world, pod, port),
            _server_messages,
            _gone,
            (("pod", pod),),
        )

    return grpc.method_handlers_generic_handler(
        "io.linkerd.proxy.inbound.InboundServerPolicies",
        {
            "GetPort": grpc.unary_unary_rpc_method_handler(get_port, inbound_pb2.PortSpec.FromString, None),
            "WatchPort": grpc.unary_stream_rpc_method_handler(watch_port, inbound_pb2.PortSpec.FromString, None),
        },
    )


async def _port(answers: Answers, context: Context, method: str, request: inbound_pb2.PortSpec) -> tuple[Key, int]:
    """The pod and port a request asks about. Aborts for callers that may not ask, and for half a question."""
    pod = await answers.admit(context, method, request.workload)
    if pod is None or not 0 < request.port < 65536:
        problem = f"found workload {request.workload[:200]!r} and port {request.port}, wanted a pod and a port of it"
        await answers.abort(context, method, Status(grpc.StatusCode.INVALID_ARGUMENT, problem))
    return pod, request.port


def _inbound(world: World, pod: Key, port: int) -> ServerPolicy | Key:
    """The port's policy; the pod's key if there is no such pod."""
    facts = world.pods.get(pod)
    return pod if facts is None else inbound(world, facts, port)


def _server_messages(_: ServerPolicy | Key | None, now: ServerPolicy | Key) -> tuple[bytes, ...]:
    return () if isinstance(now, Key) else (server_policy_bytes(now),)


def _gone(value: ServerPolicy | Key) -> Status | None:
    return Status(grpc.StatusCode.NOT_FOUND, f"there is no pod {value}") if isinstance(value, Key) else None
