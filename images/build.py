"""`make images`: Mantle's images as OCI archives in dist/images, from Debian packages and this checkout.

    python images/build.py [--profile release|dev|dist] [--only NAME ...] [--output DIRECTORY]

Run by the checkout's environment: the Python packages of the images are the locked ones that it holds. What is in each
image is the table `images()`. Bases hold no package manager, no shell they do not need, and nothing of root's.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import oci

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mantle" / "images"
PYTHON_BASE = ("python3", "libstdc++6")
DEBUG_BASE = ("tshark", "dash", "bash", "coreutils", "grep", "sed", "curl", "iproute2", "procps", "nftables")
LEFT_OUT = re.compile(
    r"usr/share/(man|locale|lintian|bug|info|doc-base|applications|pixmaps|icons|polkit-1|menu|perl)(/|$)"
    r"|usr/share/doc/[^/]+/(?!copyright$)"  # licences stay
    r"|usr/lib/[^/]+/(perl|perl-base|gconv|systemd)(/|$)|usr/(lib|share)/perl5?(/|$)|usr/bin/perl"
    r"|(etc/(apt|cron[^/]*|systemd)|var/(cache|log|lib/(apt|dpkg/info)))/.|.*/__pycache__(/|$)"
    r"|usr/lib/python3\.\d+/(pydoc_data|ensurepip|lib2to3|idlelib|tkinter|test)(/|$)"
)
USERS = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nmantle:x:2103:2103::/:/usr/sbin/nologin\n",
    "/etc/group": "root:x:0:\nmantle:x:2103:\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
NET_ADMIN = 1 << 12
"""What `mantle-proxy redirect` needs; an init container that is not root finds an added capability here only."""
PYTHON_ENV = ["PATH=/usr/bin:/bin", "PYTHONPATH=/opt/mantle/lib:/opt/mantle/app", "PYTHONDONTWRITEBYTECODE=1"]


@dataclass(frozen=True, slots=True)
class Image:
    """One image: its layers from the bottom up, and how it starts."""

    layers: tuple[oci.Layer, ...]
    config: dict[str, Any]


class Workshop:
    """Makes layers in a scratch directory; bases come from the cache, made once for each list of packages."""

    def __init__(self, scratch: Path, profile: str) -> None:
        self.scratch, self.profile = scratch, profile

    def base(self, packages: tuple[str, ...]) -> oci.Layer:
        """The packages with what they depend on, extracted: nothing is configured, and nothing else is there."""
        suite = os.environ.get("MANTLE_IMAGES_SUITE") or _os_release()["VERSION_CODENAME"]
        recipe = f"{suite} {' '.join(packages)} {LEFT_OUT.pattern} {sorted(USERS.items())}"
        cached = CACHE / f"base-{packages[0]}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.tar"
        if not cached.exists():
            print(f"mantle: making a base of Debian's packages {', '.join(packages)}", file=sys.stderr)
            CACHE.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as directory:
                raw, made = Path(directory) / "raw.tar", Path(directory) / "made.tar"
                include = "--include=" + ",".join(packages)
                command = ["mmdebstrap", "--quiet", "--variant=extract", "--format=tar", include, suite, str(raw)]
                subprocess.run(command, check=True, env=os.environ | {"SOURCE_DATE_EPOCH": str(oci.EPOCH)})
                oci.rewritten(raw, made, lambda name: not LEFT_OUT.match(name) and f"/{name}" not in USERS)
                made.rename(cached)
        return oci.measured(cached)

    def layer(self, name: str, entries: dict[str, Path | bytes]) -> oci.Layer:
        return oci.layer(self.scratch / f"{name}.tar", entries)

    def users(self) -> oci.Layer:
        return self.layer("users", {path: text.encode() for path, text in USERS.items()})

    def python_packages(self) -> oci.Layer:
        """What `mantle-mesh` depends on, as installed here, and compiled: start-up writes nothing."""
        directory = self.scratch / "lib"
        for distribution in sorted(runtime_distributions(), key=lambda d: d.metadata["Name"]):
            for file in distribution.files or ():
                if ".." in file.parts or "__pycache__" in file.parts or file.name in ("INSTALLER", "RECORD"):
                    continue
                source, target = Path(str(distribution.locate_file(file))), directory / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
        return self.layer("lib", {"/opt/mantle/lib": directory} | dict(byte_code(directory, "/opt/mantle/lib")))

    def sources(self, name: str, packages: dict[str, Path]) -> oci.Layer:
        """Our own packages (name → directory in the checkout)."""
        entries: dict[str, Path | bytes] = {}
        for package, directory in packages.items():
            target = f"/opt/mantle/app/{package}"
            entries |= {target: directory} | dict(byte_code(directory, target))
        return self.layer(name, entries)

    def proxy(self) -> oci.Layer:
        """The static proxy without its symbols."""
        command = [ROOT / "scripts" / "static_proxy.sh", self.profile]
        built = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        stripped = self.scratch / "mantle-proxy"
        subprocess.run(["strip", "-o", stripped, built], check=True)
        program = "/usr/bin/mantle-proxy"
        return oci.layer(self.scratch / "proxy.tar", {program: stripped}, {program: NET_ADMIN})


def images(shop: Workshop, wanted: set[str]) -> Iterator[tuple[str, Image]]:
    """The table: name → image. A layer is made only if an image that is wanted has it."""
    version = (ROOT / "src/mantle/__init__.py").read_text().split('__version__ = "')[1].split('"')[0]
    application = re.search(r"image: mantle/emojivoto:(\S+)", (ROOT / "apps/emojivoto/emojivoto.yml").read_text())
    assert application, "emojivoto.yml names no image mantle/emojivoto:TAG"
    if "proxy" in wanted:
        config = {"Entrypoint": ["/usr/bin/mantle-proxy"], "User": "2102:2102"}
        yield f"mantle/proxy:{version}", Image((shop.proxy(),), config)
    if wanted & {"control-plane", "emojivoto"}:
        python = (shop.base(PYTHON_BASE), shop.users(), shop.python_packages())
        if "control-plane" in wanted:
            app = shop.sources("control-plane", {"mantle": ROOT / "src/mantle"})
            entry = ["/usr/bin/python3", "-m", "mantle.control_plane"]
            config = {"Entrypoint": entry, "User": "2103:2103", "Env": PYTHON_ENV}
            yield f"mantle/control-plane:{version}", Image((*python, app), config)
        if "emojivoto" in wanted:
            app = shop.sources("emojivoto", {"mantle_emojivoto": ROOT / "apps/emojivoto/mantle_emojivoto"})
            config = {"Entrypoint": ["/usr/bin/python3", "-m", "mantle_emojivoto"], "User": "2104", "Env": PYTHON_ENV}
            yield f"mantle/emojivoto:{application[1]}", Image((*python, app), config)
    if "debug" in wanted:
        path = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        # It waits to be entered; bash as PID 1 with a trap ends at once when the pod does.
        wait = ["/bin/bash", "-c", "trap 'exit 0' TERM INT; sleep infinity & wait"]
        yield f"mantle/debug:{version}", Image((shop.base(DEBUG_BASE), shop.users()), {"Cmd": wait, "Env": path})


def runtime_distributions() -> list[metadata.Distribution]:
    """Everything `mantle-mesh` needs at run time, but for itself and the proxy, which has an image of its own."""
    found: dict[str, metadata.Distribution] = {}
    asked = ["mantle-mesh"]
    while asked:
        name = asked.pop().lower().replace("_", "-")
        if name in found or name == "mantle-proxy":
            continue
        found[name] = metadata.distribution(name)
        for line in found[name].requires or ():
            requirement, _, marker = line.partition(";")
            if "extra" not in marker and _applies(marker.strip()):
                asked.append(re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0])
    del found["mantle-mesh"]
    return list(found.values())


def _applies(marker: str) -> bool:
    """Whether an environment marker holds for this Python. `packaging` is there because pytest needs it."""
    from packaging.markers import Marker

    return not marker or Marker(marker).evaluate()


def byte_code(directory: Path, target: str) -> Iterator[tuple[str, bytes]]:
    """Compiled files of all sources, found by their content: file times play no part (PEP 552)."""
    import importlib._bootstrap_external as loader
    import importlib.util

    for source in sorted(directory.rglob("*.py")):
        inside = f"{target}/{source.relative_to(directory)}"
        text = source.read_bytes()
        try:
            code = compile(text, inside, "exec", dont_inherit=True)
        except SyntaxError:  # a package's template or a file for another Python
            continue
        data = loader._code_to_hash_pyc(code, importlib.util.source_hash(text), False)  # type: ignore[attr-defined]
        name = f"{source.stem}.{sys.implementation.cache_tag}.pyc"
        yield f"{Path(inside).parent}/__pycache__/{name}", bytes(data)


def _os_release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    return {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("proxy", "control-plane", "debug", "emojivoto")
    parser.add_argument("--profile", default="release", help="cargo's profile for the proxy")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "images")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, image in images(Workshop(Path(scratch), args.profile), set(args.only)):
            path = args.output / f"{name.replace('/', '-').replace(':', '-')}.tar"
            digest = oci.archive(path, name, image.layers, image.config)
            size = sum(layer.size for layer in image.layers)
            print(f"{name:32} {size / 1e6:7.1f} MB  {digest}  {path}")


if __name__ == "__main__":
    main()
