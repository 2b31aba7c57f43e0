//! The one writer of an LDB: opening, taking over, the position, and what is remembered of gaps in
//! the ledger. The statements themselves are run by [`Batch`].

use std::collections::HashSet;
use std::fmt::Write as _;
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, UNIX_EPOCH};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, OptionalExtension, TransactionBehavior};
use sha2::{Digest as _, Sha256};

use super::authorizer::Guard;
use super::batch::Batch;
use super::capture::Capture;
use super::journal::Journal;
use super::wal::WalHolds;
use super::{Contents, FORMAT, LdbError, catalog, check_header, identify, rows_table};
use crate::model::{Catalog, LedgerTime, Seq};

/// The SHA-256 of a statement, in hex.
pub type Digest = String;

/// Gaps in the ledger further behind than this are forgotten.
const GAP_WINDOW: u64 = 10_000;

/// The digest by which a ledger entry is recognised.
pub fn statement_digest(statement: &str) -> Digest {
    let mut hex = String::with_capacity(64);
    for byte in Sha256::digest(statement.as_bytes()) {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

/// How far an LDB is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Position {
    /// The last entry applied.
    pub seq: Seq,
    /// The digest of its statement; `None` when ctlstore applied it, or nothing was applied yet.
    pub digest: Option<Digest>,
    /// Its ledger time.
    pub time: Option<LedgerTime>,
}

/// The writer of an LDB.
pub struct LdbWriter {
    pub(super) conn: Connection,
    pub(super) path: PathBuf,
    pub(super) guard: Guard,
    pub(super) capture: Capture,
    pub(super) journal: Journal,
    pub(super) catalog: Arc<Catalog>,
    pub(super) position: Position,
    pub(super) statement_limit: Duration,
    /// Whether a batch was begun that is neither committed nor taken back.
    pub(super) wal_holds: WalHolds,
    pub(super) in_batch: bool,
    ready: bool,
}

impl LdbWriter {
    /// Opens the LDB at `path`; creates it (readable by its owner only) when there is none, takes
    /// over one that ctlstore made. A file that is no LDB is left untouched.
    pub fn open(path: &Path) -> Result<Self, LdbError> {
        check_header(path)?;
        create_private(path)?;
        let modified = modified(path);
        let sqlite = |e: rusqlite::Error| LdbError::from_sqlite(path, "open", &e);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut conn = Connection::open_with_flags(path, flags).map_err(sqlite)?;
        conn.busy_timeout(Duration::from_secs(5)).map_err(sqlite)?;
        let contents = identify(&conn, path)?;
        configure(&conn).map_err(sqlite)?;
        let (position, catalog, journal) =
            take_over(&mut conn, contents, modified).map_err(sqlite)?;
        let ready = state(&conn, "ready").map_err(sqlite)? == Some("1".into());
        let capture = Capture::install(&conn, &random_token()).map_err(sqlite)?;
        let guard = Guard::install(&mut conn, capture.trigger_prefix()).map_err(sqlite)?;
        conn.set_prepared_statement_cache_capacity(256);
        Ok(LdbWriter {
            conn,
            path: path.to_owned(),
            guard,
            capture,
            journal,
            catalog: Arc::new(catalog),
            position,
            statement_limit: Duration::from_secs(60),
            wal_holds: WalHolds::default(),
            in_batch: false,
            ready,
        })
    }

    /// Where the LDB stands.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// The tables it holds.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the LDB has ever held everything its ledger had.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Records that the LDB holds everything its ledger has. Cheap when it is recorded already.
    pub fn set_ready(&mut self) -> Result<(), LdbError> {
        if !self.ready {
            self.set_state("ready", 1)?;
            self.ready = true;
        }
        Ok(())
    }

    /// Stops a ledger statement that is running when `stop` becomes true.
    pub fn stop_on(&mut self, stop: Arc<AtomicBool>) {
        self.guard.stop_on(stop);
    }

    /// Does not wait for those who hold the write-ahead log back.
    pub fn respect(&mut self, holds: WalHolds) {
        self.wal_holds = holds;
    }

    /// How long one ledger statement may run; a minute unless set.
    pub fn set_statement_limit(&mut self, limit: Duration) {
        self.statement_limit = limit;
    }

    /// Begins a batch: one SQLite transaction.
    pub fn begin(&mut self) -> Result<Batch<'_>, LdbError> {
        Batch::begin(self)
    }

    /// Where the file itself says that it stands.
    pub(super) fn stored_seq(&self) -> rusqlite::Result<Seq> {
        self.conn
            .prepare_cached("SELECT seq FROM _ldb_seq WHERE id = 1")?
            .query_row([], |row| row.get(0))
            .optional()
            .map(|seq| Seq::from_sql(seq.unwrap_or(0)))
    }

    /// The gaps that may still fill, ascending, from `from` on: first and last sequence.
    pub fn gaps(&self, from: Seq, limit: u32) -> Result<Vec<(Seq, Seq)>, LdbError> {
        let read = || -> rusqlite::Result<Vec<(Seq, Seq)>> {
            self.conn
                .prepare_cached(
                    "SELECT first, last FROM _ctlfs_gaps WHERE last >= ?1 ORDER BY first LIMIT ?2",
                )?
                .query_map((from.to_sql(), limit), |row| {
                    Ok((Seq::from_sql(row.get(0)?), Seq::from_sql(row.get(1)?)))
                })?
                .collect()
        };
        read().map_err(|e| LdbError::from_sqlite(&self.path, "read", &e))
    }

    /// The entries that appeared behind the position, ascending.
    pub fn late(&self) -> Result<Vec<Seq>, LdbError> {
        let read = || -> rusqlite::Result<Vec<Seq>> {
            self.conn
                .prepare_cached("SELECT seq FROM _ctlfs_late ORDER BY seq")?
                .query_map([], |row| row.get(0).map(Seq::from_sql))?
                .collect()
        };
        read().map_err(|e| LdbError::from_sqlite(&self.path, "read", &e))
    }

    /// Records entries that appeared behind the position. Those recorded before stay as they are.
    pub fn add_late(&mut self, late: &[Seq]) -> Result<(), LdbError> {
        let mut write = || -> rusqlite::Result<()> {
            let tx = self.conn.transaction()?;
            for seq in late {
                tx.prepare_cached("INSERT OR IGNORE INTO _ctlfs_late(seq) VALUES(?1)")?
                    .execute([seq.to_sql()])?;
            }
            tx.commit()
        };
        write().map_err(|e| LdbError::from_sqlite(&self.path, "write", &e))
    }

    /// Pretends that the disk has room for so many pages only.
    #[cfg(test)]
    pub(crate) fn limit_pages(&self, pages: u32) {
        let sql = format!("PRAGMA max_page_count = {pages}");
        self.conn.query_row(&sql, [], |_| Ok(())).unwrap();
    }

    pub(super) fn set_state(
        &self,
        name: &str,
        value: impl rusqlite::ToSql,
    ) -> Result<(), LdbError> {
        set_state(&self.conn, name, value)
            .map_err(|e| LdbError::from_sqlite(&self.path, "write", &e))
    }

    /// Writes the position and the gaps before it, inside the batch's transaction.
    pub(super) fn store_position(
        &self,
        position: &Position,
        gaps: &[(Seq, Seq)],
    ) -> rusqlite::Result<()> {
        let conn = &self.conn;
        conn.prepare_cached("INSERT OR REPLACE INTO _ldb_seq(id, seq) VALUES(1, ?1)")?
            .execute([position.seq.to_sql()])?;
        if let Some(time) = position.time {
            conn.prepare_cached(
                "INSERT OR REPLACE INTO _ldb_last_update(name, timestamp) VALUES('ledger', ?1)",
            )?
            .execute([time.to_timestamp()])?;
        }
        store_digest(conn, position)?;
        if !gaps.is_empty() {
            let horizon = Seq::new(position.seq.get().saturating_sub(GAP_WINDOW));
            for (first, last) in gaps.iter().filter(|(_, last)| *last >= horizon) {
                conn.prepare_cached(
                    "INSERT OR REPLACE INTO _ctlfs_gaps(first, last) VALUES(?1, ?2)",
                )?
                .execute([first.to_sql(), last.to_sql()])?;
            }
            conn.prepare_cached("DELETE FROM _ctlfs_gaps WHERE last < ?1")?
                .execute([horizon.to_sql()])?;
        }
        Ok(())
    }
}

