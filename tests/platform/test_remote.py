"""Both ends of the platform socket: what goes in at the daemon's end comes out at the control plane's, whatever happens
between.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
from discovery_play import FakePlatform, pod, service, snapshot

from mantle.core.model import ContainerPort, Key, Namespace, Owner, Pod, Service, ServicePort, Snapshot
from mantle.core.reasons import TokenReason
from mantle.gen.mantle.v1 import platform_pb2 as pb
from mantle.platform.port import TokenClaims, TokenRejected
from mantle.platform.remote import PlatformUnavailable, RemotePlatform
from mantle.platform.serve import handler
from mantle.platform.wire import (
    Mirror,
    between,
    full,
    namespace_from_proto,
    namespace_to_proto,
    pod_from_proto,
    pod_to_proto,
    review_from_proto,
    service_from_proto,
    service_to_proto,
)

EVERYTHING = Pod(
    key=Key("ns", "name"),
    uid="uid",
    ip="10.0.0.1",
    service_account="sa.with.dots",
    owner=Owner("Deployment", "web"),
    labels={"a": "b"},
    annotations={"c": "d"},
    ports=(ContainerPort("http", 80), ContainerPort("", 53, "UDP")),
    phase="Pending",
    ready=True,
    node="node",
    host_network=True,
    proxy_started=True,
    probe_paths=((80, "/ready"), (81, "/live")),
)


# ---- values and messages ----


ONLY_ON_A_CLUSTER = {"more_ips", "more_cluster_ips", "external_name", "unreadable"}
"""One machine has one address family, no names that lead elsewhere, and reads what it wrote itself."""


def test_every_field_of_every_object_survives_the_wire() -> None:
    svc = Service(
        key=Key("ns", "svc"),
        cluster_ip="None",
        ports=(ServicePort("a", 80, 8080), ServicePort("b", 81, "http", "TCP", "kubernetes.io/h2c")),
        selector={"app": "web"},
        annotations={"x": "y"},
        publish_not_ready=True,
    )
    namespace = Namespace("ns", {"l": "1"}, {"a": "2"})
    assert pod_from_proto(pb.Pod.FromString(pod_to_proto(EVERYTHING).SerializeToString())) == EVERYTHING
    assert service_from_proto(pb.Service.FromString(service_to_proto(svc).SerializeToString())) == svc
    assert namespace_from_proto(namespace_to_proto(namespace)) == namespace
    for values, made in ((Pod.__slots__, EVERYTHING), (Service.__slots__, svc), (Namespace.__slots__, namespace)):
        travelling = set(values) - ONLY_ON_A_CLUSTER
        assert all(getattr(made, name) for name in travelling), "a field left at its default would prove nothing"


def test_a_mirror_follows_any_sequence_of_snapshots() -> None:
    chance = random.Random(1)
    mirror, before = Mirror(), Snapshot()
    for version in range(1, 200):
        pods = [
            replace(pod(f"web-{n}", f"10.0.0.{n}"), ready=chance.random() < 0.5)
            for n in range(8)
            if chance.random() < 0.7
        ]
        services = [service(f"web-{n}", f"10.1.0.{n}") for n in range(4) if chance.random() < 0.7]
        now = snapshot(version, *pods, *services, *([Namespace("extra")] if chance.random() < 0.5 else []))
        mirror.apply(full(now) if chance.random() < 0.2 else between(before, now))
        seen = mirror.snapshot()
        assert (seen.pods, seen.services, seen.namespaces) == (now.pods, now.services, now.namespaces)
        before = now


def test_what_did_not_change_stays_the_same_object_even_through_a_reset() -> None:
    mirror = Mirror()
    one, two = pod("web-1", "10.0.0.1"), pod("web-2", "10.0.0.2")
    mirror.apply(full(snapshot(1, one, two)))
    first = mirror.snapshot()
    mirror.apply(full(snapshot(1, one, replace(two, ready=False))))
    second = mirror.snapshot()
    assert second.pods[one.key] is first.pods[one.key]
    assert second.pods[two.key] is not first.pods[two.key]
    assert second.version > first.version


def test_a_review_that_says_nothing_is_an_error_not_an_acceptance() -> None:
    with pytest.raises(ValueError, match="neither"):
        review_from_proto(pb.ReviewTokenResponse())


# ---- over a socket ----


@asynccontextmanager
async def served(platform: FakePlatform, socket: Path) -> AsyncIterator[None]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([handler(platform)])
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


async def newest(watch: AsyncIterator[Snapshot], wanted: int) -> Snapshot:
    """The first snapshot with that many pods."""
    async with asyncio.timeout(60):
        async for seen in watch:
            if len(seen.pods) == wanted:
                return seen
    raise AssertionError("the watch ended")


def test_a_watch_outlives_the_platforms_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        socket = tmp_path / "platform.sock"
        async with RemotePlatform(socket) as remote:
            watch = remote.watch()
            before = FakePlatform(snapshot(70, pod("web-1", "10.0.0.1")))
            async with served(before, socket):
                first = await newest(watch, 1)
                await before.say(snapshot(71, pod("web-1", "10.0.0.1"), pod("web-2", "10.0.0.2")))
                second = await newest(watch, 2)
            after = FakePlatform(
                snapshot(1, pod("web-9", "10.0.0.9"), pod("web-1", "10.0.0.1"), pod("c-1", "10.0.0.3"))
            )
            async with served(after, socket):
                third = await newest(watch, 3)
            assert first.version < second.version < third.version, "though the platform counts from the start again"
            assert Key("emojivoto", "web-2") not in third.pods
            assert third.pods[Key("emojivoto", "web-1")] is first.pods[Key("emojivoto", "web-1")]
            await watch.aclose()  # type: ignore[attr-defined]

    asyncio.run(play())
    assert "going on with what is known" in caplog.text


def test_a_slow_consumer_gets_the_newest_and_no_backlog(tmp_path: Path) -> None:
    async def play() -> None:
        platform = FakePlatform(snapshot(1))
        async with served(platform, tmp_path / "s"), RemotePlatform(tmp_path / "s") as remote:
            watch = remote.watch()
            await newest(watch, 0)
            for number in range(1, 101):
                await platform.say(snapshot(number, *(pod(f"web-{n}", f"10.0.0.{n}") for n in range(number))))
                await asyncio.sleep(0)
            taken = 0
            async with asyncio.timeout(60):
                async for seen in watch:
                    taken += 1
                    if len(seen.pods) == 100:
                        break
            assert taken <= 50
            await watch.aclose()  # type: ignore[attr-defined]

    asyncio.run(play())


def test_token_reviews_go_through_and_a_missing_platform_is_told_apart(tmp_path: Path) -> None:
    claims = TokenClaims("ns", "sa", "pod", "uid", "10.0.0.1")
    rejected = TokenRejected(TokenReason.EXPIRED, "yesterday")
    platform = FakePlatform(reviews={b"good": claims, b"old": rejected})

    async def play() -> None:
        socket = tmp_path / "platform.sock"
        async with RemotePlatform(socket) as remote:
            with pytest.raises(PlatformUnavailable, match="unavailable"):
                await remote.review_token(b"good", ["a"])
            async with served(platform, socket):
                async with asyncio.timeout(60):
                    while True:
                        try:
                            assert await remote.review_token(b"good", ["a", "b"]) == claims
                            break
                        except PlatformUnavailable:
                            await asyncio.sleep(0.05)  # the channel looks for the socket again by itself
                assert await remote.review_token(b"old", ["a"]) == rejected
                assert platform.asked[-2:] == [(b"good", ("a", "b")), (b"old", ("a",))]

    asyncio.run(play())


def test_many_reviews_at_once_each_get_their_own_answer(tmp_path: Path) -> None:
    claims = {f"t{n}".encode(): TokenClaims("ns", f"sa-{n}", "pod", "uid", "10.0.0.1") for n in range(200)}
    platform = FakePlatform(reviews=claims)

    async def play() -> None:
        async with served(platform, tmp_path / "s"), RemotePlatform(tmp_path / "s") as remote:
            answers = await asyncio.gather(*(remote.review_token(token, ["a"]) for token in claims))
            assert answers == list(claims.values())

    asyncio.run(play())


def test_whoever_waits_is_told_when_the_platform_goes_and_who_gave_up_disturbs_nobody(tmp_path: Path) -> None:
    gate, asked = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        asked.set()
        await gate.wait()

    platform = FakePlatform(
        reviews={b"a": TokenClaims("ns", "a", "", "", ""), b"b": TokenClaims("ns", "b", "", "", "")}
    )

    async def play() -> None:
        async with RemotePlatform(tmp_path / "s") as remote:
            async with served(platform, tmp_path / "s"):
                platform.before_review = hold
                gave_up = asyncio.ensure_future(remote.review_token(b"a", []))
                patient = asyncio.ensure_future(remote.review_token(b"b", []))
                await asked.wait()
                gave_up.cancel()
                gate.set()
                outcome = await patient
                assert isinstance(outcome, TokenClaims) and outcome.service_account == "b"
                gate.clear()
                asked.clear()
                left = asyncio.ensure_future(remote.review_token(b"a", []))
                await asked.wait()
            with pytest.raises(PlatformUnavailable):
                await left

    asyncio.run(play())
