//! The admin port (4191): `/metrics`, `/ready`, `/live` for scrapers and probes, on plaintext and mesh TLS alike.
//!
//! HTTP/1.1 only; the first byte tells TLS from plaintext. Connections, heads and time are bounded: whoever drips bytes
//! loses the connection, and the idle make room for others. `POST /shutdown` exists only if the configuration says so, for loopback clients.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::control::slots::{Slot, Slots};
use crate::drain::{Drain, Phase, Shutdown};
use crate::metrics::{CONTENT_TYPE, Metrics};
use crate::socket;
use crate::tls::CredentialsWatch;

/// What the admin port can tell and do.
pub(crate) struct Admin {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) credentials: CredentialsWatch,
    /// The experimental mode: ready without a certificate.
    pub(crate) fails_open: bool,
    pub(crate) drain: Drain,
    /// `None`: `/shutdown` does not exist.
    pub(crate) shutdown: Option<Shutdown>,
}

/// Connections at once; a client's first byte and each head must come within `HEAD`, and all of a connection within `LIFE`.
const MAX_CONNECTIONS: usize = 256;
const HEAD: Duration = Duration::from_secs(10);
const LIFE: Duration = Duration::from_secs(600);
const MAX_HEAD: usize = 16 * 1024;

/// The first byte of a TLS record that opens a handshake.
const TLS_HANDSHAKE: u8 = 22;

/// Serves until dropped.
pub(crate) async fn serve(listener: TcpListener, admin: Arc<Admin>) {
    let slots = Slots::new(MAX_CONNECTIONS);
    let accepted = |io: TcpStream, peer: SocketAddr| {
        let admin = admin.clone();
        slots.spawn(|slot| async move {
            let _ = tokio::time::timeout(LIFE, connection(io, peer, admin, slot)).await;
        });
    };
    socket::accept(&listener, accepted, |error| tracing::warn!(%error, "the admin port cannot accept")).await;
}

async fn connection(io: TcpStream, peer: SocketAddr, admin: Arc<Admin>, slot: Slot) {
    let mut first = [0];
    let Ok(Ok(1)) = tokio::time::timeout(HEAD, io.peek(&mut first)).await else { return };
    if first[0] != TLS_HANDSHAKE {
        return http1(io, peer, admin, slot).await;
    }
    let Some(now) = admin.credentials.borrow().clone() else { return };
    let accept = TlsAcceptor::from(now.server_plain.clone()).accept(io);
    match tokio::time::timeout(HEAD, accept).await {
        Ok(Ok(io)) => http1(io, peer, admin, slot).await,
        Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS with a client of the admin port failed"),
        Err(_) => {}
    }
}

async fn http1(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
    admin: Arc<Admin>,
    slot: Slot,
) {
    let slot = std::sync::Mutex::new(slot);
    let answer = hyper::service::service_fn(move |request: Request<Incoming>| {
        slot.lock().unwrap_or_else(PoisonError::into_inner).touch();
        let response = respond(&admin, peer, request.method(), request.uri().path());
        async move { Ok::<_, Infallible>(response) }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(MAX_HEAD);
    if let Err(error) = builder.serve_connection(TokioIo::new(io), answer).await {
        tracing::debug!(%peer, %error, "an admin connection ended");
    }
}

fn respond(admin: &Admin, peer: SocketAddr, method: &Method, path: &str) -> Response<Full<Bytes>> {
    let read = matches!(*method, Method::GET | Method::HEAD);
    match (path, &admin.shutdown) {
        ("/metrics", _) if read => text(StatusCode::OK, CONTENT_TYPE, admin.metrics.text(Instant::now())),
        // What every TLS handshake with us shows, for those whose own proxy ends the TLS that they would look at.
        ("/identity", _) if read => {
            match admin.credentials.borrow().as_deref().and_then(|c| c.certified.cert.first()) {
                Some(leaf) => text(StatusCode::OK, "application/pkix-cert", leaf.to_vec()),
                None => plain(StatusCode::NOT_FOUND, "no certificate yet\n"),
            }
        }
        ("/live", _) if read => plain(StatusCode::OK, "live\n"),
        ("/ready", _) if read => match not_ready(admin, SystemTime::now()) {
            None => plain(StatusCode::OK, "ready\n"),
            Some(why) => plain(StatusCode::SERVICE_UNAVAILABLE, why),
        },
        ("/shutdown", Some(shutdown)) if *method == Method::POST => {
            if !peer.ip().to_canonical().is_loopback() {
                return plain(StatusCode::FORBIDDEN, "shutdown is for loopback clients only\n");
            }
            tracing::info!(%peer, "asked to shut down");
            shutdown.advance(Phase::Draining);
            plain(StatusCode::OK, "shutdown\n")
        }
        // Without the endpoint a POST is a 404, as linkerd2-proxy answers.
        ("/shutdown", None) if *method == Method::POST => plain(StatusCode::NOT_FOUND, "not found\n"),
        ("/metrics" | "/identity" | "/live" | "/ready" | "/shutdown", _) => {
            let allow = if path == "/shutdown" { "POST" } else { "GET, HEAD" };
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
            response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static(allow));
            response
        }
        _ => plain(StatusCode::NOT_FOUND, "not found\n"),
    }
}

/// Why this proxy should get no traffic; `None`: it may.
fn not_ready(admin: &Admin, now: SystemTime) -> Option<&'static str> {
    match admin.credentials.borrow().as_deref() {
        None if !admin.fails_open => Some("not ready: no certificate yet\n"),
        Some(current) if current.not_after <= now && !admin.fails_open => Some("not ready: the certificate is over\n"),
        _ if admin.drain.is_draining() => Some("not ready: draining\n"),
        _ => None,
    }
}

fn plain(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    text(status, "text/plain; charset=utf-8", body)
}

fn text(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests;
