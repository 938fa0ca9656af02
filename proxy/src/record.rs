//! What is remembered of a connection or request: one value that becomes metric, log line and tap event alike.
//!
//! Handles are resolved once per connection or endpoint; a `Conn` or `Request` counts its own end when it is dropped,
//! so no path out of the data path can forget it. Knows nothing of sockets.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use mantle_proxy_core::model::Endpoint;
use mantle_proxy_core::policy::Permit;
use mantle_proxy_core::reasons::NoTls;

use crate::metrics::{Direction, Labels, Metrics, PolicyLabels, Side, TlsLabel, Transport};

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
pub(crate) fn inbound_src(metrics: &Metrics, addr: SocketAddr, tls: &TlsLabel, permit: &Permit) -> Arc<Transport> {
    let policy = Some(Arc::new(policy_labels(addr.port(), permit, false)));
    metrics.transport(Side::Src, &Labels { policy, ..labels(Direction::Inbound, addr, tls.clone()) })
}

/// The dialled side of an inbound connection: the application.
pub(crate) fn inbound_dst(metrics: &Metrics, addr: SocketAddr) -> Arc<Transport> {
    metrics.transport(Side::Dst, &labels(Direction::Inbound, addr, TlsLabel::None(NoTls::Loopback)))
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

fn labels(direction: Direction, target: SocketAddr, tls: TlsLabel) -> Labels {
    Labels { direction, target, authority: None, tls, dst: Arc::new([]), policy: None }
}
