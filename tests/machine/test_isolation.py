"""What an application cannot do, tried: as root's pods and without root, from its process and from an `exec` into it."""

# What containers run is written in long lines.
# ruff: noqa: ASYNC240, E501

import json
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from machine_play import PATIENCE, PYTHON, python

from mantle.platform.machine.spec import ContainerSpec, MountSpec, ProbeSpec, Restart, Role

pytestmark = [pytest.mark.root, pytest.mark.mesh]

A, B = "10.203.0.5", "10.203.0.6"
SRC = str(Path(__file__).resolve().parent.parent.parent / "src")
TOKEN = "/var/run/secrets/mantle/token"

# Each attack is a function; its outcome is the name of the errno that stopped it, or what it got.
ATTACKS = """
import ctypes, errno, json, os, socket, sys
sys.path.insert(0, sys.argv[1]); state = sys.argv[2]
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    if getattr(libc, name)(*args) < 0: raise OSError(ctypes.get_errno(), name)
    return "worked"
def read(path):
    with open(path, "rb") as file: return "read " + str(len(file.read(64)))
def write(path, text):
    with open(path, "w") as file: file.write(text)
    return "written"
def connect(path):
    with socket.socket(socket.AF_UNIX) as sock: sock.connect(path)
    return "connected"
def mark():
    with socket.socket() as sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x6d)
    return "marked"
def redirect():
    from mantle.platform.machine import nft
    batch = nft.Batch("mantle", nft.FAMILY_INET); batch.table(); batch._put(2, 0, nft.attr(1, "mantle")); batch.commit()
    return "removed"
def route():
    from mantle.platform.machine.netlink import Route
    Route().address(1, "10.9.9.9", 32); return "added"
def packet():
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x300).close(); return "captured"
def become(uid):
    os.setuid(uid); return "became"
def uncover(target):
    # In user and mount namespaces of its own, which anybody may make, with all rights there.
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            uid, gid = os.getuid(), os.getgid()
            call("unshare", 0x10000000 | 0x20000)
            write("/proc/self/setgroups", "deny"); write("/proc/self/uid_map", f"0 {uid} 1"); write("/proc/self/gid_map", f"0 {gid} 1")
            try: call("umount2", target.encode(), 2); said = "uncovered"
            except OSError as error: said = errno.errorcode[error.errno]
            call("mount", b"/", b"/tmp", None, ctypes.c_ulong(4096 | 16384), None)
            said += " " + str(os.path.exists("/tmp" + state + "/node.sock"))
            try: redirect(); said += " removed"
            except OSError as error: said += " " + errno.errorcode[error.errno]
        except OSError as error: said = "early " + errno.errorcode[error.errno]
        os.write(writer, said.encode()); os._exit(0)
    os.wait(); return os.read(reader, 100).decode()
def processes():
    return sorted(open(f"/proc/{p}/cmdline").read().split("\\0")[0].rsplit("/")[-1][:6] for p in os.listdir("/proc") if p.isdigit())
def others():
    found = []
    for pid in range(1, 400):
        try: os.kill(pid, 0); found.append(pid)
        except ProcessLookupError: pass
        except PermissionError: pass
    return len(found)
tries = {
    "token": lambda: read(TOKEN), "pods": lambda: os.listdir(state + "/pods"),
    "token of another pod": lambda: read(state + "/pods/b/volumes/token"),
    "init's environ": lambda: read("/proc/1/environ"), "init's memory": lambda: read("/proc/1/maps"),
    "init's root": lambda: os.listdir("/proc/1/root/"), "trace init": lambda: call("ptrace", 16, 1, 0, 0),
    "init's network": lambda: os.open("/proc/1/ns/net", os.O_RDONLY),
    "node.sock": lambda: connect(state + "/node.sock"), "api.sock": lambda: connect(state + "/api.sock"),
    "ctl.sock": lambda: connect(state + "/pods/a/ctl.sock"), "abstract": lambda: connect("\\0mantle-test"),
    "mark": mark, "redirect": redirect, "address": route, "packets": packet,
    "root": lambda: become(0), "proxy's uid": lambda: become(2102), "hostname": lambda: call("sethostname", b"x", 1),
    "sysctl": lambda: write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "1024"),
    "mount": lambda: call("mount", b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None), "chroot": lambda: call("chroot", b"/tmp"),
    "uncover": lambda: uncover(sys.argv[4]), "processes": processes, "signal others": others,
}
tries["token"].__globals__["TOKEN"] = sys.argv[3]
outcome = {}
for name, attempt in tries.items():
    try: outcome[name] = attempt()
    except OSError as error: outcome[name] = errno.errorcode[error.errno]
print(json.dumps(outcome))
"""
REFUSED = {
    "token": "ENOENT",
    "pods": "ENOENT",
    "token of another pod": "ENOENT",
    "init's environ": "EACCES",
    "init's memory": "EACCES",
    "init's root": "EACCES",
    "trace init": "EPERM",
    "init's network": "EACCES",
    "node.sock": "ENOENT",
    "api.sock": "ENOENT",
    "ctl.sock": "ENOENT",
    "abstract": "ECONNREFUSED",
    "mark": "EPERM",
    "redirect": "EPERM",
    "address": "EPERM",
    "packets": "EPERM",
    "root": "EPERM",
    "proxy's uid": "EPERM",
    "hostname": "EPERM",
    "sysctl": "EROFS",
    "mount": "EPERM",
    "chroot": "EPERM",
    "uncover": "EINVAL False EPERM",
}


