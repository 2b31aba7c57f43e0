//! How long to wait before trying again: jitter, and back-off with a cap. Pure but for the source of
//! randomness.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Spreads a duration by up to a quarter in both directions.
pub(crate) fn jitter(base: Duration, random: u64) -> Duration {
    // 0 to 500 of 1,000, on top of three quarters.
    let spread = u32::try_from(random % 501).unwrap_or(0);
    (base.saturating_mul(3) / 4).saturating_add(base.saturating_mul(spread) / 1000)
}

/// Spreads a duration over all of it but the first tenth: for what many hosts begin at one moment.
pub(crate) fn full_jitter(base: Duration, random: u64) -> Duration {
    let spread = u32::try_from(random % 901).unwrap_or(0);
    (base / 10).saturating_add(base.saturating_mul(spread) / 1000)
}

/// A number that differs from call to call and from process to process.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(0u8)
}

/// Doubles from `first` up to a cap.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration) -> Self {
        Backoff { first, next: first }
    }

    /// How long to wait now, before jitter.
    pub(crate) fn next(&mut self, cap: Duration) -> Duration {
        let now = self.next.min(cap);
        self.next = now.saturating_mul(2);
        now
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_stays_within_a_quarter() {
        let base = Duration::from_secs(1);
        for random in [0, 250, 500, 501, u64::MAX] {
            let wait = jitter(base, random);
            assert!(wait >= base * 3 / 4 && wait <= base * 5 / 4, "{wait:?}");
            jitter(Duration::MAX, random);
        }
    }

    #[test]
    fn full_jitter_stays_within_the_duration() {
        let base = Duration::from_secs(1);
        for (random, millis) in [(0, 100), (450, 550), (900, 1_000), (901, 100)] {
            assert_eq!(full_jitter(base, random), Duration::from_millis(millis));
        }
    }

    #[test]
    fn backoff_doubles_to_its_cap_and_starts_again() {
        let mut backoff = Backoff::new(Duration::from_millis(100));
        let cap = Duration::from_millis(350);
        let waits: Vec<_> = (0..4).map(|_| backoff.next(cap).as_millis()).collect();
        assert_eq!(waits, [100, 200, 350, 350]);
        backoff.reset();
        assert_eq!(backoff.next(cap).as_millis(), 100);
    }
}
