//! The server side of an outbound connection: a stream on a mesh link, mesh TLS of its own, or plaintext with its reason.
//!
//! Carries out the core's `Plan` and nothing else: after a failed handshake or a wrong identity there is an error, and
//! no way from there to plaintext, but for the experimental mode's next attempt (`fail_open.rs`).

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use mantle_proxy_core::model::Endpoint;
use mantle_proxy_core::reasons::{NoTls, Unroutable};
use mantle_proxy_core::route::{self, Own, Plan, Transport};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::app::Thread;
use crate::link::{LinkHint, MuxStream, handshake_failure};
use crate::metrics::TlsLabel;
use crate::socket::{self, Abort, Dial};
use crate::tls::Credentials;

pub(crate) enum Upstream {
    Mux(MuxStream),
    Tls(Box<TlsStream<TcpStream>>),
    Plain(TcpStream),
}

/// A plan with the label that metrics and tap show for it.
pub(crate) struct Route {
    pub(crate) plan: Plan,
    pub(crate) tls: TlsLabel,
}

/// How `endpoint` is reached from this pod.
///
/// # Errors
/// `Loop`, `InvalidIdentity`.
pub(crate) fn route(cx: &Thread, endpoint: &Endpoint) -> Result<Route, Unroutable> {
    let own = Own { ips: &cx.config.inbound_ips, ports: &cx.own_ports };
    let plan = if fails_open(cx, endpoint) {
        route::decide(&Endpoint { tls: Err(NoTls::FailOpen), ..endpoint.clone() }, own)?
    } else {
        route::decide(endpoint, own)?
    };
    let tls = match &plan {
        Plan::Mesh { identity, .. } => TlsLabel::Mutual(identity.clone()),
        Plan::Plain(plaintext) => TlsLabel::None(plaintext.reason()),
    };
    Ok(Route { plan, tls })
}

/// Whether the experimental mode sends this endpoint plaintext now. Never in the default mode.
pub(crate) fn fails_open(cx: &Thread, endpoint: &Endpoint) -> bool {
    cx.fail_open.is_possible()
        && cx.fail_open.applies(endpoint, cx.control.credentials.borrow().as_deref(), SystemTime::now())
}

/// Carries out a plan: opens a stream, or connects.
///
/// # Errors
/// `ConnectFailed`, `IdentityMismatch`, `TlsFailed`, `InvalidIdentity`, and what a link refuses.
pub(crate) async fn open(
    cx: &Thread,
    endpoint: &Endpoint,
    route: &Route,
    hint: LinkHint,
) -> Result<Upstream, Unroutable> {
    match &route.plan {
        Plan::Plain(plaintext) => connect(plaintext.addr(), cx.dial()).await.map(Upstream::Plain),
        Plan::Mesh { transport: Transport::Link { port, .. }, .. } => {
            cx.links.open(endpoint, &cx.credentials()?, *port, hint).await.map(Upstream::Mux)
        }
        Plan::Mesh { identity, transport: Transport::Direct { addr } } => {
            let tcp = connect(*addr, cx.dial()).await?;
            // Boxed: rare, and large enough to weigh on every connection's task.
            let tls = Box::pin(handshake(tcp, identity, &*cx.credentials()?)).await?;
            Ok(Upstream::Tls(Box::new(tls)))
        }
    }
}

async fn connect(addr: SocketAddr, dial: Dial) -> Result<TcpStream, Unroutable> {
    socket::connect(addr, dial).await.map_err(|_| Unroutable::ConnectFailed)
}

/// Mesh TLS without ALPN; the server must prove to be `identity`.
async fn handshake(
    tcp: TcpStream,
    identity: &Arc<str>,
    with: &Credentials,
) -> Result<TlsStream<TcpStream>, Unroutable> {
    let name = ServerName::try_from(identity.to_string()).map_err(|_| Unroutable::InvalidIdentity)?;
    let handshake = TlsConnector::from(with.client_plain.clone()).connect(name, tcp);
    match tokio::time::timeout(HANDSHAKE, handshake).await {
        Ok(Ok(tls)) => Ok(tls),
        Ok(Err(error)) => Err(handshake_failure(&error)),
        Err(_) => Err(Unroutable::TlsFailed),
    }
}

const HANDSHAKE: Duration = Duration::from_secs(5);

impl Abort for MuxStream {
    /// Dropping an unfinished stream resets it.
    fn abort(&self) {}
}

impl Abort for Upstream {
    fn abort(&self) {
        match self {
            Self::Mux(io) => io.abort(),
            Self::Tls(io) => io.get_ref().0.abort(),
            Self::Plain(io) => io.abort(),
        }
    }
}

impl AsyncRead for Upstream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Mux(io) => Pin::new(io).poll_read(cx, buf),
            Self::Tls(io) => Pin::new(io).poll_read(cx, buf),
            Self::Plain(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Upstream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Mux(io) => Pin::new(io).poll_write(cx, buf),
            Self::Tls(io) => Pin::new(io).poll_write(cx, buf),
            Self::Plain(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Mux(io) => Pin::new(io).poll_flush(cx),
            Self::Tls(io) => Pin::new(io).poll_flush(cx),
            Self::Plain(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Mux(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tls(io) => Pin::new(io).poll_shutdown(cx),
            Self::Plain(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}
