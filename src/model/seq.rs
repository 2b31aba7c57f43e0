//! Positions in the ledger.

use std::fmt;

/// A sequence number of the ledger. Zero stands before its first entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Seq(u64);

impl Seq {
    /// The position before the first entry.
    pub const ZERO: Seq = Seq(0);

    /// A sequence number from its value.
    pub const fn new(value: u64) -> Self {
        Seq(value)
    }

    /// The number itself.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The number as SQL stores it. Sequences fit: SQL's own columns are signed.
    pub fn to_sql(self) -> i64 {
        i64::try_from(self.0).unwrap_or(i64::MAX)
    }

    /// Reads SQL's value; negative ones, which no ledger hands out, count as zero.
    pub fn from_sql(value: i64) -> Self {
        Seq(u64::try_from(value).unwrap_or(0))
    }

    /// The sequence right behind this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Seq(self.0.saturating_add(1))
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
