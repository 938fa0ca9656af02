"""Certify through a real gRPC server: what is issued, and each refusal with its status, reason, message and count."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from discovery_play import IDENTITY, MESH, FakePlatform
from prometheus_client import CollectorRegistry

from mantle.control import identity
from mantle.control.app import grpc_server
from mantle.core import ca
from mantle.core.model import Key
from mantle.core.ratelimit import RateLimiter
from mantle.core.reasons import CertifyRefused, TokenReason
from mantle.gen.io.linkerd.proxy import identity_pb2 as pb
from mantle.platform.port import TokenClaims, TokenRejected
from mantle.platform.remote import PlatformUnavailable

NOW = datetime(2026, 11, 24, 8, 0, tzinfo=UTC)
WEB = IDENTITY.format("web", "emojivoto")
OWN = IDENTITY.format("mantle-identity", "mantle")
REVIEWS: dict[bytes, TokenClaims | TokenRejected] = {
    b"web's": TokenClaims("emojivoto", "web", "web-1", "uid-1", "10.203.0.5"),
    b"emoji's": TokenClaims("emojivoto", "emoji", "emoji-1", "uid-2", "10.203.0.5"),
    b"own": TokenClaims("mantle", "mantle-identity", "mantle-identity-x", "uid-3", "10.203.0.2"),
    b"unplaced": TokenClaims("emojivoto", "web", "web-2", "uid-4", ""),
    b"expired": TokenRejected(TokenReason.EXPIRED, "expired 5 s ago"),
    b"for another": TokenRejected(TokenReason.WRONG_AUDIENCE, "audience vault"),
    b"of a dead pod": TokenRejected(TokenReason.POD_GONE, "emojivoto/web-0"),
}


def csr(name: str = WEB) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


CSR = csr()


@dataclass
class Identity:
    """A running identity server, and how to ask it."""

    platform: FakePlatform
    certifier: identity.Certifier
    registry: CollectorRegistry
    call: Any
    trust: ca.Trust
    clock: list[datetime] = field(default_factory=lambda: [NOW])

    async def ask(self, address: str | None = "10.203.0.5", **changes: Any) -> pb.CertifyResponse:
        """Asks as web's proxy; our sidecar names the address. `address=None`: over loopback, nobody names one."""
        fields = {"identity": WEB, "token": b"web's", "certificate_signing_request": CSR} | changes
        metadata = (("mantle-client-addr", address),) if address is not None else ()
        answer: pb.CertifyResponse = await self.call(pb.CertifyRequest(**fields), metadata=metadata, timeout=60)
        return answer

    def counted(self, result: str) -> float:
        """Calls that ended with `result`, whatever their token's reason."""
        return sum(
            sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "mantle_identity_certify_total" and sample.labels["result"] == result
        )


