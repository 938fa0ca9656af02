//! Inbound: what arrives for this pod, from accept to the application's last byte.
//!
//! accept → original destination → first bytes (mesh TLS, foreign TLS, plaintext) → peer identity → `Permit` → the
//! application → relay, HTTP/1 or HTTP/2 → one record. Only the pod's own address is dialled, never one from the wire,
//! and never without a `Permit`, which is asked for again when the policy changes.
//!
//! Stages are boxed once per connection, so that an idle one holds only the stage that it is in.

mod calls;
mod handshake;
mod peer;
mod requests;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use mantle_proxy_core::client_hello::ClientHello;
use mantle_proxy_core::detect::Detected;
use mantle_proxy_core::model::{Protocol, ServerPolicy};
use mantle_proxy_core::mux::Open;
use mantle_proxy_core::policy::{self, Permit};
use mantle_proxy_core::reasons::{Denied, LinkClosed, NoTls, StreamReset, Unroutable};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tracing::debug;

use crate::app::Thread;
use crate::counted::Counted;
use crate::discovery::PortPolicy;
use crate::link::{self, LinkHint, MuxStream};
use crate::metrics::{Direction, Layer, TlsLabel, Verdict};
use crate::pool::Pool;
use crate::record::{self, Conn};
use crate::relay::{Ahead, relay};
use crate::sniff::{Understood, understand};
use crate::socket::{self, Abort, Dial};
use crate::tap::{TapHead, TapRequest, TapStream};
use crate::tls::ALPN_MUX;
use crate::{http1, http2};
use calls::Calls;
use peer::{Client, Refused, Who};
use requests::Requests;

/// The inbound side of one data thread.
pub(crate) struct Inbound {
    cx: Rc<Thread>,
    ports: RefCell<HashMap<SocketAddr, Rc<Port>>>,
    /// Connections to the application between requests: of one client and one port.
    pool: Pool<(Who, SocketAddr), Server>,
}

/// What a connection or stream is for: a port of this pod, with the policy in force there.
pub(crate) struct Port {
    /// The pod's own address and the port.
    pub(crate) addr: SocketAddr,
    pub(crate) policy: PortPolicy,
    /// The application has spoken first before: do not wait for the client.
    server_first: Cell<bool>,
}

/// A connection to the application.
type Server = Counted<TcpStream>;

impl Inbound {
    pub(crate) fn new(cx: Rc<Thread>) -> Self {
        Self { cx, ports: RefCell::default(), pool: Pool::new() }
    }

    /// Serves one connection until it ends.
    pub(crate) async fn serve(self: &Rc<Self>, io: TcpStream, peer: SocketAddr) {
        if let Err(why) = self.carry(io, peer).await {
            self.cx.control.metrics.error(Direction::Inbound, Layer::Tcp, why.label());
            debug!(client = %peer, reason = why.label(), "inbound connection refused");
        }
    }

