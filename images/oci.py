"""OCI image archives from local files, byte for byte the same each time: no daemon, no registry, no clock.

Entries have a fixed time and owner and are sorted, so equal inputs make equal archives. Layers are plain tar: the
archive is loaded, not stored. Knows nothing of Mantle. Sources: the OCI image layout and image specifications,
https://github.com/opencontainers/image-spec.
"""

import hashlib
import io
import json
import os
import struct
import tarfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH", "1"))
"""The time of every file (https://reproducible-builds.org/specs/source-date-epoch)."""
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Layer:
    """A finished layer: a tar file on disk, and what the manifest says about it."""

    path: Path
    digest: str
    """SHA-256 of the file, in hexadecimal; also the `diff_id`, as nothing is compressed."""
    size: int


def layer(path: Path, entries: Mapping[str, Path | bytes], permitted: Mapping[str, int] | None = None) -> Layer:
    """Writes a layer of `entries` (absolute path in the image → file, directory or content) to `path`.

    Directories are walked; caches and byte code of Python are left out unless named themselves. `permitted`: the file
    capabilities (a mask, capabilities(7)) of some paths.
    """
    found: dict[str, Path | bytes] = {}
    capabilities = {target.lstrip("/"): mask for target, mask in (permitted or {}).items()}
    for target, source in entries.items():
        if isinstance(source, bytes) or not source.is_dir():
            found[target.lstrip("/")] = source
            continue
        for file in source.rglob("*"):
            if "__pycache__" not in file.parts and (file.is_file() or file.is_symlink()):
                found[f"{target.strip('/')}/{file.relative_to(source)}"] = file
    directories = {str(parent) for name in found for parent in Path(name).parents} - {"."}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(directories | set(found)):
            info, source = tarfile.TarInfo(name), found.get(name)
            info.mtime, info.mode = EPOCH, 0o755
            if source is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            elif isinstance(source, Path) and source.is_symlink():
                info.type, info.linkname = tarfile.SYMTYPE, str(source.readlink())
                tar.addfile(info)
            else:
                content = source if isinstance(source, bytes) else source.read_bytes()
                info.size = len(content)
                if name in capabilities:
                    # Permitted and not effective: a container whose bounds lack it can start the file all the same.
                    value = struct.pack("<IIIII", 0x02000000, capabilities[name], 0, 0, 0)
                    info.pax_headers = {"SCHILY.xattr.security.capability": value.decode("ascii")}
                info.mode = 0o755 if isinstance(source, Path) and os.access(source, os.X_OK) else 0o644
                tar.addfile(info, io.BytesIO(content))
    return measured(path)


def rewritten(source: Path, path: Path, keep: Callable[[str], bool]) -> Layer:
    """A layer of the entries of the tar file `source` that `keep` (given `usr/bin/x`) wants, sorted, fixed times."""
    with tarfile.open(source) as old, tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as new:
        members = {member.name.removeprefix("./").rstrip("/"): member for member in old}
        for name, member in sorted(members.items(), key=lambda item: (item[1].islnk(), item[0])):
            if name in ("", ".") or not keep(name):
                continue
            member.name, member.mtime, member.uname, member.gname = name, EPOCH, "", ""
            member.pax_headers = {}
            member.mode &= 0o1777  # nobody in a container becomes root by a program
            if member.islnk():
                member.linkname = member.linkname.removeprefix("./")
            new.addfile(member, old.extractfile(member) if member.isreg() else None)
    return measured(path)


def full_name(name: str) -> str:
    """The name as container runtimes store it: `mantle/proxy:1` is `docker.io/mantle/proxy:1`."""
    first = name.split("/")[0]
    if "/" in name and ("." in first or ":" in first or first == "localhost"):
        return name
    return "docker.io/" + ("" if "/" in name else "library/") + name


def archive(
    path: Path, name: str, layers: Sequence[Layer], config: Mapping[str, Any], have: Collection[str] = ()
) -> str:
    """Writes the OCI archive of one image and returns the digest of its manifest. Blobs named in `have` are left out:
    a runtime that knows them already takes the rest.

    `config`: `Entrypoint`, `User`, `Env` … as in the image specification.
    """
    blobs: dict[str, bytes | Path] = {part.digest: part.path for part in layers}

    def blob(kind: str, value: Any) -> dict[str, Any]:
        data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return _descriptor(kind, digest, len(data))

    image = {
        "architecture": MACHINES[os.uname().machine],
        "os": "linux",
        "config": dict(config),
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{part.digest}" for part in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", image),
        "layers": [_descriptor("layer.v1.tar", part.digest, part.size) for part in layers],
    }
    top = blob("manifest.v1+json", manifest)
    stored = full_name(name)
    top["annotations"] = {
        "io.containerd.image.name": stored,
        "org.opencontainers.image.ref.name": stored.rpartition(":")[2],
    }
    files: dict[str, bytes | Path] = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [top]}, sort_keys=True).encode(),
    }
    files |= {f"blobs/sha256/{digest}": data for digest, data in blobs.items() if digest not in have}
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for file, data in sorted(files.items()):
            info = tarfile.TarInfo(file)
            info.mtime = EPOCH
            if isinstance(data, Path):
                info.size = data.stat().st_size
                with data.open("rb") as content:
                    tar.addfile(info, content)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(top["digest"])


def _descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": size}


def measured(path: Path) -> Layer:
    """A finished tar file as a layer."""
    with path.open("rb") as file:
        return Layer(path, hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)
