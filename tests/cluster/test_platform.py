"""The platform port on a real API server: snapshots of real objects, changes, an outage, reviews of real tokens."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mantle.control.topics import Topics
from mantle.core.endpoints import ServiceTarget, depends_on, service_endpoints
from mantle.core.model import Key, Owner, Snapshot
from mantle.core.names import MeshNames
from mantle.core.reasons import NoIdentity, TokenReason
from mantle.core.world import Mesh, World
from mantle.platform.kubernetes import tokens
from mantle.platform.kubernetes.client import from_kubeconfig
from mantle.platform.kubernetes.reflector import Timing
from mantle.platform.kubernetes.world import DISCOVERY, IDENTITY, Kind, KubernetesPlatform, running
from mantle.platform.port import TokenClaims, TokenRejected

from .apiserver import ApiServer
from .test_reflector import client_through
from .wire import wire

AUDIENCE = "identity.mantle.dev"
QUICK = Timing(server=(2.0, 2.0), margin=30.0)
PATIENCE = 120.0
"""Seconds to wait for what comes in milliseconds on a quiet machine."""


class Follower:
    """The newest snapshot of a platform."""

    def __init__(self) -> None:
        self.now = Snapshot()
        self.seen = 0

    async def follow(self, platform: KubernetesPlatform) -> None:
        async for self.now in platform.watch():
            self.seen += 1

    async def until(self, true: Callable[[Snapshot], Any]) -> Snapshot:
        async with asyncio.timeout(PATIENCE):
            while not true(self.now):
                await asyncio.sleep(0.02)
        return self.now

    async def quiet(self) -> Snapshot:
        """The newest snapshot, when there has been no newer one for a while: controllers write after us."""
        seen = -1
        while seen != self.seen:
            seen = self.seen
            await asyncio.sleep(2)
        return self.now


@asynccontextmanager
async def platform(server: ApiServer, kinds: frozenset[Kind]) -> AsyncIterator[tuple[KubernetesPlatform, Follower]]:
    follower = Follower()
    async with from_kubeconfig(server.kubeconfig) as client, running(client, kinds, QUICK) as made:
        task = asyncio.ensure_future(follower.follow(made))
        try:
            await follower.until(lambda now: now.version)
            yield made, follower
        finally:
            task.cancel()
            await asyncio.wait([task])


def apply(server: ApiServer, namespace: str, *objects: dict[str, Any]) -> None:
    document = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
    server.kubectl("-n", namespace, "apply", "-f", "-", input=json.dumps(document))


def a_pod(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {"app": name, "mantle.dev/control-plane-ns": "mantle"},
            "annotations": {"config.mantle.dev/opaque-ports": "9000", "other.example/large": "x" * 5000},
        },
        "spec": {
            "nodeName": "node",
            "initContainers": [
                {"name": "mantle-proxy", "image": "p", "restartPolicy": "Always", "ports": [{"containerPort": 4143}]}
            ],
            "containers": [
                {
                    "name": "app",
                    "image": "a",
                    "ports": [{"name": "http", "containerPort": 8080}],
                    "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}},
                }
            ],
            **spec,
        },
    }


def run_pod(server: ApiServer, namespace: str, name: str, ip: str, started: bool = True, ready: bool = True) -> None:
    """What the kubelet would write."""
    proxy = {
        "name": "mantle-proxy", "started": started, "ready": started, "restartCount": 0, "image": "p", "imageID": "",
        "state": {"running": {}} if started else {"waiting": {}},
    }  # fmt: skip
    status = {
        "phase": "Running",
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        "initContainerStatuses": [proxy],
    }
    patch = json.dumps({"status": status})
    server.kubectl("-n", namespace, "patch", "pod", name, "--subresource=status", "--type=merge", "-p", patch)


def a_node(server: ApiServer) -> None:
    """Slices of pods without a node stay empty, and such pods are taken for garbage after a while."""
    server.kubectl("apply", "-f", "-", input='{"apiVersion":"v1","kind":"Node","metadata":{"name":"node"}}')


async def test_pods_services_and_slices_of_the_cluster(api_server: ApiServer) -> None:
    namespace = await asyncio.to_thread(api_server.new_namespace, "world")
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "annotations": {"config.mantle.dev/opaque-ports": "90"}},
        "spec": {
            "selector": {"app": "web"},
            "ports": [
                {"name": "http", "port": 80, "targetPort": "http", "appProtocol": "kubernetes.io/h2c"},
                {"name": "db", "port": 90, "targetPort": 9000},
            ],
        },
    }
    external = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "away"},
        "spec": {"type": "ExternalName", "externalName": "example.com"},
    }
    headless = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "each"},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "ports": [{"port": 80}]},
    }
    by_hand = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "each-1", "labels": {"kubernetes.io/service-name": "each"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 80}],
        "endpoints": [{"addresses": ["192.168.7.7"]}],
    }
    async with platform(api_server, DISCOVERY) as (_, follower):
        await asyncio.to_thread(a_node, api_server)
        await asyncio.to_thread(apply, api_server, namespace, a_pod("web"), service, external, headless, by_hand)
        await asyncio.to_thread(run_pod, api_server, namespace, "web", "10.9.0.1")
        key = Key(namespace, "web")
        now = await follower.until(
            lambda s: any(e.ready for sl in (s.slices or {}).values() if sl.service == key for e in sl.endpoints)
        )
        web = now.pods[key]
        assert (web.ip, web.ready, web.proxy_started, web.phase) == ("10.9.0.1", True, True, "Running")
        assert web.owner == Owner("Pod", "web")
        assert dict(web.annotations) == {"config.mantle.dev/opaque-ports": "9000"}, "others are not kept"
        assert [(p.name, p.port) for p in web.ports] == [("http", 8080)]
        assert web.probe_paths == ((8080, "/ready"),)
        found = now.services[key]
        assert [(p.name, p.port, p.target_port, p.app_protocol) for p in found.ports] == [
            ("http", 80, "http", "kubernetes.io/h2c"),
            ("db", 90, 9000, ""),
        ]
        assert now.services[Key(namespace, "away")].external_name == "example.com"
        each = now.services[Key(namespace, "each")]
        assert (each.cluster_ip, each.publish_not_ready) == ("None", True)
        slices = {s.key.name: s for s in (now.slices or {}).values() if s.key.namespace == namespace}
        (made,) = (s for s in slices.values() if s.service == key)
        assert {(p.name, p.port) for p in made.ports} == {("http", 8080), ("db", 9000)}
        assert [(e.address, e.pod) for e in made.endpoints] == [("10.9.0.1", key)]
        assert [(e.address, e.pod) for e in slices["each-1"].endpoints] == [("192.168.7.7", None)]
        before = now
        await asyncio.to_thread(run_pod, api_server, namespace, "web", "10.9.0.1", True, False)
        after = await follower.until(lambda s: not s.pods[key].ready)
        assert after.services is before.services or after.services == before.services
        assert all(after.pods[k] is pod for k, pod in before.pods.items() if k != key), "nothing else moves"
        await asyncio.to_thread(api_server.kubectl, "-n", namespace, "delete", "pod", "web", "--force")
        await follower.until(lambda s: key not in s.pods)


async def test_pods_belong_to_the_workload_that_users_know(api_server: ApiServer) -> None:
    namespace = await asyncio.to_thread(api_server.new_namespace, "owners")
    template = {
        "metadata": {"labels": {"app": "web"}},
        "spec": {"containers": [{"name": "app", "image": "a"}], "automountServiceAccountToken": False},
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web"},
        "spec": {"selector": {"matchLabels": {"app": "web"}}, "template": template},
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "once"},
        "spec": {"template": {"spec": {**template["spec"], "restartPolicy": "Never"}}},
    }
    async with platform(api_server, DISCOVERY) as (_, follower):
        await asyncio.to_thread(apply, api_server, namespace, deployment, job)
        wanted = {Owner("Deployment", "web"), Owner("Job", "once")}
        await follower.until(lambda s: {p.owner for k, p in s.pods.items() if k.namespace == namespace} == wanted)


async def test_an_outage_moves_nothing(api_server: ApiServer) -> None:
    async with platform(api_server, DISCOVERY) as (made, follower):
        namespace = await asyncio.to_thread(api_server.new_namespace, "outage")
        await asyncio.to_thread(apply, api_server, namespace, a_pod("web"))
        key = Key(namespace, "web")
        await follower.until(lambda s: key in s.pods)
        before = await follower.quiet()
        with api_server.without_api():
            await follower.until(lambda _: all(r.trouble for r in made.reflectors.values()))
            assert follower.now is before
        await asyncio.to_thread(api_server.wait_ready)
        await follower.until(lambda _: not any(r.trouble for r in made.reflectors.values()))
        now = follower.now
        for kind in ("pods", "services", "slices"):
            known: dict[Key, object] = getattr(before, kind) or {}
            moved = [key for key, value in (getattr(now, kind) or {}).items() if known.get(key) is not value]
            assert not moved, "the new lists replaced nothing that is the same"


async def test_a_subscriber_hears_nothing_of_an_outage_and_of_a_change_at_once(api_server: ApiServer) -> None:
    """From the API server through snapshots and topics to what a proxy would be sent."""
    namespace = await asyncio.to_thread(api_server.new_namespace, "topic")
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}}
    endpoints = [{"addresses": ["10.9.0.20"], "targetRef": {"kind": "Pod", "name": "web"}}]
    by_hand = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080}],
        "endpoints": endpoints,
    }
    await asyncio.to_thread(apply, api_server, namespace, a_pod("web"), service, by_hand)
    await asyncio.to_thread(run_pod, api_server, namespace, "web", "10.9.0.20", False)
    topics = Topics(World.empty(Mesh(MeshNames("mantle", "cluster.local"))))
    target = ServiceTarget(Key(namespace, "web"), 80)
    said: list[Any] = []

    async def read() -> None:
        with topics.read(
            "t", lambda world: service_endpoints(world, target), lambda _, __: (), depends_on(target)
        ) as reader:
            async for state in reader.states():
                said.append([e.tls for e in state.value.by_address.values()])

    identity = f"default.{namespace}.serviceaccount.identity.mantle.cluster.local"
    async with platform(api_server, DISCOVERY) as (made, follower), asyncio.timeout(300):
        following = asyncio.ensure_future(topics.follow(made.watch()))
        await follower.until(lambda s: topics.known.is_set() and Key(namespace, "web") in s.services)
        reading = asyncio.ensure_future(read())
        try:
            await follower.until(lambda _: said == [[NoIdentity.PROXY_NOT_STARTED]])
            with api_server.without_api():
                await follower.until(lambda _: all(r.trouble for r in made.reflectors.values()))
            await asyncio.to_thread(api_server.wait_ready)
            await follower.until(lambda _: not any(r.trouble for r in made.reflectors.values()))
            await asyncio.to_thread(run_pod, api_server, namespace, "web", "10.9.0.20")
            await follower.until(lambda _: len(said) > 1)
            assert said == [[NoIdentity.PROXY_NOT_STARTED], [identity]]
        finally:
            for task in (following, reading):
                task.cancel()
            await asyncio.wait([following, reading])


# ---- tokens ----


@asynccontextmanager
async def token_play(server: ApiServer) -> AsyncIterator[tuple[KubernetesPlatform, str, Callable[..., str]]]:
    """Identity's platform, a namespace with the running pod `web`, and its tokens."""
    namespace = await asyncio.to_thread(server.new_namespace, "tokens")
    await asyncio.to_thread(a_node, server)
    await asyncio.to_thread(apply, server, namespace, a_pod("web"))
    await asyncio.to_thread(run_pod, server, namespace, "web", "10.9.0.7")
    async with platform(server, IDENTITY) as (made, follower):
        await follower.until(lambda s: (web := s.pods.get(Key(namespace, "web"))) and web.ip)
        await made.tokens.fetch_keys()

        def token(*options: str, audience: str = AUDIENCE) -> str:
            return server.token(namespace, "default", f"--audience={audience}", *options)

        yield made, namespace, token


