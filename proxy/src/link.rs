//! Links: pooled mutual-TLS connections between two proxies, each carrying many streams. The rim of `core::mux`.
//!
//! One link per (peer's proxy, identity wanted there, own certificate, thread); a second one when the first is full or
//! choked. Everything is single-threaded. A link is one task (`link/run.rs`): it is woken when bytes arrive or when the
//! first stream has something to say, and runs after the tasks that are ready already, so what became ready in one turn
//! of the event loop leaves as one TLS record and one write, without a timer.
//!
//! | file | |
//! |---|---|
//! | `link/run.rs` | the task of one link |
//! | `link/stream.rs` | one stream as `AsyncRead` and `AsyncWrite` |

mod run;
mod stream;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mantle_proxy_core::model::Endpoint;
use mantle_proxy_core::mux::{Open, Role};
use mantle_proxy_core::reasons::{LinkClosed, Unroutable};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::{TlsConnector, server};

use crate::socket::{self, Dial};
use crate::tls::{self, ALPN_MUX, Credentials, CredentialsWatch};
use run::Link;

pub(crate) use mantle_proxy_core::mux::Hinted as LinkHint;
pub(crate) use stream::{LinkHandle, MuxStream};

/// The links that one thread has dialled.
#[derive(Clone)]
pub(crate) struct Links(Rc<Inner>);

struct Inner {
    dial: Dial,
    peers: RefCell<HashMap<Key, Peer>>,
}

/// The peer's proxy and the identity that must be proved there.
type Key = (SocketAddr, Arc<str>);

#[derive(Default)]
struct Peer {
    links: Vec<Rc<Link>>,
    /// Somebody is dialling: the outcome comes here.
    dialling: Option<watch::Receiver<Option<Result<(), Unroutable>>>>,
}

impl Links {
    pub(crate) fn new(dial: Dial) -> Self {
        Self(Rc::new(Inner { dial, peers: RefCell::default() }))
    }

    /// Opens a stream to `port` of the endpoint's pod, on a link that is there or is dialled now.
    ///
    /// Nothing leaves before the stream's first bytes (or the end of this turn of the event loop).
    ///
    /// # Errors
    /// `ConnectFailed`, `IdentityMismatch`, `TlsFailed`, `UnsupportedPeer` (no ALPN of ours), `InvalidIdentity` (the
    /// endpoint has no identity, which is the caller's mistake).
    pub(crate) async fn open(
        &self,
        endpoint: &Endpoint,
        credentials: &Arc<Credentials>,
        port: u16,
        hint: LinkHint,
    ) -> Result<MuxStream, Unroutable> {
        let identity = endpoint.tls.clone().map_err(|_| Unroutable::InvalidIdentity)?;
        let proxy = SocketAddr::new(endpoint.addr.ip(), endpoint.opaque_transport.unwrap_or(endpoint.addr.port()));
        let key = (proxy, identity);
        let open = Open { port, protocol: hint, authority: None };
        // A fresh link takes a stream, unless others filled it at once or its peer renews its certificate just now.
        let mut dialled = 0;
        loop {
            if let Some(stream) = self.0.on_pooled(&key, credentials.epoch, &open) {
                return Ok(stream);
            }
            if dialled == ATTEMPTS {
                return Err(Unroutable::ConnectFailed);
            }
            dialled += 1;
            let mut outcome = Inner::dialling(&self.0, &key, credentials);
            let outcome = outcome.wait_for(Option::is_some).await.ok().and_then(|outcome| *outcome);
            outcome.unwrap_or(Err(Unroutable::ConnectFailed))?;
        }
    }

    /// Lets links go whose certificate was replaced, as soon as it is. Ends with the control side.
    pub(crate) async fn follow(self, mut credentials: CredentialsWatch) {
        while credentials.changed().await.is_ok() {
            let Some(epoch) = credentials.borrow_and_update().as_ref().map(|credentials| credentials.epoch) else {
                continue;
            };
            for link in self.0.peers.borrow().values().flat_map(|peer| &peer.links).filter(|link| link.epoch < epoch) {
                link.go_away();
            }
        }
    }
}

impl Inner {
    /// A stream on the first link with room; links of an older certificate are told to go.
    fn on_pooled(&self, key: &Key, epoch: u64, open: &Open) -> Option<MuxStream> {
        let peers = self.peers.borrow();
        let links = &peers.get(key)?.links;
        for link in links.iter().filter(|link| link.epoch < epoch) {
            link.go_away();
        }
        let current = || links.iter().filter(|link| link.epoch >= epoch);
        let with_room = current().find(|link| link.has_room());
        let any = || if links.len() >= MAX_LINKS { current().next() } else { None };
        with_room.or_else(any)?.open(open.clone())
    }

