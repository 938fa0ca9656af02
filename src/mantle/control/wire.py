"""Answers as Linkerd's messages: what `core.endpoints` and `core.policy` decided, written down in bytes.

Which fields the real linkerd2-proxy demands was measured by leaving each out; they are all set here. Bytes are
deterministic (map fields sorted), so that equal answers are equal bytes. Decides nothing.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from google.protobuf.duration_pb2 import Duration

from mantle.core.endpoints import Add, Address, Endpoint, Endpoints, Hint, Nothing, Profile, Remove, Step, full, step
from mantle.core.model import Key
from mantle.core.policy import GRPC_HEALTH, Authorization, Clients, ServerPolicy, ServicePolicy
from mantle.core.world import Network
from mantle.gen.io.linkerd.proxy import destination_pb2 as destination
from mantle.gen.io.linkerd.proxy import http_route_pb2 as http_route
from mantle.gen.io.linkerd.proxy import http_types_pb2 as http_types
from mantle.gen.io.linkerd.proxy import inbound_pb2 as inbound
from mantle.gen.io.linkerd.proxy import meta_pb2 as meta
from mantle.gen.io.linkerd.proxy import net_pb2 as net
from mantle.gen.io.linkerd.proxy import outbound_pb2 as outbound

WEIGHT = 10_000
DETECT_TIMEOUT = Duration(seconds=10)
QUEUE_CAPACITY = 100
FAILFAST = Duration(seconds=3)
EWMA_DEFAULT_RTT = Duration(nanos=30_000_000)
EWMA_DECAY = Duration(seconds=10)

# ---- destination ----


def endpoints_bytes(before: Endpoints | None, now: Endpoints) -> tuple[bytes, ...]:
    """The messages that bring a reader from what it was last sent (None: nothing yet) to `now`."""
    steps = full(now) if before is None else step(before, now)
    return tuple(_update(part).SerializeToString(deterministic=True) for part in steps)


def profile_bytes(profile: Profile) -> bytes:
    message = destination.DestinationProfile(fully_qualified_name=profile.name, opaque_protocol=profile.opaque)
    if profile.service is not None:
        message.parent_ref.CopyFrom(_service_meta(profile.service, profile.port))
    if profile.endpoint is not None:
        message.endpoint.CopyFrom(_weighted(profile.endpoint))
    return message.SerializeToString(deterministic=True)


def _update(part: Step) -> destination.Update:
    match part:
        case Add(endpoints, labels):
            addresses = [_weighted(endpoint) for endpoint in endpoints]
            return destination.Update(add=destination.WeightedAddrSet(addrs=addresses, metric_labels=dict(labels)))
        case Remove(gone):
            return destination.Update(remove=destination.AddrSet(addrs=[_address(address) for address in gone]))
        case Nothing(exists):
            return destination.Update(no_endpoints=destination.NoEndpoints(exists=exists))


def _weighted(endpoint: Endpoint) -> destination.WeightedAddr:
    message = destination.WeightedAddr(
        addr=_address(endpoint.address), weight=WEIGHT, metric_labels=dict(endpoint.labels)
    )
    # A typed reason is an enum and a str too: only a plain str is an identity.
    if type(endpoint.tls) is str:
        name = destination.TlsIdentity.DnsLikeIdentity(name=endpoint.tls)
        message.tls_identity.CopyFrom(destination.TlsIdentity(dns_like_identity=name, server_name=name))
    if endpoint.hint is Hint.H2:
        message.protocol_hint.h2.SetInParent()
    elif endpoint.hint is Hint.OPAQUE:
        message.protocol_hint.opaque.SetInParent()
    if endpoint.opaque_transport is not None:
        message.protocol_hint.opaque_transport.inbound_port = endpoint.opaque_transport
    return message


# ---- outbound policy ----


def service_policy_bytes(policy: ServicePolicy) -> bytes:
    reference = _service_meta(policy.service, policy.port)
    backend = outbound.Backend(
        metadata=reference,
        queue=outbound.Queue(capacity=QUEUE_CAPACITY, failfast_timeout=FAILFAST),
        balancer=outbound.Backend.BalanceP2c(
            discovery=outbound.Backend.EndpointDiscovery(
                dst=outbound.Backend.EndpointDiscovery.DestinationGet(path=policy.path)
            ),
            peak_ewma=outbound.Backend.BalanceP2c.PeakEwma(default_rtt=EWMA_DEFAULT_RTT, decay=EWMA_DECAY),
        ),
    )
    opaque = outbound.ProxyProtocol.Opaque(routes=[_opaque_route(backend)])
    if policy.opaque:
        protocol = outbound.ProxyProtocol(opaque=opaque)
    else:
        routes = [_http_route(backend)]
        protocol = outbound.ProxyProtocol(
            detect=outbound.ProxyProtocol.Detect(
                timeout=DETECT_TIMEOUT,
                opaque=opaque,
                http1=outbound.ProxyProtocol.Http1(routes=routes),
                http2=outbound.ProxyProtocol.Http2(routes=routes),
            )
        )
    message = outbound.OutboundPolicy(metadata=reference, protocol=protocol)
    return message.SerializeToString(deterministic=True)


def _http_route(backend: outbound.Backend) -> outbound.HttpRoute:
    distribution = outbound.HttpRoute.Distribution(
        first_available=outbound.HttpRoute.Distribution.FirstAvailable(
            backends=[outbound.HttpRoute.RouteBackend(backend=backend)]
        )
    )
    rule = outbound.HttpRoute.Rule(matches=[_any_path()], backends=distribution)
    return outbound.HttpRoute(metadata=meta.Metadata(default="http"), rules=[rule])


def _opaque_route(backend: outbound.Backend) -> outbound.OpaqueRoute:
    distribution = outbound.OpaqueRoute.Distribution(
        first_available=outbound.OpaqueRoute.Distribution.FirstAvailable(
            backends=[outbound.OpaqueRoute.RouteBackend(backend=backend)]
        )
    )
    rule = outbound.OpaqueRoute.Rule(backends=distribution)
    return outbound.OpaqueRoute(metadata=meta.Metadata(default="opaq"), rules=[rule])


# ---- inbound policy ----


def server_policy_bytes(policy: ServerPolicy) -> bytes:
    if policy.opaque:
        protocol = inbound.ProxyProtocol(opaque=inbound.ProxyProtocol.Opaque())
    else:
        routes = _probe_routes(policy) if policy.probe_paths else []
        protocol = inbound.ProxyProtocol(
            detect=inbound.ProxyProtocol.Detect(timeout=DETECT_TIMEOUT, http_routes=routes)
        )
    message = inbound.Server(
        protocol=protocol,
        labels={"group": "", "kind": "default", "name": policy.name},
        authorizations=[_authz(authorization) for authorization in policy.authorizations],
    )
    return message.SerializeToString(deterministic=True)


def _probe_routes(policy: ServerPolicy) -> list[inbound.HttpRoute]:
    """The probes' own route, and one for everything else: without the second it would be 404."""
    get, post = http_types.HttpMethod.GET, http_types.HttpMethod.POST
    matches = [
        http_route.HttpRouteMatch(
            path=http_route.PathMatch(exact=path),
            method=http_types.HttpMethod(registered=post if path == GRPC_HEALTH else get),
        )
        for path in policy.probe_paths
    ]
    probe = inbound.HttpRoute(
        metadata=meta.Metadata(default="probe"),
        authorizations=[_authz(Authorization("probe", policy.probe_networks, Clients.ANYONE))],
        rules=[inbound.HttpRoute.Rule(matches=matches)],
    )
    rest = inbound.HttpRoute(
        metadata=meta.Metadata(default="default"), rules=[inbound.HttpRoute.Rule(matches=[_any_path()])]
    )
    return [probe, rest]


