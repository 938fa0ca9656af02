"""Every "no" of Mantle as a type: one enum per question, one label per answer.

The first part mirrors `proxy/core/src/reasons.rs` (a test keeps them equal); the rest is the control plane's own. A
label is part of the product (docs/reasons.md): the same word in metrics, logs, tap and tables. Never rename one, never
write one elsewhere. Rule for this file: it knows no other module.
"""

from __future__ import annotations

from enum import StrEnum, unique

# ---- shared with the proxy ----


@unique
class NoTls(StrEnum):
    """Why a connection is not mutual TLS."""

    LOOPBACK = "loopback"
    NOT_PROVIDED_BY_SERVICE_DISCOVERY = "not_provided_by_service_discovery"
    NOT_PROVIDED_BY_REMOTE = "not_provided_by_remote"
    PORT_SKIPPED = "port_skipped"
    FAIL_OPEN = "fail_open"


@unique
class Denied(StrEnum):
    """Why inbound traffic was refused."""

    UNAUTHORIZED = "unauthorized"
    IDENTITY_REQUIRED = "identity_required"
    LOOP = "loop"
    POLICY_UNAVAILABLE = "policy_unavailable"
    ROUTE_NOT_FOUND = "route_not_found"


@unique
class Unroutable(StrEnum):
    """Why an outbound connection or request could not be carried."""

    DISCOVERY_UNAVAILABLE = "discovery_unavailable"
    NO_ENDPOINTS = "no_endpoints"
    INVALID_POLICY = "invalid_policy"
    INVALID_IDENTITY = "invalid_identity"
    CONNECT_FAILED = "connect_failed"
    IDENTITY_MISMATCH = "identity_mismatch"
    TLS_FAILED = "tls_failed"
    UNSUPPORTED_PEER = "unsupported_peer"
    LOOP = "loop"


@unique
class BadHttp(StrEnum):
    """Why an HTTP/1 message was refused with 400 instead of forwarded."""

    HEAD_TOO_LARGE = "head_too_large"
    MALFORMED = "malformed"
    CONFLICTING_LENGTH = "conflicting_length"
    BAD_TRANSFER_ENCODING = "bad_transfer_encoding"
    OBSOLETE_FOLD = "obsolete_fold"
    BARE_LINE_FEED = "bare_line_feed"
    BAD_HOST = "bad_host"
    BAD_CHUNK = "bad_chunk"
    UNSUPPORTED_VERSION = "unsupported_version"


@unique
class Unserved(StrEnum):
    """Why a request or connection that was welcome was not served."""

    HEAD_TIMEOUT = "head_timeout"
    SERVER_CLOSED = "server_closed"
    FILE_LIMIT = "file_limit"


@unique
class StreamReset(StrEnum):
    """Why one stream of a mux link ended before both its directions did."""

    CANCELLED = "cancelled"
    DENIED = "denied"
    REVOKED = "revoked"
    CONNECT_FAILED = "connect_failed"
    REFUSED = "refused"
    STALLED = "stalled"
    PROTOCOL_ERROR = "protocol_error"
    BROKEN = "broken"


@unique
class LinkClosed(StrEnum):
    """Why a mux link was closed on its peer."""

    BAD_FRAME = "bad_frame"
    BAD_SETTINGS = "bad_settings"
    BAD_STREAM = "bad_stream"
    WINDOW_EXCEEDED = "window_exceeded"
    TOO_MANY_STREAMS = "too_many_streams"
    OPEN_RATE = "open_rate"
    RESET_RATE = "reset_rate"
    CONTROL_RATE = "control_rate"
    STALLED = "stalled"
    DRAINED = "drained"
    PEER_GONE = "peer_gone"


SHARED_WITH_THE_PROXY: tuple[type[StrEnum], ...] = (
    NoTls,
    Denied,
    Unroutable,
    BadHttp,
    Unserved,
    StreamReset,
    LinkClosed,
)

# ---- the control plane's own ----


@unique
class NameRefused(StrEnum):
    """Why a text is not the name of a workload of this mesh."""

    EMPTY = "empty"
    """There is no name."""
    TOO_LONG = "too_long"
    """Over 253 characters."""
    OTHER_MESH = "other_mesh"
    """Of another control namespace, trust domain or kind of name."""
    MISSING_PART = "missing_part"
    """The service account or the namespace is missing."""
    NOT_A_LABEL = "not_a_label"
    """The namespace is not a DNS-1123 label."""
    NOT_A_SUBDOMAIN = "not_a_subdomain"
    """The service account is not a DNS-1123 subdomain."""
    UNREADABLE = "unreadable"
    """The pod or service exists, but the API server's answer about it cannot be read."""


@unique
class TokenReason(StrEnum):
    """Why a token was not accepted."""

    MALFORMED = "malformed"
    """Not a JWT, or a claim is missing or of the wrong type."""
    BAD_SIGNATURE = "bad_signature"
    """Not signed by a key of this platform: forged, or of another mesh."""
    WRONG_ISSUER = "wrong_issuer"
    """Made by another token issuer."""
    WRONG_AUDIENCE = "wrong_audience"
    """Made for someone else than identity."""
    EXPIRED = "expired"
    """Its time is over; the file in the pod holds a newer one."""
    NOT_YET_VALID = "not_yet_valid"
    """Its time has not begun: a clock is wrong."""
    NOT_BOUND = "not_bound"
    """Not bound to a pod."""
    POD_GONE = "pod_gone"
    """The pod does not exist any more, or another one took its name."""
    OTHER_SERVICE_ACCOUNT = "other_service_account"
    """The bound pod runs as another service account."""
    NOT_AUTHENTICATED = "not_authenticated"
    """A cluster's TokenReview refused it without saying more."""


