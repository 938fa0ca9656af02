"""Asking a pod's supervisor: commands and connections into the pod, its status, and what it survives."""

# A scene is alone on its event loop and may block it; what containers run is written in long lines.
# ruff: noqa: ASYNC110, ASYNC222, ASYNC240, E501

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from machine_play import PATIENCE, shell

from mantle.platform.machine import client, direct, wire
from mantle.platform.machine import namespaces as ns
from mantle.platform.machine.spec import ContainerSpec, Phase, Restart

pytestmark = [pytest.mark.root, pytest.mark.mesh]

IP = "10.203.0.5"


def test_exec_and_probes(host: Any, idle: ContainerSpec) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            pod = await mesh.start("a", IP, idle)
            await mesh.says("a", "ready")
            reader, writer = os.pipe()
            null = os.open("/dev/null", os.O_RDONLY)
            argv = ["/bin/sh", "-c", "id -u; echo $EXTRA; pwd; grep CapEff /proc/self/status; exit 7"]
            assert await pod.exec("app", argv, (null, writer, writer), env={"EXTRA": "more"}, cwd="/usr") == 7
            os.close(writer)
            said = os.read(reader, 1000).decode().split("\n")
            uid = "1000" if host.rootless else "65534"
            assert said == [uid, "more", "/usr", "CapEff:\t0000000000000000", ""]
            assert await pod.probe("app", ["/bin/sh", "-c", "echo bad; exit 2"], PATIENCE) == client.ProbeResult(
                2, "bad"
            )
            assert await pod.probe("app", ["nope"], PATIENCE) == client.ProbeResult(
                127, "mantle: cannot execute nope: no such program on the container's PATH"
            )
            hung = await pod.probe("app", ["/bin/sh", "-c", "echo begun; sleep 1000 & sleep 1000"], 10)
            assert hung == client.ProbeResult(None, "begun")
            # The command's children, too, are gone.
            while (
                await pod.probe("app", ["/bin/sh", "-c", "cat /proc/[0-9]*/comm | grep -q sleep"], PATIENCE)
            ).exit_code == 0:
                await asyncio.sleep(0.01)

    host.play(scene)


def test_an_exec_ends_with_its_caller(host: Any, idle: ContainerSpec) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            pod = await mesh.start("a", IP, idle)
            await mesh.says("a", "ready")
            reader, writer = os.pipe()
            null = os.open("/dev/null", os.O_RDONLY)
            task = asyncio.ensure_future(
                pod.exec("app", ["/bin/sh", "-c", "echo x; sleep 1000"], (null, writer, writer))
            )
            os.close(writer) if (await asyncio.to_thread(os.read, reader, 2)) == b"x\n" else None
            task.cancel()
            # The pipe ends when the shell and its child have.
            assert await asyncio.to_thread(os.read, reader, 1) == b""

    host.play(scene)


def test_exec_on_a_terminal(host: Any, idle: ContainerSpec) -> None:
    """The terminal is the command's controlling one: job control and Ctrl-C work."""

    async def scene() -> None:
        async with host.mesh() as mesh:
            await mesh.start("a", IP, idle)
            await mesh.says("a", "ready")
            ours, theirs = os.openpty()
            script = "tty >/dev/null && echo on a terminal; trap 'echo interrupted; exit 5' INT; echo go; while :; do sleep 0.02; done"
            async with asyncio.TaskGroup() as group:
                argv = ["/bin/sh", "-c", script]
                code = group.create_task(mesh.pod("a").exec("app", argv, (theirs, theirs, theirs), tty=True))
                said = b""
                while b"go\r\n" not in said:
                    said += await asyncio.to_thread(os.read, ours, 100)
                os.write(ours, b"\x03")
            assert code.result() == 5
            while b"interrupted" not in said:
                said += os.read(ours, 1000)
            assert b"on a terminal" in said, said

    host.play(scene)


def test_signals_reach_a_command(host: Any, idle: ContainerSpec) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            await mesh.start("a", IP, idle)
            await mesh.says("a", "ready")
            reader, writer = os.pipe()
            command = os.fork()
            if command == 0:
                script = "trap 'exit 9' INT; echo up; while :; do sleep 0.05; done"
                try:
                    os._exit(direct.exec_in_pod(mesh.dir("a"), "app", ["/bin/sh", "-c", script], (0, writer, writer)))
                finally:
                    os._exit(100)
            assert os.read(reader, 3) == b"up\n"
            os.kill(command, signal.SIGINT)
            assert os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]) == 9

    host.play(scene)


