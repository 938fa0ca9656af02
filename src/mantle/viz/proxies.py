"""Calls to the proxies of other pods: metrics, the table of clients, and tap. The only place of viz that dials pods.

Everything goes out in plaintext to POD_IP and is taken by this pod's own proxy, which makes it mutual TLS; the header
`l5d-require-id` makes that proxy refuse any other identity than the pod's, so that nothing is ever asked of a stranger.

Pods of the experimental mode are the exception: no proxy of the default mode can verify them. Metrics and certificate,
which anybody may read, are asked in plaintext; for tap viz makes mutual TLS itself (`observer.py`).
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Collection

import aiohttp
import grpc
import grpc.aio

from mantle.core.annotations import PREFIX
from mantle.core.model import Pod
from mantle.core.names import BadName, MeshNames, Workload
from mantle.core.world import is_optional
from mantle.gen.io.linkerd.proxy import tap_pb2
from mantle.gen.mantle.v1 import edges_pb2
from mantle.viz.observer import CannotObserve, Observer

ADMIN_PORT = 4191
CONTROL_PORT = 4190
TIMEOUT_SECONDS = 3.0
MAX_METRICS_BYTES = 16 << 20
REQUIRE_ID = "l5d-require-id"
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 4 << 20))


class Unreachable(Exception):
    """A proxy could not be asked. The text says which call failed and what came back; asking again may work."""


class Proxies:
    """Connections to proxies, kept per pod until `keep_only` drops them. Use inside `async with`."""

    def __init__(self, names: MeshNames, observer: Observer | None = None) -> None:
        self._names = names
        self._observer = observer or Observer(names, None)
        self._channels: dict[str, tuple[int, grpc.aio.Channel]] = {}
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Proxies:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        connector = aiohttp.TCPConnector(limit=64, limit_per_host=1, keepalive_timeout=30)
        self._http = aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.keep_only(())
        if self._http is not None:
            await self._http.close()

    async def keep_only(self, uids: Collection[str]) -> None:
        """Closes the channels to pods that are not in `uids`."""
        for uid in self._channels.keys() - set(uids):
            await self._channels.pop(uid)[1].close(None)

    async def metrics(self, pod: Pod, port: int = 0) -> str:
        """The text of `GET /metrics` on a pod's port (0: its proxy's admin port). Raises `Unreachable`."""
        return (await self._get(pod, port or _moved(pod, "admin-port", ADMIN_PORT), "/metrics")).decode(
            "utf-8", "replace"
        )

    async def _get(self, pod: Pod, port: int, path: str) -> bytes:
        if self._http is None:
            raise RuntimeError("Proxies is used outside `async with`")
        url = f"http://{_host(pod.ip)}:{port}{path}"
        try:
            headers = {} if is_optional(pod) else {REQUIRE_ID: self._identity(pod)}
            # A pod's answer must not choose whom viz asks next.
            async with self._http.get(url, headers=headers, allow_redirects=False) as answer:
                if answer.status == 404 and path == "/identity":
                    raise Unreachable("the proxy has no certificate yet, or is too old to show it")
                if answer.status != 200:
                    raise Unreachable(f"GET {url} answered {answer.status}")
                body = bytearray()
                async for chunk in answer.content.iter_any():
                    body += chunk
                    if len(body) > MAX_METRICS_BYTES:
                        raise Unreachable(f"GET {url} answered more than {MAX_METRICS_BYTES} bytes")
                return bytes(body)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(f"GET {url}: {_text(error)}") from error

    async def certificate(self, pod: Pod) -> str:
        """The certificate that a pod's proxy uses now, PEM. Raises `Unreachable`."""
        return ssl.DER_cert_to_PEM_cert(await self._get(pod, _moved(pod, "admin-port", ADMIN_PORT), "/identity"))

    async def clients(self, pod: Pod) -> list[edges_pb2.Edge]:
        """The rows of a proxy's table of clients; none of a pod of the experimental mode that cannot be asked. Raises
        `Unreachable`.
        """
        try:
            return await self._clients(pod)
        except Unreachable:
            if is_optional(pod):
                return []
            raise

    async def _clients(self, pod: Pod) -> list[edges_pb2.Edge]:
        call = (await self._channel(pod)).unary_unary(
            "/mantle.v1.Edges/List",
            request_serializer=edges_pb2.ListRequest.SerializeToString,
            response_deserializer=edges_pb2.ListResponse.FromString,
        )
        try:
            response = await call(edges_pb2.ListRequest(), timeout=TIMEOUT_SECONDS, metadata=self._metadata(pod))
        except grpc.aio.AioRpcError as error:
            raise Unreachable(f"mantle.v1.Edges/List on {pod.key}: {_status(error)}") from error
        return list(response.edges)

    async def observe(self, pod: Pod, request: tap_pb2.ObserveRequest) -> AsyncIterator[tap_pb2.TapEvent]:
        """The events of one `Observe`, which ends at its limit. Raises `Unreachable`."""
        call = (await self._channel(pod)).unary_stream(
            "/io.linkerd.proxy.tap.Tap/Observe",
            request_serializer=tap_pb2.ObserveRequest.SerializeToString,
            response_deserializer=tap_pb2.TapEvent.FromString,
        )(request, metadata=self._metadata(pod))
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            raise Unreachable(f"tap on {pod.key}: {_status(error)}") from error
        finally:
            call.cancel()

    async def _channel(self, pod: Pod) -> grpc.aio.Channel:
        stamp = self._observer.stamp() if is_optional(pod) else 0
        kept = self._channels.get(pod.uid)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        if kept is not None:  # made with a certificate that has been renewed
            del self._channels[pod.uid]
            await kept[1].close(None)
        channel = self._dial(pod)
        self._channels[pod.uid] = stamp, channel
        return channel

    def _dial(self, pod: Pod) -> grpc.aio.Channel:
        address = f"{_host(pod.ip)}:{_moved(pod, 'control-port', CONTROL_PORT)}"
        if not is_optional(pod):
            return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        made = self._observer.credentials(pod)
        if isinstance(made, CannotObserve):
            raise Unreachable(f"tap on {pod.key}: {made}")
        credentials, name = made
        options = (*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", name))
        return grpc.aio.secure_channel(address, credentials, options=options)

    def _identity(self, pod: Pod) -> str:
        identity = self._names.identity(Workload(pod.key.namespace, pod.service_account))
        if isinstance(identity, BadName):  # it can have no certificate, so there is nobody to ask
            raise Unreachable(f"{pod.key} can have no identity: {identity}")
        return identity

    def _metadata(self, pod: Pod) -> grpc.aio.Metadata:
        if is_optional(pod):
            return grpc.aio.Metadata()
        return grpc.aio.Metadata((REQUIRE_ID, self._identity(pod)))


def _moved(pod: Pod, setting: str, usual: int) -> int:
    """A port of the proxy, where the pod's annotations say that it is; injection writes a namespace's onto the pod."""
    said = pod.annotations.get(PREFIX + setting, "")
    # It may be written on a running pod, by whoever may: nothing has checked it.
    port = int(said) if said.isascii() and said.isdecimal() and len(said) <= 5 else 0
    return port if 0 < port < 65536 else usual


def _host(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip


def _status(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details() or 'no details'}"


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
