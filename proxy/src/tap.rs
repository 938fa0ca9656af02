//! Tap: who is watching, which requests match, and the events that leave. Serves `io.linkerd.proxy.tap` on port 4190.
//!
//! The data path asks `Taps::active()` (one relaxed load) per request and builds a `TapRequest` only when someone watches.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::metrics::{Direction, Outcome, TlsLabel};

/// A request as tap sees it. Strings are the peer's own bytes: whoever prints them escapes them.
pub(crate) struct TapRequest<'a> {
    pub(crate) direction: Direction,
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) tls: &'a TlsLabel,
    pub(crate) dst_labels: &'a Arc<[(String, String)]>,
    pub(crate) method: &'a str,
    pub(crate) scheme: &'a str,
    pub(crate) authority: &'a str,
    pub(crate) path: &'a str,
    /// Visits each header; called only if an observer extracts headers.
    pub(crate) headers: &'a dyn Fn(&mut dyn FnMut(&str, &[u8])),
}

/// The rest of a tapped request: one value carried by the request until its end. Dropping it unfinished sends a reset end.
pub(crate) trait TapStream {
    fn response(&mut self, status: u16, headers: &dyn Fn(&mut dyn FnMut(&str, &[u8])), since_request: Duration);
    fn end(self: Box<Self>, outcome: Outcome, bytes: u64, since_request: Duration, since_response: Duration);
}
