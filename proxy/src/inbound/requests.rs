//! Inbound HTTP/1: each request is judged on its own and carried to the application on a pooled connection.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mantle_proxy_core::http1::{Connection, Edit, Request};
use mantle_proxy_core::model::ServerPolicy;
use mantle_proxy_core::policy::{self, Permit};
use mantle_proxy_core::reasons::Denied;

use super::{Client, Inbound, Port, Refused, Server};
use crate::edges::EdgeGuard;
use crate::http1::{self, Refusal, Service};
use crate::metrics::{Counter, Direction, Http, Layer, Verdict};
use crate::pool::Shelf;
use crate::record::{self, Conn};

/// The requests of one client connection (or link) for one port.
pub(super) struct Requests<'a> {
    inbound: &'a Inbound,
    client: &'a Client,
    port: &'a Port,
    used: Rc<PortUse>,
}

/// What one client connection keeps while it uses a port over HTTP: counted as one connection, with resolved handles.
pub(super) struct PortUse {
    pub(super) src: Rc<Conn>,
    _edge: EdgeGuard,
    /// Connections to the application between requests.
    shelf: Rc<Shelf<Server>>,
    /// By permit; the few routes and authorizations that one client meets.
    handles: RefCell<Vec<(Permit, Rc<Handles>)>>,
}

pub(super) struct Handles {
    pub(super) http: Arc<Http>,
    pub(super) allowed: Arc<Counter>,
}

impl PortUse {
    /// What `client` keeps of `port`: made at its first request there.
    pub(super) fn of(inbound: &Inbound, client: &Client, port: &Port, policy: &ServerPolicy) -> Rc<Self> {
        let mut uses = client.http.borrow_mut();
        let used = uses.entry(port.addr).or_insert_with(|| {
            let control = &inbound.cx.control;
            let src = Rc::new(Conn::open(record::inbound_src(&control.metrics, port.addr, &client.tls, policy)));
            let edge = control.edges.opened(client.addr.ip(), port.addr.port(), &client.tls);
            let shelf = inbound.pool.shelf((client.who(), port.addr));
            Rc::new(Self { src, _edge: edge, shelf, handles: RefCell::default() })
        });
        used.clone()
    }

    /// The counters of requests that `permit` admits.
    pub(super) fn handles(&self, inbound: &Inbound, client: &Client, port: &Port, permit: &Permit) -> Rc<Handles> {
        let mut known = self.handles.borrow_mut();
        let same = |other: &Permit| {
            Arc::ptr_eq(other.policy(), permit.policy())
                && other.route() == permit.route()
                && other.authorization() == permit.authorization()
        };
        if let Some((_, handles)) = known.iter().find(|(other, _)| same(other)) {
            return handles.clone();
        }
        let metrics = &inbound.cx.control.metrics;
        let labels = record::inbound_request(port.addr, &client.tls, permit);
        let allowed = metrics.authz(Verdict::HttpAllowed, &labels);
        let handles = Rc::new(Handles { http: metrics.http(&labels), allowed });
        known.retain(|(other, _)| Arc::ptr_eq(other.policy(), permit.policy())); // a new policy replaces the old one's
        known.push((permit.clone(), handles.clone()));
        handles
    }
}

/// May this client make this request? Asked for each, of the policy in force.
///
/// # Errors
/// The response to give instead; the refusal is counted.
pub(super) fn permit(
    inbound: &Inbound,
    client: &Client,
    port: &Port,
    method: &str,
    path: &str,
) -> Result<Permit, Refusal> {
    let policy = port.policy.now();
    let judged = match &policy {
        Some(policy) => policy::authorize_request(policy, client.addr.ip(), client.proved(), method, path),
        None => Err(Denied::PolicyUnavailable),
    };
    judged.map_err(|why| {
        let verdict = match why {
            Denied::RouteNotFound => Verdict::HttpRouteNotFound,
            _ => Verdict::HttpDenied,
        };
        let labels = record::inbound_refused(port.addr, &client.tls, policy.as_deref());
        inbound.cx.control.metrics.authz(verdict, &labels).add(1);
        refusal(Refused::Policy(why))
    })
}

