"""Installs a built mantle-proxy into the running environment as the distribution `mantle-proxy`.

`pip` then sees the dependency of `mantle-mesh` as satisfied (`pip check`, `importlib.metadata`), and nothing is built
twice: this is what installing the wheel would leave behind, without packing and unpacking it.

    python scripts/proxy_dist.py TARGET/release/mantle-proxy
"""

import base64
import filecmp
import hashlib
import os
import shutil
import sys
import sysconfig
import tomllib
from pathlib import Path


def record_line(path: Path, base: Path) -> str:
    """One line of RECORD (https://packaging.python.org/specifications/recording-installed-packages)."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
    return f"{os.path.relpath(path, base)},sha256={digest},{path.stat().st_size}\n"


def main() -> None:
    built = Path(sys.argv[1])
    version = tomllib.loads(Path("proxy/Cargo.toml").read_text())["workspace"]["package"]["version"]
    site, scripts = Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("scripts"))
    program, info = scripts / "mantle-proxy", site / f"mantle_proxy-{version}.dist-info"
    if program.exists() and info.is_dir() and filecmp.cmp(built, program, shallow=True):
        return
    for other in site.glob("mantle_proxy-*.dist-info"):
        shutil.rmtree(other)
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: mantle-proxy\nVersion: {version}\n")
    (info / "INSTALLER").write_text("mantle-checkout\n")
    fresh = program.with_suffix(".new")
    shutil.copy2(built, fresh)
    fresh.rename(program)  # a running proxy keeps its own file
    names = [info / "METADATA", info / "INSTALLER", program]
    (info / "RECORD").write_text(
        "".join(record_line(path, site) for path in names) + f"{os.path.relpath(info / 'RECORD', site)},,\n"
    )
    print(f"mantle: installed {program} {version}", file=sys.stderr)


if __name__ == "__main__":
    main()
