//! One request and its response on their way: two state machines, polled together, that hold bytes only while the other
//! side does not take them.
//!
//! `Sending` moves the request from client to server, `Receiving` the response back. Framing is the core's: this file
//! moves what `Follower` says belongs to the message and leaves the rest for the next one.

use std::future::poll_fn;
use std::io::ErrorKind;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use mantle_proxy_core::http1::{self, Asked, Body, Connection, Edit, Follower, Response, Version};
use mantle_proxy_core::reasons::BadHttp;
use tokio::io::{AsyncRead, AsyncWrite};

use super::Refusal;
use crate::relay::{poll_read_into, with_scratch};

/// What is to be known of a request while it is under way.
#[derive(Clone, Copy)]
pub(super) struct Terms {
    pub(super) asked: Asked,
    pub(super) body: Body,
    pub(super) version: Version,
    /// The client may send another request on its connection.
    pub(super) keep_alive: bool,
    pub(super) idempotent: bool,
    /// Tell the server when the request has ended (a stream per request).
    pub(super) half_close: bool,
    /// Remove reserved headers from the response.
    pub(super) strip_response: bool,
}

/// What a meter hears of.
pub(super) enum Moved<'a> {
    /// The final response's head.
    Head(&'a Response<'a>),
    /// Bytes of the response's body.
    Body(u64),
}

/// The exchange is over, or has become a tunnel.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Finished {
    Complete {
        client_goes_on: bool,
        /// It has ended its side already.
        client_ended: bool,
        server_goes_on: bool,
    },
    /// 101, or 2xx to CONNECT: bytes from here on are nobody's business. What the server sent after its head is here.
    Tunnel { from_server: Bytes },
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// The server's connection ended before a byte of the response. `replayable`: the request may be sent again as it
    /// was, for it is idempotent, or the server has seen nothing of it.
    ServerSilent {
        replayable: bool,
    },
    BadResponse(BadHttp),
    /// The request's body broke its framing before the response began.
    BadRequest(BadHttp),
    /// Either side went away in the middle.
    Broken,
    /// Policy or trust changed: the exchange may not go on.
    Revoked(Refusal),
}

pub(super) struct Exchange {
    terms: Terms,
    sending: Sending,
    receiving: Receiving,
}

impl Exchange {
    /// `head` is the request's head as it is forwarded.
    pub(super) fn new(terms: Terms, head: Vec<u8>) -> Self {
        let body = Follower::new(terms.body);
        let bodiless = body.is_done();
        let (state, half_close) = (SendState::Body, terms.half_close && !terms.asked.upgrade && !terms.asked.connect);
        Self {
            terms,
            sending: Sending { out: head.into(), body, state, half_close, bodiless, wrote: false, client_ended: false },
            receiving: Receiving { head: BytesMut::new(), out: Bytes::new(), begun: false, state: ReceiveState::Head },
        }
    }

