"""What the injector asks of the Kubernetes API: a dozen calls, dictionaries in and out, two kinds of failure.

Nothing is decided here. RBAC of the injector (`manifests/cluster/injector.yml`) grants exactly these calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightkube.models.core_v1 import EventSource, ObjectReference
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.apps_v1 import ReplicaSet
from lightkube.resources.batch_v1 import Job
from lightkube.resources.core_v1 import ConfigMap, Event, Namespace
from lightkube.types import PatchType

from mantle.core.admission import Owner
from mantle.platform.kubernetes.calls import NOT_FOUND, Refused, doing
from mantle.platform.kubernetes.client import Client

Object = dict[str, Any]
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
"""https://kubernetes.io/docs/reference/using-api/api-concepts/#metadata-only-fetches"""
_KINDS: dict[str, Any] = {"ReplicaSet": ReplicaSet, "Job": Job}


class Api:
    """Raises `Refused` or `Unreachable`. `namespace` is the control plane's."""

    def __init__(self, client: Client, namespace: str) -> None:
        self._client = client
        self._namespace = namespace

    async def namespace(self, name: str) -> Object:
        async with doing(f"get namespace {name}"):
            return _plain(await self._client.get(Namespace, name))

    async def owner_references(self, namespace: str, owner: Owner) -> Object:
        """The metadata of a ReplicaSet or Job."""
        async with doing(f"get {owner.kind} {namespace}/{owner.name}"):
            found = await self._client.get(_KINDS[owner.kind], owner.name, namespace=namespace)
            return dict(_plain(found).get("metadata") or {})

    async def pods(self, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        """Their metadata, as the API server's cache has it: of a large workload this is asked every second."""
        query = {"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items()), "resourceVersion": "0"}
        async with doing(f"list pods of {namespace}"):
            path = f"/api/v1/namespaces/{namespace}/pods"
            response = await self._client.http.get(path, params=query, headers={"Accept": METADATA_ONLY})
            response.raise_for_status()
            return list(response.json()["items"] or ())  # an empty list of metadata is null

    async def service(self, namespace: str, name: str) -> list[Object]:
        """Its metadata; none if there is none."""
        try:
            async with doing(f"get service {namespace}/{name}"):
                path = f"/api/v1/namespaces/{namespace}/services/{name}"
                response = await self._client.http.get(path, headers={"Accept": METADATA_ONLY.replace("List", "")})
                response.raise_for_status()
                return [dict(response.json())]
        except Refused as error:
            if error.code != NOT_FOUND:
                raise
            return []

    async def config_map(self, name: str) -> dict[str, str]:
        async with doing(f"get ConfigMap {self._namespace}/{name}"):
            found = await self._client.get(ConfigMap, name, namespace=self._namespace)
            return dict(found.data or {})

    async def create_event(
        self, name: str, regarding: Object, reason: str, message: str, kind: str, at: str, reporter: str
    ) -> None:
        """`at` is RFC 3339 (seconds); `kind` is Normal or Warning. `Refused` with 409 if there is one of that name."""
        event = Event(
            metadata=ObjectMeta(name=name, namespace=regarding["namespace"]),
            involvedObject=ObjectReference(**regarding),
            reason=reason,
            message=message[:1024],
            type=kind,
            source=EventSource(component="mantle-injector"),
            firstTimestamp=at,  # type: ignore[arg-type]  # sent as it is
            lastTimestamp=at,  # type: ignore[arg-type]
            count=1,
            reportingComponent="mantle-injector",
            reportingInstance=reporter,
        )
        async with doing(f"write an event about {regarding['kind']} {regarding['namespace']}/{regarding['name']}"):
            await self._client.create(event)

    async def repeat_event(self, namespace: str, name: str, count: int, at: str) -> None:
        async with doing(f"count up event {namespace}/{name}"):
            patch = {"count": count, "lastTimestamp": at}
            await self._client.patch(Event, name, patch, namespace=namespace, patch_type=PatchType.MERGE)


def _plain(obj: Any) -> Object:
    return dict(obj.to_dict())
