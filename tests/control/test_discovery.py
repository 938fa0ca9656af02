"""Destination and policy through a real gRPC server: first answers, changes, refusals, as a proxy sees them."""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from discovery_play import IDENTITY, MESH, Discovery, discovery, pod, service, snapshot

from mantle.control import answers
from mantle.core.model import Key, Namespace, ServicePort
from mantle.gen.io.linkerd.proxy import destination_pb2, inbound_pb2, net_pb2, outbound_pb2

WEB_SVC = service("web-svc", "10.203.128.1")
WEB = pod("web-1", "10.203.0.5")
WEB_2 = pod("web-2", "10.203.0.6")
CONTEXT = '{"ns":"emojivoto","nodeName":"n","pod":"web-1"}'


def get(path: str = "web-svc.emojivoto.svc.cluster.local:80", context: str = CONTEXT) -> destination_pb2.GetDestination:
    return destination_pb2.GetDestination(scheme="k8s", path=path, context_token=context)


def traffic(ip: str, port: int, workload: str = CONTEXT) -> outbound_pb2.TrafficSpec:
    address = net_pb2.TcpAddress(ip=net_pb2.IPAddress(ipv4=int(ipaddress.IPv4Address(ip))), port=port)
    return outbound_pb2.TrafficSpec(source_workload=workload, addr=address)


def port(number: int, workload: str = CONTEXT) -> inbound_pb2.PortSpec:
    return inbound_pb2.PortSpec(workload=workload, port=number)


def addresses(update: destination_pb2.Update) -> list[str]:
    """The addresses of an `add` or `remove`, as IP:port."""
    which = update.WhichOneof("update")
    assert which in ("add", "remove"), update
    found = [a.addr for a in update.add.addrs] if which == "add" else list(update.remove.addrs)
    return [f"{ipaddress.IPv4Address(a.ip.ipv4)}:{a.port}" for a in found]


def play(script: Callable[[Discovery], Awaitable[None]], *objects: Any, **options: Any) -> None:
    """Runs `script` against a server whose platform has said `objects`."""

    async def run() -> None:
        async with discovery(*objects, **options) as server:
            await script(server)

    asyncio.run(run())


# ---- Destination.Get ----


def test_the_full_set_comes_first_and_then_what_changed() -> None:
    async def script(server: Discovery) -> None:
        stream = server.open("Get", get())
        first = await stream.next()
        assert addresses(first) == ["10.203.0.5:8080"]
        assert dict(first.add.metric_labels) == {"namespace": "emojivoto", "service": "web-svc"}
        (endpoint,) = first.add.addrs
        name = IDENTITY.format("web", "emojivoto")
        assert endpoint.tls_identity.dns_like_identity.name == endpoint.tls_identity.server_name.name == name
        assert endpoint.protocol_hint.WhichOneof("protocol") == "h2"
        assert endpoint.protocol_hint.opaque_transport.inbound_port == 4143
        assert endpoint.weight == 10_000

        await server.platform.say(snapshot(2, WEB_SVC, WEB, WEB_2))
        assert addresses(await stream.next()) == ["10.203.0.6:8080"]
        await server.platform.say(snapshot(3, WEB_SVC, WEB_2))
        removal = await stream.next()
        assert removal.WhichOneof("update") == "remove" and addresses(removal) == ["10.203.0.5:8080"]
        await server.platform.say(snapshot(4, WEB_SVC))
        assert (await stream.next()).no_endpoints.exists
        await server.platform.say(snapshot(5))
        gone = await stream.next()
        assert gone.WhichOneof("update") == "no_endpoints" and not gone.no_endpoints.exists
        await server.platform.say(snapshot(6, WEB_SVC, WEB))
        assert addresses(await stream.next()) == ["10.203.0.5:8080"]

        late = server.open("Get", get())
        assert addresses(await late.next()) == ["10.203.0.5:8080"], "every stream starts with the full set"

    play(script, WEB_SVC, WEB)


def test_a_change_that_is_none_for_this_service_is_not_sent() -> None:
    async def script(server: Discovery) -> None:
        stream = server.open("Get", get())
        await stream.next()
        for version in range(2, 5):
            other = pod(f"emoji-{version}", f"10.203.0.{20 + version}")
            await server.platform.say(snapshot(version, WEB_SVC, WEB, other))
        assert await stream.silent(0.4)
        await server.platform.say(snapshot(9, WEB_SVC, WEB, WEB_2))
        assert addresses(await stream.next()) == ["10.203.0.6:8080"]

    play(script, WEB_SVC, WEB)


