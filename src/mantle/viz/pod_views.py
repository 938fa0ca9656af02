"""Views of single pods and of discovery: certificates and metrics of proxies, endpoints and policies.

Each is a list with an answer or the reason why not for every pod: one proxy that does not answer hides no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from mantle.core.model import Key, Pod
from mantle.core.views import WORKLOADS
from mantle.viz.discovery import NotKnown
from mantle.viz.fields import BadRequest, Fields, View
from mantle.viz.mesh import is_meshed, pods_of
from mantle.viz.proxies import Unreachable
from mantle.viz.world import World

KINDS = (*WORKLOADS, "namespace", "pod", "service")
AT_ONCE = 16


class Asks(Protocol):
    """What is needed of `proxies.Proxies`."""

    async def metrics(self, pod: Pod) -> str: ...
    async def certificate(self, pod: Pod) -> str: ...


class Discovers(Protocol):
    """What is needed of `discovery.Discovery`."""

    async def endpoints(self, authority: str) -> list[dict[str, Any]]: ...
    async def inbound(self, pod: Key, port: int) -> dict[str, Any]: ...
    async def outbound(self, authority: str) -> dict[str, Any]: ...


class PodViews:
    """`cluster_domain` is what service names end in."""

    def __init__(self, world: World, proxies: Asks, discovery: Discovers, cluster_domain: str) -> None:
        self._world, self._proxies, self._discovery = world, proxies, discovery
        self._domain = cluster_domain
        self.views: Mapping[str, View] = {
            "certificates": self.certificates,
            "proxymetrics": self.proxymetrics,
            "endpoints": self.endpoints,
            "policies": self.policies,
        }

    async def certificates(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """What each proxy shows its peers now, PEM."""
        return {"certificates": await self._each(asked, "pem", self._proxies.certificate)}

    async def proxymetrics(self, asked: Mapping[str, str]) -> dict[str, Any]:
        return {"pods": await self._each(asked, "text", self._proxies.metrics)}

    async def endpoints(self, asked: Mapping[str, str]) -> dict[str, Any]:
        fields = Fields(asked)
        authority = self._authority(fields, fields.namespace())
        fields.done()
        try:
            return {"authority": authority, "endpoints": await self._discovery.endpoints(authority)}
        except (NotKnown, Unreachable) as error:
            raise _refused(error) from error

    async def policies(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """What proxies are told of a port: of each pod of a workload, or towards a service."""
        fields = Fields(asked)
        kind = fields.one_of("resource", KINDS, default="pod")
        namespace, name = fields.namespace(), fields.text("name")
        port = fields.port("port")
        if kind == "service" and not (namespace and name):
            fields.wrong("a policy is that of one service", "name it, and its namespace")
        fields.done()
        if kind == "service":
            try:
                return {"outbound": await self._discovery.outbound(f"{name}.{namespace}.svc.{self._domain}:{port}")}
            except (NotKnown, Unreachable) as error:
                raise _refused(error) from error
        found = await self._each(asked, "inbound", lambda pod: self._discovery.inbound(pod.key, port))
        return {"pods": found}

    async def _each(
        self, asked: Mapping[str, str], key: str, ask: Callable[[Pod], Awaitable[Any]]
    ) -> list[dict[str, Any]]:
        """The answer of each meshed pod that is meant, by name."""
        fields = Fields(asked)
        kind = fields.one_of("resource", KINDS, default="pod")
        namespace, name = fields.namespace(), fields.text("name")
        selector = fields.selector()
        if kind == "namespace" and name and namespace not in (None, name):
            # The right that was asked for is that of `namespace`, and no other's pods may be reached with it.
            fields.wrong(f"namespace {name} is asked for in namespace {namespace}", "name the same one, or none")
        fields.done()
        namespaces = sorted({pod.namespace for pod in self._world.snapshot.pods}) if namespace is None else [namespace]
        found = [pod for one in namespaces for pod in pods_of(self._world.snapshot, kind, name, one)]
        found = [pod for pod in found if selector.matches(pod.labels)]
        pods = [pod for pod in {pod.key: pod for pod in found}.values() if is_meshed(pod)]
        if not pods:
            raise BadRequest([_none(found, kind, name, namespace)])
        turn = asyncio.Semaphore(AT_ONCE)

        async def one(pod: Pod) -> dict[str, Any]:
            row: dict[str, Any] = {"namespace": pod.key.namespace, "pod": pod.key.name}
            async with turn:
                try:
                    row[key] = await ask(pod)
                except (NotKnown, Unreachable) as error:
                    row["error"] = str(error)
            return row

        return await asyncio.gather(*(one(pod) for pod in pods))

    def _authority(self, fields: Fields, namespace: str | None) -> str:
        """`web-svc.emojivoto:80` in full. Its namespace must be the one that is asked for."""
        text = fields.text("authority")
        host, colon, port = text.rpartition(":")
        host = host.removesuffix(".").removesuffix(f".svc.{self._domain}").removesuffix(".svc")
        name, dot, of = host.partition(".")
        if not colon or not dot or not name or "." in of or not port.isdecimal():
            fields.wrong(f"{text!r} is no authority of a service", "write NAME.NAMESPACE:PORT")
        elif namespace not in (None, of):
            fields.wrong(f"{text} is in namespace {of}, and {namespace} was asked for", f"ask for namespace {of}")
        return f"{name}.{of}.svc.{self._domain}:{port}"


def _none(found: list[Pod], kind: str, name: str, namespace: str | None) -> tuple[str, str]:
    what, where = f"{kind}/{name}" if name else kind, f"in namespace {namespace}" if namespace else "in any namespace"
    if found:
        return f"no pod of {what} {where} is in the mesh", "add it with `mantle inject`, and apply it again"
    return f"there is no pod of {what} {where}", "choose another namespace with -n, or other labels with -l"


def _refused(error: NotKnown | Unreachable) -> BadRequest:
    if isinstance(error, NotKnown):
        return BadRequest([(str(error), "see `kubectl get services -A`, or `mantle ps` on one machine")])
    return BadRequest([(str(error), "ask again; the log of mantle-destination says more")], status=503)
