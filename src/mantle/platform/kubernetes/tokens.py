"""Whose token it is: the cluster's TokenReview, and the cluster's own keys while the API server is slow or away.

The keys are never the weaker way: signature, issuer, audience and time as the API server checks them, the service
account and the pod with the uids that the token is bound to, both from copies that were true a moment ago. Either way
the pod must exist. `judge_…` and `explain` decide and are pure; `TokenReviewer` asks.

https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-review-v1/
https://kubernetes.io/docs/tasks/configure-pod-container/configure-service-account/#service-account-issuer-discovery
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import msgspec
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from mantle.core.model import Key, Pod
from mantle.core.reasons import TokenReason
from mantle.platform.kubernetes.client import NO_ANSWER, Client
from mantle.platform.kubernetes.convert import PodObject, SeenPod, pod
from mantle.platform.kubernetes.reading import decode
from mantle.platform.kubernetes.reflector import Reflector
from mantle.platform.port import PlatformUnavailable, TokenClaims, TokenRejected

log = logging.getLogger(__name__)

REVIEW_PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
RIGHT_PATH = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
AGAIN = "apply `mantle install` again"
REVIEW_TIMEOUT = 1.5
"""Seconds the API server may take over a token: a proxy waits for its first certificate."""
ADDRESS_PATIENCE = 0.8
"""Seconds a pod's address is waited for."""
SPARED = 5.0
"""Seconds an API server that did not answer is not asked again: the keys answer meanwhile."""
KEYS_EVERY = 300.0
"""Seconds between two looks at the cluster's keys."""
KEYS_LAST = 3600.0
"""Seconds after which keys are too old to be trusted without the API server."""
COPIES_LAST = 900.0
"""Seconds after which copies of pods and service accounts are too old for that."""
ALGORITHMS = ["RS256", "RS384", "RS512", "ES256", "ES384", "ES512"]
MAX_BYTES = 16 * 1024
_EXTRA = "authentication.kubernetes.io/"


@dataclass(frozen=True, slots=True)
class Keys:
    """What the cluster signs tokens with. `fetched` is in seconds of the event loop's clock."""

    issuer: str
    keys: KeySet
    fetched: float


@dataclass(frozen=True, slots=True)
class Bound:
    """Who a token says it belongs to, before the pod has been looked up."""

    namespace: str
    service_account: str
    pod: str
    pod_uid: str


class _Status(msgspec.Struct):
    authenticated: bool = False
    error: str = ""
    audiences: list[str] | None = None
    user: _User | None = None


class _User(msgspec.Struct):
    username: str = ""
    extra: dict[str, list[str]] | None = None


class _Review(msgspec.Struct):
    status: _Status = msgspec.field(default_factory=_Status)


# ---- decisions ----


def explain(token: bytes, audiences: Sequence[str], now: float, error: str) -> TokenRejected:
    """Why a refused token was refused, in words that help. The token is read without trusting it, for the message."""
    body = _unverified(token)
    if body is None:
        return TokenRejected(TokenReason.MALFORMED, "this is not a service account token of Kubernetes (no JWT)")
    held, expiry = _audiences(body), body.get("exp")
    if not set(held) & set(audiences):
        return _wrong_audience(held, audiences)
    if isinstance(expiry, int | float) and now >= expiry:
        return _expired(now - expiry)
    return TokenRejected(TokenReason.NOT_AUTHENTICATED, f"the API server says: {error or 'not authenticated'}")


def judge_review(status: _Status, token: bytes, audiences: Sequence[str], now: float) -> Bound | TokenRejected:
    """What a TokenReview's answer means."""
    if not status.authenticated or status.user is None:
        return explain(token, audiences, now, status.error)
    if not set(status.audiences or ()) & set(audiences):
        # An authenticator that knows no audiences accepts any, so the API's documentation asks for this check.
        return _wrong_audience(status.audiences or (), audiences)
    parts = status.user.username.split(":", 3)
    if len(parts) != 4 or parts[:2] != ["system", "serviceaccount"]:
        return TokenRejected(
            TokenReason.MALFORMED, f"the token is of {status.user.username!r}, wanted a service account's"
        )
    extra = status.user.extra or {}
    pod_name, pod_uid = ((extra.get(_EXTRA + what) or [""])[0] for what in ("pod-name", "pod-uid"))
    if not pod_name or not pod_uid:
        return TokenRejected(TokenReason.NOT_BOUND, "the token is not bound to a pod, wanted the pod's projected token")
    return Bound(parts[2], parts[3], pod_name, pod_uid)


