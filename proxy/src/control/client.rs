//! Connections to the control plane: HTTP/2 with prior knowledge, in mesh TLS without ALPN, or plaintext on loopback.
//!
//! Names are resolved by the system's resolver at each connection and every address is tried. There are no HTTP/2
//! keep-alive pings (gRPC servers end clients that ping idle connections); TCP keep-alive finds a dead peer.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use http::Uri;
use hyper_util::rt::TokioIo;
use mantle_proxy_core::reasons::NoTls;
use rustls::ClientConfig;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use crate::config::ControlAddr;
use crate::metrics::{ControlLabels, TlsLabel};
use crate::socket::{self, Dial};
use crate::tls::clock::Handshake;
use crate::tls::{self, CredentialsWatch};

/// What the client shows when the service's address is not loopback.
#[derive(Clone)]
pub(crate) enum ClientTls {
    /// The certificate of the moment; without one there is no connection.
    Identity(CredentialsWatch),
    /// This configuration, for one call: Certify.
    Fixed(Arc<ClientConfig>),
}

/// How long sent bytes may go unacknowledged before the connection is given up.
const DEAD_PEER: Duration = Duration::from_secs(20);

/// One whole connection attempt: resolving, every address, TLS.
const CONNECT: Duration = Duration::from_secs(10);

/// A channel that connects when first used, and again after a connection is lost. Calls fail while it cannot; the
/// caller waits and tries again.
///
/// Must be called within the runtime that will carry it.
pub(crate) fn channel(addr: &ControlAddr, tls: ClientTls, dial: Dial) -> Channel {
    let uri = format!("http://{addr}");
    let endpoint = Endpoint::from_shared(uri).expect("host and port were parsed by config.rs");
    let addr = addr.clone();
    endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let (addr, tls) = (addr.clone(), tls.clone());
        async move {
            match tokio::time::timeout(CONNECT, connect(&addr, tls, dial)).await {
                Ok(connected) => connected.map(TokioIo::new),
                Err(_) => {
                    Err(io::Error::new(io::ErrorKind::TimedOut, format!("{addr}: no connection within {CONNECT:?}")))
                }
            }
        }
    }))
}

/// How metrics name a service.
pub(crate) fn labels(addr: &ControlAddr) -> ControlLabels {
    let tls = match &addr.name {
        Some(name) => TlsLabel::Mutual(name.as_ref().into()),
        None => TlsLabel::None(NoTls::Loopback),
    };
    ControlLabels { addr: addr.to_string().into(), tls }
}

async fn connect(addr: &ControlAddr, tls: ClientTls, dial: Dial) -> io::Result<Connection> {
    let (config, name, until) = match (&addr.name, tls) {
        (None, _) => return connect_tcp(addr, dial).await.map(Connection::Plain),
        (Some(name), ClientTls::Fixed(config)) => (config, name, None),
        (Some(name), ClientTls::Identity(credentials)) => {
            let Some(now) = credentials.borrow().clone() else {
                return Err(io::Error::other("no certificate yet"));
            };
            (now.client_plain.clone(), name, Some(now.not_after))
        }
    };
    let name = tls::server_name(name).ok_or_else(|| io::Error::other("the service's name is not an identity"))?;
    let tcp = connect_tcp(addr, dial).await?;
    let tls = TlsConnector::from(config).connect(name, tcp).await;
    let left = until.map(|until| until.duration_since(SystemTime::now()).unwrap_or_default());
    tls.map(|tls| Connection::Tls(Box::new(tls), left.map(|left| Box::pin(tokio::time::sleep(left)))))
        .map_err(|why| io::Error::new(why.kind(), format!("TLS with {addr}: {}", Handshake(&why))))
}

async fn connect_tcp(addr: &ControlAddr, dial: Dial) -> io::Result<TcpStream> {
    let resolved = tokio::net::lookup_host((addr.host.as_str(), addr.port)).await;
    let mut addresses: Vec<SocketAddr> =
        resolved.map_err(|why| io::Error::new(why.kind(), format!("resolving {addr}: {why}")))?.collect();
    if addresses.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("{addr} has no address")));
    }
    // Replicas share the load: everyone starts at another one.
    let start = tls::random() as usize % addresses.len();
    addresses.rotate_left(start);
    let mut last = None;
    for address in addresses {
        match socket::connect(address, dial).await {
            Ok(tcp) => {
                // What was sent to a peer that vanished is not waited for longer than a silent one is.
                SockRef::from(&tcp).set_tcp_user_timeout(Some(DEAD_PEER))?;
                return Ok(tcp);
            }
            Err(why) => {
                let at = if address.to_string() == addr.to_string() { String::new() } else { format!(" at {address}") };
                last = Some(io::Error::new(why.kind(), format!("{addr}{at}: {why}")));
            }
        }
    }
    Err(last.expect("there was at least one address"))
}

/// A connection to a service.
enum Connection {
    Plain(TcpStream),
    /// With the moment when our certificate ends, and the connection with it: what we are is proved anew.
    Tls(Box<TlsStream<TcpStream>>, Option<Pin<Box<Sleep>>>),
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Self::Tls(io, end) => {
                if end.as_mut().is_some_and(|end| end.as_mut().poll(cx).is_ready()) {
                    let ended = "our certificate has ended: it is proved anew who we are";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, ended)));
                }
                Pin::new(io).poll_read(cx, buf)
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Self::Tls(io, _) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_flush(cx),
            Self::Tls(io, _) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tls(io, _) => Pin::new(io).poll_shutdown(cx),
        }
    }
}