def test_a_reader_that_missed_versions_is_brought_to_the_newest_and_loses_no_removal() -> None:
    async def script(server: Discovery) -> None:
        pods = [pod(f"web-{n}", f"10.203.1.{n}") for n in range(1, 40)]
        await server.platform.say(snapshot(2, WEB_SVC, *pods))
        stream = server.open("Get", get())
        have = set(addresses(await stream.next()))
        for version, kept in enumerate(([*pods[:20]], [*pods[10:30]], [pods[5]], [*pods[5:8]]), start=3):
            await server.platform.say(snapshot(version, WEB_SVC, *kept))
        wanted = {f"{p.ip}:8080" for p in pods[5:8]}
        while have != wanted:
            update = await stream.next()
            have = (
                have | set(addresses(update)) if update.WhichOneof("update") == "add" else have - set(addresses(update))
            )

    play(script, WEB_SVC, WEB)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("10.203.0.5:8080", "an_address"),
        ("example.com:80", "not_a_service_name"),
        ("web-svc.emojivoto.svc.cluster.local", "malformed"),
    ],
)
def test_get_refuses_what_can_never_have_endpoints(path: str, words: str) -> None:
    async def script(server: Discovery) -> None:
        stream = server.open("Get", get(path))
        assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in await stream.details()
        assert server.counted("Get", "invalid_argument") == 1

    play(script, WEB_SVC, WEB)


# ---- Destination.GetProfile ----


def test_profiles_of_services_pods_and_strangers() -> None:
    async def script(server: Discovery) -> None:
        of_service = await server.open("GetProfile", get("10.203.128.1:80")).next()
        assert of_service.fully_qualified_name == "web-svc.emojivoto.svc.cluster.local"
        assert not of_service.opaque_protocol and not of_service.HasField("endpoint")
        resource = of_service.parent_ref.resource
        assert (resource.group, resource.kind, resource.name, resource.namespace, resource.port) == (
            "core",
            "Service",
            "web-svc",
            "emojivoto",
            80,
        )
        by_name = await server.open("GetProfile", get()).next()
        assert by_name == of_service

        of_pod = await server.open("GetProfile", get("10.203.0.5:5432")).next()
        assert of_pod.opaque_protocol and of_pod.fully_qualified_name == ""
        assert of_pod.endpoint.protocol_hint.WhichOneof("protocol") == "opaque"
        assert of_pod.endpoint.tls_identity.server_name.name == IDENTITY.format("web", "emojivoto")

        stranger = await server.open("GetProfile", get("93.184.216.34:443")).next()
        assert stranger == destination_pb2.DestinationProfile()

    play(script, WEB_SVC, WEB)


def test_a_stranger_that_becomes_a_pod_is_told_on_the_same_stream() -> None:
    async def script(server: Discovery) -> None:
        stream = server.open("GetProfile", get("10.203.0.6:8080"))
        assert not (await stream.next()).HasField("endpoint")
        await server.platform.say(snapshot(2, WEB, replace(WEB_2, proxy_started=False)))
        assert not (await stream.next()).endpoint.HasField("tls_identity")
        await server.platform.say(snapshot(3, WEB, WEB_2))
        assert (await stream.next()).endpoint.HasField("tls_identity")

    play(script, WEB)


def test_a_profile_is_never_not_found() -> None:
    async def script(server: Discovery) -> None:
        assert await server.open("GetProfile", get("example.com:443")).code() is grpc.StatusCode.INVALID_ARGUMENT
        unknown = await server.open("GetProfile", get("nothing.emojivoto.svc.cluster.local:1")).next()
        assert unknown == destination_pb2.DestinationProfile()

    play(script, WEB)


def test_a_pod_whose_identity_cannot_be_written_is_an_error_that_is_retried() -> None:
    async def script(server: Discovery) -> None:
        stream = server.open("GetProfile", get("10.203.0.6:8080"))
        assert await stream.code() is grpc.StatusCode.UNAVAILABLE
        assert "too_long" in await stream.details()

    play(script, WEB, replace(WEB_2, service_account=".".join(["a" * 60] * 4)))


# ---- outbound policy ----


