"""The demo, as a person sees it: as root and as a user, from this checkout and from wheels without Rust."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.root, pytest.mark.mesh, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
EDGES = {
    ("vote-bot", "web", "default.emojivoto", "web.emojivoto", "-"),
    ("web", "emoji", "web.emojivoto", "emoji.emojivoto", "-"),
    ("web", "voting", "web.emojivoto", "voting.emojivoto", "-"),
}
TAP = re.compile(
    r"req id=\d+:\d+ proxy=(in |out) src=10\.203\.\d+\.\d+:\d+ dst=10\.203\.\d+\.\d+:\d+ tls=true "
    r":method=(GET|POST) :authority=(\S+) :path=(\S+)"
)
REQUESTS = {
    ("GET", "web-svc.emojivoto:80", "/api/list"),
    ("POST", "emoji-svc.emojivoto:8080", "/emojivoto.v1.EmojiService/ListAll"),
}


async def demo(program: list[str], *arguments: str) -> str:
    """Runs the demo for some seconds, with the page asked for once while it runs; its standard output."""
    process = await asyncio.create_subprocess_exec(
        *program, "demo", "--for", "12s", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout and process.stderr
    said = b""
    while not said.endswith(b"\n\n") or b"vote at" not in said:
        line = await process.stdout.readline()
        assert line, (said + await process.stderr.read()).decode()
        said += line
    address = re.search(rb"vote at (http://127\.0\.0\.1:\d+)", said)
    assert address
    page = await asyncio.to_thread(urllib.request.urlopen, address[1].decode(), timeout=60)
    assert b"<title>Emoji Vote</title>" in page.read()
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return (said + out).decode()


def check(said: str) -> None:
    """Every edge is encrypted, and the requests of the bot and of web are seen from both sides, all of them TLS."""
    # How wide a column is depends on the edges of viz, which may or may not be there yet.
    rows = [tuple(line.split()) for line in said.splitlines()]
    assert set(rows) >= EDGES
    # Only probes come from outside the mesh. Whether viz has met one yet when the table is printed is chance.
    assert {(row[0], row[-1]) for row in rows if row and row[0] == "probe"} <= {("probe", "not_provided_by_remote")}
    lines = [line for line in said.splitlines() if line.startswith(("req ", "rsp ", "end "))]
    assert all(" tls=true " in line for line in lines)
    seen = {(m[1], m[2], m[3], m[4]) for line in lines if (m := TAP.fullmatch(line))}
    for side in ("in ", "out"):
        assert {found[1:] for found in seen if found[0] == side} >= REQUESTS


def like_the_readme(said: str) -> None:
    """Every line of standard output that the README shows is there, but for numbers, widths, and what is chance."""
    (shown,) = re.findall(r"(?ms)^```text\n\$ make demo\n(.*?)^```$", (ROOT / "README.md").read_text())
    _, _, shown = shown.partition("encrypted traffic on every edge after")
    lines = [" ".join(line.split()) for line in ("encrypted traffic on every edge after" + shown).splitlines() if line]
    there = [" ".join(line.split()) for line in said.splitlines()]
    for line in lines:
        # viz may or may not have asked everybody, and met a probe, when the tables are printed.
        if line.startswith(("mantle-viz", "probe", "what is not encrypted", "requests as they happen")):
            continue
        pattern = re.compile(re.sub(r"\d+", r"\\d+", re.escape(line)))
        assert any(pattern.fullmatch(found) for found in there), f"the README shows, and the demo does not:\n{line}"


def nothing_left() -> None:
    """One that was ended needs a moment to go, and the kernel one to take its links away."""
    until = time.monotonic() + 60
    while left := [*mantle_processes(), *mantle_links()]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def mantle_processes() -> Iterator[str]:
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has just ended
                if b"mantle" in (line := (process / "cmdline").read_bytes()):
                    yield line.replace(b"\0", b" ").decode()


def mantle_links() -> Iterator[str]:
    links = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines() if ":" in line]
    return (name for name in links if name.startswith("mantle"))


def test_the_demo_proves_encryption_and_leaves_nothing(host: Any, mantle_proxy: Path) -> None:
    async def scene() -> None:
        said = await demo([sys.executable, "-m", "mantle"])
        check(said)
        like_the_readme(said)
        nothing_left()

    host.play(scene, seconds=400, prepare=lambda: os.environ.update(MANTLE_PROXY_PATH=str(mantle_proxy)))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with both wheels in it; its `bin`."""
    place = tmp_path_factory.mktemp("installed")
    profile = (ROOT / ".venv" / ".mantle-profile").read_text().strip()
    subprocess.run(
        [ROOT / "scripts/wheels.sh", profile, place / "wheels"], check=True, capture_output=True, timeout=1500
    )
    subprocess.run([sys.executable, "-m", "venv", place / "env"], check=True, timeout=300)
    wheels = [str(path) for path in (place / "wheels").glob("*.whl")]
    pip = [place / "env/bin/python", "-m", "pip", "install", "--quiet", *wheels]
    subprocess.run(pip, check=True, timeout=600, cwd=place)
    return place / "env/bin"


@pytest.mark.parametrize("host", [0], ids=["root"], indirect=True)
def test_the_demo_from_wheels_needs_neither_rust_nor_the_checkout(host: Any, installed: Path) -> None:
    async def scene() -> None:
        os.environ["PATH"] = "/usr/bin:/bin"
        os.environ.pop("PYTHONPATH", None)
        check(await demo([str(installed / "mantle")]))
        nothing_left()

    host.play(scene, seconds=400)
