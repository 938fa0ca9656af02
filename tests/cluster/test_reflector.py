"""The reflector against a real API server that is cut off, silenced, killed and started again."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import msgspec
import pytest

from mantle.core.reasons import WatchEnded
from mantle.platform.kubernetes.client import Client, from_kubeconfig
from mantle.platform.kubernetes.reflector import Change, Reflector, Resource, Timing

from .apiserver import ApiServer
from .wire import Wire, wire

QUICK = Timing(server=(1.0, 1.0), margin=60.0)
"""Watches of one second: their clean ends are part of every test. A busy machine's silence is none."""
PATIENCE = 120.0
"""Seconds to wait for what comes in milliseconds on a quiet machine."""


class Meta(msgspec.Struct):
    name: str


class ConfigMap(msgspec.Struct):
    metadata: Meta
    data: dict[str, str] = {}


Seen = Reflector[ConfigMap, str, dict[str, str]]


def config_maps(namespace: str) -> Resource[ConfigMap, str, dict[str, str]]:
    """The config maps of a namespace but for the cluster's own."""
    return Resource(
        f"/api/v1/namespaces/{namespace}/configmaps",
        ConfigMap,
        lambda raw: (raw.metadata.name, raw.data if raw.metadata.name != "kube-root-ca.crt" else None),
        lambda sketch, known: (sketch.name, known.get(sketch.name)),
    )


