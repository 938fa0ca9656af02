"""A pod's first moments: from the node's fork, in new namespaces, to a supervisor that answers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import traceback
from pathlib import Path
from typing import NoReturn

from mantle.platform.machine import namespaces as ns
from mantle.platform.machine.container import Place, explained
from mantle.platform.machine.netlink import Route
from mantle.platform.machine.spec import PodSpec
from mantle.platform.machine.supervisor import Supervisor


def main(place: Place, router_ip: str, backoff: float, node: socket.socket) -> NoReturn:
    """The forked supervisor, from its first moment as PID 1 to its end. Never returns."""
    code = 1
    try:
        ns.name_process("mantle-pod")
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        ns.mount(None, "/", None, ns.MS_REC | ns.MS_PRIVATE)
        with contextlib.suppress(OSError):
            ns.mount("proc", "/proc", "proc", ns.MS_NOSUID | ns.MS_NODEV | ns.MS_NOEXEC)
        _own_sysfs()
        ns.sethostname(_hostname(place.pod))
        _write_files(place)
        if node.recv(16) != b"go":
            os._exit(1)
        _configure_network(place.pod.ip, router_ip, rootless=place.rootless)
        supervisor = Supervisor(place, backoff, node)
        node.send(b'{"ready": true}')
        supervisor.run()
        code = 0
    except Exception as error:  # the node is told why there is no pod; this process has nobody above it
        traceback.print_exc()
        with contextlib.suppress(OSError):
            node.send(json.dumps({"error": explained(error)}).encode())
    finally:
        os._exit(code)


def _own_sysfs() -> None:
    """/sys/class/net shows the pod's links, not the host's; control groups stay as they are. Where it is refused (a
    container runtime has masked parts of /sys), the host's stays."""
    groups = os.open("/sys/fs/cgroup", os.O_PATH | os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        ns.mount("sysfs", "/sys", "sysfs", ns.MS_NOSUID | ns.MS_NODEV | ns.MS_NOEXEC | ns.MS_RDONLY)
        ns.mount(f"/proc/self/fd/{groups}", "/sys/fs/cgroup", None, ns.MS_BIND | ns.MS_REC)
    os.close(groups)


def _hostname(pod: PodSpec) -> str:
    """Cut as the kubelet does: a pod's name may be longer than a host's."""
    return (pod.hostname or pod.name)[:63].rstrip("-.")


def _write_files(place: Place) -> None:
    """The files of /etc that are the pod's own."""
    pod, etc = place.pod, place.directory / "etc"
    etc.mkdir(mode=0o755, exist_ok=True)
    name = _hostname(pod)
    hosts = pod.hosts or f"127.0.0.1\tlocalhost\n::1\tlocalhost\n{pod.ip}\t{name}\n"
    for file, text in (("resolv.conf", pod.resolv_conf), ("hosts", hosts), ("hostname", f"{name}\n")):
        (etc / file).write_text(text)
        (etc / file).chmod(0o644)
    switch = Path("/etc/nsswitch.conf")
    if switch.exists():
        # Only files and DNS know the cluster's names; resolved and mdns would answer for the host.
        (etc / switch.name).write_text(re.sub(r"(?m)^hosts:.*$", "hosts: files dns", switch.read_text()))
        (etc / switch.name).chmod(0o644)


def _configure_network(ip: str, router_ip: str, *, rootless: bool) -> None:
    """Loopback, the address of the pod, and everything else through the router."""

    def sysctl(name: str, value: str) -> None:
        path = Path("/proc/sys/net", name)
        if path.exists():
            path.write_text(value)

    sysctl("ipv6/conf/default/disable_ipv6", "1")
    sysctl("ipv6/conf/eth0/disable_ipv6", "1")
    sysctl("ipv4/ip_unprivileged_port_start", "0")
    sysctl("ipv4/ping_group_range", "0 0" if rootless else "0 2147483647")
    route = Route()
    index = socket.if_nametoindex("eth0")
    route.up(socket.if_nametoindex("lo"))
    route.address(index, ip, 32)
    route.up(index)
    route.route(via=router_ip, interface=index, source=ip, onlink=True)
    route.close()
