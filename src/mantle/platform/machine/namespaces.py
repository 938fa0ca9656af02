"""The kernel calls that Python 3.11 lacks (unshare, setns, mount, prctl), and what this host allows of them.

Everything here acts on the calling thread or process and must run before any thread starts: entering a user or mount
namespace from a threaded process is EINVAL. `probe` tries each step in a forked child, for `mantle check`.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import platform
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mantle.platform.machine import nft
from mantle.platform.machine.netlink import Route

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 1024, 2048, 4096, 16384, 1 << 18, 1 << 21
UMOUNT_DETACH = 2

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> int:
    """A function of the C library. Raises OSError with its errno and name."""
    result = int(getattr(_libc, name)(*args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    call("unshare", flags)


def setns(fd: int, flags: int) -> None:
    """Enters the namespaces `flags` of a pidfd, or the one of a /proc/…/ns descriptor."""
    call("setns", fd, flags)


def mount(
    source: str | None, target: str | Path, kind: str | None = None, flags: int = 0, data: str | None = None
) -> None:
    def text(value: str | Path | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    try:
        call("mount", text(source or "none"), text(target), text(kind), ctypes.c_ulong(flags), text(data))
    except OSError as error:
        raise OSError(
            error.errno, f"mounting {source or kind or ''} on {target}: {os.strerror(error.errno or 0)}"
        ) from None


def unmount(target: str | Path) -> None:
    """Takes the topmost mount off, at once, even if something still looks at it."""
    call("umount2", os.fsencode(target), UMOUNT_DETACH)


def pivot_root(new_root: str) -> None:
    """Makes `new_root` (a mount) the root of this mount namespace and lets go of the old one."""
    os.chdir(new_root)
    numbers = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
    call("syscall", ctypes.c_long(numbers[platform.machine()]), b".", b".")
    unmount(".")
    os.chdir("/")


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that forked it ends. Set it after entering a user namespace."""
    call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def name_process(name: str) -> None:
    """What `ps` shows as the command (15 bytes)."""
    call("prctl", _PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def sethostname(name: str) -> None:
    data = name.encode()
    call("sethostname", data, len(data))


def close_other_fds(keep: Iterable[int]) -> None:
    """Closes every descriptor above 2 but those in `keep`."""
    low = 3
    for fd in sorted({fd for fd in keep if fd > 2}):
        os.closerange(low, fd)
        low = fd + 1
    close_range = 436  # on every architecture; the C library has it only since 2.34
    call("syscall", ctypes.c_long(close_range), ctypes.c_uint(low), ctypes.c_uint(0xFFFFFFFF), 0)


def enter_user_namespace(uid: int = 0, gid: int = 0) -> None:
    """A new user namespace in which the caller's one uid and gid appear as `uid` and `gid`."""
    outside_uid, outside_gid = os.geteuid(), os.getegid()
    unshare(NEWUSER)
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {outside_uid} 1"),
        ("gid_map", f"{gid} {outside_gid} 1"),
    ):
        Path("/proc/self", file).write_text(text)


