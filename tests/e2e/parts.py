"""What a cluster is made of: Debian packages, binaries from Go modules, images of local files; no registry."""

import fcntl
import hashlib
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "images"))
import oci
from common import CACHE, COMPONENTS, HELM_VERSION, HERE, ROOT, VERSION, die, run, say

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
    "/usr/lib/cni/ptp": "containernetworking-plugins",
}


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
    return built(f"bin-{VERSION}-{key}", f"Kubernetes {VERSION} (5 to 15 minutes on 2 cores)", kubernetes)


def helm_bin():
    """Helm, for the tests of the chart; built first if this version was not. Kubernetes is not built anew for it."""
    return built(f"helm-{HELM_VERSION}", f"Helm {HELM_VERSION} (2 to 6 minutes on 2 cores)", helm) / "helm"


def built(name, what, build):
    """A directory of the cache, made once by `build(directory)`; one build at a time on a machine."""
    done = CACHE / name
    if done.exists():
        return done
    if not shutil.which("go"):
        die(f"Go is needed to build {what}: install it, or put it on PATH")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return done
        say(f"building {what} from Go modules, once")
        tmp = CACHE / f"tmp-{os.getpid()}"
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        build(tmp)
        tmp.rename(done)
        say(f"built {done} ({sum(f.lstat().st_size for f in done.iterdir()) >> 20} MiB)")
    return done


def kubernetes(out):
    """All of Kubernetes as one program with many names, and the pause program."""
    v = "-X k8s.io/component-base/version.git"
    ld = f"-s -w {v}Version=v{VERSION} {v}Major=1 {v}Minor={VERSION.split('.')[1]} {v}TreeState=clean"
    env = go_environment("-mod=readonly")
    for package, name in ((".", "mantle-kube"), ("./pause", "pause")):
        build = (*nice(), "go", "build", "-trimpath", "-ldflags", ld, "-o", out / name, package)
        run(*build, cwd=HERE / "kube", env=env)
    for c in COMPONENTS:
        (out / c).symlink_to("mantle-kube")


def helm(out):
    module = f"helm.sh/helm/v3/cmd/helm@v{HELM_VERSION}"
    env = go_environment() | {"GOBIN": str(out)}
    for wait in (15, 60, 0):  # it is fetched over the network, which may fail for a moment
        run(*nice(), "go", "install", "-trimpath", "-ldflags", "-s -w", module, cwd=out, env=env, check=not wait)
        if (out / "helm").exists():
            return
        time.sleep(wait)


def go_environment(*flags):
    return dict(os.environ, CGO_ENABLED="0", GOFLAGS=" ".join(("-buildvcs=false", *flags)), GOWORK="off")


def nice():
    return os.environ.get("MANTLE_E2E_BUILD_PREFIX", "nice").split()


def write_pause(out, program):
    """The image that holds a pod's namespaces open."""
    with tempfile.TemporaryDirectory() as scratch:
        layer = oci.layer(pathlib.Path(scratch, "pause.tar"), {"/pause": program})
        oci.archive(out, "mantle.local/pause:1", [layer], {"Entrypoint": ["/pause"]})


def without(archive, known, out):
    """Copies an OCI archive without the blobs that the runtime has already: a base travels once."""
    with tarfile.open(archive) as old, tarfile.open(fileobj=out, mode="w|") as new:
        for member in old:
            if member.name.rpartition("/")[2] not in known:
                new.addfile(member, old.extractfile(member))
