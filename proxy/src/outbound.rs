//! Outbound: what the application dials, from accept to the last byte.
//!
//! accept → original destination → its meaning → first bytes (while the server side is prepared) → endpoint → stream →
//! relay, HTTP/1 or HTTP/2 → one record. Each arm ends with a typed reason. Stages are boxed once per connection, so that
//! an idle one holds only the stage that it is in.

mod calls;
mod requests;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use mantle_proxy_core::balance::Node;
use mantle_proxy_core::detect::Detected;
use mantle_proxy_core::model::Protocol;
use mantle_proxy_core::reasons::Unroutable;
use mantle_proxy_core::route::{Plan, Transport};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
use tracing::debug;

use crate::app::Thread;
use crate::counted::Counted;
use crate::destination::{Destination, Reach};
use crate::link::LinkHint;
use crate::metrics::{Direction, Layer, TlsLabel};
use crate::pool::Pool;
use crate::record::{self, Conn};
use crate::relay::{Ahead, relay};
use crate::sniff::{Understood, understand};
use crate::tap::{TapHead, TapRequest, TapStream};
use crate::upstream::{self, Upstream};
use crate::{http1, http2};
use calls::Calls;
use requests::Requests;

/// The outbound side of one data thread.
pub(crate) struct Outbound {
    cx: Rc<Thread>,
    known: RefCell<HashMap<SocketAddr, Rc<Destination>>>,
    /// Connections without a link, between HTTP/1 requests.
    pool: Pool<(SocketAddr, TlsLabel), Counted<Upstream>>,
}

/// A stream to an endpoint, and who it is.
struct Opened {
    io: Counted<Upstream>,
    ticket: Ticket,
    /// It has carried another request before.
    reused: bool,
}

/// One request or connection under way at an endpoint; the balancer hears of its first answer, or of its end.
struct Ticket {
    node: Rc<Node>,
    reach: Rc<Reach>,
    answered: Cell<bool>,
}

impl Outbound {
    pub(crate) fn new(cx: Rc<Thread>) -> Self {
        Self { cx, known: RefCell::default(), pool: Pool::new() }
    }

    /// Serves one redirected connection until it ends.
    pub(crate) async fn serve(self: &Rc<Self>, io: TcpStream, peer: SocketAddr) {
        if let Err(why) = self.carry(io, peer).await {
            self.cx.control.metrics.error(Direction::Outbound, Layer::Tcp, why.label());
            debug!(client = %peer, reason = why.label(), "outbound connection refused");
        }
    }

    async fn carry(self: &Rc<Self>, mut io: TcpStream, peer: SocketAddr) -> Result<(), Unroutable> {
        let original = self.original(&io)?;
        let dst = self.destination(original).await?;
        let src = Rc::new(Conn::open(record::outbound_src(&self.cx.control.metrics, original)));
        let mut seen = BytesMut::new();
        let head_start = if dst.server_first.get() { Duration::ZERO } else { HEAD_START };
        let limit = self.cx.config.outbound_detect_timeout;
        let early = self.connect(&dst, LinkHint::Opaque);
        let understood = match dst.outbound()?.protocol {
            Protocol::Detect => Box::pin(understand(&mut io, &mut seen, head_start, limit, early)).await?,
            Protocol::Http1 => Understood::known(Detected::Http1),
            Protocol::Http2 => Understood::known(Detected::Http2),
            Protocol::Opaque | Protocol::Tls => Understood::known(Detected::Opaque),
        };
        let mut io = Counted::new(io, src, seen.len());
        let mut drain = self.cx.drain.clone();
        match understood.detected {
            Detected::Http1 => {
                let requests = Requests { out: self, dst: &dst, client: peer };
                let end = Box::pin(http1::serve(&mut io, seen, &requests, &mut drain)).await;
                debug!(client = %peer, dst = %dst.original, ?end, "outbound HTTP/1 connection closed");
                Ok(())
            }
            Detected::Http2 => {
                let calls = Rc::new(Calls { out: self.clone(), dst: dst.clone(), client: peer });
                let end = Box::pin(http2::serve(io, seen, calls, &mut drain)).await;
                debug!(client = %peer, dst = %dst.original, ?end, "outbound HTTP/2 connection closed");
                Ok(())
            }
            Detected::Opaque | Detected::Tls | Detected::NeedMore => {
                Box::pin(self.tcp(&mut io, peer, seen, &dst, understood)).await
            }
        }
    }

    /// Where the connection was going; the proxy's own address is refused, or it would call itself for ever.
    fn original(&self, io: &TcpStream) -> Result<SocketAddr, Unroutable> {
        let original = (self.cx.original_dst)(io).map_err(|_| Unroutable::Loop)?;
        let own = self.cx.is_own(original.ip()) || original.ip().is_loopback();
        if own && self.cx.own_ports.contains(&original.port()) { Err(Unroutable::Loop) } else { Ok(original) }
    }

    /// The destination as this thread knows it; asked of discovery once.
    async fn destination(&self, original: SocketAddr) -> Result<Rc<Destination>, Unroutable> {
        if let Some(dst) = self.known.borrow().get(&original) {
            return Ok(dst.clone());
        }
        let target = self.cx.control.discovery.target(original).await?;
        let mut known = self.known.borrow_mut();
        Ok(known.entry(original).or_insert_with(|| Rc::new(Destination::new(original, target))).clone())
    }

    /// Forgets destinations that nothing has used for a while. Called every few seconds.
    pub(crate) fn sweep(&self) {
        self.pool.sweep();
        self.known.borrow_mut().retain(|_, dst| Rc::strong_count(dst) > 1 || dst.unused_for() < FORGET_AFTER);
    }

