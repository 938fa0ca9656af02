"""Several keepers of one serving certificate, on an API server made of two values with versions."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from mantle.core.serving_cert import CA_CERTIFICATE, Plan
from mantle.platform.kubernetes.calls import CONFLICT, NOT_FOUND, Refused
from mantle.platform.kubernetes.serving_cert import Keeper, webhooks

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PLAN = Plan("mantle-injector.mantle.svc", ("mantle-injector.mantle.svc",))


class Cluster:
    """The Secret and the CA bundles, each with its version."""

    def __init__(self) -> None:
        self.secret: tuple[int, dict[str, bytes]] | None = None
        self.version, self.bundles = (
            1,
            {"/webhooks/0/clientConfig/caBundle": "", "/webhooks/1/clientConfig/caBundle": ""},
        )
        self.meanwhile: Callable[[], Awaitable[None]] | None = None
        """What happens after the next keeper has read the Secret."""

    def current(self) -> str:
        assert self.secret is not None
        return base64.b64encode(self.secret[1][CA_CERTIFICATE]).decode()


class FakeKeeper(Keeper):
    """The keeper, with its four calls to the API answered by a `Cluster`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.shown = cluster, []
        nobody: Any = None
        registry = CollectorRegistry()
        super().__init__(
            nobody, "mantle", "injector", webhooks("mantle-injector"), PLAN, self.shown.append, registry, lambda: NOW
        )

    async def _bundles(self) -> tuple[str, dict[str, str]]:
        if not self.cluster.bundles:
            raise Refused("get", NOT_FOUND, "no such configuration")
        return str(self.cluster.version), dict(self.cluster.bundles)

    async def _read(self) -> tuple[str, dict[str, bytes]] | None:
        found = self.cluster.secret
        meanwhile, self.cluster.meanwhile = self.cluster.meanwhile, None
        if meanwhile is not None:
            await meanwhile()
        return None if found is None else (str(found[0]), found[1])

    async def _write(self, version: str | None, data: Mapping[str, bytes]) -> None:
        there = None if self.cluster.secret is None else str(self.cluster.secret[0])
        if version != there:
            raise Refused("write", CONFLICT, "another version")
        self.cluster.secret = (int(there or 0) + 1, dict(data))

    async def _patch(self, version: str, pointers: Sequence[str], bundle: str) -> None:
        if version != str(self.cluster.version):
            raise Refused("patch", CONFLICT, "another version")
        self.cluster.version += 1
        self.cluster.bundles |= dict.fromkeys(pointers, bundle)


def test_of_two_replicas_one_writes_and_both_serve_the_same():
    async def scene() -> None:
        cluster = Cluster()
        first, second = FakeKeeper(cluster), FakeKeeper(cluster)
        assert first.missing
        await first.check()
        await second.check()
        assert cluster.secret is not None and cluster.secret[0] == 1
        assert first.missing == second.missing == ""
        assert first.shown == second.shown and len(first.shown) == 1
        assert set(cluster.bundles.values()) == {cluster.current()}

    asyncio.run(scene())


def test_who_comes_second_is_refused_and_looks_again():
    async def scene() -> None:
        cluster = Cluster()
        slow, fast = FakeKeeper(cluster), FakeKeeper(cluster)
        cluster.meanwhile = fast.check
        with pytest.raises(Refused) as refused:
            await slow.check()
        assert refused.value.code == CONFLICT and not slow.shown
        await slow.check()
        assert cluster.secret is not None and cluster.secret[0] == 1, "one renewal, written once"
        assert slow.shown == fast.shown

    asyncio.run(scene())


def test_an_old_view_of_the_secret_cannot_put_an_old_bundle_back():
    """The slow one has read the old Secret; before it patches, the other has written a new one and its bundle."""

    async def scene() -> None:
        cluster = Cluster()
        slow, fast = FakeKeeper(cluster), FakeKeeper(cluster)
        await slow.check()
        cluster.bundles = dict.fromkeys(cluster.bundles, "somebody else's")  # so that there is something to patch

        async def made_anew() -> None:
            cluster.secret = None
            await fast.check()

        cluster.meanwhile = made_anew
        with pytest.raises(Refused):
            await slow.check()
        assert set(cluster.bundles.values()) == {cluster.current()}

    asyncio.run(scene())


def test_without_an_object_to_write_the_bundle_to_nothing_is_made():
    async def scene() -> None:
        cluster = Cluster()
        cluster.bundles = {}
        with pytest.raises(Refused, match="no such configuration"):
            await FakeKeeper(cluster).check()
        assert cluster.secret is None

    asyncio.run(scene())