    async fn carry(self: &Rc<Self>, mut io: TcpStream, peer: SocketAddr) -> Result<(), Refused> {
        let original = (self.cx.original_dst)(&io).map_err(|_| Denied::Loop)?;
        if original.port() == self.cx.config.inbound_listen.port() {
            let hello = handshake::first_bytes(&mut io).await?;
            return Box::pin(self.mesh_only(io, hello, peer, original.ip())).await;
        }
        let port = self.port(original)?;
        let policy = port.known().await?;
        let client = |tls| Rc::new(Client::new(peer, tls, None));
        if policy.protocol == Protocol::Opaque {
            let client = client(TlsLabel::None(NoTls::PortSkipped));
            let known = Understood::known(Detected::Opaque);
            return Box::pin(self.tcp(&mut io, &client, &port, BytesMut::new(), known)).await;
        }
        let stranger = client(TlsLabel::None(NoTls::NotProvidedByRemote));
        let mut seen = BytesMut::new();
        let understood = self.understand(&mut io, &mut seen, &stranger, &port, &policy, HEAD_START).await?;
        if understood.detected != Detected::Tls {
            return Box::pin(self.understood(&mut io, &stranger, &port, &policy, seen, understood)).await;
        }
        match handshake::client_hello(&mut io, &mut seen, self.cx.config.inbound_detect_timeout).await {
            ClientHello::Hello { sni } if sni.as_deref() == Some(&*self.cx.config.identity.local_name) => {
                let credentials = self.cx.credentials().map_err(|_| Denied::IdentityRequired)?;
                let mut tls = Box::pin(handshake::terminate(io, &seen, credentials.server_plain.clone())).await?;
                let client = Rc::new(Client::proved_by(peer, &tls));
                let mut seen = BytesMut::new();
                let understood = self.understand(&mut tls, &mut seen, &client, &port, &policy, HEAD_START).await?;
                Box::pin(self.understood(&mut tls, &client, &port, &policy, seen, understood)).await
            }
            hello => {
                let client = match hello {
                    ClientHello::Hello { sni: Some(sni) } => client(TlsLabel::Passthru(sni.into())),
                    ClientHello::Hello { sni: None } | ClientHello::NeedMore | ClientHello::NotTls => stranger,
                };
                Box::pin(self.tcp(&mut io, &client, &port, seen, Understood::known(Detected::Opaque))).await
            }
        }
    }

    /// A connection to the proxy's own port: mesh TLS with a client identity, or nothing. Carries streams to any port.
    async fn mesh_only(
        self: &Rc<Self>,
        io: TcpStream,
        hello: BytesMut,
        peer: SocketAddr,
        own: IpAddr,
    ) -> Result<(), Refused> {
        let mut renewed = self.cx.control.credentials.clone();
        let credentials = self.cx.credentials().map_err(|_| Denied::IdentityRequired)?;
        renewed.mark_unchanged();
        let tls = Box::pin(handshake::terminate(io, &hello, credentials.server_link.clone())).await?;
        let client = Rc::new(Client::proved_by(peer, &tls));
        if client.id.is_none() || tls.get_ref().1.alpn_protocol() != Some(ALPN_MUX) {
            return Err(Denied::IdentityRequired.into());
        }
        let accept = |open: Arc<Open>, stream: MuxStream| {
            let (this, client, guard) = (self.clone(), client.clone(), self.cx.active.guard());
            spawn_local(async move {
                this.serve_stream(stream, &client, SocketAddr::new(own, open.port), open.protocol).await;
                drop(guard);
            });
        };
        let mut drain = self.cx.drain.clone();
        let goes = async {
            tokio::select! {
                () = drain.draining() => {}
                changed = renewed.changed() => if changed.is_err() { std::future::pending().await },
            }
        };
        let closed = link::serve(tls, &credentials, accept, goes).await;
        debug!(client = %peer, reason = closed.label(), "inbound link closed");
        if !matches!(closed, LinkClosed::Drained | LinkClosed::PeerGone) {
            self.cx.control.metrics.error(Direction::Inbound, Layer::Tcp, closed.label()); // the peer broke a rule
        }
        Ok(())
    }

    /// A stream that a mesh peer opened; one that is not carried is reset with the reason.
    async fn serve_stream(self: &Rc<Self>, mut io: MuxStream, client: &Rc<Client>, addr: SocketAddr, hint: LinkHint) {
        let Err(why) = self.stream(&mut io, client, addr, hint).await else { return };
        self.cx.control.metrics.error(Direction::Inbound, Layer::Tcp, why.label());
        debug!(client = %client.addr, port = addr.port(), reason = why.label(), "inbound stream refused");
        io.reset(match why {
            Refused::Policy(_) => StreamReset::Denied,
            Refused::App(_) => StreamReset::ConnectFailed,
        });
    }