/// Creates the file if it is absent. SQLite gives the files it keeps beside it the same mode.
fn create_private(path: &Path) -> Result<(), LdbError> {
    let created = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    match created {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(LdbError::Io {
            path: path.to_owned(),
            action: "create",
            reason: e.to_string(),
        }),
    }
}

fn configure(conn: &Connection) -> rusqlite::Result<()> {
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    // Off, a double-quoted name that is no column is an error, not a string. Ledger statements
    // double-quote columns only.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DQS_DML, false)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DQS_DDL, false)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_FKEY, false)?;
    // As in readers: bound values must not make SQLite compile a cached statement anew.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    conn.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
    // NORMAL: a crash of the machine can lose the last commits, never tear one; the ledger has
    // them still.
    conn.execute_batch(
        "PRAGMA synchronous = NORMAL;
         PRAGMA recursive_triggers = ON;
         PRAGMA temp_store = MEMORY;
         PRAGMA cache_size = -32768;",
    )?;
    // A batch of thousands of entries fills the default of 1,000 pages several times over; writing
    // each of them back on its own would double the work.
    conn.query_row("PRAGMA wal_autocheckpoint = 4000", [], |_| Ok(()))?;
    // A WAL that grew while readers held it back is cut down again once it is used anew.
    conn.query_row("PRAGMA journal_size_limit = 67108864", [], |_| Ok(()))
}

