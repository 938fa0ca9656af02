"""The supervisor with real processes: what a container is given, what is kept of it, and how it ends."""

# A scene is alone on its event loop and may block it; what containers run is written in long lines.
# ruff: noqa: ASYNC110, ASYNC240, E501

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from machine_play import python, shell

from mantle.platform.machine import direct, wire
from mantle.platform.machine import namespaces as ns
from mantle.platform.machine.logs import Log, timestamp
from mantle.platform.machine.spec import ContainerSpec, MountSpec, Phase, ProbeSpec, Restart, Role

pytestmark = [pytest.mark.root, pytest.mark.mesh]

IP = "10.203.0.5"


def test_what_a_container_is_given(host: Any) -> None:
    code = """
import os, sys, json, resource
status = dict(l.split(":\\t", 1) for l in open("/proc/self/status").read().splitlines() if ":\\t" in l)
print(json.dumps({
    "uid": os.getresuid(), "gid": os.getresgid(), "groups": os.getgroups(), "cwd": os.getcwd(), "args": sys.argv[1:],
    "env": {k: v for k, v in os.environ.items() if k.startswith("MY_")}, "fds": sorted(map(int, os.listdir("/proc/self/fd")))[:3],
    "open": len(os.listdir("/proc/self/fd")), "stdin": os.readlink("/proc/self/fd/0"), "caps": [status[k] for k in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")],
    "nnp": status["NoNewPrivs"], "host": os.uname().nodename, "umask": oct(os.umask(0)), "core": resource.getrlimit(resource.RLIMIT_CORE),
    "blocked": status["SigBlk"], "ignored": status["SigIgn"], "hosts": open("/etc/hosts").read(), "resolv": open("/etc/resolv.conf").read(),
    "hostname": open("/etc/hostname").read(), "sid": os.getsid(0) == os.getpid(), "processes": [p for p in os.listdir("/proc") if p.isdigit()],
}))
"""

    async def scene() -> None:
        async with host.mesh() as mesh:
            app = python("app", code, uid=1234, gid=1235, groups=(1235, 77), cwd="/usr", env={"MY_A": "ü =\n1"})
            app = ContainerSpec(**{**_fields(app), "argv": (*app.argv, "an argument")})
            await mesh.start("a", IP, app, restart=Restart.NEVER, hostname="web-0", resolv_conf="nameserver 10.0.0.1\n")
            assert (await mesh.ended("a")).phase is Phase.SUCCEEDED
            given = json.loads(mesh.log("a", "app")[0])
            uid, gid = (1000, 1000) if host.rootless else (1234, 1235)
            assert (given["uid"], given["gid"]) == ([uid] * 3, [gid] * 3)
            assert given["groups"] == ([] if host.rootless else [77, 1235])
            assert given["caps"] == ["0000000000000000"] * 5
            assert given["nnp"] == "1"
            assert (given["cwd"], given["args"], given["env"]) == ("/usr", ["an argument"], {"MY_A": "ü =\n1"})
            # 0, 1, 2, and the one that lists them.
            assert (given["open"], given["stdin"]) == (4, "/dev/null")
            assert (given["host"], given["hostname"]) == ("web-0", "web-0\n")
            assert (given["umask"], given["core"], given["sid"]) == ("0o22", [0, 0], True)
            # Python itself ignores SIGPIPE and SIGXFSZ. Signals 32 and 33 are the C library's own: nobody may set them.
            ignored = int(given["ignored"], 16) & ~(0b11 << 31)
            assert (given["blocked"], ignored) == ("0000000000000000", 0x0000000001001000)
            assert given["resolv"] == "nameserver 10.0.0.1\n"
            assert given["hosts"] == f"127.0.0.1\tlocalhost\n::1\tlocalhost\n{IP}\tweb-0\n"
            assert len(given["processes"]) == 2

    host.play(scene)


