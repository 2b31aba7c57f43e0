//! A batch: ledger entries applied in one SQLite transaction, whole ledger transactions only.
//!
//! After an entry has failed the batch can only be rolled back; whoever drives it applies the
//! entries before the failing ledger transaction again. That keeps SQLite and change capture from
//! ever having to take back a part of a transaction.

use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::fallible_iterator::FallibleIterator;
use rusqlite::{Connection, params_from_iter};

use super::authorizer::{Notes, Reshape, may_read};
use super::capture::Outcome;
use super::overflow::{Fate, Stamp};
use super::recorder::TableEvent;
use super::reshape::{self, Shape};
use super::verdict::{judge, refused};
use super::writer::{LdbWriter, Position, set_state, statement_digest};
use super::{LdbError, canonical, dirs, rows_table, sidecar};
use crate::ledger::{BEGIN_MARKER, COMMIT_MARKER, Entry};
use crate::model::{Catalog, ChangeSet, Extent, LedgerTime, Seq, TableChange, TableRef};

/// A WAL beyond this is written back even if that has to wait for readers.
const MAX_WAL: u64 = 64 << 20;
/// At most so many tables have triggers at once: SQLite walks over all of them for each statement.
const MAX_ARMED: usize = 64;

/// Why an entry could not be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// The statement is refused, or fails. It will fail again until something changes.
    #[error("{0}")]
    Statement(String),
    /// The ledger's order or markers make no sense.
    #[error("{0}")]
    Order(String),
    /// The writer was told to stop.
    #[error("stopped")]
    Stopped,
    /// The LDB cannot be written.
    #[error(transparent)]
    Ldb(#[from] LdbError),
}

/// One SQLite transaction that entries are applied in. Dropped without a commit it leaves nothing.
pub struct Batch<'w> {
    writer: &'w mut LdbWriter,
    catalog_before: Arc<Catalog>,
    from: Seq,
    last: Option<(Seq, LedgerTime)>,
    last_statement: String,
    /// The `--- BEGIN` whose `--- COMMIT` has not come yet.
    open: Option<Seq>,
    /// Tables whose shape changed.
    whole: BTreeMap<TableRef, Stamp>,
    gaps: Vec<(Seq, Seq)>,
    broken: bool,
    finished: Option<Position>,
}

impl<'w> Batch<'w> {
    pub(super) fn begin(writer: &'w mut LdbWriter) -> Result<Self, LdbError> {
        if writer.in_batch {
            // Left over from a batch that could not be taken back.
            let taken = writer.take_back();
            taken.map_err(|e| LdbError::from_sqlite(&writer.path, "write", &e))?;
        }
        let error = |e| LdbError::from_sqlite(&writer.path, "write", &e);
        if writer.guard.armed() > MAX_ARMED {
            writer.disarm().map_err(error)?;
        }
        writer
            .conn
            .prepare_cached("BEGIN IMMEDIATE")
            .and_then(|mut s| s.execute([]))
            .map_err(error)?;
        writer.in_batch = true;
        let found = match writer.stored_seq() {
            Ok(found) => found,
            Err(e) => {
                let _ = writer.take_back();
                return Err(LdbError::from_sqlite(&writer.path, "write", &e));
            }
        };
        if found != writer.position.seq {
            let _ = writer.take_back();
            return Err(LdbError::Moved {
                path: writer.path.clone(),
                expected: writer.position.seq,
                found,
            });
        }
        Ok(Batch {
            catalog_before: Arc::clone(&writer.catalog),
            from: writer.position.seq,
            writer,
            last: None,
            last_statement: String::new(),
            open: None,
            whole: BTreeMap::new(),
            gaps: Vec::new(),
            broken: false,
            finished: None,
        })
    }

    /// The `--- BEGIN` that is still without its end.
    pub fn open_transaction(&self) -> Option<Seq> {
        self.open
    }

    /// Applies one entry. After an error the batch can only be rolled back.
    pub fn apply(&mut self, entry: &Entry) -> Result<(), ApplyError> {
        let result = self.try_apply(entry);
        self.broken |= result.is_err();
        result
    }

