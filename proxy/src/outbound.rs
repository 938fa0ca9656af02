//! Outbound: what the application dials, from accept to the last byte.
//!
//! accept → original destination → its meaning → first bytes (while the server side is prepared) → endpoint → stream →
//! relay, HTTP/1 or HTTP/2 → one record. Each arm ends with a typed reason.

use std::cell::RefCell;
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
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
use tracing::debug;

use crate::app::Thread;
use crate::destination::Destination;
use crate::link::LinkHint;
use crate::metrics::{Direction, Layer};
use crate::record::{self, Conn};
use crate::relay::{Ahead, Origin, relay};
use crate::sniff::{Understood, understand};
use crate::upstream::{self, Upstream};

/// The outbound side of one data thread.
pub(crate) struct Outbound {
    cx: Rc<Thread>,
    known: RefCell<HashMap<SocketAddr, Rc<Destination>>>,
}

/// A stream to an endpoint, and who it is.
pub(crate) struct Opened {
    pub(crate) io: Upstream,
    pub(crate) ticket: Ticket,
    pub(crate) conn: Conn,
}

/// One request or connection under way at an endpoint; dropping it tells the balancer.
pub(crate) struct Ticket {
    pub(crate) node: Rc<Node>,
}

impl Outbound {
    pub(crate) fn new(cx: Rc<Thread>) -> Self {
        Self { cx, known: RefCell::default() }
    }

    /// Serves one redirected connection until it ends.
    pub(crate) async fn serve(&self, io: TcpStream, peer: SocketAddr) {
        if let Err(why) = self.carry(io, peer).await {
            self.cx.control.metrics.error(Direction::Outbound, Layer::Tcp, why.label());
            debug!(client = %peer, reason = why.label(), "outbound connection refused");
        }
    }

    async fn carry(&self, mut io: TcpStream, peer: SocketAddr) -> Result<(), Unroutable> {
        let original = self.original(&io)?;
        let dst = self.destination(original).await?;
        let src = Conn::open(record::outbound_src(&self.cx.control.metrics, original));
        let mut seen = BytesMut::new();
        let head_start = if dst.server_first.get() { Duration::ZERO } else { HEAD_START };
        let limit = self.cx.config.outbound_detect_timeout;
        let early = self.connect(&dst, LinkHint::Opaque);
        let understood = match dst.outbound()?.protocol {
            Protocol::Detect => understand(&mut io, &mut seen, head_start, limit, early).await?,
            Protocol::Http1 => Understood::known(Detected::Http1),
            Protocol::Http2 => Understood::known(Detected::Http2),
            Protocol::Opaque | Protocol::Tls => Understood::known(Detected::Opaque),
        };
        match understood.detected {
            Detected::Http1 => self.tcp(&mut io, peer, &src, seen, &dst, understood).await,
            Detected::Http2 => self.tcp(&mut io, peer, &src, seen, &dst, understood).await,
            Detected::Opaque | Detected::Tls | Detected::NeedMore => {
                self.tcp(&mut io, peer, &src, seen, &dst, understood).await
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
        self.known.borrow_mut().retain(|_, dst| Rc::strong_count(dst) > 1 || dst.unused_for() < FORGET_AFTER);
    }

    /// Relays a connection whose bytes are nobody's business.
    async fn tcp(
        &self,
        io: &mut TcpStream,
        peer: SocketAddr,
        src: &Conn,
        seen: BytesMut,
        dst: &Destination,
        understood: Understood<Opened>,
    ) -> Result<(), Unroutable> {
        let mut up = match understood.early {
            Some(early) => early,
            None => self.connect(dst, LinkHint::Opaque).await?,
        };
        if !understood.from_server.is_empty() {
            dst.server_first.set(true);
        }
        let ahead = Ahead { from_client: seen.freeze(), from_server: understood.from_server.freeze() };
        let end = relay(io, &mut up.io, ahead, |from, n| match from {
            Origin::Client => (src.read(n), up.conn.wrote(n)).0,
            Origin::Server => (src.wrote(n), up.conn.read(n)).0,
        })
        .await;
        if let Err(error) = &end {
            src.failed(error);
        }
        let endpoint = up.ticket.node.endpoint.addr;
        debug!(client = %peer, dst = %dst.original, %endpoint, error = end.err().map(tracing::field::display), "outbound connection closed");
        Ok(())
    }

    /// A stream to an endpoint; another endpoint is tried when one cannot be reached.
    pub(crate) async fn connect(&self, dst: &Destination, hint: LinkHint) -> Result<Opened, Unroutable> {
        let mut attempt = 1;
        loop {
            let node = dst.pick(|| self.cx.random.next()).await?;
            let reach = dst.reach(&self.cx, &node)?;
            node.start();
            match upstream::open(&self.cx, &node.endpoint, &reach.route, hint).await {
                Ok(io) => {
                    let conn = Conn::open(reach.transport.clone());
                    return Ok(Opened { io, conn, ticket: Ticket { node } });
                }
                Err(why) if attempt >= ATTEMPTS.min(dst.endpoints()) => {
                    node.fail(dst.now());
                    return Err(why);
                }
                Err(_) => node.fail(dst.now()),
            }
            attempt += 1;
        }
    }
}

impl AsyncRead for Opened {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(cx, buf)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.node.cancel();
    }
}

const HEAD_START: Duration = Duration::from_millis(2);
const FORGET_AFTER: Duration = Duration::from_secs(60);
/// Endpoints tried for one connection or request.
const ATTEMPTS: usize = 3;
