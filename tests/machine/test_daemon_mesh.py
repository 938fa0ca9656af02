"""The commands of a mesh on a host of its own, as root and as a user: up, exec, logs, change, kill -9, down.

Applications here are outside the mesh (`mantle.dev/inject: disabled`): this tests the machine, not the proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mantle.platform.machine import namespaces
from mantle.platform.machine.netlink import Route
from mantle.platform.machine.places import state_root

# ruff: noqa: ASYNC240, ASYNC110
pytestmark = [pytest.mark.root, pytest.mark.mesh, pytest.mark.timeout(400)]

APP = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: page, namespace: shop}
data: {index.html: "hello from %(colour)s\\n"}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: %(replicas)s
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}, annotations: {mantle.dev/inject: disabled}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: web
          image: acme/web:1
          workingDir: /srv/page
          env: [{name: ME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
          ports: [{name: http, containerPort: 8080}]
          readinessProbe: {httpGet: {path: /, port: http}}
          volumeMounts: [{name: page, mountPath: /srv/page}]
      volumes: [{name: page, configMap: {name: page}}]
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, annotations: {mantle.dev/inject: disabled}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: client, image: acme/sleep}]
"""
IMAGES = """\
images:
  acme/web: {command: [%(python)s, -u, -m, http.server, "8080"]}
  acme/sleep: {command: [%(python)s, -c, "import time; time.sleep(1000)"]}
"""
FETCH = "import urllib.request as u; print(u.urlopen('http://%s/', timeout=60).read().decode().strip())"


async def start(*words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mantle", "--mesh", "m", *words,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL,
    )  # fmt: skip


async def mantle(*words: str, code: int | None = 0) -> str:
    """Runs a command; its standard output. `code`: the exit code it must have, None for any."""
    process = await start(*words)
    out, err = await process.communicate()
    if code is not None:
        assert process.returncode == code, (
            f"mantle {' '.join(words)}: {process.returncode}\n{out.decode()}\n{err.decode()}"
        )
    return out.decode() + ("" if words[-1] == "json" else err.decode())


async def status() -> dict[str, Any]:
    return json.loads(await mantle("ps", "-o", "json"))  # type: ignore[no-any-return]


async def until_ready(**replicas: int) -> dict[str, Any]:
    """Waits until these workloads have so many pods each, all of them ready."""
    while True:
        now = await status()
        pods = [p for p in now["pods"] if p["owner"]["name"] in replicas]
        counts = Counter(p["owner"]["name"] for p in pods)
        if counts == replicas and all(p["ready"] for p in pods):
            return now


async def fetched(where: str, wanted: str) -> None:
    """Waits until the client gets this page: ready pods reach names and tables a moment later."""
    words = ("exec", "client", "-n", "shop", "--", sys.executable, "-c", FETCH % where)
    while (said := await mantle(*words, code=None)).strip() != wanted:
        assert "Error" in said or said.startswith("hello"), said


def write_app(directory: Path, colour: str = "red", replicas: int = 2) -> str:
    directory.mkdir(exist_ok=True)
    file = directory / "app.yml"
    file.write_text(APP % {"colour": colour, "replicas": replicas})
    (directory / "mantle.images.yml").write_text(IMAGES % {"python": sys.executable})
    return str(file)


async def nothing_runs() -> None:
    """Waits until no process of Mantle is left: one that was ended needs a moment to go."""
    while any("mantle" in line for line in processes()):
        await asyncio.sleep(0.01)


async def killed(*pids: int) -> None:
    """Kills processes and waits until they are gone."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(OSError):
            while (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                await asyncio.sleep(0.01)


def processes() -> set[str]:
    """Every process of this host but us, as its command line."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has just ended
                if line := (entry / "cmdline").read_bytes():  # a zombie has none
                    found.add(line.replace(b"\0", b" ").decode())
    return found


def prepare(proxy: Path) -> None:
    os.environ["MANTLE_PROXY_PATH"] = str(proxy)


