//! Reading the LDB: single rows, existence, pages of keys and the marks of who changed what last.
//!
//! Every answer says at which ledger position it was read ([`At`]), taken in the same snapshot, so
//! that the caller can tell an answer from before a commit from one after it. A reader never
//! writes and never waits for the writer: in WAL mode each of its statements sees the last commit.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use rusqlite::config::DbConfig;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, OptionalExtension, params_from_iter};

use super::{LdbError, catalog};
use crate::model::{Catalog, Field, LedgerTime, Seq, Table, TableRef, Value};
use crate::sqlite::{Bound, value_of};

/// How many prepared statements a reader keeps: a few for each of the tables in use.
const STATEMENT_CACHE: usize = 256;
/// SQLite's page cache for each reader, in KiB: the inner pages of the tables in use.
const PAGE_CACHE_KIB: i64 = 2048;
/// After so many equal leading key values a listing seeks instead of stepping on.
const STEPS_BEFORE_SEEK: usize = 32;

/// Something read, with the ledger position of the snapshot it was read from.
#[derive(Debug, Clone)]
pub struct At<T> {
    /// The position.
    pub seq: Seq,
    /// What was read.
    pub value: T,
}

/// The ledger entry that last changed something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mark {
    /// Its sequence.
    pub seq: Seq,
    /// Its time.
    pub time: LedgerTime,
}

/// A row, with the entry that last changed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The values, in the schema's order.
    pub values: Vec<Value>,
    /// The entry that last changed it; for a row that came with a snapshot, the snapshot's.
    pub mark: Mark,
}

/// The SQL of one table in one shape.
struct TableSql {
    table: Arc<Table>,
    row: String,
}

/// A connection that reads an LDB.
pub struct Reader {
    pub(super) connection: Connection,
    sql: HashMap<TableRef, TableSql>,
    /// Whether a read transaction is kept open.
    held: bool,
}

impl Reader {
    /// Opens the LDB at `path` for reading. Changes nothing but SQLite's own shared memory.
    pub fn open(path: &Path) -> Result<Self, LdbError> {
        Self::connect(path).map_err(|error| LdbError::from_sqlite(path, "open", &error))
    }