def _authz(authorization: Authorization) -> inbound.Authz:
    anyone = inbound.Authn.PermitUnauthenticated()
    match authorization.clients:
        case Clients.ANYONE:
            authentication = inbound.Authn(unauthenticated=anyone)
        case Clients.ANY_TLS:
            authentication = inbound.Authn(meshTLS=inbound.Authn.PermitMeshTLS(unauthenticated=anyone))
        case Clients.ANY_IDENTITY:
            every = inbound.Authn.PermitMeshTLS.PermitClientIdentities(suffixes=[inbound.IdentitySuffix()])
            authentication = inbound.Authn(meshTLS=inbound.Authn.PermitMeshTLS(identities=every))
    return inbound.Authz(
        networks=[inbound.Network(net=_network(network)) for network in authorization.networks],
        authentication=authentication,
        labels={"group": "", "kind": "default", "name": authorization.name},
        metadata=meta.Metadata(default=authorization.name),
    )


# ---- shared ----


def _any_path() -> http_route.HttpRouteMatch:
    return http_route.HttpRouteMatch(path=http_route.PathMatch(prefix="/"))


def _service_meta(service: Key, port: int) -> meta.Metadata:
    return meta.Metadata(
        resource=meta.Resource(group="core", kind="Service", name=service.name, namespace=service.namespace, port=port)
    )


def _address(address: Address) -> net.TcpAddress:
    return net.TcpAddress(ip=_ip(address[0]), port=address[1])


@lru_cache(maxsize=4096)
def _ip(text: str) -> net.IPAddress:
    return _packed(ipaddress.ip_address(text))


def _packed(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> net.IPAddress:
    if isinstance(ip, ipaddress.IPv4Address):
        return net.IPAddress(ipv4=int(ip))
    return net.IPAddress(ipv6=net.IPv6(first=int(ip) >> 64, last=int(ip) & (2**64 - 1)))


def _network(network: Network) -> net.IPNetwork:
    return net.IPNetwork(ip=_packed(network.network_address), prefix_len=network.prefixlen)


def read_address(message: net.TcpAddress) -> tuple[str, int] | None:
    """The address of a request as (IP as text, port); None if it is not one."""
    match message.ip.WhichOneof("ip"):
        case "ipv4":
            ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.IPv4Address(message.ip.ipv4)
        case "ipv6":
            ip = ipaddress.IPv6Address(message.ip.ipv6.first << 64 | message.ip.ipv6.last)
        case _:
            return None
    if not 0 < message.port < 65536:
        return None
    return str(ip), message.port