@asynccontextmanager
async def running(directory: Path, rate: float = 1000.0, burst: int = 1000) -> AsyncIterator[Identity]:
    trust = ca.make_trust(MESH.names, NOW, (b"\x01" * 16, b"\x02" * 16))
    write(directory, trust)
    issuer = identity.IssuerFiles(directory / "crt.pem", directory / "key.pem", directory / "roots.pem")
    issuer.refresh()
    clock, ticks, serials = [NOW], count(), count(1)
    registry, platform = CollectorRegistry(), FakePlatform(reviews=REVIEWS)
    certifier = identity.Certifier(
        names=MESH.names,
        platform=platform,
        issuer=issuer,
        audiences=["identity.mantle.dev"],
        own_pod=Key("mantle", "mantle-identity-x"),
        lifetime=timedelta(hours=24),
        skew=timedelta(seconds=20),
        limiter=RateLimiter(rate, burst),
        metrics=identity.Metrics(registry, issuer, lambda: clock[0]),
        now=lambda: clock[0],
        ticks=lambda: float(next(ticks)),
        entropy=lambda size: next(serials).to_bytes(size, "big"),
    )
    async with (
        grpc_server(("127.0.0.1", 0), [identity.handler(certifier)], grace=0.0) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        call = channel.unary_unary(
            "/io.linkerd.proxy.identity.Identity/Certify",
            request_serializer=pb.CertifyRequest.SerializeToString,
            response_deserializer=pb.CertifyResponse.FromString,
        )
        yield Identity(platform, certifier, registry, call, trust, clock)


def write(directory: Path, trust: ca.Trust) -> None:
    (directory / "crt.pem").write_bytes(trust.issuer_pem)
    (directory / "key.pem").write_bytes(trust.issuer_key_pem)
    (directory / "roots.pem").write_bytes(trust.roots_pem)


async def refused(server: Identity, **question: Any) -> tuple[grpc.StatusCode, str, str]:
    """(status, reason of the trailer, message) of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.ask(**question)
    trailers = dict(caught.value.trailing_metadata() or ())
    return caught.value.code(), str(trailers["mantle-reason"]), caught.value.details() or ""


# ---- issued ----


def test_a_pod_gets_a_certificate_of_its_service_account(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        async with running(tmp_path) as server:
            answer = await server.ask()
            leaf = x509.load_der_x509_certificate(answer.leaf_certificate)
            issuer = x509.load_pem_x509_certificate(server.trust.issuer_pem)
            leaf.verify_directly_issued_by(issuer)
            assert list(answer.intermediate_certificates) == [issuer.public_bytes(serialization.Encoding.DER)]
            until = NOW + timedelta(hours=24, seconds=20)
            assert answer.valid_until.ToDatetime(UTC) == leaf.not_valid_after_utc == until
            assert server.platform.asked == [(b"web's", ("identity.mantle.dev",))]
            assert server.counted("issued") == 1
            second = await server.ask(certificate_signing_request=csr())
            again = x509.load_der_x509_certificate(second.leaf_certificate)
            assert again.serial_number != leaf.serial_number

    with caplog.at_level(logging.INFO, "mantle.control.identity"):
        asyncio.run(play())
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("issued certificate")]
    assert len(lines) == 2
    assert f"issued certificate for {WEB} until 2026-11-25T08:00:20Z: " in lines[0]
    assert "web's" not in caplog.text, "tokens are never logged"


def test_identitys_own_sidecar_is_certified_over_loopback(tmp_path: Path) -> None:
    async def play() -> None:
        async with running(tmp_path) as server:
            mine = {"identity": OWN, "token": b"own", "certificate_signing_request": csr(OWN)}
            assert (await server.ask(None, **mine)).leaf_certificate
            assert (await server.ask("10.203.0.2", **mine)).leaf_certificate
            code, reason, message = await refused(server, address=None)
            assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "other_pod_on_loopback")
            assert "emojivoto/web-1" in message and "mantle/mantle-identity-x" in message

    asyncio.run(play())


def test_where_the_network_rewrites_addresses_the_pod_alone_counts(tmp_path: Path) -> None:
    async def play() -> None:
        async with running(tmp_path) as server:
            assert "identity.checkAddress=false" in (await refused(server, address="10.203.0.6"))[2]
            server.certifier.check_address = False
            assert (await server.ask("10.203.0.6")).leaf_certificate
            code, reason, _ = await refused(server, address="10.203.0.6", token=b"of a dead pod")
            assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "token_rejected")
            assert (await refused(server, address=None))[1] == "other_pod_on_loopback"

    asyncio.run(play())


# ---- refused, one by one ----

UNPROVEN = CSR[:-1] + bytes([CSR[-1] ^ 1])
EMOJI = IDENTITY.format("emoji", "emojivoto")


@pytest.mark.parametrize(
    ("question", "status", "reason", "words"),
    [
        ({"identity": ""}, "INVALID_ARGUMENT", CertifyRefused.MISSING_IDENTITY, "without identity"),
        ({"token": b""}, "INVALID_ARGUMENT", CertifyRefused.MISSING_TOKEN, "without token"),
        ({"certificate_signing_request": b""}, "INVALID_ARGUMENT", CertifyRefused.MISSING_CSR, "without certificate"),
        ({"token": b"t" * 20_000}, "INVALID_ARGUMENT", CertifyRefused.TOO_LARGE, "20000 octets"),
        ({"certificate_signing_request": b"c" * 9_000}, "INVALID_ARGUMENT", CertifyRefused.TOO_LARGE, "9000 octets"),
        ({"token": b"expired"}, "FAILED_PRECONDITION", CertifyRefused.TOKEN_REJECTED, "expired 5 s ago"),
        ({"token": b"for another"}, "FAILED_PRECONDITION", CertifyRefused.TOKEN_REJECTED, "identity.mantle.dev"),
        ({"token": b"of a dead pod"}, "FAILED_PRECONDITION", CertifyRefused.TOKEN_REJECTED, "pod_gone"),
        ({"address": "10.203.0.6"}, "PERMISSION_DENIED", CertifyRefused.OTHER_ADDRESS, "presented from 10.203.0.6"),
        ({"token": b"unplaced"}, "PERMISSION_DENIED", CertifyRefused.OTHER_ADDRESS, "it has none"),
        ({"certificate_signing_request": b"0ba"}, "INVALID_ARGUMENT", CertifyRefused.CSR_MALFORMED, "cannot be parsed"),
        ({"certificate_signing_request": UNPROVEN}, "FAILED_PRECONDITION", CertifyRefused.CSR_NOT_PROVEN, "not make"),
        ({"identity": EMOJI}, "FAILED_PRECONDITION", CertifyRefused.CSR_NAMES, f"found DNS:{WEB}"),
        ({"token": b"emoji's"}, "FAILED_PRECONDITION", CertifyRefused.IDENTITY_MISMATCH, "emoji.emojivoto"),
        (
            {"identity": "web.other.mesh", "certificate_signing_request": csr("web.other.mesh")},
            "FAILED_PRECONDITION",
            CertifyRefused.NAME_REFUSED,
            "other_mesh",
        ),
    ],
)
def test_each_refusal_names_what_was_found(
    tmp_path: Path, question: dict[str, Any], status: str, reason: CertifyRefused, words: str
) -> None:
    async def play() -> None:
        async with running(tmp_path) as server:
            code, label, message = await refused(server, **question)
            assert (code.name, label) == (status, reason.value)
            assert words in message and "; wanted " in message and "; fix: " in message
            assert server.counted(reason) == 1

    asyncio.run(play())


def test_the_order_is_cheap_things_first(tmp_path: Path) -> None:
    """All is wrong at once and put right one thing at a time: the refusals come in the documented order."""
    stranger = IDENTITY.format("x", "emojivoto")

    async def play() -> None:
        async with running(tmp_path) as server:
            question: dict[str, Any] = {
                "identity": "",
                "token": b"expired",
                "address": "10.203.0.9",
                "certificate_signing_request": b"garbage",
            }
            server.clock[0] = NOW + timedelta(days=400)
            seen = [(await refused(server, **question))[1]]
            question["identity"] = stranger
            seen.append((await refused(server, **question))[1])
            server.clock[0] = NOW
            for repair in (
                {"token": b"web's"},
                {"address": "10.203.0.5"},
                {"certificate_signing_request": csr(stranger)},
            ):
                seen.append((await refused(server, **question))[1])
                question |= repair
            seen.append((await refused(server, **question))[1])
            assert seen == [
                CertifyRefused.MISSING_IDENTITY,
                CertifyRefused.ISSUER_EXPIRED,
                CertifyRefused.TOKEN_REJECTED,
                CertifyRefused.OTHER_ADDRESS,
                CertifyRefused.CSR_MALFORMED,
                CertifyRefused.IDENTITY_MISMATCH,
            ]

    asyncio.run(play())


def test_a_platform_that_does_not_answer_is_a_refusal_to_be_retried(tmp_path: Path) -> None:
    async def away() -> None:
        raise PlatformUnavailable("unavailable: no such socket")

    async def play() -> None:
        async with running(tmp_path) as server:
            server.platform.before_review = away
            code, reason, message = await refused(server)
            assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "platform_unavailable")
            assert "no such socket" in message
            server.platform.before_review = None
            assert (await server.ask()).leaf_certificate

    asyncio.run(play())


def test_one_address_is_rate_limited_and_others_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        async with running(tmp_path, rate=0.001, burst=2) as server:
            await server.ask()
            await server.ask()
            code, reason, message = await refused(server)
            assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limited")
            assert "10.203.0.5" in message and "retry after" in message
            assert server.counted("rate_limited") == 1
            assert "rate_limited" not in caplog.text, "a flood is counted, not logged"
            assert len(server.platform.asked) == 2, "the platform is not asked for what is refused anyway"
            assert (await refused(server, address="10.203.0.6"))[1] == "other_address"

    asyncio.run(play())


def test_the_sixty_fifth_at_once_is_refused_and_the_others_are_served(tmp_path: Path) -> None:
    async def play() -> None:
        async with running(tmp_path) as server:
            gate, full = asyncio.Event(), asyncio.Event()

            async def hold() -> None:
                if server.certifier.in_flight == identity.MAX_IN_FLIGHT:
                    full.set()
                await gate.wait()

            server.platform.before_review = hold
            async with asyncio.TaskGroup() as tasks:
                held = [tasks.create_task(server.ask()) for _ in range(identity.MAX_IN_FLIGHT)]
                await asyncio.wait_for(full.wait(), 60)
                code, reason, _ = await refused(server)
                assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")
                gate.set()
            assert all(task.result().leaf_certificate for task in held)
            assert server.registry.get_sample_value("mantle_identity_certify_in_flight") == 0

    asyncio.run(play())


# ---- the issuer's files ----


def test_a_missing_issuer_is_unavailable_until_it_is_there(tmp_path: Path) -> None:
    async def play() -> None:
        async with running(tmp_path) as server:
            fresh = identity.IssuerFiles(tmp_path / "crt.pem", tmp_path / "none", tmp_path / "roots.pem")
            server.certifier.issuer = fresh
            assert (await refused(server))[:2] == (grpc.StatusCode.UNAVAILABLE, "issuer_not_ready")
            fresh.refresh()
            assert "none" in (await refused(server))[2]
            (tmp_path / "none").write_bytes(server.trust.issuer_key_pem)
            fresh.refresh()
            assert (await server.ask()).leaf_certificate

    asyncio.run(play())


def test_a_new_issuer_is_taken_without_a_restart_and_a_broken_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        async with running(tmp_path) as server:
            other = ca.make_trust(MESH.names, NOW, (b"\x03" * 16, b"\x04" * 16))
            (tmp_path / "crt.pem").write_bytes(other.issuer_pem)
            server.certifier.issuer.refresh()
            assert "IssuerUpdateSkipped" in caplog.text
            old = x509.load_pem_x509_certificate(server.trust.issuer_pem)
            leaf = x509.load_der_x509_certificate((await server.ask()).leaf_certificate)
            leaf.verify_directly_issued_by(old)
            write(tmp_path, other)
            server.certifier.issuer.refresh()
            leaf = x509.load_der_x509_certificate((await server.ask()).leaf_certificate)
            leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(other.issuer_pem))

    asyncio.run(play())


def test_the_issuers_remaining_time_is_a_metric(tmp_path: Path) -> None:
    async def play() -> None:
        async with running(tmp_path) as server:
            server.clock[0] = NOW + timedelta(days=364)
            assert server.registry.get_sample_value("issuer_cert_ttl_seconds") == 86400.0

    asyncio.run(play())


def test_every_reason_has_a_status() -> None:
    assert set(identity._STATUS) == set(CertifyRefused)