    /// The hint is the peer's word: it may spare detection, but never make HTTP opaque, or a peer could bring identity
    /// headers of its own past the parser.
    async fn stream(
        self: &Rc<Self>,
        io: &mut MuxStream,
        client: &Rc<Client>,
        addr: SocketAddr,
        hint: LinkHint,
    ) -> Result<(), Refused> {
        let port = self.port(addr)?;
        let policy = port.known().await?;
        let mut seen = BytesMut::new();
        let understood = match (policy.protocol, hint) {
            (Protocol::Opaque | Protocol::Tls, _) => Understood::known(Detected::Opaque),
            (Protocol::Http1, _) | (Protocol::Detect, LinkHint::Http1) => Understood::known(Detected::Http1),
            (Protocol::Http2, _) | (Protocol::Detect, LinkHint::Http2) => Understood::known(Detected::Http2),
            // the peer has waited for its client already
            (Protocol::Detect, LinkHint::Opaque | LinkHint::Tls | LinkHint::Detect) => {
                self.understand(io, &mut seen, client, &port, &policy, Duration::ZERO).await?
            }
        };
        self.understood(io, client, &port, &policy, seen, understood).await
    }

    /// The port that a connection or stream is for. Own addresses only, and none of the proxy's own ports.
    fn port(&self, addr: SocketAddr) -> Result<Rc<Port>, Denied> {
        if !self.cx.is_own(addr.ip()) || self.cx.own_ports.contains(&addr.port()) {
            return Err(Denied::Loop);
        }
        let mut ports = self.ports.borrow_mut();
        let port = ports.entry(addr).or_insert_with(|| {
            let policy = self.cx.control.discovery.port(addr.port());
            Rc::new(Port { addr, policy, server_first: Cell::new(false) })
        });
        Ok(port.clone())
    }

    /// Whoever speaks first decides. The application is dialled early only if the client may use it without more words.
    async fn understand<C: AsyncRead + Unpin>(
        &self,
        io: &mut C,
        seen: &mut BytesMut,
        client: &Client,
        port: &Port,
        policy: &ServerPolicy,
        head_start: Duration,
    ) -> Result<Understood<Server>, Refused> {
        match policy.protocol {
            Protocol::Opaque | Protocol::Tls => return Ok(Understood::known(Detected::Opaque)),
            Protocol::Http1 | Protocol::Http2 | Protocol::Detect => {}
        }
        let head_start = if port.server_first.get() { Duration::ZERO } else { head_start };
        let limit = policy.detect_timeout;
        let early = async {
            match self.permit(client, port) {
                Ok(permit) => self.dial(&permit, port).await,
                Err(_) => std::future::pending().await,
            }
        };
        Box::pin(understand(io, seen, head_start, limit, early)).await
    }

    /// Carries a connection whose protocol is known.
    async fn understood<C>(
        self: &Rc<Self>,
        io: &mut C,
        client: &Rc<Client>,
        port: &Rc<Port>,
        policy: &ServerPolicy,
        seen: BytesMut,
        understood: Understood<Server>,
    ) -> Result<(), Refused>
    where
        C: AsyncRead + AsyncWrite + Abort + Unpin,
    {
        let mut drain = self.cx.drain.clone();
        match understood.detected {
            Detected::Http1 => {
                let requests = Requests::new(self, client, port, policy);
                let mut io = Counted::new(io, requests.src(), seen.len());
                let end = http1::serve(&mut io, seen, &requests, &mut drain).await;
                debug!(client = %client.addr, port = port.addr.port(), ?end, "inbound HTTP/1 connection closed");
                Ok(())
            }
            Detected::Http2 => {
                let calls = Calls::new(self, client, port, policy);
                let io = Counted::new(io, calls.src(), seen.len());
                let end = Box::pin(http2::serve(io, seen, Rc::new(calls), &mut drain)).await;
                debug!(client = %client.addr, port = port.addr.port(), ?end, "inbound HTTP/2 connection closed");
                Ok(())
            }
            Detected::Opaque | Detected::Tls | Detected::NeedMore => {
                Box::pin(self.tcp(io, client, port, seen, understood)).await
            }
        }
    }

