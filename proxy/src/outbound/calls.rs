//! Outbound HTTP/2 and gRPC: each request picks its own endpoint, and has a connection there with its client's others.

use std::future::{Future, pending};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use http::HeaderValue;
use http::request::Parts;

use super::requests::refusal;
use super::{Outbound, Ticket};
use crate::counted::Counted;
use crate::destination::Destination;
use crate::http2::{Connected, Picked, Record, Refusal, RequiredIds, Service};
use crate::link::LinkHint;
use crate::metrics::{Direction, Layer};
use crate::record;
use crate::tap::VisitHeaders;
use crate::upstream::{self, Upstream};

/// The requests of one client connection.
pub(super) struct Calls {
    pub(super) out: Rc<Outbound>,
    pub(super) dst: Rc<Destination>,
    pub(super) client: SocketAddr,
}

/// One request under way.
pub(super) struct Call {
    record: record::Request,
    ticket: Ticket,
    dst: Rc<Destination>,
}

impl Service for Calls {
    type Io = Counted<Upstream>;
    type Place = Ticket;
    type Ticket = Call;

    async fn pick(&self, request: &mut Parts) -> Result<Picked<Ticket>, Refusal> {
        let place = self.out.pick(&self.dst).await.map_err(refusal)?;
        if let Some(RequiredIds(required)) = request.extensions.get() {
            place.has(required.iter().map(HeaderValue::as_bytes)).map_err(refusal)?;
        }
        let strip_response = !place.is_mesh();
        Ok(Picked { key: place.key(), place, strip_response })
    }

    async fn connect(&self, place: &Ticket) -> Result<Connected<Counted<Upstream>>, Refusal> {
        let opened = self.out.open(place, LinkHint::Http2).await;
        let io = opened.map_err(|why| {
            self.out.fails_open(place, why); // `unreachable` looks at what this has noted
            refusal(why)
        })?;
        let link = match io.get() {
            Upstream::Mux(stream) => Some(stream.link()),
            Upstream::Tls(_) | Upstream::Plain(_) => None,
        };
        Ok(Connected { io, link })
    }

    fn unreachable(&self, place: Ticket) -> bool {
        if place.is_mesh() && upstream::fails_open(&self.out.cx, &place.node.endpoint) {
            return true; // the next attempt is the experimental mode's plaintext
        }
        place.failed(self.dst.now());
        self.dst.endpoints() > 1
    }

    /// Who may be asked is the server's decision.
    fn revoked(&self, _: &Ticket, _: &Parts) -> impl Future<Output = Refusal> + 'static {
        pending()
    }

    fn begin(&self, place: Ticket, request: &Parts) -> Call {
        let http = place.reach.http(&self.out.cx.control.metrics);
        let tap = self.out.tap(self.client, &place, request);
        Call { record: record::Request::begin(http, tap), ticket: place, dst: self.dst.clone() }
    }

    fn refused(&self, refusal: Refusal) -> bool {
        self.out.cx.control.metrics.error(Direction::Outbound, Layer::Http, refusal.reason);
        true
    }
}

impl Record for Call {
    fn response(&mut self, status: u16, headers: VisitHeaders<'_>, after: Duration) {
        self.ticket.responded(self.dst.now(), after);
        self.record.response(status, headers);
    }

    fn body(&mut self, bytes: u64) {
        self.record.body(bytes);
    }

    fn trailers(&mut self, trailers: VisitHeaders<'_>) {
        self.record.trailers(trailers);
    }

    fn grpc_status(&mut self, code: u8) {
        self.record.grpc_status(code);
    }

    fn end(self, failed: bool) {
        self.record.end(failed);
    }
}