    /// Relays a connection whose bytes are nobody's business.
    async fn tcp(
        &self,
        io: &mut Counted<TcpStream>,
        peer: SocketAddr,
        seen: BytesMut,
        dst: &Destination,
        understood: Understood<Opened>,
    ) -> Result<(), Unroutable> {
        let mut up = match understood.early {
            Some(early) => early,
            None => self.connect(dst, LinkHint::Opaque).await?,
        };
        if understood.server_ended {
            return Ok(()); // the client sees what it would have seen without us
        }
        if !understood.from_server.is_empty() {
            dst.server_first.set(true);
        }
        let ahead = Ahead { from_client: seen.freeze(), from_server: understood.from_server.freeze() };
        let end = relay(io, &mut up.io, ahead).await;
        let (endpoint, error) = (up.ticket.addr(), end.err().map(tracing::field::display));
        debug!(client = %peer, dst = %dst.original, %endpoint, error, "outbound connection closed");
        Ok(())
    }

    /// A stream to an endpoint; another endpoint is tried when one cannot be reached.
    async fn connect(&self, dst: &Destination, hint: LinkHint) -> Result<Opened, Unroutable> {
        let mut attempt = 1;
        loop {
            let ticket = self.pick(dst).await?;
            if hint == LinkHint::Http1
                && !ticket.has_link()
                && let Some(io) = self.pool.shelf(ticket.key()).take()
            {
                return Ok(Opened { io, ticket, reused: true });
            }
            match self.open(&ticket, hint).await {
                Ok(io) => return Ok(Opened { io, ticket, reused: false }),
                Err(why) if self.fails_open(&ticket, why) => continue,
                Err(why) => {
                    ticket.failed(dst.now());
                    if attempt >= ATTEMPTS.min(dst.endpoints()) {
                        return Err(why);
                    }
                }
            }
            attempt += 1;
        }
    }

    /// The endpoint for one request.
    async fn pick(&self, dst: &Destination) -> Result<Ticket, Unroutable> {
        let node = dst.pick(|| self.cx.random.next()).await?;
        let reach = dst.reach(&self.cx, &node)?;
        node.start();
        Ok(Ticket { node, reach, answered: Cell::new(false) })
    }

    /// A new stream to the endpoint.
    async fn open(&self, ticket: &Ticket, hint: LinkHint) -> Result<Counted<Upstream>, Unroutable> {
        let io = upstream::open(&self.cx, &ticket.node.endpoint, &ticket.reach.route, hint).await?;
        Ok(Counted::new(io, Rc::new(Conn::open(ticket.reach.transport.clone())), 0))
    }

    /// A request that is about to be sent, for those who watch; `None`: nobody does.
    fn tap(&self, client: SocketAddr, ticket: &Ticket, head: &dyn TapHead) -> Option<TapStream> {
        let taps = &self.cx.control.taps;
        if !taps.active() {
            return None;
        }
        let (endpoint, tls) = (&ticket.node.endpoint, &ticket.reach.route.tls);
        let (dst, dst_labels) = (endpoint.addr, &endpoint.labels);
        taps.open(&TapRequest { direction: Direction::Outbound, src: client, dst, tls, dst_labels, head })
    }

    /// Whether the experimental mode tries plaintext after TLS has come to nothing.
    fn fails_open(&self, ticket: &Ticket, why: Unroutable) -> bool {
        ticket.is_mesh() && self.cx.fail_open.note(&ticket.node.endpoint, why)
    }

    /// Keeps a connection for the next request; a stream of a link has no next one.
    fn keep(&self, ticket: &Ticket, io: Counted<Upstream>) {
        if !ticket.has_link() {
            self.pool.shelf(ticket.key()).put(io);
        }
    }
}

impl Ticket {
    fn addr(&self) -> SocketAddr {
        self.node.endpoint.addr
    }

    fn is_mesh(&self) -> bool {
        matches!(self.reach.route.plan, Plan::Mesh { .. })
    }

    /// Whether the endpoint has every identity that the client requires.
    ///
    /// # Errors
    /// `IdentityMismatch`: it has another one, or none.
    fn has<'a>(&self, mut required: impl Iterator<Item = &'a [u8]>) -> Result<(), Unroutable> {
        let identity = match &self.reach.route.tls {
            TlsLabel::Mutual(identity) => identity.as_bytes(),
            TlsLabel::Passthru(_) | TlsLabel::None(_) => &[],
        };
        if required.all(|required| required == identity) { Ok(()) } else { Err(Unroutable::IdentityMismatch) }
    }

    /// Streams of a link are made for each request.
    fn has_link(&self) -> bool {
        matches!(self.reach.route.plan, Plan::Mesh { transport: Transport::Link { .. }, .. })
    }

    /// Whose connections may carry this request: the same address, secured the same way.
    fn key(&self) -> (SocketAddr, TlsLabel) {
        (self.addr(), self.reach.route.tls.clone())
    }

    /// Its first answer came `after` it was sent.
    fn responded(&self, now: Duration, after: Duration) {
        if !self.answered.replace(true) {
            self.node.finish(now, after);
        }
    }

    /// The endpoint could not be reached.
    fn failed(self, now: Duration) {
        self.answered.set(true);
        self.node.fail(now);
    }
}

impl AsyncRead for Opened {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(cx, buf)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.answered.get() {
            self.node.cancel();
        }
    }
}

const HEAD_START: Duration = Duration::from_millis(2);
const FORGET_AFTER: Duration = Duration::from_secs(60);
/// Endpoints tried for one connection or request.
const ATTEMPTS: usize = 3;
