//! Inbound HTTP/2 and gRPC: each request is judged on its own, and again while it lasts when the policy changes.

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use http::HeaderValue;
use http::request::Parts;
use mantle_proxy_core::model::ServerPolicy;
use mantle_proxy_core::policy::Permit;
use mantle_proxy_core::reasons::NoTls;

use super::requests::{Handles, PortUse, client_addr, client_id, permit, refusal, revoked};
use super::{Client, Inbound, Port, Server};
use crate::http2::{Connected, Picked, Record, Refusal, Service};
use crate::metrics::{Direction, Layer, TlsLabel};
use crate::record::{self, Conn};
use crate::tap::VisitHeaders;

/// The requests of one client connection, or of one stream of a link, for one port.
pub(super) struct Calls {
    inbound: Rc<Inbound>,
    client: Rc<Client>,
    port: Rc<Port>,
    used: Rc<PortUse>,
}

/// An admitted request.
pub(super) struct Admitted {
    permit: Permit,
    handles: Rc<Handles>,
}

/// One request under way.
pub(super) struct Call(record::Request);

impl Calls {
    pub(super) fn new(inbound: &Rc<Inbound>, client: &Rc<Client>, port: &Rc<Port>, policy: &ServerPolicy) -> Self {
        let used = PortUse::of(inbound, client, port, policy);
        Self { inbound: inbound.clone(), client: client.clone(), port: port.clone(), used }
    }

    /// Where the client's bytes are counted.
    pub(super) fn src(&self) -> Rc<Conn> {
        self.used.src.clone()
    }
}

impl Service for Calls {
    type Io = Server;
    type Place = Admitted;
    type Ticket = Call;

    async fn pick(&self, request: &mut Parts) -> Result<Picked<Admitted>, Refusal> {
        let permit = permit(&self.inbound, &self.client, &self.port, request.method.as_str(), request.uri.path())?;
        let handles = self.used.handles(&self.inbound, &self.client, &self.port, &permit);
        handles.allowed.add(1);
        if let Some(id) = client_id(&self.client).and_then(|id| HeaderValue::from_str(id).ok()) {
            request.headers.insert("l5d-client-id", id);
        }
        let address = client_addr(&self.inbound, &self.client, &self.port);
        if let Some(address) = address.and_then(|address| HeaderValue::try_from(address).ok()) {
            request.headers.insert("mantle-client-addr", address);
        }
        let key = (self.port.addr, TlsLabel::None(NoTls::Loopback));
        Ok(Picked { key, place: Admitted { permit, handles }, strip_response: true })
    }

    async fn connect(&self, place: &Admitted) -> Result<Connected<Server>, Refusal> {
        let io = self.inbound.dial(&place.permit, &self.port).await.map_err(refusal)?;
        Ok(Connected { io, link: None })
    }

    fn unreachable(&self, _: Admitted) -> bool {
        false
    }

    fn revoked(&self, place: &Admitted, request: &Parts) -> impl Future<Output = Refusal> + 'static {
        let (inbound, client, port) = (self.inbound.clone(), self.client.clone(), self.port.clone());
        let (method, path) = (request.method.clone(), request.uri.clone());
        let permit = place.permit.clone();
        async move { revoked(&inbound, &client, &port, permit, method.as_str(), path.path()).await }
    }

    fn begin(&self, place: Admitted, request: &Parts) -> Call {
        Call(record::Request::begin(place.handles.http.clone(), self.inbound.tap(&self.client, &self.port, request)))
    }

    fn refused(&self, refusal: Refusal) -> bool {
        self.inbound.cx.control.metrics.error(Direction::Inbound, Layer::Http, refusal.reason);
        self.client.id.is_some()
    }
}

impl Record for Call {
    fn response(&mut self, status: u16, headers: VisitHeaders<'_>, _: Duration) {
        self.0.response(status, headers);
    }

    fn body(&mut self, bytes: u64) {
        self.0.body(bytes);
    }

    fn trailers(&mut self, trailers: VisitHeaders<'_>) {
        self.0.trailers(trailers);
    }

    fn grpc_status(&mut self, code: u8) {
        self.0.grpc_status(code);
    }

    fn end(self, failed: bool) {
        self.0.end(failed);
    }
}
