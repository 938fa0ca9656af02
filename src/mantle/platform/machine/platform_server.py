"""`mantle.v1.Platform` on `control/platform.sock`: what the three control-plane pods see of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc.aio
from joserfc.jwk import ECKey

from mantle.core.model import Snapshot
from mantle.platform import serve
from mantle.platform.machine import tokens
from mantle.platform.machine.controller import Controller
from mantle.platform.machine.trust import CONTROL_UID
from mantle.platform.port import TokenClaims, TokenRejected


class MachinePlatform:
    """The port `mantle.platform.port.Platform`, over the controller's world and the token key."""

    def __init__(self, controller: Controller, key: ECKey) -> None:
        self._controller, self._key = controller, key

    def watch(self) -> AsyncIterator[Snapshot]:
        return self._controller.world.watch()

    async def review_token(self, token: bytes, audiences: Sequence[str]) -> TokenClaims | TokenRejected:
        return tokens.review(self._key, token, audiences, time.time_ns() / 1e9, self._pod)

    def jwks(self) -> str:
        return tokens.jwks(self._key)

    def _pod(self, uid: str) -> tokens.BoundPod | None:
        state = self._controller.pods.get(uid)
        if state is None or state.gone:
            return None
        spec = state.spec
        return tokens.BoundPod(spec.name, spec.namespace, spec.meta["service_account"], spec.ip)


async def start(platform: MachinePlatform, path: Path, chown: bool) -> grpc.aio.Server:
    """Serves until the server is stopped. The socket is open to the control plane's user and nobody else."""
    path.unlink(missing_ok=True)  # noqa: ASYNC240 - tmpfs, once
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((serve.handler(platform),))
    if server.add_insecure_port(f"unix:{path}") == 0:
        raise OSError(f"{path} cannot be listened on")
    await server.start()
    path.chmod(0o600)  # noqa: ASYNC240 - tmpfs, once
    if chown:
        os.chown(path, CONTROL_UID, CONTROL_UID)
    return server