    /// Moves both directions until the response has ended.
    ///
    /// `buf` holds what the client sent beyond the request's head, and at the end what it sent beyond the request.
    pub(super) async fn run<C, S>(
        &mut self,
        client: &mut C,
        buf: &mut BytesMut,
        server: &mut S,
        mut meter: impl FnMut(Moved<'_>),
    ) -> Result<Finished, Failed>
    where
        C: AsyncRead + AsyncWrite + Unpin,
        S: AsyncRead + AsyncWrite + Unpin,
    {
        poll_fn(|cx| {
            match self.sending.poll(cx, client, buf, server) {
                Poll::Pending | Poll::Ready(Ok(())) => {}
                // The server may have answered all the same; it will not read more.
                Poll::Ready(Err(NotSent::ServerEnded)) => self.sending.state = SendState::GivenUp,
                Poll::Ready(Err(NotSent::Bad(why))) if !self.receiving.begun => {
                    return Poll::Ready(Err(Failed::BadRequest(why)));
                }
                Poll::Ready(Err(NotSent::Bad(_) | NotSent::ClientEnded)) => return Poll::Ready(Err(Failed::Broken)),
            }
            let received = match ready!(self.receiving.poll(cx, server, client, &self.terms, &mut meter)) {
                Ok(received) => received,
                Err(NotReceived::Silent { unseen }) => {
                    let sending = &self.sending;
                    let replayable = sending.bodiless && (unseen || self.terms.idempotent || !sending.wrote);
                    return Poll::Ready(Err(Failed::ServerSilent { replayable }));
                }
                Err(NotReceived::Bad(why)) => return Poll::Ready(Err(Failed::BadResponse(why))),
                Err(NotReceived::Broken) => return Poll::Ready(Err(Failed::Broken)),
            };
            let sent = self.sending.state == SendState::Watching;
            Poll::Ready(Ok(match received {
                Received::Tunnel { from_server } => Finished::Tunnel { from_server },
                Received::Complete { framed, server_goes_on } => Finished::Complete {
                    client_goes_on: sent
                        && framed
                        && self.terms.keep_alive
                        && (!self.sending.client_ended || !buf.is_empty()),
                    client_ended: self.sending.client_ended,
                    server_goes_on: sent && framed && server_goes_on,
                },
            }))
        })
        .await
    }
}

struct Sending {
    /// Not yet taken by the server.
    out: Bytes,
    body: Follower,
    state: SendState,
    half_close: bool,
    /// There is nothing but the head: it can be sent again.
    bodiless: bool,
    /// The server has taken a byte.
    wrote: bool,
    client_ended: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SendState {
    Body,
    Ending,
    /// All was sent; the client's side is only watched.
    Watching,
    GivenUp,
}

enum NotSent {
    ServerEnded,
    ClientEnded,
    Bad(BadHttp),
}

impl Sending {
    fn poll<C, S>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut C,
        buf: &mut BytesMut,
        server: &mut S,
    ) -> Poll<Result<(), NotSent>>
    where
        C: AsyncRead + Unpin,
        S: AsyncWrite + Unpin,
    {
        loop {
            while !self.out.is_empty() && self.state != SendState::GivenUp {
                let n = ready!(Pin::new(&mut *server).poll_write(cx, &self.out));
                let n = n.ok().filter(|n| *n > 0).ok_or(NotSent::ServerEnded)?;
                self.out.advance(n);
                self.wrote = true;
            }
            match self.state {
                SendState::Body if self.body.is_done() => self.state = SendState::Ending,
                SendState::Body if !buf.is_empty() => {
                    let n = self.body.follow(buf).map_err(NotSent::Bad)?;
                    self.out = buf.split_to(n).freeze();
                }
                SendState::Body => {
                    let read = with_scratch(|scratch| self.pass_on(cx, client, buf, server, scratch));
                    if read?.is_pending() {
                        // The client has no more for now: what it sent must not wait in a buffer.
                        ready!(Pin::new(&mut *server).poll_flush(cx)).map_err(|_| NotSent::ServerEnded)?;
                        return Poll::Pending;
                    }
                }
                SendState::Ending => {
                    let ended = match self.half_close {
                        true => ready!(Pin::new(&mut *server).poll_shutdown(cx)),
                        false => ready!(Pin::new(&mut *server).poll_flush(cx)),
                    };
                    ended.map_err(|_| NotSent::ServerEnded)?;
                    self.state = SendState::Watching;
                }
                SendState::Watching | SendState::GivenUp if self.client_ended || buf.len() >= PIPELINED => {
                    return Poll::Ready(Ok(()));
                }
                SendState::GivenUp => return Poll::Ready(Ok(())),
                SendState::Watching => {
                    let read = with_scratch(|scratch| {
                        let bytes = ready!(poll_read_into(cx, client, &mut scratch[..PIPELINED]))?;
                        buf.extend_from_slice(bytes);
                        self.client_ended = bytes.is_empty();
                        Poll::Ready(Ok::<_, std::io::Error>(()))
                    });
                    match read {
                        Poll::Pending => return Poll::Ready(Ok(())),
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(_)) => return Poll::Ready(Err(NotSent::ClientEnded)),
                    }
                }
            }
        }
    }

