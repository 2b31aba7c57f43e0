//! The reflector: replays the ledger into the LDB, in order, never twice, never part of a
//! transaction.
//!
//! It only sequences: what a statement may do, and what it changes, is the LDB writer's business.

mod obstacle;
mod pace;
mod push;
mod run;
mod sequence;
mod source;
mod stop;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use run::Reflector;
pub use stop::StopHandle;

use crate::model::ChangeSet;

/// Whoever keeps caches of what the LDB holds. The three calls come from the reflector's thread:
/// `before_commit`, then exactly one of the others.
pub trait CommitObserver: Send {
    /// The LDB is about to change like this. Returns when nothing old is cached any more.
    fn before_commit(&mut self, changes: &ChangeSet);
    /// It has.
    fn after_commit(&mut self, changes: &ChangeSet);
    /// It has not, and stays as it was.
    fn commit_failed(&mut self, changes: &ChangeSet);
}

/// An observer for when nobody keeps caches.
impl CommitObserver for () {
    fn before_commit(&mut self, _: &ChangeSet) {}
    fn after_commit(&mut self, _: &ChangeSet) {}
    fn commit_failed(&mut self, _: &ChangeSet) {}
}

/// What can be set of a reflector.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long to wait between looks at an origin that has nothing new, before jitter.
    pub poll_interval: Duration,
    /// Whether to have the origin tell of changes where it can; how often it then says that it is
    /// there while nothing changes.
    pub push: Option<Duration>,
    /// The longest wait after failures of the origin, before jitter.
    pub max_backoff: Duration,
    /// Commit after so many entries at the latest, or when a ledger transaction ends after that.
    pub batch_entries: usize,
    /// The same in bytes of statements.
    pub batch_bytes: usize,
    /// A ledger transaction that takes more than this is not held in memory as a whole.
    pub transaction_bytes: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            poll_interval: Duration::from_secs(1),
            push: Some(Duration::from_secs(1)),
            max_backoff: Duration::from_secs(10),
            batch_entries: 10_000,
            batch_bytes: 16 << 20,
            transaction_bytes: 64 << 20,
        }
    }
}
