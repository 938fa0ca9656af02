"""The aggregated API over real TLS: an API server's front proxy, strangers, and users with and without rights."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from certificates import Certificate
from viz_play import WEB, FakeProxies, FakeSource

from mantle.core.model import Snapshot
from mantle.core.views import Right
from mantle.viz.aggregated import Aggregated, Denied, Unreviewed
from mantle.viz.api import Api
from mantle.viz.cluster import answer_of, review_of
from mantle.viz.front_proxy import FrontProxy, User
from mantle.viz.tls import Tls
from mantle.viz.world import World

ROOT = "/apis/tap.mantle.dev/v1alpha1"
ALICE = {"X-Remote-User": "alice", "X-Remote-Group": "devs"}


class FakeReviews:
    """Lets `alice` do what is in `rights`; remembers what it was asked."""

    def __init__(self, *rights: Right) -> None:
        self.rights = rights
        self.asked: list[tuple[str, Right]] = []
        self.broken = False

    async def may(self, user: User, right: Right) -> Denied | None:
        self.asked.append((user.name, right))
        if self.broken:
            raise Unreviewed("the API server is away")
        return None if user.name == "alice" and right in self.rights else Denied("no RBAC policy matched")


def believed(ca: Certificate, *names: str) -> FrontProxy:
    allowed = frozenset(names or ("front-proxy-client",))
    return FrontProxy(ca.pem.decode(), allowed, ("x-remote-user",), ("x-remote-group",))


class Stage:
    """viz with a certificate of its own, and whoever wants to ask it."""

    def __init__(self, directory: Path, *rights: Right) -> None:
        self.directory = directory
        self.serving_ca, self.front_ca = Certificate("serving CA"), Certificate("front CA")
        self.reviews, self.proxies, self.tls = FakeReviews(*rights), FakeProxies(), Tls()
        self.tls.believe(believed(self.front_ca))
        self.tls.show(Certificate("viz", self.serving_ca).both)
        self.port = 0

    def __call__(self, scene: Any) -> None:
        async def run() -> None:
            world, source = World(), FakeSource()
            await world.set(Snapshot(1, {WEB.key: WEB}))
            api = Api(world, source, self.proxies, source)
            runner = web.AppRunner(Aggregated(api, self.tls, self.reviews).application(), handler_cancellation=True)
            await runner.setup()
            try:
                site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self.tls.context)
                await site.start()
                self.port = runner.addresses[0][1]
                async with asyncio.timeout(120):
                    await scene()
            finally:
                await runner.cleanup()

        asyncio.run(run())

    def client(self, certificate: Certificate | None) -> aiohttp.ClientSession:
        """Somebody who trusts viz's authority and shows this certificate."""
        context = ssl.create_default_context(cadata=self.serving_ca.pem.decode())
        if certificate is not None:
            context.load_cert_chain(certificate.write(self.directory / "client.pem"))
        connector = aiohttp.TCPConnector(ssl=context)
        return aiohttp.ClientSession(f"https://127.0.0.1:{self.port}", connector=connector)

    def front_proxy(self) -> aiohttp.ClientSession:
        return self.client(Certificate("front-proxy-client", self.front_ca))


async def get(client: aiohttp.ClientSession, path: str, headers: Any = ALICE) -> tuple[int, Any]:
    async with client.get(path, headers=headers) as answer:
        return answer.status, await answer.json()


