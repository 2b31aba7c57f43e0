//! Change capture: what the statements of a batch do to the rows of config tables, net.
//!
//! TEMP triggers call a function of ours for every row that comes or goes (an UPDATE is told as
//! both; REPLACE tells of the rows it replaces, because `recursive_triggers` is on). Nothing here
//! touches the database: the batch asks for the outcome and writes it.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::Connection;
use rusqlite::functions::{Context, FunctionFlags};

use super::image::{difference, present, push_key, push_value, unpack_key};
use super::overflow::{Fate, Fates, Overflow, Stamp};
use super::recorder::{Recorded, Recorder, TableEvent};
use crate::model::{LedgerTime, RowChange, RowKind, Seq, Table, TableRef};

/// More changed rows than this in one table and batch are not kept one by one.
pub(super) const MAX_ROWS: usize = 100_000;
/// Nor are rows whose images take more than this.
pub(super) const MAX_BYTES: usize = 32 << 20;
/// SQLite passes at most 1,000 arguments to a function (SQLITE_MAX_FUNCTION_ARG); three are ours.
const MAX_FIELDS: usize = 990;

const DELETED: i64 = 0;
const INSERTED: i64 = 1;

/// The state shared with the SQL function.
#[derive(Clone)]
pub(super) struct Capture {
    state: Arc<Mutex<State>>,
    /// Part of the names of our function and triggers. It is random, so that no ledger statement
    /// can name them.
    token: Arc<str>,
}

#[derive(Default)]
struct State {
    now: Option<Stamp>,
    tables: Vec<TableCapture>,
    recorder: Recorder,
    max_rows: usize,
    key: Vec<u8>,
    image: Vec<u8>,
}

struct TableCapture {
    table: Arc<Table>,
    /// Whether a row's arguments are its key only.
    wide: bool,
    detail: Detail,
}

enum Detail {
    Rows(Rows),
    Overflow(Overflow),
}

impl Default for Detail {
    fn default() -> Self {
        Detail::Rows(Rows::default())
    }
}

#[derive(Default)]
struct Rows {
    rows: HashMap<Box<[u8]>, RowState>,
    bytes: usize,
}

struct Image {
    rowid: i64,
    bytes: Box<[u8]>,
}

/// A row as it is after the statements so far.
enum Now {
    /// As it was before the batch.
    Same,
    Gone,
    Is(Image),
}

/// One row that a statement of the batch has touched.
struct RowState {
    /// As it was before the batch; `None` if it did not exist.
    old: Option<Image>,
    now: Now,
    /// The entry that last changed it within the batch.
    stamp: Option<Stamp>,
    /// What it was before the last deletion: a REPLACE by the same values restores it.
    undo: Option<(Now, Option<Stamp>)>,
}

/// What a batch did to one table.
pub(super) struct Outcome {
    /// The table.
    pub(super) table: Arc<Table>,
    /// The last entry that changed it; `None` when none did.
    pub(super) last: Option<Stamp>,
    /// The changed rows; `None` when they were too many to keep.
    pub(super) rows: Option<Vec<RowChange>>,
    /// What becomes of the last-change records.
    pub(super) fates: Vec<(i64, Fate)>,
}

impl Capture {
    /// Registers the function on the connection.
    pub(super) fn install(conn: &Connection, token: &str) -> rusqlite::Result<Self> {
        let capture = Capture {
            state: Arc::new(Mutex::new(State {
                max_rows: MAX_ROWS,
                ..State::default()
            })),
            token: token.into(),
        };
        let state = Arc::clone(&capture.state);
        conn.create_scalar_function(
            capture.function().as_str(),
            -1,
            FunctionFlags::SQLITE_UTF8,
            move |ctx| {
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                state.row(ctx);
                Ok(rusqlite::types::Null)
            },
        )?;
        Ok(capture)
    }

