//! What the journal takes down while entries are applied: for every ledger transaction the rows it
//! touches, as they were and as they are. Only in memory, and no more than the journal would keep;
//! the batch writes it with the data.
//!
//! Taking down is a copy of the row's bytes. What a transaction did to a row in the end is worked
//! out later, and only for transactions that are kept.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use rusqlite::functions::Context;

use super::image::push_full;
use crate::model::{LedgerTime, Seq, Table, TableRef};

/// The journal keeps no more transactions than this, and no more bytes.
pub(super) const MAX_TRANSACTIONS: usize = 4_096;
pub(super) const MAX_BYTES: usize = 16 << 20;
/// Whoever follows misses something when one commit has more than that. Then there is no use in
/// filling the journal, which would slow down the replay of a long ledger: this much is kept.
pub(super) const REST_TRANSACTIONS: usize = 256;
const REST_BYTES: usize = 1 << 20;
/// Of a transaction that changes more rows of a table than this only their number is kept.
pub(super) const MAX_ROWS: usize = 1_000;
/// Long values of one transaction are kept up to so many bytes in all; what does not fit is kept
/// as its length.
const MAX_LONG: usize = 1 << 20;
/// Nor are the rows of a table kept with which a transaction takes more than this.
const MAX_TRANSACTION: usize = 5 << 20;

/// What happened to a table as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TableEvent {
    /// It was not there before.
    Created,
    /// Its shape changed, or it was dropped and created anew.
    Altered,
    /// It is gone.
    Dropped,
    /// All its rows were deleted by one statement.
    Cleared,
}

impl TableEvent {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            TableEvent::Created => "created",
            TableEvent::Altered => "altered",
            TableEvent::Dropped => "dropped",
            TableEvent::Cleared => "cleared",
        }
    }
}

/// One ledger transaction.
pub(super) struct Transaction {
    /// Its first entry.
    pub(super) begin: Seq,
    /// Its last entry.
    pub(super) seq: Seq,
    /// The time of that.
    pub(super) time: LedgerTime,
    /// The tables it touched, in the order in which it did.
    pub(super) tables: Vec<TableLog>,
    /// How many bytes of long values may still be kept.
    room: usize,
    /// How many bytes its records take.
    bytes: usize,
}

/// What one ledger transaction did to one table.
pub(super) struct TableLog {
    pub(super) table: TableRef,
    pub(super) events: Vec<TableEvent>,
    /// How many rows it touched, more or less: a row that is touched again later counts again.
    pub(super) rows: usize,
    pub(super) detail: Detail,
    /// The key of the last row, if that one went.
    gone: Option<Vec<u8>>,
}

pub(super) enum Detail {
    /// Every row that came or went.
    Rows(Arc<Table>, Records),
    /// Just the number.
    Count,
}

/// Rows as they came and went, one after the other.
pub(super) struct Records(Vec<u8>);

/// A row that came or went.
pub(super) struct Record<'a> {
    pub(super) came: bool,
    pub(super) key: &'a [u8],
    pub(super) image: &'a [u8],
}

/// What a transaction did to a row in the end.
pub(super) struct Net<'a> {
    pub(super) key: &'a [u8],
    /// As it was; `None` if it did not exist.
    pub(super) old: Option<&'a [u8]>,
    /// As it is.
    pub(super) new: Option<&'a [u8]>,
}

/// The transactions of a batch so far.
#[derive(Default)]
pub(super) struct Recorder {
    done: VecDeque<Transaction>,
    bytes: usize,
    open: Option<Transaction>,
    /// The last transaction that was let go, if there were more than the journal keeps.
    forgotten: Option<Seq>,
    /// Buffers to use again.
    spare: Vec<Vec<u8>>,
}

/// What a batch leaves to the journal.
#[derive(Default)]
pub(super) struct Recorded {
    /// The transactions that are kept, oldest first.
    pub(super) transactions: VecDeque<Transaction>,
    /// The last one before them, if there were more.
    pub(super) forgotten: Option<Seq>,
}

