"""The newest platform snapshot, as viz's tasks share it: one writer (`follow`), readers take `snapshot` and keep it."""

from __future__ import annotations

import asyncio

from mantle.core.model import Key, Pod, Snapshot
from mantle.platform.port import Platform
from mantle.viz.edges import Addresses
from mantle.viz.mesh import is_live, is_meshed


class World:
    """`router`: the node's addresses, from which probes come. `own`: the pod this runs in.

    Our own proxy gives its metrics, but neither tap nor its table of clients: these need our certificate, and what a
    pod sends to itself does not pass its proxy.
    """

    def __init__(self, router: tuple[str, ...] = (), own: Key | None = None) -> None:
        self.own = own
        self.snapshot = Snapshot()
        self.addresses = Addresses.of(self.snapshot)
        self._router = router
        self._known = False
        self._changed = asyncio.Condition()

    async def follow(self, platform: Platform) -> None:
        """Takes every snapshot of the platform; never ends."""
        async for snapshot in platform.watch():
            await self.set(snapshot)

    async def set(self, snapshot: Snapshot) -> None:
        async with self._changed:
            self.snapshot, self._known = snapshot, True
            self.addresses = Addresses.of(snapshot, self._router, self.addresses)
            self._changed.notify_all()

    @property
    def is_known(self) -> bool:
        """False until the platform has answered."""
        return self._known

    async def after(self, snapshot: Snapshot | None) -> Snapshot:
        """The newest snapshot once it is another one than `snapshot`; None: once there is any."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._known and self.snapshot is not snapshot)
            return self.snapshot

    def proxies(self) -> list[Pod]:
        """The pods whose proxy can be asked now, by name."""
        pods = (p for p in self.snapshot.pods.values() if is_meshed(p) and is_live(p) and p.ip and p.proxy_started)
        return sorted(pods, key=lambda pod: str(pod.key))
