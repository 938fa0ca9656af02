"""Tokens of service accounts: JWTs bound to a pod and an audience (Kubernetes: bound service account tokens, RFC 7519).

`claims`, `sign` and `review` are pure but for the library's signature: the key and the clock are arguments. A token of
another audience, of a pod that is gone, or of another mesh (its key is another) is refused, each with its own reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from mantle.core.reasons import TokenReason
from mantle.platform.port import TokenClaims, TokenRejected

ISSUER = "https://mantle.machine"
MAX_BYTES = 8192
RENEW_AT = 0.8
"""Of a token's life, as the kubelet does."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The pod that a token is bound to."""

    namespace: str
    service_account: str
    pod: str
    pod_uid: str


@dataclass(frozen=True, slots=True)
class BoundPod:
    """What is known now about a pod that a token names."""

    name: str
    namespace: str
    service_account: str
    ip: str


def new_key() -> ECKey:
    """A fresh P-256 signing key."""
    key = ECKey.generate_key("P-256", private=True)
    key.ensure_kid()
    return key


def load_key(pem: bytes) -> ECKey:
    key = ECKey.import_key(pem)
    key.ensure_kid()
    return key


def key_pem(key: ECKey) -> bytes:
    """PKCS#8, for a file of mode 0600 on tmpfs."""
    pem = key.as_pem(private=True)
    return pem if isinstance(pem, bytes) else str(pem).encode()


def jwks(key: ECKey) -> str:
    """The public half as a JSON Web Key Set (RFC 7517)."""
    return json.dumps({"keys": [{**key.as_dict(private=False), "use": "sig", "alg": "ES256"}]})


def sign(key: ECKey, who: Subject, audience: str, seconds: int, now: float) -> str:
    """A token for `who`, valid from `now` (Unix seconds) for `seconds`."""
    iat = int(now)
    body: dict[str, Any] = {
        "iss": ISSUER,
        "sub": f"system:serviceaccount:{who.namespace}:{who.service_account}",
        "aud": [audience or ISSUER],
        "iat": iat,
        "nbf": iat,
        "exp": iat + seconds,
        "kubernetes.io": {
            "namespace": who.namespace,
            "serviceaccount": {"name": who.service_account},
            "pod": {"name": who.pod, "uid": who.pod_uid},
        },
    }
    return jwt.encode({"alg": "ES256", "kid": key.kid}, body, key, algorithms=["ES256"])


def renew_at(issued: float, seconds: int) -> float:
    """When the file with a token is written anew (Unix seconds)."""
    return issued + seconds * RENEW_AT


def review(
    key: ECKey, token: bytes, audiences: Sequence[str], now: float, pod_of: Callable[[str], BoundPod | None]
) -> TokenClaims | TokenRejected:
    """Whom a token belongs to. `pod_of` finds a living pod by uid. Audiences: one of them must be the token's."""
    if len(token) > MAX_BYTES:
        return TokenRejected(TokenReason.MALFORMED, f"the token has {len(token)} bytes, wanted at most {MAX_BYTES}")
    try:
        decoded = jwt.decode(token.decode("ascii"), key, algorithms=["ES256"])
    except UnicodeDecodeError:
        return TokenRejected(TokenReason.MALFORMED, "the token is not text")
    except JoseError as error:
        bad_signature = error.error == "bad_signature"
        if bad_signature:
            return TokenRejected(
                TokenReason.BAD_SIGNATURE,
                "the token was not signed by this mesh; a token of another mesh is not valid here",
            )
        return TokenRejected(TokenReason.MALFORMED, f"this is not a token of this mesh ({error.error})")
    except (ValueError, KeyError, TypeError) as error:
        return TokenRejected(TokenReason.MALFORMED, f"this is not a token ({type(error).__name__})")
    return _claims(decoded.claims, audiences, now, pod_of)


def _claims(
    body: dict[str, Any], audiences: Sequence[str], now: float, pod_of: Callable[[str], BoundPod | None]
) -> TokenClaims | TokenRejected:
    if body.get("iss") != ISSUER:
        return TokenRejected(TokenReason.WRONG_ISSUER, f"the token was issued by {body.get('iss')!r}, wanted {ISSUER}")
    if "pod" not in (body.get("kubernetes.io") or {}):
        return TokenRejected(TokenReason.NOT_BOUND, "the token is not bound to a pod: use the projected token")
    try:
        bound = body["kubernetes.io"]
        namespace, account = bound["namespace"], bound["serviceaccount"]["name"]
        pod, uid = bound["pod"]["name"], bound["pod"]["uid"]
        held, not_before, expiry = list(body["aud"]), float(body["nbf"]), float(body["exp"])
    except (KeyError, TypeError, ValueError):
        return TokenRejected(TokenReason.MALFORMED, "the token has not the claims of a bound service account token")
    if not set(held) & set(audiences):
        return TokenRejected(
            TokenReason.WRONG_AUDIENCE, f"the token is for {', '.join(map(str, held))}, wanted {' or '.join(audiences)}"
        )
    if now >= expiry:
        return TokenRejected(
            TokenReason.EXPIRED, f"the token expired {now - expiry:.0f} s ago; the proxy must read its file again"
        )
    if now < not_before - 10:
        return TokenRejected(
            TokenReason.NOT_YET_VALID, f"the token is valid only in {not_before - now:.0f} s: check the clocks"
        )
    known = pod_of(uid)
    if known is None or (known.namespace, known.name, known.service_account) != (namespace, pod, account):
        return TokenRejected(
            TokenReason.POD_GONE,
            f"the token is bound to pod {namespace}/{pod} (uid {uid}), which is not there any more",
        )
    return TokenClaims(namespace, account, pod, uid, known.ip)
