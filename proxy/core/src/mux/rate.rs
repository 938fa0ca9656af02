//! How often a peer may do something: a token bucket on a clock that is an argument.

use std::time::Duration;

/// Allows `per_second` events in the long run.
#[derive(Debug)]
pub(super) struct Rate {
    per_second: f64,
    at_once: f64,
    tokens: f64,
    at: Duration,
}

impl Rate {
    /// `more`: events at once beyond twice the rate.
    pub(super) fn new(per_second: u32, more: u32) -> Self {
        let per_second = f64::from(per_second);
        let at_once = 2.0 * per_second + f64::from(more);
        Self { per_second, at_once, tokens: at_once, at: Duration::ZERO }
    }

    /// Counts one event; false: too many.
    pub(super) fn allow(&mut self, now: Duration) -> bool {
        let gained = now.saturating_sub(self.at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + gained).min(self.at_once);
        self.at = now.max(self.at);
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }
}
