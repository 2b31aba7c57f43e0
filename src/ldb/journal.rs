//! The journal: what the last ledger transactions changed, kept in the LDB beside the data and
//! written in the same SQLite transaction as they are.
//!
//! It holds the ready lines of `.ctlfs/changes/FAMILY/TABLE.ndjson`, in *segments*: the lines of one
//! or several transactions, one row of `_ctlfs_changes` for each table in them. Bounded by the
//! number of transactions and by bytes; whole segments go, oldest first. The *floor* is the
//! sequence behind which every transaction is there.

mod line;

use std::collections::VecDeque;

use rusqlite::{Connection, OptionalExtension};

use super::reader::{At, Reader};
use super::recorder::{MAX_BYTES, MAX_TRANSACTIONS, Recorded, Transaction};
use super::writer::set_state;
use crate::model::{Catalog, Seq, Table, TableRef};

/// A segment holds no more transactions than this, and no more bytes unless a single transaction
/// takes more.
const SEGMENT_TRANSACTIONS: usize = 256;
const SEGMENT_BYTES: usize = 1 << 20;

/// What the writer knows of the journal in the file.
#[derive(Debug, Default)]
pub(super) struct Journal {
    /// Oldest first.
    segments: VecDeque<Segment>,
    transactions: usize,
    bytes: usize,
    floor: Seq,
    /// The rowid that is used next.
    next_id: i64,
    /// What the batch that is not committed yet makes of it.
    staged: Option<Staged>,
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    /// Its last rowid.
    id: i64,
    /// The last sequence of its last transaction.
    last: Seq,
    transactions: usize,
    bytes: usize,
}

#[derive(Debug)]
struct Staged {
    /// How many of the old segments go.
    dropped: usize,
    added: Vec<Segment>,
    floor: Seq,
    next_id: i64,
}

/// The lines of some transactions, for each table.
struct Lines {
    tables: Vec<(TableRef, Vec<u8>)>,
    last: Seq,
    transactions: usize,
    bytes: usize,
}

