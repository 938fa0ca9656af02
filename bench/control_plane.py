"""Measures identity and destination as they run: certificates, fan-out, first answers beside both, idle streams.

    python bench/control_plane.py [certify] [fanout] [beside] [memory] [--append]

Both programs are pinned to core 0, everything that drives them to core 1, over loopback in plaintext (their sidecars do
TLS). First answers are asked by an open-loop driver: each call's time counts from when it was *due*, so that a server
that stops answering cannot slow its own measurement down. asyncio's timers have a grain of 1 ms, which is in every
latency here. CPU is utime+stime of the server. `--append` adds the tables to bench/RESULTS.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform as machine
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mantle.core.ca import make_trust
from mantle.core.model import ContainerPort, Key, Namespace, Owner, Pod, Service, ServicePort, Snapshot
from mantle.core.names import MeshNames
from mantle.gen.io.linkerd.proxy import destination_pb2, identity_pb2, net_pb2, outbound_pb2
from mantle.platform.port import TokenClaims
from mantle.platform.serve import handler

ROOT = Path(__file__).resolve().parent.parent
SERVERS, DRIVERS = {0}, {1}
NAMES = MeshNames("mantle", "cluster.local")
CLIENT = "web.emojivoto.serviceaccount.identity.mantle.cluster.local"
METADATA = (("l5d-client-id", CLIENT),)
CONTEXT = '{"ns":"emojivoto","pod":"web-1"}'
PATH = "topic.emojivoto.svc.cluster.local:80"
STREAMS, PER_CONNECTION = 1000, 50

# ---- the world that the servers see ----


def pod(name: str, ip: str, app: str) -> Pod:
    labels = {"app": app, "mantle.dev/control-plane-ns": "mantle"}
    ports = (ContainerPort("http", 8080),)
    return Pod(
        Key("emojivoto", name), name, ip, "web", Owner("Deployment", app), labels, {}, ports,
        ready=True, proxy_started=True,
    )  # fmt: skip


class Platform:
    """The platform's end: any token is fine, and one pod of the service `topic` is renamed at each change."""

    def __init__(self) -> None:
        self._version = 0
        self._news = asyncio.Condition()
        self._snapshot = Snapshot()

    async def change(self) -> None:
        """The new pod's name holds the time of the change, which subscribers read from their message."""
        async with self._news:
            self._version += 1
            pods = [pod("web-1", "10.203.0.1", "web"), pod(f"t-{time.monotonic_ns()}", "10.203.0.2", "topic")]
            service = Service(
                Key("emojivoto", "topic"), "10.203.128.1", (ServicePort("http", 80, "http"),), {"app": "topic"}
            )
            self._snapshot = Snapshot(
                self._version,
                {p.key: p for p in pods},
                {service.key: service},
                {"emojivoto": Namespace("emojivoto")},
            )
            self._news.notify_all()

    async def watch(self) -> AsyncIterator[Snapshot]:
        sent = Snapshot()
        while True:
            async with self._news:
                while self._snapshot is sent:
                    await self._news.wait()
                sent = self._snapshot
            yield sent

    async def review_token(self, token: bytes, audiences: Sequence[str]) -> TokenClaims:
        return TokenClaims("emojivoto", "web", "web-1", "uid", "10.203.0.1")

    def jwks(self) -> str:
        return "{}"


# ---- drivers: each a process of its own, one JSON line as its result ----


async def drive_certify(target: str, rate: float, seconds: float) -> dict[str, Any]:
    """Open loop at `rate` calls a second; 0 is a closed loop of 60 in flight (a storm)."""
    requests = [certify_request() for _ in range(100)]
    latencies: list[float] = []
    outcomes: dict[str, int] = {}
    channels = [grpc.aio.insecure_channel(target, options=[("bench", n)]) for n in range(8)]
    calls = [
        channel.unary_unary(
            "/io.linkerd.proxy.identity.Identity/Certify", identity_pb2.CertifyRequest.SerializeToString, None
        )
        for channel in channels
    ]
    loop = asyncio.get_running_loop()
    begin = loop.time() + 0.2

    async def one(number: int, due: float) -> None:
        try:
            await calls[number % 8](requests[number % 100], metadata=(("mantle-client-addr", "10.203.0.1"),))
            outcome = "issued"
        except grpc.aio.AioRpcError as error:
            outcome = error.code().name
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome == "issued":
            latencies.append(loop.time() - due)

    async def storm(number: int) -> None:
        while loop.time() < begin + seconds:
            await one(number, loop.time())

    async with asyncio.TaskGroup() as tasks:
        if rate:
            await at_rate(tasks, one, begin, rate, seconds)
        else:
            for number in range(60):
                tasks.create_task(storm(number))
    return {"outcomes": outcomes, "seconds": loop.time() - begin, **spread(latencies)}


