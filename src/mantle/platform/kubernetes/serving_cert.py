"""Keeps the certificate of a server that the API server calls: Secret → renewed if due → CA bundle to where the API
server reads it → served.

Several replicas do this side by side, without electing one. What is due is a pure function of the Secret and the time,
and a write names the Secret's version: of two writers one gets 409, reads again and finds nothing to do. The bundle is
written before a certificate that needs it is served, also under its object's version. That object is read *before* the
Secret, so a replica with an old view of the Secret cannot put an old bundle back: whoever changed the Secret since also
changed, or will change, the object after that read, and then one of the two writes is refused.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lightkube import ApiError, AsyncClient
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Secret
from prometheus_client import CollectorRegistry, Counter, Gauge

from mantle.core import serving_cert
from mantle.core.annotations import LABEL_COMPONENT
from mantle.core.serving_cert import Material, Plan, Unusable
from mantle.platform.kubernetes.calls import CONFLICT, NOT_FOUND, Refused, Unreachable, doing
from mantle.platform.kubernetes.client import Client

log = logging.getLogger(__name__)

LONGEST_CHECK = 10.0
"""Seconds between two looks at the Secret, at most."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Where the API server reads whom to trust: an object, and the JSON pointers of its CA bundles."""

    path: str
    pointers: Callable[[Any], Sequence[str]]


def webhooks(name: str) -> Reader:
    """Every webhook of a MutatingWebhookConfiguration."""
    path = f"/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/{name}"
    return Reader(
        path, lambda found: [f"/webhooks/{n}/clientConfig/caBundle" for n in range(len(found.get("webhooks") or ()))]
    )


def api_service(name: str) -> Reader:
    """An APIService."""
    return Reader(f"/apis/apiregistration.k8s.io/v1/apiservices/{name}", lambda _: ["/spec/caBundle"])


class Keeper:
    """`show` is called with each certificate that is to be served: its chain and key, PEM. Connections that are open
    keep theirs.
    """

    def __init__(
        self,
        client: Client,
        namespace: str,
        component: str,
        reader: Reader,
        plan: Plan,
        show: Callable[[bytes], None],
        registry: CollectorRegistry,
        now: Callable[[], datetime],
    ) -> None:
        self.missing = "no certificate yet"
        """Why nobody can call; empty if they can."""
        self._client, self._namespace, self._component = client, namespace, component
        self._secret = f"mantle-{component}-tls"
        self._reader, self._plan, self._show, self._now = reader, plan, show, now
        self._served = b""
        name = f"mantle_{component}_certificate"
        self._renewals = Counter(f"{name}_writes", "Secret writes by this replica", registry=registry)
        self._reloads = Counter(f"{name}_reloads", "certificates taken up", registry=registry)
        self._expiry = Gauge(f"{name}_expiry_timestamp_seconds", "when it ends, Unix time", registry=registry)

    async def run(self) -> None:
        """Looks for ever. A failure is said and tried again; what is served stays."""
        wait = min(LONGEST_CHECK, self._plan.lifetime.total_seconds() / 30)
        while True:
            pause = wait
            try:
                await self.check()
            except (Refused, Unreachable) as error:
                if isinstance(error, Refused) and error.code == CONFLICT:
                    pause = min(wait, 0.05)
                else:
                    pause = min(wait, 1.0)
                    log.warning("the certificate of %s cannot be looked after: %s", self._component, error)
                if not self._served:
                    self.missing = str(error)
            await asyncio.sleep(pause)

    async def check(self) -> None:
        """One look. Raises `Refused` or `Unreachable`; `Refused` with 409: somebody else was faster, look again."""
        version, bundles = await self._bundles()
        found = await self._read()
        current = serving_cert.load(found[1]) if found else Unusable("there is no such Secret")
        if (wanted := serving_cert.renewed(current, self._plan, self._now())) is not None:
            if isinstance(current, Unusable):
                log.info("making %s: %s", self._secret, current)
            await self._write(found[0] if found else None, serving_cert.dump(wanted))
            self._renewals.inc()
            current = wanted
        assert isinstance(current, Material)  # `renewed` leaves nothing unusable as it is
        bundle = base64.b64encode(current.bundle).decode()
        if stale := [pointer for pointer, there in bundles.items() if there != bundle]:
            await self._patch(version, stale, bundle)
        self._serve(current)

    def _serve(self, material: Material) -> None:
        data = serving_cert.dump(material)
        certificate, key = data[serving_cert.CERTIFICATE], data[serving_cert.KEY]
        if certificate != self._served:
            self._show(certificate + key)
            self._served, self.missing = certificate, ""
            self._reloads.inc()
            until = material.certificate.not_valid_after_utc
            self._expiry.set(until.timestamp())
            log.info("serving a certificate valid until %s", f"{until:%Y-%m-%dT%H:%M:%SZ}")

    # ---- the API ----

    async def _bundles(self) -> tuple[str, dict[str, str]]:
        """The reader's resourceVersion, and the CA bundle (base64) at each of its pointers."""
        async with doing(f"get {self._reader.path}"):
            response = await self._client.http.get(self._reader.path)
            response.raise_for_status()
        found = response.json()
        version = str(found.get("metadata", {}).get("resourceVersion", ""))
        return version, {pointer: str(_at(found, pointer) or "") for pointer in self._reader.pointers(found)}

    async def _patch(self, version: str, pointers: Sequence[str], bundle: str) -> None:
        """Writes the bundle. `Refused` with 409 if the version is another now."""
        patch = [{"op": "replace", "path": "/metadata/resourceVersion", "value": version}]
        patch += [{"op": "add", "path": pointer, "value": bundle} for pointer in pointers]
        headers = {"Content-Type": "application/json-patch+json"}
        async with doing(f"patch {self._reader.path}"):
            (await self._client.http.patch(self._reader.path, json=patch, headers=headers)).raise_for_status()

    async def _read(self) -> tuple[str, dict[str, bytes]] | None:
        """The Secret's resourceVersion and data. None if there is no such Secret."""
        async with doing(f"get Secret {self._namespace}/{self._secret}"):
            try:
                found = await self._client.get(Secret, self._secret, namespace=self._namespace)
            except ApiError as error:
                if error.status.code == NOT_FOUND:
                    return None
                raise
        data = {key: base64.b64decode(value) for key, value in (found.data or {}).items()}
        return str(found.metadata.resourceVersion if found.metadata else ""), data

    async def _write(self, version: str | None, data: Mapping[str, bytes]) -> None:
        """Makes the Secret (`version` None), or replaces it if it is still of that version, else `Refused` with 409."""
        labels = {LABEL_COMPONENT: self._component}
        meta = ObjectMeta(name=self._secret, namespace=self._namespace, resourceVersion=version, labels=labels)
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        secret = Secret(metadata=meta, data=encoded, type="kubernetes.io/tls")
        client: AsyncClient = self._client
        async with doing(f"write Secret {self._namespace}/{self._secret}"):
            await (client.create(secret) if version is None else client.replace(secret))


def _at(document: Any, pointer: str) -> Any:
    """What is at a JSON pointer of ours; None if it is not there."""
    for part in pointer.removeprefix("/").split("/"):
        document = document[int(part)] if isinstance(document, list) else (document or {}).get(part)
    return document


def load_from_memory(context: ssl.SSLContext, pem: bytes) -> None:
    """Gives a context its certificate and key. The ssl module reads only files: this one has no name and no copy.

    Raises `ssl.SSLError`.
    """
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(Path(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)
