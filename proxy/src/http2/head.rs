//! Which headers pass a hop, and the responses that the proxy gives in a server's place.

use http::header::{CONNECTION, CONTENT_TYPE, HeaderName, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use mantle_proxy_core::http1::{REQUIRE_ID, is_reserved};

use super::Refusal;

/// Removes what ends at this hop (RFC 9113 section 8.2.2).
pub(super) fn clean(headers: &mut HeaderMap) {
    for name in [CONNECTION, TRANSFER_ENCODING, UPGRADE, KEEP_ALIVE, PROXY_CONNECTION, HTTP2_SETTINGS] {
        headers.remove(name);
    }
    if headers.get(TE).is_some_and(|te| te != "trailers") {
        headers.remove(TE);
    }
}

/// Removes `l5d-*` and `mantle-*`, in any spelling that a server could fold into them.
pub(super) fn strip_reserved(headers: &mut HeaderMap) {
    if headers.keys().any(|name| is_reserved(name.as_str().as_bytes())) {
        let reserved: Vec<_> = headers.keys().filter(|name| is_reserved(name.as_str().as_bytes())).cloned().collect();
        for name in reserved {
            headers.remove(name);
        }
    }
}

/// What `l5d-require-id` said, kept with the request when the header itself is gone.
#[derive(Clone, Debug)]
pub(crate) struct RequiredIds(pub(crate) Vec<HeaderValue>);

pub(super) fn required_ids(headers: &HeaderMap) -> Option<RequiredIds> {
    let required: Vec<_> = headers.get_all(REQUIRE_ID).iter().cloned().collect();
    (!required.is_empty()).then_some(RequiredIds(required))
}

/// gRPC of any flavour (`application/grpc`, `application/grpc+proto` …).
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// `grpc-status` of trailers, or of a response without a body.
pub(super) fn grpc_status(headers: &HeaderMap) -> Option<u8> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()
}

/// A response in the server's place. gRPC clients get status 200, headers and trailers in one (trailers-only).
pub(super) fn refusal(refusal: Refusal, grpc: bool, explain: bool) -> Response<()> {
    let mut response = Response::new(());
    let reason = HeaderValue::from_static(refusal.reason);
    if explain {
        response.headers_mut().insert(PROXY_ERROR, reason.clone());
    }
    if grpc {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        response.headers_mut().insert(GRPC_STATUS, HeaderValue::from(grpc_code(refusal.status)));
        response.headers_mut().insert(GRPC_MESSAGE, reason);
    } else {
        *response.status_mut() = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    }
    response
}

/// The gRPC status for an HTTP status of ours (google.rpc.Code).
fn grpc_code(status: u16) -> u16 {
    match status {
        400 => 3,        // InvalidArgument
        403 => 7,        // PermissionDenied
        404 => 5,        // NotFound
        408 | 504 => 4,  // DeadlineExceeded
        429 => 8,        // ResourceExhausted
        502 | 503 => 14, // Unavailable
        508 => 10,       // Aborted
        _ => 13,         // Internal
    }
}

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
pub(super) const PROXY_ERROR: HeaderName = HeaderName::from_static("l5d-proxy-error");
