//! Who is at the other end of an accepted connection, and why one is not carried.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use mantle_proxy_core::model::PeerId;
use mantle_proxy_core::policy::ClientTls;
use mantle_proxy_core::reasons::{Denied, Unroutable};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use super::requests::PortUse;
use crate::metrics::TlsLabel;
use crate::tls;

/// Who may share a connection to the application.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Who {
    Identity(PeerId),
    Address(IpAddr),
}

/// Who is at the other end of an accepted connection, as far as it was proved.
pub(crate) struct Client {
    pub(super) addr: SocketAddr,
    pub(super) tls: TlsLabel,
    pub(super) id: Option<PeerId>,
    /// What is kept for each port whose HTTP this connection carries.
    pub(super) http: RefCell<HashMap<SocketAddr, Rc<PortUse>>>,
}

impl Client {
    pub(super) fn new(addr: SocketAddr, tls: TlsLabel, id: Option<PeerId>) -> Self {
        Self { addr, tls, id, http: RefCell::default() }
    }

    pub(super) fn who(&self) -> Who {
        self.id.clone().map_or(Who::Address(self.addr.ip()), Who::Identity)
    }

    /// The client at the other end of a finished handshake.
    pub(super) fn proved_by(addr: SocketAddr, tls: &TlsStream<TcpStream>) -> Self {
        let leaf = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let id = leaf.and_then(tls::peer_id);
        let name = id.as_ref().map_or_else(|| "".into(), |id| id.dns.clone());
        Self::new(addr, TlsLabel::Mutual(name), id)
    }

    pub(super) fn proved(&self) -> ClientTls<'_> {
        match (&self.id, &self.tls) {
            (Some(id), _) => ClientTls::Identity(id),
            (None, TlsLabel::Mutual(_)) => ClientTls::Anonymous,
            (None, TlsLabel::Passthru(_) | TlsLabel::None(_)) => ClientTls::None,
        }
    }
}

/// Why inbound traffic was not carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Policy(Denied),
    /// The application did not take the connection.
    App(Unroutable),
}

impl Refused {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Policy(why) => why.label(),
            Self::App(why) => why.label(),
        }
    }
}

impl From<Denied> for Refused {
    fn from(why: Denied) -> Self {
        Self::Policy(why)
    }
}
