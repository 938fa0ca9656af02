//! Counters of the data plane: label sets resolved to handles before the hot path, text rendered on demand.
//!
//! Names and labels are the contract of docs/metrics.md. Handles are atomics shared between data and control threads;
//! the text is made in `metrics/text.rs`. One cap bounds all label sets together: beyond it everything is counted under
//! one `overflow="true"` series per family. A label set that nobody holds and that did not change for ten minutes goes.

mod text;
pub(crate) use text::CONTENT_TYPE;

use std::collections::HashMap;
use std::hash::Hash;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use mantle_proxy_core::reasons::NoTls;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Direction {
    Inbound,
    Outbound,
}

/// Which side of the proxy a connection is on: `src` was accepted, `dst` was dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    Src,
    Dst,
}

/// The TLS state of a connection or request, as every metric, log line and tap event shows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum TlsLabel {
    /// Mutual TLS; inbound the client's identity (empty if it sent none), outbound the server's.
    Mutual(Arc<str>),
    /// TLS of a foreign SNI, passed through.
    Passthru(Arc<str>),
    None(NoTls),
}

/// The policy that admitted inbound traffic: `srv_*`, `route_*`, `authz_*`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct PolicyLabels {
    pub(crate) srv: [Arc<str>; 3],
    pub(crate) srv_port: u16,
    pub(crate) route: Option<[Arc<str>; 3]>,
    pub(crate) authz: Option<[Arc<str>; 3]>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Labels {
    pub(crate) direction: Direction,
    pub(crate) target: SocketAddr,
    /// `name.ns:port` of a known Service; `other` for any other authority; `None`: no authority label.
    pub(crate) authority: Option<Arc<str>>,
    pub(crate) tls: TlsLabel,
    /// Outbound: the endpoint's `dst_*` labels.
    pub(crate) dst: Arc<[(String, String)]>,
    pub(crate) policy: Option<Arc<PolicyLabels>>,
}

/// One of the control plane's services, as we reach it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ControlLabels {
    /// `host:port` as configured.
    pub(crate) addr: Arc<str>,
    pub(crate) tls: TlsLabel,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Outcome {
    pub(crate) status: u16,
    /// gRPC status from trailers, when the response is gRPC.
    pub(crate) grpc: Option<u8>,
    /// The stream ended without a complete response.
    pub(crate) failed: bool,
}

impl Outcome {
    /// What `classification` says: a complete response below 500 whose gRPC status, if any, does not blame the server.
    pub(crate) fn is_success(self) -> bool {
        // Linkerd's default gRPC failures: unknown, deadline exceeded, permission denied, internal, unavailable, data loss.
        !self.failed && self.status < 500 && !matches!(self.grpc, Some(2 | 4 | 7 | 13 | 14 | 15))
    }
}

/// `tcp_*` counters of one label set.
#[derive(Debug, Default)]
pub(crate) struct Transport {
    opened: AtomicU64,
    closed: AtomicU64,
    /// Closes with an `errno`, by number: few, so found by a walk.
    errnos: [(OnceLock<i32>, AtomicU64); ERRNOS],
    read: AtomicU64,
    written: AtomicU64,
}

impl Transport {
    pub(crate) fn opened(&self) {
        self.opened.fetch_add(1, Relaxed);
    }