BOUND = ("--bound-object-kind=Pod", "--bound-object-name=web")


@pytest.mark.parametrize("way", ["api", "keys"])
async def test_a_pods_token_is_accepted(api_server: ApiServer, way: str) -> None:
    async with token_play(api_server) as (made, namespace, token):
        text = (await asyncio.to_thread(token, *BOUND)).encode()
        claims = await review(api_server, made, text, way)
        assert isinstance(claims, TokenClaims), claims
        assert (claims.namespace, claims.service_account, claims.pod) == (namespace, "default", "web")
        assert claims.pod_ip == "10.9.0.7"
        assert made.tokens.reviews == {(way, "accepted"): 1}


@pytest.mark.parametrize("way", ["api", "keys"])
async def test_a_token_for_somebody_else_says_found_wanted_and_fix(api_server: ApiServer, way: str) -> None:
    async with token_play(api_server) as (made, _, token):
        text = (await asyncio.to_thread(token, *BOUND, audience="vault")).encode()
        refused = await review(api_server, made, text, way)
        assert isinstance(refused, TokenRejected)
        assert refused.reason == TokenReason.WRONG_AUDIENCE
        assert "the token is for vault, wanted identity.mantle.dev" in refused.detail
        assert "projected token" in refused.detail


@pytest.mark.parametrize("way", ["api", "keys"])
async def test_a_token_that_no_pod_holds_is_refused(api_server: ApiServer, way: str) -> None:
    async with token_play(api_server) as (made, _, token):
        refused = await review(api_server, made, (await asyncio.to_thread(token)).encode(), way)
        assert isinstance(refused, TokenRejected)
        assert refused.reason == TokenReason.NOT_BOUND


