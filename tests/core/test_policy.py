"""Who may reach a port, and how traffic to a service is treated: tables of annotations and what they mean."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest
from discovery_play import MESH, pod, service, snapshot

from mantle.core.endpoints import AddressTarget, ServiceTarget
from mantle.core.model import Key, Namespace, ServicePort
from mantle.core.policy import Clients, NotOurs, ServerPolicy, ServicePolicy, inbound, outbound
from mantle.core.world import EVERYWHERE, PRIVATE_NETWORKS, Mesh, World

CONFIG = "config.mantle.dev/"


def policy(
    port: int = 8080, mesh: Mesh = MESH, namespace: dict[str, str] | None = None, **changes: object
) -> ServerPolicy:
    one = pod("web-1", "10.0.0.1", **changes)
    world = World.empty(mesh).next(snapshot(1, one, Namespace("emojivoto", annotations=namespace or {})))
    return inbound(world, world.pods[one.key], port)


@pytest.mark.parametrize(
    ("word", "clients", "networks"),
    [
        ("all-unauthenticated", Clients.ANYONE, EVERYWHERE),
        ("all-authenticated", Clients.ANY_IDENTITY, EVERYWHERE),
        ("cluster-unauthenticated", Clients.ANYONE, PRIVATE_NETWORKS),
        ("cluster-authenticated", Clients.ANY_IDENTITY, PRIVATE_NETWORKS),
        ("audit", Clients.ANYONE, EVERYWHERE),
    ],
)
def test_what_each_default_policy_allows(word: str, clients: Clients, networks: object) -> None:
    answer = policy(annotations={CONFIG + "default-inbound-policy": word})
    (authorization,) = answer.authorizations
    assert (answer.name, authorization.name) == (word, word)
    assert (authorization.clients, authorization.networks) == (clients, networks)
    assert not answer.opaque


def test_deny_allows_nobody() -> None:
    answer = policy(annotations={CONFIG + "default-inbound-policy": "deny"})
    assert (answer.name, answer.authorizations) == ("deny", ())


@pytest.mark.parametrize("typo", ["all-authentcated", "", "ALL-UNAUTHENTICATED", "none"])
def test_a_typo_denies(typo: str) -> None:
    assert policy(annotations={CONFIG + "default-inbound-policy": typo}).authorizations == ()
    assert policy(namespace={CONFIG + "default-inbound-policy": typo}).authorizations == ()


def test_the_pod_wins_over_its_namespace_and_that_over_the_mesh() -> None:
    strict = replace(MESH, default_policy="deny")
    assert policy(mesh=strict).name == "deny"
    assert policy(mesh=strict, namespace={CONFIG + "default-inbound-policy": "audit"}).name == "audit"
    both = policy(
        mesh=strict,
        namespace={CONFIG + "default-inbound-policy": "audit"},
        annotations={CONFIG + "default-inbound-policy": "all-authenticated"},
    )
    assert both.name == "all-authenticated"


@pytest.mark.parametrize(
    ("word", "becomes"),
    [
        ("all-unauthenticated", "all-authenticated"),
        ("cluster-unauthenticated", "cluster-authenticated"),
        ("audit", "all-authenticated"),
        ("deny", "deny"),
        ("all-authenticated", "all-authenticated"),
    ],
)
def test_ports_that_require_identity(word: str, becomes: str) -> None:
    annotations = {
        CONFIG + "default-inbound-policy": word,
        CONFIG + "proxy-require-identity-inbound-ports": "8080,9000-9010",
    }
    assert policy(8080, annotations=annotations).name == becomes
    assert policy(9005, annotations=annotations).name == becomes
    assert policy(8081, annotations=annotations).name == word


@pytest.mark.parametrize("port", [4190, 4191])
def test_the_proxys_own_ports_always_detect_and_admit_everyone(port: int) -> None:
    answer = policy(port, annotations={CONFIG + "default-inbound-policy": "deny", CONFIG + "opaque-ports": "1-65535"})
    assert not answer.opaque
    assert [a.clients for a in answer.authorizations] == [Clients.ANYONE]


@pytest.mark.parametrize("word", ["all-unauthenticated", "deny", "all-authenticated"])
def test_certify_needs_tls_but_no_identity_whatever_the_default(word: str) -> None:
    component = {"mantle.dev/control-plane-component": "identity"}
    annotations = {CONFIG + "default-inbound-policy": word}
    own = pod("mantle-identity-1", "10.0.0.1", namespace="mantle", labels=component, annotations=annotations)
    impostor = pod("mantle-identity-1", "10.0.0.2", labels=component, annotations=annotations)
    world = World.empty(MESH).next(snapshot(1, own, impostor))
    (authorization,) = inbound(world, world.pods[own.key], 8080).authorizations
    assert (authorization.clients, authorization.networks) == (Clients.ANY_TLS, EVERYWHERE)
    assert inbound(world, world.pods[own.key], 9990).name == word
    assert inbound(world, world.pods[impostor.key], 8080).name == word


@pytest.mark.parametrize(
    ("port", "annotation", "opaque"),
    [(8080, None, False), (1, None, False), (5432, None, True), (5432, "", False), (8080, "http", True)],
)
def test_a_port_is_opaque_only_where_a_list_says_so(port: int, annotation: str | None, opaque: bool) -> None:
    annotations = {} if annotation is None else {CONFIG + "opaque-ports": annotation}
    assert policy(port, annotations=annotations).opaque is opaque


def test_probes_are_authorized_on_their_port_only() -> None:
    probes = ((8080, "/ready?full=1"), (8080, "/live"), (8080, "/live"), (9990, "/health"))
    strict = {CONFIG + "default-inbound-policy": "all-authenticated"}
    answer = policy(8080, probe_paths=probes, annotations=strict)
    assert answer.probe_paths == ("/live", "/ready")
    assert answer.probe_networks == EVERYWHERE
    assert policy(9990, probe_paths=probes, annotations=strict).probe_paths == ("/health",)
    assert policy(8081, probe_paths=probes, annotations=strict).probe_paths == ()
    assert policy(8080, probe_paths=probes, annotations={CONFIG + "opaque-ports": "8080"}).probe_paths == ()


def test_networks_of_the_mesh_are_those_it_was_told() -> None:
    only = (ipaddress.ip_network("10.203.0.0/16"),)
    answer = policy(
        mesh=replace(MESH, cluster_networks=only),
        annotations={CONFIG + "default-inbound-policy": "cluster-authenticated"},
    )
    assert answer.authorizations[0].networks == only


# ---- outbound ----

WEB = Key("emojivoto", "web-svc")


def test_a_services_address_and_name_have_the_same_policy() -> None:
    world = World.empty(MESH).next(snapshot(1, service("web-svc", "10.203.128.1"), pod("web-1", "10.0.0.1")))
    wanted = ServicePolicy(WEB, 80, "web-svc.emojivoto.svc.cluster.local:80", opaque=False)
    assert outbound(world, AddressTarget("10.203.128.1", 80)) == wanted
    assert outbound(world, ServiceTarget(WEB, 80)) == wanted
    for stranger in (
        AddressTarget("10.203.128.1", 81),
        AddressTarget("10.0.0.1", 8080),
        AddressTarget("1.1.1.1", 443),
        ServiceTarget(WEB, 81),
        ServiceTarget(Key("emojivoto", "unknown"), 80),
    ):
        assert outbound(world, stranger) == NotOurs()


def test_an_opaque_port_has_an_opaque_policy() -> None:
    database = service("web-svc", "10.203.128.1", ServicePort("db", 5432, 5432))
    world = World.empty(MESH).next(snapshot(1, database))
    answer = outbound(world, AddressTarget("10.203.128.1", 5432))
    assert isinstance(answer, ServicePolicy) and answer.opaque
