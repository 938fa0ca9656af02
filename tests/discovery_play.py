"""A small world for tests of discovery and identity: builders, a platform that says what the test says, servers on
loopback.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from prometheus_client import CollectorRegistry

from mantle.control import answers, destination, policy
from mantle.control.app import grpc_server
from mantle.control.topics import Topics
from mantle.core.model import ContainerPort, Key, Namespace, Owner, Pod, Service, ServicePort, Snapshot
from mantle.core.names import MeshNames
from mantle.core.world import Mesh, World
from mantle.gen.io.linkerd.proxy import destination_pb2, inbound_pb2, outbound_pb2
from mantle.platform.port import TokenClaims, TokenRejected

MESH = Mesh(MeshNames("mantle", "cluster.local"))
PATIENCE = 60.0
"""Seconds to wait for what comes in milliseconds on a quiet machine."""
IDENTITY = "{}.{}.serviceaccount.identity.mantle.cluster.local"


def pod(name: str, ip: str, *, meshed: bool = True, **changes: Any) -> Pod:
    """A ready pod of namespace `emojivoto` with the labels app=NAME's first word; meshed unless said otherwise."""
    app = name.split("-")[0]
    labels = {"app": app} | ({"mantle.dev/control-plane-ns": "mantle"} if meshed else {})
    values: dict[str, Any] = {
        "key": Key(changes.pop("namespace", "emojivoto"), name),
        "uid": f"uid-{name}",
        "ip": ip,
        "service_account": app,
        "owner": Owner("Deployment", app),
        "labels": labels | changes.pop("labels", {}),
        "ports": (ContainerPort("http", 8080),),
        "ready": True,
        "proxy_started": meshed,
    }
    return Pod(**(values | changes))


def service(name: str, ip: str, *ports: ServicePort, **changes: Any) -> Service:
    """A service of namespace `emojivoto` for the pods with app=NAME's first word: port 80 to `http` unless said
    otherwise.
    """
    values: dict[str, Any] = {
        "key": Key(changes.pop("namespace", "emojivoto"), name),
        "cluster_ip": ip,
        "ports": ports or (ServicePort("http", 80, "http"),),
        "selector": {"app": name.split("-")[0]},
    }
    return Service(**(values | changes))


def snapshot(version: int, *objects: Pod | Service | Namespace) -> Snapshot:
    namespaces = {o.name: o for o in objects if isinstance(o, Namespace)}
    return Snapshot(
        version,
        {o.key: o for o in objects if isinstance(o, Pod)},
        {o.key: o for o in objects if isinstance(o, Service)},
        {"emojivoto": Namespace("emojivoto"), "mantle": Namespace("mantle"), **namespaces},
    )


