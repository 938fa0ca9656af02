"""Who asks destination and policy, and whether the workload they speak for is their own.

The caller's identity comes from its own sidecar's proof of mutual TLS (header `l5d-client-id`, which our sidecar sets
and strips from everyone else). A `workload` or context is the caller's bare word until it equals that identity. Pure.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from mantle.core.model import Key
from mantle.core.names import BadName
from mantle.core.reasons import CallerRefused
from mantle.core.world import World, is_optional

DIAGNOSING = "mantle-viz"
"""The service account of the control plane that may ask for every workload: it shows people what proxies are told."""


@dataclass(frozen=True, slots=True)
class Presented:
    """What came with a call: the proved identity (empty if none), and whether it came over loopback."""

    client_id: str
    loopback: bool


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller that may be answered. Made by `check_caller` only."""

    identity: str
    """Its DNS identity; empty for an anonymous one that was let in."""
    workload: Key | None
    """The pod it speaks for, if it named one."""


@dataclass(frozen=True, slots=True)
class CallerDenied:
    """Why a caller is not answered."""

    reason: CallerRefused
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.reason}: found {self.found}; wanted {self.wanted}"


def parse_workload(text: str) -> Key | CallerDenied:
    """Reads `{"ns": …, "pod": …}` (more members are ignored) or the older `ns:pod`."""
    wanted = 'a workload such as {"ns":"emojivoto","pod":"web-1"}'
    if not text.startswith("{"):
        namespace, _, pod = text.partition(":")
    else:
        try:
            members = json.loads(text)
        except (ValueError, RecursionError):
            return CallerDenied(CallerRefused.BAD_WORKLOAD, repr(text[:200]), wanted)
        namespace, pod = members.get("ns", ""), members.get("pod", "")
    if not (isinstance(namespace, str) and isinstance(pod, str) and namespace and pod):
        return CallerDenied(CallerRefused.BAD_WORKLOAD, repr(text[:200]), wanted)
    return Key(namespace, pod)


def check_caller(
    world: World,
    presented: Presented,
    workload: Key | None,
    own_pod: Key | None,
    allow_anonymous: bool,
    optional_tls: bool = False,
) -> Caller | CallerDenied:
    """Whether the caller may be answered, speaking for `workload` (None: it named none).

    `own_pod` is this server's own pod, whose sidecar asks over loopback without an identity. `allow_anonymous` is for
    proxies that open their control streams before they have a certificate (linkerd2-proxy): their word is taken.
    `optional_tls`: it is taken of pods of the experimental mode, which have no certificate that counts here.
    """
    if not presented.client_id:
        if presented.loopback and own_pod is not None and workload == own_pod:
            return Caller("", workload)
        if allow_anonymous:
            return Caller("", workload)
        named = None if workload is None else world.pods.get(workload)
        if optional_tls and named is not None and is_optional(named.pod):
            return Caller("", workload)
        return CallerDenied(
            CallerRefused.ANONYMOUS,
            f"a caller without mutual TLS{' on loopback' if presented.loopback else ''}",
            "mutual TLS with a client certificate of this mesh (or --allow-anonymous, to serve other meshes' proxies)",
        )
    client = world.mesh.names.parse_identity(presented.client_id)
    if isinstance(client, BadName):
        return CallerDenied(CallerRefused.ANONYMOUS, f"a client named {presented.client_id!r}", client.wanted)
    if workload is None:
        return Caller(presented.client_id, None)
    if (client.namespace, client.service_account) == (world.mesh.names.control_namespace, DIAGNOSING):
        return Caller(presented.client_id, workload)
    facts = world.pods.get(workload)
    if facts is None or facts.pod.unreadable:
        wanted = "a pod that exists" if facts is None else "a pod that can be read"
        return CallerDenied(CallerRefused.UNKNOWN_WORKLOAD, f"the workload {workload}", wanted)
    if client.namespace != workload.namespace or client.service_account != facts.pod.service_account:
        return CallerDenied(
            CallerRefused.OTHER_WORKLOAD,
            f"the client {presented.client_id}, asking for the pod {workload}",
            f"a pod of the service account {client}",
        )
    return Caller(presented.client_id, workload)
