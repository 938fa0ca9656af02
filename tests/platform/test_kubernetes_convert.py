"""The API's objects as the mesh's values, and snapshots of them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from mantle.core.model import Changes, Key, Namespace, Owner, SliceEndpoint, SlicePort, Snapshot
from mantle.platform.kubernetes import convert
from mantle.platform.kubernetes.assemble import REMEMBERED, Assembly
from mantle.platform.kubernetes.convert import Between, SeenPod
from mantle.platform.kubernetes.reflector import Change


def read(kind: Any, document: dict[str, Any]) -> Any:
    return msgspec.json.decode(json.dumps(document), type=kind)


def pod_document(**changes: Any) -> dict[str, Any]:
    metadata = {"name": "web-1", "namespace": "emojivoto", "uid": "u1"} | changes.pop("metadata", {})
    spec = {"containers": [{"name": "app"}], "serviceAccountName": "web", "nodeName": "n1"} | changes.pop("spec", {})
    status = {"phase": "Running", "podIP": "10.0.0.1"} | changes.pop("status", {})
    assert not changes
    return {"metadata": metadata, "spec": spec, "status": status}


def seen(**changes: Any) -> SeenPod:
    key, made = convert.pod(read(convert.PodObject, pod_document(**changes)))
    assert made is not None
    assert made.pod.key == key
    return made


def proxy_status(**status: Any) -> dict[str, Any]:
    return {"name": "mantle-proxy", "restartCount": 0} | status


@pytest.mark.parametrize("place", ["containerStatuses", "initContainerStatuses"])
@pytest.mark.parametrize(
    ("status", "started"),
    [
        (proxy_status(started=True), True),
        (proxy_status(started=False), False),
        (proxy_status(), False),
        (proxy_status(started=False, restartCount=1), True),
        ({"name": "app", "started": True, "restartCount": 3}, False),
    ],
    ids=["started", "starting", "unknown", "restarting", "another container"],
)
def test_the_proxy_has_started(place: str, status: dict[str, Any], started: bool) -> None:
    assert seen(status={place: [status]}).pod.proxy_started is started


def test_no_statuses_no_proxy() -> None:
    assert seen().pod.proxy_started is False


@pytest.mark.parametrize(
    ("condition", "deleted", "ready"),
    [("True", None, True), ("False", None, False), ("True", "2026-01-01T00:00:00Z", False)],
)
def test_ready_is_what_the_condition_says_until_the_pod_is_told_to_end(
    condition: str, deleted: str | None, ready: bool
) -> None:
    conditions = [{"type": "ContainersReady", "status": "True"}, {"type": "Ready", "status": condition}]
    made = seen(status={"conditions": conditions}, metadata={"deletionTimestamp": deleted})
    assert (made.pod.ready, made.deleting) == (ready, deleted is not None)


def test_both_addresses_of_a_dual_stack_pod() -> None:
    made = seen(status={"podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}).pod
    assert (made.ip, made.more_ips, made.ips) == ("10.0.0.1", ("fd00::1",), ("10.0.0.1", "fd00::1"))


def test_a_pod_without_an_address_yet() -> None:
    document = pod_document(status={"phase": "Pending"})
    del document["status"]["podIP"]
    made = convert.pod(read(convert.PodObject, document))[1]
    assert made is not None
    assert (made.pod.ip, made.pod.ips, made.pod.phase) == ("", (), "Pending")


def test_only_what_decides_something_is_kept() -> None:
    annotations = {
        "kubectl.kubernetes.io/last-applied-configuration": "x" * 10_000,
        "mantle.dev/inject": "enabled",
        "config.mantle.dev/opaque-ports": "9000",
    }
    made = seen(metadata={"annotations": annotations, "managedFields": [{"manager": "kubectl"}]}).pod
    assert dict(made.annotations) == {"mantle.dev/inject": "enabled", "config.mantle.dev/opaque-ports": "9000"}


def test_replicas_share_their_labels() -> None:
    one, two = (seen(metadata={"name": name, "labels": {"app": "web", "h": "1"}}).pod for name in ("web-1", "web-2"))
    assert one.labels is two.labels


def test_ports_and_probes_of_the_application_and_its_sidecars_not_of_the_proxy() -> None:
    probe = {"httpGet": {"path": "/ready", "port": "http"}}
    spec = {
        "initContainers": [
            {"name": "setup", "ports": [{"containerPort": 1}]},
            {"name": "sidecar", "restartPolicy": "Always", "ports": [{"containerPort": 2, "protocol": "UDP"}]},
            {"name": "mantle-proxy", "restartPolicy": "Always", "ports": [{"containerPort": 4143}]},
        ],
        "containers": [
            {
                "name": "app",
                "ports": [{"name": "http", "containerPort": 8080}],
                "readinessProbe": probe,
                "livenessProbe": probe,
                "startupProbe": {"grpc": {"port": 9090}},
            },
            {"name": "other", "livenessProbe": {"httpGet": {"port": 7070}}, "readinessProbe": {"exec": {}}},
        ],
    }
    made = seen(spec=spec).pod
    assert [(p.name, p.port, p.protocol) for p in made.ports] == [("", 2, "UDP"), ("http", 8080, "TCP")]
    assert made.probe_paths == ((9090, "/grpc.health.v1.Health/Check"), (8080, "/ready"), (7070, "/"))


@pytest.mark.parametrize(
    ("references", "owner", "between"),
    [
        ([], Owner("Pod", "web-1"), None),
        ([{"kind": "DaemonSet", "name": "agent", "controller": True}], Owner("DaemonSet", "agent"), None),
        (
            [{"kind": "ReplicaSet", "name": "web-5d", "controller": True}],
            Owner("ReplicaSet", "web-5d"),
            Between("ReplicaSet", "emojivoto", "web-5d"),
        ),
        ([{"kind": "Node", "name": "n1", "controller": True}], Owner("Pod", "web-1"), None),
        ([{"kind": "Deployment", "name": "web", "controller": False}], Owner("Pod", "web-1"), None),
    ],
    ids=["nobody", "DaemonSet", "ReplicaSet", "mirror pod", "no controller"],
)
def test_who_made_a_pod(references: list[Any], owner: Owner, between: Between | None) -> None:
    made = seen(metadata={"ownerReferences": references})
    assert (made.pod.owner, made.between) == (owner, between)


def test_services_of_each_kind() -> None:
    def made(spec: dict[str, Any]) -> Any:
        return convert.service(
            read(convert.ServiceObject, {"metadata": {"name": "s", "namespace": "n"}, "spec": spec})
        )[1]

    ports = [{"name": "h", "port": 80, "targetPort": "http", "appProtocol": "mantle.dev/opaque"}, {"port": 81}]
    plain = made(
        {"clusterIP": "10.1.0.1", "clusterIPs": ["10.1.0.1", "fd00::1"], "ipFamilies": ["IPv4"], "ports": ports}
    )
    assert (plain.cluster_ip, plain.more_cluster_ips, plain.ip_family) == ("10.1.0.1", ("fd00::1",), "IPv4")
    assert [(p.port, p.target_port, p.app_protocol) for p in plain.ports] == [
        (80, "http", "mantle.dev/opaque"),
        (81, 81, ""),
    ]
    headless = made(
        {"clusterIP": "None", "clusterIPs": ["None"], "ipFamilies": ["IPv6"], "publishNotReadyAddresses": True}
    )
    assert (headless.cluster_ip, headless.more_cluster_ips) == ("None", ())
    assert (headless.ip_family, headless.publish_not_ready) == ("IPv6", True)
    away = made({"type": "ExternalName", "externalName": "example.com"})
    assert (away.cluster_ip, away.external_name) == ("", "example.com")


def test_slices() -> None:
    def made(document: dict[str, Any], labels: dict[str, str]) -> Any:
        metadata = {"name": "s-1", "namespace": "n", "labels": labels}
        return convert.endpoint_slice(read(convert.SliceObject, {"metadata": metadata, **document}))[1]

    document = {
        "addressType": "IPv4",
        "ports": [{"name": "h", "port": 8080, "protocol": "TCP"}, {"port": None}],
        "endpoints": [
            {"addresses": ["10.0.0.1"], "conditions": {"ready": True}, "targetRef": {"kind": "Pod", "name": "web-1"}},
            {"addresses": ["10.0.0.2"], "conditions": {"ready": False}},
            {
                "addresses": ["10.0.0.3", "10.0.0.4"],
                "conditions": {"ready": None},
                "targetRef": {"kind": "VM", "name": "v"},
            },
            {"addresses": []},
        ],
    }
    one = made(document, {"kubernetes.io/service-name": "web"})
    assert one.service == Key("n", "web")
    assert one.ports == (SlicePort("h", 8080),)
    assert one.endpoints == (
        SliceEndpoint("10.0.0.1", Key("n", "web-1"), True),
        SliceEndpoint("10.0.0.2", None, False),
        SliceEndpoint("10.0.0.3", None, True),
    )
    assert (
        made({"addressType": "IPv4", "endpoints": None, "ports": None}, {"kubernetes.io/service-name": "web"}).endpoints
        == ()
    )
    assert made(document, {}) is None, "nobody's"


def test_a_service_account_that_is_being_deleted_is_gone() -> None:
    metadata: dict[str, Any] = {"name": "web", "namespace": "n", "uid": "u"}
    assert convert.service_account(read(convert.MetaObject, {"metadata": metadata})) == (Key("n", "web"), "u")
    metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert convert.service_account(read(convert.MetaObject, {"metadata": metadata})) == (Key("n", "web"), None)


# ---- snapshots ----


def owned_pod(name: str, between: Between | None, ready: bool = False) -> Change[Key, SeenPod]:
    references = [{"kind": between.kind, "name": between.name, "controller": True}] if between else []
    conditions = [{"type": "Ready", "status": str(ready)}]
    made = seen(metadata={"name": name, "ownerReferences": references}, status={"conditions": conditions})
    return Change(made.pod.key, None, made)


SET = Between("ReplicaSet", "emojivoto", "web-5d")
DEPLOYMENT = Change(SET, None, Owner("Deployment", "web"))
WEB = Key("emojivoto", "web-1")


@pytest.mark.parametrize("order", ["owner first", "pod first"])
def test_a_pod_is_of_its_deployment_whichever_comes_first(order: str) -> None:
    assembly = Assembly(with_slices=True)
    steps = [lambda: assembly.owners([DEPLOYMENT]), lambda: assembly.pods([owned_pod("web-1", SET)])]
    for step in steps if order == "owner first" else reversed(steps):
        step()
        assembly.snapshot()
    assert assembly.snapshot().pods[WEB].owner == Owner("Deployment", "web")


def test_a_replica_set_that_goes_leaves_its_pods_their_name() -> None:
    assembly = Assembly(with_slices=True)
    assembly.owners([DEPLOYMENT])
    assembly.pods([owned_pod("web-1", SET)])
    before = assembly.snapshot()
    assembly.owners([Change(SET, DEPLOYMENT.now, None)])
    assert assembly.snapshot() is before


def test_a_snapshot_copies_what_changed_and_says_so() -> None:
    assembly = Assembly(with_slices=True)
    assembly.namespaces([Change("emojivoto", None, Namespace("emojivoto"))])
    first = owned_pod("web-1", None)
    assembly.pods([first])
    before = assembly.snapshot()
    assert assembly.snapshot() is before, "nothing new, nothing made"
    again = owned_pod("web-1", None, ready=True)
    assembly.pods([Change(WEB, first.now, again.now)])
    now = assembly.snapshot()
    assert (now.version, now.changes) == (before.version + 1, Changes(before.version, pods=frozenset({WEB})))
    assert now.namespaces is before.namespaces
    assert before.pods[WEB].ready is False, "who holds the older snapshot still sees it"
    assert now.pods[WEB].ready is True


def test_a_reader_that_skipped_some_is_told_all_of_them() -> None:
    assembly = Assembly(with_slices=False)
    start = assembly.snapshot().version
    for number in range(3):
        assembly.pods([owned_pod(f"web-{number}", None)])
        assembly.snapshot()
    told = assembly.since(start).changes
    assert told == Changes(start, pods=frozenset(Key("emojivoto", f"web-{n}") for n in range(3)))
    for number in range(REMEMBERED + 1):
        assembly.namespaces([Change(f"n{number}", None, Namespace(f"n{number}"))])
        assembly.snapshot()
    assert assembly.since(start).changes is None, "too far behind: it looks for itself"
    assert isinstance(assembly.since(start), Snapshot)