class Blocked(enum.StrEnum):
    """What keeps a mesh from running on this host."""

    NOT_LINUX = "not_linux"
    APPARMOR = "apparmor_restrict_unprivileged_userns"
    USER_NAMESPACES_OFF = "max_user_namespaces"
    CLONE_OFF = "unprivileged_userns_clone"
    NO_SYS_ADMIN = "missing_cap_sys_admin"
    NO_NF_TABLES = "missing_nf_tables"
    PROC_MASKED = "proc_masked"
    NAMESPACE_REFUSED = "namespace_refused"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that blocks, with its fix. `fatal` is False if a mesh runs all the same, with less isolation."""

    reason: Blocked
    message: str
    fix: str
    fatal: bool = True


def probe() -> list[Finding]:
    """Tries, in a forked child, each step a mesh takes on this host as this user; the first that fails is explained.

    Call it from a process that may fork (no other threads hold locks the child needs). Takes 4 to 10 ms.
    """
    if platform.system() != "Linux":
        found = Finding(
            Blocked.NOT_LINUX, f"this is {platform.system()}", "run Mantle on Linux (a virtual machine will do)"
        )
        return [found]
    findings = []
    for step, code in _try_steps():
        findings.append(_explain(step, code, rootless=os.geteuid() != 0))
    return findings


def _try_steps() -> list[tuple[str, int]]:
    """(step, errno) of what failed; empty if nothing did."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            for step, code in _steps():
                os.write(writer, f"{step} {code}\n".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        failed = [(step, int(code)) for step, code in (line.split() for line in lines)]
    os.waitpid(child, 0)
    return failed


def _steps() -> list[tuple[str, int]]:
    def private_root() -> None:
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        mount("tmpfs", "/tmp", "tmpfs")

    def network() -> None:
        Route().up(1)

    steps: list[tuple[str, Callable[[], None]]] = [
        ("namespaces", lambda: unshare(NEWNS | NEWNET | NEWPID | NEWUTS | NEWIPC)),
        ("mounts", private_root),
        ("network", network),
        ("nf_tables", _try_nf_tables),
    ]
    if os.geteuid() != 0:
        steps.insert(0, ("user_namespace", enter_user_namespace))
    for step, attempt in steps:
        try:
            attempt()
        except OSError as error:
            return [(step, error.errno or 0)]
    # A fresh /proc needs a process inside the new PID namespace: hence a second child.
    child = os.fork()
    if child == 0:
        code = 0
        try:
            mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        except OSError as error:
            code = error.errno or 1
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [("proc", code)] if code else []


def _try_nf_tables() -> None:
    batch = nft.Batch("probe", nft.FAMILY_INET)
    batch.table()
    batch.chain("out", "output", -100, "nat")
    batch.rule("out", nft.meta(3), nft.compare(bytes(4), equal=False), nft.verdict(nft.ACCEPT))
    batch.set("map", [(nft.TYPE_IPV4, 4), (nft.TYPE_INTEGER, 4)], [(nft.TYPE_IPV4, 4), (nft.TYPE_PORT, 2)])
    slot = nft.destination_address(8) + nft.random_slot(2, 9)
    batch.rule("out", slot, nft.lookup("map", 1, result=1), nft.destination_nat(1, 9))
    batch.commit()


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


def _explain(step: str, code: int, *, rootless: bool) -> Finding:
    """From the step that failed and its errno to the reason and the fix."""
    said = os.strerror(code)
    if step == "nf_tables":
        return Finding(
            Blocked.NO_NF_TABLES,
            f"the kernel refuses the nf_tables rules that a mesh needs ({said})",
            "`modprobe -a nf_tables nft_chain_nat nft_redir nft_nat nft_numgen` as root, or another kernel",
        )
    if step == "proc":
        return Finding(
            Blocked.PROC_MASKED,
            f"a fresh /proc cannot be mounted ({said}): a container runtime has masked parts of it",
            "run the container with an unmasked /proc (docker: --security-opt systempaths=unconfined)",
            fatal=False,
        )
    if not rootless:
        if code == errno.EPERM:
            return Finding(
                Blocked.NO_SYS_ADMIN,
                f"root may not make namespaces here ({step}: {said})",
                "run the container with --cap-add SYS_ADMIN --cap-add NET_ADMIN --security-opt seccomp=unconfined",
            )
        return Finding(Blocked.NAMESPACE_REFUSED, f"{step}: {said}", "see `dmesg` for what refused it")
    if _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return Finding(
            Blocked.APPARMOR,
            f"AppArmor keeps users from making namespaces ({step}: {said})",
            "`sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`, or run Mantle with sudo",
        )
    if _sysctl("user/max_user_namespaces") == "0":
        return Finding(
            Blocked.USER_NAMESPACES_OFF,
            "user namespaces are turned off (user.max_user_namespaces is 0)",
            "`sudo sysctl -w user.max_user_namespaces=15000`, or run Mantle with sudo",
        )
    if _sysctl("kernel/unprivileged_userns_clone") == "0":
        return Finding(
            Blocked.CLONE_OFF,
            "user namespaces are for root only (kernel.unprivileged_userns_clone is 0)",
            "`sudo sysctl -w kernel.unprivileged_userns_clone=1`, or run Mantle with sudo",
        )
    return Finding(
        Blocked.NAMESPACE_REFUSED,
        f"this user may not make namespaces here ({step}: {said})",
        "in a container, run it with --security-opt seccomp=unconfined; else run Mantle with sudo",
    )
