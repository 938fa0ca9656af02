"""The platform port: what identity, destination and viz need from wherever they run, and nothing more.

Implemented by `platform.remote` (the `mantle.v1.Platform` client that control-plane pods use on one machine) and by
`platform.kubernetes`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mantle.core.model import Snapshot


@dataclass(frozen=True, slots=True)
class TokenClaims:
    """Who a reviewed token belongs to."""

    namespace: str
    service_account: str
    pod: str
    pod_uid: str
    pod_ip: str
    """The address of the pod the token is bound to, as the platform knows it now."""
    more_pod_ips: tuple[str, ...] = ()
    """Its addresses beside that: a dual-stack pod has one of each family."""


@dataclass(frozen=True, slots=True)
class TokenRejected:
    """Why a token was not accepted. `reason` is one of `core.reasons.TokenReason`; `detail` says what was found and
    what was wanted.
    """

    reason: str
    detail: str


class PlatformUnavailable(Exception):
    """The platform did not answer. Retryable. `fix` is what a person can do if it stays so."""

    def __init__(self, problem: str, fix: str = "check that Mantle's daemon runs") -> None:
        super().__init__(problem)
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to an object, for those who look there (`kubectl describe`)."""

    kind: str
    """`ServiceAccount`, `Deployment`, `Pod` …"""
    namespace: str
    name: str
    reason: str
    """One word in CamelCase, such as `IssuedLeafCertificate`."""
    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Count:
    """How often something happened. `name` is the metric's, without `_total`."""

    name: str
    help: str
    labels: tuple[tuple[str, str], ...]
    value: int


class Platform(Protocol):
    """The world as the mesh sees it."""

    def watch(self) -> AsyncIterator[Snapshot]:
        """Yields the newest snapshot, then each newer one: no backlog, no end, connects again by itself."""
        ...

    async def review_token(self, token: bytes, audiences: Sequence[str]) -> TokenClaims | TokenRejected:
        """Checks signature, audience, expiry and that the bound pod still exists (Kubernetes TokenReview)."""
        ...


class ConnectedPlatform(Platform, Protocol):
    """What a control-plane program holds: the world, and a way to speak into it."""

    def tell(self, event: Event) -> None:
        """Says something about an object where people look at it. Never waits, never fails; may drop it."""
        ...

    def missing(self) -> str:
        """What is not known yet and why, for `/ready`; empty once `watch` has something to say."""
        ...

    def denied(self) -> str:
        """Which right is missing, without which no token can be reviewed; empty if none is known to be."""
        ...

    def counts(self) -> Iterable[Count]:
        """What is counted of the platform's own work, for `/metrics`."""
        ...