@unique
class CertifyRefused(StrEnum):
    """Why a certificate was not issued. A refused token adds its `TokenReason`."""

    RATE_LIMITED = "rate_limited"
    """Too many requests from this address."""
    BUSY = "busy"
    """As many requests at work as identity takes at once."""
    MISSING_IDENTITY = "missing_identity"
    """The request names no identity."""
    MISSING_TOKEN = "missing_token"
    """The request has no token."""
    MISSING_CSR = "missing_csr"
    """The request has no certificate signing request."""
    TOO_LARGE = "too_large"
    """Token or signing request are larger than any real one."""
    ISSUER_NOT_READY = "issuer_not_ready"
    """The issuer could not be read yet."""
    ISSUER_EXPIRED = "issuer_expired"
    """The issuer's chain has expired."""
    ISSUER_NOT_YET_VALID = "issuer_not_yet_valid"
    """The issuer's chain is not valid yet: a clock is wrong."""
    ISSUER_UNUSABLE = "issuer_unusable"
    """Malformed, not a CA, of another key, or not signed by a trust root."""
    PLATFORM_UNAVAILABLE = "platform_unavailable"
    """The platform did not answer about the token."""
    TOKEN_REJECTED = "token_rejected"
    """The platform refused the token."""
    OTHER_ADDRESS = "other_address"
    """A pod's token was presented from another address than the pod's."""
    OTHER_POD_ON_LOOPBACK = "other_pod_on_loopback"
    """Over loopback only identity's own sidecar may ask, for its own pod."""
    CSR_MALFORMED = "csr_malformed"
    """Not PKCS#10 in DER."""
    CSR_KEY_UNSUPPORTED = "csr_key_unsupported"
    """The key is not ECDSA P-256."""
    CSR_NOT_PROVEN = "csr_not_proven"
    """The request is not signed by the key it asks a certificate for."""
    CSR_NAMES = "csr_names"
    """The request names something else than the one requested identity."""
    NAME_REFUSED = "name_refused"
    """The requested identity is no name of this mesh."""
    IDENTITY_MISMATCH = "identity_mismatch"
    """The token belongs to another service account than the requested identity."""
    SIGNING_FAILED = "signing_failed"
    """The signed certificate did not pass its own check: nothing was issued."""


@unique
class CallerRefused(StrEnum):
    """Why destination or policy did not answer a caller."""

    ANONYMOUS = "anonymous"
    """No mutual TLS with a certificate of this mesh."""
    BAD_WORKLOAD = "bad_workload"
    """The workload it speaks for cannot be read."""
    UNKNOWN_WORKLOAD = "unknown_workload"
    """There is no such pod (yet)."""
    OTHER_WORKLOAD = "other_workload"
    """The pod it speaks for runs as another service account than the caller's."""


@unique
class NoIdentity(StrEnum):
    """Why an endpoint is given no identity, so that it is reached in plaintext."""

    NOT_MESHED = "not_meshed"
    """The pod has no proxy of a mesh."""
    OTHER_CONTROL_PLANE = "other_control_plane"
    """The pod's proxy belongs to another control plane."""
    HOST_NETWORK = "host_network"
    """The pod uses the host's network."""
    PROXY_NOT_STARTED = "proxy_not_started"
    """The pod is meshed, but its proxy never started."""
    OPTIONAL_TLS = "optional_tls"
    """One of the two is of the experimental mode `--tls=optional` and the other is not: neither can prove itself."""
    PORT_SKIPPED = "port_skipped"
    """The port bypasses the proxy (`skip-inbound-ports`)."""
    NOT_A_POD = "not_a_pod"
    """A service's address, written by hand, that is no pod's."""


@unique
class NotADestination(StrEnum):
    """Why a path is not something discovery can answer."""

    MALFORMED = "malformed"
    """Not `name:port` or `address:port`."""
    NOT_A_SERVICE_NAME = "not_a_service_name"
    """Not `service.namespace.svc.<domain>`."""
    AN_ADDRESS = "an_address"
    """An address where a name is needed."""


@unique
class Unproven(StrEnum):
    """Why traffic is not called secured though its proxy gave no `NoTls`."""

    UNKNOWN = "unknown"
    """The proxy named no state that we know: without proof nothing is secured."""
    PASSTHRU = "passthru"
    """The application's own TLS, passed through: encrypted, by whom is not known to the mesh."""
    NO_CLIENT_IDENTITY = "no_client_identity"
    """Mesh TLS, but the client showed no certificate."""
    DISABLED = "disabled"
    """A proxy without identity (linkerd2-proxy only)."""


@unique
class WatchEnded(StrEnum):
    """Why following the API server's objects stopped for a moment."""

    IN_TIME = "in_time"
    """The server ended a watch when it was asked to: no trouble."""
    TOO_SHORT = "too_short"
    """The watch ended at once and brought nothing."""
    GONE = "gone"
    """The version to go on from is too old: everything is listed again."""
    THROTTLED = "throttled"
    """The server asked for fewer requests."""
    SERVER_ERROR = "server_error"
    """The server could not answer."""
    UNREACHABLE = "unreachable"
    """No connection to the server."""
    SILENT = "silent"
    """Nothing came for longer than the server may be quiet: the connection's other end is gone."""
    CUT = "cut"
    """The connection broke."""
    FORBIDDEN = "forbidden"
    """The service account may not list and watch these objects."""
    NOT_FOUND = "not_found"
    """The server does not serve this kind."""
    UNREADABLE = "unreadable"
    """An answer that is not what Kubernetes documents."""