@dataclass
class FakePlatform:
    """Says what the test puts into it. Implements `platform.serve.ServedPlatform`."""

    current: Snapshot | None = None
    reviews: Mapping[bytes, TokenClaims | TokenRejected] = field(default_factory=dict)
    asked: list[tuple[bytes, tuple[str, ...]]] = field(default_factory=list)
    before_review: Callable[[], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        self._news = asyncio.Condition()

    async def say(self, snapshot: Snapshot) -> None:
        async with self._news:
            self.current = snapshot
            self._news.notify_all()

    async def watch(self) -> AsyncIterator[Snapshot]:
        sent: Snapshot | None = None
        while True:
            async with self._news:
                while self.current is None or self.current is sent:
                    await self._news.wait()
                sent = self.current
            yield sent

    async def review_token(self, token: bytes, audiences: Sequence[str]) -> TokenClaims | TokenRejected:
        self.asked.append((token, tuple(audiences)))
        if self.before_review is not None:
            await self.before_review()
        return self.reviews[token]

    def jwks(self) -> str:
        return '{"keys": []}'


METHODS: Mapping[str, tuple[str, Any, Any]] = {
    "Get": (
        "io.linkerd.proxy.destination.Destination/Get",
        destination_pb2.GetDestination,
        destination_pb2.Update,
    ),
    "GetProfile": (
        "io.linkerd.proxy.destination.Destination/GetProfile",
        destination_pb2.GetDestination,
        destination_pb2.DestinationProfile,
    ),
    "Watch": (
        "io.linkerd.proxy.outbound.OutboundPolicies/Watch",
        outbound_pb2.TrafficSpec,
        outbound_pb2.OutboundPolicy,
    ),
    "WatchPort": (
        "io.linkerd.proxy.inbound.InboundServerPolicies/WatchPort",
        inbound_pb2.PortSpec,
        inbound_pb2.Server,
    ),
    "OutboundGet": (
        "io.linkerd.proxy.outbound.OutboundPolicies/Get",
        outbound_pb2.TrafficSpec,
        outbound_pb2.OutboundPolicy,
    ),
    "GetPort": (
        "io.linkerd.proxy.inbound.InboundServerPolicies/GetPort",
        inbound_pb2.PortSpec,
        inbound_pb2.Server,
    ),
}


class Stream:
    """A client's side of one stream. `silent` says that nothing came in a while."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._pending: asyncio.Task[Any] | None = None

    async def begun(self) -> None:
        """Waits until the server has begun to answer; reads nothing."""
        await asyncio.wait_for(self._call.initial_metadata(), PATIENCE)

    async def next(self, seconds: float = PATIENCE) -> Any:
        """The next message, which must come in that time."""
        pending = self._pending or asyncio.ensure_future(self._call.read())
        self._pending = None
        message = await asyncio.wait_for(pending, seconds)
        if message is grpc.aio.EOF:
            raise AssertionError(f"the stream ended: {await self._call.code()} {await self._call.details()}")
        return message

    async def silent(self, seconds: float = 0.1) -> bool:
        self._pending = self._pending or asyncio.ensure_future(self._call.read())
        done, _ = await asyncio.wait({self._pending}, timeout=seconds)
        return not done

    async def code(self) -> grpc.StatusCode:
        return await asyncio.wait_for(self._call.code(), PATIENCE)

    async def details(self) -> str:
        return str(await asyncio.wait_for(self._call.details(), PATIENCE))

    def cancel(self) -> None:
        self._call.cancel()


@dataclass
class Discovery:
    """A destination and policy server on loopback, and how to ask it."""

    platform: FakePlatform
    topics: Topics
    registry: CollectorRegistry
    channel: grpc.aio.Channel
    target: str

    def open(self, method: str, request: Any, client: str = "web.emojivoto") -> Stream:
        """Opens a stream as the workload `client` (`service-account.namespace`; empty: no mutual TLS)."""
        path, sent, received = METHODS[method]
        call = self.channel.unary_stream(
            f"/{path}", request_serializer=sent.SerializeToString, response_deserializer=received.FromString
        )
        metadata = (("l5d-client-id", IDENTITY.format(*client.split("."))),) if client else ()
        return Stream(call(request, metadata=metadata, timeout=10 * PATIENCE))

    async def ask(self, method: str, request: Any, client: str = "web.emojivoto") -> Any:
        """The answer of a method that answers once, or the status that it refused with."""
        path, sent, received = METHODS[method]
        call = self.channel.unary_unary(
            f"/{path}", request_serializer=sent.SerializeToString, response_deserializer=received.FromString
        )
        metadata = (("l5d-client-id", IDENTITY.format(*client.split("."))),) if client else ()
        try:
            return await call(request, metadata=metadata, timeout=PATIENCE)
        except grpc.aio.AioRpcError as error:
            return error.code()

    def counted(self, method: str, result: str) -> float:
        labels = {"method": method, "result": result}
        return self.registry.get_sample_value("mantle_discovery_calls_total", labels) or 0.0


@asynccontextmanager
async def discovery(
    *objects: Pod | Service | Namespace, own_pod: Key | None = None, allow_anonymous: bool = False, mesh: Mesh = MESH
) -> AsyncIterator[Discovery]:
    """A running server whose platform has said `objects` (nothing at all if there are none)."""
    platform = FakePlatform()
    if objects:
        await platform.say(snapshot(1, *objects))
    registry, topics = CollectorRegistry(), Topics(World.empty(mesh))
    shared = answers.Answers(topics, answers.Metrics(registry, topics), own_pod, allow_anonymous)
    handlers = [destination.handler(shared), policy.outbound_handler(shared), policy.inbound_handler(shared)]
    async with grpc_server(("127.0.0.1", 0), handlers, grace=0.0) as port, asyncio.TaskGroup() as tasks:
        follower = tasks.create_task(topics.follow(platform.watch()))
        target = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(target) as channel:
            yield Discovery(platform, topics, registry, channel, target)
        follower.cancel()