impl Recorder {
    /// A ledger transaction begins with this entry. Without this call the first row does.
    pub(super) fn begin(&mut self, seq: Seq) {
        self.open = Some(Transaction::new(seq));
    }

    /// It ends with this one.
    pub(super) fn end(&mut self, seq: Seq, time: LedgerTime) {
        let Some(mut transaction) = self.open.take() else {
            return;
        };
        if transaction.tables.is_empty() {
            return;
        }
        transaction.seq = seq;
        transaction.time = time;
        self.bytes = self.bytes.saturating_add(transaction.size());
        self.done.push_back(transaction);
        let full = self.done.len() > MAX_TRANSACTIONS || self.bytes > MAX_BYTES;
        if !full && self.forgotten.is_none() {
            return;
        }
        while self.done.len() > REST_TRANSACTIONS || self.bytes > REST_BYTES {
            if self.done.len() == 1 {
                break;
            }
            let Some(oldest) = self.done.pop_front() else {
                break;
            };
            self.bytes = self.bytes.saturating_sub(oldest.size());
            self.forgotten = Some(oldest.seq);
            self.spare.extend(oldest.into_buffers());
        }
    }

    /// Takes everything.
    pub(super) fn take(&mut self) -> Recorded {
        self.spare.clear();
        self.bytes = 0;
        Recorded {
            transactions: std::mem::take(&mut self.done),
            forgotten: self.forgotten.take(),
        }
    }

    /// Forgets everything.
    pub(super) fn reset(&mut self) {
        *self = Recorder::default();
    }

    /// Something happened to a table as a whole, in the transaction of the entry `seq`.
    pub(super) fn event(&mut self, seq: Seq, table: &TableRef, event: TableEvent) {
        let transaction = self.open.get_or_insert_with(|| Transaction::new(seq));
        let found = transaction
            .tables
            .iter()
            .position(|log| log.table == *table);
        match (found, event) {
            // It was empty before.
            (None, TableEvent::Cleared) => return,
            (None, _) => transaction
                .tables
                .push(TableLog::new(table.clone(), Detail::Count)),
            (Some(_), _) => {}
        }
        let slot = found.unwrap_or(transaction.tables.len().saturating_sub(1));
        if let Some(log) = transaction.tables.get_mut(slot) {
            log.events.push(event);
            if event != TableEvent::Cleared {
                // Rows before and after have different shapes.
                log.detail = Detail::Count;
            }
        }
    }

    /// A row of `table` came or went in the entry `seq`. Its values are the arguments from
    /// `first` on; without them (`None`), or without a key of its own, it is only counted.
    pub(super) fn row(
        &mut self,
        seq: Seq,
        table: &Arc<Table>,
        came: bool,
        key: &[u8],
        values: Option<(&Context<'_>, usize)>,
    ) {
        let transaction = self.open.get_or_insert_with(|| Transaction::new(seq));
        let found = transaction
            .tables
            .iter_mut()
            .position(|log| log.table == table.name);
        let slot = found.unwrap_or_else(|| {
            let mut bytes = self.spare.pop().unwrap_or_default();
            bytes.clear();
            let rows = Detail::Rows(Arc::clone(table), Records(bytes));
            let log = TableLog::new(table.name.clone(), rows);
            transaction.tables.push(log);
            transaction.tables.len() - 1
        });
        let Some(log) = transaction.tables.get_mut(slot) else {
            return;
        };
        // A row that goes and comes back at once was replaced, or updated.
        let again = came && log.gone.take().is_some_and(|gone| gone == key);
        log.rows += usize::from(!again);
        if !came {
            log.gone = Some(key.to_vec());
        }
        let Detail::Rows(_, records) = &mut log.detail else {
            return;
        };
        let before = records.0.len();
        let kept = match values {
            Some((ctx, first)) if log.rows <= MAX_ROWS => records.push(came, key, |bytes| {
                for i in first..ctx.len() {
                    push_full(bytes, ctx.get_raw(i), &mut transaction.room);
                }
            }),
            _ => false,
        };
        transaction.bytes += records.0.len() - before;
        if !kept || transaction.bytes > MAX_TRANSACTION {
            log.detail = Detail::Count;
        }
    }
}

impl TableLog {
    fn new(table: TableRef, detail: Detail) -> Self {
        TableLog {
            table,
            events: Vec::new(),
            rows: 0,
            detail,
            gone: None,
        }
    }
}

impl Transaction {
    fn new(begin: Seq) -> Self {
        Transaction {
            begin,
            seq: begin,
            time: LedgerTime::default(),
            tables: Vec::with_capacity(1),
            room: MAX_LONG,
            bytes: 0,
        }
    }

