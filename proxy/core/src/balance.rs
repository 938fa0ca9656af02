//! Which endpoint gets the next request: power of two choices over peak-EWMA latency.
//!
//! Pure: time and random numbers are arguments. A `Node` outlives the update that removed it, so requests under way
//! report to it all the same. Finagle's and linkerd2's algorithm: cost = decayed peak latency x (outstanding + 1), but an
//! endpoint that nobody has tried yet gets one request at once instead of waiting for its assumed latency to fade.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::model::Endpoint;

/// The latency assumed of an endpoint nobody has measured yet, and the time in which a measurement fades to 1/e.
#[derive(Clone, Copy, Debug)]
pub struct Ewma {
    pub default_rtt: Duration,
    pub decay: Duration,
}

impl Default for Ewma {
    fn default() -> Self {
        Self { default_rtt: Duration::from_millis(30), decay: Duration::from_secs(10) }
    }
}

/// One endpoint with what was learnt about it.
#[derive(Debug)]
pub struct Node {
    pub endpoint: Arc<Endpoint>,
    ewma: Ewma,
    outstanding: Cell<u32>,
    rtt: Cell<f64>,
    measured: Cell<bool>,
    updated: Cell<Duration>,
    failures: Cell<u32>,
    resting_until: Cell<Duration>,
}

/// The endpoints of one destination. One writer (`update`), many picks.
#[derive(Debug, Default)]
pub struct Balancer {
    nodes: Vec<Rc<Node>>,
    ewma: Ewma,
}

impl Balancer {
    pub fn new(ewma: Ewma) -> Self {
        Self { nodes: Vec::new(), ewma }
    }

    /// Replaces the set of endpoints; an unchanged endpoint keeps its history.
    pub fn update(&mut self, endpoints: &[Arc<Endpoint>], now: Duration) {
        let old = std::mem::take(&mut self.nodes);
        self.nodes = endpoints
            .iter()
            .map(|endpoint| match old.iter().find(|node| node.endpoint == *endpoint) {
                Some(node) => Rc::clone(node),
                None => Rc::new(Node::new(Arc::clone(endpoint), self.ewma, now)),
            })
            .collect();
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The better of two random endpoints; endpoints that just failed to connect rest, unless all do. `None`: there are none.
    ///
    /// `random` returns uniformly distributed numbers.
    pub fn pick(&self, now: Duration, mut random: impl FnMut() -> u64) -> Option<Rc<Node>> {
        let resting = self.nodes.iter().filter(|node| node.is_resting(now)).count();
        let awake = self.nodes.len() - resting;
        let nth = |n: usize| match awake {
            0 => self.nodes.get(n),
            _ if resting == 0 => self.nodes.get(n),
            _ => self.nodes.iter().filter(|node| !node.is_resting(now)).nth(n),
        };
        let count = if awake == 0 { self.nodes.len() } else { awake };
        let below = |n: usize, r: u64| (r % n.max(1) as u64) as usize;
        let first = match count {
            0 => return None,
            1 => return nth(0).cloned(),
            _ => below(count, random()),
        };
        let second = (first + 1 + below(count - 1, random())) % count;
        let (a, b) = (nth(first)?, nth(second)?);
        Some(Rc::clone(if b.cost(now) < a.cost(now) { b } else { a }))
    }
}

impl Node {
    fn new(endpoint: Arc<Endpoint>, ewma: Ewma, now: Duration) -> Self {
        Self {
            endpoint,
            ewma,
            outstanding: Cell::new(0),
            rtt: Cell::new(ewma.default_rtt.as_secs_f64()),
            measured: Cell::new(false),
            updated: Cell::new(now),
            failures: Cell::new(0),
            resting_until: Cell::new(Duration::ZERO),
        }
    }

    /// A request goes out: each `start` needs exactly one `finish` or `fail`.
    pub fn start(&self) {
        self.outstanding.set(self.outstanding.get() + 1);
    }

    /// Its response began after `rtt`.
    pub fn finish(&self, now: Duration, rtt: Duration) {
        self.release();
        self.failures.set(0);
        self.resting_until.set(Duration::ZERO);
        self.observe(now, rtt);
    }

    /// No connection could be had: the endpoint rests for 100 ms, doubled with each failure in a row, at most 10 s.
    pub fn fail(&self, now: Duration) {
        self.release();
        let failures = self.failures.get();
        self.failures.set(failures.saturating_add(1));
        self.resting_until.set(now + Duration::from_millis(100 << failures.min(7)).min(Duration::from_secs(10)));
    }

    /// A request was given up by its client before it said anything about the endpoint.
    pub fn cancel(&self) {
        self.release();
    }

    pub fn outstanding(&self) -> u32 {
        self.outstanding.get()
    }

    fn release(&self) {
        self.outstanding.set(self.outstanding.get().saturating_sub(1));
    }

    fn is_resting(&self, now: Duration) -> bool {
        self.resting_until.get() > now
    }

