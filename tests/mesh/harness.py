"""Meshes of real proxies in real network namespaces, for tests: pods, services, a control plane, and sockets inside.

    with Mesh(tmp_path, proxy="…/mantle-proxy") as mesh:
        client, web = mesh.pair({80: 8080})            # or pod by pod: mesh.pod(…), mesh.service(…)
        mesh.start()                                  # namespaces, redirect, control plane, proxies; all ready
        listener = web.listen(8080)                   # a socket inside the pod, for this process's own threads
        io = client.connect(WEB, 80)                  # goes through both proxies
        web.spawn("redis-server", "--port", "6379")   # a process inside the pod

Needs root. A namespace lives as long as its descriptor and its processes: `close` ends both, so nothing is left behind.
`pod(meshed=False)` has neither proxy nor redirect. The control plane is `plane.py`; `change` alters the world under it.
Run as a program, it brings up a client and a web pod and gives a shell in the client's: `python harness.py PROXY`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from mantle.core.ca import make_trust
from mantle.core.names import MeshNames
from mantle.platform.machine.namespaces import setns, unshare
from mantle.platform.machine.netlink import Route

T = TypeVar("T")
NEWNET = 0x40000000
MARK = 0x6D
ROUTER = "169.254.0.1"
WEB = "10.203.128.1"
"""The service address of `Mesh.pair`."""
CLIENT_ID = "client.test.serviceaccount.identity.mantle.cluster.local"
PLANE = Path(__file__).with_name("plane.py")
SRC = Path(__file__).resolve().parents[2] / "src"
PATIENCE = 60.0
"""Seconds to wait for what comes in milliseconds on a quiet machine: other tests share this one."""


def in_thread(work: Callable[[], T]) -> T:
    """Runs `work` in a thread of its own: entering a network namespace concerns the calling thread only."""
    result: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return result[0]


class Net:
    """A network namespace, alive as long as this object's descriptor or a process in it."""

    def __init__(self) -> None:
        def make() -> tuple[int, Route]:
            unshare(NEWNET)
            route = Route()
            route.up(1)
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC), route

        self.fd, self.route = in_thread(make)

    def inside(self, work: Callable[[], T]) -> T:
        """The result of `work`, called inside. A socket made there stays there."""

        def enter() -> T:
            setns(self.fd, NEWNET)
            return work()

        return in_thread(enter)

    def write(self, setting: str, value: str) -> None:
        self.inside(lambda: Path("/proc/sys/net", setting).write_text(value))

    def close(self) -> None:
        self.route.close()
        os.close(self.fd)


