//! Counters of the data plane: label sets resolved to handles before the hot path, text rendered on demand.
//!
//! Names and labels are the contract of docs/metrics.md. Handles are atomics shared between data and control threads.
//! One cap bounds all label sets together: beyond it everything is counted under one `overflow="true"` series per family.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mantle_proxy_core::reasons::NoTls;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Direction {
    Inbound,
    Outbound,
}

/// Which side of the proxy a connection is on: `src` was accepted, `dst` was dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    Src,
    Dst,
}

/// The TLS state of a connection or request, as every metric, log line and tap event shows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum TlsLabel {
    /// Mutual TLS; inbound the client's identity (empty if it sent none), outbound the server's.
    Mutual(Arc<str>),
    /// TLS of a foreign SNI, passed through.
    Passthru(Arc<str>),
    None(NoTls),
}

/// The policy that admitted inbound traffic: `srv_*`, `route_*`, `authz_*`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct PolicyLabels {
    pub(crate) srv: [Arc<str>; 3],
    pub(crate) srv_port: u16,
    pub(crate) route: Option<[Arc<str>; 3]>,
    pub(crate) authz: Option<[Arc<str>; 3]>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Labels {
    pub(crate) direction: Direction,
    pub(crate) target: SocketAddr,
    /// `name.ns:port` of a known Service; `other` for any other authority; `None`: no authority label.
    pub(crate) authority: Option<Arc<str>>,
    pub(crate) tls: TlsLabel,
    /// Outbound: the endpoint's `dst_*` labels.
    pub(crate) dst: Arc<[(String, String)]>,
    pub(crate) policy: Option<Arc<PolicyLabels>>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Outcome {
    pub(crate) status: u16,
    /// gRPC status from trailers, when the response is gRPC.
    pub(crate) grpc: Option<u8>,
    /// The stream ended without a complete response.
    pub(crate) failed: bool,
}

/// `tcp_*` counters of one label set.
pub(crate) trait TransportCounters {
    fn opened(&self);
    fn closed(&self, errno: Option<i32>);
    fn read(&self, bytes: u64);
    fn wrote(&self, bytes: u64);
}

/// `request_total`, `response_total`, `response_latency_ms` of one label set.
pub(crate) trait HttpCounters {
    fn request(&self);
    fn response(&self, outcome: Outcome, latency: Duration);
}
