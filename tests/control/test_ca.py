"""The experimental mode's `ca` and a cluster in memory: who gets a Secret, when again, what a failure holds up."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from cryptography import x509
from prometheus_client import CollectorRegistry

from mantle.control.ca import Authorities, Distributor, Metrics
from mantle.control.ca_api import PODS, Api, PodOfMode, Reference, Refused, Unreachable
from mantle.core.names import MeshNames
from mantle.core.optional_names import OptionalNames, Owner

START = datetime(2026, 11, 24, 8, 0, 0, tzinfo=UTC)
NAMES = OptionalNames(MeshNames("mantle", "cluster.local"))
WEB = Owner("shop", "deployment", "web")
REPLICAS = Reference("apps/v1", "ReplicaSet", "web-5d9f", "u-rs", True)
DEPLOYMENT = Reference("apps/v1", "Deployment", "web", "u-deploy", True)


class FakeCluster:
    """Keeps Secrets; fails as told."""

    def __init__(self) -> None:
        self.own: tuple[int, dict[str, str]] | None = None
        self.secrets: dict[tuple[str, str], Mapping[str, Any]] = {}
        self.written: list[str] = []
        self.broken: set[str] = set()
        self.away = False

    async def own_secret(self) -> tuple[str, dict[str, str]] | None:
        if self.away:
            raise Unreachable("GET: connection refused")
        return None if self.own is None else (str(self.own[0]), self.own[1])

    async def write_own_secret(self, secret: Mapping[str, Any], version: str | None) -> None:
        if version != (None if self.own is None else str(self.own[0])):
            raise Refused("write", 409, "it changed")
        self.own = ((self.own[0] if self.own else 0) + 1, dict(secret["data"]))

    async def put_secret(self, secret: Mapping[str, Any]) -> None:
        name = secret["metadata"]["name"]
        if name in self.broken:
            raise Refused("PUT", 403, "forbidden by a quota")
        self.secrets[secret["metadata"]["namespace"], name] = secret
        if secret["metadata"]["namespace"] != "mantle":
            self.written.append(name)

    async def controller_of(self, namespace: str, reference: Reference) -> Reference | None:
        return DEPLOYMENT if reference.uid == "u-rs" else None


class Stage:
    def __init__(self) -> None:
        self.now = START
        self.serial = 0
        self.cluster = FakeCluster()
        self.pods: dict[tuple[str, str], PodOfMode] = {("shop", "web-1"): PodOfMode(WEB, REPLICAS)}
        self.program = self.restarted()

    def restarted(self) -> Distributor:
        """The program as it begins, with nothing remembered."""
        authorities = Authorities(self.cluster, NAMES, "1.2.3", lambda: self.now, self.entropy)
        metrics = Metrics(CollectorRegistry(), authorities)
        return Distributor(self.cluster, authorities, self.pods, metrics, lambda: self.now, self.entropy)

    def entropy(self, size: int) -> bytes:
        self.serial += 1
        return self.serial.to_bytes(size, "big")

    def look(self) -> timedelta:
        return asyncio.run(self.program.look())

    def certificate(self, name: str = "web-deployment-tls-mantle") -> x509.Certificate:
        data = self.cluster.secrets["shop", name]["data"]
        return x509.load_pem_x509_certificate(base64.b64decode(data["tls.crt"]))


def test_every_owner_gets_one_secret_and_is_left_alone_until_it_is_late() -> None:
    stage = Stage()
    stage.pods["shop", "web-2"] = PodOfMode(WEB, REPLICAS)
    stage.pods["shop", "db-0"] = PodOfMode(Owner("shop", "statefulset", "db"), Reference(kind="StatefulSet", name="db"))
    stage.look()
    assert sorted(stage.cluster.written) == ["db-statefulset-tls-mantle", "web-deployment-tls-mantle"]
    first = stage.certificate()
    assert stage.look() == timedelta(minutes=5)
    stage.now += timedelta(hours=16)
    stage.look()
    assert len(stage.cluster.written) == 2, "nothing is late yet"
    stage.now += timedelta(hours=1)
    stage.look()
    assert len(stage.cluster.written) == 4
    assert stage.certificate().public_key() != first.public_key(), "each time a new key"


def test_viz_gets_one_too_as_soon_as_there_is_anything_to_tap() -> None:
    stage = Stage()
    pods = dict(stage.pods)
    stage.pods.clear()
    stage.look()
    assert stage.cluster.secrets == {}
    stage.pods.update(pods)
    stage.look()
    assert ("mantle", "mantle-viz-deployment-tls-mantle") in stage.cluster.secrets


def test_a_secret_goes_with_its_deployment_not_with_a_replica_set() -> None:
    stage = Stage()
    stage.look()
    (reference,) = stage.cluster.secrets["shop", "web-deployment-tls-mantle"]["metadata"]["ownerReferences"]
    assert (reference["kind"], reference["uid"]) == ("Deployment", "u-deploy")


def test_a_pod_that_names_an_owner_it_does_not_have_gets_a_secret_that_nobody_else_owns() -> None:
    stage = Stage()
    other = Owner("shop", "deployment", "payroll")
    stage.pods["shop", "web-1"] = PodOfMode(other, REPLICAS)
    stage.look()
    assert "ownerReferences" not in stage.cluster.secrets["shop", "payroll-deployment-tls-mantle"]["metadata"]


def test_a_restart_keeps_the_root_and_issues_everything_anew() -> None:
    stage = Stage()
    stage.look()
    own, first = stage.cluster.own, stage.certificate()
    stage.program = stage.restarted()
    stage.look()
    assert stage.cluster.own == own
    assert stage.certificate() != first
    assert stage.certificate().issuer == first.issuer


def test_one_owner_that_fails_holds_up_no_other_and_is_tried_again() -> None:
    stage = Stage()
    stage.pods["shop", "api-1"] = PodOfMode(Owner("shop", "deployment", "api"), None)
    stage.cluster.broken = {"web-deployment-tls-mantle"}
    assert stage.look() == timedelta(seconds=5)
    assert stage.cluster.written == ["api-deployment-tls-mantle"]
    stage.cluster.broken = set()
    stage.look()
    assert stage.cluster.written == ["api-deployment-tls-mantle", "web-deployment-tls-mantle"]


def test_a_name_that_cannot_be_is_reported_once_and_waits_for_nothing() -> None:
    stage = Stage()
    stage.pods = stage.program.pods = {("shop", "x"): PodOfMode(Owner("shop", "rollout", "web"), None)}
    assert stage.look() == timedelta(minutes=5)
    assert stage.cluster.written == []


def test_a_new_root_reaches_every_owner_and_the_old_one_stays_trusted() -> None:
    stage = Stage()
    stage.look()
    old = base64.b64decode(stage.cluster.secrets["shop", "web-deployment-tls-mantle"]["data"]["ca.crt"])
    stage.now += timedelta(days=260)
    stage.look()
    bundle = base64.b64decode(stage.cluster.secrets["shop", "web-deployment-tls-mantle"]["data"]["ca.crt"])
    assert old in bundle and bundle != old
    assert len(x509.load_pem_x509_certificates(bundle)) == 2


def test_a_broken_or_unreachable_secret_of_its_own_issues_nothing_and_replaces_nothing() -> None:
    stage = Stage()
    stage.cluster.away = True
    assert stage.look() == timedelta(seconds=5)
    assert "connection refused" in stage.program.authorities.missing
    stage.cluster.away, stage.cluster.own = False, (7, {"tls.crt": "", "ca.crt": ""})
    stage.look()
    assert "delete the Secret mantle-ca" in stage.program.authorities.missing
    assert stage.cluster.own == (7, {"tls.crt": "", "ca.crt": ""})
    assert stage.cluster.written == []


def test_owners_that_are_gone_are_forgotten_and_get_a_new_secret_when_they_come_back() -> None:
    stage = Stage()
    stage.look()
    pods = dict(stage.pods)
    stage.pods.clear()
    stage.look()
    stage.pods.update(pods)
    stage.look()
    assert stage.cluster.written == ["web-deployment-tls-mantle"] * 2


def test_pods_are_read_as_the_api_server_writes_them() -> None:
    import msgspec

    raw = {
        "metadata": {
            "name": "web-1", "namespace": "shop", "uid": "u1", "resourceVersion": "7",
            "labels": {"mantle.dev/tls": "optional"}, "annotations": {"mantle.dev/tls-owner": "deployment/web"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d9f", "uid": "u-rs",
                                 "controller": True, "blockOwnerDeletion": True}],
        }
    }  # fmt: skip
    assert PODS.convert(msgspec.convert(raw, PODS.raw)) == (("shop", "web-1"), PodOfMode(WEB, REPLICAS))
    raw["metadata"]["labels"] = {}
    assert PODS.convert(msgspec.convert(raw, PODS.raw)) == (("shop", "web-1"), None)


@pytest.mark.parametrize("name", ["../../../../../api/v1/secrets", "a\nb", "x?y=1", "\u00fc"])
def test_an_owner_reference_names_an_object_and_no_path(name: str):
    """The API server takes any text for the name in one: whoever makes a pod writes it."""
    asked: list[bytes] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.raw_path)
        return httpx2.Response(404, json={"message": "no such thing"})

    async def scene() -> None:
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer), base_url="http://api") as http:
            reference = Reference("apps/v1", "ReplicaSet", name, "u", True)
            assert await Api(http, "mantle").controller_of("shop", reference) is None

    asyncio.run(scene())
    (path,) = asked
    assert path.startswith(b"/apis/apps/v1/namespaces/shop/replicasets/") and path.count(b"/") == 7 and b"?" not in path