def test_views_are_those_of_the_namespace_in_the_path_and_need_its_right(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Right("list", "edges", namespace="emojivoto"), Right("list", "stat"))

    async def scene() -> None:
        async with stage.front_proxy() as client:
            status, body = await get(client, f"{ROOT}/namespaces/emojivoto/edges?all=1&namespace=other")
            assert (status, [edge["src"] for edge in body["edges"]]) == (200, ["web"])
            status, body = await get(client, f"{ROOT}/stat?resource=authority&namespace=nothing-there")
            assert (status, [row["name"] for row in body["rows"]]) == (200, ["emoji-svc.emojivoto:8080"])
            status, body = await get(client, f"{ROOT}/namespaces/other/edges?namespace=emojivoto")
            assert (status, body["kind"], body["reason"]) == (403, "Status", "Forbidden")
            assert body["errors"] == [
                {
                    "message": "user 'alice' may not list edges in API group tap.mantle.dev in namespace other "
                    "(no RBAC policy matched)",
                    "fix": "somebody who may grant rights gives it with: kubectl create rolebinding "
                    "alice-mantle-viz-view -n other --clusterrole=mantle-viz-view --user=alice",
                }
            ]
            assert (await get(client, f"{ROOT}/edges"))[0] == 403
            status, body = await get(client, f"{ROOT}/namespaces/emojivoto/edges?resource=thing&window=1")
            assert (status, len(body["errors"])) == (400, 2)
            stage.reviews.broken = True
            status, body = await get(client, f"{ROOT}/namespaces/emojivoto/edges")
            assert (status, body["reason"]) == (503, "ServiceUnavailable")

    stage(scene)
    assert stage.reviews.asked[0] == ("alice", Right("list", "edges", namespace="emojivoto"))


def test_tap_needs_watch_on_the_very_resource(tmp_path: Path) -> None:
    web_only = Right("watch", "deployments", "tap", "emojivoto", "web")
    everywhere = Right("watch", "pods", "tap")
    stage = Stage(tmp_path, web_only, Right("watch", "namespaces", "tap", "emojivoto", "emojivoto"), everywhere)
    watch = f"{ROOT}/watch/namespaces"

    async def scene() -> None:
        async with stage.front_proxy() as client:
            # What the body says of a target does not count: rights were asked for the path's.
            body = json.dumps({"target": {"kind": "namespace", "name": "", "namespace": "other"}})
            async with client.post(f"{watch}/emojivoto/deployments/web/tap", data=body, headers=ALICE) as answer:
                event = json.loads(await answer.content.readline())
                assert (answer.status, event["requestInitEvent"]["path"]) == (200, "/")
                answer.close()
            await stage.proxies.closed.wait()
            for path, status in (
                ("emojivoto/deployments/-/tap", 403),
                ("emojivoto/pods/web-1/tap", 403),
                ("other/deployments/web/tap", 403),
                ("emojivoto/namespaces/other/tap", 400),
                ("emojivoto/secrets/x/tap", 404),
                ("emojivoto/deployments/-web/tap", 403),
            ):
                async with client.post(f"{watch}/{path}", headers=ALICE) as answer:
                    assert (path, answer.status) == (path, status)
            async with client.get(f"{watch}/emojivoto/namespaces/emojivoto/tap", headers=ALICE) as answer:
                assert answer.status == 200
            for path, status in (("pods/-/tap", 200), ("deployments/-/tap", 403), ("pods/web-1/tap", 404)):
                async with client.post(f"{ROOT}/watch/{path}", headers=ALICE) as answer:
                    assert (path, answer.status) == (path, status)

    stage(scene)


def test_only_the_front_proxy_may_say_who_asks(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Right("list", "edges"))
    root = {"X-Remote-User": "alice", "X-Remote-Group": "system:masters"}

    async def scene() -> None:
        async with stage.client(None) as stranger:
            status, body = await get(stranger, f"{ROOT}/edges", root)
            assert (status, body["message"].partition(",")[0]) == (401, "found no client certificate")
            assert (await get(stranger, ROOT, root))[0] == 401
        async with stage.client(Certificate("someone", stage.front_ca)) as other:
            assert (await get(other, f"{ROOT}/edges", root))[0] == 401
        async with stage.front_proxy() as front:
            assert (await get(front, f"{ROOT}/edges", {}))[0] == 401
            assert (await get(front, f"{ROOT}/edges", root))[0] == 200
        forged = Certificate("front-proxy-client", Certificate("front CA"))
        async with stage.client(forged) as client:
            with pytest.raises(aiohttp.ClientError):
                await get(client, f"{ROOT}/edges", root)

    stage(scene)
    assert [name for name, _ in stage.reviews.asked] == ["alice"]


