"""What the `ca` asks of the Kubernetes API: pods of the experimental mode, its own Secret, owners' Secrets unread.

RBAC (`manifests/cluster/ca.yml`) grants exactly these calls. It may not read any Secret but its own: an owner's is
created, or replaced whole if there is one, without looking. Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx2
import msgspec

from mantle.core.optional_names import LABEL_TLS, OPTIONAL, Owner, owner_of
from mantle.core.optional_tls import CA_SECRET
from mantle.platform.kubernetes.reading import Sketch, anything
from mantle.platform.kubernetes.reflector import Resource

CONFLICT, NOT_FOUND = 409, 404
_APIS = {"ReplicaSet": "/apis/apps/v1/namespaces/{}/replicasets/{}", "Job": "/apis/batch/v1/namespaces/{}/jobs/{}"}


class Refused(Exception):
    """The API server answered, and not with success. `code` is the HTTP status."""

    def __init__(self, doing: str, code: int, message: str) -> None:
        super().__init__(f"{doing}: {message} (status {code})")
        self.code = code


class Unreachable(Exception):
    """No answer from the API server; the text says what was being done."""


class Reference(msgspec.Struct, frozen=True, omit_defaults=True):
    """An owner reference: the part that names the owner."""

    apiVersion: str = ""
    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool = False


class _Meta(msgspec.Struct):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    ownerReferences: list[Reference] = []


class _Pod(msgspec.Struct):
    metadata: _Meta = msgspec.field(default_factory=_Meta)


class PodOfMode(msgspec.Struct, frozen=True):
    """A pod that mounts an owner's Secret, and what controls it directly (None: nothing does)."""

    owner: Owner
    controller: Reference | None


def _convert(raw: _Pod) -> tuple[tuple[str, str], PodOfMode | None]:
    meta = raw.metadata
    owner = owner_of(meta.labels, meta.annotations, meta.namespace)
    controller = next((reference for reference in meta.ownerReferences if reference.controller), None)
    if controller is None and owner is not None and (owner.kind, owner.name) == ("pod", meta.name):
        controller = Reference("v1", "Pod", meta.name, meta.uid)
    return (meta.namespace, meta.name), None if owner is None else PodOfMode(owner, controller)


def _instead(sketch: Sketch, known: Mapping[tuple[str, str], PodOfMode]) -> tuple[tuple[str, str], PodOfMode | None]:
    """A pod that cannot be read stays as it was: its Secret goes on being renewed."""
    name = (sketch.namespace, sketch.name)
    return name, known.get(name)


PODS: Resource[_Pod, tuple[str, str], PodOfMode] = Resource(
    "/api/v1/pods", _Pod, _convert, _instead, metadata_only=True, params={"labelSelector": f"{LABEL_TLS}={OPTIONAL}"}
)
"""Names, labels, annotations and owners of the mode's pods: the `ca` has no use for the rest."""


class Api:
    """Raises `Refused` or `Unreachable`. `namespace` is the control plane's."""

    def __init__(self, http: httpx2.AsyncClient, namespace: str) -> None:
        self._http, self._namespace = http, namespace

    async def own_secret(self) -> tuple[str, dict[str, str]] | None:
        """Its resourceVersion and data (base64); None if there is none yet."""
        try:
            found = await self._ask("GET", f"/api/v1/namespaces/{self._namespace}/secrets/{CA_SECRET}")
        except Refused as error:
            if error.code == NOT_FOUND:
                return None
            raise
        return str(found["metadata"]["resourceVersion"]), dict(found.get("data") or {})

    async def write_own_secret(self, secret: Mapping[str, Any], version: str | None) -> None:
        """Makes it (`version` None), or replaces it if it is still of that version. `Refused` with 409 if it is not."""
        path = f"/api/v1/namespaces/{self._namespace}/secrets"
        if version is None:
            await self._ask("POST", path, secret)
        else:
            versioned = {**secret, "metadata": {**secret["metadata"], "resourceVersion": version}}
            await self._ask("PUT", f"{path}/{CA_SECRET}", versioned)

    async def put_secret(self, secret: Mapping[str, Any]) -> None:
        """Makes an owner's Secret, or replaces the one of its name."""
        meta = secret["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/secrets"
        try:
            await self._ask("POST", path, secret)
        except Refused as error:
            if error.code != CONFLICT:
                raise
            await self._ask("PUT", f"{path}/{meta['name']}", secret)

    async def controller_of(self, namespace: str, reference: Reference) -> Reference | None:
        """What controls a ReplicaSet or Job; None if nothing does, or it is gone."""
        # An owner reference is its pod's own word, and its name may be anything at all.
        path = _APIS[reference.kind].format(namespace, quote(reference.name, safe=""))
        try:
            found = await self._ask("GET", path)
        except Refused as error:
            if error.code == NOT_FOUND:
                return None
            raise
        meta = msgspec.convert(found["metadata"], _Meta)
        return next((above for above in meta.ownerReferences if above.controller), None)

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        async with _doing(f"{method} {path}"):
            response = await self._http.request(method, path, json=body)
            if not response.is_success:
                raise Refused(f"{method} {path}", response.status_code, _message(response))
            return dict(anything(response.content))


@asynccontextmanager
async def _doing(what: str) -> AsyncIterator[None]:
    try:
        yield
    except httpx2.HTTPError as error:
        raise Unreachable(f"{what}: {type(error).__name__} {error}".rstrip()) from error


def _message(response: httpx2.Response) -> str:
    try:
        return str(response.json().get("message", ""))[:300]
    except ValueError:
        return response.text[:300]