/// When the file was last written.
fn modified(path: &Path) -> LedgerTime {
    let time = std::fs::metadata(path).and_then(|m| m.modified()).ok();
    let since = time.and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    let micros = since.and_then(|s| i64::try_from(s.as_micros()).ok());
    LedgerTime::from_micros(micros.unwrap_or(0))
}

/// Makes the LDB, as it was found, one that is ours: adds the tables that are missing and forgets
/// the last changes of rows that somebody else has written since. Such rows count as part of a
/// snapshot, which is as old as the position, or as the file if that has no time.
fn take_over(
    conn: &mut Connection,
    contents: Contents,
    modified: LedgerTime,
) -> rusqlite::Result<(Position, Catalog, Journal)> {
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
    if contents != Contents::Ctlfs {
        create_tables(&tx)?;
    }
    let mut position = load_position(&tx)?;
    if state(&tx, "last_digest_seq")? != Some(position.seq.to_string()) {
        position.digest = None;
        forget_changes(&tx)?;
        store_digest(&tx, &position)?;
        if position.seq != Seq::ZERO {
            let time = position.time.unwrap_or(modified);
            set_state(&tx, "snapshot_seq", position.seq.to_sql())?;
            set_state(&tx, "snapshot_time", time.micros())?;
        }
    }
    let catalog = catalog::load(&tx)?;
    create_row_tables(&tx, &catalog)?;
    let journal = Journal::open(&tx, position.seq)?;
    tx.commit()?;
    Ok((position, catalog, journal))
}

