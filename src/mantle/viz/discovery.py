"""What destination and policy tell proxies, asked for people: endpoints of a service, policy of a port or service.

viz asks as itself, over its own proxy; destination lets it ask about every workload (`core/callers.py`), because it may
see all of them anyway. Answers are objects, in the words of the messages they come from.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from typing import Any

import grpc
import grpc.aio
from google.protobuf.json_format import MessageToDict

from mantle.core.model import Key
from mantle.gen.io.linkerd.proxy import destination_pb2, inbound_pb2, net_pb2, outbound_pb2
from mantle.viz.proxies import Unreachable

TIMEOUT_SECONDS = 5.0
_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 64 << 20))


class NotKnown(Exception):
    """Destination answered that there is no such thing. The text is its own."""


class Discovery:
    """Connections to destination and policy, opened when first asked. `own` is the pod this runs in."""

    def __init__(self, destination: str, policy: str, own: Key) -> None:
        self._addresses = {"destination": destination, "policy": policy}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._own = json.dumps({"ns": own.namespace, "pod": own.name})

    async def close(self) -> None:
        while self._channels:
            await self._channels.popitem()[1].close(None)

    async def endpoints(self, authority: str) -> list[dict[str, Any]]:
        """The endpoints of `NAME.NAMESPACE.svc.DOMAIN:PORT`. Raises `NotKnown` or `Unreachable`."""
        call = self._channel("destination").unary_stream(
            "/io.linkerd.proxy.destination.Destination/Get",
            request_serializer=destination_pb2.GetDestination.SerializeToString,
            response_deserializer=destination_pb2.Update.FromString,
        )(destination_pb2.GetDestination(scheme="k8s", path=authority, context_token=self._own))
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                update = await call.read()  # the full set comes first
        except TimeoutError as error:
            raise Unreachable(f"destination did not say anything of {authority} in {TIMEOUT_SECONDS:.0f} s") from error
        except grpc.aio.AioRpcError as error:
            raise _problem(error, "destination") from error
        finally:
            call.cancel()
        if not isinstance(update, destination_pb2.Update):
            raise Unreachable("destination ended the answer before it began")
        if update.WhichOneof("update") == "no_endpoints":
            if not update.no_endpoints.exists:
                raise NotKnown(f"there is no service port {authority}")
            return []
        common = dict(update.add.metric_labels)
        return [_endpoint(one, common) for one in update.add.addrs]

    async def inbound(self, pod: Key, port: int) -> dict[str, Any]:
        """The policy of a pod's port. Raises `NotKnown` or `Unreachable`."""
        workload = json.dumps({"ns": pod.namespace, "pod": pod.name})
        return await self._ask(
            "/io.linkerd.proxy.inbound.InboundServerPolicies/GetPort",
            inbound_pb2.PortSpec(workload=workload, port=port),
            inbound_pb2.Server,
        )

    async def outbound(self, authority: str) -> dict[str, Any]:
        """The policy towards a service's port. Raises `NotKnown` or `Unreachable`."""
        return await self._ask(
            "/io.linkerd.proxy.outbound.OutboundPolicies/Get",
            outbound_pb2.TrafficSpec(source_workload=self._own, authority=authority),
            outbound_pb2.OutboundPolicy,
        )

    async def _ask(self, method: str, request: Any, answer: Any) -> dict[str, Any]:
        call = self._channel("policy").unary_unary(
            method, request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString
        )
        try:
            message = await call(request, timeout=TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise _problem(error, "policy") from error
        return MessageToDict(message, preserving_proto_field_name=True)

    def _channel(self, which: str) -> grpc.aio.Channel:
        if which not in self._channels:
            self._channels[which] = grpc.aio.insecure_channel(self._addresses[which], options=_OPTIONS)
        return self._channels[which]


def _problem(error: grpc.aio.AioRpcError, who: str) -> Exception:
    details = error.details() or "no details"
    if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
        return NotKnown(details)
    return Unreachable(f"{who} answered {error.code().name}: {details}")


def _endpoint(found: destination_pb2.WeightedAddr, common: dict[str, str]) -> dict[str, Any]:
    labels = {**common, **found.metric_labels}
    hint = found.protocol_hint
    return {
        "namespace": labels.get("namespace", ""),
        "ip": _ip(found.addr.ip),
        "port": found.addr.port,
        "pod": labels.get("pod", ""),
        "service": labels.get("service", ""),
        "weight": found.weight,
        "identity": found.tls_identity.dns_like_identity.name or None,
        "protocol": hint.WhichOneof("protocol"),
        "opaque_transport_port": hint.opaque_transport.inbound_port if hint.HasField("opaque_transport") else None,
        "labels": dict(sorted(labels.items())),
    }


def _ip(ip: net_pb2.IPAddress) -> str:
    if ip.WhichOneof("ip") == "ipv6":
        return str(ipaddress.IPv6Address((ip.ipv6.first << 64) | ip.ipv6.last))
    return str(ipaddress.IPv4Address(ip.ipv4))
