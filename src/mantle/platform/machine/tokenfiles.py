"""Projected tokens on disk: written when a pod starts, written anew at 80 % of their life, each file in one step."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from joserfc.jwk import ECKey

from mantle.platform.machine import tokens
from mantle.platform.machine.podfiles import write_token
from mantle.platform.machine.spec import PodSpec
from mantle.platform.machine.state import StateDir

log = logging.getLogger("mantle.tokens")


@dataclass(slots=True)
class _Held:
    spec: PodSpec
    due: float


class TokenFiles:
    """Every token file of a mesh. Times are Unix seconds."""

    def __init__(self, key: ECKey, store: StateDir, chown: bool) -> None:
        self._key, self._store, self._chown = key, store, chown
        self._held: dict[str, _Held] = {}
        self._wake = asyncio.Event()

    def issue(self, spec: PodSpec) -> None:
        """Writes every token of a pod now, and keeps them fresh until `forget`."""
        now = time.time_ns() / 1e9
        due: list[float] = []
        meta = spec.meta
        who = tokens.Subject(spec.namespace, meta["service_account"], spec.name, spec.uid)
        for volume, value in meta["volumes"].items():
            owners = tuple((int(uid), int(gid)) for uid, gid in value["owners"])
            for path, audience, seconds in value["tokens"]:
                token = tokens.sign(self._key, who, audience, seconds, now)
                write_token(self._store.pods / spec.uid / "volumes" / volume / path, token, owners, self._chown)
                due.append(tokens.renew_at(now, seconds))
        if due:
            self._held[spec.uid] = _Held(spec, min(due))
            self._wake.set()

    def forget(self, uid: str) -> None:
        self._held.pop(uid, None)

    async def run(self) -> None:
        """Renews until cancelled."""
        while True:
            self._wake.clear()
            now = time.time_ns() / 1e9
            for held in [h for h in self._held.values() if h.due <= now]:
                try:
                    self.issue(held.spec)
                except OSError as error:
                    log.error("token of pod %s could not be written, tried again in 10 s: %s", held.spec.name, error)
                    held.due = now + 10
            nearest = min((h.due for h in self._held.values()), default=None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if nearest is None else max(0.0, nearest - now)):
                    await self._wake.wait()
