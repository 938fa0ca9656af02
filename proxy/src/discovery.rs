//! What an original destination means, and what a port of this pod accepts: the control plane's answers as watches.
//!
//! Lives on the control thread. The data threads hold a `Discovery` handle, ask once per new destination and keep the
//! watch; the wire's messages become `core::model` values in `discovery/convert.rs` and nowhere else. Values survive the
//! control plane: a stream that breaks is opened again with back-off, and what it said last stands meanwhile.
//!
//! Fail closed: outside the mesh's networks a destination passes through at once; inside them one that is not
//! explained within `ANSWER` is refused.

mod convert;
mod follow;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use linkerd2_proxy_api::destination::destination_client::DestinationClient;
use linkerd2_proxy_api::inbound::inbound_server_policies_client::InboundServerPoliciesClient;
use linkerd2_proxy_api::outbound::outbound_policies_client::OutboundPoliciesClient;
use mantle_proxy_core::model::{Endpoint, Outbound, Protocol, ServerPolicy};
use mantle_proxy_core::reasons::{Denied, Unroutable};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::config::Config;
use crate::metrics::Http;
use crate::tls::CredentialsWatch;

/// A destination's meaning, live. Dropping the last clone ends the streams behind it after the idle time.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) outbound: watch::Receiver<Answer>,
    /// The endpoints when `outbound` says `Balance`: `None` until the first answer.
    pub(crate) endpoints: watch::Receiver<Endpoints>,
}

pub(crate) type Answer = Result<Arc<Outbound>, Unroutable>;
pub(crate) type Endpoints = Option<Arc<[Arc<Endpoint>]>>;

/// A port's policy, live. A listed port starts with the default policy, any other with nothing.
#[derive(Clone)]
pub(crate) struct PortPolicy(watch::Receiver<Option<Arc<ServerPolicy>>>);

impl PortPolicy {
    /// The policy in force. Returns at once but for an unlisted port that the control plane has not answered for: that
    /// waits `ANSWER` at most.
    ///
    /// # Errors
    /// `PolicyUnavailable`.
    pub(crate) async fn known(&mut self) -> Result<Arc<ServerPolicy>, Denied> {
        match tokio::time::timeout(ANSWER, self.0.wait_for(Option::is_some)).await {
            Ok(Ok(policy)) => policy.clone().ok_or(Denied::PolicyUnavailable),
            Ok(Err(_)) | Err(_) => Err(Denied::PolicyUnavailable),
        }
    }

    /// The policy in force, or `None` if the port has none yet.
    pub(crate) fn now(&self) -> Option<Arc<ServerPolicy>> {
        self.0.borrow().clone()
    }

