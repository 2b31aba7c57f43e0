//! How many requests the kernel has sent, by kind, and which of its features were missing.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::status::Announced;

/// The kinds of requests that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Lookup,
    Forget,
    Getattr,
    Open,
    Read,
    Opendir,
    Readdir,
    Xattr,
    /// Whatever is asked of `.ctlfs`: who watches the counts does not change the others.
    Control,
    Other,
}

impl Operation {
    const ALL: [Operation; 10] = [
        Operation::Lookup,
        Operation::Forget,
        Operation::Getattr,
        Operation::Open,
        Operation::Read,
        Operation::Opendir,
        Operation::Readdir,
        Operation::Xattr,
        Operation::Control,
        Operation::Other,
    ];

    /// The name in `status.json`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Operation::Lookup => "lookup",
            Operation::Forget => "forget",
            Operation::Getattr => "getattr",
            Operation::Open => "open",
            Operation::Read => "read",
            Operation::Opendir => "opendir",
            Operation::Readdir => "readdir",
            Operation::Xattr => "xattr",
            Operation::Control => "control",
            Operation::Other => "other",
        }
    }
}

/// Counts what was announced.
#[derive(Debug, Default)]
pub(super) struct Announcements {
    entries: AtomicU64,
    failed: AtomicU64,
    times: Mutex<VecDeque<Duration>>,
}

impl Announcements {
    /// So many announcements are remembered for their times.
    const WINDOW: usize = 1000;

    /// A commit was announced: so many entries, in so much time.
    pub(super) fn note(&self, entries: u64, took: Duration) {
        self.entries.fetch_add(entries, Ordering::Relaxed);
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        if times.len() == Self::WINDOW {
            times.pop_front();
        }
        times.push_back(took);
    }

    /// So many entries could not be announced.
    pub(super) fn fail(&self, entries: u64) {
        self.failed.fetch_add(entries, Ordering::Relaxed);
    }

    /// What was counted so far; `on` is whether changes are announced.
    pub(super) fn counts(&self, on: bool) -> Announced {
        let mut times: Vec<_> = {
            let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
            times.iter().copied().collect()
        };
        times.sort_unstable();
        let at = |percent: usize| {
            let index = times.len().saturating_sub(1) * percent / 100;
            times.get(index).copied()
        };
        Announced {
            on,
            entries: self.entries.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            times: at(50).zip(at(99)),
        }
    }
}

/// Counts requests.
#[derive(Debug, Default)]
pub(super) struct Requests {
    counts: [AtomicU64; Operation::ALL.len()],
    fallbacks: Mutex<Vec<String>>,
}

impl Requests {
    /// One more.
    pub(super) fn count(&self, operation: Operation) {
        for (kind, count) in Operation::ALL.iter().zip(&self.counts) {
            if *kind == operation {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// The counts so far.
    pub(super) fn counts(&self) -> BTreeMap<&'static str, u64> {
        Operation::ALL
            .iter()
            .zip(&self.counts)
            .map(|(kind, count)| (kind.name(), count.load(Ordering::Relaxed)))
            .collect()
    }

    /// Notes, once, what the kernel lacks and what follows from it.
    pub(super) fn fall_back(&self, what: &str) {
        tracing::warn!("{what}");
        self.fallbacks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(what.to_owned());
    }

    /// What was noted.
    pub(super) fn fallbacks(&self) -> Vec<String> {
        self.fallbacks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