def test_a_service_is_detected_and_balanced() -> None:
    async def script(server: Discovery) -> None:
        policy = await server.open("Watch", traffic("10.203.128.1", 80)).next()
        detect = policy.protocol.detect
        assert detect.timeout.seconds == 10
        assert policy.metadata.resource.name == "web-svc"
        backends = [
            *(r.backends.first_available.backends[0].backend for r in detect.http1.routes[0].rules),
            *(r.backends.first_available.backends[0].backend for r in detect.http2.routes[0].rules),
            *(r.backends.first_available.backends[0].backend for r in detect.opaque.routes[0].rules),
        ]
        assert len(backends) == 3
        for backend in backends:
            assert backend.balancer.discovery.dst.path == "web-svc.emojivoto.svc.cluster.local:80"
            assert backend.balancer.peak_ewma.default_rtt.nanos == 30_000_000
            assert backend.balancer.peak_ewma.decay.seconds == 10
            assert (backend.queue.capacity, backend.queue.failfast_timeout.seconds) == (100, 3)
            assert backend.metadata.resource.kind == "Service"
        for route in (detect.http1.routes[0], detect.http2.routes[0], detect.opaque.routes[0]):
            assert route.metadata.WhichOneof("kind") == "default"
        by_name = outbound_pb2.TrafficSpec(source_workload=CONTEXT, authority="web-svc.emojivoto.svc.cluster.local:80")
        assert await server.open("Watch", by_name).next() == policy

    play(script, WEB_SVC, WEB)


def test_an_opaque_service_has_an_opaque_policy() -> None:
    async def script(server: Discovery) -> None:
        policy = await server.open("Watch", traffic("10.203.128.2", 3306)).next()
        assert policy.protocol.WhichOneof("kind") == "opaque"
        assert len(policy.protocol.opaque.routes[0].rules) == 1

    play(script, service("db", "10.203.128.2", ServicePort("db", 3306, 3306)), WEB)


def test_strangers_and_pods_are_not_found_at_once() -> None:
    async def script(server: Discovery) -> None:
        for ip, number in (("93.184.216.34", 443), ("10.203.0.5", 8080), ("10.203.128.1", 81)):
            assert await server.open("Watch", traffic(ip, number)).code() is grpc.StatusCode.NOT_FOUND
        named = outbound_pb2.TrafficSpec(source_workload=CONTEXT, authority="example.com:443")
        assert await server.open("Watch", named).code() is grpc.StatusCode.NOT_FOUND
        half = outbound_pb2.TrafficSpec(source_workload=CONTEXT, addr=net_pb2.TcpAddress(port=80))
        assert await server.open("Watch", half).code() is grpc.StatusCode.INVALID_ARGUMENT

    play(script, WEB_SVC, WEB)


def test_a_policy_whose_service_goes_away_ends_as_not_found() -> None:
    async def script(server: Discovery) -> None:
        stream = server.open("Watch", traffic("10.203.128.1", 80))
        await stream.next()
        await server.platform.say(snapshot(2, WEB_SVC, WEB, WEB_2))
        assert await stream.silent(0.2), "endpoints are not part of the policy"
        await server.platform.say(snapshot(3, WEB))
        assert await stream.code() is grpc.StatusCode.NOT_FOUND

    play(script, WEB_SVC, WEB)


def test_who_asks_once_hears_what_a_stream_says_first() -> None:
    async def script(server: Discovery) -> None:
        for once, stream, question, stranger in (
            ("OutboundGet", "Watch", traffic("10.203.128.1", 80), traffic("10.203.128.1", 81)),
            ("GetPort", "WatchPort", port(8080), inbound_pb2.PortSpec(workload=CONTEXT, port=70_000)),
        ):
            assert await server.ask(once, question) == await server.open(stream, question).next()
            assert await server.ask(once, stranger) == await server.open(stream, stranger).code()
            assert await server.ask(once, question, client="emoji.emojivoto") is grpc.StatusCode.PERMISSION_DENIED
            assert await server.ask(once, question, client="") is grpc.StatusCode.UNAUTHENTICATED
            assert server.counted(once, "ok") == 1

    play(script, WEB_SVC, WEB)


# ---- inbound policy ----


