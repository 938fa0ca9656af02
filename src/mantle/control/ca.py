"""The experimental mode's `ca`: watches pods, makes each owner's key and certificate, puts them into a Secret.

`core/optional_tls.py` is the design and decides what is due; this carries it out: one loop that is woken by changes of
pods and by time. What was issued is remembered here and nowhere else (the `ca` cannot read owners' Secrets), so a
restart issues everything anew. One failure holds up one owner, and is tried again. The mode is the weaker one, and the
log says so.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

from mantle.control.ca_api import CONFLICT, PODS, Api, PodOfMode, Reference, Refused, Unreachable
from mantle.core import ca
from mantle.core import optional_tls as tls
from mantle.core.ca import Refusal
from mantle.core.names import BadName
from mantle.core.optional_names import OptionalNames, Owner

log = logging.getLogger(__name__)

RETRY = timedelta(seconds=5)
"""Before what failed is tried again."""
LOOK = timedelta(minutes=5)
"""At the longest between two looks: clocks may jump."""
AT_ONCE = 8
"""Secrets written at the same time."""


class Cluster(Protocol):
    """What is asked of the cluster (`ca_api.Api`)."""

    async def own_secret(self) -> tuple[str, dict[str, str]] | None: ...
    async def write_own_secret(self, secret: Mapping[str, Any], version: str | None) -> None: ...
    async def put_secret(self, secret: Mapping[str, Any]) -> None: ...
    async def controller_of(self, namespace: str, reference: Reference) -> Reference | None: ...


class Metrics:
    """What is counted."""

    def __init__(self, registry: CollectorRegistry, authority: Authorities) -> None:
        self.issued = Counter("mantle_ca_issued", "Keys and certificates put into Secrets.", registry=registry)
        self.failed = Counter("mantle_ca_failed", "Owners whose Secret could not be written.", registry=registry)
        self.owners = Gauge("mantle_ca_owners", "Owners of pods of the experimental mode.", registry=registry)
        ttl = Gauge("mantle_ca_root_ttl_seconds", "Seconds until the ca's issuer and root end.", registry=registry)
        ttl.set_function(authority.ttl)


@dataclass(slots=True)
class Authorities:
    """The ca's own root and issuer: read from its Secret, made when there is none, made anew in time."""

    cluster: Cluster
    names: OptionalNames
    version: str
    now: Callable[[], datetime]
    entropy: Callable[[int], bytes]
    current: tls.Authority | None = None
    valid: ca.ValidIssuer | None = None
    missing: str = "the ca has not read its Secret yet"
    """Why nothing can be issued; empty if it can."""

    async def refresh(self) -> None:
        """Reads or makes what signs. Raises `Refused` (409: somebody else made it, look again) or `Unreachable`."""
        found = await self.cluster.own_secret()
        version, authority = None, None
        if found is not None:
            read = tls.read_authority(found[1])
            if isinstance(read, Refusal):
                self._lacking(read)
                return
            version, authority = found[0], read
        issuer = None if authority is None else _issuer(authority)
        if isinstance(issuer, Refusal):
            self._lacking(issuer)
            return
        if authority is None or issuer is None or tls.root_due(issuer, self.now()):
            serials = (self.entropy(ca.SERIAL_BYTES), self.entropy(ca.SERIAL_BYTES))
            authority = tls.new_authority(self.names, self.now(), serials, authority)
            secret = tls.authority_secret(authority, self.names.mesh.control_namespace, self.version)
            await self.cluster.write_own_secret(secret, version)
            log.info("made a new root for the experimental mode: %s", self.names.root)
            issuer = _issuer(authority)
        checked = issuer if isinstance(issuer, Refusal) else ca.check_issuer(issuer, self.now())
        if isinstance(checked, Refusal):
            self._lacking(checked)
            return
        self.current, self.valid, self.missing = authority, checked, ""

    def ttl(self) -> float:
        return (self.valid.issuer.not_after - self.now()).total_seconds() if self.valid else 0.0

    def _lacking(self, why: Refusal) -> None:
        self.current, self.valid, self.missing = None, None, str(why)
        log.error("the ca issues nothing: %s", why)


def _issuer(authority: tls.Authority) -> ca.Issuer | Refusal:
    trust = authority.trust
    return ca.load_issuer(trust.issuer_pem, trust.issuer_key_pem, trust.roots_pem)