def refused(host: Any) -> dict[str, str]:
    # Ids that do not exist in the application's own user namespace are not even asked about.
    return REFUSED | ({"root": "EINVAL", "proxy's uid": "EINVAL"} if host.rootless else {})


def meshed(mesh: Any, host: Any, mantle_proxy: Path, app: ContainerSpec) -> tuple[ContainerSpec, ...]:
    """A pod as injection makes it: the redirect, a stand-in for the proxy with the token, the application."""
    exempt = ("--proxy-mark", "0x6d") if host.rootless else ("--proxy-uid", "2102")
    argv = (str(mantle_proxy), "redirect", "install", *exempt)
    token = mesh.state / "token"
    token.write_text("a very secret token")
    token.chmod(0o644)
    redirect = ContainerSpec(
        "redirect", Role.INIT, argv, uid=0, gid=0, capabilities=("NET_ADMIN",), own_user_namespace=False
    )
    proxy = python(
        "proxy",
        PROXY,
        role=Role.SIDECAR,
        uid=2102,
        gid=2102,
        own_user_namespace=False,
        capabilities=("NET_RAW",) if host.rootless else (),
        env={"SECRET": "environment of the proxy", "MARK": "1" if host.rootless else ""},
        mounts=(MountSpec(str(token), TOKEN, read_only=True),),
        startup=ProbeSpec(tcp=4143),
    )
    return redirect, proxy, app


# Says where each connection wanted to go; relays the first line to a peer's 8080 by itself when asked to.
PROXY = """
import os, socket, struct, threading
token = open("/var/run/secrets/mantle/token").read()
def original(sock):
    data = sock.getsockopt(socket.SOL_IP, 80, 16)
    return socket.inet_ntoa(data[4:8]) + ":" + str(struct.unpack(">H", data[2:4])[0])
def serve(name, port, address):
    server = socket.create_server((address, port))
    while True:
        peer, _ = server.accept(); peer.sendall(f"{name} for {original(peer)}".encode()); peer.close()
threading.Thread(target=serve, args=("outbound", 4140, "127.0.0.1"), daemon=True).start()
threading.Thread(target=serve, args=("inbound", 4143, "0.0.0.0"), daemon=True).start()
admin = socket.create_server(("0.0.0.0", 4191)); print("ready")
while True:
    peer, _ = admin.accept()
    with socket.socket() as direct:
        if os.environ["MARK"]: direct.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x6d)
        direct.settimeout(20)
        try: direct.connect((peer.recv(100).decode(), 8080)); peer.sendall(b"direct: " + direct.recv(100))
        except OSError as error: peer.sendall(str(error).encode())
    peer.close()
"""