def test_a_mesh_lives_changes_survives_its_daemon_and_leaves_nothing(host: Any, mantle_proxy: Path) -> None:
    async def scene() -> None:
        home = state_root().parent / "app"
        before = socket.if_nameindex()
        file = write_app(home)
        await mantle("up", "-d", "--timeout", "1", file, code=None)
        now = await until_ready(web=2, client=1)
        pods = {p["name"]: p for p in now["pods"] if p["namespace"] == "shop"}
        assert len(pods) == 3 and not any(p["meshed"] for p in pods.values())
        for name in ("web", "web.shop", "web.shop.svc.cluster.local"):
            await fetched(name, "hello from red")
        web = next(name for name in pods if name.startswith("web-"))
        assert (
            (await mantle("exec", "deploy/web", "-n", "shop", "--", "sh", "-c", "echo $ME; exit 7", code=7))
            .strip()
            .startswith("web-")
        )
        while '"GET / HTTP/1.1" 200' not in await mantle("logs", web, "-n", "shop"):
            await asyncio.sleep(0.05)
        following = await start("logs", "-f", "deploy/web", "-n", "shop")
        assert following.stdout and await following.stdout.readline()
        following.send_signal(signal.SIGINT)
        await following.communicate()
        assert following.returncode == 0

        # a ConfigMap reaches running pods; a changed Deployment is replaced; what left the file is removed
        said = await mantle("up", "-d", "--timeout", "1", write_app(home, "blue"), code=None)
        assert (
            "configmap/page (namespace shop) configured" in said and "deployment/web (namespace shop) unchanged" in said
        )
        await fetched("web", "hello from blue")
        await mantle("up", "-d", "--timeout", "1", write_app(home, "blue", replicas=1), code=None)
        await until_ready(web=1)

        # the daemon dies: pods stay what they are, and another one answers
        was = await status()
        await killed(was["daemon_pid"])
        await fetched("web", "hello from blue")
        again = await status()
        assert again["daemon_pid"] != was["daemon_pid"]
        assert {p["uid"] for p in again["pods"]} == {p["uid"] for p in was["pods"]}
        assert sum(p["restarts"] for p in again["pods"] if p["namespace"] == "shop") == 0

        await mantle("down")
        await nothing_runs()
        while socket.if_nameindex() != before:
            await asyncio.sleep(0.01)
        assert not state_root().exists() or not any(state_root().iterdir())
        assert "/mantle/" not in Path("/proc/self/mounts").read_text()

    host.play(scene, seconds=300, prepare=lambda: prepare(mantle_proxy))


def test_down_after_every_process_was_killed(host: Any, mantle_proxy: Path) -> None:
    async def scene() -> None:
        await mantle("up", "-d", "--timeout", "1", write_app(state_root().parent / "app"), code=None)
        known = json.loads((state_root() / "m" / "daemon.json").read_text())
        node = json.loads((state_root() / "m" / "mesh.json").read_text())["node_pid"]
        await killed(known["supervisor_pid"], known["daemon_pid"], node)
        said = await mantle("ps", code=1)
        assert "not running" in said, said
        await mantle("down")
        assert not state_root().exists()
        await nothing_runs()
        assert "not running" in await mantle("down")

    host.play(scene, seconds=180, prepare=lambda: prepare(mantle_proxy))


GAP = """
import signal, socket, struct, sys, time
name = b"".join(bytes([len(p)]) + p for p in b"web.shop.svc.cluster.local".split(b".")) + bytes(1)
query = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + name + struct.pack(">HH", 1, 1)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(0.05); s.connect((sys.argv[1], 53))
last, gap, over = None, 0.0, []
signal.signal(signal.SIGINT, lambda *_: over.append(1))
while not over:
    try:
        s.send(query); s.recv(512)
    except OSError:
        continue
    now = time.monotonic()
    if last is None: print("asking", flush=True)
    gap, last = max(gap, now - (last or now)), now
    time.sleep(0.01)
print(gap)
"""
"""Asks for a name until SIGINT; then says how long it was without an answer at most, in seconds."""


async def seconds_to_start() -> float:
    """How long a program like the daemon takes to start now: other tests share this machine's time."""
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import aiohttp, grpc, ruamel.yaml")
    assert await process.wait() == 0
    return time.monotonic() - began


