"""Objects that do not fit: the others go on, and nothing opens. From the API's JSON to what discovery answers."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from mantle.control.wire import endpoints_bytes, profile_bytes, server_policy_bytes
from mantle.core.callers import CallerDenied, Presented, check_caller
from mantle.core.endpoints import AddressTarget, Profile, ServiceTarget, profile, service_endpoints
from mantle.core.model import Key, Snapshot
from mantle.core.names import BadName, MeshNames
from mantle.core.policy import inbound, outbound
from mantle.core.reasons import CallerRefused, NameRefused
from mantle.core.world import Mesh, World
from mantle.platform.kubernetes import convert, unfit
from mantle.platform.kubernetes.assemble import Assembly
from mantle.platform.kubernetes.reading import DEEPEST, NAMED, PassedOver, Unfit, anything, shallow, sketch_of
from mantle.platform.kubernetes.reflector import Copy

MESH = Mesh(MeshNames("mantle", "cluster.local"))
WEB = Key("emojivoto", "web-1")
IDENTITY = "web.emojivoto.serviceaccount.identity.mantle.cluster.local"
HUGE = {"config.mantle.dev/opaque-ports": "1," * convert.MOST_TEXT}


class Cluster:
    """What destination makes of objects as they come, one kind of reader each, without a server."""

    def __init__(self) -> None:
        self.assembly = Assembly(with_slices=True)
        self.world = World.empty(MESH)
        self._copies: dict[str, Copy[Any, Any]] = {}

    def put(self, kind: str, document: dict[str, Any]) -> str:
        """An object as the API server says it is now. What was wrong with it; empty if nothing was."""
        raw_type, read, instead, into = {
            "pod": (convert.PodObject, convert.pod, unfit.pod, self.assembly.pods),
            "service": (convert.ServiceObject, convert.service, unfit.service, self.assembly.services),
            "slice": (convert.SliceObject, convert.endpoint_slice, unfit.endpoint_slice, self.assembly.slices),
            "namespace": (convert.NamespaceObject, convert.namespace, unfit.namespace, self.assembly.namespaces),
        }[kind]
        copy = self._copies.setdefault(kind, Copy())
        octets, problem = json.dumps(document).encode(), ""
        make: Any = read
        try:
            name, value = make(msgspec.json.decode(octets, type=raw_type))
        except ValueError as error:
            problem = str(error)
            sketch = sketch_of(octets)
            assert sketch is not None
            keep: Any = instead
            name, value = keep(sketch, copy.objects)
        put: Any = into
        put(copy.put(name, value))
        self.world = self.world.next(self.assembly.snapshot())
        return problem

    def address(self, ip: str, port: int = 8080) -> Profile | BadName:
        """What is answered about an address; all of it can be written down."""
        answer = profile(self.world, AddressTarget(ip, port))
        if isinstance(answer, Profile):
            profile_bytes(answer)
        return answer

    def behind(self, service: str, port: int = 80) -> dict[str, str]:
        """Address and identity of what is behind a service."""
        found = service_endpoints(self.world, ServiceTarget(Key("emojivoto", service), port))
        endpoints_bytes(None, found)
        return {f"{ip}:{number}": str(e.tls) for (ip, number), e in found.by_address.items()}


def pod(ip: str = "10.0.0.1", started: bool = True, **metadata: Any) -> dict[str, Any]:
    labels = {"app": "web", "mantle.dev/control-plane-ns": "mantle"}
    proxy = {"name": "mantle-proxy", "started": started, "restartCount": 0}
    return {
        "metadata": {"name": "web-1", "namespace": "emojivoto", "uid": "u1", "labels": labels, **metadata},
        "spec": {"serviceAccountName": "web", "containers": [{"name": "app", "ports": [{"containerPort": 8080}]}]},
        "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "initContainerStatuses": [proxy],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }  # fmt: skip


def broken(document: dict[str, Any]) -> dict[str, Any]:
    """The same pod with a port of a wrong type."""
    copied: dict[str, Any] = json.loads(json.dumps(document))
    copied["spec"]["containers"][0]["ports"] = [{"containerPort": "eighty"}]
    return copied


def service(ip: str = "10.1.0.1", **metadata: Any) -> dict[str, Any]:
    ports = [{"name": "http", "port": 80, "targetPort": 8080}]
    spec = {"clusterIP": ip, "clusterIPs": [ip], "selector": {"app": "web"}, "ports": ports}
    return {"metadata": {"name": "web-svc", "namespace": "emojivoto", **metadata}, "spec": spec}


def slice_of(address: str = "10.0.0.1", port: Any = 8080, pod: str | None = "web-1") -> dict[str, Any]:
    target = {"targetRef": {"kind": "Pod", "name": pod}} if pod else {}
    return {
        "metadata": {
            "name": "web-svc-x", "namespace": "emojivoto", "labels": {"kubernetes.io/service-name": "web-svc"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}],
        "endpoints": [{"addresses": [address], **target}],
    }  # fmt: skip


def running() -> Cluster:
    """Service, slice and pod as they should be."""
    cluster = Cluster()
    for kind, document in (("service", service()), ("slice", slice_of()), ("pod", pod())):
        assert cluster.put(kind, document) == ""
    assert cluster.behind("web-svc") == {"10.0.0.1:8080": IDENTITY}
    return cluster


# ---- pods ----


def test_a_pod_that_becomes_unreadable_keeps_its_identity_and_a_later_good_version_is_taken() -> None:
    cluster = running()
    assert "Expected `int`, got `str`" in cluster.put("pod", broken(pod()))
    assert cluster.behind("web-svc") == {"10.0.0.1:8080": IDENTITY}
    changed = pod(annotations={"config.mantle.dev/opaque-ports": "8080"})
    assert cluster.put("pod", changed) == ""
    answer = cluster.address("10.0.0.1")
    assert isinstance(answer, Profile)
    assert answer.opaque


def test_a_pod_that_was_never_readable_is_neither_plaintext_nor_anybody() -> None:
    cluster = Cluster()
    cluster.put("service", service())
    cluster.put("slice", slice_of())
    assert cluster.put("pod", broken(pod()))
    assert cluster.behind("web-svc") == {}
    answer = cluster.address("10.0.0.1")
    assert isinstance(answer, BadName)
    assert answer.reason is NameRefused.UNREADABLE
    facts = cluster.world.pods[WEB]
    policy = inbound(cluster.world, facts, 8080)
    assert (policy.name, policy.authorizations) == ("deny", ())
    server_policy_bytes(policy)
    asked = check_caller(cluster.world, Presented(IDENTITY, False), WEB, None, False)
    assert isinstance(asked, CallerDenied)
    assert asked.reason is CallerRefused.UNKNOWN_WORKLOAD, "its proxy asks again"
    cluster.put("pod", pod())
    assert cluster.behind("web-svc") == {"10.0.0.1:8080": IDENTITY}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (pod(), broken(pod(uid="u2"))),
        (pod(), broken(pod(ip="10.0.0.2"))),
        (pod(started=False), broken(pod())),
        (pod(started=False, uid="u0"), broken(pod(uid="u0", started=False))),
    ],
    ids=["another pod of the name", "another address", "its proxy started", "its proxy may start"],
)
def test_an_older_version_that_may_be_wrong_now_does_not_count(before: dict[str, Any], now: dict[str, Any]) -> None:
    cluster = running()
    cluster.put("pod", before)
    assert cluster.put("pod", now)
    ip = now["status"]["podIP"]
    assert isinstance(cluster.address(ip), BadName)
    assert cluster.behind("web-svc") == {}
    if ip != "10.0.0.1":
        assert cluster.address("10.0.0.1") == Profile(), "the old address is nobody's"


def test_the_next_version_of_an_unreadable_pod_whose_proxy_has_not_started_is_what_it_says() -> None:
    cluster = Cluster()
    cluster.put("pod", broken(pod()))
    cluster.put("pod", pod(started=False))
    answer = cluster.address("10.0.0.1")
    assert isinstance(answer, Profile)
    assert answer.endpoint is not None
    assert answer.endpoint.tls == "proxy_not_started"


def test_an_unreadable_pod_that_ends_is_not_ready_and_one_that_is_gone_is_gone() -> None:
    sketch = sketch_of(json.dumps(broken(pod(deletionTimestamp="2026-01-01T00:00:00Z"))).encode())
    good = convert.pod(msgspec.json.decode(json.dumps(pod()), type=convert.PodObject))
    assert sketch is not None
    assert good[1] is not None
    _, kept = unfit.pod(sketch, {good[0]: good[1]})
    assert (kept.pod.ready, kept.deleting, kept.pod.proxy_started) == (False, True, True)


def test_an_unreadable_pod_of_the_hosts_network_does_not_close_the_host() -> None:
    cluster = Cluster()
    document = broken(pod(ip="192.168.0.1"))
    document["spec"]["hostNetwork"] = True
    assert cluster.put("pod", document)
    assert cluster.address("192.168.0.1", 6443) == Profile()


def test_an_unreadable_pod_takes_no_address_from_a_good_one() -> None:
    cluster = running()
    cluster.put("pod", broken(pod(name="web-2", uid="u9", ip="")))
    assert cluster.behind("web-svc") == {"10.0.0.1:8080": IDENTITY}
    assert cluster.world.pods[Key("emojivoto", "web-2")].pod.ips == ()


# ---- services, slices, namespaces ----


def test_an_unreadable_service_is_no_stranger() -> None:
    cluster = running()
    assert "characters of annotations" in cluster.put("service", service(annotations=HUGE))
    assert cluster.behind("web-svc") == {"10.0.0.1:8080": IDENTITY}, "its last good version counts"
    assert cluster.put("service", service(ip="10.1.0.9", annotations=HUGE))
    for target in (AddressTarget("10.1.0.9", 80), ServiceTarget(Key("emojivoto", "web-svc"), 80)):
        assert isinstance(profile(cluster.world, target), BadName)
        assert isinstance(outbound(cluster.world, target), BadName)
    assert cluster.behind("web-svc") == {}
    assert cluster.put("service", service(ip="10.1.0.9")) == ""
    assert cluster.behind("web-svc") == {"10.0.0.1:8080": IDENTITY}


@pytest.mark.parametrize("bad", [slice_of(port=-5), slice_of(port=70000), slice_of(address="10.0.0.1.2")])
def test_an_unreadable_slice_leaves_what_was_known(bad: dict[str, Any]) -> None:
    cluster = running()
    assert "wanted" in cluster.put("slice", bad)
    assert cluster.behind("web-svc") == {"10.0.0.1:8080": IDENTITY}
    alone = Cluster()
    alone.put("service", service())
    alone.put("pod", pod())
    alone.put("slice", bad)
    assert alone.behind("web-svc") == {}


def test_a_namespace_that_was_never_readable_opens_nothing() -> None:
    cluster = running()
    cluster.put("namespace", {"metadata": {"name": "emojivoto", "annotations": HUGE}})
    assert inbound(cluster.world, cluster.world.pods[WEB], 8080).authorizations == ()
    cluster.put("namespace", {"metadata": {"name": "emojivoto"}})
    assert inbound(cluster.world, cluster.world.pods[WEB], 8080).name == "all-unauthenticated"
    cluster.put("namespace", {"metadata": {"name": "emojivoto", "annotations": HUGE}})
    assert inbound(cluster.world, cluster.world.pods[WEB], 8080).name == "all-unauthenticated", "the last good version"


@pytest.mark.parametrize(
    ("written", "is_at"),
    [("010.0.0.01", "10.0.0.1"), ("10.0.0.1", "10.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"), ("FD00:0::01", "fd00::1")],
)
def test_an_address_has_one_spelling(written: str, is_at: str) -> None:
    """However it is written: else a meshed pod would be a stranger, reached in plaintext."""
    assert convert.address(written) == is_at


@pytest.mark.parametrize("text", ["garbage", "10.0.0", "10.0.0.256", "fe80::1%eth0", "1.2.3.4/8", "²"])
def test_what_is_no_address_is_unfit(text: str) -> None:
    with pytest.raises(Unfit, match="wanted an IP address"):
        convert.address(text)


def test_a_slice_that_spells_a_meshed_pods_address_its_own_way_gets_its_identity() -> None:
    cluster = running()
    cluster.put("slice", slice_of(address="010.0.0.1", pod=None))
    assert cluster.behind("web-svc") == {"10.0.0.1:8080": IDENTITY}


# ---- wild content that is read ----


@pytest.mark.parametrize(
    "value", ["", "²", "1-", "0", "99999", "\x00\x1b[2J", "[" * 20_000, '[{"name": ["a"]}]', "\ud83d\ude00"]
)
def test_no_setting_of_a_pod_or_namespace_stops_anything(value: str) -> None:
    from mantle.core.annotations import CONFIG

    annotations = {f"config.mantle.dev/{name}": value for name in CONFIG}
    for name, text in annotations.items():
        for kind, document in (
            ("pod", pod(annotations={name: text})),
            ("service", service(annotations={name: text})),
            ("namespace", {"metadata": {"name": "emojivoto", "annotations": {name: text}}}),
        ):
            cluster = running()
            cluster.put(kind, document)
            cluster.address("10.0.0.1")
            cluster.behind("web-svc")
            outbound(cluster.world, AddressTarget("10.1.0.1", 80))
            server_policy_bytes(inbound(cluster.world, cluster.world.pods[WEB], 8080))


def test_a_list_of_ports_for_meshed_clients_that_cannot_be_read_is_deny() -> None:
    cluster = running()
    cluster.put("pod", pod(annotations={"config.mantle.dev/proxy-require-identity-inbound-ports": "8O80"}))
    assert inbound(cluster.world, cluster.world.pods[WEB], 8080).authorizations == ()


@pytest.mark.parametrize(
    ("kind", "name"),
    [("Namespace", "mantle"), ("ServiceAccount", "admin"), ('we{ird"\n', "x"), ("Thing", "x\x1b[2J"), ("", "x")],
)
def test_an_owner_cannot_speak_for_the_pod(kind: str, name: str) -> None:
    cluster = running()
    cluster.put("pod", pod(ownerReferences=[{"kind": kind, "name": name, "controller": True}]))
    answer = cluster.address("10.0.0.1")
    assert isinstance(answer, Profile)
    assert answer.endpoint is not None
    labels = dict(answer.endpoint.labels)
    assert (labels["namespace"], labels["pod"], labels["serviceaccount"]) == ("emojivoto", "web-1", "web")
    assert set(labels) == {"namespace", "pod", "serviceaccount", "control_plane_ns"}


# ---- reading ----


def nested(levels: int) -> str:
    return '{"f:a":' * levels + "{}" + "}" * levels


@pytest.mark.parametrize("levels", [10, 500, 9000])
def test_nesting_does_not_matter(levels: int) -> None:
    text = json.dumps(pod()).replace('"uid"', f'"managedFields": [{{"fieldsV1": {nested(levels)}}}], "uid"')
    page = f'{{"items": [{text}, {text}]}}'
    for item in anything(page.encode())["items"]:
        assert item["metadata"]["uid"] == "u1"
        assert item["status"]["podIP"] == "10.0.0.1"


@pytest.mark.parametrize(
    "text", ['{"a": "]}\\"[{"}', '[1, [2, {}], "\\\\"]', '"{"', "{}", "null", '{"a": [{"b": "\\u005b"}]}']
)
def test_shallow_json_stays_as_it_is(text: str) -> None:
    assert shallow(text.encode()) == text.encode()


def test_deep_json_loses_what_is_deep_and_nothing_else() -> None:
    inner: Any = "deep"
    for _ in range(DEEPEST + 10):
        inner = {"a": inner, "b": ['}]"', 1]}
    found = json.loads(shallow(json.dumps([inner, "last"]).encode()))
    depth, at = 0, found[0]
    while isinstance(at, dict):
        assert at["b"] == ['}]"', 1] or at["b"] is None
        depth, at = depth + 1, at["a"]
    assert (depth, at, found[1]) == (DEEPEST - 1, None, "last")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"metadata": 5}', '{"metadata": {"name": 5}}', '{"metadata": {}}']
)
def test_what_has_no_name_is_no_object(text: str) -> None:
    assert sketch_of(text.encode()) is None


def test_a_sketch_survives_any_type_anywhere() -> None:
    for value in (None, 5, "x", [], {}, [5], ["x"], [{}], [{"ip": 5}], True):
        document = {"metadata": {"name": "a", "namespace": value, "uid": value}, "spec": value, "status": value}
        fields = {"clusterIP": value, "clusterIPs": value, "podIP": value, "podIPs": value, "phase": value}
        for text in (document, document | {"spec": fields, "status": fields}):
            sketch = sketch_of(json.dumps(text).encode())
            assert sketch is not None
            world = World.empty(MESH).next(
                Snapshot(
                    1,
                    {Key("", "a"): replace(unfit.pod(sketch, {})[1].pod, key=Key("n", "a"))},
                    {Key("", "a"): unfit.service(sketch, {})[1]},
                )
            )
            assert len(world.pods) == 1
            unfit.endpoint_slice(sketch, {})
            unfit.namespace(sketch, {})
            unfit.between("Job")(sketch, {})
            assert unfit.service_account(sketch, {})[1] is None


def test_each_is_named_once_and_not_too_many(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    passed: PassedOver[str] = PassedOver("/api/v1/pods")
    for _ in range(3):
        passed.put("a", "n/a", "a port of a wrong type")
    passed.fits("a")
    passed.put("a", "n/a", "again")
    assert (passed.total, len(caplog.records)) == (2, 1)
    assert "n/a cannot be read and is passed over (a port of a wrong type)" in caplog.text
    for number in range(2 * NAMED):
        passed.put(f"b{number}", f"n/b{number}", "x")
    assert (passed.total, len(caplog.records), len(passed.now)) == (2 + 2 * NAMED, NAMED, 1 + 2 * NAMED)
    assert "further ones are only counted" in caplog.records[-1].getMessage()
    passed.only({"b1", "b2"})
    assert set(passed.now) == {"b1", "b2"}
