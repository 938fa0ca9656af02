//! When a certificate is renewed: at 70 % of its life with some jitter, and with back-off after failures.
//!
//! Pure: the clock's reading and random numbers are arguments.

use std::time::{Duration, SystemTime};

/// Bounds of the wait until the next renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub min: Duration,
    pub max: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { min: Duration::from_secs(60), max: Duration::from_secs(24 * 3600) }
    }
}

/// How long to wait before renewing a certificate that was obtained at `now` and ends at `not_after`.
///
/// 70 % of what is left, moved by up to 5 % either way so that a fleet started together does not renew together, within
/// `bounds` (a `min` beyond the certificate's life is the operator's word and is kept).
pub fn after_success(now: SystemTime, not_after: SystemTime, bounds: Bounds, random: u64) -> Duration {
    let life = not_after.duration_since(now).unwrap_or(Duration::ZERO);
    life.mul_f64(0.65 + 0.1 * unit(random)).min(bounds.max).max(bounds.min)
}

/// How long to wait after the `failures`-th failure in a row (1 is the first): 0.5 s doubling to 30 s, less up to a half.
pub fn after_failure(failures: u32, random: u64) -> Duration {
    let full = Duration::from_millis(500 << failures.saturating_sub(1).min(6)).min(Duration::from_secs(30));
    full.mul_f64(1.0 - 0.5 * unit(random))
}

/// A random number in 0 ..= 1.
fn unit(random: u64) -> f64 {
    (random >> 11) as f64 / (u64::MAX >> 11) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn renewal_comes_at_seventy_per_cent_give_or_take_five() {
        let now = SystemTime::UNIX_EPOCH + S * 1_000_000;
        let day = now + S * 86_400;
        let wide = Bounds { min: Duration::ZERO, max: S * 1_000_000 };
        assert_eq!(after_success(now, day, wide, 0), S * 56_160);
        assert_eq!(after_success(now, day, wide, u64::MAX), S * 64_800);
        assert_eq!(after_success(now, day, Bounds { max: S * 60, ..wide }, 0), S * 60);
        assert_eq!(after_success(now, now + S * 10, Bounds { min: S * 60, ..wide }, 0), S * 60);
        assert_eq!(after_success(now, now - S, wide, 0), Duration::ZERO, "already over: at once");
    }

    #[test]
    fn failures_back_off_and_never_stop() {
        let waits: Vec<_> = (1..=8).map(|n| after_failure(n, 0).as_millis()).collect();
        assert_eq!(waits, [500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
        assert_eq!(after_failure(u32::MAX, u64::MAX), S * 15);
    }
}