def test_dns_answers_again_within_a_second(root_host: Any, mantle_proxy: Path) -> None:
    """Once out of a few times: on a busy machine not each time, and with a daemon that is late never."""

    async def scene() -> None:
        await mantle("up", "-d", "--timeout", "1", write_app(state_root().parent / "app"), code=None)
        seen: list[tuple[float, float]] = []
        while not any(gap < max(1.0, 3 * slowest) for gap, slowest in seen):
            assert len(seen) < 5, f"seconds without an answer, and seconds in which a program starts: {seen}"
            now = await until_ready(client=1)
            words = ("exec", "client", "-n", "shop", "--", sys.executable, "-c", GAP, now["dns_ip"])
            asking = await start(*words)
            assert asking.stdout and await asking.stdout.readline() == b"asking\n"
            os.kill(now["daemon_pid"], signal.SIGKILL)
            slowest = max([await seconds_to_start() for _ in range(3)])
            assert (await status())["daemon_pid"] != now["daemon_pid"]
            asking.send_signal(signal.SIGINT)
            seen.append((float(await asking.stdout.read()), slowest))
            await asking.wait()
        await mantle("down")

    root_host.play(scene, seconds=300, prepare=lambda: prepare(mantle_proxy))


def test_a_network_that_the_host_uses_is_refused_and_nothing_is_left(root_host: Any, mantle_proxy: Path) -> None:
    def prepare_route() -> None:
        prepare(mantle_proxy)
        route = Route()
        route.route("10.9.0.0/16", interface=socket.if_nametoindex("lo"))
        route.close()

    async def scene() -> None:
        file = write_app(state_root().parent / "app")
        said = await mantle("up", "-d", "--pod-cidr", "10.9.0.0/17", file, code=1)
        assert "10.9.0.0/17 overlaps 10.9.0.0/16" in said and "--pod-cidr" in said, said
        while processes():  # the last one is just leaving
            await asyncio.sleep(0.01)
        assert not state_root().exists()
        for wrong in ("10.9.0.0", "10.9.0.1/16", "127.0.0.0/8", "10.0.0.0/30", "::/64", "x"):
            assert "--pod-cidr" in await mantle("up", "--pod-cidr", wrong, file, code=2)
        assert "overlap" in await mantle(
            "up", "--pod-cidr", "10.8.0.0/16", "--service-cidr", "10.8.1.0/24", file, code=2
        )

    root_host.play(scene, seconds=180, prepare=prepare_route)


def test_port_forward_reaches_a_service_from_the_host(host: Any, mantle_proxy: Path) -> None:
    async def scene() -> None:
        await mantle("up", "-d", "--timeout", "1", write_app(state_root().parent / "app"), code=None)
        await until_ready(web=2)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "mantle", "--mesh", "m", "port-forward", "-n", "shop", "svc/web", "0:http",
            stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        address = line.split()[2]
        answer = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{address}/", timeout=60).read())
        assert answer == b"hello from red\n"
        process.send_signal(signal.SIGINT)
        await process.wait()
        await mantle("down")

    host.play(scene, seconds=180, prepare=lambda: prepare(mantle_proxy))


def test_wrong_files_start_nothing(host: Any, mantle_proxy: Path) -> None:
    async def scene() -> None:
        home = state_root().parent / "app"
        file = Path(write_app(home))
        file.write_text(
            file.read_text()
            .replace("image: acme/sleep", "imagee: acme/sleep")
            .replace("{app: web}\n  ports", "{app: wbe}\n  ports")
        )
        (home / "mantle.images.yml").unlink()
        said = await mantle("up", "-d", str(file), str(home / "none.yml"), code=1)
        assert "none.yml: no such file" in said
        said = await mantle("up", "-d", str(file), code=1)
        line = 1 + file.read_text().split("\n").index("  containers: [{name: client, imagee: acme/sleep}]")
        assert f"app.yml:{line}: pod/client: unknown field spec.containers[0].imagee" in said.replace(
            str(home) + "/", ""
        )
        assert "the image acme/web:1 is not mapped" in said and "command: [web]" in said
        assert not state_root().exists() and not processes()

    host.play(scene, seconds=180, prepare=lambda: prepare(mantle_proxy))


