"""`io.linkerd.proxy.identity.Identity`: a token and a certificate signing request become a certificate, or a reason.

Checked in this order, cheap things first: rate, room, the request's fields, the issuer, the token (the platform knows:
audience, expiry, bound pod), the address it was presented from, proof of possession, names. Each "no" is a
`core.ca.Refusal`. This program holds the issuer's key and does nothing else.

The address: our own sidecar sets `mantle-client-addr` to the caller's address, and strips it from everyone. Without
that header the connection's own address counts, and on loopback only identity's own sidecar can be calling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mantle.control.answers import Context, peer_address
from mantle.core import ca
from mantle.core.ca import Refusal
from mantle.core.csr import check_csr
from mantle.core.model import Key
from mantle.core.names import BadName, MeshNames, Workload
from mantle.core.ratelimit import Limited, RateLimiter
from mantle.core.reasons import CertifyRefused
from mantle.gen.io.linkerd.proxy import identity_pb2 as pb
from mantle.platform.port import Event, Platform, PlatformUnavailable, TokenClaims, TokenRejected

log = logging.getLogger(__name__)

SERVICE = "io.linkerd.proxy.identity.Identity"
DEPLOYMENT = Key("mantle", "mantle-identity")
"""Whom events about the issuer are about."""
MAX_IN_FLIGHT = 64
"""Certify calls at once; one more waits for none of them, it is refused and retried by the proxy (with jitter)."""
MAX_TOKEN = 16 * 1024
MAX_CSR = 8 * 1024
CLIENT_ADDRESS = "mantle-client-addr"
_FLOOD = (CertifyRefused.RATE_LIMITED, CertifyRefused.BUSY)

_STATUS = {
    CertifyRefused.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    CertifyRefused.BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    CertifyRefused.MISSING_IDENTITY: grpc.StatusCode.INVALID_ARGUMENT,
    CertifyRefused.MISSING_TOKEN: grpc.StatusCode.INVALID_ARGUMENT,
    CertifyRefused.MISSING_CSR: grpc.StatusCode.INVALID_ARGUMENT,
    CertifyRefused.TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    CertifyRefused.ISSUER_NOT_READY: grpc.StatusCode.UNAVAILABLE,
    CertifyRefused.ISSUER_EXPIRED: grpc.StatusCode.UNAVAILABLE,
    CertifyRefused.ISSUER_NOT_YET_VALID: grpc.StatusCode.UNAVAILABLE,
    CertifyRefused.ISSUER_UNUSABLE: grpc.StatusCode.UNAVAILABLE,
    CertifyRefused.PLATFORM_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    CertifyRefused.TOKEN_REJECTED: grpc.StatusCode.FAILED_PRECONDITION,
    CertifyRefused.OTHER_ADDRESS: grpc.StatusCode.PERMISSION_DENIED,
    CertifyRefused.OTHER_POD_ON_LOOPBACK: grpc.StatusCode.PERMISSION_DENIED,
    CertifyRefused.CSR_MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    CertifyRefused.CSR_KEY_UNSUPPORTED: grpc.StatusCode.INVALID_ARGUMENT,
    CertifyRefused.CSR_NOT_PROVEN: grpc.StatusCode.FAILED_PRECONDITION,
    CertifyRefused.CSR_NAMES: grpc.StatusCode.FAILED_PRECONDITION,
    CertifyRefused.NAME_REFUSED: grpc.StatusCode.FAILED_PRECONDITION,
    CertifyRefused.IDENTITY_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    CertifyRefused.SIGNING_FAILED: grpc.StatusCode.INTERNAL,
}


class IssuerFiles:
    """The issuer as three files say it is; read again when one of them changed."""

    def __init__(
        self,
        certificate: Path,
        key: Path,
        roots: Path,
        tell: Callable[[Event], None] = lambda _: None,
        deployment: Key = DEPLOYMENT,
    ) -> None:
        self._paths = (certificate, key, roots)
        self._tell, self._deployment = tell, deployment
        self._seen: tuple[tuple[int, int], ...] | None = None
        self.current: ca.Issuer | Refusal = Refusal(
            CertifyRefused.ISSUER_NOT_READY,
            "no issuer",
            "an issuer's certificate, key and trust roots",
            "wait: identity reads its files when it starts",
        )

    def refresh(self) -> None:
        """Reads the files if they changed. What cannot be used does not replace an issuer that can."""
        try:
            stats = [path.stat() for path in self._paths]
            seen = tuple((stat.st_mtime_ns, stat.st_ino) for stat in stats)
            if seen == self._seen:
                return
            self._seen = seen
            loaded = ca.load_issuer(*(path.read_bytes() for path in self._paths))
        except OSError as error:
            loaded = Refusal(
                CertifyRefused.ISSUER_NOT_READY,
                str(error),
                "three readable files",
                "check --issuer-cert and the others",
            )
        if isinstance(loaded, Refusal) and isinstance(self.current, ca.Issuer):
            log.error("IssuerUpdateSkipped: keeping the issuer there is: %s", loaded)
            skipped = f"skipping the issuer's update, the one before is used on: {loaded}"
            self._tell(about_deployment(self._deployment, "IssuerUpdateSkipped", skipped, warning=True))
            return
        first, self.current = not isinstance(self.current, ca.Issuer), loaded
        if isinstance(loaded, Refusal):
            log.error("the issuer cannot be used: %s", loaded)
            problem = f"the issuer cannot be used: {loaded}"
            self._tell(about_deployment(self._deployment, "IssuerValidationFailed", problem, warning=True))
            return
        until = f"{loaded.not_after:%Y-%m-%dT%H:%M:%SZ}"
        log.info("%s: issuing until %s", "the issuer is loaded" if first else "IssuerUpdated", until)
        if not first:
            updated = f"updated the identity issuer: issuing until {until}"
            self._tell(about_deployment(self._deployment, "IssuerUpdated", updated))


def about_deployment(deployment: Key, reason: str, message: str, warning: bool = False) -> Event:
    return Event("Deployment", deployment.namespace, deployment.name, reason, message, warning)


class Metrics:
    """What is counted of certificates."""

    def __init__(self, registry: CollectorRegistry, issuer: IssuerFiles, now: Callable[[], datetime]) -> None:
        self.certify = Counter(
            "mantle_identity_certify",
            "Certify calls: `issued`, or the reason and, for a refused token, its own.",
            ["result", "token_reason"],
            registry=registry,
        )
        call = {"grpc_service": SERVICE, "grpc_method": "Certify", "grpc_type": "unary"}
        self.started = Counter("grpc_server_started", "Calls begun.", list(call), registry=registry).labels(**call)
        self.handled = Counter(
            "grpc_server_handled", "Calls ended, by status.", [*call, "grpc_code"], registry=registry
        )
        self.seconds = Histogram(
            "grpc_server_handling_seconds", "How long calls took.", list(call), registry=registry
        ).labels(**call)
        self._call = call
        self.in_flight = Gauge("mantle_identity_certify_in_flight", "Certify calls at work.", registry=registry)

        def ttl() -> float:
            current = issuer.current
            return (current.not_after - now()).total_seconds() if isinstance(current, ca.Issuer) else 0.0

        Gauge("issuer_cert_ttl_seconds", "Seconds until the issuer's chain expires.", registry=registry).set_function(
            ttl
        )

    def ended(self, code: str, seconds: float) -> None:
        """A call is over; `code` as gRPC spells it (`OK`, `FailedPrecondition`)."""
        self.handled.labels(**self._call, grpc_code=code).inc()
        self.seconds.observe(seconds)


@dataclass(slots=True)
class Certifier:
    """Everything it takes to answer Certify. `now` is the wall clock (aware), `ticks` a monotonic one in seconds."""

    names: MeshNames
    platform: Platform
    issuer: IssuerFiles
    audiences: Sequence[str]
    own_pod: Key | None
    lifetime: timedelta
    skew: timedelta
    limiter: RateLimiter
    metrics: Metrics
    now: Callable[[], datetime]
    ticks: Callable[[], float]
    entropy: Callable[[int], bytes]
    tell: Callable[[Event], None] = lambda _: None
    """Takes events for the objects they are about."""
    deployment: Key = DEPLOYMENT
    check_address: bool = True
    """Refuse a token that comes from another address than its pod's. False for networks that rewrite addresses."""
    in_flight: int = 0

    async def certify(self, request: pb.CertifyRequest, address: str, loopback: bool) -> ca.Leaf | Refusal:
        """The answer to one request presented from `address`; `loopback`: nobody vouches for an address, it came from
        this pod.
        """
        limited = self.limiter.admit(address, self.ticks())
        if isinstance(limited, Limited):
            wait = f"retry after {limited.retry_after:.1f} s"
            return Refusal(CertifyRefused.RATE_LIMITED, f"too many requests from {address}", "fewer", wait)
        if self.in_flight >= MAX_IN_FLIGHT:
            return Refusal(
                CertifyRefused.BUSY, f"{self.in_flight} requests at work", f"fewer than {MAX_IN_FLIGHT}", "retry"
            )
        self.in_flight += 1
        self.metrics.in_flight.set(self.in_flight)
        try:
            return await self._certify(request, address, loopback)
        finally:
            self.in_flight -= 1
            self.metrics.in_flight.set(self.in_flight)

    async def _certify(self, request: pb.CertifyRequest, address: str, loopback: bool) -> ca.Leaf | Refusal:
        if (incomplete := check_fields(request)) is not None:
            return incomplete
        issuer = self.issuer.current
        valid = issuer if isinstance(issuer, Refusal) else ca.check_issuer(issuer, self.now())
        if isinstance(valid, Refusal):
            problem = f"{valid} - CSR identity: {request.identity[:253]}"
            self.tell(about_deployment(self.deployment, "IssuerValidationFailed", problem, warning=True))
            return valid
        claims = await self._review(request.token)
        if isinstance(claims, Refusal):
            return claims
        if (elsewhere := self._check_address(claims, address, loopback)) is not None:
            return elsewhere
        csr = check_csr(request.certificate_signing_request, request.identity)
        if isinstance(csr, Refusal):
            return csr
        workload = self._check_name(request.identity, claims)
        if isinstance(workload, Refusal):
            return workload
        wanted = ca.template(
            valid, csr, workload, self.names, self.now(), self.entropy(ca.SERIAL_BYTES), self.lifetime, self.skew
        )
        leaf = _unnameable(wanted) if isinstance(wanted, BadName) else ca.sign(valid, wanted)
        if isinstance(leaf, ca.Leaf):
            until = f"{leaf.not_after:%Y-%m-%dT%H:%M:%SZ}"
            message = f"issued certificate for {request.identity} until {until}: {leaf.sha256}"
            account = workload.namespace, workload.service_account
            self.tell(Event("ServiceAccount", *account, "IssuedLeafCertificate", message))
        return leaf

    async def _review(self, token: bytes) -> TokenClaims | Refusal:
        audiences = " or ".join(self.audiences)
        try:
            outcome = await self.platform.review_token(token, self.audiences)
        except PlatformUnavailable as error:
            return Refusal(
                CertifyRefused.PLATFORM_UNAVAILABLE,
                f"no answer about the token ({error})",
                "a review by the platform",
                f"{error.fix}; the proxy tries again by itself",
            )
        if isinstance(outcome, TokenRejected):
            return Refusal(
                CertifyRefused.TOKEN_REJECTED,
                f"a token that the platform refused ({outcome.detail})",
                f"a valid token of a running pod for the audience {audiences}",
                "use the pod's own projected token, freshly read from its file",
                detail=outcome.reason,
            )
        return outcome

    def _check_address(self, claims: TokenClaims, address: str, loopback: bool) -> Refusal | None:
        """A token is good only where its pod is: stolen and presented elsewhere, it is worth nothing."""
        fix = "ask from the pod that the token was made for"
        if loopback:
            if self.own_pod is not None and self.own_pod == Key(claims.namespace, claims.pod):
                return None
            return Refusal(
                CertifyRefused.OTHER_POD_ON_LOOPBACK,
                f"a token of the pod {claims.namespace}/{claims.pod} over loopback",
                f"a token of identity's own pod {self.own_pod}",
                fix,
            )
        if not self.check_address or (claims.pod_ip and address in (claims.pod_ip, *claims.more_pod_ips)):
            return None
        return Refusal(
            CertifyRefused.OTHER_ADDRESS,
            f"a token of the pod {claims.namespace}/{claims.pod} presented from {address}",
            f"the pod's own address {claims.pod_ip or '(it has none)'}",
            f"{fix}; where the network rewrites addresses of pods, install with identity.checkAddress=false",
        )

    def _check_name(self, identity: str, claims: TokenClaims) -> Workload | Refusal:
        requested = self.names.parse_identity(identity)
        if isinstance(requested, BadName):
            return _unnameable(requested)
        owner = Workload(claims.namespace, claims.service_account)
        if requested != owner:
            return Refusal(
                CertifyRefused.IDENTITY_MISMATCH,
                f"a request for {requested} with a token of {owner}",
                "the identity of the token's own service account",
                "set the proxy's identity to its pod's service account",
            )
        return requested


