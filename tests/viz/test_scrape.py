"""The scraper: what it asks of whom, what it makes of it, and that a pod that fails hides nobody else."""

from __future__ import annotations

import asyncio

from mantle.core.model import Key, Owner, Pod, Snapshot
from mantle.gen.mantle.v1 import edges_pb2
from mantle.viz.proxies import Unreachable
from mantle.viz.scrape import Scraper, samples_of
from mantle.viz.world import World

MESHED = {"mantle.dev/control-plane-ns": "mantle"}


def pod(name: str, *, namespace: str = "emojivoto", labels: dict[str, str] = MESHED, started: bool = True) -> Pod:
    owner = Owner("Deployment", name)
    return Pod(Key(namespace, f"{name}-1"), f"uid-{name}", "10.203.0.9", name, owner, labels, proxy_started=started)


class FakeProxies:
    """Every pod has served `count` requests, and one probe of the router twice."""

    def __init__(self) -> None:
        self.count: dict[str, float] = {}
        self.failing: set[str] = set()
        self.asked: list[tuple[str, int]] = []
        self.kept: set[str] = set()

    async def metrics(self, pod: Pod, port: int = 4191) -> str:
        self.asked.append((pod.owner.name, port))
        if pod.owner.name in self.failing:
            raise Unreachable("GET /metrics: connection refused")
        return f'request_total{{direction="inbound"}} {self.count.get(pod.owner.name, 0)}\nother_total 5\n'

    async def clients(self, pod: Pod) -> list[edges_pb2.Edge]:
        return [edges_pb2.Edge(client_ip="10.203.0.1", port=8080, no_tls_reason="not_provided_by_remote", total=2)]

    async def keep_only(self, uids: set[str]) -> None:
        self.kept = uids


class Stage:
    """A scraper on virtual time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.world, self.proxies = World(own=Key("mantle", "mantle-viz-1")), FakeProxies()
        self.scraper = Scraper(self.world, self.proxies, lambda: self.now)

    async def round(self, *pods: Pod, **counts: float) -> None:
        """Two seconds later there are these pods, and they have served so much."""
        self.now += 2.0
        await self.world.set(Snapshot(int(self.now), {p.key: p for p in pods}))
        self.proxies.count.update(counts)
        await self.scraper.round()

    async def grown(self, family: str) -> dict[str, float]:
        traffic = await self.scraper.traffic(60)
        return {point.subject.owner.name: point.value for point in traffic.grown(family)}


def test_what_was_there_before_is_a_baseline_and_what_comes_later_counts_whole() -> None:
    async def play() -> None:
        stage = Stage()
        await stage.round(pod("web"), web=100)
        await stage.round(pod("web"), pod("emoji"), web=103, emoji=7)
        assert await stage.grown("request_total") == {"web": 3, "emoji": 7}
        assert await stage.grown("mantle_edge_clients_total") == {"emoji": 2}
        assert await stage.grown("other_total") == {}

    asyncio.run(play())


def test_only_running_proxies_are_asked() -> None:
    async def play() -> None:
        stage = Stage()
        ended = Pod(Key("a", "b"), "c", "10.203.0.8", "d", Owner("Job", "done"), MESHED, (), "Succeeded", False)
        await stage.round(pod("web"), pod("plain", labels={}), pod("starting", started=False), ended)
        assert [name for name, _ in stage.proxies.asked] == ["web"]
        assert stage.proxies.kept == {"uid-web"}

    asyncio.run(play())


def test_destination_s_own_admin_port_is_asked_each_round() -> None:
    async def play() -> None:
        stage = Stage()
        await stage.round(pod("mantle-destination", namespace="mantle"), pod("mantle-destination"))
        assert ("mantle-destination", 9996) in stage.proxies.asked
        assert len(stage.proxies.asked) == 3

    asyncio.run(play())


def test_our_own_proxy_is_asked_for_metrics_only() -> None:
    async def play() -> None:
        stage = Stage()
        await stage.round()
        await stage.round(pod("mantle-viz", namespace="mantle"), pod("web"), web=1, **{"mantle-viz": 2})
        assert await stage.grown("request_total") == {"web": 1, "mantle-viz": 2}
        assert await stage.grown("mantle_edge_clients_total") == {"web": 2}

    asyncio.run(play())


def test_a_failing_pod_is_named_and_hides_nobody() -> None:
    async def play() -> None:
        stage = Stage()
        assert stage.scraper.health().age_seconds is None
        await stage.round(pod("web"), pod("emoji"))
        stage.proxies.failing = {"web"}
        await stage.round(pod("web"), pod("emoji"), emoji=4)
        stage.now += 1.0
        health = stage.scraper.health()
        assert health.failing == {"emojivoto/web-1": "GET /metrics: connection refused"}
        assert (health.pods, health.age_seconds) == (2, 1.0)
        assert await stage.grown("request_total") == {"emoji": 4}
        stage.proxies.failing = set()
        await stage.round(pod("web"), web=9)
        assert stage.scraper.health().failing == {}
        assert (await stage.grown("request_total"))["web"] == 9

    asyncio.run(play())


def test_a_table_of_clients_as_samples() -> None:
    rows = [
        edges_pb2.Edge(client_ip="10.0.0.1", port=80, client_id="web.emojivoto", open=1, total=3),
        edges_pb2.Edge(client_ip="10.0.0.2", port=80, passthru_sni="example.com", total=1),
        edges_pb2.Edge(client_ip="10.0.0.3", port=80, total=1),
    ]
    tls = {series.label("client_ip"): series.label("tls") for series in samples_of(rows)}
    assert tls == {"10.0.0.1": "true", "10.0.0.2": "opaque", "10.0.0.3": ""}
    assert sorted(samples_of(rows[:1]).values()) == [1.0, 3.0]
