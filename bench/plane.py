"""Mantle's own control plane over a fixed world of two pods, for the rig: `out` (the client) and `in` (the server).

Serves `mantle.v1.Platform` from values and runs the real programs against it: identity once for each proxy (over
loopback it serves only the sidecar of its own pod), destination and policy once. Both pods are in the control
namespace, because that is where identity looks for its own. Ends what it started.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import grpc.aio

from mantle.core.ca import make_trust
from mantle.core.model import ContainerPort, Key, Namespace, Owner, Pod, Snapshot
from mantle.core.names import MeshNames
from mantle.platform import serve
from mantle.platform.machine import tokens
from mantle.platform.port import TokenClaims, TokenRejected

MESH = MeshNames("mantle", "cluster.local")
AUDIENCE = "identity.mantle.dev"


class World:
    """A platform that never changes."""

    def __init__(self, service_ip: str, ports: Sequence[int], inbound_port: int) -> None:
        self.key = tokens.new_key()
        self.pods = {
            name: self._pod(name, ip, ports, inbound_port) for name, ip in (("out", "127.0.0.2"), ("in", service_ip))
        }
        self.snapshot = Snapshot(1, {pod.key: pod for pod in self.pods.values()}, {}, {"mantle": Namespace("mantle")})

    def _pod(self, name: str, ip: str, ports: Sequence[int], inbound_port: int) -> Pod:
        return Pod(
            Key("mantle", name),
            f"uid-{name}",
            ip,
            name,
            Owner("Pod", name),
            labels={"mantle.dev/control-plane-ns": "mantle"},
            annotations={"config.mantle.dev/inbound-port": str(inbound_port)},
            ports=tuple(ContainerPort("", port) for port in ports),
            ready=True,
            proxy_started=True,
        )

    async def watch(self) -> AsyncIterator[Snapshot]:
        yield self.snapshot
        await asyncio.Event().wait()

    def token(self, name: str) -> str:
        now = datetime.now(UTC).timestamp()
        return tokens.sign(self.key, tokens.Subject("mantle", name, name, f"uid-{name}"), AUDIENCE, 3600, now)

    async def review_token(self, token: bytes, audiences: Sequence[str]) -> TokenClaims | TokenRejected:
        bound = {p.uid: tokens.BoundPod(p.key.name, "mantle", p.service_account, p.ip) for p in self.pods.values()}
        return tokens.review(self.key, token, audiences, datetime.now(UTC).timestamp(), bound.get)

    def jwks(self) -> str:
        return tokens.jwks(self.key)


async def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--run", type=Path, required=True, help="scratch folder: sockets, tokens, trust roots")
    flags.add_argument("--service-ip", required=True, help="the server's pod address")
    flags.add_argument("--ports", type=lambda text: [int(port) for port in text.split(",")], required=True)
    for name in ("identity-in", "identity-out", "destination", "policy", "ready"):
        flags.add_argument(f"--{name}-port", type=int, required=True)
    flags.add_argument("--inbound-port", type=int, default=4143, help="the inbound proxy's")
    o = flags.parse_args()
    run: Path = o.run
    world = World(o.service_ip, o.ports, o.inbound_port)
    trust = make_trust(MESH, datetime.now(UTC), (secrets.token_bytes(16), secrets.token_bytes(16)))
    os.umask(0o077)
    (run / "issuer").mkdir()
    (run / "issuer/crt.pem").write_bytes(trust.issuer_pem)
    (run / "issuer/key.pem").write_bytes(trust.issuer_key_pem)
    (run / "trust-roots.pem").write_bytes(trust.roots_pem)
    for name, uid in (("out", 2102), ("in", 2103)):
        (run / f"{name}.token").write_text(world.token(name))
        os.chown(run / f"{name}.token", uid, uid)
    (run / "trust-roots.pem").chmod(0o644)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers([serve.handler(world)])
    server.add_insecure_port(f"unix:{run}/platform.sock")
    await server.start()
    shared = [f"--platform=unix:{run}/platform.sock", "--admin"]
    programs = [
        *(["identity", *shared, "127.0.0.1:0", f"--listen=127.0.0.1:{port}", f"--pod-name={name}",
           f"--issuer={run}/issuer", f"--trust-roots={run}/trust-roots.pem"]
          for name, port in (("in", o.identity_in_port), ("out", o.identity_out_port))),
        ["destination", *shared, f"127.0.0.1:{o.ready_port}", f"--listen=127.0.0.1:{o.destination_port}",
         f"--policy-listen=127.0.0.1:{o.policy_port}", "--allow-anonymous"],
    ]  # fmt: skip
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    python = (sys.executable, "-m", "mantle.control_plane")
    started = [await asyncio.create_subprocess_exec(*python, *argv) for argv in programs]
    try:
        await stop.wait()
    finally:
        for program in started:
            if program.returncode is None:
                program.terminate()
        await asyncio.gather(*(program.wait() for program in started))
        await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
