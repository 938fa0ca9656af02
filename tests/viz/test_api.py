"""The API over a real Unix socket, and the whole component against a platform that exists only here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from viz_play import MESHED, SECURE, WEB, FakeProxies, FakeSource, series

from mantle.core.model import Key, Owner, Pod, Snapshot
from mantle.core.names import MeshNames
from mantle.platform.port import TokenClaims, TokenRejected
from mantle.viz import api, app
from mantle.viz.api import Api
from mantle.viz.mesh import subject_of
from mantle.viz.source import Point, Traffic
from mantle.viz.world import World


class Client:
    """Talks to the API's socket."""

    def __init__(self, session: aiohttp.ClientSession, source: FakeSource, proxies: FakeProxies) -> None:
        self.session, self.source, self.proxies = session, source, proxies

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(f"http://viz{path}") as answer:
            return answer.status, await answer.json()

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self.session.post(f"http://viz{path}", data=json.dumps(body)) as answer:
            return answer.status, await answer.json()


def play(path: Path, scene: Any) -> None:
    async def run() -> None:
        world, source, proxies = World(), FakeSource(), FakeProxies()
        await world.set(Snapshot(1, {WEB.key: WEB}))
        async with contextlib.AsyncExitStack() as servers, asyncio.timeout(60):
            await app._serve_socket(servers, Api(world, source, proxies, source).application(), path)
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
                await scene(Client(session, source, proxies))

    asyncio.run(run())


def test_edges_stat_and_summary(tmp_path: Path) -> None:
    async def scene(client: Client) -> None:
        status, body = await client.get("/v1/edges?resource=deployment&namespace=emojivoto")
        assert (status, [(e["src"], e["dst"], e["counts"]) for e in body["edges"]]) == (
            200, [("web", "emoji", {"secured": 30})]
        )  # fmt: skip
        status, body = await client.get("/v1/stat?resource=authority&namespace=emojivoto&window=60")
        assert [(r["name"], r["rps"], r["tls"]) for r in body["rows"]] == [("emoji-svc.emojivoto:8080", 0.5, 1.0)]
        status, body = await client.get("/v1/edges?resource=pod&all=1&window=15")
        assert client.source.windows == [300.0, 60.0, 15.0]
        status, body = await client.get("/v1/summary")
        assert (body["secured"], body["pods_seen"], body["scrape_age_seconds"], len(body["edges"])) == (1, 1, 1.0, 1)

    play(tmp_path / "viz.sock", scene)


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    async def scene(client: Client) -> None:
        status, body = await client.get("/v1/stat?resource=thing&window=14&to=deployment/a&from=alien/b")
        assert status == 400
        assert len(body["errors"]) == 4
        assert all(error["fix"] for error in body["errors"])
        assert "metrics time window needs to be at least 15s" in body["errors"][1]["message"]
        status, body = await client.post("/v1/tap", {"target": {"kind": "x"}, "to": 7, "method": 1, "max_rps": 0})
        assert (status, len(body["errors"])) == (400, 4)
        for bad in ("[]", "nonsense"):
            async with client.session.post("http://viz/v1/tap", data=bad) as answer:
                assert answer.status == 400
        assert (await client.get("/v1/nothing"))[0] == 404

    play(tmp_path / "viz.sock", scene)


def test_a_silent_tap_beats_so_that_relays_notice_a_reader_that_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "HEARTBEAT_SECONDS", 0.01)

    async def scene(client: Client) -> None:
        target = {"kind": "deployment", "name": "", "namespace": "emojivoto"}
        async with client.session.post("http://viz/v1/tap", data=json.dumps({"target": target})) as answer:
            lines = {await answer.content.readline() for _ in range(4)}
        assert b"\n" in lines

    play(tmp_path / "viz.sock", scene)


