//! What the daemon knows of its own state: written by the reflector and the mount, shown in
//! `status.json` and by `ctlfs status`.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::model::{LedgerTime, Seq};

/// How far the reflector is, and what stands in its way.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// The position of the LDB.
    pub applied: Seq,
    /// The ledger time of the entry at that position, if any was applied.
    pub applied_time: Option<LedgerTime>,
    /// The last sequence the origin was seen to have.
    pub origin_last: Option<Seq>,
    /// When the origin last answered.
    pub last_contact: Option<SystemTime>,
    /// When the LDB was last known to hold everything the origin has.
    pub caught_up: Option<SystemTime>,
    /// Whether the LDB has ever held everything the origin had.
    pub ready: bool,
    /// What keeps the reflector from going on, if anything.
    pub problem: Option<Problem>,
    /// Entries that appeared behind the position, and so were never applied.
    pub late: Vec<Seq>,
    /// Entries applied since the daemon started.
    pub entries_applied: u64,
}

/// Something that keeps the reflector from going on. It tries again by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What kind of problem it is.
    pub kind: ProblemKind,
    /// The entry it is about.
    pub seq: Option<Seq>,
    /// The head of the entry's statement, without the values in it.
    pub statement: Option<String>,
    /// One sentence for the person who is paged.
    pub reason: String,
    /// When it began.
    pub since: SystemTime,
}

/// The kinds of [`Problem`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProblemKind {
    /// The origin does not answer or refuses us.
    Origin,
    /// The ledger does not continue where the LDB stands.
    Ledger,
    /// An entry cannot be applied.
    Statement,
    /// The LDB cannot be written.
    Storage,
}

/// Where the parts of the daemon write their state and others read it.
#[derive(Debug, Default)]
pub struct StatusBoard {
    progress: Mutex<Progress>,
}

impl StatusBoard {
    /// The reflector's state as it is now.
    pub fn progress(&self) -> Progress {
        self.lock().clone()
    }

    /// Changes the reflector's state. `change` must not block.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        // The state is plain data: a panic elsewhere cannot leave it half changed.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
