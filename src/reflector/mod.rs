//! The reflector: replays the ledger into the LDB, in order, never twice, never part of a
//! transaction.

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
