"""The names of the experimental mode `--tls=optional`: identities of owners, and where their Secrets are.

See `optional_tls.py` for the whole design of the mode. Apart from it because injection and discovery need the names and
must not load cryptography for them. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mantle.core.names import MAX_NAME, BadName, MeshNames, is_label, is_subdomain
from mantle.core.reasons import NameRefused

LABEL_TLS = "mantle.dev/tls"
"""On pods and on Secrets: `optional`."""
OWNER = "mantle.dev/tls-owner"
"""Annotation of a pod: `kind/name` of the owner whose Secret it mounts."""
OPTIONAL = "optional"
MIGRATION = "mantle.dev/tls-migration"
"""Annotation of a pod on its way to the default mode: `sha256:<hex of the roots' PEM> until:<time>`."""
KINDS = (
    "deployment",
    "replicaset",
    "replicationcontroller",
    "statefulset",
    "daemonset",
    "job",
    "cronjob",
    "pod",
)


@dataclass(frozen=True, slots=True)
class Owner:
    """What pods belong to, as users say it. `kind` is lower case."""

    namespace: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name} of {self.namespace}"

    @property
    def secret(self) -> str:
        """The name of the Secret with its key and certificate."""
        return f"{self.name}-{self.kind}-tls-mantle"


@dataclass(frozen=True, slots=True)
class OptionalNames:
    """The names of the experimental mode of one mesh: what `core/ca.py` needs to know of names."""

    mesh: MeshNames

    @property
    def trust_domain(self) -> str:
        """A SPIFFE trust domain of its own: another root is another trust domain (SPIFFE ID, section 2.1)."""
        return f"{OPTIONAL}.{self.mesh.control_namespace}.{self.mesh.trust_domain}"

    @property
    def suffix(self) -> str:
        """What follows `<owner>.<kind>.<ns>`, with its leading dot."""
        return f".{self.trust_domain}"

    @property
    def issuer(self) -> str:
        return f"ca.{self.trust_domain}"

    @property
    def root(self) -> str:
        return f"root.{self.trust_domain}"

    @property
    def observer(self) -> Owner:
        """Who may tap pods of this mode: viz, which has a certificate of the mode for that and nothing else."""
        return Owner(self.mesh.control_namespace, "deployment", "mantle-viz")

    def identity(self, owner: Owner) -> str | BadName:
        """The owner's DNS name, or why it cannot have one."""
        if not is_label(owner.namespace):
            return BadName(NameRefused.NOT_A_LABEL, owner.namespace, "a namespace that is a DNS-1123 label")
        if not is_subdomain(owner.name):
            return BadName(NameRefused.NOT_A_SUBDOMAIN, owner.name, "an owner's name that is a DNS-1123 subdomain")
        if owner.kind not in KINDS:
            return BadName(NameRefused.MISSING_PART, owner.kind, f"an owner's kind, one of {', '.join(KINDS)}")
        name = f"{owner.name}.{owner.kind}.{owner.namespace}{self.suffix}"
        if len(name) > MAX_NAME or len(owner.secret) > MAX_NAME:
            return BadName(NameRefused.TOO_LONG, name, f"at most {MAX_NAME} characters: shorten the owner's name")
        return name

    def spiffe(self, owner: Owner) -> str:
        """The owner's SPIFFE ID. Its parts must have passed `identity`."""
        return f"spiffe://{self.trust_domain}/ns/{owner.namespace}/{owner.kind}/{owner.name}"

    def parse_identity(self, name: str) -> Owner | BadName:
        """Takes a DNS name of this mode apart."""
        wanted = f"<owner>.<kind>.<namespace>{self.suffix}"
        if not name.endswith(self.suffix):
            return BadName(NameRefused.OTHER_MESH, name, f"a name that ends in {self.suffix}")
        parts = name.removesuffix(self.suffix).rsplit(".", 2)
        if len(parts) != 3:
            return BadName(NameRefused.MISSING_PART, name, wanted)
        owner = Owner(parts[2], parts[1], parts[0])
        checked = self.identity(owner)
        return checked if isinstance(checked, BadName) else owner


def owner_of(labels: Mapping[str, str], annotations: Mapping[str, str], namespace: str) -> Owner | None:
    """The owner whose Secret a pod mounts; None for a pod that is not of this mode."""
    if labels.get(LABEL_TLS) != OPTIONAL:
        return None
    kind, slash, name = annotations.get(OWNER, "").partition("/")
    return Owner(namespace, kind, name) if slash and name else None
