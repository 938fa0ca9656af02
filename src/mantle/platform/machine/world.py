"""What the mesh is told about this machine: one writer makes snapshots, readers wait for the next one.

Also the two other faces of the same facts: the names that DNS answers and the router's service table.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

from mantle.core.model import Key, Namespace, Service, Snapshot
from mantle.platform.machine import dns as cluster
from mantle.platform.machine import services as svc
from mantle.platform.machine.manifest import Object
from mantle.platform.machine.pods import FINISHED, PodState
from mantle.platform.machine.reconcile import Addresses
from mantle.platform.machine.state import MeshConfig


class ServiceAddresses:
    """Gives each service its address: the same as long as the mesh lives, and the same after a restart."""

    def __init__(self, config: MeshConfig, known: Mapping[str, str]) -> None:
        self._free = Addresses(*config.service_range())
        self.given: dict[str, str] = {}
        for name, address in known.items():
            self._free.take(int(ipaddress.IPv4Address(address)))
            self.given[name] = address

    def assign(self, services: Iterable[Object]) -> bool:
        """Addresses for these services and no others; True if something changed. Raises RuntimeError when none is
        left.
        """
        before = dict(self.given)
        wanted = {f"{s.namespace}/{s.name}": s for s in services if not svc.is_headless(s)}
        for name in [n for n in self.given if n not in wanted]:
            self._free.give_back(int(ipaddress.IPv4Address(self.given.pop(name))))
        for name, item in wanted.items():
            if name not in self.given:
                asked = str(item.doc["spec"].get("clusterIP") or "")
                first = _number(asked) or svc.preferred_address(
                    item.namespace, item.name, self._free.first, self._free.last
                )
                address = self._free.take(first)
                if address is None:
                    raise RuntimeError(
                        "the network of the services has no free address: start the mesh with a larger --service-cidr"
                    )
                self.given[name] = str(ipaddress.IPv4Address(address))
        return before != self.given


def _number(text: str) -> int | None:
    try:
        return int(ipaddress.IPv4Address(text))
    except ValueError:
        return None


class World:
    """The newest snapshot and its faces. Call `publish` after every change; equal content makes no new version."""

    def __init__(self, config: MeshConfig, node: str) -> None:
        self._config, self._node = config, node
        self.snapshot = Snapshot()
        self.names = cluster.View(networks=tuple(ipaddress.IPv4Network(n) for n in config.networks))
        self.table: tuple[svc.Row, ...] = ()
        self._next = asyncio.Event()

    def publish(self, objects: Iterable[Object], pods: Sequence[PodState], addresses: Mapping[str, str]) -> bool:
        """Makes the snapshot of now. True if it says something new."""
        objects = list(objects)
        models = {p.key: p.model(self._node) for p in pods if not p.gone and p.status.phase not in FINISHED}
        services: dict[Key, Service] = {}
        for item in objects:
            if item.kind == "Service":
                ip = "None" if svc.is_headless(item) else addresses[f"{item.namespace}/{item.name}"]
                services[Key(item.namespace, item.name)] = svc.service(item, ip)
        namespaces = {item.namespace: Namespace(item.namespace) for item in objects if item.namespace}
        for item in objects:
            if item.kind == "Namespace":
                meta = item.doc["metadata"]
                namespaces[item.name] = Namespace(
                    item.name, dict(meta.get("labels") or {}), dict(meta.get("annotations") or {})
                )
        before = self.snapshot
        if (models, services, namespaces) == (before.pods, before.services, before.namespaces):
            return False
        self.snapshot = Snapshot(before.version + 1, models, services, namespaces)
        hostnames = {p.key: (p.spec.meta["pod_hostname"], p.spec.meta["subdomain"]) for p in pods}
        self.names = cluster.view(services, [(m, *hostnames[k]) for k, m in models.items()], self._config.networks)
        self.table = svc.table(services, models.values())
        self._next.set()
        self._next = asyncio.Event()
        return True

    async def watch(self) -> AsyncIterator[Snapshot]:
        """The newest snapshot, then each newer one; a slow reader skips those between."""
        seen = -1
        while True:
            following, now = self._next, self.snapshot
            if now.version != seen:
                seen = now.version
                yield now
            else:
                await following.wait()
