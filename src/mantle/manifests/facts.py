"""What a cluster already holds, as `install`, `upgrade` and `uninstall` need it, and what it forbids.

`Facts` is read by `cli/cluster_facts.py`; `obstacles` decides whether this control plane may be installed beside what
is there. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mantle.core.trust import Fault
from mantle.manifests.config import OVERRIDES_KEY, VALUES_KEY, InstallValues
from mantle.manifests.trust import Existing

LEAST_MINOR = 29
"""Kubernetes 1.29: native sidecars are on by default from here (KEP-753)."""
ADMISSION_POLICIES = (1, 30)
"""The Kubernetes from which on ValidatingAdmissionPolicy is always there (KEP-3488)."""

OTHER_MESHES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Linkerd": (
        ("linkerd.io/is-control-plane", "linkerd.io/control-plane-ns"),
        ("linkerd-identity", "linkerd-destination"),
    ),
    "Istio": (("topology.istio.io/network", "istio-operator-managed"), ("istiod", "istio-pilot")),
    "Consul": ((), ("consul-connect-injector", "consul-server")),
    "Kuma": (("kuma.io/system-namespace",), ("kuma-control-plane",)),
    "Open Service Mesh": (("openservicemesh.io/ignore",), ("osm-controller",)),
}
"""By which labels of its namespace, and names of its Deployments, another mesh's control plane is known."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One cluster, seen once."""

    version: tuple[int, int]
    control_namespaces: tuple[str, ...] = ()
    """Namespaces that hold a control plane of ours."""
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    """Of the control namespace; empty if there is none."""
    deployments: tuple[str, ...] = ()
    """Names, in the control namespace."""
    config: Mapping[str, str] | None = None
    """Data of ConfigMap `mantle-config`; None if it is not there."""
    trust: Existing = field(default_factory=Existing)
    ip_family: str = "IPv4"
    """The first family of the cluster's service addresses."""

    def stored(self, key: str) -> dict[str, Any] | None:
        """The values of ConfigMap `mantle-config`, nested; None if there are none that can be read."""
        try:
            found = json.loads((self.config or {})[key])
        except (KeyError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    @property
    def admission_policies(self) -> bool:
        """Whether the cluster knows ValidatingAdmissionPolicy."""
        return self.version >= ADMISSION_POLICIES

    @property
    def overrides(self) -> dict[str, Any] | None:
        """What was given at the last install or upgrade."""
        return self.stored(OVERRIDES_KEY)


def obstacles(facts: Facts, values: InstallValues) -> Iterator[Fault]:
    """Why this control plane must not be installed on this cluster: found, wanted, fix. All of them."""
    namespace = values.control_namespace
    for other in facts.control_namespaces:
        if other != namespace:
            yield Fault(
                "control plane",
                f"one of Mantle's in namespace {other}",
                f"none but that in {namespace}: two would both inject and answer for the same pods",
                f"`mantle -n {other} upgrade` to change that one, or `mantle -n {other} uninstall` to move",
            )
    for mesh, (labels, names) in OTHER_MESHES.items():
        found = [f"label {label}" for label in labels if label in facts.namespace_labels]
        found += [f"Deployment {name}" for name in names if name in facts.deployments]
        if found:
            yield Fault(
                f"namespace {namespace}",
                f"{mesh}'s control plane ({', '.join(found)})",
                "a namespace of Mantle's own",
                "choose another with -n: both meshes can be in one cluster, a pod is in one of them",
            )
    before = (facts.stored(VALUES_KEY) or {}).get("trustDomain")
    if before is not None and before != values.trust_domain:
        yield Fault(
            "trustDomain",
            f"{values.trust_domain}, where the mesh was installed with {before}",
            "the same: every identity ends in it",
            f"give --identity-trust-domain {before}, or uninstall first",
        )
    if facts.ip_family != "IPv4":
        yield Fault(
            "the cluster's first address family",
            facts.ip_family,
            "IPv4, alone or before IPv6: the control plane's own servers listen on IPv4",
            "use a cluster whose service addresses are IPv4 first; pods may have both",
        )
    if facts.version < (1, LEAST_MINOR):
        yield Fault(
            "Kubernetes",
            ".".join(map(str, facts.version)),
            f"1.{LEAST_MINOR} or newer, as the proxies are native sidecars",
            "upgrade the cluster",
        )


def parse_version(answer: Mapping[str, Any]) -> tuple[int, int]:
    """The version of a `/version` answer (`minor` may be `29+`); (0, 0) for one that says none."""
    numbers = [re.match(r"\d+", str(answer.get(part, ""))) for part in ("major", "minor")]
    major, minor = (int(number[0]) if number else 0 for number in numbers)
    return major, minor
