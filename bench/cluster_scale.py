"""Measures destination on a cluster of thousands of pods: memory, and the time from a change to a subscribed proxy.

    python bench/cluster_scale.py [--pods 500,5000] [--subscribers 1000] [--append]

A real API server (tests/e2e/cluster, without kubelet) holds pods as injection makes them, written by this script as the
kubelet would write them, 50 behind each service in one slice. Destination is the product's program; only its way to the
API server is a kubeconfig instead of a pod's files. Subscribers each hold a WatchPort and two Get streams on loopback.
A change is one PATCH of one object; its time counts from before the PATCH is sent until a subscriber has the message.
CPU is utime+stime of destination. `--append` adds the table to bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform as machine
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc.aio
import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cluster.apiserver import ApiServer, running  # noqa: E402

from mantle.core.model import Key  # noqa: E402
from mantle.core.names import MeshNames  # noqa: E402
from mantle.core.world import Mesh, World  # noqa: E402
from mantle.gen.io.linkerd.proxy import destination_pb2, inbound_pb2  # noqa: E402
from mantle.platform.kubernetes import convert  # noqa: E402
from mantle.platform.kubernetes.assemble import Assembly  # noqa: E402
from mantle.platform.kubernetes.client import Client, from_kubeconfig  # noqa: E402
from mantle.platform.kubernetes.reflector import Change  # noqa: E402

BEHIND = 50
"""Pods behind a service."""
CHANGES = 60
PACE = 0.25
"""Seconds between two changes: beyond the pace of waves, so that each is a change of its own."""
SPACE = "scale"


# ---- the cluster's objects ----


def address(number: int) -> str:
    return f"10.{64 + number // 65536}.{number // 256 % 256}.{number % 256}"


def pod(number: int) -> dict[str, Any]:
    """A pod of about the size that injection makes: 9 KB of JSON with what the API server adds."""
    environment = [{"name": f"MANTLE_PROXY_SETTING_{n}", "value": "x" * 60} for n in range(40)]
    proxy = {
        "name": "mantle-proxy", "image": "mantle/proxy:1", "restartPolicy": "Always", "env": environment,
        "ports": [{"name": "mantle-proxy", "containerPort": 4143}, {"name": "mantle-admin", "containerPort": 4191}],
    }  # fmt: skip
    app = {"name": "app", "image": "app:1", "ports": [{"name": "http", "containerPort": 8080}],
           "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}}}  # fmt: skip
    labels = {"app": f"web-{number // BEHIND}", "mantle.dev/control-plane-ns": "mantle", "pod-template-hash": "5d"}
    notes = {"mantle.dev/inject": "enabled", "other.example/long": "y" * 2000}
    metadata = {"name": f"p{number}", "namespace": SPACE, "labels": labels, "annotations": notes}
    spec = {"initContainers": [proxy], "containers": [app], "automountServiceAccountToken": False}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def status(number: int) -> dict[str, Any]:
    ran = {"name": "mantle-proxy", "started": True, "ready": True, "restartCount": 0, "image": "", "imageID": ""}
    ip = address(number)
    conditions = [{"type": "Ready", "status": "True"}]
    return {"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions,
                       "initContainerStatuses": [ran | {"state": {"running": {}}}]}}  # fmt: skip


def service(number: int) -> dict[str, Any]:
    spec = {"ports": [{"name": "http", "port": 80, "targetPort": 8080}]}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"web-{number}", "namespace": SPACE},
        "spec": spec,
    }


def slice_of(number: int, but: int = -1) -> dict[str, Any]:
    """The service's slice; the endpoint `but` is not ready."""
    endpoints = [
        {
            "addresses": [address(n)],
            "conditions": {"ready": n != but},
            "targetRef": {"kind": "Pod", "name": f"p{n}", "namespace": SPACE},
        }
        for n in range(number * BEHIND, (number + 1) * BEHIND)
    ]
    labels = {"kubernetes.io/service-name": f"web-{number}"}
    return {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": f"web-{number}-x", "namespace": SPACE, "labels": labels},
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
    }  # fmt: skip


