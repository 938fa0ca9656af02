//! How long to wait before trying again: doubling, bounded, with jitter so that a fleet does not return as one.

use std::time::Duration;

use crate::tls;

const FIRST: Duration = Duration::from_millis(100);
const MOST: Duration = Duration::from_secs(10);

/// The wait after the `failures`-th failure in a row (1 is the first): 100 ms doubling to 10 s, less up to a half.
pub(crate) fn wait(failures: u32) -> Duration {
    let full = FIRST.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(MOST);
    full.mul_f64(1.0 - 0.5 * unit())
}

/// A random number in 0 .. 1.
pub(crate) fn unit() -> f64 {
    (tls::random() >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_a_bound_and_differ() {
        for (failures, full) in [(0, 100), (1, 100), (2, 200), (5, 1600), (8, 10_000), (u32::MAX, 10_000)] {
            let waits: Vec<_> = (0..20).map(|_| wait(failures)).collect();
            assert!(waits.iter().all(|w| (full / 2..=full).contains(&w.as_millis())), "{failures}: {waits:?}");
            assert!(waits.iter().any(|w| *w != waits[0]), "jitter");
        }
    }
}
