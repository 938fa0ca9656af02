"""Tap: the question that goes to proxies, the objects that come back, and a watch over pods that come, go and fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from mantle.cli.tap import line_of
from mantle.core.model import Key, Owner, Pod, Service, Snapshot
from mantle.gen.io.linkerd.proxy import http_types_pb2, tap_pb2
from mantle.viz import tap
from mantle.viz.proxies import Unreachable
from mantle.viz.tap_events import TapQuery, Target, event_object, limit_per_pod, observe_request, targets
from mantle.viz.world import World

MESHED = {"mantle.dev/control-plane-ns": "mantle", "app": "web-svc"}


def pod(name: str, ip: str, owner: Owner, labels: dict[str, str] = MESHED, namespace: str = "emojivoto") -> Pod:
    return Pod(Key(namespace, name), f"uid-{name}", ip, "web", owner, labels, ready=True, proxy_started=True)


WEB1 = pod("web-1", "10.1.17.28", Owner("Deployment", "web"))
WEB2 = pod("web-2", "10.1.17.30", Owner("Deployment", "web"))
JOB = pod("migrate-1", "10.1.17.31", Owner("Job", "migrate"), {"app": "x"})
BOT = pod("vote-bot-1", "10.1.17.29", Owner("Deployment", "vote-bot"), {**MESHED, "app": "vote-bot"})
SVC = Service(Key("emojivoto", "web-svc"), "10.2.0.1", selector={"app": "web-svc"})
ALL = (WEB1, WEB2, JOB, BOT)


def world_of(*pods: Pod) -> Snapshot:
    return Snapshot(1, {p.key: p for p in pods}, {SVC.key: SVC})


@pytest.mark.parametrize(
    ("kind", "name", "found"),
    [
        ("deployment", "web", "web-1 web-2"),
        ("deployment", "", "vote-bot-1 web-1 web-2"),
        ("job", "", "migrate-1"),
        ("pod", "web-2", "web-2"),
        ("pod", "", "migrate-1 vote-bot-1 web-1 web-2"),
        ("namespace", "emojivoto", "migrate-1 vote-bot-1 web-1 web-2"),
        ("namespace", "", "migrate-1 vote-bot-1 web-1 web-2"),
        ("service", "web-svc", "web-1 web-2"),
        ("service", "nothing", ""),
        ("deployment", "nothing", ""),
    ],
)
def test_what_a_target_means(kind: str, name: str, found: str) -> None:
    assert " ".join(p.key.name for p in targets(world_of(*ALL), TapQuery(Target(kind, name, "emojivoto")))) == found


def test_an_ended_pod_is_no_target() -> None:
    ended = Pod(WEB1.key, WEB1.uid, WEB1.ip, "web", WEB1.owner, MESHED, phase="Succeeded")
    assert targets(world_of(ended), TapQuery(Target("pod", "", "emojivoto"))) == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            Target("deployment", "nope", "emojivoto"),
            "no pods to tap for type=deployment name=nope in namespace emojivoto",
        ),
        (Target("pod", "vote-bot-1", "emojivoto"), "emojivoto/vote-bot-1 is who watches, and cannot watch itself"),
        (Target("job", "", "emojivoto"), "1 pod found, but not in the mesh: emojivoto/migrate-1"),
    ],
)
def test_nothing_to_tap_says_why(target: Target, message: str) -> None:
    with pytest.raises(tap.NothingToTap) as failure:
        tap.choose(standing(*ALL, own=BOT.key), TapQuery(target))
    assert failure.value.message == message
    assert failure.value.fix


def standing(*pods: Pod, own: Key) -> World:
    """A world that stands still, seen from the pod `own`."""
    world = World(own=own)
    asyncio.run(world.set(world_of(*pods)))
    return world


def test_who_watches_is_left_out() -> None:
    watched = tap.choose(standing(*ALL, own=WEB1.key), TapQuery(Target("deployment", "", "emojivoto")))
    assert {pod.key.name for pod in watched} == {"web-2", "vote-bot-1"}


@pytest.mark.parametrize(
    ("rps", "pods", "limit"), [(100.0, 1, 100), (100.0, 3, 33), (1.0, 5, 1), (0.5, 1, 1), (100.0, 0, 100)]
)
def test_the_rate_is_shared(rps: float, pods: int, limit: int) -> None:
    assert limit_per_pod(rps, pods) == limit


def test_filters_become_a_conjunction() -> None:
    query = TapQuery(
        Target("deployment", "web", "emojivoto"),
        to=Target("deployment", "emoji", "emojivoto"),
        method="post",
        path="/emojivoto",
        authority="emoji-svc.emojivoto:8080",
        scheme="https",
        headers=True,
    )
    request = observe_request(query, 7)
    method, scheme, authority, path, *labels = request.match.all.matches
    assert request.limit == 7
    assert method.http.method.registered == http_types_pb2.HttpMethod.POST
    assert scheme.http.scheme.registered == http_types_pb2.Scheme.HTTPS
    assert (authority.http.authority.exact, path.http.path.prefix) == (query.authority, query.path)
    assert {(m.destination_label.key, m.destination_label.value) for m in labels} == {
        ("namespace", "emojivoto"),
        ("deployment", "emoji"),
    }
    assert request.extract.http.WhichOneof("extract") == "headers"


def test_no_filter_matches_everything_and_asks_for_no_headers() -> None:
    request = observe_request(TapQuery(Target("pod", "", "a"), method=""), 1)
    assert request.match.WhichOneof("match") == "all"
    assert list(request.match.all.matches) == []
    assert not request.HasField("extract")
    odd = observe_request(TapQuery(Target("pod", "", "a"), to=Target("namespace", "b", "b"), method="BREW"), 1)
    assert odd.match.all.matches[0].http.method.unregistered == "BREW"
    assert odd.match.all.matches[1].destination_label == tap_pb2.ObserveRequest.Match.Label(key="namespace", value="b")


def event(direction: int, **http: Any) -> tap_pb2.TapEvent:
    made = tap_pb2.TapEvent(proxy_direction=direction)  # type: ignore[arg-type]
    made.source.ip.ipv4, made.source.port = 0x0A01111D, 33500
    made.destination.ip.ipv4, made.destination.port = 0x0A01111C, 80
    made.http.CopyFrom(tap_pb2.TapEvent.Http(**http))
    return made


def request_event(direction: int = tap_pb2.TapEvent.OUTBOUND) -> tap_pb2.TapEvent:
    init = tap_pb2.TapEvent.Http.RequestInit(authority="web-svc.emojivoto:80", path="/api/list")
    init.id.stream = 1
    init.method.registered = http_types_pb2.HttpMethod.GET
    return event(direction, request_init=init)


def test_an_event_is_enriched_and_renders_as_the_page_shows() -> None:
    made = request_event()
    made.destination_meta.labels.update({"tls": "true", "server_id": "x", "pod": "as the proxy says"})
    record = event_object(made, {p.ip: p for p in ALL})
    assert record["source"] == {
        "ip": "10.1.17.29",
        "port": 33500,
        "metadata": {
            "control_plane_ns": "mantle",
            "deployment": "vote-bot",
            "namespace": "emojivoto",
            "pod": "vote-bot-1",
            "serviceaccount": "web",
        },
    }
    assert record["destination"]["metadata"]["pod"] == "as the proxy says"
    assert record["routeMeta"] is None
    assert record["requestInitEvent"]["headers"] is None
    assert line_of(record) == (
        "req id=0:1 proxy=out src=10.1.17.29:33500 dst=10.1.17.28:80 tls=true :method=GET"
        " :authority=web-svc.emojivoto:80 :path=/api/list"
    )


def test_linkerd_s_word_for_plaintext_becomes_ours() -> None:
    made = request_event(tap_pb2.TapEvent.INBOUND)
    made.source_meta.labels["tls"] = "no_tls_from_remote"
    assert " tls=not_provided_by_remote " in line_of(event_object(made, {}))


def test_ends_tell_grpc_reset_and_plain_apart() -> None:
    end = tap_pb2.TapEvent.Http.ResponseEnd
    plain = event_object(event(1, response_end=end(response_bytes=3)), {})["responseEndEvent"]
    grpc = event_object(event(1, response_end=end(eos=tap_pb2.Eos(grpc_status_code=0))), {})["responseEndEvent"]
    reset = event_object(event(1, response_end=end(eos=tap_pb2.Eos(reset_error_code=0))), {})["responseEndEvent"]
    assert (plain["grpcStatusCode"], "resetErrorCode" in plain) == (None, False)
    assert (grpc["grpcStatusCode"], "resetErrorCode" in grpc) == (0, False)
    assert (reset["grpcStatusCode"], reset["resetErrorCode"]) == (None, 0)


def test_headers_are_text_where_they_can_be() -> None:
    headers = http_types_pb2.Headers()
    headers.headers.add(name="a", value=b"text")
    headers.headers.add(name="b", value=b"\xff\x00")
    init = tap_pb2.TapEvent.Http.ResponseInit(http_status=200, headers=headers)
    init.since_request_init.FromMicroseconds(1_000_482)
    record = event_object(event(1, response_init=init), {})["responseInitEvent"]
    assert record["headers"] == [{"name": "a", "valueStr": "text"}, {"name": "b", "valueBin": "/wA="}]
    assert record["sinceRequestInit"] == {"nanos": 1_000_482_000}


def test_ipv6_addresses() -> None:
    made = request_event()
    made.source.ip.ipv6.first, made.source.ip.ipv6.last = 0x20010DB8 << 32, 1
    assert event_object(made, {})["source"]["ip"] == "2001:db8::1"


class FakeProxies:
    """Each pod answers with the given behaviour; remembers who was asked."""

    def __init__(self, behave: Callable[[Pod], list[tap_pb2.TapEvent] | Unreachable]) -> None:
        self.behave = behave
        self.asked: list[tuple[str, int]] = []
        self.open: set[str] = set()
        self.calls = 0
        self.changed = asyncio.Event()

    async def observe(self, pod: Pod, request: tap_pb2.ObserveRequest) -> AsyncIterator[tap_pb2.TapEvent]:
        self.asked.append((pod.key.name, request.limit))
        self.calls += 1
        answer = self.behave(pod)
        if isinstance(answer, Unreachable):
            raise answer
        for made in answer:
            yield made
        self.open.add(pod.key.name)
        try:
            await asyncio.Event().wait()
        finally:
            self.open.discard(pod.key.name)
            self.calls -= 1
            self.changed.set()


def watch(proxies: FakeProxies, play: Callable[[World, asyncio.Queue[dict[str, Any]]], Any]) -> None:
    """Runs a watch over deployment web while `play` happens, then ends it."""

    async def run() -> None:
        world, seen = World(), asyncio.Queue[dict[str, Any]]()
        await world.set(world_of(WEB1, BOT))
        query = TapQuery(Target("deployment", "web", "emojivoto"))
        async with asyncio.timeout(60):
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(tap.watch(world, proxies, query, seen.put))
                await play(world, seen)
                watching.cancel()
        assert proxies.open == set()

    asyncio.run(run())


def test_a_watch_follows_pods_that_come_and_go() -> None:
    proxies = FakeProxies(lambda _: [request_event()])

    async def play(world: World, seen: asyncio.Queue[dict[str, Any]]) -> None:
        assert "requestInitEvent" in await seen.get()
        assert proxies.asked == [("web-1", 100)]
        await world.set(world_of(WEB1, WEB2))
        await seen.get()
        assert proxies.asked[1:] == [("web-2", 50)]
        await world.set(world_of(WEB2))
        await proxies.changed.wait()
        assert proxies.open == {"web-2"}

    watch(proxies, play)


def test_a_proxy_that_cannot_be_asked_gives_one_notice_and_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "RETRY_SECONDS", (0.01,))
    answers = [Unreachable("tap on emojivoto/web-1: UNAVAILABLE"), Unreachable("again"), [request_event()]]
    proxies = FakeProxies(lambda _: answers.pop(0))

    async def play(world: World, seen: asyncio.Queue[dict[str, Any]]) -> None:
        assert await seen.get() == {
            "notice": {"pod": "emojivoto/web-1", "message": "tap on emojivoto/web-1: UNAVAILABLE"}
        }
        assert "requestInitEvent" in await seen.get()

    watch(proxies, play)


def test_a_request_that_never_ends_does_not_hide_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "WINDOW_SECONDS", 0.01)
    proxies = FakeProxies(lambda _: [request_event()] * 100)  # as many as the limit, and the call stays open

    async def play(world: World, seen: asyncio.Queue[dict[str, Any]]) -> None:
        for _ in range(tap.MAX_DRAINING + 3):
            for _ in range(100):
                await seen.get()
        assert len(proxies.asked) >= tap.MAX_DRAINING + 3
        assert proxies.calls <= tap.MAX_DRAINING + 2

    watch(proxies, play)
    assert proxies.calls == 0