def test_every_port_is_answered_and_changes_follow() -> None:
    async def script(server: Discovery) -> None:
        for number in (8080, 1, 65535, 4191):
            policy = await server.open("WatchPort", port(number)).next()
            assert policy.protocol.WhichOneof("kind") == "detect"
            assert policy.protocol.detect.timeout.seconds == 10
            assert dict(policy.labels) == {"group": "", "kind": "default", "name": "all-unauthenticated"}
            (authz,) = policy.authorizations
            assert [(n.net.prefix_len, n.net.ip.WhichOneof("ip")) for n in authz.networks] == [(0, "ipv4"), (0, "ipv6")]
            assert authz.authentication.WhichOneof("permit") == "unauthenticated"
            assert authz.metadata.default == "all-unauthenticated"

        stream = server.open("WatchPort", port(8080))
        await stream.next()
        strict = Namespace("emojivoto", annotations={"config.mantle.dev/default-inbound-policy": "all-authenticated"})
        await server.platform.say(snapshot(2, WEB, strict))
        (authz,) = (await stream.next()).authorizations
        (suffix,) = authz.authentication.meshTLS.identities.suffixes
        assert list(suffix.parts) == [], "an empty suffix is every identity"
        deny = Namespace("emojivoto", annotations={"config.mantle.dev/default-inbound-policy": "deny"})
        await server.platform.say(snapshot(3, WEB, deny))
        assert list((await stream.next()).authorizations) == []
        await server.platform.say(snapshot(4))
        assert await stream.code() is grpc.StatusCode.NOT_FOUND

    play(script, WEB)


def test_probes_have_a_route_of_their_own_and_the_rest_still_has_one() -> None:
    async def script(server: Discovery) -> None:
        policy = await server.open("WatchPort", port(8080)).next()
        probe, rest = policy.protocol.detect.http_routes
        assert probe.metadata.default == "probe"
        assert [m.path.exact for m in probe.rules[0].matches] == ["/live", "/ready"]
        assert all(m.method.registered == 0 for m in probe.rules[0].matches)
        assert probe.authorizations[0].authentication.WhichOneof("permit") == "unauthenticated"
        assert rest.metadata.default == "default"
        assert rest.rules[0].matches[0].path.prefix == "/" and not rest.authorizations

    denied = {"config.mantle.dev/default-inbound-policy": "deny"}
    play(script, replace(WEB, probe_paths=((8080, "/ready"), (8080, "/live")), annotations=denied))


def test_certify_is_open_to_tls_without_a_client_certificate_and_to_nothing_less() -> None:
    component = {"mantle.dev/control-plane-component": "identity"}
    account = {"namespace": "mantle", "service_account": "mantle-identity"}
    own = pod("mantle-identity-x", "10.203.0.2", labels=component, **account)

    async def script(server: Discovery) -> None:
        question = port(8080, '{"ns":"mantle","pod":"mantle-identity-x"}')
        (authz,) = (await server.open("WatchPort", question, "mantle-identity.mantle").next()).authorizations
        assert authz.authentication.meshTLS.WhichOneof("clients") == "unauthenticated"

    play(script, own)


def test_half_a_question_about_a_port_is_refused() -> None:
    async def script(server: Discovery) -> None:
        for question in (port(0), port(65536), port(80, workload="")):
            assert await server.open("WatchPort", question).code() is grpc.StatusCode.INVALID_ARGUMENT

    play(script, WEB)


# ---- who asks ----

EMOJI = pod("emoji-1", "10.203.0.9")


@pytest.mark.parametrize(
    ("client", "workload", "code", "label"),
    [
        ("emoji.emojivoto", CONTEXT, grpc.StatusCode.PERMISSION_DENIED, "other_workload"),
        ("web.other", CONTEXT, grpc.StatusCode.PERMISSION_DENIED, "other_workload"),
        ("", CONTEXT, grpc.StatusCode.UNAUTHENTICATED, "anonymous"),
        ("web.emojivoto", '{"ns":"emojivoto","pod":"web-9"}', grpc.StatusCode.UNAVAILABLE, "unknown_workload"),
        ("web.emojivoto", "{", grpc.StatusCode.INVALID_ARGUMENT, "bad_workload"),
    ],
)
def test_a_caller_that_speaks_for_another_is_refused_on_every_method(
    client: str, workload: str, code: grpc.StatusCode, label: str
) -> None:
    async def script(server: Discovery) -> None:
        for method, request in (
            ("Get", get(context=workload)),
            ("GetProfile", get(context=workload)),
            ("Watch", traffic("10.203.128.1", 80, workload)),
            ("WatchPort", port(8080, workload)),
        ):
            stream = server.open(method, request, client)
            assert await stream.code() is code, method
            assert label in await stream.details()
        counts = [server.counted(m, label) for m in ("Get", "GetProfile", "OutboundWatch", "WatchPort")]
        assert counts == [1, 1, 1, 1]

    play(script, WEB_SVC, WEB, EMOJI)