    /// `errno` as the operating system gave it; `None` for an orderly end.
    pub(crate) fn closed(&self, errno: Option<i32>) {
        self.closed.fetch_add(1, Relaxed);
        if let Some(errno) = errno
            && let Some((_, count)) = self.errnos.iter().find(|(slot, _)| *slot.get_or_init(|| errno) == errno)
        {
            count.fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn wrote(&self, bytes: u64) {
        self.written.fetch_add(bytes, Relaxed);
    }
}

/// `request_total`, `response_total`, `response_latency_ms` of one label set.
#[derive(Debug, Default)]
pub(crate) struct Http {
    requests: AtomicU64,
    /// By outcome, in order of first appearance.
    responses: [OnceLock<(Outcome, AtomicU64)>; OUTCOMES],
    /// By status code, in order of first appearance.
    latencies: [OnceLock<Box<Latency>>; STATUSES],
}

impl Http {
    pub(crate) fn request(&self) {
        self.requests.fetch_add(1, Relaxed);
    }

    /// Once per request, at its end. `latency`: from the request's first byte to the response's last.
    pub(crate) fn response(&self, outcome: Outcome, latency: Duration) {
        // The last slot of each takes what finds no other: a server cannot make series without bound.
        let last = Outcome { status: 0, ..outcome };
        let found = self.responses[..OUTCOMES - 1].iter().find_map(|slot| {
            let (key, count) = slot.get_or_init(|| (outcome, AtomicU64::new(0)));
            (*key == outcome).then_some(count)
        });
        found
            .unwrap_or_else(|| &self.responses[OUTCOMES - 1].get_or_init(|| (last, AtomicU64::new(0))).1)
            .fetch_add(1, Relaxed);
        let found = self.latencies[..STATUSES - 1].iter().find_map(|slot| {
            let series = slot.get_or_init(|| Box::new(Latency::new(outcome.status)));
            (series.status == outcome.status).then_some(series)
        });
        found
            .unwrap_or_else(|| self.latencies[STATUSES - 1].get_or_init(|| Box::new(Latency::new(0))))
            .observe(latency);
    }
}

/// A histogram over `BOUNDS_MS`.
#[derive(Debug)]
struct Latency {
    /// 0: the statuses that found no series of their own.
    status: u16,
    /// The last one is `+Inf`. Not cumulative; the text is.
    buckets: [AtomicU64; BOUNDS_MS.len() + 1],
    sum_us: AtomicU64,
}

impl Latency {
    fn new(status: u16) -> Self {
        Self { status, buckets: Default::default(), sum_us: AtomicU64::new(0) }
    }

    fn observe(&self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_MS.partition_point(|bound| u64::from(*bound) * 1000 < micros);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(micros, Relaxed);
    }
}

/// Upper bounds of `response_latency_ms`, in milliseconds, without `+Inf`.
const BOUNDS_MS: [u32; 25] = [
    1, 2, 3, 4, 5, 10, 20, 30, 40, 50, 100, 200, 300, 400, 500, 1000, 2000, 3000, 4000, 5000, 10_000, 20_000, 30_000,
    40_000, 50_000,
];
const OUTCOMES: usize = 24;
const STATUSES: usize = 16;
const ERRNOS: usize = 8;

/// A verdict of the inbound policy, as `inbound_*_authz_*_total` counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Verdict {
    HttpAllowed,
    HttpDenied,
    /// No route of the policy matches the request.
    HttpRouteNotFound,
    TcpAllowed,
    TcpDenied,
    /// An open connection was ended by a change of policy.
    TcpTerminated,
}

/// What an error happened to: `{inbound,outbound}_{http,tcp}_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Layer {
    Http,
    Tcp,
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// All families. Shared by every thread; its locks are taken when a label set is resolved and at a scrape.
#[derive(Debug)]
pub(crate) struct Metrics {
    started: SystemTime,
    /// Label sets of all families together, see `MAX_LABEL_SETS`.
    label_sets: AtomicU64,
    transports: Family<(Side, Labels), Transport>,
    https: Family<Labels, Http>,
    controls: Family<ControlLabels, Http>,
    verdicts: Family<(Verdict, Labels), Counter>,
    errors: Family<(Direction, Layer, &'static str), Counter>,
    pub(crate) certificate: CertificateMetrics,
}

/// `control_identity_cert_*`.
#[derive(Debug, Default)]
pub(crate) struct CertificateMetrics {
    refreshed: Counter,
    failed: Counter,
    /// Unix seconds, 0 before the first certificate.
    expires: AtomicU64,
    refreshed_at: AtomicU64,
}

impl CertificateMetrics {
    pub(crate) fn renewed(&self, now: SystemTime, not_after: SystemTime) {
        self.refreshed.add(1);
        self.refreshed_at.store(unix_seconds(now), Relaxed);
        self.expires.store(unix_seconds(not_after), Relaxed);
    }

