//! HTTP/1 between a client and whatever servers its requests are for: head, body, response, and the next request.
//!
//! The rim of `core::http1`, which parses and rewrites; here bytes are moved. One exchange is two hand-polled state
//! machines (`http1/exchange.rs`) on one task: both directions at once, so 100-continue, early responses and pipelining
//! need no special case. Inbound and outbound differ in their `Service` only.

mod exchange;
#[cfg(test)]
mod tests;

use std::time::Duration;

use bytes::BytesMut;
use mantle_proxy_core::http1::{self, MAX_HEAD, Request, Response};
use mantle_proxy_core::reasons::{BadHttp, Unserved};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use crate::drain::Drain;
use crate::record;
use crate::relay::{Ahead, read_more, relay};
use crate::socket::Abort;
use exchange::{Exchange, Failed, Finished, Moved, Terms};

/// Where requests go: the one thing in which inbound and outbound differ.
pub(crate) trait Service {
    type Io: AsyncRead + AsyncWrite + Abort + Unpin;
    /// What the service wants back when the exchange has ended; dropped, it says that nothing can be reused.
    type Ticket;

    /// Decides where a request goes, opens a stream there and writes the head as it is forwarded.
    ///
    /// # Errors
    /// The response to give instead.
    async fn open(&self, request: &Request<'_>) -> Result<Opened<Self::Io, Self::Ticket>, Refusal>;

    /// The response begins, so long after the request was sent.
    fn responded(&self, ticket: &Self::Ticket, after: Duration);

    /// Resolves when the request, though under way, may go on no longer.
    fn revoked(&self, ticket: &Self::Ticket, request: &Request<'_>) -> impl Future<Output = Refusal>;

    /// The exchange has ended and `io` can carry another one.
    fn reuse(&self, ticket: Self::Ticket, io: Self::Io);

    /// The proxy answers in the server's place. Returns whether the client may be told why (`l5d-proxy-error`).
    fn refused(&self, refusal: Refusal) -> bool;
}

/// A stream to a server for one request.
pub(crate) struct Opened<Io, Ticket> {
    pub(crate) io: Io,
    pub(crate) ticket: Ticket,
    pub(crate) record: record::Request,
    /// The request's head as it is forwarded.
    pub(crate) head: Vec<u8>,
    /// The server may have closed it a moment ago: such a request may be sent once more.
    pub(crate) stale: bool,
    /// It is for this request alone, so its end is told.
    pub(crate) half_close: bool,
    /// Its server is not one of the mesh's proxies: reserved headers in the response are its own invention.
    pub(crate) strip_response: bool,
}

/// A response of the proxy's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    /// The label of a typed reason.
    pub(crate) reason: &'static str,
}

/// How serving a client ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Between requests, or after a response that said so.
    Closed,
    /// The client's HTTP was refused.
    Bad(BadHttp),
    /// One side went away in the middle: the client must see a broken connection, never a short body.
    Broken,
}

/// Serves one client connection until it ends. `seen` is what was read of it already.
pub(crate) async fn serve<C, S>(client: &mut C, seen: BytesMut, service: &S, drain: &mut Drain) -> End
where
    C: AsyncRead + AsyncWrite + Abort + Unpin,
    S: Service,
{
    let end = requests(client, seen, service, drain).await;
    if end == End::Broken {
        client.abort();
    }
    end
}