async def send(client: Client, method: str, path: str, body: dict[str, Any], patch: str = "merge-patch") -> None:
    kind = f"application/{patch}+json" if method == "PATCH" else "application/json"
    response = await client.http.request(method, path, content=json.dumps(body), headers={"Content-Type": kind})
    if response.status_code not in (200, 201):
        raise SystemExit(f"{method} {path}: {response.status_code} {response.text[:300]}")


async def fill(client: Client, first: int, last: int) -> None:
    """Pods `first` to `last`, running, and their services."""
    pods = f"/api/v1/namespaces/{SPACE}/pods"
    numbers = iter(range(first, last))

    async def worker() -> None:
        for number in numbers:
            await send(client, "POST", pods, pod(number))
            await send(client, "PATCH", f"{pods}/p{number}/status", status(number))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(16):
            tasks.create_task(worker())
    for number in range(first // BEHIND, last // BEHIND):
        await send(client, "POST", f"/api/v1/namespaces/{SPACE}/services", service(number))
        await send(client, "POST", f"/apis/discovery.k8s.io/v1/namespaces/{SPACE}/endpointslices", slice_of(number))


# ---- destination ----


def destination(kubeconfig: str) -> int:
    """The product's program, in a process of its own, with this kubeconfig instead of a pod's files."""
    from mantle.control import app
    from mantle.platform.kubernetes.world import DISCOVERY
    from mantle.platform.kubernetes.world import running as platform

    @asynccontextmanager
    async def connected(*_: Any) -> AsyncIterator[Any]:
        async with from_kubeconfig(Path(kubeconfig)) as client, platform(client, DISCOVERY) as made:
            yield made

    app.connected = connected  # type: ignore[assignment]
    ports = ["--listen=127.0.0.1:38086", "--policy-listen=127.0.0.1:38090", "--admin=127.0.0.1:39996"]
    return app.destination_main([*ports, "--platform=kubernetes", "--allow-anonymous"])


class Process:
    """What /proc says about destination."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, what: str = "VmRSS") -> float:
        """MiB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(what + ":")) / 1024


@asynccontextmanager
async def started(server: ApiServer) -> AsyncIterator[tuple[Process, float]]:
    """Destination, and the seconds until it was ready."""
    import urllib.request

    with (ROOT / "bench" / "cluster_scale.log").open("wb") as log:
        began = time.monotonic()
        command = [sys.executable, __file__, "--destination", str(server.kubeconfig)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while True:
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(urllib.request.urlopen, "http://127.0.0.1:39996/ready", None, 2)
                    break
                if process.poll() is not None or time.monotonic() - began > 120:
                    raise SystemExit("destination did not get ready; see bench/cluster_scale.log")
                await asyncio.sleep(0.05)
            yield Process(process.pid), time.monotonic() - began
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait, 20)
    (ROOT / "bench" / "cluster_scale.log").unlink()


