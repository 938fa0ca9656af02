//! Port 4190: `io.linkerd.proxy.tap.Tap` and `mantle.v1.Edges` over HTTP/2, for one identity only.
//!
//! Whoever cannot prove to be the tap service, from loopback too, gets `Unauthenticated` with the reason on every call.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use linkerd2_proxy_api::http_types::{http_method, scheme};
use linkerd2_proxy_api::tap::observe_request::{self, extract, r#match};
use linkerd2_proxy_api::tap::tap_server::{Tap as TapRpc, TapServer};
use linkerd2_proxy_api::tap::{ObserveRequest, TapEvent};
use mantle_proxy_core::model::Cidr;
use mantle_proxy_core::tapmatch::{TapMatch, Tcp, Text};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tonic::body::Body;
use tonic::codegen::tokio_stream::Stream;
use tonic::codegen::{BoxFuture, Service};
use tonic::{Code, Status};

use super::{Registration, Taps};
use crate::control::slots::{Slot, Slots};
use crate::edges::Edges;
use crate::metrics::TlsLabel;
use crate::socket;
use crate::tls::{self, CredentialsWatch};

/// Connections at once (strangers make room for others), and how long one may take to say who it is.
const MAX_CONNECTIONS: usize = 128;
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How long one who may not ask is told so.
const REFUSED: Duration = Duration::from_secs(30);

/// Nodes of one match tree.
const MAX_MATCHES: usize = 1024;

/// Serves until dropped. `observer`: the identity that may ask.
pub(crate) async fn serve(
    listener: TcpListener,
    observer: Arc<str>,
    credentials: CredentialsWatch,
    taps: Arc<Taps>,
    edges: Arc<Edges>,
) {
    let slots = Slots::new(MAX_CONNECTIONS);
    let accepted = |io: TcpStream, peer: SocketAddr| {
        let (observer, credentials, taps, edges) = (observer.clone(), credentials.clone(), taps.clone(), edges.clone());
        slots.spawn(|slot| async move { connection(io, peer, slot, &observer, &credentials, taps, edges).await });
    };
    socket::accept(&listener, accepted, |error| tracing::warn!(%error, "the tap port cannot accept")).await;
}

async fn connection(
    io: TcpStream,
    peer: SocketAddr,
    mut slot: Slot,
    observer: &Arc<str>,
    credentials: &CredentialsWatch,
    taps: Arc<Taps>,
    edges: Arc<Edges>,
) {
    let mut first = [0];
    let peeked = tokio::time::timeout(HANDSHAKE, io.peek(&mut first)).await;
    let Ok(Ok(1)) = peeked else { return };
    let service = |refused| Served { tap: TapServer::new(TapService { taps, refused }), edges, refused };
    if first[0] != TLS_HANDSHAKE {
        let _ = tokio::time::timeout(REFUSED, http2(io, service(Some("mutual TLS is required")))).await;
        return;
    }
    let Some(now) = credentials.borrow().clone() else { return };
    let accept = TlsAcceptor::from(now.server_http2.clone()).accept(io);
    let io = match tokio::time::timeout(HANDSHAKE, accept).await {
        Ok(Ok(io)) => io,
        Ok(Err(error)) => return tracing::debug!(%peer, %error, "TLS with a tap client failed"),
        Err(_) => return,
    };
    let client = io.get_ref().1.peer_certificates().and_then(|chain| tls::peer_id(chain.first()?));
    let refused = match client {
        Some(id) if id.dns == *observer => None,
        Some(_) => Some("this identity may not tap"),
        None => Some("a client certificate is required"),
    };
    if refused.is_some() {
        let _ = tokio::time::timeout(REFUSED, http2(io, service(refused))).await;
        return;
    }
    slot.keep();
    http2(io, service(None)).await;
}

/// The first byte of a TLS record that opens a handshake.
const TLS_HANDSHAKE: u8 = 22;

async fn http2(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, service: Served) {
    let serve = hyper::service::service_fn(move |request: Request<Incoming>| {
        let mut service = service.clone();
        async move { Ok::<_, Infallible>(service.call(request).await) }
    });
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder.timer(TokioTimer::new()).max_concurrent_streams(64).max_header_list_size(16 * 1024);
    if let Err(error) = builder.serve_connection(TokioIo::new(io), serve).await {
        tracing::debug!(%error, "a tap connection ended");
    }
}

#[derive(Clone)]
struct Served {
    tap: TapServer<TapService>,
    edges: Arc<Edges>,
    refused: Option<&'static str>,
}

impl Served {
    async fn call(&mut self, request: Request<Incoming>) -> Response<Body> {
        match request.uri().path() {
            path if path.starts_with("/io.linkerd.proxy.tap.Tap/") => match self.tap.call(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            },
            "/mantle.v1.Edges/List" => {
                let service = EdgesService { edges: self.edges.clone(), refused: self.refused };
                tonic::server::Grpc::new(tonic_prost::ProstCodec::default()).unary(service, request).await
            }
            _ => Status::unimplemented("not a service of this port").into_http(),
        }
    }
}

#[derive(Clone)]
struct TapService {
    taps: Arc<Taps>,
    /// Why this client may not ask.
    refused: Option<&'static str>,
}

#[tonic::async_trait]
impl TapRpc for TapService {
    type ObserveStream = Events;

    async fn observe(&self, request: tonic::Request<ObserveRequest>) -> Result<tonic::Response<Events>, Status> {
        authorized(self.refused)?;
        let request = request.into_inner();
        if request.limit == 0 {
            return Err(Status::invalid_argument("limit must be greater than 0"));
        }
        let wanted = request.r#match.ok_or_else(|| Status::invalid_argument("match is required"))?;
        let wanted = tap_match(wanted, &mut MAX_MATCHES.clone()).map_err(Status::invalid_argument)?;
        let extract = request.extract.and_then(|extract| extract.extract);
        let headers = matches!(extract, Some(observe_request::extract::Extract::Http(http)) if http.extract == Some(extract::http::Extract::Headers(extract::http::Headers {})));
        let (events, registration) = self
            .taps
            .add(wanted, headers, request.limit)
            .ok_or_else(|| Status::resource_exhausted("too many observers"))?;
        Ok(tonic::Response::new(Events { events, _registration: registration }))
    }
}

fn authorized(refused: Option<&'static str>) -> Result<(), Status> {
    refused.map_or(Ok(()), |why| Err(Status::new(Code::Unauthenticated, why)))
}

/// An observer's events; the call's end removes the observer.
struct Events {
    events: mpsc::Receiver<TapEvent>,
    _registration: Registration,
}

impl Stream for Events {
    type Item = Result<TapEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.poll_recv(cx).map(|event| event.map(Ok))
    }
}

