"""The node: pods in the router's network, service addresses, the way out, and nothing left behind."""

# A scene is alone on its event loop and may block it.
# ruff: noqa: ASYNC110, ASYNC222, ASYNC240

import asyncio
import collections
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machine_play import python

from mantle.platform.machine import client, direct, uplink, wire
from mantle.platform.machine import namespaces as ns
from mantle.platform.machine.netlink import Route
from mantle.platform.machine.spec import ContainerSpec, NodeConfig, ServicePort

pytestmark = [pytest.mark.root, pytest.mark.mesh]

A, B, C, VIP = "10.203.0.5", "10.203.0.6", "10.203.0.7", "10.203.200.1"
ROUTER = "10.203.128.10"


async def three(mesh: Any, echo: ContainerSpec) -> None:
    for uid, ip in (("a", A), ("b", B), ("c", C)):
        await mesh.start(uid, ip, echo)
    for uid in "abc":
        await mesh.says(uid, "ready")


def processes() -> dict[int, str]:
    """Every process of this test's host but ourselves, zombies left out."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX":
                    found[int(entry.name)] = (entry / "comm").read_text().strip()
    return found


async def all_gone() -> None:
    while left := processes():
        await asyncio.sleep(0.005)
        assert len(left) < 1000


def test_pods_reach_each_other_and_the_router(host: Any, echo: ContainerSpec) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            await three(mesh, echo)
            assert await mesh.ask("a", f"print(tcp('{B}'), udp('{B}'), tcp('{A}'))") == f"pod-b {A} pod-b pod-a {A}"
            # From the router, as probes do.
            sock = await mesh.node.socket("tcp")
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, (C, 8080))
            assert await loop.sock_recv(sock, 100) == f"pod-c {ROUTER}".encode()
            sock.close()
            # DNS and whatever else the daemon serves there.
            server = await mesh.node.socket("udp", (ROUTER, 53))
            async with asyncio.TaskGroup() as group:
                asked = group.create_task(mesh.ask("b", f"print(udp('{ROUTER}', 53))"))
                _, peer = await loop.sock_recvfrom(server, 10)
                await loop.sock_sendto(server, b"answer", peer)
            assert (asked.result(), peer[0]) == ("answer", B)
            server.close()

    host.play(scene)


def test_service_addresses(host: Any, echo: ContainerSpec) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            await three(mesh, echo)
            both = tuple((ip, 8080) for ip in (B, C))
            await mesh.node.services([ServicePort(VIP, 80, both), ServicePort(VIP, 53, both, "UDP")])
            names = await mesh.ask("a", f"print([tcp('{VIP}', 80).split()[0] for _ in range(120)])")
            assert collections.Counter(eval(names)).keys() == {"pod-b", "pod-c"}
            assert min(collections.Counter(eval(names)).values()) > 30
            assert await mesh.ask("a", f"print(udp('{VIP}', 53) in ('pod-b', 'pod-c'))") == "True"
            # One endpoint left; a pod reaches itself through its own service.
            await mesh.node.services([ServicePort(VIP, 80, ((B, 8080),))])
            assert await mesh.ask("a", f"print({{tcp('{VIP}', 80) for _ in range(20)}})") == f"{{'pod-b {A}'}}"
            assert await mesh.ask("b", f"print(tcp('{VIP}', 80))") == f"pod-b {ROUTER}"
            # None: unreachable at once, never leaving the mesh.
            await mesh.node.services([ServicePort(VIP, 80, ())])
            # (Where ARP has to find that out, it takes 3 s.)
            timed = f"import time; t = time.time(); print(tcp('{VIP}', 80), time.time() - t < 2.5)"
            assert await mesh.ask("a", timed) == f"OSError {errno.EHOSTUNREACH} True"

    host.play(scene)


def test_a_udp_client_leaves_an_endpoint_that_is_gone(host: Any, echo: ContainerSpec) -> None:
    """From one port, as a resolver or a game asks: the kernel would send all of it to the first endpoint for ever."""

    async def scene() -> None:
        async with host.mesh() as mesh:
            await three(mesh, echo)
            ask = f"""
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(("", 5353)); u.settimeout(20); u.connect(("{VIP}", 53))
u.send(b"?"); print(u.recv(100).decode())"""
            for ip, name in ((B, "pod-b"), (C, "pod-c"), (B, "pod-b")):
                await mesh.node.services([ServicePort(VIP, 53, ((ip, 8080),), "UDP")])
                assert [await mesh.ask("a", ask) for _ in range(2)] == [name, name]

    host.play(scene)


def test_many_services_fit(root_host: Any) -> None:
    async def scene() -> None:
        async with root_host.mesh() as mesh:
            ips = [f"10.203.{129 + n // 250}.{n % 250 + 1}" for n in range(500)]
            for port in (8080, 9090):
                await mesh.node.services([ServicePort(ip, 80, ((A, port), (B, port))) for ip in ips])

    root_host.play(scene)


def test_a_pod_cannot_send_from_another_address(root_host: Any, echo: ContainerSpec) -> None:
    listener = """