    fn try_apply(&mut self, entry: &Entry) -> Result<(), ApplyError> {
        let last = self.last.map_or(self.from, |(seq, _)| seq);
        if self.broken || self.finished.is_some() || entry.seq <= last {
            return Err(ApplyError::Order(format!(
                "entry {} cannot follow entry {last}",
                entry.seq
            )));
        }
        match entry.statement.trim() {
            BEGIN_MARKER => {
                if let Some(open) = self.open {
                    return Err(ApplyError::Order(format!(
                        "a transaction begins at entry {} within the one that began at {open}",
                        entry.seq
                    )));
                }
                self.open = Some(entry.seq);
                self.writer.capture.begin_transaction(entry.seq);
            }
            COMMIT_MARKER => {
                if self.open.take().is_none() {
                    return Err(ApplyError::Order(format!(
                        "a transaction ends at entry {} that did not begin: \
                         entry {last} before it is outside of one",
                        entry.seq
                    )));
                }
            }
            _ => self.execute(entry)?,
        }
        if self.open.is_none() {
            self.writer.capture.end_transaction(entry.seq, entry.time);
        }
        // Before the first entry of all there is nothing to miss.
        if last != Seq::ZERO && entry.seq > last.next() {
            let before = Seq::new(entry.seq.get().saturating_sub(1));
            self.gaps.push((last.next(), before));
        }
        self.last = Some((entry.seq, entry.time));
        self.last_statement.clear();
        self.last_statement.push_str(&entry.statement);
        Ok(())
    }

    fn execute(&mut self, entry: &Entry) -> Result<(), ApplyError> {
        if entry.statement.contains('\0') {
            // SQLite would take what comes before for the whole statement.
            return Err(ApplyError::Statement(
                "the statement contains a NUL byte".into(),
            ));
        }
        let stamp = Stamp {
            seq: entry.seq,
            time: entry.time,
        };
        self.writer.capture.set_entry(stamp);
        self.writer.guard.enter(self.writer.statement_limit);
        let result = match self.writer.run_canonical(&entry.statement) {
            Some(result) => result,
            None => self.run(&entry.statement, stamp),
        };
        self.writer.guard.leave();
        result?;
        if let Some(table) = cleared(&entry.statement) {
            let capture = &self.writer.capture;
            capture.table_event(entry.seq, &table, TableEvent::Cleared);
        }
        for over in self.writer.capture.take_overflow() {
            write_fates(&self.writer.conn, &over.table.name.sql_name(), over.fates)
                .map_err(|e| self.ldb_error(&e))?;
        }
        Ok(())
    }

    /// Runs the statements of one entry, whatever they are.
    fn run(&mut self, sql: &str, stamp: Stamp) -> Result<(), ApplyError> {
        let writer = &mut *self.writer;
        let guard = &writer.guard;
        let limit = writer.statement_limit;
        let judge = |error: &rusqlite::Error| judge(error, guard, &writer.path, limit);
        let own = |error: &rusqlite::Error| {
            ApplyError::Ldb(LdbError::from_sqlite(&writer.path, "write", error))
        };
        let mut statements = rusqlite::Batch::new(&writer.conn, sql);
        while let Some(mut statement) = statements.next().map_err(|e| judge(&e))? {
            let mut shape = None;
            if !guard.is_plain() {
                // SQLite compiles the statement anew when it runs, because the triggers that we
                // create or drop here change the schema.
                let mut notes = guard.take_notes();
                guard.leave();
                for name in &notes.unknown {
                    if !may_read(&writer.conn, name).map_err(|e| own(&e))? {
                        return Err(refused(&format!("read the table {name}")));
                    }
                }
                if notes.reshapes == Some(Reshape::Create) {
                    // A table that is there already stays as it is.
                    notes.reshaped.clear();
                }
                if notes.reshapes.is_some() {
                    writer.disarm().map_err(|e| own(&e))?;
                    for name in &notes.reshaped {
                        if let Some(outcome) = writer.capture.take_table(name) {
                            write_fates(&writer.conn, name, outcome.fates).map_err(|e| own(&e))?;
                        }
                    }
                    shape = Some((Shape::of(&writer.conn).map_err(|e| own(&e))?, notes));
                } else {
                    writer.arm(&notes).map_err(|e| own(&e))?;
                }
                guard.enter(limit);
            }
            let mut rows = statement.raw_query();
            while rows.next().map_err(|e| judge(&e))?.is_some() {}
            drop(rows);
            drop(statement);
            // Those of having compiled it anew.
            let _ = guard.take_notes();
            if let Some((before, notes)) = shape {
                guard.leave();
                let changed = reshape::follow(&writer.conn, &before, &notes.reshaped)
                    .map_err(|e| own(&e))?
                    .map_err(ApplyError::Statement)?;
                let catalog =
                    super::catalog::load_warning_of(&writer.conn, |t| changed.contains(t));
                let before =
                    mem::replace(&mut writer.catalog, Arc::new(catalog.map_err(|e| own(&e))?));
                for table in &changed {
                    let now = (
                        before.get(table).is_some(),
                        writer.catalog.get(table).is_some(),
                    );
                    let event = match now {
                        (false, false) => continue,
                        (false, true) => TableEvent::Created,
                        (true, true) => TableEvent::Altered,
                        (true, false) => TableEvent::Dropped,
                    };
                    writer.capture.table_event(stamp.seq, table, event);
                }
                self.whole.extend(changed.into_iter().map(|t| (t, stamp)));
                guard.enter(limit);
            }
        }
        Ok(())
    }