@pytest.mark.parametrize("way", ["api", "keys"])
async def test_a_forged_token_is_refused(api_server: ApiServer, way: str) -> None:
    async with token_play(api_server) as (made, _, token):
        head, body, signature = (await asyncio.to_thread(token, *BOUND)).split(".")
        forged = f"{head}.{body}.{signature[:-8]}AAAAAAAA"
        refused = await review(api_server, made, forged.encode(), way)
        assert isinstance(refused, TokenRejected)
        assert refused.reason in (TokenReason.BAD_SIGNATURE, TokenReason.NOT_AUTHENTICATED)


@pytest.mark.parametrize("way", ["api", "keys"])
async def test_the_token_of_a_pod_that_is_gone_is_refused(api_server: ApiServer, way: str) -> None:
    async with token_play(api_server) as (made, namespace, token):
        text = (await asyncio.to_thread(token, *BOUND)).encode()
        kubectl = ("-n", namespace, "delete", "pod", "web", "--force", "--grace-period=0")
        await asyncio.to_thread(api_server.kubectl, *kubectl)
        follower = Follower()
        task = asyncio.ensure_future(follower.follow(made))
        await follower.until(lambda s: s.version and Key(namespace, "web") not in s.pods)
        task.cancel()
        refused = await review(api_server, made, text, way)
        assert isinstance(refused, TokenRejected)
        # The API server keeps its own cache of pods for a moment; what it then accepts, our look at the pod refuses.
        assert refused.reason in (TokenReason.POD_GONE, TokenReason.NOT_AUTHENTICATED)