    /// Relays a connection whose bytes are nobody's business, until it ends or its client is no longer admitted.
    async fn tcp<C>(
        &self,
        io: &mut C,
        client: &Client,
        port: &Port,
        seen: BytesMut,
        understood: Understood<Server>,
    ) -> Result<(), Refused>
    where
        C: AsyncRead + AsyncWrite + Abort + Unpin,
    {
        let metrics = &self.cx.control.metrics;
        let verdict = |verdict| {
            let labels = record::inbound_refused(port.addr, &client.tls, port.policy.now().as_deref());
            metrics.authz(verdict, &labels).add(1);
        };
        let permit = self.permit(client, port).inspect_err(|_| verdict(Verdict::TcpDenied))?;
        verdict(Verdict::TcpAllowed);
        let mut server = match understood.early {
            Some(early) => early,
            None => self.dial(&permit, port).await?,
        };
        if understood.server_ended {
            return Ok(()); // the client sees what it would have seen without us
        }
        if !understood.from_server.is_empty() {
            port.server_first.set(true);
        }
        let src = Conn::open(record::inbound_src(metrics, port.addr, &client.tls, permit.policy()));
        let mut io = Counted::new(io, Rc::new(src), seen.len());
        let _edge = self.cx.control.edges.opened(client.addr.ip(), port.addr.port(), &client.tls);
        let ahead = Ahead { from_client: seen.freeze(), from_server: understood.from_server.freeze() };
        let end = tokio::select! {
            end = relay(&mut io, &mut server, ahead) => end,
            why = self.revoked(client, port, &permit) => {
                verdict(Verdict::TcpTerminated);
                return Err(why.into());
            }
        };
        let error = end.err().map(tracing::field::display);
        debug!(client = %client.addr, port = port.addr.port(), error, "inbound connection closed");
        Ok(())
    }

    /// May this client use this port at all?
    fn permit(&self, client: &Client, port: &Port) -> Result<Permit, Denied> {
        let policy = port.policy.now().ok_or(Denied::PolicyUnavailable)?;
        policy::authorize(&policy, client.addr.ip(), client.proved())
    }

    /// Returns when a change of policy no longer admits the client.
    async fn revoked(&self, client: &Client, port: &Port, permit: &Permit) -> Denied {
        let mut permit = permit.clone();
        loop {
            port.policy.changed(permit.policy()).await;
            permit = match self.permit(client, port) {
                Ok(permit) => permit,
                Err(why) => return why,
            };
        }
    }

    /// A request that was admitted, for those who watch; `None`: nobody does.
    fn tap(&self, client: &Client, port: &Port, head: &dyn TapHead) -> Option<TapStream> {
        let taps = &self.cx.control.taps;
        if !taps.active() {
            return None;
        }
        let (src, dst) = (client.addr, port.addr);
        taps.open(&TapRequest { direction: Direction::Inbound, src, dst, tls: &client.tls, dst_labels: &[], head })
    }

    /// Forgets ports that nothing uses. Called every few seconds.
    pub(crate) fn sweep(&self) {
        self.pool.sweep();
        self.ports.borrow_mut().retain(|_, port| Rc::strong_count(port) > 1);
    }

    /// Connects to the application, which needs a permit.
    async fn dial(&self, _permit: &Permit, port: &Port) -> Result<Server, Refused> {
        let dial = Dial { mark: self.cx.config.outbound_mark, timeout: self.cx.config.inbound_connect_timeout };
        let io = socket::connect(port.addr, dial).await.map_err(|_| Refused::App(Unroutable::ConnectFailed))?;
        Ok(Counted::new(io, Rc::new(Conn::open(record::inbound_dst(&self.cx.control.metrics))), 0))
    }
}

impl Port {
    /// The policy in force; waits for the first answer only.
    async fn known(&self) -> Result<Arc<ServerPolicy>, Denied> {
        match self.policy.now() {
            Some(policy) => Ok(policy),
            None => Box::pin(self.policy.clone().known()).await,
        }
    }
}

const HEAD_START: Duration = Duration::from_millis(2);