impl Journal {
    /// Reads the journal of an LDB that stands at `position`, inside a transaction. Starts a new one
    /// if there is none, or if the LDB was moved without it.
    pub(super) fn open(conn: &Connection, position: Seq) -> rusqlite::Result<Self> {
        conn.execute_batch(
            "CREATE TABLE IF NOT EXISTS _ctlfs_changes(
                 id INTEGER PRIMARY KEY, name TEXT NOT NULL, last INTEGER NOT NULL,
                 transactions INTEGER NOT NULL, body BLOB NOT NULL);
             CREATE INDEX IF NOT EXISTS _ctlfs_changes_name ON _ctlfs_changes(name);",
        )?;
        let stored = floor(conn)?.filter(|floor| *floor <= position);
        let Some(floor) = stored.filter(|_| is_current(conn, position).unwrap_or(false)) else {
            conn.execute_batch("DELETE FROM _ctlfs_changes")?;
            set_state(conn, "changes_floor", position.to_sql())?;
            set_state(conn, "changes_to", position.to_sql())?;
            return Ok(Journal {
                floor: position,
                next_id: 1,
                ..Journal::default()
            });
        };
        let mut journal = Journal {
            floor,
            next_id: 1,
            ..Journal::default()
        };
        let mut statement = conn.prepare(
            "SELECT max(id), last, max(transactions), sum(length(body)) FROM _ctlfs_changes \
             GROUP BY last ORDER BY 1",
        )?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let segment = Segment {
                id: row.get(0)?,
                last: Seq::from_sql(row.get(1)?),
                transactions: usize::try_from(row.get::<_, i64>(2)?).unwrap_or(0),
                bytes: usize::try_from(row.get::<_, i64>(3)?).unwrap_or(0),
            };
            journal.next_id = segment.id.saturating_add(1);
            journal.add(segment);
        }
        Ok(journal)
    }

    /// Writes what a batch that ends at `to` leaves, inside its transaction.
    pub(super) fn write(
        &mut self,
        conn: &Connection,
        recorded: Recorded,
        to: Seq,
    ) -> rusqlite::Result<()> {
        let (lines, forgotten) = collect(recorded);
        let mut staged = Staged {
            dropped: 0,
            added: Vec::with_capacity(lines.len()),
            floor: self.floor,
            next_id: self.next_id,
        };
        let sum = |of: fn(&Lines) -> usize| lines.iter().map(of).sum::<usize>();
        let mut transactions = self.transactions + sum(|l| l.transactions);
        let mut bytes = self.bytes + sum(|l| l.bytes);
        for old in &self.segments {
            let full = transactions > MAX_TRANSACTIONS || bytes > MAX_BYTES;
            if !full && forgotten.is_none() {
                break;
            }
            transactions -= old.transactions;
            bytes -= old.bytes;
            staged.dropped += 1;
            staged.floor = old.last;
        }
        if let Some(last) = self.segments.get(staged.dropped.wrapping_sub(1)) {
            conn.prepare_cached("DELETE FROM _ctlfs_changes WHERE id <= ?1")?
                .execute([last.id])?;
        }
        staged.floor = forgotten.unwrap_or(staged.floor);
        for lines in lines {
            let mut id = staged.next_id;
            for (table, body) in &lines.tables {
                id = staged.next_id;
                staged.next_id = id.saturating_add(1);
                conn.prepare_cached(
                    "INSERT INTO _ctlfs_changes(id, name, last, transactions, body) \
                     VALUES(?1, ?2, ?3, ?4, ?5)",
                )?
                .execute((
                    id,
                    table.sql_name(),
                    lines.last.to_sql(),
                    i64::try_from(lines.transactions).unwrap_or(i64::MAX),
                    body,
                ))?;
            }
            staged.added.push(Segment {
                id,
                last: lines.last,
                transactions: lines.transactions,
                bytes: lines.bytes,
            });
        }
        if staged.floor != self.floor {
            set_state(conn, "changes_floor", staged.floor.to_sql())?;
        }
        set_state(conn, "changes_to", to.to_sql())?;
        self.staged = Some(staged);
        Ok(())
    }

    /// The batch was committed.
    pub(super) fn committed(&mut self) {
        let Some(staged) = self.staged.take() else {
            return;
        };
        for segment in self.segments.drain(..staged.dropped) {
            self.transactions -= segment.transactions;
            self.bytes -= segment.bytes;
        }
        for segment in staged.added {
            self.add(segment);
        }
        self.floor = staged.floor;
        self.next_id = staged.next_id;
    }

    /// The batch was not.
    pub(super) fn rolled_back(&mut self) {
        self.staged = None;
    }

    fn add(&mut self, segment: Segment) {
        self.transactions += segment.transactions;
        self.bytes += segment.bytes;
        self.segments.push_back(segment);
    }
}

/// The lines of what was recorded, oldest first and no more of them than the journal takes, and the
/// last transaction that is not among them.
fn collect(recorded: Recorded) -> (Vec<Lines>, Option<Seq>) {
    let mut forgotten = recorded.forgotten;
    let mut transactions = Vec::from(recorded.transactions);
    let mut collected = Vec::new();
    let mut bytes = 0usize;
    // The newest first, so that nothing is rendered that does not fit.
    while let Some(last) = transactions.last() {
        let last = last.seq;
        let size = |t: &Transaction| t.size();
        let mut room = SEGMENT_BYTES;
        let count = transactions
            .iter()
            .rev()
            .take(SEGMENT_TRANSACTIONS)
            .take_while(|t| {
                let fits = size(t) <= room;
                room = room.saturating_sub(size(t));
                fits
            })
            .count()
            .max(1);
        let newest = transactions.split_off(transactions.len() - count);
        let lines = render(&newest, last);
        bytes += lines.bytes;
        if bytes > MAX_BYTES && !collected.is_empty() {
            forgotten = Some(last);
            break;
        }
        if !lines.tables.is_empty() {
            collected.push(lines);
        }
    }
    collected.reverse();
    (collected, forgotten)
}

