"""What the plays on the real cluster act with: kubectl, mantle, and waiting for what is said to come.

Knows how the tools are called, not what they should answer. Nothing here sleeps instead of looking. Whatever a cluster
does, it does later: a play waits for the state it wants (`until`), with a bound that only a broken one reaches.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
TOOL = Path(__file__).resolve().with_name("cluster")
IMAGES = ROOT / "dist" / "images"
EMOJIVOTO = (ROOT / "apps/emojivoto/emojivoto.yml").read_text()
COMPONENTS = ("mantle-identity", "mantle-destination", "mantle-viz", "mantle-injector")
PATIENCE = 180.0
"""Seconds a play waits for what takes some seconds on a quiet machine."""
T = TypeVar("T")


class Failed(AssertionError):
    """A command that had to work did not: what it was, and its own words."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that is up, with the environment that reaches it."""

    environment: dict[str, str]

    def run(
        self, *argv: str, given: str | None = None, timeout: float = PATIENCE, code: int | None = 0, cwd: Path = ROOT
    ) -> str:
        """Standard output of a command; `code` is what it must exit with (None: anything)."""
        options: Any = {"input": given, "capture_output": True, "text": True, "env": self.environment, "cwd": cwd}
        try:
            done = subprocess.run(argv, timeout=timeout, check=False, **options)
        except subprocess.TimeoutExpired as late:
            raise Failed(f"`{' '.join(argv)[:300]}` was not over after {timeout} s:\n{_said(late)}") from None
        if code is not None and done.returncode != code:
            raise Failed(
                f"`{' '.join(argv)[:300]}` exited with {done.returncode}, not {code}:\n"
                f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
        return done.stdout

    def kubectl(self, *argv: str, given: str | None = None, timeout: float = PATIENCE, code: int | None = 0) -> str:
        return self.run("kubectl", *argv, given=given, timeout=timeout, code=code)

    def get(self, *argv: str) -> Any:
        """`kubectl get … -o json`, parsed."""
        return json.loads(self.kubectl("get", *argv, "-o", "json"))

    def mantle(self, *argv: str, given: str | None = None, timeout: float = PATIENCE, code: int | None = 0) -> str:
        return self.run("mantle", *argv, given=given, timeout=timeout, code=code)

    def apply(self, text: str, *argv: str) -> str:
        return self.kubectl("apply", *argv, "-f", "-", given=text)

    def node(self, *argv: str, code: int | None = 0) -> str:
        """A command inside the node: `ctr`, `kill`, `nsenter`."""
        return self.run(str(TOOL), "node", *argv, code=code)

    def watched(self, *argv: str, enough: Callable[[list[str]], Any], seconds: float = PATIENCE) -> list[str]:
        """The lines of a command that runs on, read until there are `enough` of them; then Ctrl-C ends it."""
        options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        lines: list[str] = []
        arriving: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        end = time.monotonic() + seconds
        with subprocess.Popen(argv, env=self.environment, cwd=ROOT, **options) as process:
            assert process.stdout and process.stderr
            errors: list[str] = []
            readers = [
                threading.Thread(target=lambda out=process.stdout: _read(out, arriving.put)),
                threading.Thread(target=lambda out=process.stderr: _read(out, errors.append)),
            ]
            for reader in readers:
                reader.start()
            try:
                while not enough(lines):
                    try:
                        line = arriving.get(timeout=max(0.0, end - time.monotonic()))
                    except queue.Empty:
                        line = None
                    if line is None:
                        why = f"not enough within {seconds:.0f} s" if process.poll() is None else "it ended"
                        last = "\n".join([*lines[-8:], *filter(None, errors[-8:])])
                        raise Failed(f"`{' '.join(argv)}`: {why} after {len(lines)} lines, the last:\n{last}")
                    lines.append(line)
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(30)
                finally:
                    process.kill()
                    for reader in readers:
                        reader.join(30)
        return lines

    def component(self, verb: str, *names: str) -> None:
        """`stop` kills components of Kubernetes and keeps them away; `start` returns when the API server answers."""
        self.run(str(TOOL), verb, *names)

    def rolled_out(self, namespace: str, *deployments: str, seconds: int = 300) -> None:
        """Waits until every deployment (all of the namespace if none is named) runs as it is written: as many pods as
        it wants, all of them ready. The status of a deployment may be older than its pods, so these are looked at, too.
        """
        names = deployments or [item["metadata"]["name"] for item in self.get("deploy", "-n", namespace)["items"]]
        for name in names:
            try:
                argv = ("rollout", "status", "-n", namespace, f"deploy/{name}", f"--timeout={seconds}s")
                self.kubectl(*argv, timeout=seconds + 60)
                until(lambda name=name: self._all_ready(namespace, name), f"pods of {name} are ready")  # type: ignore[misc]
            except AssertionError as failed:
                raise Failed(f"{namespace}/{name} does not run as it is written: {failed}") from None

    def _all_ready(self, namespace: str, deployment: str) -> bool:
        spec = self.get("deploy", deployment, "-n", namespace)["spec"]
        selector = ",".join(f"{key}={value}" for key, value in spec["selector"]["matchLabels"].items())
        items = self.get("pods", "-n", namespace, "-l", selector)["items"]
        states = {pod["metadata"]["name"]: is_ready(pod) for pod in items if is_living(pod)}
        assert list(states.values()) == [True] * spec["replicas"], f"wanted {spec['replicas']} ready, found {states}"
        return True

    def ready(self, namespace: str, pod: str) -> None:
        """Waits until a pod is ready."""
        argv = ("wait", "-n", namespace, f"pod/{pod}", "--for=condition=Ready", f"--timeout={PATIENCE:.0f}s")
        self.kubectl(*argv, timeout=PATIENCE + 60)

    @contextlib.contextmanager
    def namespace(self, name: str, **annotations: str) -> Iterator[None]:
        """A namespace in which pods can be made at once; afterwards it is gone."""
        meta = {"name": name, "annotations": annotations}
        self.apply(json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": meta}))
        try:
            until(lambda: self.kubectl("get", "serviceaccount", "default", "-n", name), "the account of its pods")
            yield
        finally:
            self.deleted("namespace", name)

    def deleted(self, *argv: str) -> None:
        """Deletes objects, if they are there, and waits until they are gone: pods end first, and namespaces slowly."""
        self.kubectl("delete", "--ignore-not-found", "--timeout=300s", *argv, timeout=330)

    def injecting(self) -> None:
        """Waits until the API server asks the injector. That it is ready is known here before it is known there, and
        while it is not asked, pods start without the mesh.
        """
        container = {"name": "a", "image": "a"}
        meta = {"name": "dry", "namespace": "default", "annotations": {"mantle.dev/inject": "enabled"}}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"containers": [container]}}

        def injected() -> bool:
            return "mantle-proxy" in self.apply(json.dumps(pod), "--dry-run=server", "-o", "json")

        until(injected, "the API server asks the injector")

    def explained(self) -> str:
        """What a person would look at first: pods that are not as they should be, with the last lines of the
        containers that are not ready, and the last warnings.
        """
        said = []
        for pod in self.get("pods", "-A")["items"]:
            status, name, namespace = pod["status"], pod["metadata"]["name"], pod["metadata"]["namespace"]
            containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
            restarts = {c["name"]: c["restartCount"] for c in containers if c["restartCount"]}
            ending = "" if is_living(pod) else " ending"
            if (is_ready(pod) and not restarts and not ending) or status["phase"] == "Succeeded":
                continue
            said.append(f"pod {namespace}/{name}: {status['phase']}{ending}, restarts {restarts}")
            for found in containers:
                if not found["ready"] and "terminated" not in found["state"]:
                    said.append(f"  {found['name']}: {json.dumps(found['state'])[:300]}")
                    argv = ("logs", "-n", namespace, name, "-c", found["name"], "--tail=4")
                    said += [f"    {line[:300]}" for line in self.kubectl(*argv, code=None).splitlines()]
        columns = "-o=custom-columns=A:.lastTimestamp,B:.involvedObject.namespace,C:.involvedObject.name,D:.message"
        events = ("get", "events", "-A", "--field-selector=type=Warning", "--sort-by=.lastTimestamp", "--no-headers")
        warnings = self.kubectl(*events, columns, code=None).splitlines()[-8:]
        return "\n".join([*said[:40], *(f"warning {' '.join(line.split())[:240]}" for line in warnings)])

    def pods(self, namespace: str, prefix: str = "") -> list[dict[str, Any]]:
        """Pods that run and are not being deleted, whose name begins with `prefix`."""
        items = self.get("pods", "-n", namespace)["items"]
        return [pod for pod in items if is_living(pod) and pod["metadata"]["name"].startswith(prefix)]

    def pod(self, namespace: str, prefix: str) -> str:
        """The name of one of them, as soon as there is one."""
        found = until(lambda: self.pods(namespace, prefix), f"a pod {prefix}… of {namespace}")
        return str(found[0]["metadata"]["name"])


