"""Giving up rights for good: what stands between an application and everything that its pod's supervisor may do."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable
from typing import Final

from mantle.platform.machine.namespaces import call

_PR_SET_KEEPCAPS, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _AMBIENT_RAISE = 8, 24, 38, 47, 2
_VERSION_3: Final = 0x20080522

_NAMES: Final = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE"
    " NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN"
    " SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE"
    " MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
)
CAPABILITIES: Final = {name: number for number, name in enumerate(_NAMES.split())}
"""Numbers of linux/capability.h; names without the prefix, as in a manifest."""


def drop_privileges(
    uid: int, gid: int, groups: Iterable[int], capabilities: Iterable[str], *, change_ids: bool
) -> None:
    """Becomes `uid`, with exactly `capabilities`, for good: nothing it executes can ever have more.

    Without `change_ids` (a user namespace with one id) the ids stay. Raises OSError, also for a capability that does
    not exist."""
    try:
        kept = {CAPABILITIES[name.removeprefix("CAP_")] for name in capabilities}
    except KeyError as error:
        raise OSError(f"there is no capability {error.args[0]}") from None
    for number in range(64):
        if number not in kept:
            try:
                call("prctl", _PR_CAPBSET_DROP, number, 0, 0, 0)
            except OSError as error:
                if error.errno == errno.EINVAL:  # past the last capability of this kernel
                    break
                raise
    if change_ids:
        call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setgroups(list(groups))
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    bits = sum(1 << number for number in kept)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    call("capset", struct.pack("II", _VERSION_3, 0), struct.pack("6I", low, low, low, high, high, high))
    for number in kept:
        call("prctl", _PR_CAP_AMBIENT, _AMBIENT_RAISE, number, 0, 0)
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