async def drive_first_answers(target: str, rate: float, seconds: float) -> dict[str, Any]:
    """Open loop: policies of a stranger's address, which are NotFound."""
    latencies: list[float] = []
    channel = grpc.aio.insecure_channel(target)
    watch = channel.unary_stream(
        "/io.linkerd.proxy.outbound.OutboundPolicies/Watch", outbound_pb2.TrafficSpec.SerializeToString, None
    )
    address = net_pb2.TcpAddress(ip=net_pb2.IPAddress(ipv4=0x08080808), port=443)
    request = outbound_pb2.TrafficSpec(source_workload=CONTEXT, addr=address)
    loop = asyncio.get_running_loop()
    begin = loop.time() + 0.2

    async def one(_: int, due: float) -> None:
        code = await watch(request, metadata=METADATA).code()
        assert code is grpc.StatusCode.NOT_FOUND, code
        latencies.append(loop.time() - due)

    async with asyncio.TaskGroup() as tasks:
        await at_rate(tasks, one, begin, rate, seconds)
    return spread(latencies)


async def drive_subscribers(target: str, streams: float, _: float) -> dict[str, Any]:
    """Subscribes, says `ready` on a line of its own, reads until standard input closes; the delay of each message."""
    get = destination_pb2.GetDestination(scheme="k8s", path=PATH, context_token=CONTEXT)
    begun = time.monotonic()
    waves: dict[int, list[float]] = {}
    first: list[float] = []

    async def subscribe(channel: grpc.aio.Channel) -> None:
        opened = time.monotonic()
        call = channel.unary_stream(
            "/io.linkerd.proxy.destination.Destination/Get",
            destination_pb2.GetDestination.SerializeToString,
            None,
        )(get, metadata=METADATA)
        await call.read()
        first.append(time.monotonic() - opened)
        if len(first) == streams:
            print("ready", flush=True)
        while True:
            message = await call.read()
            now = time.monotonic_ns()
            (endpoint,) = destination_pb2.Update.FromString(message).add.addrs
            made = int(endpoint.metric_labels["pod"].removeprefix("t-"))
            waves.setdefault(made, []).append((now - made) / 1e9)

    loop = asyncio.get_running_loop()
    channels = [
        grpc.aio.insecure_channel(target, options=[("bench", n)]) for n in range(-(-int(streams) // PER_CONNECTION))
    ]
    tasks = [loop.create_task(subscribe(channels[n // PER_CONNECTION])) for n in range(int(streams))]
    for task in tasks:
        task.add_done_callback(lambda done: None if done.cancelled() else print(done.exception(), file=sys.stderr))
    await loop.run_in_executor(None, sys.stdin.read)
    for task in tasks:
        task.cancel()
    whole = [max(delays) for delays in waves.values() if len(delays) == streams]
    every = [delay for delays in waves.values() for delay in delays]
    return {
        "subscribed_s": max(first) and time.monotonic() - begun,
        "first": spread(first),
        "waves": len(whole),
        "last": spread(whole),
        "each": spread(every),
    }


async def at_rate(tasks: asyncio.TaskGroup, one: Any, begin: float, rate: float, seconds: float) -> None:
    """Starts `one(number, due)` at its time, whatever became of the earlier ones."""
    loop = asyncio.get_running_loop()
    for number in range(int(rate * seconds)):
        due = begin + number / rate
        if due > loop.time():
            await asyncio.sleep(due - loop.time())
        tasks.create_task(one(number, due))


def certify_request() -> identity_pb2.CertifyRequest:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(CLIENT)]), critical=False)
    csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    return identity_pb2.CertifyRequest(identity=CLIENT, token=b"t" * 1000, certificate_signing_request=csr)


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and worst, in milliseconds."""
    if len(seconds) < 2:
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}
    parts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": parts[49] * 1000, "p99": parts[98] * 1000, "max": max(seconds) * 1000}


DRIVERS_BY_NAME = {"certify": drive_certify, "first": drive_first_answers, "subscribe": drive_subscribers}

# ---- the rig ----


class Rig:
    """The platform in this process, both servers pinned to one core."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.platform = Platform()
        self.certify, self.destination, self.policy = (f"127.0.0.1:{port}" for port in (28080, 28086, 28090))
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Rig:
        os.sched_setaffinity(0, DRIVERS)
        trust = make_trust(NAMES, datetime.now(UTC), (secrets.token_bytes(16), secrets.token_bytes(16)))
        (self.directory / "crt.pem").write_bytes(trust.issuer_pem)
        (self.directory / "key.pem").write_bytes(trust.issuer_key_pem)
        (self.directory / "roots.pem").write_bytes(trust.roots_pem)
        await self.platform.change()
        server = grpc.aio.server()
        server.add_generic_rpc_handlers([handler(self.platform)])
        server.add_insecure_port(f"unix:{self.directory}/platform.sock")
        await server.start()
        self._stack.push_async_callback(server.stop, 0)
        issuer = [f"--issuer={self.directory}", f"--trust-roots={self.directory}/roots.pem"]
        limits = ["--certify-rate=1e9", "--certify-burst=1000000000"]
        self.identity_process = await self._server("identity", self.certify, 29990, *issuer, *limits)
        policy = f"--policy-listen={self.policy}"
        self.destination_process = await self._server("destination", self.destination, 29996, policy)
        try:
            for target in (self.certify, self.destination, self.policy):
                async with grpc.aio.insecure_channel(target) as channel:
                    await asyncio.wait_for(channel.channel_ready(), 15)
        except TimeoutError:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _server(self, program: str, listen: str, admin: int, *flags: str) -> asyncio.subprocess.Process:
        # Inherited across exec: code of ours between fork and exec can hang, since gRPC has threads by now.
        os.sched_setaffinity(0, SERVERS)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "mantle.control_plane", program, f"--listen={listen}",
            f"--admin=127.0.0.1:{admin}", f"--platform=unix:{self.directory}/platform.sock", *flags,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.sched_setaffinity(0, DRIVERS)

        async def end() -> None:
            process.kill()
            await process.wait()

        self._stack.push_async_callback(end)
        return process

    async def start(self, driver: str, target: str, amount: float, seconds: float, nice: int = 0) -> Any:
        """Starts a driver; `finish` gives its result."""
        return await asyncio.create_subprocess_exec(
            "nice", "-n", str(nice), sys.executable, __file__, "--driver", driver, target, str(amount), str(seconds),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    @staticmethod
    async def finish(process: Any) -> dict[str, Any]:
        process.stdin.close()
        result: dict[str, Any] = json.loads((await asyncio.wait_for(process.stdout.read(), 120)).splitlines()[-1])
        await process.wait()
        return result

    async def changes(self, every: float, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end:
            await self.platform.change()
            await asyncio.sleep(every)


def cpu_seconds(process: Any) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(process: Any) -> float:
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


# ---- what is measured ----


async def certify(rig: Rig) -> list[str]:
    lines = [
        "| offered/s | issued/s | refused as busy | p50 / p99 ms | CPU µs each | so per core and s |",
        "|---" * 6 + "|",
    ]
    for rate in (300, 600, 900, 0):
        before = cpu_seconds(rig.identity_process)
        result = await rig.finish(await rig.start("certify", rig.certify, rate, 5))
        used = cpu_seconds(rig.identity_process) - before
        issued, busy = (result["outcomes"].get(name, 0) for name in ("issued", "RESOURCE_EXHAUSTED"))
        each = used / issued
        lines.append(
            f"| {rate or 'as it comes, 60 in flight'} | {issued / result['seconds']:.0f} | {busy} "
            f"| {result['p50']:.1f} / {result['p99']:.1f} | {each * 1e6:.0f} | {1 / each:.0f} |"
        )
    return lines


async def fanout(rig: Rig) -> list[str]:
    subscribers = await subscribed(rig, STREAMS)
    await rig.changes(1.0, 10.0)
    alone = await rig.finish(subscribers)
    subscribers = await subscribed(rig, STREAMS)
    await rig.changes(0.01, 6.0)
    constant = await rig.finish(subscribers)
    return [
        f"| {STREAMS} subscribers | ms |",
        "|---" * 2 + "|",
        f"| a change each second: last one has it, median / worst of {alone['waves']} "
        f"| {alone['last']['p50']:.0f} / {alone['last']['max']:.0f} |",
        f"| 100 changes/s, newest wins: age of what each is sent, p50 / p99 / worst "
        f"| {constant['each']['p50']:.0f} / {constant['each']['p99']:.0f} / {constant['each']['max']:.0f} |",
    ]


async def beside(rig: Rig) -> list[str]:
    lines = ["| first answers (NotFound, 200/s) | p50 / p99 ms | certificates/s |", "|---" * 3 + "|"]
    alone = await rig.finish(await rig.start("first", rig.policy, 200, 5))
    lines.append(f"| alone | {alone['p50']:.1f} / {alone['p99']:.1f} | |")
    subscribers = await subscribed(rig, STREAMS)
    storm = await rig.start("certify", rig.certify, 0, 9, nice=10)
    prober = await rig.start("first", rig.policy, 200, 6, nice=-10 if os.geteuid() == 0 else 0)
    await rig.changes(0.01, 8.0)
    first, certificates = await rig.finish(prober), await rig.finish(storm)
    waves = await rig.finish(subscribers)
    rate = certificates["outcomes"]["issued"] / certificates["seconds"]
    lines.append(
        f"| a Certify storm and 100 changes/s to {STREAMS} streams, all on one core "
        f"| {first['p50']:.1f} / {first['p99']:.1f} | {rate:.0f} |"
    )
    ages = waves["each"]
    lines.append(f"\nAge of what subscribers were sent meanwhile: p99 {ages['p99']:.0f} ms, worst {ages['max']:.0f}.")
    return lines


async def memory(rig: Rig) -> list[str]:
    before = rss_mib(rig.destination_process)
    begun = time.monotonic()
    subscribers = await subscribed(rig, 20_000)
    took = time.monotonic() - begun
    after = rss_mib(rig.destination_process)
    await rig.finish(subscribers)
    return [
        f"20,000 streams, {PER_CONNECTION} a connection: {before:.0f} → {after:.0f} MiB "
        f"({(after - before) * 1024 / 20_000:.1f} KiB each), subscribed in {took:.1f} s (client included)."
    ]


async def subscribed(rig: Rig, streams: int) -> Any:
    process = await rig.start("subscribe", rig.destination, streams, 0)
    line = await asyncio.wait_for(process.stdout.readline(), 120)
    assert line == b"ready\n", line
    return process


async def main(wanted: Sequence[str]) -> None:
    parts = {"certify": certify, "fanout": fanout, "beside": beside, "memory": memory}
    chosen = [name for name in parts if name in wanted] or list(parts)
    load = os.getloadavg()[0]
    out = [
        f"\n## Control plane, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"\n{os.cpu_count()} CPUs, Linux {machine.release()}, Python {machine.python_version()}, "
        f"grpcio {grpc.__version__}; load average before: {load:.1f}. "
        f"`python bench/control_plane.py {' '.join(chosen)}`",
    ]
    for name in chosen:
        with tempfile.TemporaryDirectory() as directory:
            async with Rig(Path(directory)) as rig:
                out += [f"\n### {name}\n", *await parts[name](rig)]
    print("\n".join(out))
    if "--append" in wanted:
        with (ROOT / "bench" / "RESULTS.md").open("a") as results:
            results.write("\n".join(out) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--driver"]:
        chosen_driver, to, amount, duration = sys.argv[2:]
        print(json.dumps(asyncio.run(DRIVERS_BY_NAME[chosen_driver](to, float(amount), float(duration)))), flush=True)
    else:
        asyncio.run(main(sys.argv[1:]))