def test_an_application_is_confined(host: Any, mantle_proxy: Path) -> None:
    async def scene() -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("\0mantle-test")
        listener.listen()
        async with host.mesh() as mesh:
            app = python("app", "import time; print('ready'); time.sleep(100)")
            expose = (*host_paths(), str(mantle_proxy.parent))
            pod = await mesh.start("a", A, *meshed(mesh, host, mantle_proxy, app), expose=expose)
            await mesh.says("a", "ready", "proxy")
            await pod.started("proxy")
            await mesh.says("a", "ready")
            other = mesh.dir("b") / "volumes"
            other.mkdir(parents=True)
            (other / "token").write_text("another pod's")
            (other / "token").chmod(0o644)
            attack = [
                PYTHON,
                "-c",
                ATTACKS,
                SRC,
                str(mesh.state),
                TOKEN,
                "/run/user" if host.rootless else "/run/mantle",
            ]
            tried = await pod.probe("app", attack, PATIENCE)
            assert tried.exit_code == 0, tried
            outcome = json.loads(tried.output)
            assert outcome.pop("processes") == ["python", "python", "python"]
            # The container's init runs as root of the pod; the other two are the application's own.
            assert outcome.pop("signal others") == (3 if host.rootless else 2)
            assert outcome == refused(host)
            # As the application's own process, too.
            attacker = ContainerSpec("app", Role.APP, tuple(attack))
            await mesh.start("c", B, *meshed(mesh, host, mantle_proxy, attacker), expose=expose, restart=Restart.NEVER)
            await mesh.says("c", "ready", "proxy")
            await mesh.pod("c").started("proxy")
            await mesh.until("c", lambda s: s.containers[2].state == "terminated")
            outcome = json.loads(mesh.log("c", "app")[0])
            assert {name: outcome[name] for name in REFUSED} == refused(host)
            assert outcome["processes"] == ["python", "python"]

    host.play(scene)


def host_paths() -> tuple[str, ...]:
    return tuple(sorted({sys.base_prefix, sys.prefix, str(Path(SRC).parent)}))


def test_the_redirect_of_a_pod(host: Any, echo: ContainerSpec, mantle_proxy: Path) -> None:
    """Outbound by the application, inbound from outside, what the proxy itself opens, and what stays on loopback."""

    async def scene() -> None:
        async with host.mesh() as mesh:
            expose = (*host_paths(), str(mantle_proxy.parent))
            pod = await mesh.start("a", A, *meshed(mesh, host, mantle_proxy, echo), expose=expose)
            await mesh.says("a", "ready", "proxy")
            await pod.started("proxy")
            await mesh.says("a", "ready")
            await mesh.start("b", B, echo)
            await mesh.says("b", "ready")
            assert await mesh.ask("a", f"print(tcp('{B}'))") == f"outbound for {B}:8080"
            assert await mesh.ask("a", "print(tcp('192.0.2.7', 443))") == "outbound for 192.0.2.7:443"
            assert await mesh.ask("b", f"print(tcp('{A}'))") == f"inbound for {A}:8080"
            assert await mesh.ask("b", f"print(tcp('{A}', 9))") == f"inbound for {A}:9"
            assert await mesh.ask("a", "print(tcp('127.0.0.1'))") == "pod-a 127.0.0.1"
            assert await mesh.ask("a", f"print(tcp('{A}'))") == f"pod-a {A}"
            direct = (
                f"c = socket.create_connection(('127.0.0.1', 4191)); c.sendall(b'{B}'); print(c.recv(100).decode())"
            )
            assert await mesh.ask("a", direct) == f"direct: pod-b {A}"
            # 4191 is not redirected, so scrapers reach it.
            outside = f"c = socket.create_connection(('{A}', 4191)); c.sendall(b'{B}'); print(c.recv(100).decode())"
            assert await mesh.ask("b", outside) == f"direct: pod-b {A}"
            exempt = ["--proxy-mark", "0x6d"] if host.rootless else ["--proxy-uid", "2102"]
            refused = await pod.probe("app", [str(mantle_proxy), "redirect", "verify", *exempt], PATIENCE)
            assert refused.exit_code == 1
            assert "NET_ADMIN" in refused.output

    host.play(scene)


