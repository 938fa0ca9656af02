"""The cluster's keys are never the weaker way: what a TokenReview would refuse, they refuse."""

from __future__ import annotations

import base64
import hmac
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, RSAKey

from mantle.core.model import Key, Owner, Pod
from mantle.core.reasons import TokenReason
from mantle.platform.kubernetes.tokens import Bound, Keys, judge_claims, judge_pod, judge_review
from mantle.platform.kubernetes.tokens import _Review as Review  # the API's answer
from mantle.platform.port import TokenClaims, TokenRejected

NOW = 1_800_000_000.0
WANTED = ["identity.mantle.dev"]
SIGNING = RSAKey.generate_key(2048)
SIGNING.ensure_kid()
KEYS = Keys("https://cluster", KeySet([RSAKey.import_key(SIGNING.as_dict(private=False))]), 0.0)
ACCOUNTS = {Key("emojivoto", "web"): "account-uid"}
BOUND = Bound("emojivoto", "web", "web-1", "pod-uid")
POD = Pod(Key("emojivoto", "web-1"), "pod-uid", "10.0.0.1", "web", Owner("Deployment", "web"))


def claims(**changes: Any) -> dict[str, Any]:
    inner = {
        "namespace": "emojivoto",
        "serviceaccount": {"name": "web", "uid": "account-uid"},
        "pod": {"name": "web-1", "uid": "pod-uid"},
        "node": {"name": "n1", "uid": "node-uid"},
    } | changes.pop("inner", {})
    body = {
        "iss": "https://cluster",
        "sub": "system:serviceaccount:emojivoto:web",
        "aud": ["identity.mantle.dev"],
        "nbf": NOW - 10,
        "iat": NOW - 10,
        "exp": NOW + 3600,
        "kubernetes.io": inner,
    }
    return body | changes


def token(key: Any = SIGNING, algorithm: str = "RS256", **changes: Any) -> bytes:
    header = {"alg": algorithm, "kid": key.kid or SIGNING.kid}
    return jwt.encode(header, claims(**changes), key, algorithms=[algorithm]).encode()


def test_a_good_token_is_its_pods() -> None:
    assert judge_claims(KEYS, token(), WANTED, NOW, ACCOUNTS) == BOUND


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iss": "https://elsewhere"}, TokenReason.WRONG_ISSUER),
        ({"aud": ["vault"]}, TokenReason.WRONG_AUDIENCE),
        ({"aud": []}, TokenReason.WRONG_AUDIENCE),
        ({"exp": NOW}, TokenReason.EXPIRED),
        ({"exp": None}, TokenReason.MALFORMED),
        ({"nbf": NOW + 1}, TokenReason.NOT_YET_VALID),
        ({"inner": {"pod": None}}, TokenReason.NOT_BOUND),
        ({"inner": {"serviceaccount": {"name": "web", "uid": "an older account"}}}, TokenReason.OTHER_SERVICE_ACCOUNT),
        ({"inner": {"serviceaccount": {"name": "web"}}}, TokenReason.MALFORMED),
        ({"sub": "system:serviceaccount:emojivoto:admin"}, TokenReason.MALFORMED),
        ({"kubernetes.io": "text"}, TokenReason.MALFORMED),
    ],
    ids=lambda value: str(value)[:50],
)
def test_each_claim_is_checked(changes: dict[str, Any], reason: TokenReason) -> None:
    refused = judge_claims(KEYS, token(**changes), WANTED, NOW, ACCOUNTS)
    assert isinstance(refused, TokenRejected)
    assert refused.reason == reason, refused.detail


def test_an_account_that_is_gone_has_no_tokens() -> None:
    refused = judge_claims(KEYS, token(), WANTED, NOW, {})
    assert isinstance(refused, TokenRejected)
    assert refused.reason == TokenReason.OTHER_SERVICE_ACCOUNT


def forged() -> dict[str, bytes]:
    other, curve = RSAKey.generate_key(2048), ECKey.generate_key("P-256")
    head, body, signature = token().split(b".")
    by_secret = b64(b'{"alg":"HS256","kid":"%b"}' % SIGNING.kid.encode()) + b"." + body
    secret = SIGNING.as_pem(private=False)
    return {
        "another key": token(other),
        "another kind of key": token(curve, "ES256"),
        "the public key as a secret": by_secret + b"." + b64(hmac.digest(secret, by_secret, "sha256")),
        "none": b64(b'{"alg":"none"}') + b"." + body + b".",
        "no signature": head + b"." + body + b".",
        "another body": b".".join((head, token(sub="x").split(b".")[1], signature)),
    }


