//! How long changes take from the ledger to the tree: a window of measurements and what can
//! honestly be said of them. Pure.

use std::collections::VecDeque;

use serde_json::{Value as Json, json};

use crate::model::LedgerTime;

/// How many transactions the window holds.
const WINDOW: usize = 1_000;

/// The delays of the last transactions that were applied as they came.
#[derive(Debug, Default)]
pub struct Delays {
    /// The entry's time within its second, and the delay, both in microseconds.
    window: VecDeque<(i64, i64)>,
}

/// What the window came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DelayReport {
    count: usize,
    p50: i64,
    p99: i64,
    resolution: i64,
    clock_ahead: i64,
}

impl Delays {
    /// Adds a transaction whose entry was written at `written`, by a clock that is `clock_ahead`
    /// microseconds ahead of ours, and that became visible at `visible`, by ours.
    pub fn add(&mut self, written: LedgerTime, clock_ahead: i64, visible: LedgerTime) {
        if self.window.len() >= WINDOW {
            self.window.pop_front();
        }
        let delay = visible
            .micros()
            .saturating_add(clock_ahead)
            .saturating_sub(written.micros());
        self.window
            .push_back((written.micros().rem_euclid(1_000_000), delay));
    }

    /// What can be said now; `None` before the first transaction.
    pub fn report(&self, clock_ahead: i64) -> Option<DelayReport> {
        let last = self.window.len().checked_sub(1)?;
        // The clocks are compared to within half a round trip: a little below zero is zero.
        let mut delays: Vec<i64> = self
            .window
            .iter()
            .map(|(_, delay)| (*delay).max(0))
            .collect();
        delays.sort_unstable();
        // A ledger that stores whole seconds, or milliseconds, cannot tell more than that: such
        // delays are too long by up to that much, and so are given in whole ones of it.
        let resolution = [1_000_000, 1_000]
            .into_iter()
            .find(|step| self.window.iter().all(|(time, _)| time % step == 0))
            .unwrap_or(1);
        let at = |percent: usize| {
            let delay = delays.get(last * percent / 100).copied().unwrap_or(0);
            delay - delay % resolution
        };
        Some(DelayReport {
            count: delays.len(),
            p50: at(50),
            p99: at(99),
            resolution,
            clock_ahead,
        })
    }
}

impl DelayReport {
    /// The report as status.json shows it.
    pub(super) fn json(&self) -> Json {
        json!({
            "count": self.count,
            "p50_ms": millis(self.p50),
            "p99_ms": millis(self.p99),
            "resolution_ms": millis(self.resolution),
            "clock_ahead_ms": millis(self.clock_ahead),
        })
    }
}

fn millis(micros: i64) -> Json {
    // Up to 2^53 microseconds, which is 285 years, floats are exact enough to show.
    #[allow(clippy::cast_precision_loss)]
    let millis = micros as f64 / 1000.0;
    json!(millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(entries: impl IntoIterator<Item = (i64, i64)>) -> Json {
        let mut delays = Delays::default();
        for (written, visible) in entries {
            delays.add(
                LedgerTime::from_micros(written),
                250,
                LedgerTime::from_micros(visible - 250),
            );
        }
        delays
            .report(250)
            .map_or(Json::Null, |report| report.json())
    }

    #[test]
    fn percentiles_are_of_the_last_thousand() {
        assert_eq!(report([]), Json::Null);
        let slow = (0..500).map(|i| (i * 17 + 1, i * 17 + 1 + 9_000_000));
        let live = (1..=1_000).map(|i| (i * 13 + 1, i * 13 + 1 + i * 10));
        assert_eq!(
            report(slow.chain(live)),
            json!({
                "count": 1000, "p50_ms": 5.0, "p99_ms": 9.9, "resolution_ms": 0.001,
                "clock_ahead_ms": 0.25,
            })
        );
    }

    #[test]
    fn a_ledger_of_whole_seconds_gives_whole_seconds() {
        let of = |delay| {
            let report = report((0..100).map(|i| (i * 1_000_000, i * 1_000_000 + delay)));
            (report["p99_ms"].clone(), report["resolution_ms"].clone())
        };
        assert_eq!(of(700_000), (json!(0.0), json!(1000.0)));
        assert_eq!(of(31_700_000), (json!(31_000.0), json!(1000.0)));
        let millis = report([(5_000, 8_400), (7_000, 7_000), (1_000_000, 1_000_000)]);
        assert_eq!(millis["resolution_ms"], 1.0);
        assert_eq!(millis["p50_ms"], 0.0);
    }

    #[test]
    fn clocks_that_disagree_a_little_make_no_negative_delay() {
        assert_eq!(report([(1_001, 900)])["p50_ms"], 0.0);
    }
}
