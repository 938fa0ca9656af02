"""What the control plane's own programs measure, each asked at its admin port: on a cluster through the API server, on
this machine past the pod's proxy. Asks and returns; `diagnostics.py` prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mantle.cli.kube_client import KubeClient, Refused
from mantle.cli.machine_client import MachineClient
from mantle.cli.output import Failure
from mantle.core.annotations import LABEL_COMPONENT

ADMIN_PORTS: Mapping[str, int] = {
    "identity": 9990, "destination": 9996, "viz": 9995, "injector": 9991, "ca": 9992
}  # fmt: skip
"""The port of `/metrics` of each component; its container has the component's name."""
MACHINE_NAMESPACE = "mantle"
SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One container and what it says; `problem` and `fix` if it says nothing."""

    namespace: str
    pod: str
    container: str
    text: str = ""
    problem: str = ""
    fix: str = ""


def of_cluster(client: KubeClient, namespace: str) -> Iterator[Measured]:
    """Every component's pod of the control plane in `namespace`. Raises `Failure` if they cannot be listed."""
    path = f"/api/v1/namespaces/{namespace}/pods"
    for pod in client.get(path, {"labelSelector": LABEL_COMPONENT}).get("items") or ():
        meta = pod["metadata"]
        component = meta["labels"][LABEL_COMPONENT]
        if component not in ADMIN_PORTS or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
            continue
        name = str(meta["name"])
        try:
            text = client.text(f"{path}/{name}:{ADMIN_PORTS[component]}/proxy/metrics")
        except Refused as refused:
            denied = refused.answer.status == 403
            right = f"this needs `get` on pods/proxy in namespace {namespace}"
            yield Measured(
                namespace, name, component, problem=refused.answer.message.strip() or f"status {refused.answer.status}",
                fix=right if denied else f"kubectl -n {namespace} logs {name} -c {component}",
            )  # fmt: skip
        except Failure as failure:
            yield Measured(namespace, name, component, problem=failure.message)
        else:
            yield Measured(namespace, name, component, text)


def of_machine(client: MachineClient) -> Iterator[Measured]:
    """The same of a mesh on this machine. Raises `Failure` if its daemon does not answer."""
    status = client.get("/v1/status")
    for pod in status["pods"]:
        for container in pod["containers"] if pod["namespace"] == MACHINE_NAMESPACE else ():
            if container["name"] in ADMIN_PORTS:
                directory = Path(status["state_dir"]) / "pods" / pod["uid"]
                yield _asked(directory, pod["name"], container["name"])


def _asked(directory: Path, pod: str, component: str) -> Measured:
    from http.client import HTTPConnection, HTTPException

    from mantle.platform.machine.direct import dial
    from mantle.platform.machine.wire import Refused as PodRefused

    try:
        connection = HTTPConnection("localhost")
        connection.sock = dial(directory, ADMIN_PORTS[component])
        connection.sock.settimeout(SECONDS)
        try:
            connection.request("GET", "/metrics", headers={"Connection": "close"})
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
        finally:
            connection.close()
    except (OSError, HTTPException, PodRefused) as error:
        logs = f"mantle logs -n {MACHINE_NAMESPACE} {pod} -c {component}"
        return Measured(MACHINE_NAMESPACE, pod, component, problem=f"it does not answer: {error}", fix=logs)
    problem = "" if answer.status == 200 else f"status {answer.status}"
    return Measured(MACHINE_NAMESPACE, pod, component, "" if problem else text, problem)


def as_json(measured: list[Measured]) -> dict[str, Any]:
    """By `namespace/pod/container`, the text, or what is wrong."""
    return {f"{m.namespace}/{m.pod}/{m.container}": {"error": m.problem} if m.problem else m.text for m in measured}