def test_what_the_machine_lacks_and_what_is_wrong_with_files_is_said_at_once(
    root_host: Any, mantle_proxy: Path
) -> None:
    """In a user namespace of its own, whose limits may be set without touching the host's."""

    async def scene() -> None:
        file = Path(write_app(Path("/run/app")))
        file.write_text(file.read_text().replace("image: acme/sleep", "image: acme/slep"))
        namespaces.enter_user_namespace(1234, 1234)
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
        said = await mantle("up", "-d", str(file), code=1)
        assert "user namespaces are turned off" in said and "sysctl -w user.max_user_namespaces" in said, said
        assert "the image acme/slep is not mapped" in said, said
        assert "user namespaces are turned off" in await mantle("demo", code=1)
        assert not state_root().exists() and not processes()

    root_host.play(scene, seconds=180, prepare=lambda: prepare(mantle_proxy))


def test_up_in_the_foreground_ends_with_ctrl_c(host: Any, mantle_proxy: Path) -> None:
    async def scene() -> None:
        file = write_app(state_root().parent / "app")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "mantle", "--mesh", "m", "up", file,
            stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stderr is not None
        line = b""
        while b"Ctrl-C takes it down" not in line:
            line = await process.stderr.readline()
            assert line, "it ended by itself"
        assert line.startswith(b"mesh m is up;"), line
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
        assert not state_root().exists()
        await nothing_runs()

    host.play(scene, seconds=300, prepare=lambda: prepare(mantle_proxy))


@pytest.mark.parametrize("words", [("up", "app.yml"), ("up", "-d", "app.yml"), ("demo",)], ids=lambda words: words[0])
def test_ctrl_c_while_a_mesh_starts_leaves_nothing(root_host: Any, mantle_proxy: Path, words: tuple[str, ...]) -> None:
    async def scene() -> None:
        os.chdir(Path(write_app(state_root().parent / "app")).parent)
        process = await start(*words)
        while not state_root().exists():  # its daemon has begun
            await asyncio.sleep(0.001)
        process.send_signal(signal.SIGINT)
        await process.communicate()
        assert process.returncode in (0, 1, 130)
        assert not state_root().exists()
        await nothing_runs()

    root_host.play(scene, seconds=180, prepare=lambda: prepare(mantle_proxy))


def test_exec_gives_a_terminal(host: Any, mantle_proxy: Path) -> None:
    async def scene() -> None:
        await mantle("up", "-d", "--timeout", "1", write_app(state_root().parent / "app"), code=None)
        await until_ready(client=1)
        master, slave = os.openpty()
        code = "import os, sys; print(os.isatty(0), sys.stdin.readline().strip().upper()); sys.exit(5)"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "mantle", "--mesh", "m", "exec", "-it", "pod/client",
            "--", sys.executable, "-c", code,
            stdin=slave, stdout=slave, stderr=slave,
        )  # fmt: skip
        os.close(slave)
        os.write(master, b"hello\r")
        assert await process.wait() == 5
        said = b""
        while b"True HELLO" not in said:
            said += await asyncio.to_thread(os.read, master, 10_000)
        await mantle("down")

    host.play(scene, seconds=300, prepare=lambda: prepare(mantle_proxy))


def test_the_mesh_of_another_user_is_said_to_be_so(user_host: Any, mantle_proxy: Path) -> None:
    def prepare_foreign() -> None:
        prepare(mantle_proxy)
        Path("/run/mantle").mkdir(mode=0o711)
        Path("/run/mantle/m").mkdir(mode=0o700)

    async def scene() -> None:
        file = write_app(state_root().parent / "app")
        for words in (("ps",), ("up", "-d", file), ("down",)):
            said = await mantle(*words, code=1)
            assert "mesh m belongs to root" in said and "run the command as root" in said, said
        assert not processes()

    user_host.play(scene, seconds=180, prepare=prepare_foreign)