class Pod:
    def __init__(
        self, mesh: Mesh, name: str, ip: str, meshed: bool, spec: dict[str, Any], env: dict[str, str], files: int
    ) -> None:
        self.mesh, self.name, self.ip, self.meshed, self.spec, self.env = mesh, name, ip, meshed, spec, env
        self.files = files
        self.net = Net()
        self.proxy: subprocess.Popen[bytes] | None = None

    def connect(self, host: str, port: int, timeout: float = PATIENCE) -> socket.socket:
        return self.net.inside(lambda: socket.create_connection((host, port), timeout))

    def listen(self, port: int, host: str = "0.0.0.0") -> socket.socket:
        return self.net.inside(lambda: socket.create_server((host, port), backlog=1024))

    def spawn(self, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
        """Starts a process inside; it is ended with the mesh."""
        options.setdefault("preexec_fn", self._enter)
        process = subprocess.Popen(argv, **options)
        self.mesh.processes.append(process)
        return process

    def run(self, *argv: str, timeout: float = 2 * PATIENCE, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a process inside to its end; output as text."""
        options.setdefault("preexec_fn", self._enter)
        return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False, **options)

    def _enter(self) -> None:
        setns(self.net.fd, NEWNET)

    def enter_limited(self) -> None:
        self._enter()
        if self.files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, self.files), self.files))

    def admin(self, path: str) -> str:
        """What the proxy's admin port answers on the pod's loopback."""

        def get() -> str:
            connection = http.client.HTTPConnection("127.0.0.1", 4191, timeout=PATIENCE)
            with contextlib.closing(connection):
                connection.request("GET", path)
                return connection.getresponse().read().decode()

        return self.net.inside(get)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all series of a metric that have these labels."""
        total = 0.0
        for line in self.admin("/metrics").splitlines():
            series, _, value = line.rpartition(" ")
            if series.split("{")[0] == name and all(f'{key}="{want}"' in series for key, want in labels.items()):
                total += float(value)
        return total

    def counts(self, wanted: float, name: str, **labels: str) -> None:
        """Waits until a metric is `wanted`: a client may have its answer before the proxy has written it down."""
        wait_for(lambda: self.metric(name, **labels) == wanted, f"{name} {labels} to be {wanted}", log=self.metrics)

    def counts_at_least(self, wanted: float, name: str, **labels: str) -> None:
        wait_for(lambda: self.metric(name, **labels) >= wanted, f"{name} {labels} >= {wanted}", log=self.metrics)

    def metrics(self) -> str:
        """What was counted of requests and errors, for a failure's words."""
        families = ("request_total", "response_total", "tcp_open_total", "inbound_", "outbound_")
        return "\n".join(line for line in self.admin("/metrics").splitlines() if line.startswith(families))[-4000:]

    def log(self) -> str:
        return (self.mesh.folder / f"{self.name}.log").read_text()


class Mesh:
    def __init__(self, folder: Path, proxy: Path | str, **plane_env: str) -> None:
        self.folder, self.binary, self.plane_env = folder, str(proxy), plane_env
        self.pods: dict[str, Pod] = {}
        self.services: dict[str, dict[str, Any]] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.plane: subprocess.Popen[bytes] | None = None
        self.number = 0
        """Of the world that the control plane was told last."""
        self.router = Net()
        self.router.write("ipv4/ip_forward", "1")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pod(
        self,
        name: str,
        *,
        meshed: bool = True,
        app: str = "",
        ports: Sequence[int] = (),
        ready: bool = True,
        annotations: dict[str, str] | None = None,
        labels: dict[str, str] | None = None,
        env: dict[str, str] | None = None,
        files: int = 0,
    ) -> Pod:
        """Adds a pod before `start`. `app` is what services select (default: the name without `-N`), `ports` what it
        declares, `env` what its proxy is told beyond the usual (`MANTLE_PROXY_` is put before each name), `files` the
        hard limit of its proxy's open files (0: as here)."""
        ip = f"10.203.0.{len(self.pods) + 2}"
        app = app or name.split("-")[0]
        spec = {"ip": ip, "meshed": meshed, "account": app, "app": app, "ports": list(ports), "ready": ready}
        spec |= {"annotations": annotations or {}, "labels": labels or {}}
        pod = Pod(self, name, ip, meshed, spec, env or {}, files)
        index = self.router.inside(lambda: self.router.route.veth(f"v{len(self.pods)}", "eth0", pod.net.fd))
        self.router.route.route(f"{ip}/32", interface=index)
        if not self.pods:
            self.router.route.address(index, ROUTER, 32)
        eth0 = pod.net.inside(lambda: socket.if_nametoindex("eth0"))
        pod.net.route.address(eth0, ip, 32)
        pod.net.route.up(eth0)
        pod.net.route.route(via=ROUTER, interface=eth0, onlink=True)
        self.pods[name] = pod
        return pod

    def pair(
        self, ports: dict[int, int], *, also: Sequence[int] = (), env: dict[str, str] | None = None, files: int = 0
    ) -> tuple[Pod, Pod]:
        """The usual two: `client`, and `web` behind the address `WEB` with these ports (service: pod). `also`: ports of
        web without a service."""
        client = self.pod("client", env=env)
        web = self.pod("web", ports=[*dict.fromkeys(ports.values()), *also], env=env, files=files)
        self.service("web", WEB, ports)
        return client, web

    def service(
        self,
        name: str,
        ip: str,
        ports: dict[int, int],
        *,
        selects: str = "",
        annotations: dict[str, str] | None = None,
    ) -> str:
        self.services[name] = {
            "ip": ip, "ports": {str(port): target for port, target in ports.items()},
            "selects": selects or name, "annotations": annotations or {},
        }  # fmt: skip
        return ip

    def start(self) -> None:
        """Everything up, every proxy ready."""
        trust = make_trust(MeshNames("mantle", "cluster.local"), datetime.now(UTC), _serials())
        (self.folder / "issuer.pem").write_bytes(trust.issuer_pem)
        (self.folder / "issuer-key.pem").write_bytes(trust.issuer_key_pem)
        (self.folder / "roots.pem").write_bytes(trust.roots_pem)
        (self.folder / "token").write_text("a token nobody looks at")
        self.start_plane()
        for pod in self.pods.values():
            if pod.meshed:
                self.start_proxy(pod)
        for pod in self.pods.values():
            if pod.meshed:
                wait_for(lambda pod=pod: _ready(pod), f"the proxy of {pod.name} to be ready", log=pod.log)  # type: ignore[misc]

    def start_plane(self) -> None:
        self._write_world()
        env = os.environ | {"PYTHONPATH": str(SRC)} | self.plane_env
        with (self.folder / "plane.log").open("ab") as log:
            self.plane = subprocess.Popen(
                [sys.executable, str(PLANE), str(self.folder)], stdout=subprocess.PIPE, stderr=log, env=env
            )
        self.processes.append(self.plane)
        self._plane_says("ready")

    def _plane_says(self, wanted: str) -> None:
        assert self.plane and self.plane.stdout
        line = None
        while line != f"{wanted}\n".encode():
            readable, _, _ = select.select([self.plane.stdout], [], [], PATIENCE)
            line = self.plane.stdout.readline() if readable else b""
            assert line, f"waited for the control plane to say: {wanted}\n" + (self.folder / "plane.log").read_text()

    def kill_plane(self) -> None:
        assert self.plane
        self.plane.kill()
        self.plane.wait()

    def start_proxy(self, pod: Pod) -> None:
        redirect = [self.binary, "redirect", "install", f"--proxy-mark={MARK:#x}", "--skip-inbound-ports=4190,4191"]
        installed = pod.run(*redirect)
        assert installed.returncode == 0, installed.stderr
        with (self.folder / f"{pod.name}.log").open("ab") as log:
            pod.proxy = pod.spawn(
                self.binary, env=self._environment(pod), stderr=log, stdout=log, preexec_fn=pod.enter_limited
            )

    def _environment(self, pod: Pod) -> dict[str, str]:
        plane = "127.0.0.1:7001"
        values = {
            "IDENTITY_TRUST_ANCHORS": (self.folder / "roots.pem").read_text(),
            "IDENTITY_LOCAL_NAME": f"{pod.spec['account']}.test.serviceaccount.identity.mantle.cluster.local",
            "IDENTITY_TOKEN_FILE": str(self.folder / "token"),
            "IDENTITY_SVC_ADDR": plane,
            "DESTINATION_SVC_ADDR": plane,
            "POLICY_SVC_ADDR": plane,
            "POLICY_WORKLOAD": json.dumps({"ns": "test", "pod": pod.name}),
            "DESTINATION_CONTEXT": json.dumps({"ns": "test", "pod": pod.name}),
            "DESTINATION_PROFILE_NETWORKS": "10.203.0.0/16",
            "INBOUND_IPS": pod.ip,
            "INBOUND_PORTS": ",".join(map(str, pod.spec["ports"])),
            "INBOUND_DEFAULT_POLICY": "all-unauthenticated",
            "OUTBOUND_MARK": str(MARK),
            "ADMIN_LISTEN_ADDR": "0.0.0.0:4191",
            "TAP_SVC_NAME": "tap.test.serviceaccount.identity.mantle.cluster.local",
            "LOG": "warn,mantle_proxy=debug",
            "SHUTDOWN_GRACE_PERIOD": "2s",
        }
        env = {"PATH": os.environ["PATH"]}
        return env | {f"MANTLE_PROXY_{name}": value for name, value in (values | pod.env).items()}

    def change(self) -> None:
        """Tells the control plane what the pods' and services' values are now. Whoever asks it afterwards is told so;
        who has asked before is told a moment later."""
        self._write_world()
        assert self.plane
        self.plane.send_signal(signal.SIGHUP)
        self._plane_says(f"published {self.number}")

    def _write_world(self) -> None:
        pods = {name: pod.spec | {"netns": f"/proc/{os.getpid()}/fd/{pod.net.fd}"} for name, pod in self.pods.items()}
        world = self.folder / "world.json.new"
        self.number += 1
        world.write_text(json.dumps({"pods": pods, "services": self.services, "number": self.number}))
        world.rename(self.folder / "world.json")

    def close(self) -> None:
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
        for net in [*(pod.net for pod in self.pods.values()), self.router]:
            net.close()


def _ready(pod: Pod) -> bool:
    assert pod.proxy
    assert pod.proxy.poll() is None, pod.log()
    with contextlib.suppress(OSError):
        return pod.admin("/ready").startswith("ready")
    return False


def wait_for(true: Callable[[], bool], what: str, *, seconds: float = PATIENCE, log: Callable[[], str] = str) -> None:
    """Asks until `true`, or fails with what was waited for."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{log()}"
        time.sleep(0.02)


def nobody_waits(served: Callable[[], bool], seconds: float = 0.05) -> None:
    """Some call out of many is served at once: on a busy machine not each is, behind a crowd none would be."""
    took: list[float] = []
    while not took or min(took) >= seconds:
        assert len(took) < 50, f"never below {seconds} s: {took}"
        began = time.monotonic()
        assert served()
        took.append(time.monotonic() - began)


@contextlib.contextmanager
def serving(listener: socket.socket, handle: Callable[[socket.socket], None]) -> Iterator[None]:
    """Calls `handle` in a thread for each connection to `listener` until left; connections close with their thread."""

    def one(io: socket.socket) -> None:
        with io, contextlib.suppress(OSError):
            handle(io)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                io, _ = listener.accept()
                threading.Thread(target=one, args=(io,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _serials() -> tuple[bytes, bytes]:
    return secrets.token_bytes(16), secrets.token_bytes(16)


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, Mesh(Path(folder), sys.argv[1]) as mesh:
        client, web = mesh.pair({80: 8080})
        mesh.start()
        web.spawn(sys.executable, "-m", "http.server", "8080", cwd=folder)
        print(f"web is {web.ip}:8080 and {WEB}:80; logs in {folder}; metrics on 127.0.0.1:4191", flush=True)
        client.spawn(*(sys.argv[2:] or ["bash"])).wait()


if __name__ == "__main__":
    main()