def test_dialling_into_a_pod(host: Any, echo: ContainerSpec) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            pod = await mesh.start("a", IP, echo)
            await mesh.says("a", "ready")
            sock = await pod.dial(8080)
            assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"pod-a 127.0.0.1"
            with direct.dial(mesh.dir("a"), 8080) as blocking:
                assert blocking.recv(100) == b"pod-a 127.0.0.1"
            with pytest.raises(wire.Refused) as refused:
                await pod.dial(81)
            assert (refused.value.reason, str(refused.value)) == (
                "nothing_listens",
                "nothing listens on port 81 of the pod",
            )

    host.play(scene)


def test_status_is_pushed_and_kept(host: Any) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            pod = await mesh.start("a", IP, shell("app", "sleep 0.2; exit 4"), restart=Restart.NEVER)
            seen = [s async for s in pod.watch()]
            assert (seen[-1].phase, seen[-1].containers[0].exit_code) == (Phase.FAILED, 4)
            assert direct.read_status(mesh.dir("a")) == seen[-1]
            with pytest.raises(OSError):  # no socket any more, or one that just closes
                await pod.started("app")
            while (await mesh.node.pods())[0].alive:
                await asyncio.sleep(0.01)
            await mesh.node.stop_pod("a")
            assert await mesh.node.pods() == []

    host.play(scene)


def test_a_supervisor_that_is_killed_takes_its_pod_along(host: Any, idle: ContainerSpec) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            await mesh.start("a", IP, idle)
            await mesh.running("a")
            for entry in Path("/proc").iterdir():
                with contextlib.suppress(OSError):  # one that has just ended
                    if entry.name.isdigit() and (entry / "comm").read_text() == "mantle-pod\n":
                        os.kill(int(entry.name), signal.SIGKILL)
            while (await mesh.node.pods())[0].alive:
                await asyncio.sleep(0.01)
            status = direct.read_status(mesh.dir("a"))
            assert (status.phase, status.message) == (Phase.FAILED, "the pod's supervisor ended: killed by signal 9")
            await mesh.node.stop_pod("a")
            await mesh.start("b", IP, idle)
            await mesh.running("b")

    host.play(scene)


def test_many_pods_at_once(root_host: Any, idle: ContainerSpec) -> None:
    async def scene() -> None:
        async with root_host.mesh() as mesh:
            async with asyncio.TaskGroup() as group:
                for n in range(30):
                    group.create_task(mesh.start(f"p{n}", f"10.203.2.{n + 1}", idle))
            async with asyncio.TaskGroup() as group:
                for n in range(30):
                    group.create_task(mesh.running(f"p{n}"))
            assert len(await mesh.node.pods()) == 30
            async with asyncio.TaskGroup() as group:
                for n in range(30):
                    group.create_task(mesh.node.stop_pod(f"p{n}"))
            assert await mesh.node.pods() == []

    root_host.play(scene)


def test_a_full_disk_does_not_end_a_pod(root_host: Any) -> None:
    """The pod's directory cannot be written to any more: output and status are lost, the program runs on."""

    async def scene() -> None:
        small = root_host.state() / "pods" / "a"
        small.mkdir(parents=True)
        ns.mount("tmpfs", small, "tmpfs", 0, "size=256k")
        async with root_host.mesh() as mesh:
            pod = await mesh.start("a", IP, shell("app", "echo ready; while :; do echo $(seq 1 2000); done"))
            while os.statvfs(small).f_bavail:
                await asyncio.sleep(0.01)
            seen = [s async for s in _some(pod, 1)]
            assert seen[0].containers[0].state == "running"
            assert (await pod.probe("app", ["/bin/echo", "alive"], PATIENCE)).output == "alive"
            await mesh.node.stop_pod("a", 1)

    root_host.play(scene)


async def _some(pod: client.PodClient, count: int) -> Any:
    async for status in pod.watch():
        yield status
        count -= 1
        if not count:
            return