/// The wire's tree as the core's. `left`: nodes it may still have.
fn tap_match(wire: observe_request::Match, left: &mut usize) -> Result<TapMatch, &'static str> {
    *left = left.checked_sub(1).ok_or("match is too large")?;
    let seq = |seq: r#match::Seq, left: &mut usize| {
        seq.matches.into_iter().map(|m| tap_match(m, left)).collect::<Result<Vec<_>, _>>()
    };
    Ok(match wire.r#match.ok_or("a match is empty")? {
        r#match::Match::All(all) => TapMatch::All(seq(all, left)?),
        r#match::Match::Any(any) => TapMatch::Any(seq(any, left)?),
        r#match::Match::Not(not) => TapMatch::Not(Box::new(tap_match(*not, left)?)),
        r#match::Match::Source(source) => TapMatch::Source(tcp(source)?),
        r#match::Match::Destination(destination) => TapMatch::Destination(tcp(destination)?),
        r#match::Match::Http(http) => match http.r#match.ok_or("an http match is empty")? {
            r#match::http::Match::Scheme(wire) => TapMatch::Scheme(match wire.r#type.ok_or("a scheme is empty")? {
                scheme::Type::Registered(number) => {
                    let known = scheme::Registered::try_from(number).map_err(|_| "a scheme is unknown")?;
                    known.as_str_name().to_ascii_lowercase()
                }
                scheme::Type::Unregistered(name) => name,
            }),
            r#match::http::Match::Method(wire) => TapMatch::Method(match wire.r#type.ok_or("a method is empty")? {
                http_method::Type::Registered(number) => http_method::Registered::try_from(number)
                    .map_err(|_| "a method is unknown")?
                    .as_str_name()
                    .to_owned(),
                http_method::Type::Unregistered(name) => name,
            }),
            r#match::http::Match::Authority(wire) => TapMatch::Authority(text(wire)?),
            r#match::http::Match::Path(wire) => TapMatch::Path(text(wire)?),
        },
        r#match::Match::DestinationLabel(label) => TapMatch::DestinationLabel(label.key, label.value),
        r#match::Match::RouteLabel(label) => TapMatch::RouteLabel(label.key, label.value),
    })
}