def _fields(spec: ContainerSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def test_capabilities_that_are_asked_for_are_the_only_ones(host: Any) -> None:
    code = "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('Cap')][1:4])"

    async def scene() -> None:
        async with host.mesh() as mesh:
            proxy = python("app", code, uid=2102, gid=2102, capabilities=("NET_RAW",), own_user_namespace=False)
            await mesh.start("a", IP, proxy, restart=Restart.NEVER)
            await mesh.ended("a")
            assert mesh.log("a", "app") == [str(["0000000000002000"] * 3)]

    host.play(scene)


def test_logs_have_time_and_stream(host: Any) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            app = shell("app", "echo one; echo two >&2; printf 'no newline'; printf '\\377\\n' >&2")
            await mesh.start("a", IP, app, restart=Restart.NEVER)
            await mesh.ended("a")
            lines = (mesh.dir("a") / "logs" / "app.log").read_bytes().splitlines()
            pattern = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (stdout|stderr) (.*)"
            found = [re.fullmatch(pattern, line) for line in lines]
            assert all(found), lines
            streams = sorted(m.groups() for m in found if m)
            assert streams == [
                (b"stderr", b"two"),
                (b"stderr", b"\xff"),
                (b"stdout", b"no newline"),
                (b"stdout", b"one"),
            ]

    host.play(scene)


def test_a_flood_of_output_is_kept_whole_and_bounded(tmp_path: Path) -> None:
    log = Log(tmp_path / "x.log", most_bytes=1000)
    for number in range(100):
        log.feed("stdout", f"line {number}\nhalf".encode(), 0)
        log.feed("stdout", b" and half\n", 10**9 * number)
    log.close()
    kept = [p.read_text() for p in (tmp_path / "x.log.1", tmp_path / "x.log")]
    assert [len(text) <= 1000 for text in kept] == [True, True]
    assert kept[1].endswith("1970-01-01T00:01:39.000000000Z stdout half and half\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.log", "x.log.1"]
    long = Log(tmp_path / "long.log")
    long.feed("stderr", b"x" * 200_000, 0)
    long.end("stderr", 0)
    lines = (tmp_path / "long.log").read_text().splitlines()
    assert sum(line.count("x") for line in lines) == 200_000
    assert max(map(len, lines)) < 70_000
    assert timestamp(1764000000123456789) == "2025-11-24T16:00:00.123456789Z"


def test_order_and_environment_of_a_whole_pod(host: Any) -> None:
    """An init container prepares a volume, the sidecar must have started, then the application runs; all end in order."""

    async def scene() -> None:
        async with host.mesh() as mesh:
            shared = mesh.state / "shared"
            shared.mkdir()
            shared.chmod(0o777)
            volume = (MountSpec(str(shared), "/data/of/this/pod"),)
            note = (
                "echo {0} >> /data/of/this/pod/order; trap 'echo {0} ends >> /data/of/this/pod/order; exit 0' TERM; {1}"
            )
            wait = "while :; do sleep 1 & wait $!; done"
            init = shell("init", note.format("init", ":"), role=Role.INIT, mounts=volume)
            proxy = shell(
                "proxy", note.format("proxy", wait), role=Role.SIDECAR, mounts=volume, startup=ProbeSpec(tcp=1)
            )
            app = shell("app", note.format("app", wait), mounts=volume)
            pod = await mesh.start("a", IP, init, proxy, app)
            await mesh.until("a", lambda s: s.containers[1].state == "running")
            order = shared / "order"
            while order.read_text() != "init\nproxy\n":
                await asyncio.sleep(0.01)
            assert direct.read_status(mesh.dir("a")).phase is Phase.PENDING
            await pod.started("proxy")
            while not order.read_text().endswith("app\n"):
                await asyncio.sleep(0.01)
            await mesh.node.stop_pod("a")
            assert order.read_text().split("\n") == ["init", "proxy", "app", "app ends", "proxy ends", ""]

    host.play(scene)


def test_a_crashing_container_is_restarted(host: Any) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            await mesh.start("a", IP, shell("app", "echo run; exit 3"))
            status = await mesh.until("a", lambda s: s.containers[0].restarts >= 3)
            assert mesh.log("a", "app").count("run") >= 3
            status = await mesh.until("a", lambda s: s.containers[0].reason == "CrashLoopBackOff")
            assert status.containers[0].exit_code == 3
            assert status.phase is Phase.RUNNING

    host.play(scene)


def test_a_program_that_ignores_sigterm_is_killed(host: Any) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            deaf = "trap '' TERM; echo ready; while :; do sleep 1; done"
            await mesh.start("a", IP, shell("app", deaf), grace=1000.0)
            await mesh.says("a", "ready")
            started = time.monotonic()
            await mesh.node.stop_pod("a", 0.3)  # with the pod's own grace it would not be over before this test
            assert time.monotonic() - started >= 0.3
            assert direct.read_status(mesh.dir("a")).containers[0].exit_code == 137

    host.play(scene)


def test_sigterm_reaches_a_program_without_a_handler(host: Any) -> None:
    """As PID 1 of its own it would be deaf; under the container's init it is not."""

    async def scene() -> None:
        async with host.mesh() as mesh:
            await mesh.start("a", IP, ContainerSpec("app", Role.APP, ("/bin/sleep", "1000")), grace=1000.0)
            await mesh.running("a")
            await mesh.node.stop_pod("a")
            assert direct.read_status(mesh.dir("a")).containers[0].exit_code == 143

    host.play(scene)


def test_a_dead_container_is_replaced_on_request(host: Any, idle: ContainerSpec) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            pod = await mesh.start("a", IP, idle)
            await mesh.running("a")
            await pod.restart("app", "liveness probe failed: HTTP 500")
            status = await mesh.until(
                "a", lambda s: s.containers[0].restarts == 1 and s.containers[0].state == "running"
            )
            assert status.containers[0].exit_code == 143
            with pytest.raises(wire.Refused, match=r"the pod has no container nope; it has app"):
                await pod.started("nope")

    host.play(scene)


def test_what_cannot_start_says_why(host: Any) -> None:
    cases = {
        "no-program": (ContainerSpec("app", Role.APP, ("/nope/x",)), "/nope/x: No such file or directory"),
        "a-directory": (ContainerSpec("app", Role.APP, ("/usr",)), "/usr: a directory, not a program"),
        "no-directory": (
            ContainerSpec("app", Role.APP, ("/bin/true",), cwd="/nope"),
            "/nope: No such file or directory",
        ),
        "no-volume": (
            ContainerSpec("app", Role.APP, ("/bin/true",), mounts=(MountSpec("/nope", "/x"),)),
            "/nope: No such file or directory",
        ),
        "file-in-the-way": (
            ContainerSpec("app", Role.APP, ("/bin/true",), mounts=(MountSpec("/usr", "/etc/passwd"),)),
            "/etc/passwd cannot be mounted: it is a file on this machine",
        ),
        "capability": (
            ContainerSpec("app", Role.APP, ("/bin/true",), capabilities=("FLY",)),
            "there is no capability FLY",
        ),
    }

    async def scene() -> None:
        async with host.mesh() as mesh:
            for number, (name, (spec, text)) in enumerate(cases.items()):
                await mesh.start(name, f"10.203.1.{number + 1}", spec, restart=Restart.NEVER)
                status = await mesh.ended(name)
                assert status.phase is Phase.FAILED
                found = status.containers[0]
                assert (found.reason, found.message) == ("StartError", text)

    host.play(scene)


def test_programs_in_private_directories(root_host: Any) -> None:
    """A checkout that only its owner can enter: a binary, and a script, are executed by descriptor; `expose` shows more."""

    async def scene() -> None:
        home = Path("/run/home/private")
        home.mkdir(parents=True)
        home.chmod(0o700)
        (home / "sleep").write_bytes(Path("/bin/sleep").read_bytes())
        (home / "script").write_text("#!/bin/sh\necho from $0 $1; exec cat /run/home/private/shown/file\n")
        (home / "shown").mkdir()
        (home / "shown" / "file").write_text("text\n")
        (home / "secret").write_text("secret\n")
        for path in (home / "sleep", home / "script"):
            path.chmod(0o755)
        async with root_host.mesh() as mesh:
            binary = ContainerSpec("app", Role.APP, (f"{home}/sleep", "0"))
            await mesh.start("a", IP, binary, restart=Restart.NEVER)
            assert (await mesh.ended("a")).phase is Phase.SUCCEEDED
            script = ContainerSpec("app", Role.APP, (f"{home}/script", "x"), env={"PATH": "/bin"})
            await mesh.start("b", "10.203.0.6", script, restart=Restart.NEVER, expose=(f"{home}/shown",))
            await mesh.ended("b")
            first, second = mesh.log("b", "app")
            assert re.fullmatch(r"from /dev/fd/\d+ x", first)
            assert second == "text"
            (home / "broken").write_text("#!/run/home/private/sh\n")
            (home / "broken").chmod(0o755)
            broken = ContainerSpec("app", Role.APP, (f"{home}/broken",))
            await mesh.start("d", "10.203.0.8", broken, restart=Restart.NEVER)
            told = (await mesh.ended("d")).containers[0].message
            assert told == f"Permission denied: {home}/broken, or the interpreter it names"
            look = shell("app", f"ls {home}; cat {home}/secret")
            await mesh.start("c", "10.203.0.7", look, restart=Restart.NEVER, expose=(f"{home}/shown",))
            await mesh.ended("c")
            assert [line.split(":")[-1].strip() for line in mesh.log("c", "app")] == [
                "shown",
                "No such file or directory",
            ]

    root_host.play(scene)


def test_mounts(host: Any) -> None:
    """Volumes where nothing was, where something was, read-only, a single file; and nothing of it on the host."""

    async def scene() -> None:
        async with host.mesh() as mesh:
            source = mesh.state / "volume"
            source.mkdir()
            source.chmod(0o755)
            (source / "token").write_text("abc")
            (source / "token").chmod(0o644)
            writable = mesh.state / "writable"
            writable.mkdir()
            writable.chmod(0o777)
            mounts = (
                MountSpec(str(source), "/var/run/secrets/mantle.dev", read_only=True),
                MountSpec(str(source), "/brand-new/deep", read_only=True),
                MountSpec(str(source / "token"), "/etc/new-directory/token"),
                MountSpec(str(source / "token"), "/etc/hostname"),
                MountSpec(str(writable), "/usr/share"),
                MountSpec(str(writable), "/brand-new/deep2"),
                MountSpec(str(source), "/tmp/inside"),
            )
            script = """
cat /var/run/secrets/mantle.dev/token /brand-new/deep/token /etc/new-directory/token /etc/hostname /tmp/inside/token; echo
for d in /brand-new/deep /brand-new /etc/new-directory /usr/share /tmp /etc; do touch $d/of-test-mounts 2>/dev/null && echo wrote $d; done
ls /brand-new /usr/share | tr '\\n' ' '; echo; ls -d /etc/passwd /usr/bin/env /dev/null /proc/self/status
"""
            await mesh.start("a", IP, shell("app", script, mounts=mounts), restart=Restart.NEVER)
            await mesh.ended("a")
            assert mesh.log("a", "app") == [
                "abc" * 5,
                "wrote /usr/share",
                "wrote /tmp",
                "/brand-new: deep deep2  /usr/share: of-test-mounts ",
                "/dev/null",
                "/etc/passwd",
                "/proc/self/status",
                "/usr/bin/env",
            ]
            made = ("/brand-new", "/etc/new-directory", "/usr/share/of-test-mounts", "/tmp/of-test-mounts")
            assert [p for p in made if Path(p).exists()] == []

    host.play(scene)


def test_a_checkout_in_tmp(host: Any) -> None:
    """/tmp is each container's own, but for what the container's program, arguments, environment or directory name."""

    def prepare() -> None:
        ns.mount("tmpfs", "/tmp", "tmpfs", 0, "mode=1777")
        for name in ("checkout", "libraries", "other"):
            Path("/tmp", name).mkdir()
            Path("/tmp", name, "file").write_text(f"{name}\n")
        script = Path("/tmp/checkout/run")
        script.write_text("#!/bin/sh\ncat file; ls /tmp; touch /tmp/mine && echo written; cat $LIBRARIES\n")
        script.chmod(0o755)
        Path("/tmp/alone").write_text("#!/bin/sh\nls /tmp\n")
        Path("/tmp/alone").chmod(0o755)

    async def scene() -> None:
        async with host.mesh() as mesh:
            env = {"LIBRARIES": "/tmp/libraries/file", "PATH": "/nowhere:/bin:/usr/bin"}
            run = ContainerSpec("app", Role.APP, ("/tmp/checkout/run",), env=env, cwd="/tmp/checkout")
            await mesh.start("a", IP, run, restart=Restart.NEVER)
            await mesh.ended("a")
            assert mesh.log("a", "app") == ["checkout", "checkout", "libraries", "written", "libraries"]
            assert not Path("/tmp/mine").exists()
            alone = ContainerSpec("app", Role.APP, ("/tmp/alone",), env={"PATH": "/bin:/usr/bin"})
            await mesh.start("b", "10.203.0.6", alone, restart=Restart.NEVER)
            await mesh.ended("b")
            assert mesh.log("b", "app") == ["alone", "checkout", "libraries", "other"]

    host.play(scene, prepare=prepare)
