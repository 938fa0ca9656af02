//! One original destination as this thread knows it: discovery's live answer, the balancer over its endpoints, and
//! whether its servers speak first.
//!
//! One per (thread, destination), shared by all connections to it. Decides which endpoint is next; connects to none.

use std::cell::{Cell, OnceCell, RefCell, RefMut};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mantle_proxy_core::balance::{Balancer, Ewma, Node};
use mantle_proxy_core::model::{Backend, Outbound};
use mantle_proxy_core::reasons::Unroutable;
use tokio::time::Instant;

use crate::app::Thread;
use crate::discovery::Target;
use crate::metrics::{Http, Labels, Metrics, Side, Transport};
use crate::record;
use crate::upstream::{self, Route};

pub(crate) struct Destination {
    pub(crate) original: SocketAddr,
    /// Its servers have spoken first before: do not wait for the client.
    pub(crate) server_first: Cell<bool>,
    used: Cell<Instant>,
    live: RefCell<Live>,
    born: Instant,
}

struct Live {
    target: Target,
    balancer: Balancer,
    reaches: Vec<(Rc<Node>, Rc<Reach>)>,
    stale: bool,
}

/// How an endpoint is reached, with the metric handles of its label set: resolved once, not per request.
pub(crate) struct Reach {
    pub(crate) route: Route,
    /// The experimental mode's plaintext, which lasts only until TLS is possible.
    fails_open: bool,
    pub(crate) transport: Arc<Transport>,
    labels: Labels,
    http: OnceCell<Arc<Http>>,
}

impl Reach {
    /// The HTTP counters; made at the first request, so that opaque ports have none.
    pub(crate) fn http(&self, metrics: &Metrics) -> Arc<Http> {
        self.http.get_or_init(|| metrics.http(&self.labels)).clone()
    }
}

impl Destination {
    pub(crate) fn new(original: SocketAddr, target: Target) -> Self {
        let now = Instant::now();
        let live = Live { target, balancer: Balancer::new(Ewma::default()), reaches: Vec::new(), stale: true };
        let (server_first, used) = (Cell::new(false), Cell::new(now));
        Self { original, server_first, used, live: RefCell::new(live), born: now }
    }

    /// What discovery says now.
    ///
    /// # Errors
    /// Discovery's own reason.
    pub(crate) fn outbound(&self) -> Result<Arc<Outbound>, Unroutable> {
        self.used.set(Instant::now());
        self.live.borrow().target.outbound.borrow().clone()
    }

    pub(crate) fn unused_for(&self) -> Duration {
        self.used.get().elapsed()
    }

    /// Time on the clock of this destination's balancer.
    pub(crate) fn now(&self) -> Duration {
        self.born.elapsed()
    }

    /// The endpoint for the next request; waits at most the destination's failfast time for one to appear.
    ///
    /// # Errors
    /// `NoEndpoints` (none is ready), `DiscoveryUnavailable` (they are not known yet), or discovery's own reason.
    pub(crate) async fn pick(&self, mut random: impl FnMut() -> u64) -> Result<Rc<Node>, Unroutable> {
        if let Some(node) = self.refresh()?.pick(self.now(), &mut random) {
            return Ok(node);
        }
        // Boxed: rare, and large enough to weigh on every connection's task.
        Box::pin(self.wait(random)).await
    }

    async fn wait(&self, mut random: impl FnMut() -> u64) -> Result<Rc<Node>, Unroutable> {
        let mut target = self.live.borrow().target.clone();
        let known = async {
            loop {
                tokio::select! {
                    changed = target.outbound.changed() => changed,
                    changed = target.endpoints.changed() => changed,
                }
                .map_err(|_| Unroutable::DiscoveryUnavailable)?;
                if let Some(node) = self.refresh()?.pick(self.now(), &mut random) {
                    return Ok(node);
                }
            }
        };
        let failfast = self.outbound()?.failfast;
        match tokio::time::timeout(failfast, known).await {
            Ok(picked) => picked,
            Err(_) if self.live.borrow().target.endpoints.borrow().is_none() => Err(Unroutable::DiscoveryUnavailable),
            Err(_) => Err(Unroutable::NoEndpoints),
        }
    }

