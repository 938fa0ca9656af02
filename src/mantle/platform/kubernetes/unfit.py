"""What is kept in place of an object that cannot be read: decided kind by kind, so that nothing opens. Pure.

- A **pod** keeps its last good version as long as that is surely of the same pod (uid) at the same addresses: its
  identity stays the one it had. Else it becomes a pod that is known to exist and nothing more (`Pod.unreadable`):
  discovery names it in no service and answers for its address with an error that is retried, never with "a stranger",
  which would be plaintext; it gets no certificate and no policy but `deny`. The same holds for a pod of a mesh
  whose proxy had not started in its last good version: that version says plaintext.
- A **service** keeps its last good version at the same addresses, else it is `Service.unreadable`: known, answered with
  an error.
- A **slice** keeps its last good version: an address in it has an identity only as the pod that has it now. Without
  one its addresses are left out.
- A **namespace** keeps its last good version; without one its pods admit nobody unless they say more themselves
  (`deny`), as its own setting cannot be known.
- What stands between a pod and its workload keeps its last good version: only tables show it. A **service account** is
  forgotten: tokens are then believed on the API server's word alone.

An address of the cluster's networks that is no pod's and no service's stays a stranger's: nodes, the API server and
pods of the host's network are such. So a pod whose very addresses cannot be read is no stranger only behind services.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from mantle.core.annotations import LABEL_CONTROL_NS, PREFIX
from mantle.core.model import EndpointSlice, Key, Namespace, Owner, Pod, Service
from mantle.core.world import HEADLESS, addresses_of
from mantle.platform.kubernetes.convert import Between, SeenPod, address
from mantle.platform.kubernetes.reading import Sketch, Unfit

CLOSED = {f"{PREFIX}default-inbound-policy": "deny"}


def pod(sketch: Sketch, known: Mapping[Key, SeenPod]) -> tuple[Key, SeenPod]:
    """The last good version of the same pod at the same addresses, else a pod that nothing is known of."""
    key = Key(sketch.namespace, sketch.name)
    ips = tuple(_addresses([sketch.at("status", "podIP"), *_members(sketch.at("status", "podIPs"), "ip")]))
    deleting = sketch.at("metadata", "deletionTimestamp") is not None
    last = known.get(key)
    if last is not None and _still_good(last.pod, sketch.uid, ips):
        return key, replace(last, pod=replace(last.pod, ready=last.pod.ready and not deleting), deleting=deleting)
    phase = sketch.at("status", "phase")
    unknown = Pod(
        key=key,
        uid=sketch.uid,
        ip=ips[0] if ips else "",
        service_account="",
        owner=Owner("Pod", key.name),
        phase=phase if phase in ("Pending", "Running", "Succeeded", "Failed") else "Running",
        # An address of the host is not the pod's own: to close it would close the node.
        host_network=sketch.at("spec", "hostNetwork") not in (None, False),
        more_ips=ips[1:],
        unreadable=True,
    )
    return key, SeenPod(unknown, None, deleting)


def _still_good(last: Pod, uid: str, ips: tuple[str, ...]) -> bool:
    started = last.proxy_started or LABEL_CONTROL_NS not in last.labels
    return not last.unreadable and last.uid == uid and set(ips) <= set(last.ips) and started


def service(sketch: Sketch, known: Mapping[Key, Service]) -> tuple[Key, Service]:
    """The last good version at the same addresses, else a service that nothing is known of."""
    key = Key(sketch.namespace, sketch.name)
    ips = tuple(_addresses([sketch.at("spec", "clusterIP"), *_all(sketch.at("spec", "clusterIPs"))]))
    last = known.get(key)
    if last is not None and not last.unreadable and set(ips) <= set(addresses_of(last)):
        return key, last
    return key, Service(key, ips[0] if ips else HEADLESS, more_cluster_ips=ips[1:], unreadable=True)


def endpoint_slice(sketch: Sketch, known: Mapping[Key, EndpointSlice]) -> tuple[Key, EndpointSlice | None]:
    """The last good version, else none."""
    key = Key(sketch.namespace, sketch.name)
    return key, known.get(key)


def namespace(sketch: Sketch, known: Mapping[str, Namespace]) -> tuple[str, Namespace]:
    """The last good version, else one whose pods admit nobody."""
    return sketch.name, known.get(sketch.name, Namespace(sketch.name, annotations=CLOSED))


def between(kind: str) -> Callable[[Sketch, Mapping[Between, Owner]], tuple[Between, Owner | None]]:
    """`instead` for ReplicaSets and Jobs: the last good version, else none."""

    def instead(sketch: Sketch, known: Mapping[Between, Owner]) -> tuple[Between, Owner | None]:
        name = Between(kind, sketch.namespace, sketch.name)
        return name, known.get(name)

    return instead


def service_account(sketch: Sketch, _: Mapping[Key, str]) -> tuple[Key, None]:
    """None: its uid is not believed."""
    return Key(sketch.namespace, sketch.name), None


def _addresses(found: list[Any]) -> Iterator[str]:
    """Those that are addresses, each once."""
    seen: set[str] = set()
    for text in found:
        try:
            ip = address(text) if isinstance(text, str) else ""
        except Unfit:
            continue
        if ip and ip not in seen:
            seen.add(ip)
            yield ip


def _all(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []


def _members(found: Any, name: str) -> list[Any]:
    return [one.get(name) for one in _all(found) if isinstance(one, dict)]