    fn observe(&self, now: Duration, rtt: Duration) {
        let (old, new) = (self.rtt.get(), rtt.as_secs_f64());
        // A peak counts in full at once; recovery is gradual.
        let weight = self.fading(now);
        self.rtt.set(if new > old { new } else { old * weight + new * (1.0 - weight) });
        self.measured.set(true);
        self.updated.set(now);
    }

    fn fading(&self, now: Duration) -> f64 {
        let age = now.saturating_sub(self.updated.get()).as_secs_f64();
        (-age / self.ewma.decay.as_secs_f64().max(f64::MIN_POSITIVE)).exp()
    }

    /// Seconds of waiting that a new request here is expected to cost.
    fn cost(&self, now: Duration) -> f64 {
        if !self.measured.get() && self.outstanding.get() == 0 {
            return 0.0;
        }
        (self.rtt.get() * self.fading(now)).max(1e-9) * f64::from(self.outstanding.get() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Hint;
    use crate::reasons::NoTls;

    fn endpoint(last: u8) -> Arc<Endpoint> {
        Arc::new(Endpoint {
            addr: ([10, 0, 0, last], 80).into(),
            tls: Err(NoTls::NotProvidedByServiceDiscovery),
            opaque_transport: None,
            hint: Hint::Unknown,
            labels: [].into(),
        })
    }

    fn balancer(n: u8) -> Balancer {
        let mut balancer = Balancer::default();
        balancer.update(&(1..=n).map(endpoint).collect::<Vec<_>>(), Duration::ZERO);
        balancer
    }

    fn counter(mut seed: u64) -> impl FnMut() -> u64 {
        move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            seed >> 33
        }
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn nobody_is_picked_from_nothing() {
        assert!(balancer(0).pick(Duration::ZERO, counter(1)).is_none());
    }

    #[test]
    fn load_spreads_evenly_over_equals() {
        let balancer = balancer(4);
        let mut random = counter(7);
        for _ in 0..400 {
            balancer.pick(Duration::ZERO, &mut random).unwrap().start();
        }
        for node in &balancer.nodes {
            assert!((85..=115).contains(&node.outstanding()), "{}", node.outstanding());
        }
    }

    #[test]
    fn a_slow_endpoint_gets_less_and_recovers() {
        let balancer = balancer(2);
        let mut random = counter(3);
        let share = |now: Duration, slow: Duration, random: &mut dyn FnMut() -> u64| {
            let mut to_slow = 0;
            for i in 0..200_u32 {
                let now = now + MS * 100 * i;
                let node = balancer.pick(now, &mut *random).unwrap();
                node.start();
                let first = Rc::ptr_eq(&node, &balancer.nodes[0]);
                to_slow += u32::from(first);
                node.finish(now, if first { slow } else { MS * 5 });
            }
            to_slow
        };
        assert!(share(MS, MS * 500, &mut random) < 20);
        // A minute later the peak has faded and the endpoint answers well.
        assert!(share(MS * 60_000, MS * 5, &mut random) > 20);
    }

    #[test]
    fn a_new_endpoint_is_tried_at_once() {
        let mut balancer = balancer(1);
        let node = balancer.pick(MS, counter(1)).unwrap();
        node.start();
        node.finish(MS, MS / 10);
        balancer.update(&[endpoint(1), endpoint(2)], MS);
        let fresh = balancer.pick(MS * 2, counter(1)).unwrap();
        assert_eq!(fresh.endpoint.addr, endpoint(2).addr);
        fresh.start();
        let meanwhile = balancer.pick(MS * 2, counter(1)).unwrap();
        assert_eq!(meanwhile.endpoint.addr, endpoint(1).addr, "one request is enough to learn");
    }

    #[test]
    fn an_endpoint_that_refuses_rests_longer_each_time_and_is_the_last_resort() {
        let balancer = balancer(2);
        let down = &balancer.nodes[0];
        for (failure, rest) in [100, 200, 400].into_iter().enumerate() {
            let now = Duration::from_secs(10 * failure as u64);
            down.start();
            down.fail(now);
            assert!(down.is_resting(now + MS * (rest - 1)) && !down.is_resting(now + MS * rest));
        }
        let now = Duration::from_secs(20);
        let mut random = counter(1);
        for _ in 0..20 {
            assert_eq!(balancer.pick(now, &mut random).unwrap().endpoint.addr, endpoint(2).addr);
        }
        balancer.nodes[1].start();
        balancer.nodes[1].fail(now);
        assert!(balancer.pick(now, &mut random).is_some(), "all rest: try anyway");
        down.start();
        down.finish(now, MS);
        assert!(!down.is_resting(now));
    }

    #[test]
    fn an_update_keeps_the_history_of_those_who_stay() {
        let mut balancer = balancer(2);
        balancer.nodes[1].start();
        let stays = Rc::clone(&balancer.nodes[1]);
        balancer.update(&[endpoint(2), endpoint(3)], MS);
        assert!(Rc::ptr_eq(&stays, &balancer.nodes[0]));
        assert_eq!((balancer.len(), balancer.nodes[0].outstanding(), balancer.nodes[1].outstanding()), (2, 1, 0));
    }
}
