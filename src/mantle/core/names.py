"""The names of workloads: the DNS name and the SPIFFE ID a certificate carries, built and taken apart in one place.

`<sa>.<ns>.serviceaccount.identity.<control-ns>.<trust-domain>` (Linkerd's form) and
`spiffe://<trust-domain>/ns/<ns>/sa/<sa>` (SPIFFE ID, section 2). A service account's name is a DNS-1123 *subdomain*
and may hold dots; a namespace is one *label* and may not. So the label before the fixed part is the namespace, and the
form is unambiguous. Knows nothing of certificates, tokens or the platform.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mantle.core.reasons import NameRefused

MAX_NAME = 253
"""Octets of a DNS name in text (RFC 1035 2.3.4, without the root's dot)."""

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_TYPE = "serviceaccount"


@dataclass(frozen=True, slots=True)
class Workload:
    """Who runs: a service account of a namespace."""

    namespace: str
    service_account: str

    def __str__(self) -> str:
        """The short form people see: `service-account.namespace`."""
        return f"{self.service_account}.{self.namespace}"


@dataclass(frozen=True, slots=True)
class BadName:
    """Why a name is not a workload's name. `found` is the text as it came, `wanted` what would have been right."""

    reason: NameRefused
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.reason}: found {self.found!r}, wanted {self.wanted}"


@dataclass(frozen=True, slots=True)
class MeshNames:
    """The fixed part of every name of one mesh.

    Make it with `mesh_names`, which checks both parts.
    """

    control_namespace: str
    trust_domain: str

    @property
    def suffix(self) -> str:
        """What follows `<sa>.<ns>`, with its leading dot."""
        return f".{_TYPE}.identity.{self.control_namespace}.{self.trust_domain}"

    @property
    def issuer(self) -> str:
        """The common name of the issuer's certificate."""
        return f"identity.{self.control_namespace}.{self.trust_domain}"

    @property
    def root(self) -> str:
        """The common name of the trust anchor."""
        return f"root.{self.control_namespace}.{self.trust_domain}"

    def identity(self, workload: Workload) -> str | BadName:
        """The workload's DNS name, or why it cannot have one (a part is not DNS-1123, or all is over 253 octets)."""
        bad = check_workload(workload)
        if bad is not None:
            return bad
        name = f"{workload.service_account}.{workload.namespace}{self.suffix}"
        if len(name) > MAX_NAME:
            return BadName(
                NameRefused.TOO_LONG, name, f"at most {MAX_NAME} characters: shorten the service account's name"
            )
        return name

    def spiffe(self, workload: Workload) -> str:
        """The workload's SPIFFE ID. Its parts must have passed `check_workload` (`identity` does that)."""
        return f"spiffe://{self.trust_domain}/ns/{workload.namespace}/sa/{workload.service_account}"

    def parse_identity(self, name: str) -> Workload | BadName:
        """Takes a DNS name apart. The name must be of this mesh: same control namespace, same trust domain."""
        if not name:
            return BadName(NameRefused.EMPTY, name, f"<service-account>.<namespace>{self.suffix}")
        if len(name) > MAX_NAME:
            return BadName(NameRefused.TOO_LONG, name[:MAX_NAME] + "…", f"at most {MAX_NAME} characters")
        if not name.endswith(self.suffix):
            return BadName(NameRefused.OTHER_MESH, name, f"a name that ends in {self.suffix}")
        service_account, dot, namespace = name.removesuffix(self.suffix).rpartition(".")
        if not dot:
            return BadName(NameRefused.MISSING_PART, name, f"<service-account>.<namespace>{self.suffix}")
        workload = Workload(namespace, service_account)
        return check_workload(workload) or workload

    def parse_spiffe(self, uri: str) -> Workload | BadName:
        """Takes a SPIFFE ID apart. The ID must be of this trust domain."""
        if not uri:
            return BadName(NameRefused.EMPTY, uri, f"spiffe://{self.trust_domain}/ns/<namespace>/sa/<service-account>")
        prefix = f"spiffe://{self.trust_domain}/"
        if not uri.startswith(prefix):
            return BadName(NameRefused.OTHER_MESH, uri, f"an ID that starts with {prefix}")
        parts = uri.removeprefix(prefix).split("/")
        if len(parts) != 4 or parts[0] != "ns" or parts[2] != "sa":
            return BadName(NameRefused.MISSING_PART, uri, f"{prefix}ns/<namespace>/sa/<service-account>")
        workload = Workload(parts[1], parts[3])
        return check_workload(workload) or workload


def mesh_names(control_namespace: str, trust_domain: str) -> MeshNames | BadName:
    """The names of a mesh, or which of the two parts is wrong."""
    if not is_label(control_namespace):
        return BadName(NameRefused.NOT_A_LABEL, control_namespace, "a control namespace that is a DNS-1123 label")
    if not is_subdomain(trust_domain):
        return BadName(NameRefused.NOT_A_SUBDOMAIN, trust_domain, "a trust domain that is a DNS-1123 subdomain")
    return MeshNames(control_namespace, trust_domain)


def check_workload(workload: Workload) -> BadName | None:
    """What is wrong with the parts of a name; nothing if they are as Kubernetes allows them."""
    if not is_label(workload.namespace):
        return BadName(NameRefused.NOT_A_LABEL, workload.namespace, "a namespace that is a DNS-1123 label")
    if not is_subdomain(workload.service_account):
        return BadName(
            NameRefused.NOT_A_SUBDOMAIN, workload.service_account, "a service account that is a DNS-1123 subdomain"
        )
    return None


def is_label(text: str) -> bool:
    """A DNS-1123 label: 1-63 of a-z, 0-9 and -, with no - at either end."""
    return _LABEL.fullmatch(text) is not None


def is_subdomain(text: str) -> bool:
    """A DNS-1123 subdomain: labels joined by dots, 253 characters at most."""
    return len(text) <= MAX_NAME and all(is_label(part) for part in text.split("."))