def test_another_front_proxy_counts_from_the_next_request_on(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Right("list", "edges"))
    next_ca = Certificate("next front CA")

    async def scene() -> None:
        async with stage.front_proxy() as before:
            assert (await get(before, f"{ROOT}/edges"))[0] == 200
            stage.tls.believe(believed(next_ca))
            assert (await get(before, f"{ROOT}/edges"))[0] == 401  # the same connection
        async with stage.front_proxy() as again:
            with pytest.raises(aiohttp.ClientError):
                await get(again, f"{ROOT}/edges")
        async with stage.client(Certificate("front-proxy-client", next_ca)) as after:
            assert (await get(after, f"{ROOT}/edges"))[0] == 200

    stage(scene)


def test_a_new_certificate_is_shown_from_the_next_connection_on(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Right("list", "edges"))

    async def scene() -> None:
        async with stage.front_proxy() as before:
            assert (await get(before, f"{ROOT}/edges"))[0] == 200
            stage.serving_ca = Certificate("another serving CA")
            stage.tls.show(Certificate("viz", stage.serving_ca).both)
            assert (await get(before, f"{ROOT}/edges"))[0] == 200  # an open connection goes on
        async with stage.front_proxy() as after:
            assert (await get(after, f"{ROOT}/edges"))[0] == 200
        with pytest.raises(ssl.SSLError):
            stage.tls.show(b"nonsense")
        async with stage.front_proxy() as still:
            assert (await get(still, f"{ROOT}/edges"))[0] == 200

    stage(scene)


def test_until_all_is_known_there_is_no_handshake(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    known, stage.tls = stage.tls.front_proxy, Tls()
    assert stage.tls.missing == "no certificate of our own yet, the API server's front proxy is not known yet"
    stage.tls.show(Certificate("viz", stage.serving_ca).both)

    async def scene() -> None:
        async with stage.front_proxy() as early:
            with pytest.raises(aiohttp.ClientError):
                await get(early, ROOT)
        assert known is not None
        stage.tls.believe(known)
        assert stage.tls.missing == ""
        async with stage.front_proxy() as client:
            assert (await get(client, ROOT))[0] == 200

    stage(scene)


def test_discovery(tmp_path: Path) -> None:
    stage = Stage(tmp_path)

    async def scene() -> None:
        async with stage.front_proxy() as client:
            _, groups = await get(client, "/apis")
            assert [group["name"] for group in groups["groups"]] == ["tap.mantle.dev"]
            _, group = await get(client, "/apis/tap.mantle.dev")
            assert group["preferredVersion"]["groupVersion"] == "tap.mantle.dev/v1alpha1"
            _, found = await get(client, ROOT)
            verbs = {resource["name"]: resource["verbs"] for resource in found["resources"]}
            assert (verbs["edges"], verbs["deployments/tap"], verbs["pods/tap"]) == (["list"], ["watch"], ["watch"])
            assert (await get(client, "/openapi/v2"))[0] == 404

    stage(scene)


def test_the_review_names_everything_that_rbac_looks_at() -> None:
    user = User("alice", ("devs",), "7", {"scopes": ("a", "b")})
    review = review_of(user, Right("watch", "pods", "tap", "emojivoto", ""))
    assert review["spec"] == {
        "user": "alice",
        "groups": ["devs"],
        "uid": "7",
        "extra": {"scopes": ["a", "b"]},
        "resourceAttributes": {
            "group": "tap.mantle.dev",
            "version": "v1alpha1",
            "verb": "watch",
            "resource": "pods",
            "subresource": "tap",
            "namespace": "emojivoto",
        },
    }


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        ({"allowed": True}, None),
        ({"allowed": True, "denied": True, "reason": "webhook"}, Denied("webhook")),
        ({"allowed": False}, Denied("")),
        ({"allowed": "yes"}, Denied("")),
        ({"evaluationError": "boom"}, Denied("boom")),
        (None, Denied("the review has no status")),
    ],
)
def test_anything_but_a_clear_yes_is_a_no(status: Any, answer: Denied | None) -> None:
    assert answer_of({"status": status}) == answer
