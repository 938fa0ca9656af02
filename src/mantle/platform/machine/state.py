"""What a mesh remembers on its tmpfs, so that a restarted daemon resumes: where files are, and how they are written.

Nothing here decides anything. Every file is replaced whole, mode 0600. Paths are in ARCHITECTURE.md.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mantle.platform.machine.images import Image
from mantle.platform.machine.manifest import Object
from mantle.platform.machine.plan import NOBODY, User

POD_CIDR = "10.203.0.0/17"
SERVICE_CIDR = "10.203.128.0/17"


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """`mesh.json`: what a mesh was started with, once for its life."""

    name: str
    pod_cidr: str = POD_CIDR
    service_cidr: str = SERVICE_CIDR
    issuance_lifetime: str = "24h"
    proxy_env: Mapping[str, str] = field(default_factory=dict)
    """More for every proxy (`IDENTITY_MIN_REFRESH`: `1s`)."""

    @property
    def networks(self) -> tuple[str, ...]:
        return self.pod_cidr, self.service_cidr

    @property
    def dns_ip(self) -> str:
        """The router's address: the pods' gateway, DNS, where probes come from. The tenth of the services' network."""
        return str(ipaddress.IPv4Network(self.service_cidr)[10])

    def pod_range(self) -> tuple[int, int]:
        network = ipaddress.IPv4Network(self.pod_cidr)
        return int(network[1]), int(network[-2])

    def service_range(self) -> tuple[int, int]:
        network = ipaddress.IPv4Network(self.service_cidr)
        return int(network[11]), int(network[-2])  # those before are ours


@dataclass(frozen=True, slots=True)
class Applied:
    """One file as it was last applied, with all that is needed to plan it again the same way."""

    name: str
    objects: tuple[Object, ...]
    images: Mapping[str, Image] = field(default_factory=dict)
    search: tuple[str, ...] = ()
    """Where programs are looked for: the user's PATH then."""
    user: User = NOBODY
    """Who its programs run as, unless the manifest says."""


class StateDir:
    """The files of one mesh under `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.api = path / "api.sock"
        self.node = path / "node.sock"
        self.control = path / "control"
        self.pods = path / "pods"
        self.log = path / "daemon.log"

    def create(self) -> None:
        """The directories, 0700. Raises PermissionError when they belong to somebody else."""
        self.path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)  # others may learn whose a mesh is, no more
        for directory in (self.path.parent, self.path):
            directory.mkdir(mode=0o700, exist_ok=True)
            # Of itself: where everybody may write (/dev/shm), somebody may have put a link to a directory of ours.
            there = directory.lstat()
            if there.st_uid != os.geteuid() or not stat.S_ISDIR(there.st_mode):
                raise PermissionError(f"{directory} belongs to another user, or is no directory")
        self.path.parent.chmod(0o711)
        for directory in (self.control, self.pods, self.path / "issuer"):
            directory.mkdir(mode=0o700, exist_ok=True)

    def lock(self) -> int:
        """Waits until nobody else starts or removes this mesh. The descriptor returned is the lock: closing it gives
        it up.
        """
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    def write(self, name: str, data: bytes) -> None:
        """One file, whole or not at all."""
        path = self.path / name
        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
        temporary.rename(path)

    def read(self, name: str) -> bytes | None:
        """A file's contents; None when it is not there."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    # ---- mesh.json ----

    def save_mesh(self, config: MeshConfig, more: Mapping[str, Any]) -> None:
        self.write("mesh.json", json.dumps({**asdict(config), **more}, indent=1).encode())

    def load_mesh(self) -> tuple[MeshConfig, dict[str, Any]] | None:
        data = self.read("mesh.json")
        if data is None:
            return None
        value = json.loads(data)
        names = MeshConfig.__dataclass_fields__
        return MeshConfig(**{k: v for k, v in value.items() if k in names}), {
            k: v for k, v in value.items() if k not in names
        }

    # ---- objects.json ----

    def save_objects(self, files: Mapping[str, Applied], addresses: Mapping[str, str]) -> None:
        """What was applied, by file, and the service addresses that were given out."""
        value = {"files": {key: _applied_json(a) for key, a in files.items()}, "addresses": dict(addresses)}
        self.write("objects.json", json.dumps(value).encode())

    def load_objects(self) -> tuple[dict[str, Applied], dict[str, str]]:
        data = self.read("objects.json")
        if data is None:
            return {}, {}
        value = json.loads(data)
        return {key: _applied(a) for key, a in value["files"].items()}, value["addresses"]


def _applied_json(applied: Applied) -> dict[str, Any]:
    return {
        "name": applied.name,
        "objects": [{"kind": o.kind, "namespace": o.namespace, "name": o.name, "doc": o.doc} for o in applied.objects],
        "images": {name: asdict(image) for name, image in applied.images.items()},
        "search": list(applied.search),
        "user": asdict(applied.user),
    }


def _applied(value: Mapping[str, Any]) -> Applied:
    objects = tuple(Object(o["kind"], o["namespace"], o["name"], o["doc"], value["name"]) for o in value["objects"])
    images = {
        name: Image(tuple(i["command"]), tuple(i["args"]), i["directory"], i["env"], i["file"], i["line"])
        for name, i in value["images"].items()
    }
    user = value["user"]
    return Applied(
        value["name"],
        objects,
        images,
        tuple(value["search"]),
        User(user["uid"], user["gid"], tuple(user["groups"]), user["home"]),
    )
