//! Outbound HTTP/1: each request picks its own endpoint.

use std::time::Duration;

use mantle_proxy_core::http1::{Connection, Edit, Request};
use mantle_proxy_core::reasons::Unroutable;

use super::{Opened, Outbound, Ticket};
use crate::destination::Destination;
use crate::http1::{self, Refusal, Service};
use crate::link::LinkHint;
use crate::metrics::{Direction, Layer};
use crate::record::{self, Conn};
use crate::relay::Origin;
use crate::tap::TapRequest;
use crate::upstream::Upstream;

/// The requests of one client connection.
pub(super) struct Requests<'a> {
    pub(super) out: &'a Outbound,
    pub(super) dst: &'a Destination,
    pub(super) client: std::net::SocketAddr,
    pub(super) src: &'a Conn,
}

/// What must outlive a stream to be told how it went.
pub(super) struct Sent {
    ticket: Ticket,
    conn: Conn,
}

impl Service for Requests<'_> {
    type Io = Upstream;
    type Ticket = Sent;

    async fn open(&self, request: &Request<'_>) -> Result<http1::Opened<Upstream, Sent>, Refusal> {
        let opened = self.out.connect(self.dst, LinkHint::Http1).await.map_err(refusal)?;
        let Opened { io, conn, ticket, reused } = opened;
        let mesh = !matches!(io, Upstream::Plain(_));
        let is_stream = matches!(io, Upstream::Mux(_));
        let mut head = Vec::with_capacity(request.head_len() + ADDED);
        request.forward(&mut head, &Edit { strip_reserved: true, connection: Connection::Default, add: &[] });
        let record =
            record::Request::begin(ticket.reach.http(&self.out.cx.control.metrics), self.tap(request, &ticket));
        Ok(http1::Opened {
            io,
            ticket: Sent { ticket, conn },
            record,
            head,
            stale: reused || is_stream,
            half_close: is_stream,
            strip_response: !mesh,
        })
    }

    fn responded(&self, sent: &mut Sent, after: Duration) {
        sent.ticket.responded(self.dst.now(), after);
    }

    fn reuse(&self, sent: Sent, io: Upstream) {
        self.out.keep(sent.ticket, sent.conn, io);
    }

    fn meter(&self, sent: &Sent, origin: Origin, bytes: u64) {
        match origin {
            Origin::Client => (self.src.read(bytes), sent.conn.wrote(bytes)).0,
            Origin::Server => (self.src.wrote(bytes), sent.conn.read(bytes)).0,
        }
    }

    fn refused(&self, refusal: Refusal) -> bool {
        self.out.cx.control.metrics.error(Direction::Outbound, Layer::Http, refusal.reason);
        true
    }
}

impl Requests<'_> {
    fn tap(&self, request: &Request<'_>, ticket: &Ticket) -> Option<crate::tap::TapStream> {
        let taps = &self.out.cx.control.taps;
        if !taps.active() {
            return None;
        }
        taps.open(&TapRequest {
            direction: Direction::Outbound,
            src: self.client,
            dst: ticket.node.endpoint.addr,
            tls: &ticket.reach.route.tls,
            dst_labels: &ticket.node.endpoint.labels,
            method: request.method,
            scheme: "http",
            authority: request.authority.unwrap_or_default(),
            path: request.path,
            headers: &|visit| request.headers().for_each(|(name, value)| visit(name, value)),
        })
    }
}

/// The response for a request that found no server.
pub(super) fn refusal(why: Unroutable) -> Refusal {
    let status = match why {
        Unroutable::NoEndpoints | Unroutable::DiscoveryUnavailable => 504,
        Unroutable::InvalidPolicy => 500,
        Unroutable::InvalidIdentity
        | Unroutable::ConnectFailed
        | Unroutable::IdentityMismatch
        | Unroutable::TlsFailed
        | Unroutable::UnsupportedPeer
        | Unroutable::Loop => 502,
    };
    Refusal { status, reason: why.label() }
}

const ADDED: usize = 64;
