//! TLS of the mesh: rustls configurations built once per certificate, and identities read from peers.
//!
//! Knows nothing of sockets or streams. `identity.rs` writes; the data threads read through a `watch`.

use std::sync::Arc;
use std::time::SystemTime;

use mantle_proxy_core::model::PeerId;
use rustls::{ClientConfig, ServerConfig};

/// The ALPN of the mux link between Mantle proxies.
pub(crate) const ALPN_MUX: &[u8] = b"mantle-mux/1";

/// All that one certificate gives: immutable, replaced as a whole at renewal.
#[derive(Debug)]
pub(crate) struct Credentials {
    /// Grows by one with each certificate or bundle: links remember it and drain when it moves on.
    pub(crate) epoch: u64,
    pub(crate) local: PeerId,
    pub(crate) not_after: SystemTime,
    /// Client side: TLS 1.3, our certificate, ALPN `mantle-mux/1`. rustls checks chain and name (SNI = identity).
    pub(crate) client_link: Arc<ClientConfig>,
    /// Client side without ALPN: endpoints that have no `opaque_transport` (4190, 4191, transparent transport).
    pub(crate) client_plain: Arc<ClientConfig>,
    /// Server side on port 4143: client certificate asked for, ALPN `mantle-mux/1` if the client offers it.
    pub(crate) server_link: Arc<ServerConfig>,
    /// Server side on the pod's own ports, 4190 and 4191: client certificate optional, no ALPN.
    pub(crate) server_plain: Arc<ServerConfig>,
}

/// `None` until the first certificate.
pub(crate) type CredentialsWatch = tokio::sync::watch::Receiver<Option<Arc<Credentials>>>;