    fn function(&self) -> String {
        format!("_ctlfs_{}_row", self.token)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The statements that create the triggers of `table`.
    pub(super) fn triggers(&self, table: &Arc<Table>) -> String {
        let wide = table.schema.fields().len() > MAX_FIELDS;
        let mut state = self.lock();
        let known = state.tables.iter().position(|t| t.table.name == table.name);
        let slot = known.unwrap_or(state.tables.len());
        match state.tables.get_mut(slot) {
            Some(known) => {
                known.table = Arc::clone(table);
                known.wide = wide;
            }
            None => state.tables.push(TableCapture {
                table: Arc::clone(table),
                wide,
                detail: Detail::default(),
            }),
        }
        drop(state);
        let row = |side: &str, op: i64| {
            let mut call = format!("{}({slot},{op},{side}._rowid_", self.function());
            let all = table.schema.fields().iter();
            let key = table.schema.key_fields();
            let mut push = |name: &str| {
                // Writing to a String cannot fail.
                let _ = write!(call, ",{side}.\"{name}\"");
            };
            if wide {
                key.for_each(|field| push(field.name.as_str()));
            } else {
                all.for_each(|field| push(field.name.as_str()));
            }
            call.push(')');
            call
        };
        let (old, new) = (row("OLD", DELETED), row("NEW", INSERTED));
        let name = table.name.sql_name();
        let prefix = self.trigger_prefix();
        format!(
            "CREATE TEMP TRIGGER {prefix}i{slot} AFTER INSERT ON main.{name} BEGIN SELECT {new}; END;\
             CREATE TEMP TRIGGER {prefix}u{slot} AFTER UPDATE ON main.{name} BEGIN SELECT {old}, {new}; END;\
             CREATE TEMP TRIGGER {prefix}d{slot} AFTER DELETE ON main.{name} BEGIN SELECT {old}; END;"
        )
    }

    /// What the names of all our triggers begin with.
    pub(super) fn trigger_prefix(&self) -> String {
        format!("_ctlfs_{}_", self.token)
    }

    /// The entry whose statements come next.
    pub(super) fn set_entry(&self, stamp: Stamp) {
        self.lock().now = Some(stamp);
    }

    /// Forgets everything: the batch is over or rolled back.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        for table in &mut state.tables {
            table.detail = Detail::default();
        }
        state.recorder.reset();
    }

    /// A ledger transaction of several entries begins with this one.
    pub(super) fn begin_transaction(&self, seq: Seq) {
        self.lock().recorder.begin(seq);
    }

    /// A ledger transaction, of several entries or a single one, ends with this one.
    pub(super) fn end_transaction(&self, seq: Seq, time: LedgerTime) {
        self.lock().recorder.end(seq, time);
    }

    /// The entry `seq` did something to a table as a whole.
    pub(super) fn table_event(&self, seq: Seq, table: &TableRef, event: TableEvent) {
        self.lock().recorder.event(seq, table, event);
    }

    /// What the batch leaves to the journal, and forgets it.
    pub(super) fn take_recorded(&self) -> Recorded {
        self.lock().recorder.take()
    }

    /// The net effect on every table that was touched, and forgets it. A table of which only
    /// records remain to be written comes with no rows.
    pub(super) fn take(&self) -> Vec<Outcome> {
        let mut state = self.lock();
        state
            .tables
            .iter_mut()
            .filter_map(TableCapture::take)
            .collect()
    }

    /// As [`Capture::take`], for one table.
    pub(super) fn take_table(&self, sql_name: &str) -> Option<Outcome> {
        let mut state = self.lock();
        let found = state
            .tables
            .iter_mut()
            .find(|t| t.table.name.sql_name() == sql_name);
        found.and_then(TableCapture::take)
    }

    /// Takes the records of tables in overflow once they are many, to be written before the batch
    /// ends.
    pub(super) fn take_overflow(&self) -> Vec<Outcome> {
        let mut state = self.lock();
        let max = 2 * state.max_rows;
        let full = state.tables.iter_mut().filter_map(|t| match &mut t.detail {
            Detail::Overflow(overflow) if overflow.fates.len() > max => Some(Outcome {
                table: Arc::clone(&t.table),
                last: overflow.last,
                rows: None,
                fates: overflow.drain(),
            }),
            _ => None,
        });
        full.collect()
    }

    /// A lower bound than [`MAX_ROWS`].
    #[cfg(test)]
    pub(super) fn set_max_rows(&self, max_rows: usize) {
        self.lock().max_rows = max_rows;
    }
}

impl State {
    /// One call of the function: slot, operation, rowid, fields.
    fn row(&mut self, ctx: &Context<'_>) {
        let int = |i: usize| ctx.get_raw(i).as_i64().unwrap_or(-1);
        let (Some(now), Ok(slot)) = (self.now, usize::try_from(int(0))) else {
            return;
        };
        let Some(table) = self.tables.get_mut(slot) else {
            return;
        };
        let (op, rowid) = (int(1), int(2));
        self.key.clear();
        self.image.clear();
        let mut null_key = false;
        if table.wide {
            for i in 3..ctx.len() {
                null_key |= push_key(&mut self.key, ctx.get_raw(i));
            }
            // Without the fields nothing tells whether a row was replaced by itself.
            self.image.push(u8::from(op == INSERTED));
        } else {
            for index in table.table.schema.key() {
                null_key |= push_key(&mut self.key, ctx.get_raw(index + 3));
            }
            for i in 3..ctx.len() {
                push_value(&mut self.image, ctx.get_raw(i));
            }
        }
        // SQLite lets keys be NULL, and then several rows can have the same.
        let overflow = table.wide || null_key;
        let values = (!overflow).then_some((ctx, 3));
        self.recorder
            .row(now.seq, &table.table, op == INSERTED, &self.key, values);
        table.detail.row(
            op,
            rowid,
            &self.key,
            &self.image,
            now,
            overflow,
            self.max_rows,
        );
    }
}