def handler(certifier: Certifier) -> grpc.GenericRpcHandler[Any, Any]:
    """The service, to be given to `grpc.aio.Server.add_generic_rpc_handlers`."""

    async def certify(request: pb.CertifyRequest, context: Context) -> bytes:
        metadata = context.invocation_metadata() or ()
        vouched = next((str(value) for name, value in metadata if name == CLIENT_ADDRESS), "")
        address = vouched or peer_address(context)
        loopback = not vouched and address in ("127.0.0.1", "::1")
        certifier.metrics.started.inc()
        began = certifier.ticks()
        answer = await certifier.certify(request, address, loopback)
        code = _STATUS[answer.reason].name if isinstance(answer, Refusal) else "OK"
        certifier.metrics.ended(_as_grpc_spells_it(code), certifier.ticks() - began)
        if isinstance(answer, Refusal):
            certifier.metrics.certify.labels(answer.reason, answer.detail).inc()
            # A flood is counted; a line for each would be a second flood.
            level = logging.DEBUG if answer.reason in _FLOOD else logging.WARNING
            log.log(level, "refused a certificate for %s from %s: %s", request.identity[:253], address, answer)
            context.set_trailing_metadata((("mantle-reason", answer.reason.value),))
            await context.abort(_STATUS[answer.reason], str(answer))
        certifier.metrics.certify.labels("issued", "").inc()
        until = f"{answer.not_after:%Y-%m-%dT%H:%M:%SZ}"
        log.info("issued certificate for %s until %s: %s", request.identity, until, answer.sha256)
        return pb.CertifyResponse(
            leaf_certificate=answer.der,
            intermediate_certificates=answer.intermediates,
            valid_until=Timestamp(seconds=int(answer.not_after.timestamp())),
        ).SerializeToString()

    return grpc.method_handlers_generic_handler(
        SERVICE,
        {"Certify": grpc.unary_unary_rpc_method_handler(certify, pb.CertifyRequest.FromString, None)},
    )