def test_destinations_own_sidecar_asks_over_loopback() -> None:
    own = pod("mantle-destination-x", "10.203.0.3", namespace="mantle")
    word = '{"ns":"mantle","pod":"mantle-destination-x"}'

    async def script(server: Discovery) -> None:
        assert (await server.open("WatchPort", port(8086, word), client="").next()).labels["name"]
        refused = server.open("WatchPort", port(8080), client="")
        assert await refused.code() is grpc.StatusCode.UNAUTHENTICATED

    play(script, WEB, own, own_pod=own.key)


def test_the_interop_switch_lets_the_nameless_in() -> None:
    async def script(server: Discovery) -> None:
        assert (await server.open("WatchPort", port(8080), client="").next()).labels["name"]
        assert await server.open("WatchPort", port(8080), "emoji.emojivoto").code() is grpc.StatusCode.PERMISSION_DENIED

    play(script, WEB, EMOJI, allow_anonymous=True, own_pod=Key("mantle", "d"))


# ---- before the platform has spoken ----


def test_calls_wait_for_the_platforms_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(server: Discovery) -> None:
        stream = server.open("Get", get())
        assert await stream.silent(0.1), "an answer now would say that nothing exists"
        await server.platform.say(snapshot(1, WEB_SVC, WEB))
        assert addresses(await stream.next()) == ["10.203.0.5:8080"]

    play(script)


def test_a_platform_that_stays_silent_is_unavailable_never_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "FIRST_SNAPSHOT", 0.05)

    async def script(server: Discovery) -> None:
        assert await server.open("Watch", traffic("10.203.128.1", 80)).code() is grpc.StatusCode.UNAVAILABLE

    play(script)


# ---- clients that ping ----


def test_a_client_may_ping_its_quiet_connection_as_often_as_it_likes() -> None:
    """By default grpc ends such a connection with GOAWAY "too_many_pings" after a few: proxies do ping."""
    settings, ping, goaway = 4, 6, 7

    def frame(kind: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, 0]) + bytes(4) + payload

    async def script(server: Discovery) -> None:
        host, _, number = server.target.partition(":")
        reader, writer = await asyncio.open_connection(host, int(number))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(settings, b""))
        seen = []
        for count in range(20):
            writer.write(frame(ping, count.to_bytes(8, "big")))
            async with asyncio.timeout(60):
                while True:
                    head = await reader.readexactly(9)
                    payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                    seen.append(head[3])
                    if head[3] == ping and payload == count.to_bytes(8, "big"):
                        break
        assert goaway not in seen
        writer.close()
        await writer.wait_closed()

    play(script, WEB)


# ---- many ----


def test_all_who_subscribe_at_once_are_answered_and_told_of_changes_and_topics_are_forgotten() -> None:
    async def script(server: Discovery) -> None:
        streams = [server.open("Get", get()) for _ in range(1900)]  # more than grpc lets wait by default
        await asyncio.gather(*(stream.next(200) for stream in streams))
        assert server.topics.counts() == (1, 1900)
        await server.platform.say(snapshot(2, WEB_SVC, WEB, WEB_2))
        updates = await asyncio.gather(*(stream.next(200) for stream in streams))
        assert {tuple(addresses(update)) for update in updates} == {("10.203.0.6:8080",)}
        for stream in streams:
            stream.cancel()
        while server.topics.counts() != (0, 0):  # noqa: ASYNC110  # the server learns of a cancellation when it learns
            await asyncio.sleep(0.01)

    play(script, WEB_SVC, WEB, mesh=MESH)


def test_a_reader_that_reads_nothing_holds_nobody_up_and_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "STUCK", 4.0)
    many = [pod(f"web-{n}", f"10.203.{n // 250}.{n % 250 + 1}") for n in range(500)]

    async def script(server: Discovery) -> None:
        healthy = server.open("Get", get())
        await healthy.next()
        small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
        async with grpc.aio.insecure_channel(server.target, options=small) as channel:
            deaf = replace(server, channel=channel).open("Get", get())
            await deaf.begun()
            assert server.topics.counts() == (1, 2)
            versions = itertools.count(2)
            async with asyncio.timeout(200):
                while not server.counted("Get", "stuck"):
                    version = next(versions)
                    await server.platform.say(snapshot(version, WEB_SVC, *(many if version % 2 else many[:1])))
                    await healthy.next()
            assert server.counted("Get", "stuck") == 1
            assert server.topics.counts() == (1, 1)
            await server.platform.say(snapshot(next(versions), WEB_SVC, *many[:7]))
            await healthy.next()
            deaf.cancel()

    play(script, WEB_SVC, *many)
