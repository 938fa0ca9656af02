"""The platform port on a cluster: snapshots of the API server's objects, reviews of tokens, events.

`running` is the one way in: it follows the kinds that the caller has a right to and a use for, and ends with its block.
While the API server is away the last snapshot stays; identity goes on with the cluster's own keys (`tokens`).
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from mantle.core.model import Key, Snapshot
from mantle.platform.kubernetes import convert, unfit
from mantle.platform.kubernetes.assemble import Assembly
from mantle.platform.kubernetes.client import Client
from mantle.platform.kubernetes.events import EventWriter
from mantle.platform.kubernetes.reflector import STEADY, Reflector, Resource, Timing
from mantle.platform.kubernetes.tokens import TokenReviewer
from mantle.platform.port import Count, Event, TokenClaims, TokenRejected


class Kind(enum.Enum):
    """A kind of object that is followed: `list` and `watch` on it are needed, cluster-wide."""

    PODS = "pods"
    SERVICES = "services"
    ENDPOINT_SLICES = "endpointslices.discovery.k8s.io"
    NAMESPACES = "namespaces"
    REPLICA_SETS = "replicasets.apps"
    JOBS = "jobs.batch"
    SERVICE_ACCOUNTS = "serviceaccounts"


DISCOVERY = frozenset({Kind.PODS, Kind.SERVICES, Kind.ENDPOINT_SLICES, Kind.NAMESPACES, Kind.REPLICA_SETS, Kind.JOBS})
"""What destination, policy and viz follow."""
IDENTITY = frozenset({Kind.PODS, Kind.SERVICE_ACCOUNTS})
"""What identity follows: enough to know a token's pod and service account when the API server is away."""


class KubernetesPlatform:
    """Implements `platform.port.Platform`. Made by `running`."""

    def __init__(
        self, client: Client, kinds: frozenset[Kind], timing: Timing = STEADY, component: str = "mantle"
    ) -> None:
        self._assembly = Assembly(with_slices=Kind.ENDPOINT_SLICES in kinds)
        self._news = asyncio.Event()
        self.events = EventWriter(client, component, self._uid_of)
        self.reflectors: dict[Kind, Reflector[Any, Any, Any]] = {
            kind: Reflector(client.http, *self._wiring(kind), timing=timing) for kind in Kind if kind in kinds
        }
        self.tokens = TokenReviewer(
            client, self._assembly.seen, self._assembly.accounts, [self.reflectors[k] for k in kinds & IDENTITY]
        )

    async def watch(self) -> AsyncIterator[Snapshot]:
        """The newest snapshot once every kind has been listed, then each newer one. Changes that come while the
        consumer works are merged.
        """
        for reflector in self.reflectors.values():
            await reflector.synced.wait()
        seen = -1
        while True:
            news, now = self._news, self._assembly.since(seen)
            if now.version != seen:
                seen = now.version
                yield now
            else:
                await news.wait()

    async def review_token(self, token: bytes, audiences: Sequence[str]) -> TokenClaims | TokenRejected:
        """The cluster's word on a token. Raises `PlatformUnavailable` if there is none."""
        return await self.tokens.review(token, audiences)

    def tell(self, event: Event) -> None:
        """An event of the cluster."""
        self.events.tell(event)

    def counts(self) -> Iterable[Count]:
        """Reviews, events and lists."""
        for (way, result), number in self.tokens.reviews.items():
            labels = (("way", way), ("result", result))
            yield Count("mantle_platform_token_reviews", "Tokens reviewed, by who answered and how.", labels, number)
        for outcome, number in self.events.outcomes.items():
            labels_of = (("outcome", outcome),)
            yield Count("mantle_platform_events", "Events told, by what became of them.", labels_of, number)
        for kind, reflector in self.reflectors.items():
            name = (("kind", kind.value),)
            yield Count("mantle_platform_lists", "Complete lists: one, and one after each loss.", name, reflector.lists)
            passed_over = "Objects that became unreadable and are passed over; the log names them."
            yield Count("mantle_platform_passed_over", passed_over, name, reflector.passed_over.total)

    def denied(self) -> str:
        """Whether tokens may be reviewed."""
        return self.tokens.denied

    def missing(self) -> str:
        """Which kinds have not been listed yet, and why; empty once all have."""
        waiting = (
            f"{kind.value} ({reflector.trouble or 'being listed'})"
            for kind, reflector in self.reflectors.items()
            if not reflector.synced.is_set()
        )
        return ", ".join(waiting)

    def _uid_of(self, event: Event) -> str:
        """So that `kubectl describe` finds the event."""
        key = Key(event.namespace, event.name)
        if event.kind == "ServiceAccount":
            return self._assembly.accounts.get(key, "")
        if event.kind == "Pod" and key in self._assembly.seen:
            return self._assembly.seen[key].pod.uid
        return ""

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _wiring(self, kind: Kind) -> tuple[Resource[Any, Any, Any], Any]:
        """What is read of a kind, and where its changes go."""
        assembly = self._assembly
        resource: Resource[Any, Any, Any]
        match kind:
            case Kind.PODS:
                # What has ended is of no use, and there can be much of it: Jobs.
                live = {"fieldSelector": "status.phase!=Succeeded,status.phase!=Failed"}
                resource = Resource("/api/v1/pods", convert.PodObject, convert.pod, unfit.pod, params=live)
                put: Any = assembly.pods
            case Kind.SERVICES:
                resource = Resource("/api/v1/services", convert.ServiceObject, convert.service, unfit.service)
                put = assembly.services
            case Kind.ENDPOINT_SLICES:
                path = "/apis/discovery.k8s.io/v1/endpointslices"
                resource = Resource(path, convert.SliceObject, convert.endpoint_slice, unfit.endpoint_slice)
                put = assembly.slices
            case Kind.NAMESPACES:
                resource = Resource("/api/v1/namespaces", convert.NamespaceObject, convert.namespace, unfit.namespace)
                put = assembly.namespaces
            case Kind.REPLICA_SETS:
                resource = _between("/apis/apps/v1/replicasets", "ReplicaSet")
                put = assembly.owners
            case Kind.JOBS:
                resource = _between("/apis/batch/v1/jobs", "Job")
                put = assembly.owners
            case Kind.SERVICE_ACCOUNTS:
                path = "/api/v1/serviceaccounts"
                resource = Resource(
                    path, convert.MetaObject, convert.service_account, unfit.service_account, metadata_only=True
                )
                put = assembly.service_accounts

        def changed(changes: tuple[Any, ...]) -> None:
            put(changes)
            self._tell()

        return resource, changed


def _between(path: str, kind: str) -> Resource[Any, Any, Any]:
    return Resource(path, convert.MetaObject, convert.between(kind), unfit.between(kind), metadata_only=True)


@asynccontextmanager
async def running(
    client: Client, kinds: frozenset[Kind], timing: Timing = STEADY, component: str = "mantle"
) -> AsyncIterator[KubernetesPlatform]:
    """A platform that follows `kinds` until the block is left. The client stays the caller's."""
    async with asyncio.TaskGroup() as tasks:
        platform = KubernetesPlatform(client, kinds, timing, component)
        followers = [tasks.create_task(reflector.run()) for reflector in platform.reflectors.values()]
        followers.append(tasks.create_task(platform.events.run()))
        if Kind.SERVICE_ACCOUNTS in kinds:
            followers.append(tasks.create_task(platform.tokens.keep_keys()))
        yield platform
        for follower in followers:
            follower.cancel()
