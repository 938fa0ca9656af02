"""The controller as plays: a runtime in memory, and what an `up` makes of it. No processes, no sockets."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

import pytest

from mantle.core.model import Key
from mantle.core.proxy_env import Values
from mantle.platform.machine import tokens
from mantle.platform.machine.applying import Request
from mantle.platform.machine.controller import Controller
from mantle.platform.machine.images import Image
from mantle.platform.machine.plan import NOBODY, Machine
from mantle.platform.machine.progress import progress, standing
from mantle.platform.machine.runtime import RuntimeRefused
from mantle.platform.machine.services import Row
from mantle.platform.machine.spec import ContainerStatus, Phase, PodSpec, PodStatus
from mantle.platform.machine.state import MeshConfig, StateDir
from mantle.platform.machine.tokenfiles import TokenFiles
from mantle.platform.machine.world import World
from mantle.platform.machine.yamlpos import Mistakes

WEB = ("Deployment", "default", "web")
DEPLOYMENT = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}, annotations: {mantle.dev/inject: disabled}}
    spec:
      containers:
        - name: web
          image: acme/web
          ports: [{name: http, containerPort: 8080}]
          volumeMounts: [{name: all, mountPath: /all}, {name: scratch, mountPath: /scratch}]
      volumes:
        - {name: scratch, emptyDir: {}}
        - name: all
          projected:
            sources:
              - serviceAccountToken: {path: token, audience: shop}
              - configMap: {name: settings}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {colour: red}
"""


class FakeRuntime:
    """Pods that run when they are started, and end when they are told to."""

    def __init__(self) -> None:
        self.specs: dict[str, PodSpec] = {}
        self.queues: dict[str, asyncio.Queue[PodStatus | None]] = {}
        self.last: dict[str, PodStatus] = {}
        self.started_count = 0
        self.refuse = ""
        self.gate: asyncio.Event | None = None
        """Starting a pod waits for it."""
        self.table: tuple[Row, ...] = ()

    async def pods(self) -> list[tuple[PodSpec, PodStatus, bool]]:
        return [(spec, self.last[uid], True) for uid, spec in self.specs.items()]

    async def start(self, spec: PodSpec) -> None:
        if self.refuse:
            raise RuntimeRefused(self.refuse)
        if self.gate is not None:
            await self.gate.wait()
        self.started_count += 1
        self.specs[spec.uid] = spec
        self.queues[spec.uid] = asyncio.Queue()
        self.say(spec.uid, Phase.RUNNING, "running")

    def say(self, uid: str, phase: Phase, state: str, reason: str = "", code: int | None = None) -> None:
        boxes = tuple(
            ContainerStatus(c.name, state, reason, started=state == "running", exit_code=code)
            for c in self.specs[uid].containers
        )
        self.last[uid] = PodStatus(uid, phase, boxes)
        self.queues[uid].put_nowait(self.last[uid])

    def end(self, uid: str) -> None:
        self.specs.pop(uid)
        self.queues[uid].put_nowait(None)

    async def watch(self, uid: str) -> AsyncIterator[PodStatus]:
        yield self.last[uid]
        while (status := await self.queues[uid].get()) is not None:
            yield status

    async def stop(self, uid: str, grace: float | None) -> None:
        self.end(uid)

    async def remove(self, uid: str) -> None:
        self.specs.pop(uid, None)

    async def started(self, uid: str, container: str) -> None: ...

    async def restart(self, uid: str, container: str, why: str) -> None: ...

    async def exec_probe(self, uid: str, container: str, argv: Iterable[str], seconds: float) -> tuple[int | None, str]:
        return 0, ""

    async def dial(self, uid: str, port: int) -> socket.socket:
        raise RuntimeRefused("nothing listens")

    async def router_socket(self) -> socket.socket:
        raise RuntimeRefused("no router")

    async def services(self, rows: Iterable[Row]) -> None:
        self.table = tuple(rows)


KEY = tokens.new_key()


def controller(path: Path, runtime: FakeRuntime) -> Controller:
    config = MeshConfig("m")
    store = StateDir(path)
    store.create()
    values = Values(version="1", trust_anchors="PEM", networks=config.networks, inject_by_default=True)
    machine = Machine(
        state_dir=str(path),
        node_name="box",
        dns_ip=config.dns_ip,
        rootless=True,
        default_user=NOBODY,
        search=("/usr/bin", "/bin"),
        proxy_path="/bin/sh",
        values=values,
        maps=({"acme/web": Image(("sh",)), "mantle/proxy": Image(("sh",))},),
    )
    return Controller(config, store, runtime, machine, TokenFiles(KEY, store, chown=False), (), World(config, "box"))