    /// About how many bytes it takes.
    pub(super) fn size(&self) -> usize {
        let size = |log: &TableLog| match &log.detail {
            Detail::Rows(_, records) => records.0.len() + 128,
            Detail::Count => 128,
        };
        self.tables.iter().map(size).sum()
    }

    fn into_buffers(self) -> impl Iterator<Item = Vec<u8>> {
        self.tables.into_iter().filter_map(|log| match log.detail {
            Detail::Rows(_, records) => Some(records.0),
            Detail::Count => None,
        })
    }
}

/// The lengths of a record's key and image come before them, in four bytes each.
const HEAD: usize = 9;

impl Records {
    /// Appends a record. False, with nothing to be used afterwards, if it is too long for one.
    fn push(&mut self, came: bool, key: &[u8], image: impl FnOnce(&mut Vec<u8>)) -> bool {
        let bytes = &mut self.0;
        let start = bytes.len();
        bytes.extend_from_slice(&[0; HEAD]);
        bytes.extend_from_slice(key);
        let middle = bytes.len();
        image(bytes);
        let lengths = (
            u32::try_from(key.len()),
            u32::try_from(bytes.len() - middle),
        );
        let (Ok(key), Ok(image)) = lengths else {
            return false;
        };
        let [k0, k1, k2, k3] = key.to_le_bytes();
        let [i0, i1, i2, i3] = image.to_le_bytes();
        let head: [u8; HEAD] = [u8::from(came), k0, k1, k2, k3, i0, i1, i2, i3];
        if let Some(room) = bytes.get_mut(start..start + HEAD) {
            room.copy_from_slice(&head);
        }
        true
    }

    fn iter(&self) -> impl Iterator<Item = Record<'_>> {
        let mut rest = &*self.0;
        std::iter::from_fn(move || {
            let (head, tail) = rest.split_at_checked(HEAD)?;
            let length = |range: std::ops::Range<usize>| {
                let bytes: [u8; 4] = head.get(range)?.try_into().ok()?;
                usize::try_from(u32::from_le_bytes(bytes)).ok()
            };
            let (key, tail) = tail.split_at_checked(length(1..5)?)?;
            let (image, tail) = tail.split_at_checked(length(5..9)?)?;
            rest = tail;
            Some(Record {
                came: head.first() == Some(&1),
                key,
                image,
            })
        })
    }

    /// What became of each row, in the order in which they were first touched. A row may have
    /// become what it was.
    pub(super) fn net(&self) -> Vec<Net<'_>> {
        // Up to here walking over the rows is faster than hashing their keys.
        const FEW: usize = 8;
        let mut rows: Vec<Net<'_>> = Vec::new();
        let mut index: HashMap<&[u8], usize> = HashMap::new();
        for record in self.iter() {
            let known = if rows.len() <= FEW {
                rows.iter().position(|row| row.key == record.key)
            } else {
                if index.is_empty() {
                    index.extend(rows.iter().enumerate().map(|(i, row)| (row.key, i)));
                }
                index.get(record.key).copied()
            };
            let new = record.came.then_some(record.image);
            match known.and_then(|at| rows.get_mut(at)) {
                Some(row) => row.new = new,
                None => {
                    if !index.is_empty() {
                        index.insert(record.key, rows.len());
                    }
                    rows.push(Net {
                        key: record.key,
                        old: (!record.came).then_some(record.image),
                        new,
                    });
                }
            }
        }
        rows
    }
}
