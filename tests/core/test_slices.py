"""Endpoints of a cluster: what slices list, and who may be called by a pod's name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from discovery_play import IDENTITY, MESH, pod, service, snapshot

from mantle.core.endpoints import (
    KEPT_ENDPOINTS,
    AddressTarget,
    Endpoints,
    Hint,
    ServiceTarget,
    profile,
    service_endpoints,
)
from mantle.core.model import EndpointSlice, Key, ServicePort, SliceEndpoint, SlicePort
from mantle.core.policy import NotOurs, outbound
from mantle.core.reasons import NoIdentity
from mantle.core.world import World

WEB = Key("emojivoto", "web-svc")
POD = pod("web-1", "10.0.0.1")
LISTED = SliceEndpoint("10.0.0.1", POD.key)


def one_slice(*endpoints: SliceEndpoint, **changes: Any) -> EndpointSlice:
    made = EndpointSlice(Key("emojivoto", "web-svc-x"), WEB, "IPv4", (SlicePort("http", 8080),), endpoints)
    return replace(made, **changes)


def world(*objects: Any) -> World:
    slices = {o.key: o for o in objects if isinstance(o, EndpointSlice)}
    others = snapshot(1, *(o for o in objects if not isinstance(o, EndpointSlice)))
    return World.empty(MESH).next(replace(others, slices=slices))


def asked(*objects: Any, port: int = 80) -> Endpoints:
    return service_endpoints(world(*objects), ServiceTarget(WEB, port))


SERVICE = service("web-svc", "10.1.0.1")


def test_the_slice_says_which_pods_and_which_port_not_the_selector() -> None:
    ready_but_unlisted = pod("web-2", "10.0.0.2")
    found = asked(SERVICE, POD, ready_but_unlisted, one_slice(LISTED, ports=(SlicePort("http", 9090),)))
    assert list(found.by_address) == [("10.0.0.1", 9090)]
    assert found.by_address[("10.0.0.1", 9090)].tls == IDENTITY.format("web", "emojivoto")


def test_readiness_comes_from_the_slice() -> None:
    assert not asked(SERVICE, POD, one_slice(replace(LISTED, ready=False))).by_address
    starting = replace(POD, ready=False)
    assert asked(SERVICE, starting, one_slice(LISTED)).by_address, "publishNotReadyAddresses: the slice says ready"


@pytest.mark.parametrize(
    ("changes", "tls"),
    [
        ({"labels": {}}, NoIdentity.NOT_MESHED),
        ({"proxy_started": False}, NoIdentity.PROXY_NOT_STARTED),
        ({"annotations": {"config.mantle.dev/skip-inbound-ports": "8080"}}, NoIdentity.PORT_SKIPPED),
        ({"host_network": True}, NoIdentity.HOST_NETWORK),
        ({}, IDENTITY.format("web", "emojivoto")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_identity_needs_label_started_proxy_and_a_port_that_is_not_skipped(changes: Any, tls: str) -> None:
    found = asked(SERVICE, replace(POD, **changes), one_slice(LISTED))
    assert [e.tls for e in found.by_address.values()] == [tls]


def test_an_address_written_by_hand_is_no_pod_and_says_so() -> None:
    by_hand = service("web-svc", "10.1.0.1", selector={})
    found = asked(by_hand, POD, one_slice(SliceEndpoint("192.168.7.7")))
    endpoint = found.by_address[("192.168.7.7", 8080)]
    assert (endpoint.tls, endpoint.hint, endpoint.opaque_transport) == (NoIdentity.NOT_A_POD, Hint.NONE, None)


def test_a_pods_address_written_by_hand_is_that_pod() -> None:
    found = asked(service("web-svc", "10.1.0.1", selector={}), POD, one_slice(SliceEndpoint("10.0.0.1")))
    assert [e.tls for e in found.by_address.values()] == [IDENTITY.format("web", "emojivoto")]


@pytest.mark.parametrize(
    "listed",
    [SliceEndpoint("10.0.0.1", Key("emojivoto", "web-9")), SliceEndpoint("192.168.7.7", POD.key)],
    ids=["a pod that is not known (yet)", "a pod with another address"],
)
def test_a_slice_and_its_pod_that_disagree_are_left_out(listed: SliceEndpoint) -> None:
    """Plaintext to a meshed pod, or a pod's name for another address, would both be worse than one endpoint less."""
    found = asked(SERVICE, POD, one_slice(listed))
    assert found.exists
    assert not found.by_address


def test_ports_are_matched_by_name() -> None:
    two = service("web-svc", "10.1.0.1", ServicePort("http", 80, "http"), ServicePort("admin", 81, 9))
    ports = (SlicePort("http", 8080), SlicePort("admin", 9), SlicePort("admin", 9, "UDP"))
    assert list(asked(two, POD, one_slice(LISTED, ports=ports), port=81).by_address) == [("10.0.0.1", 9)]


def test_the_first_address_family_is_balanced_over() -> None:
    both = replace(POD, more_ips=("fd00::1",))
    sixth = one_slice(SliceEndpoint("fd00::1", POD.key), key=Key("emojivoto", "web-svc-6"), ip_family="IPv6")
    fourth = one_slice(LISTED)
    assert list(asked(SERVICE, both, fourth, sixth).by_address) == [("10.0.0.1", 8080)]
    prefers_six = replace(SERVICE, ip_family="IPv6", cluster_ip="fd00:1::1", more_cluster_ips=("10.1.0.1",))
    assert list(asked(prefers_six, both, fourth, sixth).by_address) == [("fd00::1", 8080)]


@pytest.mark.parametrize("ip", ["10.0.0.1", "fd00::1"])
def test_a_dual_stack_pod_is_known_by_both_addresses(ip: str) -> None:
    found = profile(world(replace(POD, more_ips=("fd00::1",))), AddressTarget(ip, 8080))
    assert found.endpoint is not None  # type: ignore[union-attr]
    assert found.endpoint.address == (ip, 8080)  # type: ignore[union-attr]


def test_a_dual_stack_service_is_known_by_both_addresses() -> None:
    dual = world(replace(SERVICE, more_cluster_ips=("fd00:1::1",)))
    assert {profile(dual, AddressTarget(ip, 80)).service for ip in ("10.1.0.1", "fd00:1::1")} == {WEB}  # type: ignore[union-attr]


def test_nobody_fills_memory_by_asking_for_ports() -> None:
    here = world(POD)
    for port in range(1000, 1000 + 3 * KEPT_ENDPOINTS):
        asked = profile(here, AddressTarget("10.0.0.1", port))
        assert asked.endpoint is not None  # type: ignore[union-attr]
        assert asked.endpoint.address == ("10.0.0.1", port)  # type: ignore[union-attr]
    assert len(here.pods[POD.key].made) == KEPT_ENDPOINTS


def test_an_external_name_is_no_service_to_balance_over() -> None:
    away = world(replace(SERVICE, cluster_ip="", external_name="example.com"))
    assert service_endpoints(away, ServiceTarget(WEB, 80)) == Endpoints(exists=False)
    assert outbound(away, ServiceTarget(WEB, 80)) == NotOurs()


def test_a_headless_service_without_selector_is_one_when_somebody_keeps_its_endpoints() -> None:
    headless = replace(SERVICE, cluster_ip="None", selector={})
    assert outbound(world(headless), ServiceTarget(WEB, 80)) == NotOurs()
    assert outbound(world(headless, POD, one_slice(LISTED)), ServiceTarget(WEB, 80)) != NotOurs()
