"""Facts about the host that planning needs, read once: users, programs, where Mantle itself is."""

from __future__ import annotations

import grp
import os
import pwd
import sys
from collections.abc import Mapping
from pathlib import Path

import mantle
from mantle.core.proxy_env import Values
from mantle.platform.machine.dns_server import host_resolver
from mantle.platform.machine.images import Image
from mantle.platform.machine.places import find_proxy, own_programs
from mantle.platform.machine.plan import NOBODY, Machine, User
from mantle.platform.machine.state import MeshConfig, StateDir

PROXY_MARK = 0x6D
__all__ = ["default_user", "find_proxy", "machine", "nobody", "own_images", "user_of"]


def user_of(uid: int) -> User:
    """A user with its group, groups and home; one that the host does not know has none of them."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return User(uid, uid)
    groups = tuple(sorted({g for g in os.getgrouplist(entry.pw_name, entry.pw_gid) if g != entry.pw_gid}))
    return User(uid, entry.pw_gid, groups, entry.pw_dir)


def default_user(environment: Mapping[str, str]) -> User:
    """Who programs run as without `runAsUser`: the caller of sudo as root, ourselves without root; never host root."""
    uid = os.geteuid()
    if uid == 0:
        uid = int(environment.get("SUDO_UID") or 0)
        if uid == 0:
            return nobody()
    return user_of(uid)


def nobody() -> User:
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        return NOBODY
    try:
        gid = grp.getgrgid(entry.pw_gid).gr_gid
    except KeyError:
        gid = entry.pw_gid
    return User(entry.pw_uid, gid, (), "/")


def own_images(proxy: str) -> dict[str, Image]:
    """Mantle's own images. Their `file` is empty, which no map of a user's can be: only they keep capabilities."""
    package = Path(mantle.__file__).resolve().parents[1]
    installed = any(Path(p).resolve() == package for p in sys.path if p and "site-packages" in p)
    env = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if not installed:
        env["PYTHONPATH"] = str(package)
    return {
        "mantle/proxy": Image((proxy,)),
        "mantle/control-plane": Image((sys.executable, "-m", "mantle.control_plane"), env=env),
    }


def machine(config: MeshConfig, store: StateDir, trust_roots: str, proxy: str) -> Machine:
    """This machine, for the plans of one mesh."""
    rootless = os.geteuid() != 0
    values = Values(
        version=mantle.__version__,
        trust_anchors=trust_roots,
        networks=config.networks,
        inject_by_default=True,
        mark=PROXY_MARK if rootless else None,
        proxy_env=config.proxy_env,
    )
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Machine(
        state_dir=str(store.path),
        node_name=os.uname().nodename.split(".")[0].lower() or "localhost",
        dns_ip=config.dns_ip,
        rootless=rootless,
        default_user=default_user(os.environ),
        search=(str(own_programs()), "/usr/local/bin", "/usr/bin", "/bin"),
        proxy_path=proxy,
        values=values,
        maps=(own_images(proxy),),
        user_of=user_of,
        searches=tuple(host_resolver()[1]),
        cpus=len(os.sched_getaffinity(0)),
        memory=pages * size,
    )