async def test_a_silent_api_server_does_not_hold_up_certificates(
    api_server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests arrive nowhere and nobody says so. The keys answer, and the next ones do not wait for the server."""
    wait = 4.0  # on a busy machine the keys' own answer may take longer than what identity waits for the server
    monkeypatch.setattr(tokens, "REVIEW_TIMEOUT", wait)
    monkeypatch.setattr(tokens, "SPARED", 300.0)
    await asyncio.to_thread(a_node, api_server)
    namespace = await asyncio.to_thread(api_server.new_namespace, "silent")
    await asyncio.to_thread(apply, api_server, namespace, a_pod("web"))
    await asyncio.to_thread(run_pod, api_server, namespace, "web", "10.9.0.9")
    options = ("--audience=identity.mantle.dev", *BOUND)
    token = (await asyncio.to_thread(api_server.token, namespace, "default", *options)).encode()
    port = urlsplit(api_server.url).port
    assert port
    clock = asyncio.get_running_loop().time
    async with (
        wire(port) as relay,
        client_through(api_server, relay.port, tmp_path) as client,
        running(client, IDENTITY, Timing(server=(20.0, 20.0), margin=5.0)) as made,
    ):
        async for snapshot in made.watch():
            if Key(namespace, "web") in snapshot.pods:
                break
        await made.tokens.fetch_keys()
        relay.go_silent()
        took = []
        for _ in range(3):
            began = clock()
            assert isinstance(await made.review_token(token, [AUDIENCE]), TokenClaims)
            took.append(clock() - began)
        assert made.tokens.reviews == {("keys", "accepted"): 3}
        assert wait <= took[0] < 2 * wait
        assert max(took[1:]) < wait


async def review(server: ApiServer, made: KubernetesPlatform, token: bytes, way: str) -> TokenClaims | TokenRejected:
    """One review by the API server, or with the API server dead."""
    if way == "api":
        return await made.review_token(token, [AUDIENCE])
    with server.without_api():
        outcome = await made.review_token(token, [AUDIENCE])
    await asyncio.to_thread(server.wait_ready)
    return outcome
