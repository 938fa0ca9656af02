"""Keeps the webhook's certificate: Secret → renewed if due → CA bundle into the webhook configuration → served.

Several replicas do this side by side, without electing one. What is due is a pure function of the Secret and the time,
and a write names the Secret's version: of two writers one gets 409, reads again and finds nothing to do. The bundle is
written before a certificate that needs it is served, also under the configuration's version. The configuration is read
*before* the Secret, so a replica with an old view of the Secret cannot put an old bundle back: whoever changed the
Secret since also changed, or will change, the configuration after that read, and then one of the two writes is refused.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import ssl
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge

from mantle.control.injector_api import CONFLICT, Api, Refused, Unreachable
from mantle.core import serving_cert
from mantle.core.annotations import LABEL_COMPONENT
from mantle.core.serving_cert import Material, Plan, Unusable

log = logging.getLogger(__name__)

SECRET = "mantle-injector-tls"
CONFIGURATION = "mantle-injector"
LONGEST_CHECK = 10.0
"""Seconds between two looks at the Secret, at most."""


class Keeper:
    """`context` serves whatever certificate is current: connections that are open keep theirs."""

    def __init__(self, api: Api, plan: Plan, registry: CollectorRegistry, now: Callable[[], datetime]) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.missing = "no certificate yet"
        """Why the webhook cannot be called; empty if it can."""
        self._api, self._plan, self._now = api, plan, now
        self._served = b""
        self._renewals = Counter(
            "mantle_injector_certificate_writes", "Secret writes by this replica", registry=registry
        )
        self._reloads = Counter("mantle_injector_certificate_reloads", "certificates taken up", registry=registry)
        self._expiry = Gauge(
            "mantle_injector_certificate_expiry_timestamp_seconds", "when it ends, Unix time", registry=registry
        )

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
                    log.warning("the webhook's certificate cannot be looked after: %s", error)
                if not self._served:
                    self.missing = str(error)
            await asyncio.sleep(pause)

    async def check(self) -> None:
        """One look. Raises `Refused` or `Unreachable`; `Refused` with 409: somebody else was faster, look again."""
        version, bundles = await self._api.webhooks(CONFIGURATION)
        found = await self._api.secret(SECRET)
        current = serving_cert.load(found[1]) if found else Unusable("there is no such Secret")
        if (wanted := serving_cert.renewed(current, self._plan, self._now())) is not None:
            if isinstance(current, Unusable):
                log.info("making %s: %s", SECRET, current)
            labels = {LABEL_COMPONENT: "injector"}
            await self._api.write_secret(SECRET, found[0] if found else None, serving_cert.dump(wanted), labels)
            self._renewals.inc()
            current = wanted
        assert isinstance(current, Material)  # `renewed` leaves nothing unusable as it is
        bundle = base64.b64encode(current.bundle).decode()
        if any(there != bundle for there in bundles):
            await self._api.patch_bundles(CONFIGURATION, version, len(bundles), bundle)
        self._serve(current)

    def _serve(self, material: Material) -> None:
        data = serving_cert.dump(material)
        certificate, key = data[serving_cert.CERTIFICATE], data[serving_cert.KEY]
        if certificate != self._served:
            load_from_memory(self.context, certificate + key)
            self._served, self.missing = certificate, ""
            self._reloads.inc()
            until = material.certificate.not_valid_after_utc
            self._expiry.set(until.timestamp())
            log.info("serving a certificate valid until %s", f"{until:%Y-%m-%dT%H:%M:%SZ}")


def load_from_memory(context: ssl.SSLContext, pem: bytes) -> None:
    """Gives a context its certificate and key. The ssl module reads only files: this one has no name and no copy."""
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(Path(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)