fn render(transactions: &[Transaction], last: Seq) -> Lines {
    let mut lines = Lines {
        tables: Vec::new(),
        last,
        transactions: 0,
        bytes: 0,
    };
    for transaction in transactions {
        let mut any = false;
        for log in &transaction.tables {
            let found = lines.tables.iter().position(|(name, _)| *name == log.table);
            let slot = found.unwrap_or_else(|| {
                lines.tables.push((log.table.clone(), Vec::new()));
                lines.tables.len() - 1
            });
            if let Some((_, body)) = lines.tables.get_mut(slot) {
                any |= line::push(body, transaction, log);
            }
        }
        lines.transactions += usize::from(any);
    }
    lines.tables.retain(|(_, body)| !body.is_empty());
    lines.bytes = lines.tables.iter().map(|(_, body)| body.len()).sum();
    lines
}

/// The stored floor.
fn floor(conn: &Connection) -> rusqlite::Result<Option<Seq>> {
    number(conn, "changes_floor")
}

/// Whether the journal goes up to `position`: not if somebody else has moved the LDB since.
fn is_current(conn: &Connection, position: Seq) -> rusqlite::Result<bool> {
    Ok(number(conn, "changes_to")? == Some(position))
}

fn number(conn: &Connection, name: &str) -> rusqlite::Result<Option<Seq>> {
    let value: Option<Option<i64>> = conn
        .prepare_cached("SELECT CAST(value AS INTEGER) FROM _ctlfs_state WHERE name = ?1")?
        .query_row([name], |row| row.get(0))
        .optional()?;
    Ok(value.flatten().map(Seq::from_sql))
}

impl Reader {
    /// What the last ledger transactions changed in `table`, as newline-delimited JSON: first a line
    /// `{"floor":N}`, then one line for each transaction behind N that changed the table, ascending.
    ///
    /// The floor is where the journal of the whole LDB begins, and rises with changes of other
    /// tables too: a version of this file that was made earlier says the same of this table, with
    /// more history. An LDB without a journal has its position as the floor, and no lines.
    pub fn journal(&mut self, table: &Table) -> rusqlite::Result<At<Vec<u8>>> {
        self.snapshot(|reader, position| {
            let conn = &reader.connection;
            let kept = reader.has_table("_ctlfs_changes")? && is_current(conn, position)?;
            let floor = if kept { floor(conn)? } else { None };
            let mut bytes = format!("{{\"floor\":{}}}\n", floor.unwrap_or(position)).into_bytes();
            if floor.is_some() {
                let mut statement = conn.prepare_cached(
                    "SELECT body FROM _ctlfs_changes WHERE name = ?1 ORDER BY id",
                )?;
                let mut rows = statement.query([table.name.sql_name()])?;
                while let Some(row) = rows.next()? {
                    bytes.extend_from_slice(row.get_ref(0)?.as_blob()?);
                }
            }
            Ok(bytes)
        })
    }

    /// The tables, and whether the journal tells something behind `from` of one that is not there
    /// any more.
    pub fn tables_since(&mut self, from: Seq) -> rusqlite::Result<At<(Catalog, bool)>> {
        self.snapshot(|reader, _| {
            let catalog = super::catalog::load(&reader.connection)?;
            if !reader.has_table("_ctlfs_changes")? {
                return Ok((catalog, false));
            }
            let mut statement = reader
                .connection
                .prepare_cached("SELECT DISTINCT name FROM _ctlfs_changes WHERE last > ?1")?;
            let mut names = statement.query([from.to_sql()])?;
            while let Some(row) = names.next()? {
                let name = TableRef::from_sql_name(row.get_ref(0)?.as_str()?);
                if name.is_none_or(|name| catalog.get(&name).is_none()) {
                    return Ok((catalog, true));
                }
            }
            Ok((catalog, false))
        })
    }
}
