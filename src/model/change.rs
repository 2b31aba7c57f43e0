//! What one commit to the LDB changes: the value that the writer hands to whoever keeps caches.

use std::sync::Arc;

use super::catalog::Catalog;
use super::name::TableRef;
use super::seq::Seq;
use super::time::LedgerTime;
use super::value::Key;

/// The net effect of one SQLite transaction, which holds one or more whole ledger transactions.
#[derive(Debug, Clone)]
pub struct ChangeSet {
    /// The position the LDB leaves.
    pub from: Seq,
    /// The position it has after the commit; always beyond `from`.
    pub to: Seq,
    /// The ledger time of the last entry applied.
    pub time: LedgerTime,
    /// The changed tables, each once. Entries without an effect leave no trace here.
    pub tables: Vec<TableChange>,
    /// The tables after the commit, if any was created, altered or dropped.
    pub catalog: Option<Arc<Catalog>>,
}

/// What happened to one table.
#[derive(Debug, Clone)]
pub struct TableChange {
    /// The table.
    pub table: TableRef,
    /// How much of it.
    pub extent: Extent,
}

/// How much of a table changed.
#[derive(Debug, Clone)]
pub enum Extent {
    /// Anything may have: the table was created, altered, dropped or cleared, or so many rows
    /// changed that they were not kept.
    Whole,
    /// Just these rows, each once.
    Rows {
        /// The rows, in no particular order.
        rows: Vec<RowChange>,
        /// Key directories above the rows that came or went (composite keys only): proper,
        /// non-empty prefixes of keys.
        dirs: Vec<DirChange>,
    },
}

/// What happened to one row.
#[derive(Debug, Clone)]
pub struct RowChange {
    /// The row's key.
    pub key: Key,
    /// Whether it came, went or changed.
    pub kind: RowKind,
    /// The fields whose value differs; for a row that came or went, those that are not NULL.
    pub fields: FieldSet,
}

/// Whether a row came, went or changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowKind {
    /// It did not exist before.
    Created,
    /// It exists before and after, and at least one field differs.
    Updated,
    /// It no longer exists.
    Deleted,
}

/// A key directory that came or went.
#[derive(Debug, Clone)]
pub struct DirChange {
    /// The leading key values.
    pub prefix: Key,
    /// Whether it exists after the commit.
    pub exists: bool,
}

/// A set of fields of one table, by their position in its schema.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSet(Vec<u64>);

impl FieldSet {
    /// Adds the field at `index`.
    pub fn insert(&mut self, index: usize) {
        let word = index / 64;
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        if let Some(bits) = self.0.get_mut(word) {
            *bits |= 1 << (index % 64);
        }
    }

    /// Whether the field at `index` is in the set.
    pub fn contains(&self, index: usize) -> bool {
        self.0
            .get(index / 64)
            .is_some_and(|bits| bits & (1 << (index % 64)) != 0)
    }

    /// Whether no field is in the set.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|bits| *bits == 0)
    }

    /// The positions, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.0.len() * 64).filter(|i| self.contains(*i))
    }
}

impl FromIterator<usize> for FieldSet {
    fn from_iter<I: IntoIterator<Item = usize>>(indexes: I) -> Self {
        let mut set = FieldSet::default();
        for index in indexes {
            set.insert(index);
        }
        set
    }
}