@dataclass(slots=True)
class Distributor:
    """Keeps owners' Secrets what is due. `pods` is the reflector's live copy."""

    cluster: Cluster
    authorities: Authorities
    pods: Mapping[tuple[str, str], PodOfMode]
    metrics: Metrics
    now: Callable[[], datetime]
    entropy: Callable[[int], bytes]
    lifetime: timedelta = tls.LIFETIME
    skew: timedelta = ca.CLOCK_SKEW
    issued: dict[Owner, tls.Material] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when pods changed."""
    _references: dict[tuple[str, str], Reference | None] = field(default_factory=dict)

    async def run(self) -> None:
        """Never ends by itself."""
        while True:
            self.changed.clear()
            wait = await self.look()
            try:
                async with asyncio.timeout(max(0.0, wait.total_seconds())):
                    await self.changed.wait()
            except TimeoutError:
                pass

    async def look(self) -> timedelta:
        """Does what is due now; how long to wait for the next look if no pod changes."""
        try:
            await self.authorities.refresh()
        except (Refused, Unreachable) as error:
            if not (isinstance(error, Refused) and error.code == CONFLICT):
                self.authorities.missing = self.authorities.missing and str(error)
                log.warning("the ca's own Secret cannot be looked after: %s", error)
            return RETRY
        authority, valid = self.authorities.current, self.authorities.valid
        if authority is None or valid is None:
            return RETRY
        controllers = {pod.owner: pod.controller for pod in self.pods.values()}
        self.metrics.owners.set(len(controllers))
        if controllers:
            controllers.setdefault(self.authorities.names.observer, None)
        due = tls.due(frozenset(controllers), self.issued, authority, self.now())
        for owner in due.forget:
            del self.issued[owner]  # its Secret goes with its owner, by owner reference
        room = asyncio.Semaphore(AT_ONCE)

        async def one(owner: Owner) -> bool:
            async with room:
                return await self._issue(owner, controllers[owner], authority, valid)

        done = await asyncio.gather(*(one(owner) for owner in due.issue))
        if not all(done):
            return RETRY
        next_at = tls.due(frozenset(controllers), self.issued, authority, self.now()).next_at
        return min(LOOK, next_at - self.now()) if next_at else LOOK

    async def _issue(
        self, owner: Owner, controller: Reference | None, authority: tls.Authority, valid: ca.ValidIssuer
    ) -> bool:
        names = self.authorities.names
        serial = self.entropy(ca.SERIAL_BYTES)
        material = tls.issue(valid, authority, owner, names, self.now(), serial, self.lifetime, self.skew)
        if isinstance(material, Refusal | BadName):
            log.error("no certificate for %s: %s", owner, material)
            self.metrics.failed.inc()
            return not isinstance(material, Refusal)  # a name that cannot be does not become better by waiting
        try:
            reference = await self._reference(owner, controller)
            owned_by = None if reference is None else _as_object(reference)
            control_namespace = names.mesh.control_namespace
            await self.cluster.put_secret(tls.material_secret(material, control_namespace, owned_by))
        except (Refused, Unreachable) as error:
            log.warning("the Secret of %s could not be written: %s", owner, error)
            self.metrics.failed.inc()
            return False
        self.issued[owner] = material
        self.metrics.issued.inc()
        until = f"{material.not_after:%Y-%m-%dT%H:%M:%SZ}"
        log.info("Secret %s/%s: %s until %s", owner.namespace, owner.secret, material.identity, until)
        return True

    async def _reference(self, owner: Owner, controller: Reference | None) -> Reference | None:
        """What the Secret goes away with; None if the pod's controllers do not lead to the owner it names."""
        seen = controller
        if seen is not None and (seen.kind.lower(), seen.name) != (owner.kind, owner.name):
            if seen.kind not in ("ReplicaSet", "Job"):
                return None
            key = (owner.namespace, seen.uid)
            if key not in self._references:
                self._references[key] = await self.cluster.controller_of(owner.namespace, seen)
            seen = self._references[key]
        if seen is None or (seen.kind.lower(), seen.name) != (owner.kind, owner.name):
            return None
        return seen


def _as_object(reference: Reference) -> dict[str, Any]:
    return {
        "apiVersion": reference.apiVersion,
        "kind": reference.kind,
        "name": reference.name,
        "uid": reference.uid,
    }


# ---- the program ----


def main(argv: Sequence[str]) -> int:
    """`python -m mantle.control_plane ca`: distributes until SIGTERM. Returns the exit code."""
    from mantle.control import program

    flags = argparse.ArgumentParser("mantle.control_plane ca", allow_abbrev=False)
    flags.add_argument("--admin", type=program.address, default=program.address("0.0.0.0:9992"))
    flags.add_argument("--control-namespace", default="mantle")
    flags.add_argument("--trust-domain", default="cluster.local")
    flags.add_argument("--issuance-lifetime", type=program.duration, default=tls.LIFETIME, help="of a leaf: 24h, 10s …")
    flags.add_argument("--clock-skew-allowance", type=program.duration, default=ca.CLOCK_SKEW)
    options = flags.parse_args(argv)
    from mantle.core.names import mesh_names

    names = mesh_names(options.control_namespace, options.trust_domain)
    if isinstance(names, BadName):
        flags.error(str(names))
    return program.run(serve(options, OptionalNames(names)))


async def serve(options: argparse.Namespace, names: OptionalNames) -> None:
    from mantle import __version__
    from mantle.control import program
    from mantle.control.admin import admin_server
    from mantle.platform.kubernetes.client import in_cluster
    from mantle.platform.kubernetes.reflector import Reflector

    registry = CollectorRegistry()
    async with in_cluster() as client, asyncio.TaskGroup() as tasks:
        api = Api(client.http, options.control_namespace)
        authorities = Authorities(api, names, __version__, program.now, secrets.token_bytes)
        reflector = Reflector(client.http, PODS, lambda _: distributor.changed.set())
        distributor = Distributor(
            api,
            authorities,
            reflector.objects,
            Metrics(registry, authorities),
            program.now,
            secrets.token_bytes,
            options.issuance_lifetime,
            options.clock_skew_allowance,
        )

        async def distribute() -> None:
            # Before all pods are known, owners would be forgotten that are only not heard of yet.
            await reflector.synced.wait()
            await distributor.run()

        def not_ready() -> str:
            return authorities.missing or ("" if reflector.synced.is_set() else "pods are not known yet")

        running = [tasks.create_task(reflector.run()), tasks.create_task(distribute())]
        async with admin_server(options.admin, registry, not_ready):
            await program.until_told(f"distributing keys below {names.suffix}: EXPERIMENTAL, the weaker mode")
        for task in running:
            task.cancel()
