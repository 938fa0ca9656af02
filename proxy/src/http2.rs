//! HTTP/2 and gRPC, ended here and begun again: each request of a client's connection is balanced on its own.
//!
//! The server side faces the client, the client side a server: over a stream of a mesh link, or over TCP. A client
//! connection has at most one connection to each endpoint that its requests are for. Bodies flow through both ways at
//! once under each side's own flow control, with trailers; a reset of one side is passed to the other with its reason.
//! Deadlines (`grpc-timeout`) are the server's business and pass untouched. Inbound and outbound differ in their
//! `Service` only.
//!
//! | file | |
//! |---|---|
//! | `http2/pool.rs` | the connections to servers that one client connection has |
//! | `http2/exchange.rs` | one request and its response |
//! | `http2/head.rs` | which headers pass, and responses of our own |

mod exchange;
mod head;
mod pool;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use h2::server::{self, SendResponse};
use h2::{Reason, RecvStream};
use http::Request;
use http::request::Parts;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::JoinSet;

use crate::drain::Drain;
pub(crate) use crate::http1::Refusal;
use crate::link::LinkHandle;
use crate::metrics::TlsLabel;
use crate::tap::VisitHeaders;
pub(crate) use head::RequiredIds;
use pool::Pool;

/// Where requests go: the one thing in which inbound and outbound differ.
pub(crate) trait Service: 'static {
    type Io: AsyncRead + AsyncWrite + Unpin + 'static;
    /// A server that may take a request.
    type Place;
    /// What one request remembers; dropped when it is over.
    type Ticket: Record;

    /// Decides where a request goes, and adds the headers that the server is to see. Reserved headers of the client are
    /// gone already.
    ///
    /// # Errors
    /// The response to give instead.
    async fn pick(&self, request: &mut Parts) -> Result<Picked<Self::Place>, Refusal>;

    /// Connects to the place, for this client connection alone.
    ///
    /// # Errors
    /// The response to give if no other place can be found.
    async fn connect(&self, place: &Self::Place) -> Result<Connected<Self::Io>, Refusal>;

    /// The place could not be reached. Returns whether to pick again.
    fn unreachable(&self, place: Self::Place) -> bool;

    /// Resolves when the request, though under way, may go on no longer.
    fn revoked(&self, place: &Self::Place, request: &Parts) -> impl Future<Output = Refusal> + 'static;

    /// The request is about to be sent.
    fn begin(&self, place: Self::Place, request: &Parts) -> Self::Ticket;

    /// The proxy answers in the server's place. Returns whether the client may be told why (`l5d-proxy-error`).
    fn refused(&self, refusal: Refusal) -> bool;
}

/// A chosen server.
pub(crate) struct Picked<Place> {
    /// Requests with the same key share a connection.
    pub(crate) key: Key,
    pub(crate) place: Place,
    /// Its server is not one of the mesh's proxies: reserved headers in the response are its own invention.
    pub(crate) strip_response: bool,
}

/// An address and how it is secured: a server that joins the mesh is not reached by what was plaintext before.
pub(crate) type Key = (SocketAddr, TlsLabel);

/// A fresh connection; with the link that carries it, which may retire before the connection does.
pub(crate) struct Connected<Io> {
    pub(crate) io: Io,
    pub(crate) link: Option<LinkHandle>,
}

/// What becomes metric and tap event. Dropped before `end`, the request counts as failed.
pub(crate) trait Record: 'static {
    /// The head of the final response is here, so long after the request was sent.
    fn response(&mut self, status: u16, headers: VisitHeaders<'_>, after: Duration);
    /// Bytes of the response's body passed.
    fn body(&mut self, bytes: u64);
    /// What follows the response's body.
    fn trailers(&mut self, trailers: VisitHeaders<'_>);
    /// `grpc-status`, from the trailers or from a response that has nothing else.
    fn grpc_status(&mut self, code: u8);
    /// The exchange is over; `failed`: without a complete response.
    fn end(self, failed: bool);
}

/// How serving a client ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The client is done, or was asked to be.
    Closed,
    /// Its bytes were not HTTP/2, or broke its rules.
    Bad(Reason),
    /// Its connection broke.
    Broken,
}

/// Serves one client connection until it ends. `seen` is what was read of it already (the preface, or part of it).
pub(crate) async fn serve<C, S>(client: C, seen: BytesMut, service: Rc<S>, drain: &mut Drain) -> End
where
    C: AsyncRead + AsyncWrite + Unpin,
    S: Service,
{
    let client = Rewound { seen: seen.freeze(), io: client };
    let mut builder = server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buffer_size(SEND_BUFFER);
    let mut connection = match builder.handshake(client).await {
        Ok(connection) => connection,
        Err(error) => return End::of(&error),
    };
    let context = Rc::new(Serving { service, pool: RefCell::default() });
    // Requests end with their client: dropping the set drops what is left of them.
    let mut requests = JoinSet::new();
    let mut draining = false;
    loop {
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            () = drain.draining(), if !draining => {
                draining = true;
                connection.graceful_shutdown();
                continue;
            }
            Some(_) = requests.join_next() => continue,
        };
        match accepted {
            Some(Ok((request, respond))) => drop(requests.spawn_local(context.clone().request(request, respond))),
            Some(Err(error)) => return End::of(&error),
            None => return End::Closed,
        }
    }
}

/// One client connection being served.
struct Serving<S> {
    service: Rc<S>,
    pool: RefCell<Pool>,
}

impl<S: Service> Serving<S> {
    /// Carries one request to its end.
    async fn request(self: Rc<Self>, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        let (mut parts, body) = request.into_parts();
        let grpc = head::is_grpc(&parts.headers);
        head::clean(&mut parts.headers);
        if let Some(required) = head::required_ids(&parts.headers) {
            parts.extensions.insert(required);
        }
        head::strip_reserved(&mut parts.headers);
        if let Err((refusal, mut respond)) = exchange::run(&*self, parts, body, respond).await {
            let explain = self.service.refused(refusal);
            // A client that is gone already needs no answer.
            let _ = respond.send_response(head::refusal(refusal, grpc, explain), true);
        }
    }
}

impl End {
    fn of(error: &h2::Error) -> Self {
        match error.reason() {
            _ if error.is_io() => Self::Broken,
            Some(Reason::NO_ERROR) | None => Self::Closed,
            Some(reason) => Self::Bad(reason),
        }
    }
}

/// A connection of which some bytes were read already.
struct Rewound<Io> {
    seen: Bytes,
    io: Io,
}

impl<Io: AsyncRead + Unpin> AsyncRead for Rewound<Io> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.seen.is_empty() {
            return Pin::new(&mut this.io).poll_read(cx, buf);
        }
        let n = this.seen.len().min(buf.remaining());
        buf.put_slice(&this.seen[..n]);
        this.seen.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Rewound<Io> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 2 << 20;
const MAX_STREAMS: u32 = 1_000;
const MAX_HEADERS: u32 = 64 << 10;
/// Bytes of one stream that wait for the other side.
const SEND_BUFFER: usize = 256 << 10;
