"""A control plane for tests of the proxy: Mantle's own discovery and policy servers over a world that a test writes.

One process listens on 127.0.0.1:7001 of every meshed pod's network namespace (a proxy takes a loopback address in
plaintext) and serves identity, destination and policy there. Identity signs whatever is asked for: tokens are none of
the data plane's business. `world.json` in the folder given is read again at each SIGHUP; its number is printed when it
is what everybody is told.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc.aio
from prometheus_client import CollectorRegistry

from mantle.control import answers, destination, policy
from mantle.control.topics import Topics
from mantle.core.ca import SERIAL_BYTES, check_issuer, load_issuer, sign, template
from mantle.core.csr import check_csr
from mantle.core.model import ContainerPort, Key, Namespace, Owner, Pod, Service, ServicePort, Snapshot
from mantle.core.names import MeshNames, Workload
from mantle.core.world import EVERYWHERE, PRIVATE_NETWORKS, Mesh, World
from mantle.gen.io.linkerd.proxy import identity_pb2 as identity
from mantle.platform.machine.namespaces import setns

NAMES = MeshNames("mantle", "cluster.local")
PORT = 7001
NEWNET = 0x40000000


def snapshot(version: int, world: dict[str, Any]) -> Snapshot:
    """The world of `world.json` as the platform would tell it."""
    pods = [_pod(name, spec) for name, spec in world["pods"].items()]
    services = [
        Service(
            Key("test", name),
            spec["ip"],
            tuple(ServicePort("", int(port), target) for port, target in spec["ports"].items()),
            {"app": spec.get("selects", name)},
            spec.get("annotations", {}),
        )
        for name, spec in world["services"].items()
    ]
    return Snapshot(
        version,
        {pod.key: pod for pod in pods},
        {service.key: service for service in services},
        {"test": Namespace("test")},
    )


def _pod(name: str, spec: dict[str, Any]) -> Pod:
    meshed = spec["meshed"]
    return Pod(
        Key("test", name),
        f"uid-{name}",
        spec["ip"],
        spec["account"],
        Owner("Deployment", spec["app"]),
        labels={"app": spec["app"]} | ({"mantle.dev/control-plane-ns": "mantle"} if meshed else {}) | spec["labels"],
        annotations=spec["annotations"],
        ports=tuple(ContainerPort("", port) for port in spec["ports"]),
        ready=spec["ready"],
        proxy_started=meshed,
    )


class Plane:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = 0
        self.changed = asyncio.Event()
        read = [(folder / name).read_bytes() for name in ("issuer.pem", "issuer-key.pem", "roots.pem")]
        self.issuer: Any = load_issuer(*read)
        self.lifetime = timedelta(seconds=float(os.environ.get("LEAF_SECONDS", "86400")))

    async def watch(self) -> AsyncIterator[Snapshot]:
        while True:
            self.changed.clear()
            self.version += 1
            world = json.loads((self.folder / "world.json").read_text())
            yield snapshot(self.version, world)
            print(f"published {world['number']}", flush=True)  # whoever asks from now on is told of this world
            await self.changed.wait()

    async def certify(self, request: identity.CertifyRequest, _context: Any) -> identity.CertifyResponse:
        now = datetime.now(UTC)
        account, namespace = request.identity.split(".")[:2]
        valid: Any = check_issuer(self.issuer, now)
        csr: Any = check_csr(request.certificate_signing_request, request.identity)
        workload = Workload(namespace, account)
        wanted: Any = template(
            valid, csr, workload, NAMES, now, secrets.token_bytes(SERIAL_BYTES), self.lifetime, timedelta(seconds=5)
        )
        leaf: Any = sign(valid, wanted)
        answer = identity.CertifyResponse(
            leaf_certificate=leaf.der, intermediate_certificates=list(self.issuer.intermediates)
        )
        answer.valid_until.FromDatetime(leaf.not_after)
        return answer


def listener_in(namespace: str) -> socket.socket:
    """A listening socket in a network namespace, which it keeps for ever. Changes the calling thread's namespace."""
    fd = os.open(namespace, os.O_RDONLY)
    setns(fd, NEWNET)
    os.close(fd)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", PORT))
    listener.listen(64)
    listener.setblocking(False)
    return listener


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to: str) -> None:
    """gRPC listens on a Unix socket only: this brings a pod's connection there."""
    near_reader, near_writer = await asyncio.open_unix_connection(to)

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except (ConnectionError, OSError):
            pass
        finally:
            sink.close()

    await asyncio.gather(copy(reader, near_writer), copy(near_reader, writer))


async def serve(folder: Path, listeners: Sequence[socket.socket]) -> None:
    plane = Plane(folder)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, plane.changed.set)
    mesh = Mesh(NAMES, "cluster.local", PRIVATE_NETWORKS, EVERYWHERE, "all-unauthenticated")
    registry = CollectorRegistry()
    topics = Topics(World.empty(mesh))
    shared = answers.Answers(topics, answers.Metrics(registry, topics), None, True)
    certify = grpc.unary_unary_rpc_method_handler(
        plane.certify,
        request_deserializer=identity.CertifyRequest.FromString,
        response_serializer=identity.CertifyResponse.SerializeToString,
    )
    server = grpc.aio.server(
        options=[("grpc.http2.min_ping_interval_without_data_ms", 500), ("grpc.http2.max_ping_strikes", 0)]
    )
    server.add_generic_rpc_handlers(
        [
            destination.handler(shared),
            policy.outbound_handler(shared),
            policy.inbound_handler(shared),
            grpc.method_handlers_generic_handler("io.linkerd.proxy.identity.Identity", {"Certify": certify}),
        ]
    )
    path = str(folder / "plane.sock")
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    relays = [await asyncio.start_server(lambda r, w: forward(r, w, path), sock=sock) for sock in listeners]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(topics.follow(plane.watch()))
        await topics.known.wait()
        print("ready", flush=True)
        await asyncio.gather(*(relay.serve_forever() for relay in relays))


def main(folder: Path) -> None:
    (folder / "plane.sock").unlink(missing_ok=True)
    pods = json.loads((folder / "world.json").read_text())["pods"].values()
    asyncio.run(serve(folder, [listener_in(pod["netns"]) for pod in pods if pod["meshed"]]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
