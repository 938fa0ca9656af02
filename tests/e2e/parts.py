"""What a cluster is made of: Debian packages, one binary from Go modules, images of local files; no registry."""

import fcntl
import hashlib
import io
import json
import os
import pathlib
import shutil
import tarfile

from common import CACHE, COMPONENTS, HERE, ROOT, VERSION, die, run, say

# command that must exist -> Debian package that has it
PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "nft": "nftables",
    "ip": "iproute2",
    "conntrack": "conntrack",
    "mount": "mount",
    "openssl": "openssl",
    "mmdebstrap": "mmdebstrap",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
}
BASE_PACKAGES = "python3 iptables nftables iproute2 procps curl ca-certificates"  # in the image base "debian"


def install_packages(wanted):
    missing = [p for c, p in PACKAGES.items() if c in wanted and not (shutil.which(c) or os.path.exists(c))]
    if not missing:
        return
    if not ROOT:
        die("install these Debian packages first: " + " ".join(missing))
    say("installing Debian packages: " + " ".join(missing))
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    run("apt-get", "update", "-q", env=env)
    run("apt-get", "install", "-yq", "--no-install-recommends", *missing, env=env)


def bin_dir():
    """The directory of the binaries; built first if this exact source was not built before."""
    src = [HERE / "kube" / f for f in ("go.mod", "go.sum", "main.go", "pause/main.go")]
    key = hashlib.sha256(b"".join(f.read_bytes() for f in src)).hexdigest()[:12]
    done = CACHE / f"bin-{VERSION}-{key}"
    if done.exists():
        return done
    if not shutil.which("go"):
        die("Go is needed to build Kubernetes: install it, or put it on PATH")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return done
        say(f"building Kubernetes {VERSION} from Go modules (once: 5 to 15 minutes on 2 cores)")
        tmp = CACHE / f"tmp-{os.getpid()}"
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        v = "-X k8s.io/component-base/version.git"
        ld = f"-s -w {v}Version=v{VERSION} {v}Major=1 {v}Minor={VERSION.split('.')[1]} {v}TreeState=clean"
        env = dict(os.environ, CGO_ENABLED="0", GOFLAGS="-buildvcs=false -mod=readonly", GOWORK="off")
        prefix = os.environ.get("MANTLE_E2E_BUILD_PREFIX", "nice").split()
        for package, name in ((".", "mantle-kube"), ("./pause", "pause")):
            run(
                *prefix,
                "go",
                "build",
                "-trimpath",
                "-ldflags",
                ld,
                "-o",
                tmp / name,
                package,
                cwd=HERE / "kube",
                env=env,
            )
        for c in COMPONENTS:
            (tmp / c).symlink_to("mantle-kube")
        tmp.rename(done)
        say(f"built {done} ({(done / 'mantle-kube').stat().st_size >> 20} MiB)")
    return done


def base_layer(name):
    """A root filesystem as a tar file, or None for an empty one."""
    if name == "scratch":
        return None
    if name != "debian":
        return pathlib.Path(name)
    tar = CACHE / f"debian-{hashlib.sha256(BASE_PACKAGES.encode()).hexdigest()[:8]}.tar"
    if not tar.exists():
        install_packages({"mmdebstrap"})
        say(f"making the base image from Debian packages: {BASE_PACKAGES}")
        CACHE.mkdir(parents=True, exist_ok=True)
        suite = dict(l.split("=", 1) for l in open("/etc/os-release").read().split("\n") if "=" in l)[
            "VERSION_CODENAME"
        ]
        tmp = tar.with_suffix(f".{os.getpid()}")
        run(
            "mmdebstrap",
            "--variant=minbase",
            "--format=tar",
            "--include=" + BASE_PACKAGES.replace(" ", ","),
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            suite,
            tmp,
        )
        tmp.rename(tar)
    return tar


def write_image(out, name, base, adds, config, have=()):
    """Write an OCI archive: the base as one layer, the added files as another. Blobs in `have` are left out."""
    blobs, layers, descriptor = (
        {},
        [],
        lambda kind, digest, size, **more: {
            "mediaType": f"application/vnd.oci.image.{kind}",
            "digest": f"sha256:{digest}",
            "size": size,
            **more,
        },
    )

    def blob(data):
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return digest, len(data)

    if base:
        with open(base, "rb") as f:
            layers.append((hashlib.file_digest(f, "sha256").hexdigest(), os.path.getsize(base)))
        blobs[layers[0][0]] = base
    if adds:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as t:

            def root_owned(i):
                i.uid = i.gid = 0
                i.uname = i.gname = "root"
                return i

            for src, _, dst in (a.rpartition(":") for a in adds):
                if not os.path.exists(src):
                    die(f"image {name}: no such file: {src}")
                t.add(os.path.realpath(src), dst.lstrip("/"), filter=root_owned)
        layers.append(blob(buffer.getvalue()))
    conf = blob(
        json.dumps(
            {
                "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
                "os": "linux",
                "config": config,
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{d}" for d, _ in layers]},
            }
        ).encode()
    )
    manifest = blob(
        json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": descriptor("config.v1+json", *conf),
                "layers": [descriptor("layer.v1.tar", *l) for l in layers],
            }
        ).encode()
    )
    first = name.split("/")[0]  # the kubelet's runtime expands short names this way, so the stored name must be long
    full = (
        name
        if "/" in name and ("." in first or ":" in first or first == "localhost")
        else ("docker.io/" + ("" if "/" in name else "library/") + name)
    )
    files = {f"blobs/sha256/{d}": data for d, data in blobs.items() if d not in have} | {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps(
            {
                "schemaVersion": 2,
                "manifests": [
                    descriptor("manifest.v1+json", *manifest, annotations={"io.containerd.image.name": full})
                ],
            }
        ).encode(),
    }
    with tarfile.open(out, "w") as t:
        for path, data in files.items():
            if isinstance(data, bytes):
                info = tarfile.TarInfo(path)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
            else:
                t.add(data, path)
