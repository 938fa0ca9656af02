"""Calls to proxies, against one of our own on an address of its own: the identity demanded, every failure named."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import grpc
import grpc.aio
import pytest
from aiohttp import web
from certificates import Certificate
from cryptography.hazmat.primitives.serialization import Encoding

from mantle.core import ca, optional_tls
from mantle.core.model import Key, Owner, Pod
from mantle.core.names import MeshNames
from mantle.core.optional_names import OptionalNames
from mantle.core.optional_names import Owner as TlsOwner
from mantle.gen.io.linkerd.proxy import tap_pb2
from mantle.gen.mantle.v1 import edges_pb2
from mantle.viz import proxies as module
from mantle.viz.observer import Observer
from mantle.viz.proxies import Proxies, Unreachable

NAMES = MeshNames("mantle", "cluster.local")
IDENTITY = "web.emojivoto.serviceaccount.identity.mantle.cluster.local"
IP = f"127.{os.getpid() >> 16 & 255}.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
"""An address of this process's own, so that parallel runs do not meet."""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine an answer may take longer than viz waits for one pod of many."""
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 60.0)


def pod(ip: str = IP, account: str = "web") -> Pod:
    return Pod(Key("emojivoto", "web-1"), f"uid-{ip}-{account}", ip, account, Owner("Deployment", "web"))


