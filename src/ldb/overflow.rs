//! What change capture keeps of a table once its rows are too many to keep each one's values: only
//! what becomes of the last-change records, by rowid. Pure.

use std::collections::HashMap;

use crate::model::{LedgerTime, Seq};

/// An entry: what a last-change record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stamp {
    pub(super) seq: Seq,
    pub(super) time: LedgerTime,
}

/// What the last-change record of one rowid becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes.
    Gone,
    /// It names this entry.
    Changed(Stamp),
    /// It becomes a copy of what this rowid's record was: the row was replaced by itself.
    From(i64),
}

/// Changes to last-change records, each rowid once. Apply all of [`Fate::Gone`] before the rest.
#[derive(Debug, Default)]
pub(super) struct Fates(HashMap<i64, Fate>);

impl Fates {
    pub(super) fn set(&mut self, rowid: i64, fate: Fate) -> Option<Fate> {
        self.0.insert(rowid, fate)
    }

    fn clear(&mut self, rowid: i64) {
        self.0.remove(&rowid);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes everything, in order of the rowids.
    pub(super) fn drain(&mut self) -> Vec<(i64, Fate)> {
        let mut fates: Vec<_> = self.0.drain().collect();
        fates.sort_unstable_by_key(|(rowid, _)| *rowid);
        fates
    }
}

/// The row that was deleted last: when the same entry inserts it again with the same values, a
/// REPLACE has replaced it by itself.
#[derive(Debug)]
struct Deleted {
    rowid: i64,
    key: Box<[u8]>,
    image: Box<[u8]>,
    at: Seq,
    fate_before: Option<Fate>,
    last_before: Option<Stamp>,
}

/// A table in overflow.
#[derive(Debug)]
pub(super) struct Overflow {
    pub(super) fates: Fates,
    /// The last entry that changed the table.
    pub(super) last: Option<Stamp>,
    deleted: Option<Deleted>,
}

impl Overflow {
    pub(super) fn new(fates: Fates, last: Option<Stamp>) -> Self {
        Overflow {
            fates,
            last,
            deleted: None,
        }
    }

    /// Takes the fates collected so far, to be applied before those that come.
    pub(super) fn drain(&mut self) -> Vec<(i64, Fate)> {
        self.deleted = None;
        self.fates.drain()
    }

    pub(super) fn delete(&mut self, rowid: i64, key: &[u8], image: &[u8], now: Stamp) {
        let fate_before = self.fates.set(rowid, Fate::Gone);
        self.deleted = Some(Deleted {
            rowid,
            key: key.into(),
            image: image.into(),
            at: now.seq,
            fate_before,
            last_before: self.last,
        });
        self.last = Some(now);
    }

    pub(super) fn insert(&mut self, rowid: i64, key: &[u8], image: &[u8], now: Stamp) {
        let same = self
            .deleted
            .take()
            .filter(|d| d.at == now.seq && *d.key == *key && *d.image == *image);
        match same {
            Some(deleted) => {
                self.last = deleted.last_before;
                match deleted.fate_before {
                    Some(fate) => {
                        self.fates.set(rowid, fate);
                    }
                    None if rowid == deleted.rowid => self.fates.clear(rowid),
                    None => {
                        self.fates.set(rowid, Fate::From(deleted.rowid));
                    }
                }
            }
            None => {
                self.fates.set(rowid, Fate::Changed(now));
                self.last = Some(now);
            }
        }
    }
}
