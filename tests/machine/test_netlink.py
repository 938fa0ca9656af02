"""rtnetlink and nf_tables against the kernel, in namespaces of the test's own; and the runtime's frames."""

# A scene is alone on its event loop and may block it.
# ruff: noqa: ASYNC221, ASYNC240

import asyncio
import errno
import ipaddress
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mantle.platform.machine import firewall, namespaces, nft, wire
from mantle.platform.machine.netlink import (
    DUMP,
    NETLINK_NETFILTER,
    ROUTE_UNREACHABLE,
    Netlink,
    NetlinkError,
    Route,
    attr,
    attributes,
)
from mantle.platform.machine.spec import (
    ContainerSpec,
    MountSpec,
    NodeConfig,
    PodSpec,
    ProbeSpec,
    Restart,
    Role,
    node_config_from_json,
    pod_from_json,
    to_json,
)


def names(kind: int, family: int, name_attribute: int) -> list[str]:
    """What the kernel lists (2: tables as 1, 4: chains, 10: sets), read with our own eyes."""
    reader = Netlink(NETLINK_NETFILTER)
    message = reader.message(10 << 8 | kind, DUMP, struct.pack("BBH", family, 0, 0))
    answers = reader.exchange(message, reader.sequence, reader.sequence)
    return [dict(attributes(body[4:]))[name_attribute].rstrip(b"\0").decode() for _, body in answers]


def test_attributes_are_what_the_kernel_documents() -> None:
    assert attr(3, "lo") == b"\x07\x00\x03\x00lo\x00\x00"
    assert attr(1, 5) == b"\x08\x00\x01\x00\x00\x00\x00\x05"
    nested = attr(2, [attr(1, b"ab"), attr(4, b"")])
    assert nested == b"\x10\x00\x02\x80\x06\x00\x01\x00ab\x00\x00\x04\x00\x04\x00"
    assert list(attributes(nested)) == [(2, nested[4:])]
    assert list(attributes(nested[4:])) == [(1, b"ab"), (4, b"")]
    assert list(attributes(b"\0\0\0\0junk")) == []


@pytest.mark.root
def test_links_addresses_and_routes(root_host: Any) -> None:
    async def scene() -> None:
        route = Route()
        with pytest.raises(NetlinkError) as refused:
            route.address(4711, "10.0.0.1", 24)
        assert refused.value.errno == errno.ENODEV
        here = os.open("/proc/self/ns/net", os.O_RDONLY)
        index = route.veth("left", "right", here, mtu=1400)
        other = socket.if_nametoindex("right")
        assert Path("/sys/class/net").exists()
        with pytest.raises(NetlinkError) as refused:
            route.veth("left", "again", here)
        assert refused.value.errno == errno.EEXIST
        route.address(index, "10.0.0.1", 24)
        route.up(other)
        route.route("10.1.0.0/16", via="10.0.0.2", interface=index)
        route.route("10.2.0.0/16", kind=ROUTE_UNREACHABLE)
        route.route(via="10.0.0.3", interface=index)
        route.route("10.3.0.9/32", interface=index, source="10.0.0.1")
        assert {(str(r.network), r.interface) for r in route.routes()} == {
            ("10.0.0.0/24", index),
            ("10.1.0.0/16", index),
            ("10.3.0.9/32", index),
        }
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("10.3.0.9", 1))
            assert sock.getsockname()[0] == "10.0.0.1"
            with pytest.raises(OSError) as unreachable:
                sock.connect(("10.2.0.1", 1))
            assert unreachable.value.errno == errno.EHOSTUNREACH
        route.route("10.1.0.0/16", via="10.0.0.2", interface=index, remove=True)
        assert ipaddress.IPv4Network("10.1.0.0/16") not in [r.network for r in route.routes()]
        route.delete_link(index)
        assert [name for _, name in socket.if_nameindex()] == ["lo"]

    root_host.play(scene)


@pytest.mark.root
def test_a_batch_is_one_transaction(root_host: Any) -> None:
    async def scene() -> None:
        batch = nft.Batch("ours", nft.FAMILY_INET)
        batch.commit()  # nothing to say, nothing to wait for
        batch.table()
        batch.chain("one", "output", 0)
        batch.set("ports", [(nft.TYPE_PORT, 2)])
        batch.elements("ports", [(struct.pack(">H", port), None) for port in range(1000)])
        batch.commit()
        assert (names(4, 1, 3), names(10, 1, 2)) == (["one"], ["ports"])
        batch.chain("two", "input", 0)
        batch.rule("nowhere", nft.verdict(nft.DROP))
        with pytest.raises(NetlinkError) as refused:
            batch.commit()
        assert refused.value.errno == errno.ENOENT
        assert "(message 2)" in str(refused.value)
        assert names(4, 1, 3) == ["one"]
        batch.elements("ports", [(struct.pack(">H", 7), None)], remove=True)
        batch.commit()
        batch.elements("ports", [(struct.pack(">H", 7), None)], remove=True)
        with pytest.raises(NetlinkError):
            batch.commit()

    root_host.play(scene)