def play(
    path: Path, scene: Callable[[Controller, FakeRuntime], Awaitable[None]], runtime: FakeRuntime | None = None
) -> None:
    """Runs a scene beside a running controller."""

    async def main() -> None:
        fake = runtime or FakeRuntime()
        made = controller(path, fake)
        await made.resume()
        running = asyncio.get_running_loop().create_task(made.run())
        try:
            async with asyncio.timeout(60):
                await scene(made, fake)
        finally:
            running.cancel()
            await made.shutdown()

    asyncio.run(main())


def up(*texts: str) -> Request:
    return Request({f"f{n}.yml": (f"f{n}.yml", text, ()) for n, text in enumerate(texts)}, search=("/usr/bin", "/bin"))


async def until(made: Controller, wanted: Callable[[], bool]) -> None:
    """Waits until something is so, looking after every change."""
    while not wanted():
        await made.moved(0.05)


async def ready(made: Controller, item: tuple[str, str, str] = WEB) -> None:
    """Waits until a workload is as wanted, and the world knows."""

    def told() -> bool:
        known = made.world.snapshot.pods.values()
        return standing(made, item)[0] and sorted(p.uid for p in known if p.ready) == sorted(made.pods)

    await until(made, told)


def test_up_starts_pods_gives_them_files_and_tells_the_world(tmp_path: Path) -> None:
    async def scene(made: Controller, runtime: FakeRuntime) -> None:
        prepared = await made.apply(up(DEPLOYMENT))
        assert {c.event for c in prepared.changes} == {"created"}
        await ready(made)
        pods = list(made.world.snapshot.pods.values())
        assert len(pods) == 2 and all(p.ready and p.owner.name == "web" for p in pods)
        vip = made.world.snapshot.services[Key("default", "web")].cluster_ip
        await until(made, lambda: bool(runtime.table) and len(runtime.table[0].endpoints) == 2)
        (row,) = runtime.table
        assert (row.vip, row.port, {e.ip for e in row.endpoints}) == (vip, 80, {p.ip for p in pods})
        assert made.world.names.a["web.default.svc.cluster.local"] == (vip,)
        volume = tmp_path / "pods" / pods[0].uid / "volumes" / "all"
        assert (volume / "colour").read_text() == "red"
        token = volume / "token"
        assert token.stat().st_mode & 0o777 == 0o400
        state = made.pods[pods[0].uid]
        claims = tokens.review(
            KEY, token.read_bytes(), ["shop"], time.time_ns() / 1e9,
            lambda _: tokens.BoundPod(state.spec.name, "default", "default", state.spec.ip),
        )  # fmt: skip
        assert getattr(claims, "pod_uid", None) == pods[0].uid, claims

    play(tmp_path, scene)


def test_nothing_changes_when_something_is_wrong(tmp_path: Path) -> None:
    async def scene(made: Controller, runtime: FakeRuntime) -> None:
        with pytest.raises(Mistakes) as wrong:
            await made.apply(up(DEPLOYMENT.replace("image: acme/web", "image: acme/none"), "kind: Pod\n"))
        texts = [str(m) for m in wrong.value.items]
        assert any("f0.yml:12" in t and "not mapped" in t for t in texts) and any("f1.yml:1" in t for t in texts)
        assert runtime.started_count == 0 and not made.wants and list(made.files) == ["(mantle)"]

    play(tmp_path, scene)


def test_a_changed_deployment_is_stopped_then_started_and_a_changed_configmap_is_rewritten(tmp_path: Path) -> None:
    async def scene(made: Controller, runtime: FakeRuntime) -> None:
        await made.apply(up(DEPLOYMENT))
        await ready(made)
        first = set(made.pods)
        for uid in first:
            (tmp_path / "pods" / uid / "volumes/scratch/work").write_text("mine")
        await made.apply(up(DEPLOYMENT.replace("colour: red", "shade: blue")))
        await ready(made)
        assert set(made.pods) == first
        assert all((tmp_path / "pods" / uid / "volumes/scratch/work").read_text() == "mine" for uid in first)
        assert not any((tmp_path / "pods" / uid / "volumes/all/colour").exists() for uid in first)
        assert all((tmp_path / "pods" / uid / "volumes/all/shade").read_text() == "blue" for uid in first)
        assert all((tmp_path / "pods" / uid / "volumes/all/token").exists() for uid in first)
        await made.apply(
            up(DEPLOYMENT.replace("replicas: 2", "replicas: 1").replace("name: http, ", "name: http, protocol: TCP, "))
        )
        await ready(made)
        assert len(made.pods) == 1 and not set(made.pods) & first and set(runtime.specs) == set(made.pods)
        assert [p.name for p in (tmp_path / "pods").iterdir()] == list(made.pods)

    play(tmp_path, scene)