def _as_grpc_spells_it(code: str) -> str:
    """`FAILED_PRECONDITION` → `FailedPrecondition`, which is what dashboards ask for."""
    return code if code == "OK" else code.title().replace("_", "")


def check_fields(request: pb.CertifyRequest) -> Refusal | None:
    """What is missing from a request, or too large to be looked at."""
    fix = "send identity, token and certificate_signing_request (PKCS#10 in DER)"
    for field, reason in (
        ("identity", CertifyRefused.MISSING_IDENTITY),
        ("token", CertifyRefused.MISSING_TOKEN),
        ("certificate_signing_request", CertifyRefused.MISSING_CSR),
    ):
        if not getattr(request, field):
            return Refusal(reason, f"a request without {field}", "all three fields", fix)
    for what, size, most in (
        ("token", len(request.token), MAX_TOKEN),
        ("request", len(request.certificate_signing_request), MAX_CSR),
    ):
        if size > most:
            return Refusal(CertifyRefused.TOO_LARGE, f"a {what} of {size} octets", f"at most {most}", fix)
    return None


def _unnameable(bad: BadName) -> Refusal:
    fix = "ask for <service-account>.<namespace>… of this mesh, with names Kubernetes allows"
    return Refusal(CertifyRefused.NAME_REFUSED, repr(bad.found), bad.wanted, fix, detail=bad.reason)
