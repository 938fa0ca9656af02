//! What the data plane knows about the world, as plain values: endpoints, outbound targets, inbound policies.
//!
//! `src/discovery.rs` converts the wire's messages into these once, at the edge; nothing else re-checks them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::reasons::NoTls;

/// A workload identity as certificates carry it: a DNS name, and the SPIFFE URI beside it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerId {
    /// `<sa>.<ns>.serviceaccount.identity.<control-ns>.<trust-domain>`; empty if the certificate has none.
    pub dns: Arc<str>,
    /// `spiffe://<trust-domain>/ns/<ns>/sa/<sa>`, if the certificate has one.
    pub spiffe: Option<Arc<str>>,
}

/// One address a service or a pod can be reached at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub addr: SocketAddr,
    /// The identity that must be proved there (it is also the SNI), or why there is none.
    pub tls: Result<Arc<str>, NoTls>,
    /// The peer proxy's inbound port when the mux (or a transport header) may be used; `None`: mesh TLS on `addr` itself.
    pub opaque_transport: Option<u16>,
    pub hint: Hint,
    /// `dst_*` metric labels, sorted by key, without the `dst_` prefix.
    pub labels: Arc<[(String, String)]>,
}

/// What discovery says the endpoint speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    Unknown,
    H2,
    Opaque,
}

/// How a connection's bytes are understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Detect,
    Opaque,
    Http1,
    Http2,
    Tls,
}

/// What an original destination means: the merged answer of profile and outbound policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outbound {
    pub protocol: Protocol,
    pub backend: Backend,
    /// `name.namespace.svc.<domain>:port` when the destination is a known Service and port.
    pub authority: Option<Arc<str>>,
    /// How long a request may wait for a ready endpoint.
    pub failfast: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// One fixed endpoint: a pod address, or the original destination itself when it is a stranger.
    Forward(Endpoint),
    /// Balance over what `Destination.Get(path)` answers.
    Balance { path: Arc<str> },
}

/// What a port of this pod accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerPolicy {
    pub protocol: Protocol,
    pub detect_timeout: Duration,
    pub group: String,
    pub kind: String,
    pub name: String,
    pub authorizations: Vec<Authorization>,
    pub routes: Vec<InboundRoute>,
}

/// Who may use a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    pub group: String,
    pub kind: String,
    pub name: String,
    pub networks: Vec<Network>,
    pub clients: Clients,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Clients {
    /// With or without TLS.
    Anyone,
    /// Mesh TLS, with or without a client certificate.
    AnyTls,
    /// Mesh TLS with a client identity that is listed or has one of the suffixes (an empty suffix matches every identity).
    Identities { names: Vec<String>, suffixes: Vec<Vec<String>> },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    pub net: Cidr,
    pub except: Vec<Cidr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    pub addr: IpAddr,
    pub prefix: u8,
}

/// An HTTP route of an inbound policy, as far as authorization and labels need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundRoute {
    pub group: String,
    pub kind: String,
    pub name: String,
    pub matches: Vec<RouteMatch>,
    pub authorizations: Vec<Authorization>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteMatch {
    pub path: PathMatch,
    pub method: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathMatch {
    Any,
    Exact(String),
    Prefix(String),
}