    /// One read of the body, and as much of it written as the server takes; the rest is kept.
    fn pass_on<C, S>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut C,
        buf: &mut BytesMut,
        server: &mut S,
        scratch: &mut [u8],
    ) -> Result<Poll<()>, NotSent>
    where
        C: AsyncRead + Unpin,
        S: AsyncWrite + Unpin,
    {
        let bytes = match poll_read_into(cx, client, scratch) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(Ok(bytes)) if !bytes.is_empty() => bytes,
            Poll::Ready(Ok(_) | Err(_)) => return Err(NotSent::ClientEnded),
        };
        let n = self.body.follow(bytes).map_err(NotSent::Bad)?;
        buf.extend_from_slice(&bytes[n..]);
        let taken = match Pin::new(server).poll_write(cx, &bytes[..n]) {
            Poll::Ready(taken) => taken.map_err(|_| NotSent::ServerEnded)?,
            Poll::Pending => 0,
        };
        self.wrote |= taken > 0;
        self.out = Bytes::copy_from_slice(&bytes[taken..n]);
        Ok(Poll::Ready(()))
    }
}

struct Receiving {
    /// Of a head that is not whole yet; afterwards what the server sent beyond its response.
    head: BytesMut,
    /// Not yet taken by the client.
    out: Bytes,
    /// The server has begun to answer.
    begun: bool,
    state: ReceiveState,
}

enum ReceiveState {
    Head,
    Body { body: Follower, framed: bool, server_goes_on: bool },
    Tunnel,
}

enum Received {
    Complete { framed: bool, server_goes_on: bool },
    Tunnel { from_server: Bytes },
}

enum NotReceived {
    /// `unseen`: the server's side vouches that it has seen nothing of the request.
    Silent {
        unseen: bool,
    },
    Bad(BadHttp),
    Broken,
}

