//! Outbound HTTP/1: each request picks its own endpoint.

use std::time::Duration;

use mantle_proxy_core::http1::{Connection, Edit, Request};
use mantle_proxy_core::reasons::Unroutable;

use super::{Opened, Outbound, Ticket};
use crate::counted::Counted;
use crate::destination::Destination;
use crate::http1::{self, Refusal, Service};
use crate::link::LinkHint;
use crate::metrics::{Direction, Layer};
use crate::record;
use crate::upstream::Upstream;

/// The requests of one client connection.
pub(super) struct Requests<'a> {
    pub(super) out: &'a Outbound,
    pub(super) dst: &'a Destination,
    pub(super) client: std::net::SocketAddr,
}

impl Service for Requests<'_> {
    type Io = Counted<Upstream>;
    type Ticket = Ticket;

    async fn open(&self, request: &Request<'_>) -> Result<http1::Opened<Self::Io, Ticket>, Refusal> {
        let Opened { io, ticket, reused } = self.out.connect(self.dst, LinkHint::Http1).await.map_err(refusal)?;
        ticket.has(request.head.required_ids()).map_err(refusal)?;
        let is_stream = matches!(io.get(), Upstream::Mux(_));
        let mut head = Vec::with_capacity(request.head.size() + ADDED);
        request.head.forward(&mut head, &Edit { strip_reserved: true, connection: Connection::Default, add: &[] });
        let tap = self.out.tap(self.client, &ticket, request);
        let record = record::Request::begin(ticket.reach.http(&self.out.cx.control.metrics), tap);
        let (stale, half_close, strip_response) = (reused || is_stream, is_stream, !ticket.is_mesh());
        Ok(http1::Opened { io, ticket, record, head, stale, half_close, strip_response })
    }

    fn responded(&self, ticket: &Ticket, after: Duration) {
        ticket.responded(self.dst.now(), after);
    }

    /// Who may be asked is the server's decision.
    async fn revoked(&self, _: &Ticket, _: &Request<'_>) -> Refusal {
        std::future::pending().await
    }

    fn reuse(&self, ticket: Ticket, io: Self::Io) {
        self.out.keep(&ticket, io);
    }

    fn refused(&self, refusal: Refusal) -> bool {
        self.out.cx.control.metrics.error(Direction::Outbound, Layer::Http, refusal.reason);
        true
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