def judge_claims(
    keys: Keys, token: bytes, audiences: Sequence[str], now: float, accounts: Mapping[Key, str]
) -> Bound | TokenRejected:
    """What the token itself says, believed as far as the API server would believe it. `now` is in Unix seconds."""
    try:
        body = jwt.decode(token.decode("ascii").strip(), keys.keys, algorithms=ALGORITHMS).claims
    except (JoseError, ValueError, KeyError, TypeError) as error:
        if _unverified(token) is not None:
            return TokenRejected(TokenReason.BAD_SIGNATURE, "the token was not signed by a key of this cluster")
        return TokenRejected(TokenReason.MALFORMED, f"this is not a token ({type(error).__name__})")
    if body.get("iss") != keys.issuer:
        return TokenRejected(
            TokenReason.WRONG_ISSUER, f"the token was issued by {body.get('iss')!r}, wanted {keys.issuer}"
        )
    held = _audiences(body)
    if not set(held) & set(audiences):
        return _wrong_audience(held, audiences)
    bound: Any = body.get("kubernetes.io")
    try:
        namespace, account = str(bound["namespace"]), str(bound["serviceaccount"]["name"])
        account_uid = str(bound["serviceaccount"]["uid"])
        not_before, expiry = float(body["nbf"]), float(body["exp"])
        bound_pod = bound.get("pod")
        pod_name, pod_uid = (str(bound_pod["name"]), str(bound_pod["uid"])) if bound_pod else ("", "")
    except (KeyError, TypeError, ValueError, AttributeError):
        return TokenRejected(TokenReason.MALFORMED, "the token has not the claims of a bound service account token")
    if now >= expiry:
        return _expired(now - expiry)
    if now < not_before:
        return TokenRejected(
            TokenReason.NOT_YET_VALID, f"the token is valid only in {not_before - now:.0f} s: check the clocks"
        )
    if not pod_name:
        return TokenRejected(TokenReason.NOT_BOUND, "the token is not bound to a pod, wanted the pod's projected token")
    if body.get("sub") != f"system:serviceaccount:{namespace}:{account}":
        return TokenRejected(TokenReason.MALFORMED, f"the token's subject is {body.get('sub')!r}, which is another")
    if accounts.get(Key(namespace, account)) != account_uid:
        return TokenRejected(
            TokenReason.OTHER_SERVICE_ACCOUNT,
            f"the token is of the service account {namespace}/{account} (uid {account_uid}), which is there no more",
        )
    return Bound(namespace, account, pod_name, pod_uid)


def judge_pod(bound: Bound, found: Pod | None) -> TokenClaims | TokenRejected:
    """Whether the pod a token is bound to is the one that is there."""
    if found is None or found.uid != bound.pod_uid:
        there = "is not there any more" if found is None else f"is another one now (uid {found.uid})"
        return TokenRejected(
            TokenReason.POD_GONE,
            f"the token is bound to pod {bound.namespace}/{bound.pod} (uid {bound.pod_uid}): it {there}",
        )
    if found.service_account != bound.service_account:
        return TokenRejected(
            TokenReason.OTHER_SERVICE_ACCOUNT,
            f"the token is of {bound.service_account}, its pod {found.key} runs as {found.service_account}",
        )
    return TokenClaims(
        bound.namespace, bound.service_account, bound.pod, bound.pod_uid, found.ip, more_pod_ips=found.more_ips
    )


def _wrong_audience(found: Sequence[str], wanted: Sequence[str]) -> TokenRejected:
    held = ", ".join(found) or "nobody in particular"
    return TokenRejected(
        TokenReason.WRONG_AUDIENCE,
        f"the token is for {held}, wanted {' or '.join(wanted)}: the proxy must read the projected token that "
        "injection mounts, not the pod's default one; identity's --audience names those that it takes",
    )


