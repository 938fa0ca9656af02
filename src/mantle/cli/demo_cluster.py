"""The demo's stage on a cluster that has Mantle: emojivoto in a namespace of its own, which is deleted at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mantle.cli.demo_play import NAMESPACE, Say
from mantle.cli.kube_client import KubeClient, Refused
from mantle.cli.main import Globals
from mantle.cli.output import Failure, Problem
from mantle.cli.target import Cluster, Views, cluster
from mantle.core import views
from mantle.core.annotations import INJECT

UP_SECONDS, GONE_SECONDS, ASK_AGAIN = 300.0, 180.0, 0.5
COLLECTIONS: Mapping[str, str] = {
    "Namespace": "/api/v1/namespaces",
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "Service": "/api/v1/namespaces/{}/services",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
}
"""Where the kinds of emojivoto's manifest are created."""


def stage_of(flags: Globals) -> ClusterStage:
    """The stage on the cluster that the flags mean. Raises `Failure` if it cannot be played there."""
    found = cluster(flags)
    client = found.client
    _found(client, views.ROOT, "Mantle is not on this cluster, or its views do not answer",
           "install it with `mantle install | kubectl apply -f -`; `mantle check` says what is missing")  # fmt: skip
    try:
        client.get(f"/api/v1/namespaces/{NAMESPACE}")
    except Refused as refused:
        if refused.answer.status != 404:
            raise Failure(f"namespace {NAMESPACE}: {refused.answer.message}") from refused
        return ClusterStage(found)
    raise Failure(
        f"namespace {NAMESPACE} exists already on {found}",
        fix=f"watch what runs there with `mantle tap deploy -n {NAMESPACE}`, or delete it: the demo makes its own",
    )


def _found(client: KubeClient, path: str, message: str, fix: str) -> None:
    try:
        client.get(path)
    except Refused as refused:
        raise Failure(f"{message} ({refused.answer.message})", fix=fix) from refused


def objects() -> list[dict[str, Any]]:
    """emojivoto's objects, its namespace in the mesh."""
    from ruamel.yaml import YAML

    from mantle.cli.demo import bundled

    documents = [dict(document) for document in YAML(typ="safe", pure=True).load_all(bundled().read_text())]
    for document in documents:
        if document["kind"] == "Namespace":
            document["metadata"] = {**document["metadata"], "annotations": {INJECT: "enabled"}}
    return documents


@dataclass(slots=True)
class ClusterStage:
    """emojivoto on a cluster."""

    cluster: Cluster
    begun: bool = field(default=False, init=False)

    @property
    def starting(self) -> str:
        return f"creating namespace {NAMESPACE} on {self.cluster}"

    @property
    def views(self) -> Views:
        return self.cluster.views

    def start(self, say: Say) -> None:
        client = self.cluster.client
        deployments = []
        for document in objects():
            kind, meta = document["kind"], document["metadata"]
            try:
                client.request("POST", COLLECTIONS[kind].format(meta.get("namespace", "")), body=document)
            except Refused as refused:
                raise Failure(
                    f"{kind} {meta['name']} was refused: {refused.answer.message}",
                    fix="`mantle demo` needs the right to create a namespace and workloads in it",
                ) from refused
            self.begun = True
            if kind == "Deployment":
                deployments.append(str(meta["name"]))
        self._wait(deployments, say)

    def _wait(self, names: list[str], say: Say) -> None:
        """Until every deployment is available. Raises `Failure` with what each waits for."""
        deadline, waiting = time.monotonic() + UP_SECONDS, set(names)
        path = COLLECTIONS["Deployment"].format(NAMESPACE)
        while waiting:
            for deployment in self._list(path):
                name = deployment["metadata"]["name"]
                if name in waiting and (deployment.get("status") or {}).get("availableReplicas"):
                    waiting.remove(name)
                    say(f"deployment/{name} ready")
            if waiting and time.monotonic() > deadline:
                raise Failure.of([Problem(why, fix) for why, fix in self._reasons(sorted(waiting))])
            time.sleep(ASK_AGAIN if waiting else 0)

    def _reasons(self, waiting: list[str]) -> Iterator[tuple[str, str]]:
        """What deployments wait for: their pods' containers say it, or nobody made pods."""
        pods = self._list(f"/api/v1/namespaces/{NAMESPACE}/pods")
        for name in waiting:
            states = [
                f"{pod['metadata']['name']}: container {container['name']}: {why['reason']} {why.get('message', '')}"
                for pod in pods
                if pod["metadata"]["name"].startswith(f"{name}-")
                for container in _containers(pod)
                if (why := container.get("state", {}).get("waiting")) and why.get("reason") != "PodInitializing"
            ]
            what = "; ".join(states) or "no pod of it says why"
            fix = f"see `kubectl -n {NAMESPACE} get events`; the cluster must find the images (docs/images.md)"
            yield f"deployment/{name} is not ready after {UP_SECONDS:.0f} s: {what}", fix

    def _list(self, path: str) -> list[dict[str, Any]]:
        try:
            return list(self.cluster.client.get(path)["items"])
        except Refused as refused:
            raise Failure(f"{path}: {refused.answer.message}") from refused

    def page(self) -> tuple[str | None, str]:
        context = self.cluster.client.access.context
        command = f"kubectl --context {context} -n {NAMESPACE} port-forward svc/web-svc 8080:80"
        return None, f"vote at http://127.0.0.1:8080 after `{command}`"

    def end(self) -> None:
        if not self.begun:
            return
        client, path = self.cluster.client, f"/api/v1/namespaces/{NAMESPACE}"
        deadline = time.monotonic() + GONE_SECONDS
        try:
            client.request("DELETE", path)
            while time.monotonic() < deadline:
                client.get(path)
                time.sleep(ASK_AGAIN)
        except Refused as refused:
            if refused.answer.status == 404:
                return
            why = refused.answer.message
        else:
            why = f"it is still there after {GONE_SECONDS:.0f} s"
        raise Failure(f"namespace {NAMESPACE} was not deleted: {why}", fix=f"`kubectl delete namespace {NAMESPACE}`")


def _containers(pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
