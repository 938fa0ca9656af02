"""A small application on a live mesh: where the mesh's secrets are, and what a killed part costs the application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mantle.platform.machine.places import state_root

# ruff: noqa: ASYNC110
pytestmark = [pytest.mark.root, pytest.mark.mesh, pytest.mark.slow, pytest.mark.timeout(500)]

APP = f"""\
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop}}
spec: {{selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080}}]}}
---
apiVersion: v1
kind: Pod
metadata:
  name: web
  namespace: shop
  labels: {{app: web}}
  annotations: {{config.mantle.dev/proxy-log-level: trace}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{{name: web, image: web, ports: [{{containerPort: 8080}}]}}]
---
apiVersion: v1
kind: Pod
metadata:
  name: client
  namespace: shop
  annotations: {{config.mantle.dev/proxy-log-level: trace}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: client
      image: python
      args:
        - -c
        - |
          import time, urllib.request
          while True:
              try:
                  print("status", urllib.request.urlopen("http://web", timeout=60).status, flush=True)
              except OSError as error:
                  print("failed", error, flush=True)
              time.sleep(0.1)
---
images:
  python: {{command: [{sys.executable}]}}
  web: {{command: [{sys.executable}, -u, -m, http.server, "8080"]}}
"""


@asynccontextmanager
async def application() -> AsyncIterator[Path]:
    """The state directory of a mesh on which the client has been answered."""
    home = state_root().parent / "app"
    home.mkdir()
    objects, _, images = APP.rpartition("---\n")
    (home / "app.yml").write_text(objects)
    (home / "mantle.images.yml").write_text(images)
    await mantle("up", "-d", "--timeout", "300", str(home / "app.yml"))
    await answers(after=0)
    yield state_root() / "m"
    await mantle("down")


async def heard() -> list[str]:
    """What the client says of each of its requests."""
    return (await mantle("logs", "client", "-n", "shop", "-c", "client")).splitlines()


async def answers(after: int) -> None:
    """Waits until the client has been answered once more than `after` requests ago."""
    while "status 200" not in (await heard())[after:]:
        await asyncio.sleep(0.1)


async def mantle(*words: str) -> str:
    pipe = asyncio.subprocess.PIPE
    argv = [sys.executable, "-m", "mantle", "--mesh", "m", *words]
    process = await asyncio.create_subprocess_exec(*argv, stdout=pipe, stderr=pipe, stdin=asyncio.subprocess.DEVNULL)
    out, err = await process.communicate()
    assert process.returncode == 0, f"mantle {' '.join(words)}\n{out.decode()}\n{err.decode()}"
    return out.decode()


def secrets(file: Path) -> set[str]:
    """What of a file must be nowhere else: a private key's lines, a token's signature (the rest tells nothing)."""
    text = file.read_text(errors="replace")
    keys = re.findall(r"-----BEGIN [A-Z ]*PRIVATE KEY-----\n(.*?)-----END", text, re.S)
    tokens = re.findall(r"\beyJ[\w-]+\.[\w-]+\.([\w-]{40,})", text)
    return {line for key in keys for line in key.split() if len(line) >= 40} | set(tokens)


def files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def is_private(file: Path) -> bool:
    """Nobody but its owner can reach it: by its own mode, or by that of a directory above it."""
    return any(path.stat().st_mode & 0o077 == 0 for path in (file, *file.parents))


def file_system(path: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    around = [(len(point), kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(around)[1]


def shown_by_processes() -> Iterator[tuple[str, str]]:
    for process in Path("/proc").iterdir():
        for what in ("cmdline", "environ"):
            if process.name.isdigit() and process.name != "1":
                try:
                    yield f"{what} of {process.name}", (process / what).read_bytes().decode(errors="replace")
                except OSError:  # it has ended
                    continue


def test_keys_and_tokens_are_in_private_files_on_tmpfs_and_in_no_log_argv_or_environment(
    root_host: Any, mantle_proxy: Path
) -> None:
    async def scene() -> None:
        async with application() as state:
            kept = {file: found for file in files(state) if (found := secrets(file))}
            names = {str(file.relative_to(state)) for file in kept}
            assert {"issuer/key.pem", "token-key.pem"} <= names
            assert len([name for name in names if name.endswith("token")]) >= 5, "each pod's own"
            for file in kept:
                assert is_private(file), f"{file} can be read by others"
                assert file_system(file) == "tmpfs", f"{file} is on a disk"
            everything = set().union(*kept.values())
            logs = [file for file in files(state) if file.suffix == ".log"]
            assert any("proxy" in log.name and log.stat().st_size > 10_000 for log in logs), "trace says a lot"
            for log in logs:
                text = log.read_text(errors="replace")
                assert not [secret for secret in everything if secret in text], f"{log} holds a secret"
                assert "PRIVATE KEY" not in text, f"{log} holds a key"
            shown = list(shown_by_processes())
            assert len(shown) > 20
            for where, text in shown:
                assert not [secret for secret in everything if secret in text], f"the {where} holds a secret"

    root_host.play(scene, seconds=400, prepare=lambda: os.environ.update(MANTLE_PROXY_PATH=str(mantle_proxy)))


def pid_of(argument: str, *, environment: str = "") -> int:
    """The one process with this argument, and with this text in its environment."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and environment in (process / "environ").read_bytes().decode():
                argv = (process / "cmdline").read_bytes().decode().split("\0")
                found += [int(process.name)] * (argument in [*argv, (process / "comm").read_text().strip()])
    assert len(found) == 1, (argument, environment, found)
    return found[0]


def test_a_killed_control_plane_costs_no_request_and_a_killed_proxy_no_plaintext(
    root_host: Any, mantle_proxy: Path
) -> None:
    async def restarts(pod: str) -> int:
        pods = json.loads(await mantle("ps", "-o", "json"))["pods"]
        (known,) = [each for each in pods if each["name"].startswith(pod)]
        return int(known["restarts"]) if known["ready"] else -1

    async def back(pod: str) -> None:
        while await restarts(pod) < 1:
            await asyncio.sleep(0.1)

    async def scene() -> None:
        async with application():
            before = len(await heard())
            for part in ("identity", "destination", "viz"):
                os.kill(pid_of(part), signal.SIGKILL)
                await answers(after=len(await heard()))
                await back(f"mantle-{part}")
            assert set((await heard())[before:]) == {"status 200"}, "traffic that is known needs no control plane"

            before = len(await heard())
            os.kill(pid_of("mantle-proxy", environment='"pod":"web"'), signal.SIGKILL)
            await back("web")
            await answers(after=len(await heard()))
            later = (await heard())[before:]
            assert {line.split()[0] for line in later} <= {"status", "failed"}
            # The redirect outlives the proxy: nothing reached the application past it.
            edges = json.loads(await mantle("edges", "po", "-n", "shop", "-o", "json"))
            secured = [edge for edge in edges if edge["src"] == "client" and edge["dst"] == "web"]
            assert secured and all(set(edge["counts"]) == {"secured"} for edge in secured), edges

    root_host.play(scene, seconds=400, prepare=lambda: os.environ.update(MANTLE_PROXY_PATH=str(mantle_proxy)))