def test_verify_proves_a_real_redirect(host: Any, mantle_proxy: Path) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            exempt = ("--proxy-mark", "0x6d") if host.rootless else ("--proxy-uid", "2102")
            installs, *_ = meshed(mesh, host, mantle_proxy, python("app", ""))
            verifies = ContainerSpec(
                "verify",
                Role.INIT,
                (str(mantle_proxy), "redirect", "verify", *exempt),
                uid=0,
                gid=0,
                capabilities=("NET_ADMIN",),
                own_user_namespace=False,
            )
            done = python("app", "print('done')")
            expose = (*host_paths(), str(mantle_proxy.parent))
            await mesh.start("a", A, installs, verifies, done, expose=expose, restart=Restart.NEVER)
            await mesh.ended("a")
            assert mesh.log("a", "verify") == [
                "redirect verified: the rules are exactly the ones asked for;"
                " a connection to 192.0.2.1:65535 was redirected, its original destination known"
            ], mesh.log("a", "verify")

    host.play(scene)


def test_state_of_every_mesh_is_hidden(host: Any) -> None:
    async def scene() -> None:
        async with host.mesh("one") as one, host.mesh("two") as two:
            memory = Path("/dev/shm/mantle-9/mesh")  # where state lies on a machine whose /run is a disk
            memory.mkdir(parents=True)
            code = f"import os; print([os.path.exists(p) for p in {[str(one.state), str(two.state), str(memory)]}])"
            await one.start("a", A, python("app", code), restart=Restart.NEVER)
            await one.ended("a")
            assert one.log("a", "app") == ["[False, False, False]"]

    host.play(scene)


def test_host_root_without_capabilities(root_host: Any) -> None:
    """A manifest may say uid 0. It is then the owner of root's files, and nothing more."""
    code = """
import os, errno
def attempt(f):
    try: return f()
    except OSError as e: return errno.errorcode[e.errno]
print(os.getuid(), [attempt(f) for f in (
    lambda: open("/proc/1/environ").read(), lambda: os.listdir("/proc/1/root"), lambda: os.setuid(5),
    lambda: open("/proc/sys/kernel/core_pattern", "w"), lambda: os.mknod("/tmp/a-device-of-this-test", 0o20600, os.makedev(1, 1)),
    lambda: os.listdir("/run/mantle/m"))])
"""

    async def scene() -> None:
        async with root_host.mesh() as mesh:
            await mesh.start("a", A, python("app", code, uid=0, gid=0), restart=Restart.NEVER)
            await mesh.ended("a")
            names = ["EACCES", "EACCES", "EPERM", "EROFS", "EPERM", "ENOENT"]
            assert mesh.log("a", "app") == [f"0 {names}"]

    root_host.play(scene)


def test_a_redirect_that_somebody_flushes_is_put_back_and_said(host: Any, mantle_proxy: Path) -> None:
    """The guard stays beside the application; meanwhile somebody with the right to do so removes the rules."""
    remove = """
import subprocess, sys, time
proxy, *exempt = sys.argv[1:]
subprocess.run([proxy, "redirect", "remove"], check=True, stdout=subprocess.DEVNULL)
until = time.monotonic() + 100
while (tried := subprocess.run([proxy, "redirect", "verify", *exempt], capture_output=True, text=True)).returncode:
    assert time.monotonic() < until, tried.stderr
print("back")
"""

    async def scene() -> None:
        async with host.mesh() as mesh:
            exempt = ("--proxy-mark", "0x6d") if host.rootless else ("--proxy-uid", "2102")
            installs, *_ = meshed(mesh, host, mantle_proxy, python("app", ""))
            binary = str(mantle_proxy)
            guard = replace(installs, name="guard", role=Role.SIDECAR, argv=(binary, "redirect", "guard", *exempt))
            removes = replace(installs, name="remove", argv=(sys.executable, "-I", "-c", remove, binary, *exempt))
            expose = (*host_paths(), str(mantle_proxy.parent))
            app = python("app", "print('done')")
            await mesh.start("a", A, installs, guard, removes, app, expose=expose, restart=Restart.NEVER)
            await mesh.ended("a")
            assert mesh.log("a", "remove") == ["back"], mesh.log("a", "remove")
            said = mesh.log("a", "guard")
            assert said[0] == "redirect guarded"
            assert [line for line in said if line.startswith("redirect repaired; found: ")], said

    host.play(scene)