def _expired(seconds: float) -> TokenRejected:
    return TokenRejected(
        TokenReason.EXPIRED, f"the token expired {seconds:.0f} s ago; the proxy must read its file again"
    )


def _audiences(body: Mapping[str, Any]) -> list[str]:
    held = body.get("aud")
    return [held] if isinstance(held, str) else [str(one) for one in held] if isinstance(held, list) else []


def _unverified(token: bytes) -> Mapping[str, Any] | None:
    parts = token.strip().split(b".")
    if len(parts) != 3:
        return None
    try:
        body = msgspec.json.decode(base64.urlsafe_b64decode(parts[1] + b"=" * (-len(parts[1]) % 4)))
    except (ValueError, msgspec.MsgspecError):
        return None
    return body if isinstance(body, dict) else None


# ---- asking ----


def _check(response: httpx2.Response, right: str) -> None:
    """Raises HTTPError if the server cannot answer now, `PlatformUnavailable` if it will not."""
    if response.status_code == 429 or response.status_code >= 500:
        response.raise_for_status()
    if response.status_code not in (200, 201):
        problem = f"the API server refused to {right}: {response.status_code} {response.text[:300]}"
        fix = f"give identity's service account the right to {right}: {AGAIN}"
        raise PlatformUnavailable(problem, fix)


_POD = msgspec.json.Decoder(PodObject)


def _readable(seen: SeenPod) -> SeenPod:
    """The same. Raises `PlatformUnavailable` if nothing is known of it: nobody gets a certificate as that pod."""
    if seen.pod.unreadable:
        raise _unreadable(seen.pod.key.namespace, seen.pod.key.name, "the log says why")
    return seen


def _unreadable(namespace: str, name: str, problem: str) -> PlatformUnavailable:
    return PlatformUnavailable(f"the pod {namespace}/{name} cannot be read: {problem[:300]}", "correct the pod")