    fn connect(path: &Path) -> rusqlite::Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        connection.set_prepared_statement_cache_capacity(STATEMENT_CACHE);
        // SQLite is built with STAT4: without this it compiles a statement anew whenever a
        // parameter is bound, in case the value would make for another plan.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
        connection.pragma_update(None, "cache_size", -PAGE_CACHE_KIB)?;
        connection.pragma_update(None, "query_only", true)?;
        Ok(Reader {
            connection,
            sql: HashMap::new(),
            held: false,
        })
    }

    /// The tables, with the LDB's position.
    pub fn catalog(&mut self) -> rusqlite::Result<At<Catalog>> {
        self.snapshot(|reader, _| catalog::load(&reader.connection))
    }

    /// The LDB's position.
    pub fn position(&mut self) -> rusqlite::Result<Seq> {
        Ok(self.snapshot(|_, _| Ok(()))?.seq)
    }

    /// A number that changes whenever a table is created, altered or dropped.
    pub fn schema_version(&mut self) -> rusqlite::Result<i64> {
        self.connection
            .query_row("PRAGMA schema_version", [], |row| row.get(0))
    }

    /// A number that changes whenever another connection commits.
    pub fn data_version(&mut self) -> rusqlite::Result<i64> {
        self.connection
            .query_row("PRAGMA data_version", [], |row| row.get(0))
    }

    /// When the set of tables last changed, and the LDB's position.
    pub fn schema_time(&mut self) -> rusqlite::Result<At<LedgerTime>> {
        self.snapshot(|reader, _| {
            let time = if reader.has_table("_ctlfs_state")? {
                reader
                    .connection
                    .prepare_cached("SELECT value FROM _ctlfs_state WHERE name = 'schema_time'")?
                    .query_row([], |row| row.get::<_, i64>(0))
                    .optional()?
            } else {
                None
            };
            match time {
                Some(micros) => Ok(LedgerTime::from_micros(micros)),
                None => Ok(reader.snapshot_mark()?.time),
            }
        })
    }

    /// The entry that last changed `table`.
    pub fn table_mark(&mut self, table: &Table) -> rusqlite::Result<At<Mark>> {
        self.snapshot(|reader, _| reader.mark_of(table))
    }

    fn mark_of(&self, table: &Table) -> rusqlite::Result<Mark> {
        if self.has_table("_ctlfs_tables")? {
            let mark = self
                .connection
                .prepare_cached("SELECT seq, time FROM _ctlfs_tables WHERE name = ?1")?
                .query_row([table.name.sql_name()], |row| {
                    Ok(mark(row.get(0)?, row.get(1)?))
                })
                .optional()?;
            if let Some(mark) = mark {
                return Ok(mark);
            }
        }
        self.snapshot_mark()
    }

    /// The row with exactly this key: the same values in the same storage classes.
    pub fn row(&mut self, table: &Arc<Table>, key: &[Value]) -> rusqlite::Result<At<Option<Row>>> {
        let sql = self.row_sql(table)?;
        let mut statement = self.connection.prepare_cached(&sql)?;
        let width = table.schema.fields().len();
        let (seq, found) = statement.query_row(params_from_iter(key.iter().map(Bound)), |row| {
            let seq = Seq::from_sql(row.get(0)?);
            if row.get_ref(1)? == ValueRef::Null {
                return Ok((seq, None));
            }
            let mark = match row.get::<_, Option<i64>>(2)? {
                Some(seq) => Some(mark(seq, row.get(3)?)),
                None => None,
            };
            let values = (0..width)
                .map(|i| row.get_ref(4 + i).map(value_of))
                .collect::<rusqlite::Result<Vec<_>>>()?;
            Ok((seq, Some((values, mark))))
        })?;
        drop(statement);
        let value = match found {
            None => None,
            Some((values, mark)) => {
                // SQL's `=` also finds 1.0 for 1: another spelling, so not this row.
                let same = table
                    .schema
                    .key()
                    .iter()
                    .zip(key)
                    .all(|(i, k)| values.get(*i) == Some(k));
                match (same, mark) {
                    (false, _) => None,
                    (true, Some(mark)) => Some(Row { values, mark }),
                    (true, None) => Some(Row {
                        values,
                        mark: self.snapshot_mark()?,
                    }),
                }
            }
        };
        Ok(At { seq, value })
    }

    /// Whether any row's key begins with `prefix`.
    pub fn has_prefix(&mut self, table: &Table, prefix: &[Value]) -> rusqlite::Result<At<bool>> {
        let conditions = equals(table, prefix.len());
        let sql = format!(
            "SELECT coalesce((SELECT seq FROM _ldb_seq WHERE id = 1), 0), {} FROM \
             (SELECT 1) LEFT JOIN (SELECT * FROM {} WHERE {conditions} LIMIT 1) t",
            table
                .schema
                .key_fields()
                .take(prefix.len())
                .map(|f| format!("t.\"{}\"", f.name))
                .collect::<Vec<_>>()
                .join(", "),
            table.name.sql_name(),
        );
        let mut statement = self.connection.prepare_cached(&sql)?;
        statement.query_row(params_from_iter(prefix.iter().map(Bound)), |row| {
            let mut same = true;
            for (i, value) in prefix.iter().enumerate() {
                same &= value_of(row.get_ref(1 + i)?) == *value;
            }
            Ok(At {
                seq: Seq::from_sql(row.get(0)?),
                value: same,
            })
        })
    }

    /// Up to `limit` different values of the key part behind `prefix`, in SQLite's order,
    /// beginning behind `after`. NULLs, which have no name, are left out.
    pub fn keys(
        &mut self,
        table: &Table,
        prefix: &[Value],
        after: Option<&Value>,
        limit: usize,
    ) -> rusqlite::Result<At<Vec<Value>>> {
        self.snapshot(|reader, _| {
            let mut keys: Vec<Value> = Vec::new();
            let mut after = after.cloned();
            // Each round is one range scan; a run of equal values ends it early and seeks on.
            loop {
                let more = reader.range(table, prefix, None, after.as_ref(), None, |value| {
                    keys.push(value);
                    keys.len() < limit
                })?;
                after = keys.last().cloned();
                if !more || keys.len() >= limit {
                    return Ok(keys);
                }
            }
        })
    }

    /// The values of the key part behind `prefix` whose bytes begin with `start`, as text and as
    /// blobs, for which `matches` says yes: at most one is returned.
    pub fn find_key(
        &mut self,
        table: &Table,
        prefix: &[Value],
        start: &[u8],
        mut matches: impl FnMut(&Value) -> bool,
    ) -> rusqlite::Result<At<Option<Value>>> {
        let end = successor(start);
        self.snapshot(|reader, _| {
            for class in [Value::Text as fn(Vec<u8>) -> Value, Value::Blob] {
                let mut found = None;
                let mut take = |value: Value| {
                    if matches(&value) {
                        found = Some(value);
                    }
                    found.is_none()
                };
                let first = class(start.to_vec());
                let end = end.clone().map(class);
                let mut after = None;
                // The start itself is part of the range; `keys_from` goes on behind a value.
                let mut from = Some(&first);
                loop {
                    let mut last = None;
                    let more = reader.range(
                        table,
                        prefix,
                        from,
                        after.as_ref(),
                        end.as_ref(),
                        |value| {
                            last = Some(value.clone());
                            take(value)
                        },
                    )?;
                    from = None;
                    if !more || last.is_none() {
                        break;
                    }
                    after = last;
                }
                if found.is_some() {
                    return Ok(found);
                }
            }
            Ok(None)
        })
    }

    /// Scans the key part behind `prefix` and hands each different value to `take` until that
    /// says stop. Returns true if the scan broke off in a run of equal values and has to be
    /// taken up behind the last one.
    fn range(
        &self,
        table: &Table,
        prefix: &[Value],
        from: Option<&Value>,
        after: Option<&Value>,
        end: Option<&Value>,
        mut take: impl FnMut(Value) -> bool,
    ) -> rusqlite::Result<bool> {
        let Some(field) = table.schema.key_fields().nth(prefix.len()) else {
            return Ok(false);
        };
        let column = &field.name;
        let mut conditions = Vec::new();
        let mut bound: Vec<&Value> = prefix.iter().collect();
        if !prefix.is_empty() {
            conditions.push(equals(table, prefix.len()));
        }
        for (operator, value) in [(">=", from), (">", after), ("<", end)] {
            if let Some(value) = value {
                bound.push(value);
                conditions.push(format!("\"{column}\" {operator} ?{}", bound.len()));
            }
        }
        if from.is_none() && after.is_none() {
            conditions.push(format!("\"{column}\" IS NOT NULL"));
        }
        let sql = format!(
            "SELECT \"{column}\" FROM {} WHERE {} ORDER BY \"{column}\"",
            table.name.sql_name(),
            conditions.join(" AND "),
        );
        let mut statement = self.connection.prepare_cached(&sql)?;
        let mut rows = statement.query(params_from_iter(bound.into_iter().map(Bound)))?;
        let mut last: Option<Value> = None;
        let mut repeats = 0;
        while let Some(row) = rows.next()? {
            let value = row.get_ref(0)?;
            if last
                .as_ref()
                .is_some_and(|last| Bound(last).value() == value)
            {
                repeats += 1;
                if repeats >= STEPS_BEFORE_SEEK {
                    return Ok(true);
                }
                continue;
            }
            repeats = 0;
            let value = value_of(value);
            last = Some(value.clone());
            if !take(value) {
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// Hands every row of `table` that has a path to `take`, in key order, until that says stop,
    /// all from one snapshot. `begin` is told its position first and can refuse it. Returns the
    /// table's last change at that position.
    pub fn scan(
        &mut self,
        table: &Table,
        begin: impl FnOnce(Seq) -> bool,
        mut take: impl FnMut(&[Value]) -> bool,
    ) -> rusqlite::Result<At<Mark>> {
        let columns = |names: &mut dyn Iterator<Item = &Field>| {
            let quoted = names.map(|f| format!("\"{}\"", f.name));
            quoted.collect::<Vec<_>>()
        };
        let fields = columns(&mut table.schema.fields().iter());
        let key = columns(&mut table.schema.key_fields());
        let sql = format!(
            "SELECT {} FROM {} WHERE {} IS NOT NULL ORDER BY {}",
            fields.join(", "),
            table.name.sql_name(),
            key.join(" IS NOT NULL AND "),
            key.join(", "),
        );
        self.snapshot(|reader, seq| {
            let mark = reader.mark_of(table)?;
            if !begin(seq) {
                return Ok(mark);
            }
            let mut statement = reader.connection.prepare_cached(&sql)?;
            let mut rows = statement.query([])?;
            let mut values = Vec::with_capacity(fields.len());
            while let Some(row) = rows.next()? {
                values.clear();
                for i in 0..fields.len() {
                    values.push(value_of(row.get_ref(i)?));
                }
                if !take(&values) {
                    break;
                }
            }
            Ok(mark)
        })
    }

    /// Stays at the LDB as it is now, whatever is committed, until [`Reader::release`]. Returns the
    /// position.
    pub fn hold(&mut self) -> rusqlite::Result<Seq> {
        self.release()?;
        self.connection.execute_batch("BEGIN")?;
        self.held = true;
        // The first read is what takes the snapshot.
        self.position()
    }

    /// Follows the LDB again.
    pub fn release(&mut self) -> rusqlite::Result<()> {
        if self.held {
            self.connection.execute_batch("COMMIT")?;
            self.held = false;
        }
        Ok(())
    }

    /// Whether somebody can stay at a state of this LDB without keeping its writer from going on.
    pub fn can_hold(&mut self) -> rusqlite::Result<bool> {
        let mode = "PRAGMA journal_mode";
        let mode: String = self.connection.query_row(mode, [], |row| row.get(0))?;
        Ok(mode.eq_ignore_ascii_case("wal"))
    }

    /// Runs `read` in one read transaction, tells it the position that it sees, and adds that to
    /// the answer.
    pub(super) fn snapshot<T>(
        &mut self,
        read: impl FnOnce(&Self, Seq) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<At<T>> {
        let transaction = if self.held {
            None
        } else {
            Some(self.connection.unchecked_transaction()?)
        };
        let seq = self
            .connection
            .prepare_cached("SELECT seq FROM _ldb_seq WHERE id = 1")?
            .query_row([], |row| row.get(0))
            .optional()?
            .unwrap_or(0);
        let seq = Seq::from_sql(seq);
        let value = read(self, seq)?;
        drop(transaction);
        Ok(At { seq, value })
    }

    pub(super) fn has_table(&self, name: &str) -> rusqlite::Result<bool> {
        self.connection
            .prepare_cached("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?1")?
            .exists([name])
    }

    /// The mark of what came with a snapshot: the position ctlfs took the LDB over at, or, for an
    /// LDB that someone else writes, where it stands now.
    fn snapshot_mark(&self) -> rusqlite::Result<Mark> {
        if self.has_table("_ctlfs_state")? {
            let mut statement = self.connection.prepare_cached(
                "SELECT (SELECT value FROM _ctlfs_state WHERE name = 'snapshot_seq'), \
                 (SELECT value FROM _ctlfs_state WHERE name = 'snapshot_time')",
            )?;
            let stored: (Option<i64>, Option<i64>) =
                statement.query_row([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            if let (Some(seq), Some(time)) = stored {
                return Ok(mark(seq, time));
            }
        }
        let mut statement = self.connection.prepare_cached(
            "SELECT coalesce((SELECT seq FROM _ldb_seq WHERE id = 1), 0), \
             coalesce((SELECT CAST(round(unixepoch(timestamp, 'subsec') * 1000000) AS INTEGER) \
             FROM _ldb_last_update WHERE name = 'ledger'), 0)",
        )?;
        statement.query_row([], |row| Ok(mark(row.get(0)?, row.get(1)?)))
    }

    fn row_sql(&mut self, table: &Arc<Table>) -> rusqlite::Result<String> {
        if let Some(sql) = self
            .sql
            .get(&table.name)
            .filter(|sql| Arc::ptr_eq(&sql.table, table))
        {
            return Ok(sql.row.clone());
        }
        let name = table.name.sql_name();
        let marks = format!("_ctlfs_rows___{name}");
        let columns: String = table
            .schema
            .fields()
            .iter()
            .map(|f| format!(", t.\"{}\"", f.name))
            .collect();
        let on = table
            .schema
            .key_fields()
            .enumerate()
            .map(|(i, f)| format!("t.\"{}\" = ?{}", f.name, i + 1))
            .collect::<Vec<_>>()
            .join(" AND ");
        let (mark, join) = if self.has_table(&marks)? {
            (
                "m.seq, m.time",
                format!(" LEFT JOIN \"{marks}\" m ON m.id = t._rowid_"),
            )
        } else {
            ("NULL, NULL", String::new())
        };
        // One statement, so one snapshot: the position and the row belong together.
        let row = format!(
            "SELECT coalesce((SELECT seq FROM _ldb_seq WHERE id = 1), 0), t._rowid_, {mark}{columns} \
             FROM (SELECT 1) LEFT JOIN {name} t ON {on}{join}"
        );
        self.sql.insert(
            table.name.clone(),
            TableSql {
                table: Arc::clone(table),
                row: row.clone(),
            },
        );
        Ok(row)
    }
}

fn mark(seq: i64, time: i64) -> Mark {
    Mark {
        seq: Seq::from_sql(seq),
        time: LedgerTime::from_micros(time),
    }
}

fn equals(table: &Table, parts: usize) -> String {
    table
        .schema
        .key_fields()
        .take(parts)
        .enumerate()
        .map(|(i, f)| format!("\"{}\" = ?{}", f.name, i + 1))
        .collect::<Vec<_>>()
        .join(" AND ")
}

/// The smallest byte string behind all that begin with `start`; `None` if there is none.
fn successor(start: &[u8]) -> Option<Vec<u8>> {
    let mut end = start.to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return Some(end);
        }
    }
    None
}