class Subscribers:
    """Streams as proxies hold them. `arrivals` is when each message came, by what it is about."""

    def __init__(self) -> None:
        self.arrivals: dict[str, list[float]] = {}
        self.first = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._channels: list[grpc.aio.Channel] = []

    async def subscribe(self, count: int, pods: int) -> None:
        for number in range(count):
            if number % 50 == 0:
                options = [("grpc.use_local_subchannel_pool", 1)]
                self._channels += [grpc.aio.insecure_channel(f"127.0.0.1:{p}", options=options) for p in (38086, 38090)]
            own, services = number * pods // count, pods // BEHIND
            token = json.dumps({"ns": SPACE, "pod": f"p{own}"})
            get = self._channels[-2].unary_stream(
                "/io.linkerd.proxy.destination.Destination/Get",
                request_serializer=destination_pb2.GetDestination.SerializeToString,
            )
            port = self._channels[-1].unary_stream(
                "/io.linkerd.proxy.inbound.InboundServerPolicies/WatchPort",
                request_serializer=inbound_pb2.PortSpec.SerializeToString,
            )
            self._follow(f"port p{own}", port(inbound_pb2.PortSpec(workload=token, port=8080)))
            for one in (number % services, (number + 1) % services):
                path = f"web-{one}.{SPACE}.svc.cluster.local:80"
                asked = destination_pb2.GetDestination(path=path, context_token=token)
                self._follow(f"service {one}", get(asked))
        while self.first < 3 * count:
            await asyncio.sleep(0.05)

    def _follow(self, about: str, call: Any) -> None:
        async def read() -> None:
            fresh = True
            with contextlib.suppress(grpc.aio.AioRpcError):  # destination ends
                async for _ in call:
                    if fresh:
                        fresh, self.first = False, self.first + 1
                    else:
                        self.arrivals.setdefault(about, []).append(time.monotonic())

        task = asyncio.get_running_loop().create_task(read())
        self._tasks.add(task)

    async def wait(self, about: str, count: int, since: float) -> list[float]:
        """The seconds from `since` to each of the next `count` messages about something."""
        async with asyncio.timeout(30):
            while len(new := [at for at in self.arrivals.get(about, []) if at >= since]) < count:
                await asyncio.sleep(0.0005)
        return [at - since for at in new]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()


# ---- the measurement ----


