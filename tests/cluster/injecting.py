"""The injector as a program on the host, called by a real API server, with the RBAC that `mantle install` gives it."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from free_ports import free_port

from mantle.manifests.config import InstallValues
from mantle.manifests.render import TrustMaterial, install_objects

from .apiserver import ApiServer

NAMESPACE = "mantle"
ROOTS = "-----BEGIN CERTIFICATE-----\nroots\n-----END CERTIFICATE-----\n"


def eventually(wanted: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true answer; fails the test if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (found := wanted()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain, last answer: {found!r}"
        time.sleep(0.05)
    return found


@dataclass
class Replica:
    admin: int
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a family's samples with these labels."""
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in self.get("/metrics")[1].splitlines()
            if line.partition("{")[0].partition(" ")[0] == name
            and all(f'{key}="{value}"' in line for key, value in labels.items())
        )


class Mesh:
    """A control namespace with the injector's objects, and as many injectors as a test starts."""

    def __init__(self, api: ApiServer, logs: Path) -> None:
        self.api, self.logs, self.port = api, logs, free_port()
        self.replicas: list[Replica] = []

    def objects(self) -> list[dict[str, Any]]:
        """What `mantle install` makes, but no pods, which do not run here: the webhook is called by URL."""
        made = install_objects(InstallValues(), TrustMaterial(ROOTS))
        for obj in made:
            for hook in obj.get("webhooks", []):
                hook["clientConfig"] = {"url": f"https://localhost:{self.port}/"}
        return [obj for obj in made if obj["kind"] not in ("Deployment", "Service", "APIService", "Secret")]

    def install(self) -> None:
        self.api.kubectl(
            "apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": self.objects()})
        )

    def uninstall(self) -> None:
        everything = {"apiVersion": "v1", "kind": "List", "items": self.objects()[::-1]}
        self.api.kubectl("delete", "--ignore-not-found", "-f", "-", input=json.dumps(everything))

    def start(self, *args: str, port: int | None = None) -> Replica:
        """One more injector, ready. `port`: other than the one the API server calls."""
        admin, log = free_port(), self.logs / f"injector-{len(self.replicas)}.log"
        kubeconfig = self.api.kubeconfig_of(NAMESPACE, "mantle-injector")
        command = [sys.executable, "-m", "mantle.control_plane", "injector", f"--listen=127.0.0.1:{port or self.port}"]
        command += [f"--admin=127.0.0.1:{admin}", f"--kubeconfig={kubeconfig}", "--dns-name=localhost", "--linger=0s"]
        with log.open("wb") as file:
            process = subprocess.Popen([*command, *args], stdout=file, stderr=file, env=dict(os.environ))
        replica = Replica(admin, process, log)
        self.replicas.append(replica)
        eventually(lambda: replica.get("/ready") == (200, "ready\n"))
        return replica

    def stop(self, replica: Replica) -> None:
        self.replicas.remove(replica)
        replica.process.send_signal(signal.SIGTERM)
        try:
            replica.process.wait(60)
        finally:
            replica.process.kill()
            replica.process.wait(60)

    def in_effect(self, namespace: str) -> None:
        """Waits until the API server asks the injector about pods of this namespace."""
        ask = pod("dry", {"mantle.dev/inject": "enabled"})

        def asked() -> bool:
            made = self.api.kubectl(
                "-n", namespace, "create", "--dry-run=server", "-o", "json", "-f", "-", input=json.dumps(ask)
            )
            return "mantle-proxy" in made

        eventually(asked)

    def namespace(self, *, annotations: dict[str, str] | None = None, labels: dict[str, str] | None = None) -> str:
        name = self.api.new_namespace("inject")
        for verb, pairs in (("annotate", annotations), ("label", labels)):
            for key, value in (pairs or {}).items():
                self.api.kubectl(verb, "namespace", name, f"{key}={value}")
        eventually(lambda: "default" in self.api.kubectl("-n", name, "get", "serviceaccounts", "-o", "name"))
        return name

    def create(self, namespace: str, obj: dict[str, Any]) -> dict[str, Any]:
        """The object as the API server stored it."""
        made = self.api.kubectl("-n", namespace, "create", "-o", "json", "-f", "-", input=json.dumps(obj))
        return dict(json.loads(made))

    def refusal(self, namespace: str, obj: dict[str, Any]) -> str:
        """What `kubectl create` says when it fails. Fails the test if it does not."""
        try:
            self.create(namespace, obj)
        except AssertionError as error:
            return str(error)
        raise AssertionError("it was created")

    def events(self, namespace: str, kind: str, reason: str) -> list[dict[str, Any]]:
        """Events of this reason about objects of this kind."""
        selector = f"--field-selector=involvedObject.kind={kind},reason={reason}"
        return list(json.loads(self.api.kubectl("-n", namespace, "get", "events", selector, "-o", "json"))["items"])


@contextmanager
def installed(api: ApiServer, logs: Path) -> Iterator[Mesh]:
    mesh = Mesh(api, logs)
    try:
        mesh.install()
        yield mesh
    finally:
        for replica in list(mesh.replicas):
            mesh.stop(replica)
        mesh.uninstall()


def pod(name: str, annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    template = {
        "metadata": {"name": name, "annotations": annotations or {}, "labels": {"app": name}},
        "spec": {"containers": [{"name": "app", "image": "acme/web", "ports": [{"containerPort": 8080}]}], **spec},
    }
    return {"apiVersion": "v1", "kind": "Pod", **template}


def deployment(name: str, annotations: dict[str, str] | None = None, replicas: int = 1, **spec: Any) -> dict[str, Any]:
    template = pod(name, annotations, **spec)
    del template["metadata"]["name"]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": template["metadata"], "spec": template["spec"]},
        },
    }