/// Serves request after request.
async fn requests<C, S>(client: &mut C, seen: BytesMut, service: &S, drain: &mut Drain) -> End
where
    C: AsyncRead + AsyncWrite + Abort + Unpin,
    S: Service,
{
    let mut head = seen;
    loop {
        // 1  what does it ask for?
        match read_head(client, &mut head, drain).await {
            Ok(()) => {}
            Err(NoHead::Ended) => return End::Closed,
            Err(NoHead::Gone) => return End::Broken,
            Err(NoHead::Slow) => return refuse(client, service, SLOW, End::Closed).await,
        }
        let next = match http1::request(&head) {
            // 2  where does it go, and how did that end?
            Ok(Some(request)) => {
                let mut rest = BytesMut::from(&head[request.head.size()..]);
                let next = exchange(client, &mut rest, &request, service, drain).await;
                (next, rest)
            }
            Ok(None) if head.len() <= MAX_HEAD => continue,
            Ok(None) => (Next::Refuse(bad(BadHttp::HeadTooLarge), End::Bad(BadHttp::HeadTooLarge)), BytesMut::new()),
            Err(why) => (Next::Refuse(bad(why), End::Bad(why)), BytesMut::new()),
        };
        // 3  what follows?
        head = next.1;
        match next.0 {
            Next::Request => {}
            Next::End(end) => return end,
            Next::Close { client_ended: true } => {
                let _ = client.shutdown().await; // its side ended first: nothing is lost
                return End::Closed;
            }
            Next::Close { client_ended: false } => {
                close(client).await;
                return End::Closed;
            }
            Next::Refuse(refusal, end) => return refuse(client, service, refusal, end).await,
        }
    }
}

/// What follows an exchange.
enum Next {
    Request,
    Close { client_ended: bool },
    Refuse(Refusal, End),
    End(End),
}

/// One request and its response; sent to a second server if the first had closed its connection before it began.
async fn exchange<C, S>(client: &mut C, rest: &mut BytesMut, request: &Request<'_>, service: &S, drain: &Drain) -> Next
where
    C: AsyncRead + AsyncWrite + Abort + Unpin,
    S: Service,
{
    let mut again = false;
    loop {
        let opened = match service.open(request).await {
            Ok(opened) => opened,
            Err(refusal) => return Next::Refuse(refusal, End::Closed),
        };
        let Opened { mut io, ticket, mut record, head, stale, half_close, strip_response } = opened;
        let terms = Terms {
            asked: request.asked(),
            body: request.body,
            version: request.version,
            keep_alive: request.keep_alive && !drain.is_draining(),
            idempotent: request.is_idempotent(),
            half_close,
            strip_response,
        };
        let sent = Instant::now();
        let mut answered = false;
        let moved = |moved: Moved<'_>| match moved {
            Moved::Body(n) => record.body(n),
            Moved::Head(response) => {
                answered = true;
                record.response(response.status, &|visit| visit_headers(response, visit));
                service.responded(&ticket, sent.elapsed());
            }
        };
        let mut exchange = Exchange::new(terms, head);
        let finished = tokio::select! {
            biased; // what can be finished is
            finished = exchange.run(client, rest, &mut io, moved) => finished,
            refusal = service.revoked(&ticket, request) => Err(Failed::Revoked(refusal)),
        };
        record.end(finished.is_err());
        match finished {
            Ok(Finished::Complete { client_goes_on, client_ended, server_goes_on }) => {
                if server_goes_on {
                    service.reuse(ticket, io);
                }
                return match client_goes_on {
                    true => Next::Request,
                    false => Next::Close { client_ended },
                };
            }
            Ok(Finished::Tunnel { from_server }) => {
                let ahead = Ahead { from_client: rest.split().freeze(), from_server };
                // Boxed: rare, and every connection would hold the room for it.
                let tunnel = Box::pin(async {
                    tokio::select! {
                        end = relay(client, &mut io, ahead) => end.map_or(End::Broken, |()| End::Closed),
                        _ = service.revoked(&ticket, request) => End::Broken,
                    }
                });
                return Next::End(tunnel.await);
            }
            Err(Failed::ServerSilent { replayable }) if stale && replayable && !again => again = true,
            Err(Failed::ServerSilent { .. }) => return Next::Refuse(SILENT, End::Closed),
            Err(Failed::BadResponse(why)) => {
                return Next::Refuse(Refusal { status: 502, reason: why.label() }, End::Closed);
            }
            Err(Failed::BadRequest(why)) => return Next::Refuse(bad(why), End::Bad(why)),
            Err(Failed::Revoked(refusal)) if !answered => return Next::Refuse(refusal, End::Closed),
            Err(Failed::Broken | Failed::Revoked(_)) => return Next::End(End::Broken),
        }
    }
}