def is_living(pod: dict[str, Any]) -> bool:
    """Whether a pod is there to stay. One that has ended is listed until its kubelet takes it away."""
    return "deletionTimestamp" not in pod["metadata"]


def is_ready(pod: dict[str, Any]) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))


def _read(lines: Any, put: Callable[[str | None], None]) -> None:
    for line in lines:
        put(line.rstrip("\n"))
    put(None)


def _said(late: subprocess.TimeoutExpired) -> str:
    """What a command had printed when it was ended, its last lines."""
    texts = (text.decode(errors="replace") if isinstance(text, bytes) else text for text in (late.stdout, late.stderr))
    return "\n".join(text[-1000:] for text in texts if text)


def until(look: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """Looks until what is seen is true, and gives it back. The last look's words are in the failure. What is looked
    for in a list or an answer may not be there yet: then it is looked for again.
    """
    end, last = time.monotonic() + seconds, ""
    while True:
        try:
            if seen := look():
                return seen
            last = repr(seen)
        except (AssertionError, LookupError, StopIteration, ValueError) as failed:
            last = f"{type(failed).__name__}: {failed}" if not isinstance(failed, AssertionError) else str(failed)
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds:.0f} s; last seen: {last[-1500:]}")
        time.sleep(0.2)


def meshed(cluster: Cluster, namespace: str) -> None:
    """Every pod that is there to stay has a proxy."""

    def all_meshed() -> bool:
        pods = {pod["metadata"]["name"]: [*_containers(pod)] for pod in cluster.pods(namespace)}
        plain = [name for name, containers in pods.items() if "mantle-proxy" not in containers]
        assert pods and not plain, f"without a proxy: {plain}, of {len(pods)} pods"
        return True

    until(all_meshed, f"every pod of {namespace} has a proxy")


def _containers(pod: dict[str, Any]) -> Iterator[str]:
    """The names of a pod's containers, of all kinds."""
    for kind in ("initContainers", "containers"):
        yield from (container["name"] for container in pod["spec"].get(kind, []))


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