    pub(crate) fn failed(&self) {
        self.failed.add(1);
    }
}

/// Label sets of all families together.
pub(crate) const MAX_LABEL_SETS: u64 = 8192;

/// A label set that nobody holds goes when it did not change for this long.
const RETAIN_IDLE: Duration = Duration::from_secs(600);

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            started: SystemTime::now(),
            label_sets: AtomicU64::new(0),
            transports: Family::default(),
            https: Family::default(),
            controls: Family::default(),
            verdicts: Family::default(),
            errors: Family::default(),
            certificate: CertificateMetrics::default(),
        }
    }

    /// The `tcp_*` counters of a connection. Hold the handle for the connection's life.
    pub(crate) fn transport(&self, side: Side, labels: &Labels) -> Arc<Transport> {
        self.transports.get((side, labels.clone()), &self.label_sets)
    }

    /// The HTTP counters of a label set. Resolve once per connection and route, not per request.
    pub(crate) fn http(&self, labels: &Labels) -> Arc<Http> {
        self.https.get(labels.clone(), &self.label_sets)
    }

    /// The counters of our own calls to a service of the control plane.
    pub(crate) fn control(&self, labels: &ControlLabels) -> Arc<Http> {
        self.controls.get(labels.clone(), &self.label_sets)
    }

    /// The authorization counter of a label set.
    pub(crate) fn authz(&self, verdict: Verdict, labels: &Labels) -> Arc<Counter> {
        self.verdicts.get((verdict, labels.clone()), &self.label_sets)
    }

    /// Counts an error; `label` is a reason's label.
    pub(crate) fn error(&self, direction: Direction, layer: Layer, label: &'static str) {
        self.errors.get((direction, layer, label), &self.label_sets).add(1);
    }
}

/// Series of one kind by label set.
#[derive(Debug)]
struct Family<K, V> {
    series: Mutex<HashMap<K, Entry<V>>>,
    /// Where a label set beyond the cap is counted.
    overflow: OnceLock<Arc<V>>,
}

#[derive(Debug)]
struct Entry<V> {
    value: Arc<V>,
    /// What `Series::activity` was at the last scrape, and since when.
    activity: u64,
    unchanged_since: Option<Instant>,
}

/// What a family needs to know of its values to forget the idle ones.
trait Series {
    /// A number that changes with every update.
    fn activity(&self) -> u64;
}

impl<K, V> Default for Family<K, V> {
    fn default() -> Self {
        Self { series: Mutex::default(), overflow: OnceLock::new() }
    }
}

impl<K: Clone + Eq + Hash, V: Default + Series> Family<K, V> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Entry<V>>> {
        // Nothing panics between two writes that belong together.
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, key: K, label_sets: &AtomicU64) -> Arc<V> {
        let mut series = self.lock();
        if let Some(entry) = series.get(&key) {
            return entry.value.clone();
        }
        if label_sets.fetch_add(1, Relaxed) >= MAX_LABEL_SETS {
            label_sets.fetch_sub(1, Relaxed);
            return self.overflow.get_or_init(Arc::default).clone();
        }
        let entry = Entry { value: Arc::default(), activity: 0, unchanged_since: None };
        series.entry(key).or_insert(entry).value.clone()
    }

    /// Everything to print, after forgetting what nobody holds and did not change for `RETAIN_IDLE`. `None` as a key:
    /// the overflow series.
    fn scrape(&self, now: Instant, label_sets: &AtomicU64) -> Vec<(Option<K>, Arc<V>)> {
        let mut series = self.lock();
        series.retain(|_, entry| {
            let activity = entry.value.activity();
            if activity != entry.activity || entry.unchanged_since.is_none() {
                (entry.activity, entry.unchanged_since) = (activity, Some(now));
            }
            let idle = entry.unchanged_since.is_some_and(|since| now.duration_since(since) >= RETAIN_IDLE);
            let keep = !idle || Arc::strong_count(&entry.value) > 1;
            if !keep {
                label_sets.fetch_sub(1, Relaxed);
            }
            keep
        });
        let mut all: Vec<_> = series.iter().map(|(key, entry)| (Some(key.clone()), entry.value.clone())).collect();
        all.extend(self.overflow.get().map(|value| (None, value.clone())));
        all
    }
}

impl Series for Transport {
    fn activity(&self) -> u64 {
        [&self.opened, &self.closed, &self.read, &self.written]
            .iter()
            .fold(0, |sum, n| sum.wrapping_add(n.load(Relaxed)))
    }
}

impl Series for Http {
    fn activity(&self) -> u64 {
        let responses = self.responses.iter().filter_map(OnceLock::get).map(|(_, count)| count.load(Relaxed));
        responses.fold(self.requests.load(Relaxed), u64::wrapping_add)
    }
}

impl Series for Counter {
    fn activity(&self) -> u64 {
        self.get()
    }
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
