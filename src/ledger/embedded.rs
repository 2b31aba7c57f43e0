//! The embedded ledger: the same schema in a SQLite file, for one machine. This origin opens it
//! read-only and never creates it; the executive writes it at the same time.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, ErrorCode, OpenFlags, Row};

use super::inotify::InotifyPush;
use super::push::Push;
use super::{Entry, LEDGER_TABLE, Origin, OriginError, holds_more};
use crate::model::{LedgerTime, Seq};

/// The statement bytes at which an answer ends.
const ANSWER_BYTES: usize = 8 << 20;
/// What an entry costs in memory besides its statement, about.
const ENTRY_BYTES: usize = 64;
/// How long a read waits for a writer that is switching the file's journal.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// A ledger in a SQLite file. Opened on the first call, and again when the file was replaced.
pub struct EmbeddedOrigin {
    path: PathBuf,
    open: Option<OpenLedger>,
}

struct OpenLedger {
    db: Connection,
    /// Device and inode: a path that names another file now is another ledger.
    file: (u64, u64),
}

impl EmbeddedOrigin {
    /// An origin that is not opened yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        EmbeddedOrigin {
            path: path.into(),
            open: None,
        }
    }

    fn read<T>(
        &mut self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, OriginError> {
        let origin = describe(&self.path);
        let file = std::fs::metadata(&self.path)
            .map(|m| (m.dev(), m.ino()))
            .map_err(|e| OriginError::Unreachable {
                origin: origin.clone(),
                reason: match e.kind() {
                    std::io::ErrorKind::NotFound => format!(
                        "{e}; check the path, or create a new ledger there with 'ctlfs init'"
                    ),
                    _ => e.to_string(),
                },
            })?;
        let open = match self.open.take() {
            Some(open) if open.file == file => open,
            _ => OpenLedger {
                db: open(&self.path).map_err(|e| explain(&e, origin.clone()))?,
                file,
            },
        };
        match work(&open.db) {
            Ok(result) => {
                self.open = Some(open);
                Ok(result)
            }
            Err(e) => Err(explain(&e, origin)),
        }
    }
}

/// The embedded ledger at `path` as a person may see it.
pub(crate) fn describe(path: &Path) -> String {
    format!("sqlite://{}", path.display())
}

fn open(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    db.busy_timeout(BUSY_TIMEOUT)?;
    Ok(db)
}

/// What SQLite's error means for whoever follows or fills the ledger.
pub(crate) fn explain(error: &rusqlite::Error, origin: String) -> OriginError {
    let failed = |origin, reason: &str| OriginError::Failed {
        origin,
        reason: reason.into(),
    };
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => failed(origin, "the file is not a SQLite database"),
        Some(ErrorCode::DatabaseCorrupt) => failed(origin, "the SQLite database is damaged"),
        Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied | ErrorCode::SystemIoFailure) => {
            OriginError::Unreachable {
                origin,
                reason: format!("SQLite cannot open or read it ({})", plain(error)),
            }
        }
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => OriginError::Unreachable {
            origin,
            reason: format!(
                "it stayed locked for {} s by another process",
                BUSY_TIMEOUT.as_secs()
            ),
        },
        _ => {
            let reason = plain(error);
            if reason.contains("no such table") {
                OriginError::NotInitialised { origin }
            } else {
                OriginError::Failed { origin, reason }
            }
        }
    }
}

/// SQLite's own message, without the statement that rusqlite adds for syntax errors: a statement
/// may hold values.
fn plain(error: &rusqlite::Error) -> String {
    match error {
        rusqlite::Error::SqliteFailure(e, Some(message)) => {
            // "near "x": syntax error" quotes the statement.
            if message.contains("near \"") || message.contains("unrecognized token") {
                format!("{e}")
            } else {
                message.clone()
            }
        }
        rusqlite::Error::SqlInputError { msg, error, .. } => {
            if msg.contains("near \"") || msg.contains("unrecognized token") {
                format!("{error}")
            } else {
                msg.clone()
            }
        }
        other => other.to_string(),
    }
}

impl Origin for EmbeddedOrigin {
    fn fetch(&mut self, from: Seq) -> Result<Vec<Entry>, OriginError> {
        let origin = describe(&self.path);
        let (entries, broken) = self.read(|db| {
            let mut query = db.prepare_cached(&format!(
                "SELECT seq, leader_ts, statement FROM {LEDGER_TABLE} WHERE seq >= ?1 ORDER BY seq"
            ))?;
            let mut rows = query.query([from.to_sql()])?;
            let mut entries = Vec::new();
            let mut bytes = 0;
            while let Some(row) = rows.next()? {
                match entry(row)? {
                    Ok(entry) => {
                        bytes += entry.statement.len() + ENTRY_BYTES;
                        entries.push(entry);
                    }
                    Err(reason) => return Ok((entries, Some(reason))),
                }
                // The first may be the one at `from`.
                if bytes >= ANSWER_BYTES && entries.len() >= 2 {
                    break;
                }
            }
            Ok((entries, None))
        })?;
        match broken {
            // What stands before it can still be applied; the next fetch starts with it.
            Some(reason) if !holds_more(&entries, from) => {
                Err(OriginError::Failed { origin, reason })
            }
            _ => Ok(entries),
        }
    }

    fn last_seq(&mut self) -> Result<Option<Seq>, OriginError> {
        let last: Option<i64> = self.read(|db| {
            db.prepare_cached(&format!("SELECT MAX(seq) FROM {LEDGER_TABLE}"))?
                .query_row([], |row| row.get(0))
        })?;
        Ok(last.map(Seq::from_sql))
    }

    fn seqs_between(&mut self, first: Seq, last: Seq) -> Result<Vec<Seq>, OriginError> {
        self.read(|db| {
            db.prepare_cached(&format!(
                "SELECT seq FROM {LEDGER_TABLE} WHERE seq BETWEEN ?1 AND ?2 ORDER BY seq"
            ))?
            .query_map([first.to_sql(), last.to_sql()], |row| {
                row.get(0).map(Seq::from_sql)
            })?
            .collect()
        })
    }

    fn describe(&self) -> String {
        describe(&self.path)
    }

    fn push(&self, heartbeat: Duration) -> Option<Box<dyn Push>> {
        Some(Box::new(InotifyPush::new(&self.path, heartbeat)))
    }

    fn clock_ahead(&self) -> Option<i64> {
        // Whoever writes the file is on this host.
        Some(0)
    }
}

/// Decodes a row; the inner error says what is wrong without the statement.
fn entry(row: &Row<'_>) -> rusqlite::Result<Result<Entry, String>> {
    let seq: i64 = row.get(0)?;
    // A time that cannot be read, which nothing depends on, counts as the epoch, as in MySQL.
    let time = match row.get_ref(1)? {
        ValueRef::Text(text) => LedgerTime::parse(text).unwrap_or_default(),
        _ => LedgerTime::default(),
    };
    let statement = match row.get_ref(2)? {
        ValueRef::Text(text) | ValueRef::Blob(text) => std::str::from_utf8(text).ok(),
        _ => None,
    };
    Ok(match statement {
        Some(statement) => Ok(Entry {
            seq: Seq::from_sql(seq),
            time,
            statement: statement.to_owned(),
        }),
        None => Err(format!("the statement of ledger entry {seq} is not text")),
    })
}