def b64(octets: bytes) -> bytes:
    return base64.urlsafe_b64encode(octets).rstrip(b"=")


@pytest.mark.parametrize(
    "way", ["another key", "another kind of key", "the public key as a secret", "none", "no signature", "another body"]
)
def test_a_forged_token_is_refused(way: str) -> None:
    refused = judge_claims(KEYS, forged()[way], WANTED, NOW, ACCOUNTS)
    assert isinstance(refused, TokenRejected)
    assert refused.reason == TokenReason.BAD_SIGNATURE


@pytest.mark.parametrize("text", [b"", b"a.b.c", b"\xff\xfe", b"not a token", b"a.b"])
def test_what_is_no_token_is_refused(text: bytes) -> None:
    refused = judge_claims(KEYS, text, WANTED, NOW, ACCOUNTS)
    assert isinstance(refused, TokenRejected)
    assert refused.reason == TokenReason.MALFORMED


# ---- the API server's answer ----


def answer(**changes: Any) -> Any:
    import msgspec

    extra = {
        "authentication.kubernetes.io/pod-name": ["web-1"],
        "authentication.kubernetes.io/pod-uid": ["pod-uid"],
    } | changes.pop("extra", {})
    user = {"username": "system:serviceaccount:emojivoto:web", "extra": extra} | changes.pop("user", {})
    status = {"authenticated": True, "audiences": WANTED, "user": user} | changes
    return msgspec.convert({"status": status}, Review).status


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"audiences": []}, TokenReason.WRONG_AUDIENCE),
        ({"audiences": ["vault"]}, TokenReason.WRONG_AUDIENCE),
        ({"user": {"username": "admin"}}, TokenReason.MALFORMED),
        ({"extra": {"authentication.kubernetes.io/pod-uid": []}}, TokenReason.NOT_BOUND),
        ({"authenticated": False, "error": "boom"}, TokenReason.NOT_AUTHENTICATED),
    ],
    ids=lambda value: str(value)[:50],
)
def test_an_answer_that_says_too_little_is_a_refusal(changes: dict[str, Any], reason: TokenReason) -> None:
    refused = judge_review(answer(**changes), token(), WANTED, NOW)
    assert isinstance(refused, TokenRejected)
    assert refused.reason == reason, refused.detail


def test_an_account_with_dots_in_its_name() -> None:
    status = answer()
    status.user.username = "system:serviceaccount:emojivoto:web.v1"
    assert judge_review(status, token(), WANTED, NOW) == Bound("emojivoto", "web.v1", "web-1", "pod-uid")


def test_a_refused_token_of_another_audience_says_found_and_wanted() -> None:
    refused = judge_review(answer(authenticated=False), token(aud=["vault"]), WANTED, NOW)
    assert isinstance(refused, TokenRejected)
    assert refused.reason == TokenReason.WRONG_AUDIENCE
    assert refused.detail.startswith("the token is for vault, wanted identity.mantle.dev: ")


def test_a_refused_token_that_is_old_says_so() -> None:
    refused = judge_review(answer(authenticated=False), token(exp=NOW - 60), WANTED, NOW)
    assert isinstance(refused, TokenRejected)
    assert refused.reason == TokenReason.EXPIRED


# ---- the pod ----


def test_the_pod_must_be_the_one_the_token_is_bound_to() -> None:
    assert judge_pod(BOUND, POD) == TokenClaims("emojivoto", "web", "web-1", "pod-uid", "10.0.0.1")
    heir = Pod(POD.key, "another uid", POD.ip, "web", POD.owner)
    other = Pod(POD.key, "pod-uid", POD.ip, "admin", POD.owner)
    for found, reason in (
        (None, TokenReason.POD_GONE),
        (heir, TokenReason.POD_GONE),
        (other, TokenReason.OTHER_SERVICE_ACCOUNT),
    ):
        refused = judge_pod(BOUND, found)
        assert isinstance(refused, TokenRejected)
        assert refused.reason == reason