def test_a_pod_whose_processes_are_gone_is_replaced(tmp_path: Path) -> None:
    async def scene(made: Controller, runtime: FakeRuntime) -> None:
        await made.apply(up(DEPLOYMENT))
        await ready(made)
        lost = next(iter(made.pods))
        runtime.end(lost)
        await until(made, lambda: lost not in made.pods and standing(made, WEB)[0])
        assert runtime.started_count == 3 and len(made.pods) == 2

    play(tmp_path, scene)


def test_a_restarted_daemon_finds_running_pods_and_never_doubles_them(tmp_path: Path) -> None:
    kept: dict[str, object] = {}

    async def before(made: Controller, runtime: FakeRuntime) -> None:
        await made.apply(up(DEPLOYMENT))
        await ready(made)
        kept.update(runtime=runtime, pods=set(made.pods), addresses=dict(made.world.snapshot.services))

    async def after(made: Controller, runtime: FakeRuntime) -> None:
        await ready(made)
        assert set(made.pods) == kept["pods"] and runtime.started_count == 2
        assert dict(made.world.snapshot.services) == kept["addresses"]
        ips = {p.spec.ip for p in made.pods.values()}
        await made.apply(up(DEPLOYMENT.replace("replicas: 2", "replicas: 3")))
        await until(made, lambda: len(made.pods) == 3 and standing(made, WEB)[0])
        assert len({p.spec.ip for p in made.pods.values()} - ips) == 1

    play(tmp_path, before)
    old = kept["runtime"]
    assert isinstance(old, FakeRuntime)
    again = FakeRuntime()
    again.specs, again.last, again.started_count = old.specs, old.last, old.started_count
    again.queues = {uid: asyncio.Queue() for uid in old.specs}
    play(tmp_path, after, again)


def test_a_job_completes_and_its_pod_is_kept(tmp_path: Path) -> None:
    job = """\
apiVersion: batch/v1
kind: Job
metadata: {name: once}
spec:
  template:
    metadata: {annotations: {mantle.dev/inject: disabled}}
    spec:
      restartPolicy: Never
      containers: [{name: c, image: acme/web}]
"""

    async def scene(made: Controller, runtime: FakeRuntime) -> None:
        await made.apply(up(job))
        await until(made, lambda: any(p.ready for p in made.pods.values()))
        (uid,) = made.pods
        runtime.say(uid, Phase.SUCCEEDED, "terminated", "Completed", 0)
        runtime.end(uid)
        await until(made, lambda: made.pods[uid].gone)
        assert standing(made, ("Job", "default", "once")) == (True, "")
        assert runtime.started_count == 1 and made.pods[uid].status.phase is Phase.SUCCEEDED
        await until(made, lambda: not made.world.snapshot.pods)
        await made.delete(None)
        await until(made, lambda: not made.pods)

    play(tmp_path, scene)


def test_what_the_runtime_refuses_is_said_and_tried_again(tmp_path: Path) -> None:
    async def scene(made: Controller, runtime: FakeRuntime) -> None:
        runtime.refuse = "the network is gone"
        await made.apply(up(DEPLOYMENT))
        await until(made, lambda: standing(made, WEB) == (False, "the network is gone"))
        runtime.refuse = ""
        await ready(made)

    play(tmp_path, scene)


def test_progress_says_what_is_not_ready_and_why(tmp_path: Path) -> None:
    async def scene(made: Controller, runtime: FakeRuntime) -> None:
        await made.apply(up(DEPLOYMENT))
        await ready(made)
        for uid in list(made.pods):
            runtime.say(uid, Phase.RUNNING, "waiting", "CrashLoopBackOff", 1)
            runtime.last[uid] = dataclasses.replace(
                runtime.last[uid],
                containers=tuple(dataclasses.replace(c, restarts=3) for c in runtime.last[uid].containers),
            )
            runtime.queues[uid].put_nowait(runtime.last[uid])
        await until(made, lambda: not standing(made, WEB)[0])
        events = [event async for event in progress(made, [WEB], 5.0)]
        assert events[-1]["event"] == "error" and "CrashLoopBackOff" in events[-1]["message"]

    play(tmp_path, scene)