def test_tap_streams_until_the_client_goes(tmp_path: Path) -> None:
    async def scene(client: Client) -> None:
        target = {"kind": "deployment", "name": "", "namespace": "emojivoto"}
        async with client.session.post("http://viz/v1/tap", data=json.dumps({"target": target})) as answer:
            assert answer.content_type == "application/x-ndjson"
            event = json.loads(await answer.content.readline())
            assert event["requestInitEvent"]["path"] == "/"
            answer.close()
        await client.proxies.closed.wait()
        target["namespace"] = "empty"
        status, body = await client.post("/v1/tap", {"target": target})
        assert (status, body["errors"][0]["message"][:14]) == (404, "no pods to tap")

    play(tmp_path / "viz.sock", scene)


class FakePlatform:
    """One snapshot."""

    async def watch(self) -> AsyncIterator[Snapshot]:
        yield Snapshot(1, {WEB.key: WEB})
        await asyncio.Event().wait()

    async def review_token(self, token: bytes, audiences: Sequence[str]) -> TokenClaims | TokenRejected:
        raise NotImplementedError


def test_the_component_starts_serves_and_stops(tmp_path: Path) -> None:
    path = tmp_path / "viz.sock"
    options = app.Options("127.0.0.1", 0, path, path, MeshNames("mantle", "cluster.local"), 60.0, (), "viz-1")

    async def run() -> None:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            running = group.create_task(app.run(options, FakePlatform(), partial(app._serve_on_machine, options)))
            while not path.exists():  # noqa: ASYNC110  (the file system has no event)
                await asyncio.sleep(0.01)
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
                while True:  # the pod's address answers nothing: the first round ends with its reason
                    async with session.get("http://viz/v1/summary") as answer:
                        body = await answer.json()
                    if body["failing"]:
                        break
                    await asyncio.sleep(0.01)
            assert "emojivoto/web-1" in body["failing"]
            os.kill(os.getpid(), signal.SIGTERM)
            await running

    asyncio.run(run())


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--platform=unix:/x", "--admin=nothing"],
        ["--platform=unix:/x", "--control-namespace=Not A Label"],
        ["--platform=unix:/x", "--scrape-interval=0"],
    ],
)
def test_a_bad_command_line_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        app.parse(argv)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_command_line_of_the_manifest() -> None:
    options = app.parse(
        [
            "--admin=0.0.0.0:9995",
            "--platform=unix:/run/mantle/control/platform.sock",
            "--control-namespace=mantle",
            "--trust-domain=cluster.local",
            "--networks=10.203.0.0/16",
            "--router-ip=10.203.0.1",
        ]
    )
    assert options.api == Path("/run/mantle/control/viz.sock")
    assert (options.admin_host, options.admin_port, options.router) == ("0.0.0.0", 9995, ("10.203.0.1",))


def test_calls_to_the_control_plane_are_told_by_the_namespace_of_viz_itself() -> None:
    """As `mantle install -n mesh` makes it."""
    web = replace(WEB, ip="10.9.0.2")
    pod = Pod(Key("mesh", "identity-1"), "2", "10.9.0.1", "x", Owner("Deployment", "identity"), MESHED, ready=True)

    class Calls(FakeSource):
        async def traffic(self, window_seconds: float) -> Traffic:
            by_web = {"client_ip": web.ip, "port": "8080", "tls": "true", "client_id": SECURE["server_id"]}
            return Traffic(60.0, (Point(subject_of(pod), series("mantle_edge_clients_total", **by_web), 5),))

    async def run() -> list[tuple[str, str]]:
        world, source = World(own=Key("mesh", "viz-1")), Calls()
        await world.set(Snapshot(1, {web.key: web, pod.key: pod}))
        ask = Api(world, source, FakeProxies(), source).edges
        assert (await ask({"namespace": "emojivoto"}))["edges"] == []
        return [(row["src"], row["dst"]) for row in (await ask({"namespace": "mesh"}))["edges"]]

    assert asyncio.run(run()) == [("web", "identity")]