class Play:
    """A reflector of a namespace, what it told, and the hands that change the namespace."""

    def __init__(self, server: ApiServer, namespace: str) -> None:
        self.server, self.namespace = server, namespace
        self.told: list[Change[str, dict[str, str]]] = []
        self.reflector: Seen

    def heard(self, changes: tuple[Change[str, dict[str, str]], ...]) -> None:
        self.told += changes

    async def put(self, name: str, value: str) -> None:
        manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"v": value}}
        await self.kubectl("apply", "-f", "-", input=json.dumps(manifest))

    async def delete(self, name: str) -> None:
        await self.kubectl("delete", "configmap", name)

    async def kubectl(self, *args: str, input: str | None = None) -> str:
        return await asyncio.to_thread(self.server.kubectl, "-n", self.namespace, *args, input=input)

    async def until(self, true: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                while not true():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            seen = f"{self.reflector.objects}, trouble: {self.reflector.trouble}" if hasattr(self, "reflector") else ""
            raise AssertionError(f"{what}: not within {PATIENCE} s; last seen: {seen}") from None

    def values(self) -> dict[str, str]:
        return {name: data["v"] for name, data in self.reflector.objects.items()}


def client_through(server: ApiServer, port: int, directory: Path) -> Client:
    """A client that believes the API server listens on `port`."""
    text = server.kubeconfig.read_text().replace(server.url, f"https://127.0.0.1:{port}")
    path = directory / "kubeconfig"
    path.write_text(text)
    return from_kubeconfig(path)


@asynccontextmanager
async def reflecting(client: Client, play: Play, timing: Timing = QUICK) -> AsyncIterator[None]:
    async with client:
        play.reflector = Reflector(client.http, config_maps(play.namespace), play.heard, timing)
        task = asyncio.ensure_future(play.reflector.run())
        try:
            async with asyncio.timeout(PATIENCE):
                await play.reflector.synced.wait()
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled(), task.exception()


@asynccontextmanager
async def wired(server: ApiServer, directory: Path, timing: Timing = QUICK) -> AsyncIterator[tuple[Play, Wire]]:
    """A reflector whose connections go through a wire that the test holds."""
    play = Play(server, await asyncio.to_thread(server.new_namespace, "reflector"))
    await play.put("one", "1")
    await play.put("two", "2")
    port = urlsplit(server.url).port
    assert port
    async with wire(port) as relay, reflecting(client_through(server, relay.port, directory), play, timing):
        yield play, relay


async def test_lists_then_follows_across_ends_of_watches(api_server: ApiServer, tmp_path: Path) -> None:
    async with wired(api_server, tmp_path) as (play, _):
        assert play.values() == {"one": "1", "two": "2"}
        await play.put("three", "3")
        await play.until(lambda: "three" in play.values(), "an addition arrives")
        one = play.reflector.objects["one"]
        await asyncio.sleep(2.5)  # virtual time cannot pass at the real server: two of its watches end
        await play.put("two", "22")
        await play.delete("three")
        await play.until(lambda: play.values() == {"one": "1", "two": "22"}, "changes and deletions arrive")
        assert play.reflector.objects["one"] is one
        assert play.reflector.lists == 1, "a watch that ends in time goes on from where it was"


async def test_a_list_of_several_pages(api_server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mantle.platform.kubernetes.reflector.PAGE", 2)
    play = Play(api_server, await asyncio.to_thread(api_server.new_namespace, "pages"))
    for number in range(5):
        await play.put(f"n{number}", str(number))
    async with reflecting(from_kubeconfig(api_server.kubeconfig), play):
        assert play.values() == {f"n{number}": str(number) for number in range(5)}


async def test_deletions_while_cut_off_come_out_of_the_new_list(api_server: ApiServer, tmp_path: Path) -> None:
    async with wired(api_server, tmp_path) as (play, relay):
        one = play.reflector.objects["one"]
        server, relay.to = relay.to, 1  # nobody listens on port 1
        relay.cut()
        await play.until(lambda: play.reflector.trouble is not None, "the loss is noticed")
        await play.delete("two")
        assert play.values() == {"one": "1", "two": "2"}, "meanwhile, what is known is kept"
        play.told.clear()
        relay.to = server
        await play.until(lambda: play.values() == {"one": "1"}, "the deletion arrives")
        assert [(c.name, c.now) for c in play.told] == [("two", None)], "and nothing else moves"
        assert play.reflector.objects["one"] is one


async def test_a_half_open_connection_is_noticed(api_server: ApiServer, tmp_path: Path) -> None:
    async with wired(api_server, tmp_path, Timing(server=(1.0, 1.0), margin=1.0)) as (play, relay):
        relay.go_silent()
        await play.put("two", "22")
        await play.until(lambda: play.reflector.trouble is WatchEnded.SILENT, "silence is noticed")
        relay.speak()
        await play.until(lambda: play.values() == {"one": "1", "two": "22"}, "the change arrives")


async def test_the_api_server_is_killed_and_started_again(api_server: ApiServer, tmp_path: Path) -> None:
    async with wired(api_server, tmp_path) as (play, _):
        before = dict(play.reflector.objects)
        play.told.clear()
        with api_server.without_api():
            await play.until(lambda: play.reflector.trouble is WatchEnded.UNREACHABLE, "the loss is noticed")
            assert play.values() == {"one": "1", "two": "2"}
        await asyncio.to_thread(api_server.wait_ready)
        await play.until(lambda: play.reflector.trouble is None, "the watch works again")
        assert play.told == [], "nothing changed, so nothing moves"
        assert all(play.reflector.objects[name] is value for name, value in before.items())
        await play.put("three", "3")
        await play.until(lambda: "three" in play.values(), "changes arrive as before")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (httpx2.Response(410, json={"kind": "Status", "code": 410, "message": "too old"}), WatchEnded.GONE),
        (httpx2.Response(429, headers={"Retry-After": "1"}, text="slow down"), WatchEnded.THROTTLED),
        (httpx2.Response(500, text="etcd is away"), WatchEnded.SERVER_ERROR),
        (
            httpx2.Response(200, text='{"type":"ERROR","object":{"kind":"Status","code":410,"message":"old"}}\n'),
            WatchEnded.GONE,
        ),
        (httpx2.Response(200, text=""), WatchEnded.TOO_SHORT),
        (httpx2.Response(200, text='{"type":"ADDED","object":{"metadata":{}}}\n'), WatchEnded.UNREADABLE),
    ],
    ids=["410", "429", "500", "410 in the stream", "empty", "unreadable"],
)
async def test_what_the_server_says_to_a_watch(
    api_server: ApiServer, answer: httpx2.Response, why: WatchEnded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real server in everything but one answer, which it gives only when its history is short or it is busy."""
    play = Play(api_server, await asyncio.to_thread(api_server.new_namespace, "answers"))
    await play.put("one", "1")
    client = from_kubeconfig(api_server.kubeconfig)
    clock = asyncio.get_running_loop().time
    asked: list[float] = []
    real = client.http.send

    async def send(request: httpx2.Request, **options: object) -> httpx2.Response:
        if "watch" in request.url.params:
            asked.append(clock())
            if len(asked) <= 2:
                return httpx2.Response(
                    answer.status_code, headers=answer.headers, content=answer.content, request=request
                )
        return await real(request, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(client.http, "send", send)
    async with reflecting(client, play):
        one = play.reflector.objects["one"]
        await play.until(lambda: play.reflector.trouble is why, f"{why} is noticed")
        await play.put("two", "2")
        await play.until(lambda: len(asked) >= 3 and "two" in play.values(), "it goes on")
        assert play.reflector.objects["one"] is one
        assert play.reflector.lists == (1 if why is WatchEnded.TOO_SHORT else 3)
        if why is WatchEnded.THROTTLED:
            assert asked[1] - asked[0] >= 1.0, "the server said how long to wait"


async def test_a_client_without_rights_says_what_it_needs(
    api_server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    namespace = await asyncio.to_thread(api_server.new_namespace, "rights")
    play = Play(api_server, namespace)
    client = from_kubeconfig(api_server.kubeconfig_of(namespace, "default"))
    async with client:
        reflector = Reflector(client.http, config_maps(namespace), play.heard, QUICK)
        task = asyncio.ensure_future(reflector.run())
        try:
            await play.until(lambda: reflector.trouble is WatchEnded.FORBIDDEN, "it is refused")
        finally:
            task.cancel()
            await asyncio.wait([task])
    assert "this service account needs list and watch" in caplog.text
