"""What the injector asks of the Kubernetes API: a dozen calls, dictionaries in and out, two kinds of failure.

Nothing is decided here. RBAC of the injector (`manifests/cluster/injector.yml`) grants exactly these calls.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from lightkube import ApiError, AsyncClient
from lightkube.models.core_v1 import EventSource, ObjectReference
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.admissionregistration_v1 import MutatingWebhookConfiguration
from lightkube.resources.apps_v1 import ReplicaSet
from lightkube.resources.batch_v1 import Job
from lightkube.resources.core_v1 import ConfigMap, Event, Namespace, Pod, Secret
from lightkube.types import PatchType

from mantle.core.admission import Owner

Object = dict[str, Any]
NOT_FOUND, CONFLICT = 404, 409
_KINDS: dict[str, Any] = {"ReplicaSet": ReplicaSet, "Job": Job}


class Refused(Exception):
    """The API server answered, and not with success. `code` is the HTTP status."""

    def __init__(self, doing: str, code: int, message: str) -> None:
        super().__init__(f"{doing}: {message} (status {code})")
        self.code = code


class Unreachable(Exception):
    """No answer from the API server; the text says what was being done."""


@asynccontextmanager
async def _doing(what: str) -> AsyncIterator[None]:
    try:
        yield
    except ApiError as error:
        raise Refused(what, int(error.status.code or 0), str(error.status.message)) from error
    except httpx2.HTTPStatusError as error:
        raise Refused(what, error.response.status_code, error.response.text[:200]) from error
    except httpx2.HTTPError as error:
        raise Unreachable(f"{what}: {type(error).__name__} {error}".rstrip()) from error


class Api:
    """Raises `Refused` or `Unreachable`. `namespace` is the control plane's."""

    def __init__(self, client: AsyncClient, namespace: str) -> None:
        self._client = client
        self._namespace = namespace

    async def namespace(self, name: str) -> Object:
        async with _doing(f"get namespace {name}"):
            return _plain(await self._client.get(Namespace, name))

    async def owner_references(self, namespace: str, owner: Owner) -> Object:
        """The metadata of a ReplicaSet or Job."""
        async with _doing(f"get {owner.kind} {namespace}/{owner.name}"):
            found = await self._client.get(_KINDS[owner.kind], owner.name, namespace=namespace)
            return dict(_plain(found).get("metadata") or {})

    async def pods(self, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        selector: Any = dict(labels)
        async with _doing(f"list pods of {namespace}"):
            return [_plain(pod) async for pod in self._client.list(Pod, namespace=namespace, labels=selector)]

    async def config_map(self, name: str) -> dict[str, str]:
        async with _doing(f"get ConfigMap {self._namespace}/{name}"):
            found = await self._client.get(ConfigMap, name, namespace=self._namespace)
            return dict(found.data or {})

    async def secret(self, name: str) -> tuple[str, dict[str, bytes]] | None:
        """Its resourceVersion and data. None if there is no such Secret."""
        async with _doing(f"get Secret {self._namespace}/{name}"):
            try:
                found = await self._client.get(Secret, name, namespace=self._namespace)
            except ApiError as error:
                if error.status.code == NOT_FOUND:
                    return None
                raise
        data = {key: base64.b64decode(value) for key, value in (found.data or {}).items()}
        return str(found.metadata.resourceVersion if found.metadata else ""), data

    async def write_secret(self, name: str, version: str | None, data: Mapping[str, bytes], labels: Object) -> None:
        """Makes it (`version` None), or replaces it if it is still of that version. `Refused` with 409 if it is not."""
        meta = ObjectMeta(name=name, namespace=self._namespace, resourceVersion=version, labels=labels)
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        secret = Secret(metadata=meta, data=encoded, type="kubernetes.io/tls")
        async with _doing(f"write Secret {self._namespace}/{name}"):
            await (self._client.create(secret) if version is None else self._client.replace(secret))

    async def webhooks(self, name: str) -> tuple[str, list[str]]:
        """The configuration's resourceVersion and the CA bundle of each of its webhooks (base64)."""
        async with _doing(f"get MutatingWebhookConfiguration {name}"):
            found = await self._client.get(MutatingWebhookConfiguration, name)
            bundles = [str(hook.clientConfig.caBundle or "") for hook in found.webhooks or []]
            return str(found.metadata.resourceVersion if found.metadata else ""), bundles

    async def patch_bundles(self, name: str, version: str, count: int, bundle: str) -> None:
        """Writes the CA bundle (base64) into `count` webhooks. `Refused` with 409 if the version is another now."""
        patch = [{"op": "replace", "path": "/metadata/resourceVersion", "value": version}]
        patch += [
            {"op": "add", "path": f"/webhooks/{index}/clientConfig/caBundle", "value": bundle} for index in range(count)
        ]
        async with _doing(f"patch MutatingWebhookConfiguration {name}"):
            await self._client.patch(MutatingWebhookConfiguration, name, patch, patch_type=PatchType.JSON)

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
        async with _doing(f"write an event about {regarding['kind']} {regarding['namespace']}/{regarding['name']}"):
            await self._client.create(event)

    async def repeat_event(self, namespace: str, name: str, count: int, at: str) -> None:
        async with _doing(f"count up event {namespace}/{name}"):
            patch = {"count": count, "lastTimestamp": at}
            await self._client.patch(Event, name, patch, namespace=namespace, patch_type=PatchType.MERGE)


def _plain(obj: Any) -> Object:
    return dict(obj.to_dict())
