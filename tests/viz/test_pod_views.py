"""Views of single pods and of discovery: who is asked, and that one that does not answer hides no other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from mantle.core.model import Key, Owner, Pod, Service, ServicePort, Snapshot
from mantle.viz.discovery import NotKnown
from mantle.viz.fields import BadRequest
from mantle.viz.pod_views import PodViews
from mantle.viz.proxies import Unreachable
from mantle.viz.world import World

MESHED = {"mantle.dev/control-plane-ns": "mantle"}


def pod(name: str, namespace: str = "emojivoto", meshed: bool = True, **labels: str) -> Pod:
    found = {**labels, **(MESHED if meshed else {})}
    return Pod(Key(namespace, name), name, "10.0.0.1", "sa", Owner("Deployment", name[:-2]), found, proxy_started=True)


PODS = [pod("web-1", app="web"), pod("web-2", app="web"), pod("emoji-1"), pod("plain-1", meshed=False)]
PODS += [pod("web-1", "other", app="web")]
SERVICE = Service(Key("emojivoto", "web-svc"), "10.1.0.1", (ServicePort("http", 80, 8080),), {"app": "web"})


class FakeProxies:
    async def metrics(self, pod: Pod) -> str:
        return f"up 1 # {pod.key}\n"

    async def certificate(self, pod: Pod) -> str:
        if pod.key.name == "web-2":
            raise Unreachable("GET http://10.0.0.1:4191/identity answered 404")
        return f"PEM of {pod.key}"


class FakeDiscovery:
    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def endpoints(self, authority: str) -> list[dict[str, Any]]:
        self.asked.append(authority)
        if authority.startswith("nope"):
            raise NotKnown(f"there is no service port {authority}")
        return [{"ip": "10.0.0.1", "port": 8080}]

    async def inbound(self, pod: Key, port: int) -> dict[str, Any]:
        self.asked.append((str(pod), port))
        return {"labels": {"name": "all-unauthenticated"}}

    async def outbound(self, authority: str) -> dict[str, Any]:
        raise Unreachable("policy answered UNAVAILABLE: starting")


def ask(view: str, **fields: str) -> Any:
    async def run() -> Any:
        world = World()
        await world.set(Snapshot(1, {p.key: p for p in PODS}, {SERVICE.key: SERVICE}))
        views = PodViews(world, FakeProxies(), DISCOVERY, "cluster.local").views
        answer: Awaitable[Any] = views[view](fields)
        return await answer

    return asyncio.run(run())


DISCOVERY = FakeDiscovery()


@pytest.mark.parametrize(
    ("fields", "pods"),
    [
        ({"resource": "deployment", "name": "emoji"}, ["emoji-1"]),
        ({"resource": "deployment"}, ["emoji-1", "web-1", "web-2"]),
        ({"resource": "pod", "selector": "app=web"}, ["web-1", "web-2"]),
        ({"resource": "service", "name": "web-svc"}, ["web-1", "web-2"]),
        ({"resource": "namespace"}, ["emoji-1", "web-1", "web-2"]),
        ({"resource": "namespace", "name": "emojivoto"}, ["emoji-1", "web-1", "web-2"]),
        ({"resource": "namespace", "name": "other", "all": "1"}, ["web-1"]),
        ({"resource": "pod", "name": "web-1", "all": "1"}, ["web-1", "web-1"]),
    ],
)
def test_which_pods_are_asked(fields: dict[str, str], pods: list[str]) -> None:
    where = {} if "all" in fields else {"namespace": "emojivoto"}
    found = ask("proxymetrics", **where, **fields)["pods"]
    assert [row["pod"] for row in found] == pods
    assert all(row["text"].startswith("up 1") for row in found)


def test_a_proxy_that_does_not_answer_hides_no_other() -> None:
    first, second = ask("certificates", namespace="emojivoto", resource="deployment", name="web")["certificates"]
    assert first == {"namespace": "emojivoto", "pod": "web-1", "pem": "PEM of emojivoto/web-1"}
    assert second == {
        "namespace": "emojivoto",
        "pod": "web-2",
        "error": "GET http://10.0.0.1:4191/identity answered 404",
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"resource": "pod", "name": "plain-1"}, "no pod of pod/plain-1 in namespace emojivoto is in the mesh"),
        ({"resource": "pod", "name": "gone"}, "there is no pod of pod/gone in namespace emojivoto"),
        ({"resource": "namespace", "name": "other"}, "namespace other is asked for in namespace emojivoto"),
        ({"resource": "thing", "selector": "a=("}, "resource is 'thing'; the selector has 'a=('"),
    ],
)
def test_when_there_is_nobody_to_ask(fields: dict[str, str], said: str) -> None:
    with pytest.raises(BadRequest) as refused:
        ask("certificates", namespace="emojivoto", **fields)
    assert said in str(refused.value)
    assert all(fix for _, fix in refused.value.mistakes)


@pytest.mark.parametrize(
    "authority", ["web-svc.emojivoto:80", "web-svc.emojivoto.svc:80", "web-svc.emojivoto.svc.cluster.local.:80"]
)
def test_endpoints_of_a_name_however_it_is_written(authority: str) -> None:
    found = ask("endpoints", namespace="emojivoto", authority=authority)
    assert found["authority"] == DISCOVERY.asked[-1] == "web-svc.emojivoto.svc.cluster.local:80"
    assert found["endpoints"][0]["ip"] == "10.0.0.1"


@pytest.mark.parametrize(
    ("authority", "said", "status"),
    [
        ("web-svc.other:80", "is in namespace other, and emojivoto was asked for", 400),
        ("web-svc:80", "is no authority of a service", 400),
        ("web-svc.emojivoto", "is no authority of a service", 400),
        ("nope.emojivoto:80", "there is no service port nope.emojivoto.svc.cluster.local:80", 400),
    ],
)
def test_endpoints_are_those_of_the_namespace_that_was_asked_for(authority: str, said: str, status: int) -> None:
    with pytest.raises(BadRequest) as refused:
        ask("endpoints", namespace="emojivoto", authority=authority)
    assert said in str(refused.value)
    assert refused.value.status == status


def test_policies_of_pods_and_of_services() -> None:
    found = ask("policies", namespace="emojivoto", resource="deployment", name="web", port="8080")["pods"]
    assert [(row["pod"], row["inbound"]["labels"]["name"]) for row in found] == [
        ("web-1", "all-unauthenticated"),
        ("web-2", "all-unauthenticated"),
    ]
    assert ("emojivoto/web-1", 8080) in DISCOVERY.asked
    with pytest.raises(BadRequest) as refused:
        ask("policies", namespace="emojivoto", resource="service", name="web-svc", port="80")
    assert refused.value.status == 503
    with pytest.raises(BadRequest) as wrong:
        ask("policies", namespace="emojivoto", resource="service", port="0")
    assert len(wrong.value.mistakes) == 2