impl Detail {
    #[allow(clippy::too_many_arguments)]
    fn row(
        &mut self,
        op: i64,
        rowid: i64,
        key: &[u8],
        image: &[u8],
        now: Stamp,
        overflow: bool,
        max_rows: usize,
    ) {
        if let Detail::Rows(rows) = self {
            // Only ever before a row that is new here, so never between the two halves of a
            // REPLACE or UPDATE of one row.
            let full = rows.rows.len() >= max_rows || rows.bytes >= MAX_BYTES;
            if overflow || (full && !rows.rows.contains_key(key)) {
                *self = Detail::Overflow(std::mem::take(rows).into_overflow());
            }
        }
        match self {
            Detail::Rows(rows) if op == DELETED => rows.delete(rowid, key, image, now),
            Detail::Rows(rows) => rows.insert(rowid, key, image, now),
            Detail::Overflow(over) if op == DELETED => over.delete(rowid, key, image, now),
            Detail::Overflow(over) => over.insert(rowid, key, image, now),
        }
    }
}

impl Rows {
    fn delete(&mut self, rowid: i64, key: &[u8], image: &[u8], now: Stamp) {
        if let Some(row) = self.rows.get_mut(key) {
            let before = std::mem::replace(&mut row.now, Now::Gone);
            row.undo = Some((before, row.stamp));
            row.stamp = Some(now);
            return;
        }
        self.bytes += 2 * image.len() + key.len();
        let old = Image {
            rowid,
            bytes: image.into(),
        };
        let row = RowState {
            old: Some(old),
            now: Now::Gone,
            stamp: Some(now),
            undo: Some((Now::Same, None)),
        };
        self.rows.insert(key.into(), row);
    }

    fn insert(&mut self, rowid: i64, key: &[u8], image: &[u8], now: Stamp) {
        let is = || {
            Now::Is(Image {
                rowid,
                bytes: image.into(),
            })
        };
        let Some(row) = self.rows.get_mut(key) else {
            self.bytes += image.len() + key.len();
            let row = RowState {
                old: None,
                now: is(),
                stamp: Some(now),
                undo: None,
            };
            self.rows.insert(key.into(), row);
            return;
        };
        let deleted_at = row.stamp;
        row.stamp = Some(now);
        row.now = match row.undo.take() {
            Some((before, stamp)) if deleted_at == Some(now) => {
                let image_before = match &before {
                    Now::Same => row.old.as_ref(),
                    Now::Gone => None,
                    Now::Is(image) => Some(image),
                };
                match image_before {
                    Some(i) if *i.bytes == *image => {
                        row.stamp = stamp;
                        if i.rowid == rowid { before } else { is() }
                    }
                    _ => is(),
                }
            }
            _ => is(),
        };
    }

    /// The fates of the rows' records, by rowid.
    fn fates(&self) -> Fates {
        let mut fates = Fates::default();
        let gone = self.rows.values().filter_map(|row| match row.now {
            Now::Same => None,
            Now::Gone | Now::Is(_) => row.old.as_ref(),
        });
        for old in gone {
            fates.set(old.rowid, Fate::Gone);
        }
        // A rowid can be freed by one row and taken by another: those that live come last.
        for row in self.rows.values() {
            match (&row.old, &row.now) {
                (Some(old), Now::Is(new)) if old.bytes == new.bytes => {
                    fates.set(new.rowid, Fate::From(old.rowid));
                }
                (_, Now::Is(new)) => {
                    if let Some(stamp) = row.stamp {
                        fates.set(new.rowid, Fate::Changed(stamp));
                    }
                }
                (_, Now::Same | Now::Gone) => {}
            }
        }
        fates
    }

    fn into_overflow(self) -> Overflow {
        Overflow::new(self.fates(), self.last())
    }

    /// The last entry that changed something, also if it was undone again: the journal tells of what
    /// one transaction did and another undid, and where transactions are applied one by one, both
    /// are changes of the table.
    fn last(&self) -> Option<Stamp> {
        self.rows.values().filter_map(|row| row.stamp).max()
    }
}

impl RowState {
    fn change(&self) -> Option<(RowKind, &Image, &Image)> {
        match (&self.old, &self.now) {
            (Some(old), Now::Gone) => Some((RowKind::Deleted, old, old)),
            (None, Now::Is(new)) => Some((RowKind::Created, new, new)),
            (Some(old), Now::Is(new)) if old.bytes != new.bytes => {
                Some((RowKind::Updated, old, new))
            }
            _ => None,
        }
    }
}

impl TableCapture {
    fn take(&mut self) -> Option<Outcome> {
        let table = Arc::clone(&self.table);
        match std::mem::take(&mut self.detail) {
            Detail::Rows(rows) if rows.rows.is_empty() => None,
            Detail::Rows(rows) => {
                let fates = rows.fates().drain();
                let last = rows.last();
                let changes: Vec<_> = rows
                    .rows
                    .iter()
                    .filter_map(|(key, row)| {
                        let (kind, old, new) = row.change()?;
                        Some(RowChange {
                            key: unpack_key(key),
                            kind,
                            fields: match kind {
                                RowKind::Updated => difference(&old.bytes, &new.bytes),
                                RowKind::Created | RowKind::Deleted => present(&new.bytes),
                            },
                        })
                    })
                    .collect();
                Some(Outcome {
                    table,
                    last,
                    rows: Some(changes),
                    fates,
                })
            }
            Detail::Overflow(mut overflow) => Some(Outcome {
                table,
                last: overflow.last,
                rows: None,
                fates: overflow.drain(),
            }),
        }
    }
}
