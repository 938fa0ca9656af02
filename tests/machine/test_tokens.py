"""Tokens: whom they belong to, and every reason to refuse one, on virtual time."""

from __future__ import annotations

import json

import pytest

from mantle.core.reasons import TokenReason
from mantle.platform.machine import tokens
from mantle.platform.port import TokenClaims, TokenRejected

KEY, OTHER_MESH = tokens.new_key(), tokens.new_key()
WHO = tokens.Subject("shop", "web", "web-1", "uid-1")
POD = tokens.BoundPod("web-1", "shop", "web", "10.203.0.5")
AUDIENCE = "identity.mantle.dev"


def review(
    token: str | bytes, *, audience: str = AUDIENCE, now: float = 1000.0, pod: tokens.BoundPod | None = POD
) -> TokenClaims | TokenRejected:
    raw = token if isinstance(token, bytes) else token.encode()
    return tokens.review(KEY, raw, [audience], now, lambda uid: pod if uid == "uid-1" else None)


def test_a_good_token_names_its_pod_and_address() -> None:
    assert review(tokens.sign(KEY, WHO, AUDIENCE, 3600, 1000)) == TokenClaims(
        "shop", "web", "web-1", "uid-1", "10.203.0.5"
    )


@pytest.mark.parametrize(
    ("token", "options", "reason"),
    [
        (tokens.sign(OTHER_MESH, WHO, AUDIENCE, 3600, 1000), {}, TokenReason.BAD_SIGNATURE),
        (tokens.sign(KEY, WHO, "someone-else", 3600, 1000), {}, TokenReason.WRONG_AUDIENCE),
        (tokens.sign(KEY, WHO, "", 3600, 1000), {}, TokenReason.WRONG_AUDIENCE),
        (tokens.sign(KEY, WHO, AUDIENCE, 600, 100), {}, TokenReason.EXPIRED),
        (tokens.sign(KEY, WHO, AUDIENCE, 600, 2000), {}, TokenReason.NOT_YET_VALID),
        (tokens.sign(KEY, WHO, AUDIENCE, 3600, 1000), {"pod": None}, TokenReason.POD_GONE),
        (
            tokens.sign(KEY, WHO, AUDIENCE, 3600, 1000),
            {"pod": tokens.BoundPod("web-2", "shop", "web", "10.203.0.5")},
            TokenReason.POD_GONE,
        ),
        ("not.a.token", {}, TokenReason.MALFORMED),
        (b"\xff\xfe", {}, TokenReason.MALFORMED),
        ("a" * 9000, {}, TokenReason.MALFORMED),
        ("", {}, TokenReason.MALFORMED),
        # `alg: none`, header and claims without a signature
        ("eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.", {}, TokenReason.MALFORMED),
    ],
)
def test_refusals(token: str | bytes, options: dict[str, object], reason: TokenReason) -> None:
    outcome = review(token, **options)  # type: ignore[arg-type]
    assert isinstance(outcome, TokenRejected)
    assert outcome.reason == reason and outcome.detail


def test_the_key_survives_its_file_and_the_jwks_has_no_private_part() -> None:
    again = tokens.load_key(tokens.key_pem(KEY))
    assert isinstance(
        tokens.review(again, tokens.sign(KEY, WHO, AUDIENCE, 3600, 0).encode(), [AUDIENCE], 1, lambda _: POD),
        TokenClaims,
    )
    (public,) = json.loads(tokens.jwks(KEY))["keys"]
    assert "d" not in public and public["kid"] == KEY.kid


def test_a_token_is_renewed_before_it_expires() -> None:
    assert tokens.renew_at(1000.0, 3600) == 1000 + 2880