async def measure(server: ApiServer, client: Client, pods: int, count: int) -> list[str]:
    """The table's column for a cluster of `pods` pods."""
    print(f"measuring {pods} pods, {count} subscribers, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    async with started(server) as (process, ready):
        listed, peak = process.memory(), process.memory("VmHWM")
        subscribers = Subscribers()
        await subscribers.subscribe(count, pods)
        await asyncio.sleep(2)
        serving = process.memory()
        quiet, at = process.cpu(), time.monotonic()
        await asyncio.sleep(5)
        idle = (process.cpu() - quiet) / (time.monotonic() - at)
        slices = f"/apis/discovery.k8s.io/v1/namespaces/{SPACE}/endpointslices"
        each = 2 * count // (pods // BEHIND)
        """Streams on one service."""
        first, last, policy = [], [], []
        spent = {"slice": 0.0, "pod": 0.0}
        for number in range(CHANGES):
            one = number // 2 % (pods // BEHIND)
            out = one * BEHIND if number % 2 == 0 else -1
            since, before = time.monotonic(), process.cpu()
            await send(client, "PATCH", f"{slices}/web-{one}-x", {"endpoints": slice_of(one, out)["endpoints"]})
            came = await subscribers.wait(f"service {one}", each, since)
            first.append(min(came))
            last.append(max(came))
            await asyncio.sleep(PACE)
            spent["slice"] += process.cpu() - before - idle * (time.monotonic() - since)
            own = number * max(1, pods // count)
            notes = {"metadata": {"annotations": {"config.mantle.dev/opaque-ports": "8080"}}}
            since, before = time.monotonic(), process.cpu()
            await send(client, "PATCH", f"/api/v1/namespaces/{SPACE}/pods/p{own}", notes)
            policy.append((await subscribers.wait(f"port p{own}", 1, since))[0])
            await asyncio.sleep(PACE)
            spent["pod"] += process.cpu() - before - idle * (time.monotonic() - since)
        subscribers.arrivals.clear()
        after = process.memory()
        with server.without_api():
            await asyncio.sleep(3)
        await asyncio.to_thread(server.wait_ready)
        await asyncio.sleep(25)
        moved = sum(map(len, subscribers.arrivals.values()))
        resynced = process.memory("VmHWM")
        await subscribers.close()
    for number in range(CHANGES):
        own = number * max(1, pods // count)
        gone = {"metadata": {"annotations": {"config.mantle.dev/opaque-ports": None}}}
        await send(client, "PATCH", f"/api/v1/namespaces/{SPACE}/pods/p{own}", gone)
    return [
        f"{pods}",
        f"{ready:.1f} s",
        f"{listed:.0f} ({peak:.0f})",
        f"{serving:.0f}",
        _ms(first),
        f"{_ms(last)} ({each})",
        _ms(policy),
        f"{spent['slice'] / CHANGES * 1000:.1f} ms",
        f"{spent['pod'] / CHANGES * 1000:.1f} ms",
        f"{taking_in(pods) * 1e6:.0f} µs",
        f"{moved}",
        f"{after:.0f} → {resynced:.0f}",
    ]


def taking_in(pods: int) -> float:
    """Median seconds to make snapshot and indices of a cluster of `pods` pods after one of them changed."""
    assembly, world, space = Assembly(with_slices=True), World.empty(Mesh(MeshNames("mantle", "cluster.local"))), SPACE
    known = []
    for number in range(pods):
        document = pod(number) | status(number)
        key, seen = convert.pod(msgspec.convert(document, convert.PodObject))
        assert seen is not None
        known.append(seen)
        assembly.pods([Change(key, None, seen)])
    for number in range(pods // BEHIND):
        key, one = convert.endpoint_slice(msgspec.convert(slice_of(number), convert.SliceObject))
        assembly.slices([Change(Key(space, key.name), None, one)])
    world = world.next(assembly.since(-1))
    took = []
    for seen in known[:200]:
        changed = replace(seen, pod=replace(seen.pod, ready=not seen.pod.ready))
        began = time.perf_counter()
        assembly.pods([Change(seen.pod.key, seen, changed)])
        world = world.next(assembly.since(world.snapshot.version))
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def _ms(seconds: Sequence[float]) -> str:
    ordered = sorted(seconds)
    return f"{statistics.median(ordered) * 1000:.0f} / {ordered[-1] * 1000:.0f} ms"


ROWS = (
    "pods in the cluster",
    "start to ready",
    "memory with everything listed, MiB (peak while listing)",
    "memory with the subscribers' streams, MiB",
    "slice changed → first subscriber has it, median / worst",
    "slice changed → its last subscriber has it, median / worst (how many)",
    "pod annotated → its own proxy has the policy, median / worst",
    "CPU for one change of a slice, all its streams told",
    "CPU for one change of a pod, its own stream and those of its service told",
    "of that: snapshot and indices (alone, without the cluster)",
    "messages sent because the API server was killed and started again",
    "memory before → peak until after that, MiB",
)


async def run(sizes: Sequence[int], count: int) -> str:
    load = os.getloadavg()[0]
    columns = []
    with running() as server:
        await asyncio.to_thread(server.kubectl, "create", "namespace", SPACE)
        wait = ("-n", SPACE, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
        await asyncio.to_thread(server.kubectl, *wait)
        async with from_kubeconfig(server.kubeconfig) as client:
            filled = 0
            for size in sizes:
                await fill(client, filled, size)
                filled = size
                columns.append(await measure(server, client, size, count))
    head = (
        f"## Cluster, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n\n"
        f"{os.cpu_count()} CPUs, Linux {machine.release()}, Python {machine.python_version()}; load average before: "
        f"{load:.1f}, after: {os.getloadavg()[0]:.1f}. `python bench/cluster_scale.py`: destination beside a real API "
        f"server (Kubernetes 1.33, no kubelet) and {count} subscribers with three streams each, all on one machine.\n\n"
    )
    table = [[name, *values] for name, values in zip(ROWS, zip(*columns, strict=True), strict=True)]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|---" * (len(sizes) + 1) + "|")
    return head + "\n".join(lines) + "\n"


def main() -> int:
    if sys.argv[1:2] == ["--destination"]:
        return destination(sys.argv[2])
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--pods", default="500,5000", help="sizes, growing, multiples of 50")
    flags.add_argument("--subscribers", type=int, default=1000)
    flags.add_argument("--append", action="store_true")
    options = flags.parse_args()
    text = asyncio.run(run([int(size) for size in options.pods.split(",")], options.subscribers))
    print(text)
    if options.append:
        results = ROOT / "bench" / "RESULTS.md"
        results.write_text(results.read_text().rstrip() + "\n\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
