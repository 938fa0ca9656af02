"""What the plays on the real cluster act with: kubectl, mantle, and waiting for what is said to come.

Knows how the tools are called, not what they should answer. Nothing here sleeps instead of looking.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
TOOL = Path(__file__).resolve().with_name("cluster")
IMAGES = ROOT / "dist" / "images"
EMOJIVOTO = (ROOT / "apps/emojivoto/emojivoto.yml").read_text()
COMPONENTS = ("mantle-identity", "mantle-destination", "mantle-viz", "mantle-injector")
T = TypeVar("T")


class Failed(AssertionError):
    """A command that had to work did not: what it was, and its own words."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that is up, with the environment that reaches it."""

    environment: dict[str, str]

    def run(self, *argv: str, given: str | None = None, timeout: float = 120, code: int | None = 0) -> str:
        """Standard output of a command; `code` is what it must exit with (None: anything)."""
        done = subprocess.run(
            argv, input=given, capture_output=True, text=True, timeout=timeout, env=self.environment, cwd=ROOT
        )
        if code is not None and done.returncode != code:
            raise Failed(
                f"`{' '.join(argv)[:300]}` exited with {done.returncode}, not {code}:\n"
                f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
        return done.stdout

    def kubectl(self, *argv: str, given: str | None = None, timeout: float = 120, code: int | None = 0) -> str:
        return self.run("kubectl", *argv, given=given, timeout=timeout, code=code)

    def get(self, *argv: str) -> Any:
        """`kubectl get … -o json`, parsed."""
        return json.loads(self.kubectl("get", *argv, "-o", "json"))

    def mantle(self, *argv: str, given: str | None = None, timeout: float = 120, code: int | None = 0) -> str:
        return self.run("mantle", *argv, given=given, timeout=timeout, code=code)

    def apply(self, text: str, *argv: str) -> str:
        return self.kubectl("apply", *argv, "-f", "-", given=text)

    def node(self, *argv: str, code: int | None = 0) -> str:
        """A command inside the node: `ctr`, `kill`, `nsenter`."""
        return self.run(str(TOOL), "node", *argv, code=code)

    def rolled_out(self, namespace: str, *deployments: str, seconds: int = 120) -> None:
        """Waits until every deployment (all of the namespace if none is named) runs as it is written."""
        names = deployments or [item["metadata"]["name"] for item in self.get("deploy", "-n", namespace)["items"]]
        for name in names:
            try:
                self.kubectl("rollout", "status", "-n", namespace, f"deploy/{name}", f"--timeout={seconds}s")
            except Failed as failed:
                raise Failed(f"{failed}\n{self.explained(namespace)}") from None

    def explained(self, namespace: str) -> str:
        """What a person would look at next: pods, events, and the last lines of containers that are not ready."""
        said = [self.kubectl("get", "pods", "-n", namespace, "-o", "wide", code=None)]
        said += self.kubectl("get", "events", "-n", namespace, code=None).splitlines()[-12:]
        for pod in self.get("pods", "-n", namespace)["items"]:
            status, name = pod["status"], pod["metadata"]["name"]
            for found in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
                if not found["ready"]:
                    said.append(f"--- {name} {found['name']}: {json.dumps(found['state'])[:300]}")
                    said.append(self.kubectl("logs", "-n", namespace, name, "-c", found["name"], "--tail=8", code=None))
        return "\n".join(said)

    def pods(self, namespace: str, prefix: str = "") -> list[dict[str, Any]]:
        """Pods that run and are not being deleted, whose name begins with `prefix`."""
        items = self.get("pods", "-n", namespace)["items"]
        living = (pod for pod in items if "deletionTimestamp" not in pod["metadata"])
        return [pod for pod in living if pod["metadata"]["name"].startswith(prefix)]


def until(look: Callable[[], T], what: str, seconds: float = 60) -> T:
    """Looks until what is seen is true, and gives it back. The last look's words are in the failure."""
    end, last = time.monotonic() + seconds, ""
    while True:
        try:
            if seen := look():
                return seen
            last = repr(seen)
        except AssertionError as failed:
            last = str(failed)
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds} s; last seen: {last}")
        time.sleep(0.2)


def meshed(cluster: Cluster, namespace: str) -> None:
    """Every pod that is there to stay has a proxy."""

    def all_meshed() -> bool:
        pods = cluster.pods(namespace)
        with_proxy = [
            pod
            for pod in pods
            if any(c["name"] == "mantle-proxy" for c in [*pod["spec"]["containers"], *pod["spec"]["initContainers"]])
        ]
        return bool(pods) and len(with_proxy) == len(pods)

    until(all_meshed, f"every pod of {namespace} has a proxy")


def environment(programs: Path) -> dict[str, str]:
    """The environment that `cluster env` describes, and ours without proxies of the network.

    `programs` gets a `mantle` that always means this cluster: a mesh that happens to run on this machine is not asked.
    """
    mantle = programs / "mantle"
    mantle.write_text(f'#!/bin/sh\nexec {sys.executable} -m mantle --context mantle-e2e "$@"\n')
    mantle.chmod(0o755)
    shell = subprocess.run(
        ["bash", "-c", f'eval "$({TOOL} env)" && env -0'], check=True, capture_output=True, text=True
    ).stdout
    pairs = (item.partition("=") for item in shell.split("\0") if item)
    unwanted = ("_", "SHLVL", "PWD", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    found = {name: value for name, _, value in pairs if name not in unwanted}
    return found | {"PATH": f"{programs}:{found['PATH']}"}


def load_images(names: Sequence[str], profile: str) -> None:
    """Builds the images and gives them to the node's runtime."""
    subprocess.run(
        [sys.executable, ROOT / "images/build.py", "--profile", profile, "--only", *names], check=True, timeout=1500
    )
    subprocess.run([TOOL, "load-image", *sorted(map(str, IMAGES.glob("*.tar")))], check=True, timeout=300)


def keep() -> bool:
    return bool(os.environ.get("MANTLE_E2E_KEEP"))
