//! What is remembered of a connection or request: one value that becomes metric, log line and tap event alike.
//!
//! Handles are resolved once per connection or endpoint; a `Conn` or `Request` counts its own end when it is dropped,
//! so no path out of the data path can forget it. Knows nothing of sockets.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use mantle_proxy_core::model::{Endpoint, ServerPolicy};
use mantle_proxy_core::policy::Permit;
use mantle_proxy_core::reasons::NoTls;

use crate::metrics::{Direction, Http, Labels, Metrics, Outcome, PolicyLabels, Side, TlsLabel, Transport};
use crate::tap::{TapStream, VisitHeaders};

/// One side of a connection: counted as opened when made and as closed when dropped.
pub(crate) struct Conn {
    counters: Arc<Transport>,
    errno: Cell<Option<i32>>,
}

impl Conn {
    pub(crate) fn open(counters: Arc<Transport>) -> Self {
        counters.opened();
        Self { counters, errno: Cell::new(None) }
    }

    pub(crate) fn read(&self, bytes: u64) {
        self.counters.read(bytes);
    }

    pub(crate) fn wrote(&self, bytes: u64) {
        self.counters.wrote(bytes);
    }

    /// Says how it ended, for the `errno` label.
    pub(crate) fn failed(&self, error: &io::Error) {
        self.errno.set(error.raw_os_error());
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        self.counters.closed(self.errno.get());
    }
}

/// One HTTP request, from its head to the end of its response; dropped early, it counts as failed.
pub(crate) struct Request {
    http: Arc<Http>,
    tap: Option<TapStream>,
    began: Instant,
    responded: Option<Instant>,
    status: u16,
    grpc: Option<u8>,
    bytes: u64,
    over: bool,
}

impl Request {
    /// `tap` is there if someone watches it.
    pub(crate) fn begin(http: Arc<Http>, tap: Option<TapStream>) -> Self {
        http.request();
        Self { http, tap, began: Instant::now(), responded: None, status: 0, grpc: None, bytes: 0, over: false }
    }

    /// The head of the final response is here.
    pub(crate) fn response(&mut self, status: u16, headers: VisitHeaders<'_>) {
        self.status = status;
        self.responded = Some(Instant::now());
        if let Some(tap) = &mut self.tap {
            tap.response(status, headers, self.began.elapsed());
        }
    }

    /// Bytes of the response's body.
    pub(crate) fn body(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    /// `grpc-status` of a gRPC response.
    pub(crate) fn grpc_status(&mut self, code: u8) {
        self.grpc = Some(code);
    }

    /// What follows the response's body.
    pub(crate) fn trailers(&mut self, trailers: VisitHeaders<'_>) {
        if let Some(tap) = &mut self.tap {
            tap.trailers(trailers);
        }
    }

    /// The exchange is over; `failed`: without a complete response.
    pub(crate) fn end(mut self, failed: bool) {
        self.finish(failed);
    }

    fn finish(&mut self, failed: bool) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        let outcome = Outcome { status: self.status, grpc: self.grpc, failed };
        let (latency, since) = (self.began.elapsed(), self.responded.map(|at| at.elapsed()).unwrap_or_default());
        self.http.response(outcome, latency);
        let Outcome { status, grpc, failed } = outcome;
        tracing::debug!(status, grpc, failed, bytes = self.bytes, ?latency, "request ended");
        if let Some(tap) = self.tap.take() {
            tap.end(outcome, self.bytes, latency, since);
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.finish(true);
    }
}

/// The accepted side of an outbound connection to `original`.
pub(crate) fn outbound_src(metrics: &Metrics, original: SocketAddr) -> Arc<Transport> {
    metrics.transport(Side::Src, &labels(Direction::Outbound, original, TlsLabel::None(NoTls::Loopback)))
}

/// The dialled side of an outbound connection, as its endpoint and destination describe it.
pub(crate) fn outbound_dst(endpoint: &Endpoint, tls: TlsLabel, authority: Option<Arc<str>>) -> Labels {
    let authority = Some(authority.unwrap_or_else(|| "other".into()));
    Labels { authority, dst: endpoint.labels.clone(), ..labels(Direction::Outbound, endpoint.addr, tls) }
}

/// The accepted side of an inbound connection to the pod's own `addr`.
pub(crate) fn inbound_src(
    metrics: &Metrics,
    addr: SocketAddr,
    tls: &TlsLabel,
    policy: &ServerPolicy,
) -> Arc<Transport> {
    let policy = Some(Arc::new(server_labels(addr.port(), policy)));
    metrics.transport(Side::Src, &Labels { policy, ..labels(Direction::Inbound, addr, tls.clone()) })
}

/// What policy refused at the pod's own `addr`, with the names of the policy, if the port had one.
pub(crate) fn inbound_refused(addr: SocketAddr, tls: &TlsLabel, policy: Option<&ServerPolicy>) -> Labels {
    let policy = policy.map(|policy| Arc::new(server_labels(addr.port(), policy)));
    Labels { policy, ..labels(Direction::Inbound, addr, tls.clone()) }
}

/// An inbound request, admitted by `permit`.
pub(crate) fn inbound_request(addr: SocketAddr, tls: &TlsLabel, permit: &Permit) -> Labels {
    let policy = Some(Arc::new(policy_labels(addr.port(), permit, true)));
    Labels { policy, ..labels(Direction::Inbound, addr, tls.clone()) }
}

/// The dialled side of inbound connections: the application, whose address no label shows.
pub(crate) fn inbound_dst(metrics: &Metrics) -> Arc<Transport> {
    let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
    metrics.transport(Side::Dst, &labels(Direction::Inbound, nowhere, TlsLabel::None(NoTls::Loopback)))
}

/// The names of the policy that admitted someone to `port`.
pub(crate) fn policy_labels(port: u16, permit: &Permit, http: bool) -> PolicyLabels {
    let names = |names: [&str; 3]| names.map(Arc::from);
    PolicyLabels {
        srv: names(permit.server()),
        srv_port: port,
        route: http.then(|| names(permit.route())),
        authz: Some(names(permit.authorization())),
    }
}

/// The names of a policy that admitted nobody yet.
fn server_labels(port: u16, policy: &ServerPolicy) -> PolicyLabels {
    let srv = [&policy.group, &policy.kind, &policy.name].map(|name| Arc::from(name.as_str()));
    PolicyLabels { srv, srv_port: port, route: None, authz: None }
}

pub(crate) fn labels(direction: Direction, target: SocketAddr, tls: TlsLabel) -> Labels {
    Labels { direction, target, authority: None, tls, dst: Arc::new([]), policy: None }
}
