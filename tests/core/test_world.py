"""From one world to the next: the indices are those of a world made from nothing, and what is touched is told."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from discovery_play import MESH, pod, service, snapshot

from mantle.core.endpoints import AddressTarget, ServiceTarget, depends_on, profile, service_endpoints
from mantle.core.model import Changes, EndpointSlice, Key, Namespace, Pod, Service, SliceEndpoint, SlicePort, Snapshot
from mantle.core.world import World

WEB = Key("emojivoto", "web-svc")


def slice_of(name: str, *addresses: str, owner: str = "web-svc", pods: bool = True, port: int = 8080) -> EndpointSlice:
    """A slice whose endpoints are the pods `web-ADDRESS`."""
    endpoints = tuple(SliceEndpoint(a, Key("emojivoto", f"web-{a}") if pods else None) for a in addresses)
    service = Key("emojivoto", owner)
    return EndpointSlice(Key("emojivoto", name), service, "IPv4", (SlicePort("http", port),), endpoints)


def cluster(version: int, *objects: Any) -> Snapshot:
    """A snapshot with slices."""
    slices = {o.key: o for o in objects if isinstance(o, EndpointSlice)}
    return replace(snapshot(version, *(o for o in objects if not isinstance(o, EndpointSlice))), slices=slices)


def first(*objects: Any) -> World:
    return World.empty(MESH).next(cluster(1, *objects))


def test_a_change_of_one_pod_touches_its_addresses_and_its_services_only() -> None:
    one, two = pod("web-10.0.0.1", "10.0.0.1"), pod("web-10.0.0.2", "10.0.0.2")
    other = pod("emoji-1", "10.0.0.9")
    services = service("web-svc", "10.1.0.1"), service("emoji-svc", "10.1.0.2")
    slices = slice_of("a", "10.0.0.1", "10.0.0.2"), slice_of("b", "10.0.0.9", owner="emoji-svc", pods=False)
    before = first(one, two, other, *services, *slices)
    changed = replace(two, ready=False)
    now = before.next(cluster(2, one, changed, other, *services, *slices))
    assert now.touched == {("pod", two.key), ("ip", "10.0.0.2"), ("service", WEB)}
    assert now.pods[one.key] is before.pods[one.key]


def test_on_a_machine_a_pod_touches_the_services_that_select_it_before_or_now() -> None:
    web, services = pod("web-1", "10.0.0.1"), (service("web-svc", "10.1.0.1"), service("emoji-svc", "10.1.0.2"))
    before = World.empty(MESH).next(snapshot(1, web, *services))
    turned = replace(web, labels={**web.labels, "app": "emoji"})
    now = before.next(snapshot(2, turned, *services))
    assert {tag for tag in now.touched if tag[0] == "service"} == {
        ("service", WEB),
        ("service", Key("emojivoto", "emoji-svc")),
    }


def test_a_namespace_touches_all_that_is_in_it() -> None:
    web, svc = pod("web-10.0.0.1", "10.0.0.1"), service("web-svc", "10.1.0.1")
    before = first(web, svc, slice_of("a", "10.0.0.1"))
    strict = Namespace("emojivoto", annotations={"config.mantle.dev/default-inbound-policy": "deny"})
    now = before.next(cluster(2, web, svc, slice_of("a", "10.0.0.1"), strict))
    assert {("pod", web.key), ("service", WEB), ("ip", "10.1.0.1")} <= now.touched
    assert now.pods[web.key].policy == "deny"


def test_what_the_platform_says_is_believed_and_a_gap_is_looked_at() -> None:
    one, two = pod("web-1", "10.0.0.1"), pod("web-2", "10.0.0.2")
    before = first(one, two)
    newer = cluster(2, replace(one, ready=False), replace(two, ready=False))
    told = before.next(replace(newer, changes=Changes(1, pods=frozenset({one.key}))))
    assert ("pod", two.key) not in told.touched
    skipped = before.next(replace(newer, changes=Changes(7, pods=frozenset({one.key}))))
    assert ("pod", two.key) in skipped.touched


def test_any_history_leads_to_the_world_of_its_end() -> None:
    """Random changes, one after the other: every index equals that of a world made at once, and every answer that
    differs was touched.
    """
    chance = random.Random(4)
    world: World = World.empty(MESH)
    objects: dict[Any, Any] = {}
    for version in range(1, 400):
        for _ in range(chance.randint(1, 3)):
            _mutate(chance, objects)
        before, world = world, world.next(cluster(version, *objects.values()))
        fresh = World.empty(MESH).next(world.snapshot)
        assert world.pods.keys() == fresh.pods.keys()
        for index in ("pods_by_ip", "services_by_ip"):
            mine, theirs = getattr(world, index), getattr(fresh, index)
            assert {k: getattr(v, "pod", v) for k, v in mine.items()} == {
                k: getattr(v, "pod", v) for k, v in theirs.items()
            }, index
        assert world.slices_by_service == fresh.slices_by_service
        assert world.services_by_endpoint == fresh.services_by_endpoint
        assert world.services_by_namespace == fresh.services_by_namespace
        assert {n: set(p) for n, p in world.pods_by_namespace.items()} == {
            n: set(p) for n, p in fresh.pods_by_namespace.items()
        }
        targets = [ServiceTarget(Key("emojivoto", f"s{n}"), 80) for n in range(3)]
        addresses = [AddressTarget(f"10.0.0.{n}", 8080) for n in range(6)]
        addresses += [AddressTarget(f"10.1.0.{n}", 80) for n in range(3)]
        for target in targets:
            if service_endpoints(before, target) != service_endpoints(world, target):
                assert world.touched & set(depends_on(target)), target
        for target in (*targets, *addresses):
            if profile(before, target) != profile(world, target):
                assert world.touched & set(depends_on(target)), target


def _mutate(chance: random.Random, objects: dict[Any, Any]) -> None:
    number = chance.randrange(6)
    kind = chance.choice(["pod", "pod", "service", "slice", "namespace"])
    made: Pod | Service | EndpointSlice | Namespace | None
    match kind:
        case "pod":
            # Names and addresses are independent: addresses move between pods as they do on a cluster.
            taken = {o.ip for key, o in objects.items() if key[0] == "pod" and key != ("pod", number)}
            free = [ip for ip in (f"10.0.0.{n}" for n in range(6)) if ip not in taken]
            made = pod(
                f"web-{number}", chance.choice(free), ready=chance.random() < 0.8, meshed=chance.random() < 0.7,
                uid=str(chance.random()), phase=chance.choice(["Running", "Running", "Succeeded"]),
            )  # fmt: skip
        case "service":
            number %= 3
            made = service(f"s{number}", f"10.1.0.{number}")
        case "slice":
            names = [(f"10.0.0.{n}", chance.choice([None, Key("emojivoto", f"web-{n}")])) for n in range(6)]
            some = tuple(SliceEndpoint(ip, named) for ip, named in chance.sample(names, 3))
            owner = Key("emojivoto", f"s{chance.randrange(3)}")
            made = EndpointSlice(Key("emojivoto", f"slice-{number}"), owner, "IPv4", (SlicePort("http", 8080),), some)
        case _:
            number = 0
            ports = chance.choice(["80", "8080"])
            made = Namespace("emojivoto", annotations={"config.mantle.dev/opaque-ports": ports})
    if kind != "namespace" and chance.random() < 0.25:
        objects.pop((kind, number), None)
    else:
        objects[(kind, number)] = made