    /// Joins the dial that is under way, or starts one; it goes on if the caller is dropped.
    fn dialling(
        this: &Rc<Self>,
        key: &Key,
        credentials: &Arc<Credentials>,
    ) -> watch::Receiver<Option<Result<(), Unroutable>>> {
        let mut peers = this.peers.borrow_mut();
        let peer = peers.entry(key.clone()).or_default();
        if let Some(outcome) = &peer.dialling {
            return outcome.clone();
        }
        let (tell, outcome) = watch::channel(None);
        peer.dialling = Some(outcome.clone());
        let (this, key, credentials) = (this.clone(), key.clone(), credentials.clone());
        spawn_local(async move {
            let dialled = this.dial(&key, &credentials).await;
            let mut peers = this.peers.borrow_mut();
            let peer = peers.entry(key.clone()).or_default();
            peer.dialling = None;
            let outcome = match dialled {
                Ok(link) => {
                    // A peer that renews its certificate just now says goodbye at once: whoever waits dials again.
                    if !link.is_closed() {
                        peer.links.push(link);
                    }
                    Ok(())
                }
                Err(why) => {
                    if peer.links.is_empty() {
                        peers.remove(&key);
                    }
                    Err(why)
                }
            };
            tell.send_replace(Some(outcome));
        });
        outcome
    }

    /// Connects, proves both sides, and waits until the peer is ready for streams, or has already drained the link.
    async fn dial(self: &Rc<Self>, key: &Key, credentials: &Credentials) -> Result<Rc<Link>, Unroutable> {
        let (proxy, identity) = key;
        let name = tls::server_name(identity).ok_or(Unroutable::InvalidIdentity)?;
        let tcp = socket::connect(*proxy, self.dial).await.map_err(|_| Unroutable::ConnectFailed)?;
        let deadline = Instant::now() + HANDSHAKE;
        let handshake = TlsConnector::from(credentials.client_link.clone()).connect(name, tcp);
        let tls = match timeout_at(deadline, handshake).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => return Err(handshake_failure(&error)),
            Err(_) => return Err(Unroutable::TlsFailed),
        };
        let session = tls.get_ref().1;
        if session.alpn_protocol() != Some(ALPN_MUX) {
            // A proxy of another mesh: its conventions (transport header, one connection a stream) have their place here.
            return Err(Unroutable::UnsupportedPeer);
        }
        let leaf = session.peer_certificates().and_then(|chain| chain.first());
        let peer = leaf.and_then(tls::peer).ok_or(Unroutable::IdentityMismatch)?;
        let until = credentials.not_after.min(peer.not_after);
        let link = Rc::new(Link::new(Role::Dialler, peer.id, credentials.epoch));
        let (pool, key, running) = (Rc::downgrade(self), key.clone(), link.clone());
        spawn_local(async move {
            let closed = running.run(tls, until_instant(until), |_, _| {}, std::future::pending()).await;
            tracing::debug!(peer = %key.0, identity = &*running.peer.dns, reason = closed.label(), "link closed");
            if let Some(pool) = pool.upgrade() {
                pool.forget(&key, &running);
            }
        });
        match timeout_at(deadline, link.ready()).await {
            Ok(Ok(()) | Err(LinkClosed::Drained)) => Ok(link),
            Ok(Err(_)) | Err(_) => {
                link.go_away();
                Err(Unroutable::TlsFailed)
            }
        }
    }

    fn forget(&self, key: &Key, link: &Rc<Link>) {
        let mut peers = self.peers.borrow_mut();
        if let Some(peer) = peers.get_mut(key) {
            peer.links.retain(|other| !Rc::ptr_eq(other, link));
            if peer.links.is_empty() && peer.dialling.is_none() {
                peers.remove(key);
            }
        }
    }
}

/// Serves a link whose TLS handshake is done and whose client has proved an identity.
///
/// Calls `accept` for each stream; it must only spawn. When `drain` resolves the peer is told to open no more; what is
/// open goes on. Returns when the link is closed: by the peer, drained, at a violation, or at the earlier end of the two
/// certificates.
pub(crate) async fn serve(
    tls: server::TlsStream<TcpStream>,
    credentials: &Credentials,
    accept: impl FnMut(Arc<Open>, MuxStream),
    drain: impl Future<Output = ()>,
) -> LinkClosed {
    let leaf = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let Some(peer) = leaf.and_then(tls::peer) else { return LinkClosed::PeerGone };
    let until = credentials.not_after.min(peer.not_after);
    let link = Rc::new(Link::new(Role::Acceptor, peer.id, credentials.epoch));
    link.run(tls, until_instant(until), accept, pin!(drain)).await
}

/// A wrong or unverifiable certificate is told from any other failure of a handshake.
pub(crate) fn handshake_failure(error: &io::Error) -> Unroutable {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => {
            Unroutable::IdentityMismatch
        }
        _ => Unroutable::TlsFailed,
    }
}

fn until_instant(end: SystemTime) -> Instant {
    Instant::now() + end.duration_since(SystemTime::now()).unwrap_or_default()
}

const HANDSHAKE: Duration = Duration::from_secs(5);
/// Links to one peer with one certificate.
const MAX_LINKS: usize = 4;
/// Dials that one stream waits for.
const ATTEMPTS: usize = 4;