    /// Writes what belongs to the data (last changes, the position) and tells what the commit will
    /// change. `None` when there is nothing to commit.
    pub fn finish(&mut self) -> Result<Option<ChangeSet>, LdbError> {
        let Some((seq, time)) = self.last else {
            return Ok(None);
        };
        let position = Position {
            seq,
            digest: Some(statement_digest(&self.last_statement)),
            time: Some(time),
        };
        let tables = self.write_changes().map_err(|e| self.ldb_error(&e))?;
        let gaps = mem::take(&mut self.gaps);
        let reshaped = self.writer.catalog != self.catalog_before;
        let mut write = || -> rusqlite::Result<()> {
            if reshaped {
                set_state(&self.writer.conn, "schema_time", time.micros())?;
            }
            self.writer.store_position(&position, &gaps)?;
            let recorded = self.writer.capture.take_recorded();
            self.writer.journal.write(&self.writer.conn, recorded, seq)
        };
        write().map_err(|e| self.ldb_error(&e))?;
        self.finished = Some(position);
        Ok(Some(ChangeSet {
            from: self.from,
            to: seq,
            time,
            tables,
            catalog: reshaped.then(|| Arc::clone(&self.writer.catalog)),
        }))
    }

    fn write_changes(&mut self) -> rusqlite::Result<Vec<TableChange>> {
        let conn = &self.writer.conn;
        let mut changes = Vec::new();
        for Outcome {
            table,
            last,
            rows,
            fates,
        } in self.writer.capture.take()
        {
            write_fates(conn, &table.name.sql_name(), fates)?;
            let Some(last) = last else { continue };
            if let Some(stamp) = self.whole.get_mut(&table.name) {
                *stamp = last.max(*stamp);
                continue;
            }
            write_table(conn, &table.name, last)?;
            let extent = match rows {
                Some(rows) => Extent::Rows {
                    dirs: dirs::changed(conn, &table, &rows)?,
                    rows,
                },
                None => Extent::Whole,
            };
            changes.push(TableChange {
                table: table.name.clone(),
                extent,
            });
        }
        if !self.whole.is_empty() {
            let present = super::catalog::config_tables(conn)?;
            for (table, stamp) in &self.whole {
                if present.contains(table) {
                    write_table(conn, table, *stamp)?;
                }
                changes.push(TableChange {
                    table: table.clone(),
                    extent: Extent::Whole,
                });
            }
        }
        Ok(changes)
    }

    /// Makes the batch visible. [`Batch::finish`] must have been called, and no ledger transaction
    /// may be open. After an error the LDB is as it was before the batch.
    pub fn commit(mut self) -> Result<(), LdbError> {
        let position = match self.finished.take() {
            Some(position) if self.open.is_none() && !self.broken => position,
            _ => {
                return Err(LdbError::Io {
                    path: self.writer.path.clone(),
                    action: "write",
                    reason: "the batch is incomplete".into(),
                });
            }
        };
        let committed = self
            .writer
            .conn
            .prepare_cached("COMMIT")
            .and_then(|mut s| s.execute([]));
        if let Err(e) = committed {
            return Err(self.ldb_error(&e));
        }
        self.writer.in_batch = false;
        self.writer.position = position;
        self.writer.capture.reset();
        self.writer.journal.committed();
        self.catalog_before = Arc::clone(&self.writer.catalog);
        self.writer.bound_wal();
        Ok(())
    }

    /// Leaves the LDB as it was before the batch.
    pub fn rollback(self) {}

    fn ldb_error(&self, error: &rusqlite::Error) -> LdbError {
        LdbError::from_sqlite(&self.writer.path, "write", error)
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        if self.writer.in_batch {
            // If it fails the next batch tries again before it begins.
            let _ = self.writer.take_back();
        }
        self.writer.catalog = Arc::clone(&self.catalog_before);
    }
}

impl LdbWriter {
    /// Runs a canonical text without compiling it anew. `None` if this is none, or nothing like it
    /// ran before: then the general way is to be taken, which finds what is wrong as well.
    pub(super) fn run_canonical(&self, text: &str) -> Option<Result<(), ApplyError>> {
        let canonical = canonical::parse(text)?;
        // Only the general way makes sure that changes are captured.
        if !self.guard.is_armed(canonical.table) {
            return None;
        }
        // When triggers or tables have changed since, SQLite compiles it anew as it runs, under
        // the guard's eyes.
        let statement = self.conn.prepare_cached(&canonical.sql);
        let mut statement = match statement {
            Ok(statement) if self.guard.is_plain() => statement,
            _ => {
                let _ = self.guard.take_notes();
                return None;
            }
        };
        let done = statement.execute(params_from_iter(&canonical.values));
        Some(match done {
            Ok(_) => Ok(()),
            Err(e) => Err(judge(&e, &self.guard, &self.path, self.statement_limit)),
        })
    }