fn visit_headers(response: &Response<'_>, visit: &mut dyn FnMut(&str, &[u8])) {
    response.head.headers().for_each(|(name, value)| visit(name, value));
}

/// Why there is no request head.
enum NoHead {
    /// The client ended its side between requests, or the proxy is draining and the connection idle.
    Ended,
    Gone,
    /// It began and did not become whole in time.
    Slow,
}

/// Reads until `head` holds a whole head, or more than may be read of one. Idle is fine for ever, dribbling is not.
async fn read_head<C: AsyncRead + Unpin>(client: &mut C, head: &mut BytesMut, drain: &mut Drain) -> Result<(), NoHead> {
    if head.is_empty() {
        let n = tokio::select! {
            biased; // what is there already is served, and costs no look at the drain
            n = read_more(client, head, READ) => n,
            () = drain.draining() => return Err(NoHead::Ended),
        };
        match n {
            Ok(1..) => {}
            Ok(0) => return Err(NoHead::Ended),
            Err(_) => return Err(NoHead::Gone),
        }
    }
    if head.ends_with(b"\r\n\r\n") || has_end(head) {
        return Ok(()); // the common case needs no search and no timer
    }
    let mut searched = 0;
    let whole = async {
        loop {
            if has_end(&head[searched..]) || head.len() > MAX_HEAD {
                return Ok(());
            }
            searched = head.len().saturating_sub(3);
            match read_more(client, head, READ).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return Err(NoHead::Gone),
            }
        }
    };
    tokio::time::timeout(HEAD_TIME, whole).await.unwrap_or(Err(NoHead::Slow))
}

/// Whether an empty line is in `bytes`; the parser says whether it ends a head.
fn has_end(bytes: &[u8]) -> bool {
    bytes.windows(2).any(|w| w == b"\n\n") || bytes.windows(3).any(|w| w == b"\n\r\n")
}

/// Answers in the server's place and closes.
async fn refuse<C, S>(client: &mut C, service: &S, refusal: Refusal, end: End) -> End
where
    C: AsyncRead + AsyncWrite + Abort + Unpin,
    S: Service,
{
    let Refusal { status, reason } = refusal;
    let why = if service.refused(refusal) { format!("l5d-proxy-error: {reason}\r\n") } else { String::new() };
    let text = phrase(status);
    let head = format!("HTTP/1.1 {status} {text}\r\n{why}connection: close\r\ncontent-length: 0\r\n\r\n");
    let _ = client.write_all(head.as_bytes()).await; // a client that is gone needs no answer
    close(client).await;
    end
}

/// Ends our side, then takes in what the client still sends for a moment: closing at once would reset the connection,
/// and the response could be lost on its way.
async fn close<C: AsyncRead + AsyncWrite + Unpin>(client: &mut C) {
    if client.shutdown().await.is_err() {
        return;
    }
    let _ = tokio::time::timeout(LINGER, async {
        let mut left = LINGER_BYTES;
        let mut gone = BytesMut::new();
        while let Ok(n @ 1..) = read_more(client, &mut gone, READ).await {
            gone.clear();
            left = match left.checked_sub(n) {
                Some(left) => left,
                None => return,
            };
        }
    })
    .await;
}

fn bad(why: BadHttp) -> Refusal {
    Refusal { status: 400, reason: why.label() }
}

fn phrase(status: u16) -> &'static str {
    match status {
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        408 => "Request Timeout",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "",
    }
}

const SLOW: Refusal = Refusal { status: 408, reason: Unserved::HeadTimeout.label() };
const SILENT: Refusal = Refusal { status: 502, reason: Unserved::ServerClosed.label() };

/// How long a head may take from its first byte to its last.
const HEAD_TIME: Duration = Duration::from_secs(10);
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1 << 20;
const READ: usize = 16 * 1024;
