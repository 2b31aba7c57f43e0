//! How many requests the kernel has sent, by kind, and which of its features were missing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

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