    /// How many endpoints there are: as many attempts to connect are worth making.
    pub(crate) fn endpoints(&self) -> usize {
        self.live.borrow().balancer.len()
    }

    /// How `node` is reached.
    ///
    /// # Errors
    /// What makes its endpoint unusable.
    pub(crate) fn reach(&self, cx: &Thread, node: &Rc<Node>) -> Result<Rc<Reach>, Unroutable> {
        let mut live = self.live.borrow_mut();
        let fails_open = upstream::fails_open(cx, &node.endpoint);
        if let Some((_, reach)) = live.reaches.iter().find(|(known, _)| Rc::ptr_eq(known, node))
            && reach.fails_open == fails_open
        {
            return Ok(reach.clone());
        }
        live.reaches.retain(|(known, _)| !Rc::ptr_eq(known, node));
        let route = upstream::route(cx, &node.endpoint)?;
        let authority = live.target.outbound.borrow().as_ref().ok().and_then(|outbound| outbound.authority.clone());
        let labels = record::outbound_dst(&node.endpoint, route.tls.clone(), authority);
        let transport = cx.control.metrics.transport(Side::Dst, &labels);
        let reach = Rc::new(Reach { route, fails_open, transport, labels, http: OnceCell::new() });
        live.reaches.push((node.clone(), reach.clone()));
        Ok(reach)
    }

    /// The balancer, brought up to what discovery says now.
    fn refresh(&self) -> Result<RefMut<'_, Balancer>, Unroutable> {
        let mut live = self.live.borrow_mut();
        let Live { target, balancer, reaches, stale } = &mut *live;
        let changed = target.outbound.has_changed().unwrap_or(false) || target.endpoints.has_changed().unwrap_or(false);
        if changed || *stale {
            let outbound = target.outbound.borrow_and_update().clone()?;
            let endpoints = target.endpoints.borrow_and_update().clone();
            match &outbound.backend {
                Backend::Forward(endpoint) => balancer.update(&[Arc::new(endpoint.clone())], self.now()),
                Backend::Balance { .. } => balancer.update(endpoints.as_deref().unwrap_or_default(), self.now()),
            }
            reaches.clear();
            *stale = false;
        }
        Ok(RefMut::map(live, |live| &mut live.balancer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mantle_proxy_core::model::{Endpoint, Hint, Protocol};
    use mantle_proxy_core::reasons::NoTls;
    use tokio::sync::watch;

    fn endpoint(port: u16) -> Arc<Endpoint> {
        Arc::new(Endpoint {
            addr: SocketAddr::from(([10, 0, 0, 1], port)),
            tls: Err(NoTls::NotProvidedByServiceDiscovery),
            opaque_transport: None,
            hint: Hint::Unknown,
            labels: Arc::new([]),
        })
    }

    fn balanced() -> Outbound {
        let backend = Backend::Balance { path: "web.emojivoto.svc.cluster.local:80".into() };
        Outbound { protocol: Protocol::Detect, backend, authority: None, failfast: Duration::from_secs(3) }
    }

    #[tokio::test(start_paused = true)]
    async fn waits_for_an_endpoint_but_not_for_ever_and_follows_changes() {
        let (_tx, outbound) = watch::channel(Ok(Arc::new(balanced())));
        let (endpoints_tx, endpoints) = watch::channel(None);
        let dst = Destination::new("10.203.128.1:80".parse().unwrap(), Target { outbound, endpoints });
        let began = Instant::now();
        assert_eq!(dst.pick(|| 0).await.unwrap_err(), Unroutable::DiscoveryUnavailable);
        assert_eq!(began.elapsed(), Duration::from_secs(3));
        endpoints_tx.send(Some(Arc::from([]))).unwrap();
        assert_eq!(dst.pick(|| 0).await.unwrap_err(), Unroutable::NoEndpoints);
        let arrives = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            endpoints_tx.send(Some(Arc::from([endpoint(1)]))).unwrap();
        };
        let (picked, ()) = tokio::join!(dst.pick(|| 0), arrives);
        assert_eq!(picked.unwrap().endpoint.addr.port(), 1);
        endpoints_tx.send(Some(Arc::from([endpoint(2)]))).unwrap();
        assert_eq!(dst.pick(|| 0).await.unwrap().endpoint.addr.port(), 2);
    }
}