    /// Returns when another policy than `seen` is in force; never, if it cannot change.
    pub(crate) async fn changed(&self, seen: &Arc<ServerPolicy>) {
        let mut policy = self.0.clone();
        let other = |now: &Option<Arc<ServerPolicy>>| now.as_ref().is_none_or(|now| !Arc::ptr_eq(now, seen));
        if policy.wait_for(other).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// How long a destination or an unlisted port may wait for its first answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(3);

/// Destinations known at once. Beyond it the unused make room, then new ones are refused.
const MAX_TARGETS: usize = 8192;
/// Listed ports watched from the start; the rest of a long list, and unlisted ports, are watched when first used.
const MAX_EAGER_PORTS: usize = 256;
const MAX_OTHER_PORTS: usize = 1024;

/// How often the unused are looked for.
const SWEEP: Duration = Duration::from_secs(1);

/// The handle that data threads hold.
#[derive(Clone)]
pub(crate) struct Discovery(Arc<Shared>);

struct Shared {
    config: Arc<Config>,
    /// Where the streams live: the control thread.
    control: Handle,
    connections: Connections,
    /// Streams wait for the first certificate; `None`: they do not.
    credentials: Option<CredentialsWatch>,
    targets: Mutex<HashMap<SocketAddr, Entry>>,
    ports: Mutex<HashMap<u16, PortEntry>>,
}

/// As many connections to the control plane as there are streams for: a peer limits the streams of one (ours to 1,000).
struct Connections {
    make: Box<dyn Fn() -> Clients + Send + Sync>,
    made: Mutex<Vec<Arc<Clients>>>,
}

/// Destinations on one connection: each has up to two streams on it.
const PER_CONNECTION: usize = 400;

impl Connections {
    /// The first connection that has room.
    fn get(&self) -> Arc<Clients> {
        let mut made = lock(&self.made);
        // Ours is one reference, the others are users.
        let free = made.iter().find(|clients| Arc::strong_count(clients) <= PER_CONNECTION).cloned();
        free.unwrap_or_else(|| {
            let new = Arc::new((self.make)());
            made.push(new.clone());
            new
        })
    }
}

/// Clients over lazily connected channels: `control.rs` makes them.
pub(crate) struct Clients {
    destination: DestinationClient<Channel>,
    outbound: OutboundPoliciesClient<Channel>,
    inbound: InboundServerPoliciesClient<Channel>,
    destination_service: follow::Service,
    policy_service: follow::Service,
}

impl Clients {
    /// `destination` and `policy` are the channels to the two services, and where calls on them are counted.
    pub(crate) fn new(destination: (Channel, Arc<Http>), policy: (Channel, Arc<Http>)) -> Self {
        let ((destination, to_destination), (policy, to_policy)) = (destination, policy);
        Self {
            destination: DestinationClient::new(destination),
            outbound: OutboundPoliciesClient::new(policy.clone()),
            inbound: InboundServerPoliciesClient::new(policy),
            destination_service: follow::Service::new("destination", to_destination),
            policy_service: follow::Service::new("policy", to_policy),
        }
    }
}

struct Entry {
    outbound: watch::Sender<Answer>,
    endpoints: watch::Sender<Endpoints>,
    /// Aborted when dropped; `None` for a destination that nobody is asked about.
    _streams: Option<Streams>,
    /// Since which look nobody holds it; `None`: somebody does.
    unused_since: Option<Instant>,
}

struct PortEntry {
    policy: watch::Sender<Option<Arc<ServerPolicy>>>,
    _stream: Streams,
    /// Watched from the start and for ever.
    eager: bool,
    unused_since: Option<Instant>,
}

/// A task that ends with its entry.
struct Streams(AbortHandle);

impl Drop for Streams {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Discovery {
    /// Starts watching the listed ports and sweeping the unused, on `control`. `connect` makes the clients of one more
    /// connection; it is called within that runtime.
    pub(crate) fn start(
        config: Arc<Config>,
        control: Handle,
        connect: impl Fn() -> Clients + Send + Sync + 'static,
        credentials: Option<CredentialsWatch>,
    ) -> Self {
        let connections = Connections { make: Box::new(connect), made: Mutex::default() };
        let shared =
            Shared { config, control, connections, credentials, targets: Mutex::default(), ports: Mutex::default() };
        let discovery = Self(Arc::new(shared));
        for port in discovery.0.config.inbound_ports.iter().take(MAX_EAGER_PORTS) {
            let entry = discovery.0.watch_port(port, true);
            lock(&discovery.0.ports).insert(port, entry);
        }
        // The sweeper must not keep alive what it sweeps.
        let weak = Arc::downgrade(&discovery.0);
        discovery.0.control.spawn(async move {
            let mut ticks = tokio::time::interval(SWEEP);
            loop {
                ticks.tick().await;
                let Some(shared) = weak.upgrade() else { return };
                shared.sweep(Instant::now());
            }
        });
        discovery
    }

    /// What `dst` means. Asked once per destination; the answer is live and shared.
    ///
    /// # Errors
    /// `DiscoveryUnavailable` after `ANSWER` without an answer inside the mesh's networks, or what the answer itself says.
    pub(crate) async fn target(&self, dst: SocketAddr) -> Result<Target, Unroutable> {
        let mut target = self.0.subscribe(dst)?;
        let answered = target.outbound.wait_for(|answer| !matches!(answer, Err(Unroutable::DiscoveryUnavailable)));
        match tokio::time::timeout(ANSWER, answered).await {
            Ok(Ok(answer)) => answer.as_ref().map(|_| ()).map_err(|why| *why)?,
            Ok(Err(_)) | Err(_) if self.0.fails_open() => {}
            Ok(Err(_)) | Err(_) => return Err(Unroutable::DiscoveryUnavailable),
        }
        if self.0.fails_open() {
            self.0.pass_through_meanwhile(dst);
        }
        Ok(target)
    }

    /// What `port` of this pod accepts.
    pub(crate) fn port(&self, port: u16) -> PortPolicy {
        let mut ports = lock(&self.0.ports);
        if !ports.contains_key(&port) && ports.values().filter(|entry| !entry.eager).count() >= MAX_OTHER_PORTS {
            let before = ports.len();
            ports.retain(|_, entry| entry.eager || entry.policy.receiver_count() > 0);
            if ports.len() == before {
                // Nothing can change here, and an unlisted port is refused at once: the sender is gone.
                return PortPolicy(watch::channel(self.0.default_policy(port)).1);
            }
        }
        let entry = ports.entry(port).or_insert_with(|| self.0.watch_port(port, false));
        entry.unused_since = None;
        PortPolicy(entry.policy.subscribe())
    }
}

impl Shared {
    fn subscribe(self: &Arc<Self>, dst: SocketAddr) -> Result<Target, Unroutable> {
        let mut targets = lock(&self.targets);
        if !targets.contains_key(&dst) && targets.len() >= MAX_TARGETS {
            targets.retain(|_, entry| entry.is_held());
            if targets.len() >= MAX_TARGETS {
                tracing::warn!(%dst, MAX_TARGETS, "too many destinations are in use at once");
                return Err(Unroutable::DiscoveryUnavailable);
            }
        }
        let entry = targets.entry(dst).or_insert_with(|| self.entry(dst));
        entry.unused_since = None;
        Ok(Target { outbound: entry.outbound.subscribe(), endpoints: entry.endpoints.subscribe() })
    }

    fn entry(self: &Arc<Self>, dst: SocketAddr) -> Entry {
        let (endpoints, _) = watch::channel(None);
        if !self.is_mesh(dst) {
            let (outbound, _) = watch::channel(Ok(Arc::new(convert::passthrough(dst))));
            return Entry { outbound, endpoints, _streams: None, unused_since: None };
        }
        let (outbound, _) = watch::channel(Err(Unroutable::DiscoveryUnavailable));
        let source = follow::Source {
            clients: self.connect(),
            credentials: self.credentials.clone(),
            workload: self.config.policy_workload.clone(),
            context: self.config.destination_context.clone(),
            with_profile: !self.config.profile_networks.is_empty(),
        };
        let task = self.control.spawn(follow::target(source, dst, outbound.clone(), endpoints.clone()));
        Entry { outbound, endpoints, _streams: Some(Streams(task.abort_handle())), unused_since: None }
    }

    fn connect(&self) -> Arc<Clients> {
        let _on_the_control_thread = self.control.enter();
        self.connections.get()
    }

    /// The experimental mode: what is not explained goes where it was going.
    fn fails_open(&self) -> bool {
        self.config.identity.files.is_some()
    }

    /// Lets `dst` pass until it is explained, if it is not yet.
    fn pass_through_meanwhile(&self, dst: SocketAddr) {
        let Some(outbound) = lock(&self.targets).get(&dst).map(|entry| entry.outbound.clone()) else { return };
        outbound.send_if_modified(|answer| {
            let unknown = matches!(answer, Err(Unroutable::DiscoveryUnavailable));
            if unknown {
                tracing::warn!(%dst, "discovery does not answer: plaintext meanwhile");
                *answer = Ok(Arc::new(convert::passthrough(dst)));
            }
            unknown
        });
    }

    /// Whether `dst` must be explained by the control plane. Without networks, everything must.
    fn is_mesh(&self, dst: SocketAddr) -> bool {
        let networks = &self.config.profile_networks;
        networks.is_empty() || networks.iter().any(|network| network.contains(dst.ip()))
    }

    fn watch_port(&self, port: u16, eager: bool) -> PortEntry {
        let (policy, _) = watch::channel(self.default_policy(port));
        let stream = follow::port(
            self.connect(),
            self.credentials.clone(),
            self.config.policy_workload.clone(),
            port,
            policy.clone(),
        );
        let stream = self.control.spawn(stream);
        PortEntry { policy, _stream: Streams(stream.abort_handle()), eager, unused_since: None }
    }

    /// What stands until the first answer; `None` for an unlisted port.
    fn default_policy(&self, port: u16) -> Option<Arc<ServerPolicy>> {
        let config = &self.config;
        let protocol = if config.opaque_ports.contains(port) { Protocol::Opaque } else { Protocol::Detect };
        (config.inbound_ports.contains(port) || self.fails_open()).then(|| {
            let timeout = config.inbound_detect_timeout;
            let strict = config.identity_ports.contains(port);
            let policy = if strict { config.default_policy.authenticated() } else { config.default_policy };
            Arc::new(policy.server_policy(&config.cluster_networks, protocol, timeout))
        })
    }

    /// Forgets what nobody has held for its idle time. What is watched eagerly stays.
    fn sweep(&self, now: Instant) {
        let over = |since: &mut Option<Instant>, held: bool, idle: Duration| {
            *since = if held { None } else { since.or(Some(now)) };
            since.is_some_and(|since| now.duration_since(since) >= idle)
        };
        let (outbound, inbound) = (self.config.outbound_discovery_idle, self.config.inbound_discovery_idle);
        lock(&self.targets).retain(|_, entry| {
            let held = entry.is_held();
            !over(&mut entry.unused_since, held, outbound)
        });
        lock(&self.ports).retain(|_, entry| {
            let held = entry.eager || entry.policy.receiver_count() > 0;
            !over(&mut entry.unused_since, held, inbound)
        });
    }
}

impl Entry {
    fn is_held(&self) -> bool {
        self.outbound.receiver_count() > 0 || self.endpoints.receiver_count() > 0
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every update under these locks is a single insertion or removal: a panic leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