@pytest.mark.root
def test_an_owner_table_dies_with_its_socket(root_host: Any) -> None:
    async def scene() -> None:
        owner = nft.Batch("owned", nft.FAMILY_IP)
        owner.table(nft.OWNER)
        owner.chain("one", "output", 0)
        owner.commit()
        stranger = nft.Batch("owned", nft.FAMILY_IP)
        stranger.chain("two", "output", 0)
        with pytest.raises(NetlinkError) as refused:
            stranger.commit()
        assert refused.value.errno == errno.EPERM
        assert names(1, 2, 1) == ["owned"]
        owner.close()
        assert names(1, 2, 1) == []

    root_host.play(scene)


@pytest.mark.root
def test_the_probe_finds_this_host_able(host: Any) -> None:
    async def scene() -> None:
        # A program of its own: a process that has changed its ids may not write its own maps until it executes one.
        code = "from mantle.platform.machine.namespaces import probe; print(probe())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("[]\n", "")

    host.play(scene)


@pytest.mark.root
@pytest.mark.parametrize(
    ("sysctl", "text", "reason", "fix"),
    [
        ("user/max_user_namespaces", "0", "max_user_namespaces", "`sudo sysctl -w user.max_user_namespaces=15000`"),
    ],
)
def test_the_probe_names_what_blocks(root_host: Any, sysctl: str, text: str, reason: str, fix: str) -> None:
    """In a user namespace of its own, whose limits may be set without touching the host's."""

    async def scene() -> None:
        namespaces.enter_user_namespace(1234, 1234)
        Path("/proc/sys", sysctl).write_text(text)
        (found,) = namespaces.probe()
        assert (found.reason, found.fatal) == (reason, True)
        assert fix in found.fix

    root_host.play(scene)


@pytest.mark.root
def test_the_probe_names_a_container_without_rights(root_host: Any) -> None:
    async def scene() -> None:
        from mantle.platform.machine.privileges import drop_privileges

        drop_privileges(0, 0, (), ("NET_ADMIN",), change_ids=False)
        (found,) = namespaces.probe()
        assert found.reason == namespaces.Blocked.NO_SYS_ADMIN
        assert "--cap-add SYS_ADMIN" in found.fix

    root_host.play(scene)


def test_a_firewall_that_drops_what_pods_send_is_named(root_host: Any) -> None:
    async def scene() -> None:
        rules = nft.Batch("filter", nft.FAMILY_IP)
        rules.table()
        rules.chain("FORWARD", "forward", 0, policy=nft.DROP)
        rules.chain("INPUT", "input", 0, policy=nft.DROP)
        rules.commit()
        assert firewall.dropping() == ["chain FORWARD of table ip filter"]
        assert "chain FORWARD of table ip filter drops" in await check()
        rules.rule("FORWARD", nft.interface(nft.META_IIFNAME, "mantle0"), nft.verdict(nft.ACCEPT))
        rules.commit()
        assert firewall.dropping() == []
        assert "drops" not in await check()

    async def check() -> str:
        words = [sys.executable, "-m", "mantle", "check"]
        process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        return (await process.communicate())[0].decode()

    root_host.play(scene)


def test_frames_come_whole_whatever_the_pieces() -> None:
    data = wire.pack({"a": 1}) + wire.pack({"b": "ü" * 1000}) + wire.pack({})
    for size in (1, 3, 7, 1000, len(data)):
        decoder = wire.Decoder()
        found = [m for i in range(0, len(data), size) for m, _ in decoder.feed(data[i : i + size])]
        assert found == [{"a": 1}, {"b": "ü" * 1000}, {}]


def test_descriptors_stay_with_their_frame() -> None:
    left, right = socket.socketpair()
    with left, right:
        files = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
        wire.send(left, {"n": 1})
        wire.send(left, {"n": 2}, files[:2])
        wire.send(left, {"n": 3, "long": "x" * 50_000}, files[2:])
        wire.send(left, {"n": 4})
        wire.close_all(files)
        decoder, frames = wire.Decoder(), []
        while len(frames) < 4:
            frames += decoder.feed(*wire.receive(right))
        assert [(m["n"], len(fds)) for m, fds in frames] == [(1, 0), (2, 2), (3, 1), (4, 0)]
        for _, fds in frames:
            assert all(not os.get_inheritable(fd) for fd in fds)
            wire.close_all(fds)


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\0\0\0\x02[]", b"\0\0\0\x01{", b"\0\0\0\x02\xff\xff"])
def test_what_is_not_a_frame_is_refused_and_its_descriptors_closed(garbage: bytes) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(ValueError):
        wire.Decoder().feed(garbage, [fd])
    with pytest.raises(OSError):
        os.fstat(fd)


def test_specs_survive_json() -> None:
    probe = ProbeSpec(http=("HTTP", 80, "/x"), http_headers=(("A", "b"),))
    container = ContainerSpec(
        "c", Role.SIDECAR, ("/x", "y"), {"A": "ü"}, mounts=(MountSpec("/s", "/t", True),), startup=probe,
        liveness=ProbeSpec(exec=("true",)), groups=(1, 2),
    )  # fmt: skip
    pod = PodSpec("u", "n", "p", "10.0.0.1", Restart.NEVER, (container,), expose=("/a",), meta={"labels": {"a": "b"}})
    assert pod_from_json(wire.Decoder().feed(wire.pack(to_json(pod)))[0][0]) == pod
    config = NodeConfig("m", "/run/x", cover=("/a", "/b"))
    assert node_config_from_json(wire.Decoder().feed(wire.pack(to_json(config)))[0][0]) == config
