"""Traffic and pods of a label selector (`-l`): what `stat`, `edges` and `tap` narrow before they conclude. Pure.

A label is that of a pod, as the platform knows it now or knew it last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mantle.core.model import Pod, Snapshot
from mantle.core.selector import Selector
from mantle.viz.source import Point, Traffic


def snapshot_of(snapshot: Snapshot, selector: Selector) -> Snapshot:
    """The snapshot with the selected pods only, and without services: these have no labels here."""
    if not selector:
        return snapshot
    pods = {key: pod for key, pod in snapshot.pods.items() if selector.matches(pod.labels)}
    return replace(snapshot, pods=pods, services={})


def measured_at(traffic: Traffic, pods: Mapping[str, Pod], selector: Selector) -> Traffic:
    """What the selected pods' own proxies measured. `pods` by address."""
    return _only(traffic, selector, pods, far=False)


def with_an_end(traffic: Traffic, pods: Mapping[str, Pod], selector: Selector) -> Traffic:
    """The traffic of which at least one end is selected. `pods` by address."""
    return _only(traffic, selector, pods, far=True)


def _only(traffic: Traffic, selector: Selector, pods: Mapping[str, Pod], *, far: bool) -> Traffic:
    if not selector:
        return traffic

    def is_selected(ip: str) -> bool:
        pod = pods.get(ip)
        return pod is not None and selector.matches(pod.labels)

    def is_kept(point: Point) -> bool:
        return is_selected(point.subject.ip) or (far and is_selected(_far_ip(point)))

    return replace(
        traffic,
        increases=tuple(filter(is_kept, traffic.increases)),
        gauges=tuple(filter(is_kept, traffic.gauges)),
    )


def _far_ip(point: Point) -> str:
    """The address of the other end, empty if the measurement does not name it."""
    target = point.label("target_ip") or point.label("target_addr").rpartition(":")[0].strip("[]")
    return point.label("client_ip") or target