import socket
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(("", 9))
print("ready")
while True: print("got", u.recvfrom(100)[1][0])
"""
    spoof = f"""
import socket
def send(source, text):
    u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    u.setsockopt(socket.SOL_IP, 19, 1)  # IP_TRANSPARENT: any source address
    u.bind((source, 0)); u.sendto(text, ("{B}", 9))
for source in ("{C}", "8.8.8.8", "{ROUTER}", "{A}"): send(source, b"x")
print("sent")
"""

    async def scene() -> None:
        async with root_host.mesh() as mesh:
            await mesh.start("b", B, python("app", listener))
            await mesh.says("b", "ready")
            sender = python("app", spoof + "import time; time.sleep(60)", uid=0, capabilities=("NET_ADMIN", "NET_RAW"))
            await mesh.start("a", A, sender)
            await mesh.says("a", "sent")
            await mesh.says("b", f"got {A}")
            assert [line for line in mesh.log("b", "app") if line.startswith("got")] == [f"got {A}"]

    root_host.play(scene)


def test_a_pod_has_one_link_and_ipv6_only_on_loopback(host: Any, echo: ContainerSpec) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            await mesh.start("a", A, echo)
            await mesh.says("a", "ready")
            addresses = await mesh.ask("a", "print(open('/proc/net/if_inet6').read())")
            assert [line.split()[-1] for line in addresses.splitlines()] == ["lo"]
            assert await mesh.ask("a", "print(sorted(os.listdir('/sys/class/net')))") == "['eth0', 'lo']"

    host.play(scene)


def test_meshes_do_not_see_each_other(host: Any, echo: ContainerSpec) -> None:
    """Same addresses in both; what one asks its own pod answers, and what is only in the other does not exist."""

    async def scene() -> None:
        async with host.mesh("one") as one, host.mesh("two") as two:
            await one.start("a", A, echo)
            await two.start("b", A, echo)
            await two.start("c", C, echo)
            for mesh, uid in ((one, "a"), (two, "b"), (two, "c")):
                await mesh.says(uid, "ready")
            assert await one.ask("a", f"print(tcp('{A}'))") == f"pod-a {A}"
            assert await two.ask("c", f"print(tcp('{A}'))") == f"pod-b {C}"
            assert await one.ask("a", f"print(tcp('{C}'))") == f"OSError {errno.EHOSTUNREACH}"

    host.play(scene)


def test_a_pod_stopped_and_another_with_its_address(host: Any, idle: ContainerSpec) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            for uid in ("a", "b"):
                await mesh.start(uid, A, idle)
                with pytest.raises(wire.Refused) as refused:
                    await mesh.start("c", A, idle)
                assert refused.value.reason == "address_in_use"
                with pytest.raises(wire.Refused) as refused:
                    await mesh.start(uid, A, idle)
                assert refused.value.reason == "exists"
                await mesh.running(uid)
                await mesh.node.stop_pod(uid)
                assert not (mesh.dir(uid) / "ctl.sock").exists()
            assert await mesh.node.pods() == []
            with pytest.raises(wire.Refused) as refused:
                await mesh.node.stop_pod("a")
            assert refused.value.reason == "unknown_pod"

    host.play(scene)


def test_bad_requests_are_refused_and_harm_nothing(host: Any) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            path = mesh.state / "node.sock"
            for request in ({"op": "fly"}, {}, {"op": "start_pod", "pod": {"uid": "x"}}, {"op": "stop_pod"}):
                with pytest.raises(wire.Refused) as refused, wire.Connection(path) as connection:
                    connection.call(request)
                assert refused.value.reason == "bad_request"
            for garbage in (b"\xff\xff\xff\xff", b"\0\0\0\x02[]", b"\0\0\0\x01{", b"\0\0"):
                with wire.Connection(path) as connection:
                    connection.socket.sendall(garbage)
                    connection.socket.shutdown(socket.SHUT_WR)
                    with pytest.raises((wire.Closed, ConnectionError)):
                        connection.receive()
            assert await mesh.node.pods() == []

    host.play(scene)


def test_shutdown_ends_everything(host: Any, idle: ContainerSpec) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            await mesh.start("a", A, idle)
            await mesh.start("b", B, idle)
            await mesh.running("a")
            await mesh.running("b")
            await mesh.node.shutdown()
            await all_gone()
            assert not (mesh.state / "node.sock").exists()

    host.play(scene)


@pytest.mark.parametrize("victim", ["mantle-guard", "mantle-node"])
def test_a_killed_node_leaves_nothing(host: Any, idle: ContainerSpec, victim: str) -> None:
    async def scene() -> None:
        async with host.mesh() as mesh:
            await mesh.start("a", A, idle)
            await mesh.running("a")
            mounts = Path("/proc/self/mountinfo").read_text()
            assert "mantle-pod" in processes().values()
            os.kill(next(pid for pid, name in processes().items() if name == victim), signal.SIGKILL)
            await all_gone()
            assert Path("/proc/self/mountinfo").read_text() == mounts
            assert [name for _, name in socket.if_nameindex()] == ["lo"]

    host.play(scene)


def test_the_node_outlives_its_starter(host: Any, idle: ContainerSpec) -> None:
    """What `mantle up -d` relies on: the process group, session and parent of the starter mean nothing to it."""

    async def scene() -> None:
        state = host.state()
        with (state / "node.log").open("ab") as log:
            starter = os.fork()
            if starter == 0:
                os.setsid()
                client.start_node(NodeConfig("m", str(state), uplink=False), log)
                os.killpg(0, signal.SIGKILL)
            os.waitpid(starter, 0)
        assert await client.NodeClient(state).pods() == []

    host.play(scene)


def test_the_way_out(root_host: Any, echo: ContainerSpec) -> None:
    """Pod → router → host → the world, seen there as coming from the host; everything is taken back at the end."""

    async def scene() -> None:
        world = make_world()
        forward = Path("/proc/sys/net/ipv4/ip_forward")
        forward.write_text("0")
        Route().veth("mantle-other", "its-peer", os.open("/proc/self/ns/net", os.O_RDONLY))
        async with root_host.mesh("one", uplink=True) as one, root_host.mesh("two", uplink=True) as two:
            assert forward.read_text() == "1\n"
            assert {"mantle0", "mantle1"} <= {name for _, name in socket.if_nameindex()}
            for mesh in (one, two):
                await mesh.start("a", A, echo)
                await mesh.says("a", "ready")
                assert await mesh.ask("a", "print(tcp('198.51.100.2', 80))") == "from 198.51.100.1"
            # Neither the other mesh's router nor its pods can be reached; the host's own end of the link can.
            for there, seconds, what in (
                ("169.254.203.6", 1, "TimeoutError"),
                ("169.254.203.5", 20, "ConnectionRefusedError"),
            ):
                assert await one.ask("a", f"print(tcp('{there}', 1, {seconds}).split()[0])") == what
            with pytest.raises(OSError), socket.socket() as sock:
                sock.settimeout(0.5)
                sock.connect((A, 8080))
            direct.kill_node(one.guard)
            await two.node.shutdown()
            while tables() or {"mantle0", "mantle1"} & {name for _, name in socket.if_nameindex()}:
                await asyncio.sleep(0.005)
            uplink.restore(Path("/run/mantle"))  # what `mantle down` does after a SIGKILL
            assert forward.read_text() == "0\n"
        os.kill(world, signal.SIGKILL)
        os.waitpid(world, 0)

    root_host.play(scene)


def make_world() -> int:
    """A namespace behind a link of ours, with a server that says who it was asked by. Returns its process."""
    ours, theirs = socket.socketpair()
    world = os.fork()
    if world == 0:
        ns.unshare(ns.NEWNET)
        theirs.send(b"x")
        theirs.recv(1)
        route = Route()
        index = socket.if_nametoindex("world")
        route.address(index, "198.51.100.2", 24)
        route.up(index)
        server = socket.create_server(("198.51.100.2", 80))
        theirs.send(b"x")
        while True:
            peer, (ip, _) = server.accept()
            peer.sendall(f"from {ip}".encode())
            peer.close()
    ours.recv(1)
    route = Route()
    namespace = os.open(f"/proc/{world}/ns/net", os.O_RDONLY)
    index = route.veth("out", "world", namespace)
    os.close(namespace)
    route.address(index, "198.51.100.1", 24)
    route.route(via="198.51.100.2", interface=index)
    ours.send(b"x")
    ours.recv(1)
    return world


def tables() -> bytes:
    """The nf_tables tables of this namespace, as the kernel lists them."""
    from mantle.platform.machine import netlink

    asked = netlink.Netlink(netlink.NETLINK_NETFILTER)
    message = asked.message(10 << 8 | 1, netlink.DUMP, bytes(4))
    return b"".join(body for _, body in asked.exchange(message, asked.sequence, asked.sequence))


def test_networks_of_the_host_are_not_hidden(host: Any) -> None:
    def prepare() -> None:
        route = Route()
        index = route.veth("lan", "peer", os.open("/proc/self/ns/net", os.O_RDONLY))
        route.address(index, "10.203.7.1", 24)

    async def scene() -> None:
        with pytest.raises(wire.Refused) as refused:
            async with host.mesh():
                pass
        assert str(refused.value) == (
            "10.203.0.0/17 overlaps 10.203.7.0/24, which this machine reaches through lan;"
            " choose a free network with --pod-cidr"
        )
        async with host.mesh(pod_cidr="10.204.0.0/17") as mesh:
            assert await mesh.node.pods() == []

    host.play(scene, prepare=prepare)


@pytest.mark.parametrize("name", ["pasta", "slirp4netns"])
def test_the_way_out_without_root(
    user_host: Any, program: Callable[[str], str], echo: ContainerSpec, name: str
) -> None:
    """The same by the helper that this machine has; it goes when the mesh does, also when that is killed."""
    found = program(name)

    def prepare() -> None:
        make_world()
        # What every desktop and server has, a /dev/net/tun that anybody may open, exists for this host only.
        ns.mount("tmpfs", "/dev/net", "tmpfs")
        os.mknod("/dev/net/tun", 0o20666, os.makedev(10, 200))
        Path("/dev/net/tun").chmod(0o666)
        Path("/run/bin").mkdir()
        Path("/run/bin", name).symlink_to(found)
        os.environ["PATH"] = "/run/bin"

    async def scene() -> None:
        before = processes()
        async with user_host.mesh(uplink=True) as mesh:
            await mesh.start("a", A, echo)
            await mesh.says("a", "ready")
            while await mesh.ask("a", "print(tcp('198.51.100.2', 80))") != "from 198.51.100.1":
                await asyncio.sleep(0.05)
            assert len(processes()) > len(before) + 2
            direct.kill_node(mesh.guard)
            while processes() != before:
                await asyncio.sleep(0.005)

    user_host.play(scene, prepare=prepare)


def test_without_a_helper_there_is_no_way_out(user_host: Any, echo: ContainerSpec) -> None:
    def prepare() -> None:
        make_world()
        os.environ["PATH"] = "/nowhere"

    async def scene() -> None:
        async with user_host.mesh(uplink=True) as mesh:
            await mesh.start("a", A, echo)
            await mesh.says("a", "ready")
            assert await mesh.ask("a", "print(tcp('198.51.100.2', 80))") == f"OSError {errno.ENETUNREACH}"

    user_host.play(scene, prepare=prepare)