/// Returns the refusal when a change of policy no longer admits a request that `permit` did.
pub(super) async fn revoked(
    inbound: &Inbound,
    client: &Client,
    port: &Port,
    mut permit: Permit,
    method: &str,
    path: &str,
) -> Refusal {
    loop {
        port.policy.changed(permit.policy()).await;
        permit = match self::permit(inbound, client, port, method, path) {
            Ok(permit) => permit,
            Err(refusal) => return refusal,
        };
    }
}

/// What `l5d-client-id` says of the client; `None`: nothing was proved.
pub(super) fn client_id(client: &Client) -> Option<&str> {
    let id = client.id.as_ref()?;
    Some(if id.dns.is_empty() { id.spiffe.as_deref().unwrap_or_default() } else { &id.dns })
}

/// What `mantle-client-addr` says of the client on the ports that ask for it.
pub(super) fn client_addr(inbound: &Inbound, client: &Client, port: &Port) -> Option<String> {
    let asked = inbound.cx.config.client_addr_ports.contains(port.addr.port());
    asked.then(|| client.addr.ip().to_string())
}

impl<'a> Requests<'a> {
    pub(super) fn new(inbound: &'a Inbound, client: &'a Client, port: &'a Port, policy: &ServerPolicy) -> Self {
        Self { inbound, client, port, used: PortUse::of(inbound, client, port, policy) }
    }

    /// Where the client's bytes are counted.
    pub(super) fn src(&self) -> Rc<Conn> {
        self.used.src.clone()
    }

    /// The head as the application gets it: with who the client is, as far as it was proved here.
    fn head(&self, request: &Request<'_>) -> Vec<u8> {
        let mut head = Vec::with_capacity(request.head.size() + ADDED);
        let address = client_addr(self.inbound, self.client, self.port);
        let id = client_id(self.client).map(|id| ("l5d-client-id", id));
        let address = address.as_deref().map(|address| ("mantle-client-addr", address));
        let mut add: [(&str, &str); 2] = [("", ""); 2];
        let mut n = 0;
        for line in [id, address].into_iter().flatten() {
            add[n] = line;
            n += 1;
        }
        request
            .head
            .forward(&mut head, &Edit { strip_reserved: true, connection: Connection::Default, add: &add[..n] });
        head
    }
}

impl Service for Requests<'_> {
    type Io = Server;
    type Ticket = Permit;

    async fn open(&self, request: &Request<'_>) -> Result<http1::Opened<Server, Permit>, Refusal> {
        let permit = permit(self.inbound, self.client, self.port, request.method, request.path)?;
        let handles = self.used.handles(self.inbound, self.client, self.port, &permit);
        handles.allowed.add(1);
        let record = record::Request::begin(handles.http.clone(), self.inbound.tap(self.client, self.port, request));
        let head = self.head(request);
        let idle = self.used.shelf.take();
        let stale = idle.is_some();
        let io = match idle {
            Some(server) => server,
            None => self.inbound.dial(&permit, self.port).await.map_err(refusal)?,
        };
        Ok(http1::Opened { io, ticket: permit, record, head, stale, half_close: false, strip_response: true })
    }

    fn responded(&self, _: &Permit, _after: Duration) {}

    fn revoked(&self, permit: &Permit, request: &Request<'_>) -> impl Future<Output = Refusal> {
        revoked(self.inbound, self.client, self.port, permit.clone(), request.method, request.path)
    }

    fn reuse(&self, _: Permit, io: Server) {
        self.used.shelf.put(io);
    }

    fn refused(&self, refusal: Refusal) -> bool {
        self.inbound.cx.control.metrics.error(Direction::Inbound, Layer::Http, refusal.reason);
        self.client.id.is_some()
    }
}

pub(super) fn refusal(why: Refused) -> Refusal {
    let status = match why {
        Refused::Policy(Denied::RouteNotFound) => 404,
        Refused::Policy(_) => 403,
        Refused::App(_) => 502,
    };
    Refusal { status, reason: why.label() }
}

const ADDED: usize = 160;
