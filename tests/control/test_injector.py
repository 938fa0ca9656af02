"""The injector beside a slow or absent API: what it still answers, how fast, and what it says later."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import virtual_time
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry

from mantle.control.injector import LOOKUP, Injector, Settings, application
from mantle.control.injector_events import MOST_WAITING, PATIENCE, Events
from mantle.core.admission import Note, Owner, Subject
from mantle.core.annotations import CREATED_BY, SKIPPED
from mantle.core.proxy_env import Values
from mantle.platform.kubernetes.calls import CONFLICT, Refused, Unreachable

VALUES = Values("1.2.3", "ROOTS", ("10.0.0.0/8",))
NOW = datetime(2026, 1, 1, tzinfo=UTC)
REPLICA_SET = Owner("apps/v1", "ReplicaSet", "web-5d9", "rs-uid")
DEPLOYMENT = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "uid": "d-uid", "controller": True}


class FakeApi:
    """The API server as dictionaries; `slow` and `down` are what a test turns on."""

    def __init__(self) -> None:
        self.slow = self.down = False
        self.asked: list[str] = []
        self.annotations: dict[str, str] = {"mantle.dev/inject": "enabled"}
        self.existing: list[dict[str, Any]] = []
        self.events: dict[str, dict[str, Any]] = {}

    async def _answer(self, what: str) -> None:
        self.asked.append(what)
        if self.slow:
            await asyncio.sleep(60)
        if self.down:
            raise Unreachable(what)

    async def namespace(self, name: str) -> dict[str, Any]:
        await self._answer(f"namespace {name}")
        return {"metadata": {"name": name, "annotations": self.annotations}}

    async def owner_references(self, namespace: str, owner: Owner) -> dict[str, Any]:
        await self._answer(f"{owner.kind} {owner.name}")
        return {"ownerReferences": [DEPLOYMENT]}

    async def pods(self, namespace: str, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        await self._answer(f"pods {dict(labels)}")
        return self.existing

    async def service(self, namespace: str, name: str) -> list[dict[str, Any]]:
        await self._answer(f"service {name}")
        return [one for one in self.existing if one["metadata"]["name"] == name]

    async def create_event(
        self, name: str, regarding: dict[str, Any], reason: str, message: str, kind: str, at: str, reporter: str
    ) -> None:
        await self._answer("event")
        if name in self.events:
            raise Refused("create event", CONFLICT, "exists")
        self.events[name] = {"about": regarding, "reason": reason, "message": message, "type": kind, "count": 1}

    async def repeat_event(self, namespace: str, name: str, count: int, at: str) -> None:
        self.events[name]["count"] = count


def review(name: str = "") -> dict[str, Any]:
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d9", "uid": "rs-uid", "controller": True}
    meta = {"name": name} if name else {"generateName": "web-5d9-", "ownerReferences": [owner]}
    obj = {"kind": "Pod", "metadata": {**meta, "labels": {"app": "web"}}, "spec": {"containers": [{"name": "a"}]}}
    request = {"uid": "1", "operation": "CREATE", "namespace": "shop", "object": obj}
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}


class Play:
    def __init__(self, api: FakeApi | None = None) -> None:
        self.api, self.registry, self.now, self.ticks = api or FakeApi(), CollectorRegistry(), NOW, 0.0
        self.events = Events(self.api, "injector-0", self.registry, lambda: self.now, lambda: self.ticks)  # type: ignore[arg-type]

        async def read() -> Values:
            return VALUES

        self.settings = Settings(read)
        self.injector = Injector(self.api, self.settings, self.events, self.registry)  # type: ignore[arg-type]


def injected(decision: Any) -> str:
    return base64.b64decode(decision.review["response"]["patch"]).decode()


def test_the_owner_people_know_is_looked_up_once():
    async def scene() -> None:
        play = Play()
        await play.settings.refresh()
        for _ in range(3):
            assert "mantle.dev~1proxy-deployment" in injected(await play.injector.admit(review()))
        assert play.api.asked.count("ReplicaSet web-5d9") == 1
        assert play.api.asked.count("namespace shop") == 3, "the namespace may have been annotated a moment ago"

    asyncio.run(scene())


def test_a_slow_api_costs_a_name_and_not_the_admission():
    async def scene() -> None:
        play = Play()
        await play.settings.refresh()
        await play.injector.admit(review("known"))
        play.api.slow = True
        loop = asyncio.get_running_loop()
        began = loop.time()
        decision = await play.injector.admit(review())
        assert loop.time() - began == LOOKUP
        assert "mantle.dev~1proxy-replicaset" in injected(decision), "the direct owner, in place of the Deployment"

    virtual_time.play(scene())


@pytest.mark.parametrize("how", ["slow", "down"])
def test_without_the_namespace_nothing_is_decided_and_the_failure_policy_does(how: str):
    async def scene() -> None:
        play = Play()
        await play.settings.refresh()
        setattr(play.api, how, True)
        async with TestClient(TestServer(application(play.injector))) as client:
            answer = await client.post("/", json=review())
            assert answer.status == 503
            assert "namespace shop is not known" in await answer.text()

    asyncio.run(scene())


def test_what_is_no_review_is_a_client_error_and_unread_settings_are_ours():
    async def scene() -> None:
        play = Play()
        async with TestClient(TestServer(application(play.injector))) as client:
            assert (await client.post("/", data=b"{")).status == 400
            assert (await client.post("/", json={"kind": "Pod"})).status == 400
            early = await client.post("/", json=review())
            assert early.status == 503 and "settings have not been read" in await early.text()
            await play.settings.refresh()
            assert (await client.post("/", json=review())).status == 200

    asyncio.run(scene())


def test_settings_that_cannot_be_used_leave_the_ones_there_were():
    async def scene() -> None:
        answers: list[Values | Exception] = [ValueError("no key"), VALUES, Unreachable("api")]

        async def read() -> Values:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        settings = Settings(read)
        await settings.refresh()
        assert settings.current is None and "no key" in settings.missing
        for _ in range(2):
            await settings.refresh()
            assert settings.current is VALUES and settings.missing == ""

    asyncio.run(scene())


# ---- events ----

NOTE = Note("Injected", "mantle-proxy added")


def existing(name: str, uid: str, age: timedelta = timedelta(0), mark: str = CREATED_BY) -> dict[str, Any]:
    created = (NOW - age).isoformat()
    return {"metadata": {"name": name, "uid": uid, "creationTimestamp": created, "annotations": {mark: "mantle"}}}


def told(play: Play, times: int = 1, **subject: str) -> None:
    about = Subject(**{"namespace": "shop", "name": "", "generate_name": "web-", "owner": REPLICA_SET} | subject)
    for _ in range(times):
        play.events.tell(about, {"app": "web"}, NOTE, Owner("apps/v1", "Deployment", "web", "d"), admitted=True)


def about(play: Play) -> dict[str, int]:
    return {event["about"]["name"]: event["count"] for event in play.api.events.values()}


def test_pods_have_their_event_when_they_appear_and_old_ones_none():
    async def scene() -> None:
        play = Play()
        told(play, 2)
        await play.events.wave()
        assert about(play) == {"web": 1}
        play.api.existing = [existing("web-1", "1"), existing("web-0", "0", timedelta(hours=2)), existing("db-1", "9")]
        await play.events.wave()
        play.api.existing.append(existing("web-2", "2"))
        await play.events.wave()
        assert about(play) == {"web": 1, "web-1": 1, "web-2": 1}
        asked = len(play.api.asked)
        await play.events.wave()
        assert len(play.api.asked) == asked, "nobody is waited for any more"

    asyncio.run(scene())


def test_a_pod_that_never_comes_is_given_up():
    async def scene() -> None:
        play = Play()
        told(play, name="web-0")
        play.ticks = PATIENCE + 1
        await play.events.wave()
        dropped = play.registry.get_sample_value(
            "mantle_injector_events_dropped_total", {"why": "the pod did not come"}
        )
        assert dropped == 1
        assert "web-0" not in about(play)

    asyncio.run(scene())


def test_the_workloads_event_is_counted_up_and_another_replica_finds_it():
    async def scene() -> None:
        play = Play()
        other = Play(play.api)
        for each in (play, play, other):
            told(each)
            await each.events.wave()
        assert about(play) == {"web": 2}

    asyncio.run(scene())


def test_events_wait_for_an_api_that_is_down():
    async def scene() -> None:
        play = Play()
        told(play)
        play.api.down = True
        with pytest.raises(Unreachable):
            await play.events.wave()
        play.api.down = False
        play.api.existing = [existing("web-1", "1")]
        await play.events.wave()
        assert about(play) == {"web": 1, "web-1": 1}

    asyncio.run(scene())


# ---- reviews from anybody: the API server proves nothing about itself to a webhook ----


def forged(**metadata: Any) -> dict[str, Any]:
    made = review()
    made["request"]["object"]["metadata"] |= metadata
    return made


def owner(**parts: Any) -> dict[str, Any]:
    whole = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db", "uid": "u", "controller": True}
    return {"ownerReferences": [whole | parts]}


@pytest.mark.parametrize(
    "metadata",
    [
        owner(name="\ud800"),
        owner(uid="\ud800"),
        owner(kind="\n"),
        owner(uid="u" * 10_000),
        owner(name=["db"]),
        owner(apiVersion=None),
        {"labels": {"app": "\ud800"}},
        {"labels": {"app": ["web"]}},
        {"labels": {"app": "a,b"}},
        {"generateName": ""},
        {"generateName": "\ud800-"},
        {"name": "../x"},
    ],
)
def test_a_forged_review_ends_nothing_and_is_not_waited_for(metadata: dict[str, Any]):
    async def scene() -> None:
        play = Play()
        await play.settings.refresh()
        forged_one = forged(**metadata)
        await play.injector.admit(forged_one)
        play.api.existing = [existing("stranger", "9")]
        await play.events.wave()
        written = str(play.api.events) + str(play.api.asked)
        assert "stranger" not in about(play)
        assert written.isascii() and "\\ud800" not in written, written
        await play.injector.admit(review())  # and goes on
        play.api.existing = [existing("web-5d9-1", "1")]
        await play.events.wave()
        assert about(play)["web-5d9-1"] == 1

    asyncio.run(scene())


@pytest.mark.parametrize("namespace", ["", "../shop", "shop?x=1", "Shop", "shop\n", "s" * 64, "\ud800"])
def test_a_namespace_that_cannot_be_is_not_asked_about(namespace: str):
    async def scene() -> None:
        play = Play()
        await play.settings.refresh()
        made = review()
        made["request"]["namespace"] = namespace
        async with TestClient(TestServer(application(play.injector))) as client:
            answer = await client.post("/", json=made)
            said = await answer.text()
            # Half a surrogate pair is no text at all: its review is not even read.
            assert answer.status == 400 and ("wanted the name of one" in said or "found no JSON" in said)
        assert play.api.asked == []

    asyncio.run(scene())


def test_what_cannot_be_written_is_left_out_and_the_next_is_not():
    class Odd(FakeApi):
        async def create_event(self, name: str, regarding: dict[str, Any], *rest: Any) -> None:
            if regarding["kind"] == "Deployment":
                raise UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates not allowed")
            await super().create_event(name, regarding, *rest)

    async def scene() -> None:
        play = Play(Odd())
        told(play)
        play.api.existing = [existing("web-1", "1")]
        await play.events.wave()
        assert about(play) == {"web-1": 1}
        dropped = play.registry.get_sample_value("mantle_injector_events_dropped_total", {"why": "unwritable"})
        assert dropped == 1

    asyncio.run(scene())


def test_pods_are_told_only_what_they_bear_out():
    async def scene() -> None:
        play = Play()
        told(play, 2)
        play.api.existing = [existing("web-1", "1", mark="else"), existing("web-2", "2", mark=SKIPPED)]
        await play.events.wave()
        assert about(play) == {"web": 1}, "nobody was injected"
        play.api.existing.append(existing("web-3", "3"))
        await play.events.wave()
        assert about(play) == {"web": 1, "web-3": 1}

    asyncio.run(scene())


def test_a_flood_of_reviews_costs_a_bounded_memory():
    async def scene() -> None:
        play = Play()
        await play.settings.refresh()
        for n in range(MOST_WAITING + 5):
            made = forged(**owner(kind=f"Kind{n}", uid=f"u{n}"), generateName=f"p{n}-")
            made["request"]["object"]["metadata"]["annotations"] = {"mantle.dev/inject": "\x1b[2J" + "x" * 100_000}
            await play.injector.admit(made)
        await play.events.wave()
        assert len(play.api.events) == MOST_WAITING
        messages = [event["message"] for event in play.api.events.values()]
        assert all(len(m) <= 1024 and m.isprintable() for m in messages)
        kinds = {
            sample.labels["owner_kind"]
            for family in play.registry.collect()
            for sample in family.samples
            if "owner_kind" in sample.labels
        }
        assert kinds == {"other"}

    asyncio.run(scene())


# ---- services ----


def test_a_service_gets_its_namespaces_opaque_ports_without_the_meshs_settings_and_an_event_when_it_is_there():
    async def scene() -> None:
        play = Play()
        play.api.annotations = {"config.mantle.dev/opaque-ports": "3306"}
        service = {"kind": "Service", "metadata": {"name": "db"}, "spec": {"ports": [{"port": 3306}]}}
        request = {"uid": "1", "operation": "CREATE", "namespace": "shop", "object": service}
        asked = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
        decision = await play.injector.admit(asked)
        assert "inherited-opaque-ports" in injected(decision)
        await play.events.wave()
        assert about(play) == {}, "it is not there yet"
        play.api.existing = [existing("db", "7", mark="mantle.dev/inherited-opaque-ports")]
        await play.events.wave()
        (event,) = play.api.events.values()
        assert (event["about"]["kind"], event["about"]["uid"], event["reason"]) == ("Service", "7", "Injected")
        assert "config.mantle.dev/opaque-ports: 3306, as its namespace says" in event["message"]
        counted = {"owner_kind": "service", "namespace": "shop", "annotation_at": "namespace"}
        assert play.registry.get_sample_value("proxy_inject_admission_requests_total", counted) == 1
        calls = len(play.api.asked)
        await play.events.wave()
        assert len(play.api.asked) == calls, "nobody is waited for any more"

    asyncio.run(scene())