def test_objects_that_leave_a_file_go_and_addresses_stay(tmp_path: Path) -> None:
    async def scene(made: Controller, runtime: FakeRuntime) -> None:
        await made.apply(up(DEPLOYMENT))
        await ready(made)
        address = made.world.snapshot.services[Key("default", "web")].cluster_ip
        only_service_gone = DEPLOYMENT.replace(
            "kind: Service\nmetadata: {name: web}", "kind: Service\nmetadata: {name: other}"
        )
        prepared = await made.apply(up(only_service_gone))
        assert {(c.event, str(c.item)) for c in prepared.changes} >= {
            ("removed", "service/web"),
            ("created", "service/other"),
        }
        await until(made, lambda: Key("default", "other") in made.world.snapshot.services)
        assert Key("default", "web") not in made.world.snapshot.services
        await made.apply(up(DEPLOYMENT))
        await until(made, lambda: Key("default", "web") in made.world.snapshot.services)
        assert made.world.snapshot.services[Key("default", "web")].cluster_ip == address
        assert runtime.started_count == 2

    play(tmp_path, scene)


def test_what_is_removed_while_it_starts_is_stopped_when_it_is_there(tmp_path: Path) -> None:
    async def scene(made: Controller, runtime: FakeRuntime) -> None:
        runtime.gate = asyncio.Event()
        await made.apply(up(DEPLOYMENT))
        await until(made, lambda: len(made.pods) == 2)
        await made.delete(None)
        await until(made, lambda: all(p.stopping for p in made.pods.values()))
        assert runtime.started_count == 0
        runtime.gate.set()
        await until(made, lambda: not made.pods)
        assert runtime.started_count == 2 and not runtime.specs

    play(tmp_path, scene)


def test_closing_ends_every_pod(tmp_path: Path) -> None:
    async def scene(made: Controller, runtime: FakeRuntime) -> None:
        await made.apply(up(DEPLOYMENT))
        await ready(made)
        await made.close_pods()
        assert not made.pods and not runtime.specs and not list((tmp_path / "pods").iterdir())

    play(tmp_path, scene)


def test_the_address_of_a_finished_pod_is_given_to_another_only_once(tmp_path: Path) -> None:
    pod = """\
apiVersion: v1
kind: Pod
metadata: {name: NAME, annotations: {mantle.dev/inject: disabled}}
spec: {restartPolicy: Never, containers: [{name: c, image: acme/web}]}
"""

    async def scene(made: Controller, runtime: FakeRuntime) -> None:
        made._ips.last = made._ips.first + 1  # a network of two addresses
        await made.apply(up(pod.replace("NAME", "one")))
        await until(made, lambda: any(p.ready for p in made.pods.values()))
        (uid,) = made.pods
        runtime.say(uid, Phase.SUCCEEDED, "terminated", "Completed", 0)
        runtime.end(uid)
        await until(made, lambda: made.pods[uid].gone)
        others = Request(
            {"b": ("b", "---\n".join(pod.replace("NAME", n) for n in ("two", "three")), ())}, search=("/bin",)
        )
        await made.apply(others)
        await until(made, lambda: sum(p.ready for p in made.pods.values()) == 2)
        await made.delete(["f0.yml"])
        await until(made, lambda: uid not in made.pods)
        await made.apply(Request({"c": ("c", pod.replace("NAME", "four"), ())}, search=("/bin",)))
        await until(made, lambda: "no free address" in standing(made, ("Pod", "default", "four"))[1])

    play(tmp_path, scene)


def test_a_program_that_fails_in_its_first_second_is_not_called_ready(tmp_path: Path) -> None:
    async def scene(made: Controller, runtime: FakeRuntime) -> None:
        await made.apply(up(DEPLOYMENT.replace("replicas: 2", "replicas: 1")))
        events = progress(made, [WEB], 5.0)
        await ready(made)
        (uid,) = made.pods
        first = asyncio.get_running_loop().create_task(anext(events))
        await made.moved(0.1)
        assert not first.done()
        runtime.say(uid, Phase.RUNNING, "waiting", "CrashLoopBackOff", 1)
        await until(made, lambda: not made.pods[uid].ready)
        runtime.say(uid, Phase.RUNNING, "running")
        assert (await first)["event"] == "ready"
        assert asyncio.get_running_loop().time() - made.pods[uid].running_since["web"] >= 1.0
        await events.aclose()

    play(tmp_path, scene)
