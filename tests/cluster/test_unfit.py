"""Objects that a real API server admits and that are of no use: everything else of their kind goes on."""

import asyncio
import json
from typing import Any

import pytest

from mantle.control.wire import endpoints_bytes
from mantle.core.endpoints import AddressTarget, ServiceTarget, profile, service_endpoints
from mantle.core.model import Key, Snapshot
from mantle.core.names import BadName, MeshNames
from mantle.core.reasons import WatchEnded
from mantle.core.world import Mesh, World
from mantle.platform.kubernetes.convert import MOST_TEXT
from mantle.platform.kubernetes.world import DISCOVERY, Kind

from .apiserver import ApiServer
from .test_platform import a_node, a_pod, apply, platform, run_pod

MESH = Mesh(MeshNames("mantle", "cluster.local"))
HUGE = {"config.mantle.dev/opaque-ports": "1," * MOST_TEXT}


def a_slice(port: int, address: str = "10.244.0.1") -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-x", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}],
        "endpoints": [{"addresses": [address], "targetRef": {"kind": "Pod", "name": "web"}}],
    }


def a_service(**metadata: Any) -> dict[str, Any]:
    ports = [{"name": "http", "port": 80, "targetPort": 8080}]
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", **metadata}, "spec": {"ports": ports}}


def deeply_nested(name: str) -> str:
    """A pod as any user may write it: what nobody reads of it is nested 9,000 levels deep."""
    fields = '{"f:a":' * 9000 + "{}" + "}" * 9000
    managed = {
        "manager": "x", "operation": "Update", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z",
        "fieldsType": "FieldsV1", "fieldsV1": "HERE",
    }  # fmt: skip
    document = a_pod(name)
    document["metadata"]["managedFields"] = [managed]
    return json.dumps(document).replace('"HERE"', fields)


async def test_what_does_not_fit_is_passed_over_and_a_later_good_version_is_taken(
    api_server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    namespace = await asyncio.to_thread(api_server.new_namespace, "unfit")
    await asyncio.to_thread(a_node, api_server)
    await asyncio.to_thread(apply, api_server, namespace, a_pod("web"), a_service(annotations=HUGE), a_slice(-5))
    await asyncio.to_thread(run_pod, api_server, namespace, "web", "010.244.0.1")
    create = ("create", "--raw", f"/api/v1/namespaces/{namespace}/pods", "-f", "-")
    await asyncio.to_thread(api_server.kubectl, *create, input=deeply_nested("deep-1"))
    web = Key(namespace, "web")
    target = ServiceTarget(web, 80)

    def world(now: Snapshot) -> World:
        return World.empty(MESH).next(now)

    def behind(now: Snapshot) -> dict[tuple[str, int], str]:
        found = service_endpoints(world(now), target)
        endpoints_bytes(None, found)
        return {address: str(endpoint.tls) for address, endpoint in found.by_address.items()}

    async with platform(api_server, DISCOVERY) as (made, follower):
        now = await follower.until(lambda now: web in now.pods)
        assert Key(namespace, "deep-1") in now.pods, "it lists what is nested deep"
        assert now.pods[web].ip == "10.244.0.1", "an address has one spelling"
        assert now.services[web].unreadable
        address = AddressTarget(now.services[web].cluster_ip, 80)
        assert isinstance(profile(world(now), address), BadName), "and not a stranger, which would be plaintext"
        assert made.reflectors[Kind.SERVICES].passed_over.now.keys() == {web}
        assert made.reflectors[Kind.ENDPOINT_SLICES].passed_over.now.keys() == {Key(namespace, "web-x")}

        # What comes while it watches, too; and the watches go on.
        await asyncio.to_thread(api_server.kubectl, *create, input=deeply_nested("deep-2"))
        await follower.until(lambda now: Key(namespace, "deep-2") in now.pods)
        await asyncio.to_thread(apply, api_server, namespace, a_service(), a_slice(8080))
        identity = f"default.{namespace}.serviceaccount.identity.mantle.cluster.local"
        now = await follower.until(lambda now: behind(now) == {("10.244.0.1", 8080): identity})
        assert not now.services[web].unreadable

        # Good, then bad again: the last good version counts, and a sign from another object says that it was seen.
        await asyncio.to_thread(apply, api_server, namespace, a_slice(70000), a_service(annotations=HUGE))
        services, slices = made.reflectors[Kind.SERVICES], made.reflectors[Kind.ENDPOINT_SLICES]
        await follower.until(lambda _: services.passed_over.total == slices.passed_over.total == 2)
        assert behind(follower.now) == {("10.244.0.1", 8080): identity}

        await asyncio.to_thread(api_server.kubectl, "-n", namespace, "delete", "endpointslice", "web-x")
        await follower.until(lambda now: behind(now) == {})
        assert not slices.passed_over.now
        assert all(reflector.trouble is not WatchEnded.UNREADABLE for reflector in made.reflectors.values())
        counted = {(c.name, c.labels): c.value for c in made.counts()}
        assert counted[("mantle_platform_passed_over", (("kind", "services"),))] == 2
    assert caplog.text.count(f"{namespace}/web-x cannot be read and is passed over") == 1