fn tcp(wire: r#match::Tcp) -> Result<Tcp, &'static str> {
    match wire.r#match.ok_or("a tcp match is empty")? {
        r#match::tcp::Match::Netmask(mask) => {
            let addr = mask.ip.and_then(|ip| IpAddr::try_from(ip).ok()).ok_or("a netmask has no address")?;
            let most = if addr.is_ipv4() { 32 } else { 128 };
            let prefix =
                u8::try_from(mask.mask).ok().filter(|prefix| *prefix <= most).ok_or("a netmask is too long")?;
            Ok(Tcp::Net(Cidr { addr, prefix }))
        }
        r#match::tcp::Match::Ports(ports) => {
            let port = |port: u32| u16::try_from(port).map_err(|_| "a port is too large");
            let (min, max) = (port(ports.min)?, port(ports.max)?);
            // The wire's 0 is "not said".
            let max = if max == 0 { u16::MAX } else { max };
            if min <= max { Ok(Tcp::Ports(min, max)) } else { Err("a port range is empty") }
        }
    }
}

fn text(wire: r#match::http::StringMatch) -> Result<Text, &'static str> {
    match wire.r#match.ok_or("a string match is empty")? {
        r#match::http::string_match::Match::Exact(exact) => Ok(Text::Exact(exact)),
        r#match::http::string_match::Match::Prefix(prefix) => Ok(Text::Prefix(prefix)),
    }
}

/// `mantle.v1.Edges`: the messages of `proto/mantle/v1/edges.proto`, written by hand with the same field numbers (three
/// messages do not earn a code generator here; a test decodes them against the file's numbers).
pub(crate) mod edges_v1 {
    #[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
    pub(crate) struct ListRequest {}

    #[derive(Clone, PartialEq, Eq, ::prost::Message)]
    pub(crate) struct ListResponse {
        #[prost(message, repeated, tag = "1")]
        pub(crate) edges: Vec<Edge>,
        #[prost(uint64, tag = "2")]
        pub(crate) overflowed: u64,
    }

    #[derive(Clone, PartialEq, Eq, ::prost::Message)]
    pub(crate) struct Edge {
        #[prost(string, tag = "1")]
        pub(crate) client_ip: String,
        #[prost(uint32, tag = "2")]
        pub(crate) port: u32,
        #[prost(oneof = "Tls", tags = "3, 4, 5")]
        pub(crate) tls: Option<Tls>,
        #[prost(uint64, tag = "6")]
        pub(crate) open: u64,
        #[prost(uint64, tag = "7")]
        pub(crate) total: u64,
        #[prost(int64, tag = "8")]
        pub(crate) last_seen_ms: i64,
    }

    #[derive(Clone, PartialEq, Eq, ::prost::Oneof)]
    pub(crate) enum Tls {
        #[prost(string, tag = "3")]
        ClientId(String),
        #[prost(string, tag = "4")]
        NoTlsReason(String),
        #[prost(string, tag = "5")]
        PassthruSni(String),
    }
}

struct EdgesService {
    edges: Arc<Edges>,
    refused: Option<&'static str>,
}

impl tonic::server::UnaryService<edges_v1::ListRequest> for EdgesService {
    type Response = edges_v1::ListResponse;
    type Future = BoxFuture<tonic::Response<edges_v1::ListResponse>, Status>;

    fn call(&mut self, _: tonic::Request<edges_v1::ListRequest>) -> Self::Future {
        let listed = authorized(self.refused).map(|()| tonic::Response::new(list(&self.edges)));
        Box::pin(std::future::ready(listed))
    }
}

fn list(edges: &Edges) -> edges_v1::ListResponse {
    let (rows, overflowed) = edges.snapshot();
    let edges = rows.into_iter().map(|row| edges_v1::Edge {
        client_ip: row.client.to_string(),
        port: u32::from(row.port),
        tls: Some(match row.tls {
            TlsLabel::Mutual(id) => edges_v1::Tls::ClientId(id.to_string()),
            TlsLabel::Passthru(sni) => edges_v1::Tls::PassthruSni(sni.to_string()),
            TlsLabel::None(reason) => edges_v1::Tls::NoTlsReason(reason.label().to_owned()),
        }),
        open: row.open,
        total: row.total,
        last_seen_ms: i64::try_from(row.last_seen_ms).unwrap_or(i64::MAX),
    });
    edges_v1::ListResponse { edges: edges.collect(), overflowed }
}