/// Creates ctlstore's and our own tables where they are missing.
fn create_tables(conn: &Connection) -> rusqlite::Result<()> {
    conn.execute_batch(&format!(
        "CREATE TABLE IF NOT EXISTS _ldb_seq(id INTEGER PRIMARY KEY NOT NULL, seq BIGINT NOT NULL);
         INSERT OR IGNORE INTO _ldb_seq(id, seq) VALUES(1, 0);
         CREATE TABLE IF NOT EXISTS _ldb_last_update(
             name STRING PRIMARY KEY NOT NULL, timestamp DATETIME NOT NULL);
         CREATE TABLE IF NOT EXISTS _ctlfs_state(name TEXT PRIMARY KEY, value);
         CREATE TABLE IF NOT EXISTS _ctlfs_tables(
             name TEXT PRIMARY KEY, seq INTEGER NOT NULL, time INTEGER NOT NULL);
         CREATE TABLE IF NOT EXISTS _ctlfs_gaps(first INTEGER PRIMARY KEY, last INTEGER NOT NULL);
         CREATE TABLE IF NOT EXISTS _ctlfs_late(seq INTEGER PRIMARY KEY);
         INSERT OR REPLACE INTO _ctlfs_state(name, value) VALUES('format', {FORMAT});"
    ))
}

/// The tables of the rows' last changes.
fn row_tables(conn: &Connection) -> rusqlite::Result<HashSet<String>> {
    conn.prepare("SELECT name FROM sqlite_schema WHERE type = 'table' AND name GLOB ?1")?
        .query_map([rows_table("*")], |row| row.get(0))?
        .collect()
}

/// Drops what is recorded of the rows' and tables' last changes.
fn forget_changes(conn: &Connection) -> rusqlite::Result<()> {
    for name in row_tables(conn)? {
        conn.execute_batch(&format!("DROP TABLE \"{name}\""))?;
    }
    conn.execute_batch("DELETE FROM _ctlfs_tables")
}

/// Creates the tables of the rows' last changes where they are missing.
fn create_row_tables(conn: &Connection, catalog: &Catalog) -> rusqlite::Result<()> {
    let present = row_tables(conn)?;
    for table in catalog.tables() {
        let sql_name = table.name.sql_name();
        if !present.contains(&rows_table(&sql_name)) {
            create_row_table(conn, &sql_name)?;
        }
    }
    Ok(())
}

pub(super) fn create_row_table(conn: &Connection, sql_name: &str) -> rusqlite::Result<()> {
    conn.execute_batch(&format!(
        "CREATE TABLE IF NOT EXISTS main.\"{}\"(
             id INTEGER PRIMARY KEY, seq INTEGER NOT NULL, time INTEGER NOT NULL)",
        rows_table(sql_name)
    ))
}

fn load_position(conn: &Connection) -> rusqlite::Result<Position> {
    let seq: Option<i64> = conn
        .query_row("SELECT seq FROM _ldb_seq WHERE id = 1", [], |row| {
            row.get(0)
        })
        .optional()?;
    let time: Option<String> = conn
        .query_row(
            "SELECT CAST(timestamp AS TEXT) FROM _ldb_last_update WHERE name = 'ledger'",
            [],
            |row| row.get(0),
        )
        .optional()?;
    Ok(Position {
        seq: Seq::from_sql(seq.unwrap_or(0)),
        digest: state(conn, "last_digest")?,
        time: time.and_then(|t| LedgerTime::parse(t.as_bytes())),
    })
}

/// Records which entry the LDB stands at, and by that that it was ctlfs that wrote it last.
fn store_digest(conn: &Connection, position: &Position) -> rusqlite::Result<()> {
    set_state(conn, "last_digest", &position.digest)?;
    set_state(conn, "last_digest_seq", position.seq.to_sql())
}

fn state(conn: &Connection, name: &str) -> rusqlite::Result<Option<String>> {
    let value: Option<Option<String>> = conn
        .query_row(
            "SELECT CAST(value AS TEXT) FROM _ctlfs_state WHERE name = ?1",
            [name],
            |row| row.get(0),
        )
        .optional()?;
    Ok(value.flatten())
}

pub(super) fn set_state(
    conn: &Connection,
    name: &str,
    value: impl rusqlite::ToSql,
) -> rusqlite::Result<()> {
    conn.prepare_cached("INSERT OR REPLACE INTO _ctlfs_state(name, value) VALUES(?1, ?2)")?
        .execute((name, value))?;
    Ok(())
}

/// Sixteen hex digits that nobody can guess.
fn random_token() -> String {
    format!("{:016x}", RandomState::new().hash_one(std::process::id()))
}