    /// Creates the triggers of the tables that a statement is about to write.
    fn arm(&self, notes: &Notes) -> rusqlite::Result<()> {
        for name in &notes.unarmed {
            let table = TableRef::from_sql_name(name).and_then(|t| self.catalog.get(&t).cloned());
            // A table that cannot be shown is not captured.
            if let Some(table) = table {
                self.conn.execute_batch(&self.capture.triggers(&table))?;
            }
            self.guard.arm(name.clone());
        }
        Ok(())
    }

    /// Takes back a batch that was not committed, with all that is kept beside the database.
    ///
    /// SQLite may have rolled back on its own already: at a full disk, when it was interrupted, at
    /// a COMMIT that failed, for `INSERT OR ROLLBACK`. That took away the triggers of this batch,
    /// so nothing counts as captured from here on.
    fn take_back(&mut self) -> rusqlite::Result<()> {
        self.capture.reset();
        self.journal.rolled_back();
        let _ = self.guard.take_notes();
        if !self.conn.is_autocommit() {
            self.conn.execute_batch("ROLLBACK")?;
        }
        self.disarm()?;
        self.in_batch = false;
        Ok(())
    }

    /// Drops all our triggers.
    fn disarm(&self) -> rusqlite::Result<()> {
        self.guard.disarm_all();
        let names: Vec<String> = self
            .conn
            .prepare("SELECT name FROM temp.sqlite_schema WHERE type = 'trigger'")?
            .query_map([], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        for name in names {
            self.conn
                .execute_batch(&format!("DROP TRIGGER temp.\"{name}\""))?;
        }
        Ok(())
    }

    /// SQLite writes the WAL back by itself after a commit, as far as readers allow. Readers that
    /// never pause would let it grow, so beyond a bound we wait for them for a moment: but not for
    /// those who hold it back on purpose, who are bounded by other means and stay.
    fn bound_wal(&self) {
        if self.wal_holds.any() {
            return;
        }
        let wal = sidecar(&self.path, "-wal");
        if std::fs::metadata(wal).is_ok_and(|m| m.len() > MAX_WAL) {
            let _ = self.conn.busy_timeout(Duration::from_millis(200));
            let _ = self
                .conn
                .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
            let _ = self.conn.busy_timeout(Duration::from_secs(5));
        }
    }
}

/// The table that a statement clears, as ctlstore writes it: `DELETE FROM family___table`.
fn cleared(statement: &str) -> Option<TableRef> {
    let name = statement.trim().strip_prefix("DELETE FROM ")?;
    TableRef::from_sql_name(name.trim_end_matches(';').trim())
}

/// Writes what becomes of the last-change records of one table.
fn write_fates(
    conn: &Connection,
    sql_name: &str,
    mut fates: Vec<(i64, Fate)>,
) -> rusqlite::Result<()> {
    if fates.is_empty() {
        return Ok(());
    }
    let table = rows_table(sql_name);
    let mut read =
        conn.prepare_cached(&format!("SELECT seq, time FROM \"{table}\" WHERE id = ?1"))?;
    for (_, fate) in &mut fates {
        if let Fate::From(origin) = *fate {
            let found = read.query_row([origin], |row| {
                Ok(Stamp {
                    seq: Seq::from_sql(row.get(0)?),
                    time: LedgerTime::from_micros(row.get(1)?),
                })
            });
            *fate = match found {
                Ok(stamp) => Fate::Changed(stamp),
                // Without a record the row came with a snapshot, and still does.
                Err(rusqlite::Error::QueryReturnedNoRows) => Fate::Gone,
                Err(e) => return Err(e),
            };
        }
    }
    let mut delete = conn.prepare_cached(&format!("DELETE FROM \"{table}\" WHERE id = ?1"))?;
    for (rowid, fate) in &fates {
        if *fate == Fate::Gone {
            delete.execute([rowid])?;
        }
    }
    let mut write = conn.prepare_cached(&format!(
        "INSERT OR REPLACE INTO \"{table}\"(id, seq, time) VALUES(?1, ?2, ?3)"
    ))?;
    for (rowid, fate) in &fates {
        if let Fate::Changed(stamp) = fate {
            write.execute((rowid, stamp.seq.to_sql(), stamp.time.micros()))?;
        }
    }
    Ok(())
}

fn write_table(conn: &Connection, table: &TableRef, last: Stamp) -> rusqlite::Result<()> {
    conn.prepare_cached(
        "INSERT OR REPLACE INTO _ctlfs_tables(name, seq, time) VALUES(?1, ?2, ?3)",
    )?
    .execute((table.sql_name(), last.seq.to_sql(), last.time.micros()))?;
    Ok(())
}