impl Receiving {
    fn poll<C, S>(
        &mut self,
        cx: &mut Context<'_>,
        server: &mut S,
        client: &mut C,
        terms: &Terms,
        meter: &mut impl FnMut(Moved<'_>),
    ) -> Poll<Result<Received, NotReceived>>
    where
        C: AsyncWrite + Unpin,
        S: AsyncRead + Unpin,
    {
        loop {
            while !self.out.is_empty() {
                let n = ready!(Pin::new(&mut *client).poll_write(cx, &self.out));
                let n = n.ok().filter(|n| *n > 0).ok_or(NotReceived::Broken)?;
                self.out.advance(n);
            }
            let progress = match &mut self.state {
                ReceiveState::Head => with_scratch(|scratch| self.head(cx, server, scratch, terms, meter))?,
                ReceiveState::Body { body, framed, server_goes_on } if body.is_done() => {
                    let (framed, server_goes_on) = (*framed, *server_goes_on && self.head.is_empty());
                    ready!(Pin::new(&mut *client).poll_flush(cx)).map_err(|_| NotReceived::Broken)?;
                    return Poll::Ready(Ok(Received::Complete { framed, server_goes_on }));
                }
                ReceiveState::Body { .. } => {
                    match with_scratch(|scratch| self.body(cx, server, client, scratch, meter))? {
                        Poll::Ready(Ended::UntilClose) => {
                            ready!(Pin::new(&mut *client).poll_flush(cx)).map_err(|_| NotReceived::Broken)?;
                            return Poll::Ready(Ok(Received::Complete { framed: false, server_goes_on: false }));
                        }
                        Poll::Ready(Ended::No) => Poll::Ready(()),
                        Poll::Pending => Poll::Pending,
                    }
                }
                ReceiveState::Tunnel => {
                    ready!(Pin::new(&mut *client).poll_flush(cx)).map_err(|_| NotReceived::Broken)?;
                    return Poll::Ready(Ok(Received::Tunnel { from_server: self.head.split().freeze() }));
                }
            };
            if progress.is_pending() {
                // The server has no more for now: what it sent must not wait in a buffer.
                return match Pin::new(&mut *client).poll_flush(cx) {
                    Poll::Ready(Err(_)) => Poll::Ready(Err(NotReceived::Broken)),
                    Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
                };
            }
        }
    }

    /// Reads more of the head; once it is whole, rewrites it into `out` together with what came of the body.
    fn head<S: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        server: &mut S,
        scratch: &mut [u8],
        terms: &Terms,
        meter: &mut impl FnMut(Moved<'_>),
    ) -> Result<Poll<()>, NotReceived> {
        if self.head.is_empty() {
            match poll_read_into(cx, server, scratch) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(Ok(bytes)) if !bytes.is_empty() => self.head.extend_from_slice(bytes),
                Poll::Ready(_) if self.begun => return Err(NotReceived::Broken),
                Poll::Ready(Ok(_)) => return Err(NotReceived::Silent { unseen: false }),
                Poll::Ready(Err(error)) => {
                    return Err(NotReceived::Silent { unseen: error.kind() == ErrorKind::ConnectionRefused });
                }
            }
            self.begun = true;
        }
        let Some(response) = http1::response(&self.head, terms.asked).map_err(NotReceived::Bad)? else {
            return Ok(match poll_read_into(cx, server, scratch) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Ok(bytes)) if !bytes.is_empty() => {
                    self.head.extend_from_slice(bytes);
                    Poll::Ready(())
                }
                Poll::Ready(Ok(_) | Err(_)) => return Err(NotReceived::Broken),
            });
        };
        let framed = response.body != Body::UntilClose;
        let connection = match (framed && terms.keep_alive, terms.version) {
            _ if response.is_interim() => Connection::Default,
            (false, _) => Connection::Close,
            (true, Version::Http11) => Connection::Default,
            (true, Version::Http10) => Connection::KeepAlive,
        };
        let mut out = Vec::with_capacity(self.head.len() + ADDED);
        response.head.forward(&mut out, &Edit { strip_reserved: terms.strip_response, connection, add: &[] });
        let length = response.head.size();
        if response.is_interim() {
            self.head.advance(length);
            self.out = out.into();
            return Ok(Poll::Ready(()));
        }
        meter(Moved::Head(&response));
        if response.tunnel {
            self.state = ReceiveState::Tunnel;
            self.head.advance(length);
        } else {
            let mut body = Follower::new(response.body);
            // A server asked in HTTP/1.0 closes after its answer, and need not say so in it (RFC 9112 9.3).
            let server_goes_on = response.keep_alive && matches!(terms.version, Version::Http11);
            let n = body.follow(&self.head[length..]).map_err(NotReceived::Bad)?;
            out.extend_from_slice(&self.head[length..length + n]);
            meter(Moved::Body(n as u64));
            self.head.advance(length + n);
            self.state = ReceiveState::Body { body, framed, server_goes_on };
        }
        self.out = out.into();
        Ok(Poll::Ready(()))
    }

    /// One read of the body, and as much of it written as the client takes; the rest is kept.
    fn body<C, S>(
        &mut self,
        cx: &mut Context<'_>,
        server: &mut S,
        client: &mut C,
        scratch: &mut [u8],
        meter: &mut impl FnMut(Moved<'_>),
    ) -> Result<Poll<Ended>, NotReceived>
    where
        C: AsyncWrite + Unpin,
        S: AsyncRead + Unpin,
    {
        let ReceiveState::Body { body, .. } = &mut self.state else { return Ok(Poll::Ready(Ended::No)) };
        let bytes = match poll_read_into(cx, server, scratch) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(Ok(bytes)) if !bytes.is_empty() => bytes,
            Poll::Ready(Ok(_)) if body.may_end() => return Ok(Poll::Ready(Ended::UntilClose)),
            Poll::Ready(Ok(_) | Err(_)) => return Err(NotReceived::Broken),
        };
        let n = body.follow(bytes).map_err(|_| NotReceived::Broken)?;
        meter(Moved::Body(n as u64));
        self.head.extend_from_slice(&bytes[n..]); // unasked: it marks the connection as spent
        let taken = match Pin::new(client).poll_write(cx, &bytes[..n]) {
            Poll::Ready(taken) => taken.map_err(|_| NotReceived::Broken)?,
            Poll::Pending => 0,
        };
        self.out = Bytes::copy_from_slice(&bytes[taken..n]);
        Ok(Poll::Ready(Ended::No))
    }
}

enum Ended {
    No,
    UntilClose,
}

/// Bytes read of requests that the client sent ahead.
const PIPELINED: usize = 16 * 1024;
/// What is added to a head, roughly.
const ADDED: usize = 128;