class Proxy(grpc.GenericRpcHandler):
    """Answers on 4190 and 4191; remembers the identity that each call demanded."""

    def __init__(self) -> None:
        self.demanded: list[object] = []
        self.metrics = web.Response(text="request_total 7\n")
        self.identity = web.Response(status=404)
        self.ended = asyncio.Event()

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        self.demanded.append(dict(call.invocation_metadata).get("l5d-require-id"))
        if call.method == "/mantle.v1.Edges/List":
            return grpc.unary_unary_rpc_method_handler(self.edges)
        return grpc.unary_stream_rpc_method_handler(self.observe)

    async def edges(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return edges_pb2.ListResponse(edges=[edges_pb2.Edge(client_ip="10.0.0.1", total=3)]).SerializeToString()

    async def observe(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        limit = tap_pb2.ObserveRequest.FromString(request).limit
        if limit == 0:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
        try:
            for _ in range(limit):
                yield tap_pb2.TapEvent().SerializeToString()
            if limit > 1:
                await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def serve_metrics(self, request: web.Request) -> web.Response:
        self.demanded.append(request.headers.get("l5d-require-id"))
        return self.metrics

    async def serve_identity(self, request: web.Request) -> web.Response:
        self.demanded.append(request.headers.get("l5d-require-id"))
        return self.identity


def play(scene: Callable[[Proxy, Proxies], Awaitable[None]]) -> None:
    async def run() -> None:
        proxy = Proxy()
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((proxy,))
        server.add_insecure_port(f"{IP}:{module.CONTROL_PORT}")
        app = web.Application()
        app.router.add_get("/metrics", proxy.serve_metrics)
        app.router.add_get("/identity", proxy.serve_identity)
        runner = web.AppRunner(app)
        await runner.setup()
        await server.start()
        try:
            await web.TCPSite(runner, IP, module.ADMIN_PORT).start()
            async with asyncio.timeout(60), Proxies(MeshNames("mantle", "cluster.local")) as proxies:
                await scene(proxy, proxies)
        finally:
            await runner.cleanup()
            await server.stop(None)

    asyncio.run(run())


def test_every_call_demands_the_pod_s_identity() -> None:
    async def scene(proxy: Proxy, proxies: Proxies) -> None:
        assert await proxies.metrics(pod()) == "request_total 7\n"
        (row,) = await proxies.clients(pod())
        assert (row.client_ip, row.total) == ("10.0.0.1", 3)
        events = [event async for event in proxies.observe(pod(), tap_pb2.ObserveRequest(limit=1))]
        assert len(events) == 1
        assert proxy.demanded == [IDENTITY] * 3

    play(scene)


def test_a_pod_cannot_send_viz_elsewhere() -> None:
    """A pod's owner decides what answers on its admin port: a redirect would make viz ask whom they like."""

    async def scene(proxy: Proxy, proxies: Proxies) -> None:
        for who in (pod(), replace(pod(), labels={"mantle.dev/tls": "optional"})):
            proxy.demanded.clear()
            proxy.metrics = web.Response(status=302, headers={"Location": f"http://{IP}:{module.ADMIN_PORT}/identity"})
            with pytest.raises(Unreachable, match="answered 302"):
                await proxies.metrics(who)
            assert len(proxy.demanded) == 1, "the first question only"

    play(scene)


@pytest.mark.parametrize("said", ["9" * 5000, "99999", "0", "\u0663\u0663", "\u00b2", "-1", " 1", "x"])
def test_a_port_that_is_none_is_not_believed(said: str) -> None:
    """The annotation may be written on a running pod: nobody has checked it."""

    async def scene(_: Proxy, proxies: Proxies) -> None:
        moved = {f"config.mantle.dev/{which}-port": said for which in ("admin", "control")}
        odd = replace(pod(), annotations=moved)
        assert await proxies.metrics(odd) == "request_total 7\n"
        assert len(await proxies.clients(odd)) == 1

    play(scene)


class Authority:
    """The ca of the experimental mode, and Secrets where viz and a pod would find theirs."""

    def __init__(self) -> None:
        self.names = OptionalNames(NAMES)
        now = datetime.now(UTC)
        self.authority = optional_tls.new_authority(self.names, now, (os.urandom(16), os.urandom(16)))
        trust = self.authority.trust
        issuer = ca.load_issuer(trust.issuer_pem, trust.issuer_key_pem, trust.roots_pem)
        assert isinstance(issuer, ca.Issuer)
        self.valid = ca.ValidIssuer(issuer)

    def issue(self, owner: TlsOwner) -> optional_tls.Material:
        made = optional_tls.issue(self.valid, self.authority, owner, self.names, datetime.now(UTC), os.urandom(16))
        assert isinstance(made, optional_tls.Material)
        return made

    def mount(self, folder: Path) -> Path:
        made = self.issue(self.names.observer)
        for name, content in (("tls.crt", made.chain_pem), ("tls.key", made.key_pem), ("ca.crt", made.bundle)):
            (folder / name).write_bytes(content)
        return folder


WEAK = replace(pod(), labels={"mantle.dev/tls": "optional"}, annotations={"mantle.dev/tls-owner": "deployment/web"})


def tapped(authority: Authority, folder: Path, owner: str) -> list[object]:
    """Who asked, and what viz got from a pod of that mode that proves to be `owner`."""

    async def run() -> list[object]:
        proxy, server = Proxy(), grpc.aio.server()
        made = authority.issue(TlsOwner("emojivoto", "deployment", owner))
        server.add_generic_rpc_handlers((proxy,))
        credentials = grpc.ssl_server_credentials([(made.key_pem, made.chain_pem)], made.bundle, True)
        server.add_secure_port(f"{IP}:{module.CONTROL_PORT}", credentials)
        await server.start()
        try:
            async with asyncio.timeout(60), Proxies(NAMES, Observer(NAMES, folder)) as proxies:
                (row,) = await proxies.clients(WEAK)
                events = [event async for event in proxies.observe(WEAK, tap_pb2.ObserveRequest(limit=1))]
                return [row.total, len(events), *proxy.demanded]
        finally:
            await server.stop(None)

    return asyncio.run(run())


def test_pods_of_the_experimental_mode_are_tapped_with_its_own_certificate(tmp_path: Path) -> None:
    authority = Authority()
    folder = authority.mount(tmp_path)
    assert tapped(authority, folder, "web") == [3, 1, None, None]
    with pytest.raises(ValueError, match="not enough values"):  # somebody else at that address: no rows, and no tap
        tapped(authority, folder, "mallory")


def test_without_a_certificate_of_that_mode_its_pods_show_their_metrics_only(tmp_path: Path) -> None:
    async def scene(proxy: Proxy, proxies: Proxies) -> None:
        assert await proxies.metrics(WEAK) == "request_total 7\n"
        assert await proxies.clients(WEAK) == []
        with pytest.raises(Unreachable, match="this mesh has no ca"):
            await anext(proxies.observe(WEAK, tap_pb2.ObserveRequest(limit=1)))
        assert proxy.demanded == [None], "one plain GET, and no identity that could not be proved"

    play(scene)
    made = Observer(NAMES, tmp_path).credentials(WEAK)
    assert "viz has no certificate of that mode yet" in str(made)


def test_leaving_a_tap_ends_it_at_the_proxy() -> None:
    async def scene(proxy: Proxy, proxies: Proxies) -> None:
        async with contextlib.aclosing(proxies.observe(pod(), tap_pb2.ObserveRequest(limit=2))) as events:
            await anext(events)
        await proxy.ended.wait()

    play(scene)


def test_failures_say_what_was_asked_and_what_came_back() -> None:
    async def scene(proxy: Proxy, proxies: Proxies) -> None:
        with pytest.raises(Unreachable, match=r"tap on emojivoto/web-1: UNAUTHENTICATED: who are you\?"):
            await anext(proxies.observe(pod(), tap_pb2.ObserveRequest()))
        proxy.metrics = web.Response(status=503)
        with pytest.raises(Unreachable, match=f"GET http://{IP}:4191/metrics answered 503"):
            await proxies.metrics(pod())
        away = pod("127.255.255.254")
        with pytest.raises(Unreachable, match=r"GET http://127\.255\.255\.254:4191/metrics: Cannot connect"):
            await proxies.metrics(away)
        with pytest.raises(Unreachable, match=r"mantle\.v1\.Edges/List on emojivoto/web-1: UNAVAILABLE"):
            await proxies.clients(away)
        for call in (proxies.metrics, proxies.clients):
            with pytest.raises(Unreachable, match="can have no identity"):
                await call(pod(account="Not A Name"))  # type: ignore[operator]

    play(scene)


def test_an_answer_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_METRICS_BYTES", 1000)

    async def scene(proxy: Proxy, proxies: Proxies) -> None:
        proxy.metrics = web.Response(text="x" * 1001)
        with pytest.raises(Unreachable, match="more than 1000 bytes"):
            await proxies.metrics(pod())

    play(scene)


def test_channels_of_pods_that_are_gone_are_closed() -> None:
    async def scene(proxy: Proxy, proxies: Proxies) -> None:
        await proxies.clients(pod())
        await proxies.keep_only({pod().uid})
        assert len(proxies._channels) == 1
        await proxies.keep_only(set())
        assert proxies._channels == {}
        await proxies.clients(pod())

    play(scene)


def test_the_certificate_that_a_proxy_shows() -> None:
    shown = Certificate(IDENTITY)
    der = shown.certificate.public_bytes(Encoding.DER)

    async def scene(proxy: Proxy, proxies: Proxies) -> None:
        proxy.identity = web.Response(body=der, content_type="application/pkix-cert")
        assert (await proxies.certificate(pod())).encode() == shown.pem
        assert proxy.demanded == [IDENTITY]
        proxy.identity = web.Response(status=404)
        with pytest.raises(Unreachable, match="no certificate yet, or is too old to show it"):
            await proxies.certificate(pod())

    play(scene)


def test_a_proxy_is_asked_where_its_annotations_put_its_ports() -> None:
    moved = {"config.mantle.dev/admin-port": "5191", "config.mantle.dev/control-port": "5190"}

    async def scene(proxy: Proxy, proxies: Proxies) -> None:
        elsewhere = replace(pod(), uid="moved", annotations=moved)
        with pytest.raises(Unreachable, match=f"GET http://{IP}:5191/metrics: Cannot connect"):
            await proxies.metrics(elsewhere)
        with pytest.raises(Unreachable, match=f"{IP}:5190"):
            await proxies.clients(elsewhere)
        assert await proxies.metrics(elsewhere, module.ADMIN_PORT) == "request_total 7\n"

    play(scene)