class TokenReviewer:
    """Reviews tokens. `pods` and `accounts` are the newest copies, kept by `copies`."""

    def __init__(
        self,
        client: Client,
        pods: Mapping[Key, SeenPod],
        accounts: Mapping[Key, str],
        copies: Sequence[Reflector[Any, Any, Any]],
        now: Callable[[], float] = lambda: time.time_ns() / 1e9,
    ) -> None:
        self._client, self._pods, self._accounts, self._copies, self._now = client, pods, accounts, copies, now
        self._keys: Keys | None = None
        self._ask_again_at = 0.0
        self.denied = ""
        """Why no token can be reviewed, as far as that is known: a missing right."""
        self.reviews: Counter[tuple[str, str]] = Counter()
        """How many, by way (`api`, `keys`) and result (`accepted`, or the reason)."""

    async def review(self, token: bytes, audiences: Sequence[str]) -> TokenClaims | TokenRejected:
        """Whose token it is. Raises `PlatformUnavailable` if neither the API server nor its keys can tell."""
        if len(token) > MAX_BYTES:
            return TokenRejected(TokenReason.MALFORMED, f"the token has {len(token)} bytes, wanted at most {MAX_BYTES}")
        clock = asyncio.get_running_loop().time
        problem = "it did not answer a moment ago"
        if clock() >= self._ask_again_at:
            try:
                outcome = await self._ask(token, audiences)
            except (*NO_ANSWER, msgspec.MsgspecError) as error:  # a timeout is an OSError
                problem = f"{type(error).__name__} {error}".strip()
                self._ask_again_at = clock() + SPARED
                log.warning("the API server reviews no tokens (%s): going on with its keys", problem)
            else:
                return self._counted("api", outcome)
        return self._counted("keys", self._by_keys(token, audiences, problem))

    async def keep_keys(self) -> None:
        """Keeps the cluster's keys at hand, for ever, and knows whether tokens may be reviewed at all. Without keys
        reviews need the API server.
        """
        complaint = ""
        while True:
            try:
                self.denied = await self._denied()
                await self.fetch_keys()
                complaint = ""
            except (*NO_ANSWER, ValueError, KeyError, JoseError, msgspec.MsgspecError) as error:
                problem = f"{type(error).__name__} {error}".strip()
                if problem != complaint:
                    log.warning("the cluster's token keys cannot be read (%s)", problem)
                complaint = problem
            await asyncio.sleep(KEYS_EVERY if not complaint else KEYS_EVERY / 30)

    async def fetch_keys(self) -> None:
        """Reads issuer and keys. Every service account may (ClusterRole system:service-account-issuer-discovery)."""
        about = await self._client.http.get("/.well-known/openid-configuration")
        keys = await self._client.http.get("/openid/v1/jwks")
        about.raise_for_status()
        keys.raise_for_status()
        found = KeySet.import_key_set(msgspec.json.decode(keys.content))
        issuer = msgspec.json.decode(about.content).get("issuer", "")
        self._keys = Keys(issuer, found, asyncio.get_running_loop().time())

    async def _denied(self) -> str:
        """What keeps this service account from reviewing tokens; empty if nothing does."""
        attributes = {"group": "authentication.k8s.io", "resource": "tokenreviews", "verb": "create"}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "metadata": {},
            "spec": {"resourceAttributes": attributes},
        }
        response = await self._client.http.post(RIGHT_PATH, json=body)
        response.raise_for_status()
        allowed = msgspec.json.decode(response.content)["status"].get("allowed") is True
        problem = "" if allowed else "this service account may not create tokenreviews.authentication.k8s.io: " + AGAIN
        if problem and problem != self.denied:
            log.error("%s", problem)
        return problem

    async def _ask(self, token: bytes, audiences: Sequence[str]) -> TokenClaims | TokenRejected:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "metadata": {},
            "spec": {"token": token.decode("ascii", "replace").strip(), "audiences": list(audiences)},
        }
        async with asyncio.timeout(REVIEW_TIMEOUT):
            response = await self._client.http.post(REVIEW_PATH, json=body)
            _check(response, "create tokenreviews.authentication.k8s.io")
            status = msgspec.json.decode(response.content, type=_Review).status
            bound = judge_review(status, token, audiences, self._now())
            return bound if isinstance(bound, TokenRejected) else judge_pod(bound, await self._find(bound))

    async def _find(self, bound: Bound) -> Pod | None:
        """The pod, from the copy if that has it with its address, else from the API server.

        A proxy may ask before the kubelet has written its pod's address down: that is waited for a moment.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + ADDRESS_PATIENCE
        while True:
            seen = self._pods.get(Key(bound.namespace, bound.pod))
            if seen is not None and seen.pod.uid == bound.pod_uid and seen.pod.ip:
                return _readable(seen).pod
            response = await self._client.http.get(f"/api/v1/namespaces/{bound.namespace}/pods/{bound.pod}")
            if response.status_code == 404:
                return None
            _check(response, "get pods")
            try:
                found = pod(decode(_POD, response.content))[1]
            except ValueError as error:
                raise _unreadable(bound.namespace, bound.pod, str(error)) from error
            if found is None or found.pod.ip or found.pod.uid != bound.pod_uid or clock() >= until:
                return found.pod if found is not None else None
            await asyncio.sleep(ADDRESS_PATIENCE / 8)

    def _by_keys(self, token: bytes, audiences: Sequence[str], problem: str) -> TokenClaims | TokenRejected:
        now, keys = asyncio.get_running_loop().time(), self._keys
        fix = "see why the API server does not answer (kubectl get --raw /readyz)"
        if keys is None or now - keys.fetched > KEYS_LAST:
            raise PlatformUnavailable(f"the API server does not answer ({problem}), and its keys are not known", fix)
        if any(not copy.synced.is_set() or now - copy.true_at > COPIES_LAST for copy in self._copies):
            raise PlatformUnavailable(
                f"the API server does not answer ({problem}), and what is known of its pods is too old", fix
            )
        bound = judge_claims(keys, token, audiences, self._now(), self._accounts)
        if isinstance(bound, TokenRejected):
            return bound
        seen = self._pods.get(Key(bound.namespace, bound.pod))
        # A pod that ends may be gone since: its certificate can wait for the API server.
        return judge_pod(bound, _readable(seen).pod if seen is not None and not seen.deleting else None)

    def _counted(self, way: str, outcome: TokenClaims | TokenRejected) -> TokenClaims | TokenRejected:
        self.reviews[(way, outcome.reason if isinstance(outcome, TokenRejected) else "accepted")] += 1
        return outcome
