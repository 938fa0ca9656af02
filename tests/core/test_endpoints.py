"""Where a destination leads, decided from snapshots: tables of pods, services and what clients are told."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from discovery_play import IDENTITY, MESH, pod, service, snapshot

from mantle.core.endpoints import (
    Add,
    AddressTarget,
    BadTarget,
    Endpoint,
    Endpoints,
    Hint,
    Nothing,
    Profile,
    Remove,
    ServiceTarget,
    full,
    parse_path,
    profile,
    service_endpoints,
    step,
)
from mantle.core.model import ContainerPort, Key, Namespace, Owner, ServicePort
from mantle.core.names import BadName
from mantle.core.reasons import NoIdentity, NotADestination
from mantle.core.world import World

WEB = Key("emojivoto", "web-svc")


def world(*objects: object) -> World:
    return World.empty(MESH).next(snapshot(1, *objects))  # type: ignore[arg-type]


def endpoints(*objects: object, port: int = 80) -> Endpoints:
    return service_endpoints(world(*objects), ServiceTarget(WEB, port))


def the_endpoint(*objects: object, port: int = 80) -> Endpoint:
    (endpoint,) = endpoints(*objects, port=port).by_address.values()
    return endpoint


# ---- paths ----


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("web-svc.emojivoto.svc.cluster.local:80", ServiceTarget(WEB, 80)),
        ("web-svc.emojivoto.svc.cluster.local.:80", ServiceTarget(WEB, 80)),
        ("WEB-svc.Emojivoto.svc.cluster.local:65535", ServiceTarget(WEB, 65535)),
        ("10.203.0.5:8080", AddressTarget("10.203.0.5", 8080)),
        ("[fd00::5]:8080", AddressTarget("fd00::5", 8080)),
    ],
)
def test_paths_that_can_be_asked_for(path: str, target: object) -> None:
    assert parse_path(path, "cluster.local") == target


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", NotADestination.MALFORMED),
        ("web-svc.emojivoto.svc.cluster.local", NotADestination.MALFORMED),
        ("web-svc.emojivoto.svc.cluster.local:", NotADestination.MALFORMED),
        ("web-svc.emojivoto.svc.cluster.local:0", NotADestination.MALFORMED),
        ("web-svc.emojivoto.svc.cluster.local:65536", NotADestination.MALFORMED),
        ("web-svc.emojivoto.svc.cluster.local:८०", NotADestination.MALFORMED),
        (":80", NotADestination.MALFORMED),
        ("example.com:443", NotADestination.NOT_A_SERVICE_NAME),
        ("web-svc.emojivoto:80", NotADestination.NOT_A_SERVICE_NAME),
        ("svc.cluster.local:80", NotADestination.NOT_A_SERVICE_NAME),
        ("a.b.c.svc.cluster.local:80", NotADestination.NOT_A_SERVICE_NAME),
        ("we_b.emojivoto.svc.cluster.local:80", NotADestination.NOT_A_SERVICE_NAME),
        ("web-svc.emojivoto.svc.other.local:80", NotADestination.NOT_A_SERVICE_NAME),
    ],
)
def test_paths_that_cannot(path: str, reason: NotADestination) -> None:
    refused = parse_path(path, "cluster.local")
    assert isinstance(refused, BadTarget) and refused.reason is reason


# ---- which pods, which port ----


def test_ready_pods_of_the_selector_in_the_order_of_their_addresses() -> None:
    found = endpoints(
        service("web-svc", "10.203.128.1"),
        pod("web-2", "10.203.0.6"),
        pod("web-1", "10.203.0.5"),
        pod("web-3", "10.203.0.7", ready=False),
        pod("web-4", "10.203.0.8", phase="Succeeded"),
        pod("web-5", ""),
        pod("emoji-1", "10.203.0.9"),
        pod("web-6", "10.203.0.10", namespace="other"),
        pod("web-7", "10.203.0.11", labels={"app": "web2"}),
    )
    assert found.exists
    assert list(found.by_address) == [("10.203.0.5", 8080), ("10.203.0.6", 8080)]
    assert found.labels == (("namespace", "emojivoto"), ("service", "web-svc"))


def test_publish_not_ready_takes_pods_that_are_not_ready() -> None:
    found = endpoints(service("web-svc", "10.203.128.1", publish_not_ready=True), pod("web-1", "10.0.0.1", ready=False))
    assert list(found.by_address) == [("10.0.0.1", 8080)]


def test_a_named_target_port_is_each_pods_own() -> None:
    found = endpoints(
        service("web-svc", "10.203.128.1"),
        pod("web-1", "10.0.0.1", ports=(ContainerPort("http", 8080),)),
        pod("web-2", "10.0.0.2", ports=(ContainerPort("other", 1), ContainerPort("http", 9090))),
        pod("web-3", "10.0.0.3", ports=(ContainerPort("other", 1),)),
        pod("web-4", "10.0.0.4", ports=(ContainerPort("http", 53, "UDP"),)),
    )
    assert list(found.by_address) == [("10.0.0.1", 8080), ("10.0.0.2", 9090)]


def test_a_numbered_target_port_need_not_be_declared() -> None:
    svc = service("web-svc", "10.203.128.1", ServicePort("http", 80, 3000))
    assert list(endpoints(svc, pod("web-1", "10.0.0.1")).by_address) == [("10.0.0.1", 3000)]


@pytest.mark.parametrize(
    ("objects", "port", "exists"),
    [
        ((), 80, False),
        ((service("web-svc", "10.203.128.1"),), 80, True),
        ((service("web-svc", "10.203.128.1"),), 81, False),
        ((service("web-svc", "10.203.128.1", ServicePort("dns", 80, 53, "UDP")),), 80, False),
        ((service("web-svc", "None"), pod("emoji-1", "10.0.0.1")), 80, True),
        ((service("web-svc", "10.203.128.1", selector={}), pod("web-1", "10.0.0.1")), 80, True),
    ],
)
def test_nothing_there_and_no_such_thing_are_different(objects: tuple[object, ...], port: int, exists: bool) -> None:
    found = endpoints(*objects, port=port)
    assert (found.exists, dict(found.by_address)) == (exists, {})
    assert full(found) == (Nothing(exists),)


# ---- identities ----

SERVICE = service("web-svc", "10.203.128.1", ServicePort("http", 80, 8080))


def test_a_meshed_endpoint_carries_its_identity_and_where_its_proxy_listens() -> None:
    endpoint = the_endpoint(SERVICE, pod("web-1", "10.0.0.1", service_account="web.v2"))
    assert endpoint.tls == "web.v2.emojivoto.serviceaccount.identity.mantle.cluster.local"
    assert (endpoint.opaque_transport, endpoint.hint) == (4143, Hint.H2)
    assert dict(endpoint.labels) == {
        "namespace": "emojivoto",
        "pod": "web-1",
        "serviceaccount": "web.v2",
        "deployment": "web",
        "control_plane_ns": "mantle",
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"meshed": False}, NoIdentity.NOT_MESHED),
        ({"labels": {"mantle.dev/control-plane-ns": "linkerd"}}, NoIdentity.OTHER_CONTROL_PLANE),
        ({"proxy_started": False}, NoIdentity.PROXY_NOT_STARTED),
        ({"host_network": True}, NoIdentity.HOST_NETWORK),
        ({"annotations": {"config.mantle.dev/skip-inbound-ports": "25,8000-8090"}}, NoIdentity.PORT_SKIPPED),
    ],
)
def test_without_a_proxy_of_this_mesh_there_is_no_identity_and_no_hint(changes: dict, reason: NoIdentity) -> None:  # type: ignore[type-arg]
    endpoint = the_endpoint(SERVICE, pod("web-1", "10.0.0.1", **changes))
    assert endpoint.tls is reason
    assert (endpoint.opaque_transport, endpoint.hint) == (None, Hint.NONE)
    assert "control_plane_ns" not in dict(endpoint.labels)


def test_a_namespaces_skipped_ports_count_where_the_pod_says_nothing() -> None:
    strict = Namespace("emojivoto", annotations={"config.mantle.dev/skip-inbound-ports": "8080"})
    assert the_endpoint(SERVICE, strict, pod("web-1", "10.0.0.1")).tls is NoIdentity.PORT_SKIPPED
    own = {"config.mantle.dev/skip-inbound-ports": "1"}
    assert the_endpoint(SERVICE, strict, pod("web-1", "10.0.0.1", annotations=own)).tls == IDENTITY.format(
        "web", "emojivoto"
    )


def test_an_identity_that_cannot_be_written_is_no_endpoint_rather_than_plaintext() -> None:
    unwritable = pod("web-1", "10.0.0.1", service_account=".".join(["a" * 60] * 4))
    assert endpoints(SERVICE, unwritable).by_address == {}
    assert isinstance(profile(world(unwritable), AddressTarget("10.0.0.1", 8080)), BadName)


@pytest.mark.parametrize("port", [4190, 4191])
def test_the_proxys_own_ports_are_reached_on_themselves(port: int) -> None:
    found = profile(world(pod("web-1", "10.0.0.1")), AddressTarget("10.0.0.1", port))
    assert isinstance(found, Profile) and found.endpoint is not None
    assert found.endpoint.tls == IDENTITY.format("web", "emojivoto")
    assert (found.endpoint.opaque_transport, found.endpoint.hint) == (None, Hint.NONE)


def test_moved_proxy_ports_move_the_answer() -> None:
    moved = {"config.mantle.dev/inbound-port": "5143", "config.mantle.dev/admin-port": "5191"}
    facts = pod("web-1", "10.0.0.1", annotations=moved)
    assert the_endpoint(SERVICE, facts).opaque_transport == 5143
    admin = profile(world(facts), AddressTarget("10.0.0.1", 5191))
    assert isinstance(admin, Profile) and admin.endpoint is not None and admin.endpoint.opaque_transport is None


def test_transparent_transport_leads_to_the_applications_own_port() -> None:
    asked = {"config.mantle.dev/transport-mode": "transparent", "config.mantle.dev/opaque-ports": "3306"}
    facts = pod("web-1", "10.0.0.1", annotations=asked)
    usual = the_endpoint(SERVICE, pod("web-1", "10.0.0.1"))
    endpoint = the_endpoint(SERVICE, facts)
    assert (endpoint.tls, endpoint.address) == (usual.tls, usual.address)
    assert (endpoint.opaque_transport, endpoint.hint) == (None, Hint.NONE)
    opaque = profile(world(facts), AddressTarget("10.0.0.1", 3306))
    assert isinstance(opaque, Profile) and opaque.endpoint is not None
    assert (opaque.endpoint.opaque_transport, opaque.endpoint.hint) == (None, Hint.OPAQUE)


def test_a_proxy_that_restarts_does_not_turn_its_clients_to_plaintext() -> None:
    running = pod("web-1", "10.0.0.1")
    first = World.empty(MESH).next(snapshot(1, SERVICE, running))
    restarting = first.next(snapshot(2, SERVICE, replace(running, proxy_started=False)))
    (endpoint,) = service_endpoints(restarting, ServiceTarget(WEB, 80)).by_address.values()
    assert endpoint.tls == IDENTITY.format("web", "emojivoto")
    another = restarting.next(snapshot(3, SERVICE, replace(running, uid="another", proxy_started=False)))
    (endpoint,) = service_endpoints(another, ServiceTarget(WEB, 80)).by_address.values()
    assert endpoint.tls is NoIdentity.PROXY_NOT_STARTED
    unlabelled = first.next(snapshot(2, SERVICE, replace(running, labels={"app": "web"})))
    (endpoint,) = service_endpoints(unlabelled, ServiceTarget(WEB, 80)).by_address.values()
    assert endpoint.tls is NoIdentity.NOT_MESHED


# ---- opaque ports ----

OPAQUE = "config.mantle.dev/opaque-ports"


@pytest.mark.parametrize(
    ("pod_says", "namespace_says", "port", "hint"),
    [
        (None, None, 8080, Hint.H2),
        (None, None, 3306, Hint.OPAQUE),
        ("8080", None, 8080, Hint.OPAQUE),
        ("8080", None, 3306, Hint.H2),
        ("", None, 3306, Hint.H2),
        ("http", None, 8080, Hint.OPAQUE),
        ("7000-9000", None, 8080, Hint.OPAQUE),
        (None, "8080", 8080, Hint.OPAQUE),
        ("1", "8080", 8080, Hint.H2),
    ],
)
def test_a_pods_opaque_ports(pod_says: str | None, namespace_says: str | None, port: int, hint: Hint) -> None:
    def said(text: str | None) -> dict[str, str]:
        return {} if text is None else {OPAQUE: text}

    endpoint = the_endpoint(
        service("web-svc", "10.203.128.1", ServicePort("p", 80, port)),
        Namespace("emojivoto", annotations=said(namespace_says)),
        pod("web-1", "10.0.0.1", annotations=said(pod_says)),
    )
    assert endpoint.hint is hint
    assert endpoint.opaque_transport == 4143, "opaque is not unencrypted"


@pytest.mark.parametrize(
    ("changes", "namespace_says", "opaque"),
    [
        ({}, None, False),
        ({"annotations": {OPAQUE: "80"}}, None, True),
        ({}, "80", True),
        ({"annotations": {OPAQUE: "81"}}, "80", False),
        ({"ports": (ServicePort("p", 80, 8080, app_protocol="mantle.dev/opaque"),)}, None, True),
        ({"ports": (ServicePort("p", 80, 8080, app_protocol="http"),)}, "80", False),
    ],
)
def test_a_services_opaque_ports(changes: dict, namespace_says: str | None, opaque: bool) -> None:  # type: ignore[type-arg]
    namespace = Namespace("emojivoto", annotations={} if namespace_says is None else {OPAQUE: namespace_says})
    found = profile(world(service("web-svc", "10.203.128.1", **changes), namespace), AddressTarget("10.203.128.1", 80))
    assert isinstance(found, Profile)
    assert (found.name, found.opaque) == ("web-svc.emojivoto.svc.cluster.local", opaque)


@pytest.mark.parametrize("copied", ["80", "3306"])
@pytest.mark.parametrize("namespace_says", [None, "80", "443"])
def test_a_copy_of_the_namespaces_opaque_ports_changes_no_answer(copied: str, namespace_says: str | None) -> None:
    """Whether the injector was there when the service was made, and what the namespace has said since."""
    annotations = {OPAQUE: namespace_says} if namespace_says else {}
    shop = Namespace("emojivoto", annotations=annotations)
    marked = {OPAQUE: copied, "mantle.dev/inherited-opaque-ports": copied}
    plain, with_copy = (
        profile(world(service("web-svc", "10.1.0.1", annotations=on_it), shop), ServiceTarget(WEB, 80))
        for on_it in ({}, marked)
    )
    assert plain == with_copy
    corrected = service("web-svc", "10.1.0.1", annotations=marked | {OPAQUE: "80"})
    found = profile(world(corrected, shop), ServiceTarget(WEB, 80))
    assert isinstance(found, Profile)
    assert found.opaque is (copied != "80" or namespace_says == "80"), "what somebody wrote over the copy counts"


# ---- profiles ----


def test_addresses_mean_a_service_a_pod_or_nothing() -> None:
    here = world(SERVICE, pod("web-1", "10.0.0.1"), pod("host-1", "192.168.0.1", host_network=True))
    by_ip = profile(here, AddressTarget("10.203.128.1", 80))
    assert by_ip == profile(here, ServiceTarget(WEB, 80))
    assert isinstance(by_ip, Profile) and (by_ip.service, by_ip.port, by_ip.endpoint) == (WEB, 80, None)
    one = profile(here, AddressTarget("10.0.0.1", 9999))
    assert isinstance(one, Profile) and one.endpoint is not None
    assert (one.name, one.endpoint.address) == ("", ("10.0.0.1", 9999))
    for stranger in (
        AddressTarget("10.203.128.1", 81),
        AddressTarget("93.184.216.34", 443),
        AddressTarget("192.168.0.1", 22),
        ServiceTarget(Key("emojivoto", "unknown"), 80),
    ):
        assert profile(here, stranger) == Profile()


def test_a_pod_of_its_own_has_no_workload_label() -> None:
    alone = pod("web-1", "10.0.0.1", owner=Owner("Pod", "web-1"))
    assert "deployment" not in dict(the_endpoint(SERVICE, alone).labels)
    assert [key for key, _ in the_endpoint(SERVICE, alone).labels].count("pod") == 1


# ---- steps ----


def apply(have: dict, steps: tuple) -> dict:  # type: ignore[type-arg]
    """What linkerd2-proxy makes of messages: the first add resets, later ones change."""
    for part in steps:
        match part:
            case Add(added, _):
                have = have | {endpoint.address: endpoint for endpoint in added}
            case Remove(gone):
                have = {address: endpoint for address, endpoint in have.items() if address not in gone}
            case Nothing():
                have = {}
    return have


def test_any_sequence_of_sets_arrives_whole_though_readers_skip_some() -> None:
    chance = random.Random(4143)
    pods = [pod(f"web-{n}", f"10.0.0.{n}") for n in range(6)]
    for _ in range(200):
        states = []
        for _ in range(5):
            chosen = [replace(p, ready=chance.random() < 0.6, proxy_started=chance.random() < 0.7) for p in pods]
            states.append(endpoints(SERVICE, *chosen) if chance.random() < 0.8 else endpoints())
        have = apply({}, full(states[0]))
        seen = states[0]
        for state in states[1:]:
            if chance.random() < 0.4:
                continue
            have = apply(have, step(seen, state))
            seen = state
            assert have == dict(state.by_address)


def test_a_set_in_use_is_never_empty_between() -> None:
    before = endpoints(SERVICE, pod("web-1", "10.0.0.1"))
    now = endpoints(SERVICE, pod("web-2", "10.0.0.2"))
    first, second = step(before, now)
    assert isinstance(first, Add) and isinstance(second, Remove)
    assert second.addresses == (("10.0.0.1", 8080),)


def test_only_what_changed_is_sent() -> None:
    one, two = pod("web-1", "10.0.0.1"), pod("web-2", "10.0.0.2")
    before = endpoints(SERVICE, one, two)
    assert step(before, endpoints(SERVICE, one, two)) == ()
    (only,) = step(before, endpoints(SERVICE, one, replace(two, proxy_started=False)))
    assert isinstance(only, Add) and [e.address for e in only.endpoints] == [("10.0.0.2", 8080)]
    assert step(before, endpoints(SERVICE)) == (Nothing(True),)
    assert step(endpoints(SERVICE), endpoints()) == (Nothing(False),)
    assert step(endpoints(), endpoints()) == ()


# ---- worlds ----


def test_facts_of_unchanged_pods_are_kept() -> None:
    one, two = pod("web-1", "10.0.0.1"), pod("web-2", "10.0.0.2")
    first = World.empty(MESH).next(snapshot(1, one, two))
    second = first.next(replace(first.snapshot, version=2, pods={one.key: one, two.key: replace(two, ready=False)}))
    assert second.pods[one.key] is first.pods[one.key]
    assert second.pods[two.key].pod.ready is False


def test_a_changed_namespace_is_read_again() -> None:
    one = pod("web-1", "10.0.0.1")
    first = World.empty(MESH).next(snapshot(1, one))
    second = first.next(
        snapshot(2, one, Namespace("emojivoto", annotations={"config.mantle.dev/default-inbound-policy": "deny"}))
    )
    assert (first.pods[one.key].policy, second.pods[one.key].policy) == ("all-unauthenticated", "deny")
