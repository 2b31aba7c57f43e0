//! The LDB: the local SQLite file that holds the config tables. This is the only module that
//! knows its SQL; it knows nothing of origins, trees or mounts.
//!
//! Next to ctlstore's own tables an LDB that ctlfs writes holds these:
//!
//! | table | holds |
//! | --- | --- |
//! | `_ctlfs_state(name, value)` | `format`, `schema_time`, `last_digest`, `last_digest_seq`, `snapshot_seq`, `snapshot_time`, `ready`, `changes_floor`, `changes_to` |
//! | `_ctlfs_tables(name, seq, time)` | the last entry that changed each config table |
//! | `_ctlfs_rows___<table>(id, seq, time)` | the entry that last changed each row, by `_rowid_` |
//! | `_ctlfs_gaps(first, last)` | sequences passed over that may still appear late |
//! | `_ctlfs_late(seq)` | entries that appeared behind the position |
//! | `_ctlfs_changes(id, name, last, transactions, body)` | the journal: what the last transactions changed |

mod authorizer;
mod batch;
mod canonical;
mod capture;
pub mod catalog;
mod dirs;
mod image;
mod journal;
mod overflow;
pub mod reader;
mod recorder;
mod reshape;
#[cfg(test)]
mod tests;
mod verdict;
pub mod wal;
mod writer;

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::model::Seq;

pub use batch::{ApplyError, Batch};
pub use writer::{Digest, LdbWriter, Position, statement_digest};

/// The version of the tables that ctlfs adds.
pub const FORMAT: i64 = 1;

/// The table that holds each row's last change, for the config table `sql_name`.
pub fn rows_table(sql_name: &str) -> String {
    format!("_ctlfs_rows___{sql_name}")
}

/// Why an LDB could not be opened, read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LdbError {
    /// The file is not an LDB at all. It was left as it is.
    #[error(
        "cannot use {} as an LDB: {reason}; name another file, or move this one away",
        path.display()
    )]
    NotAnLdb {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        reason: String,
    },
    /// The file is damaged.
    #[error(
        "the LDB {} is damaged ({reason}); remove it and its -wal and -shm files: \
         it is built anew from the ledger",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        reason: String,
    },
    /// No space is left.
    #[error(
        "cannot {action} the LDB {}: no space is left on its file system; free some space",
        path.display()
    )]
    Full {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
    },
    /// Another process holds the file locked.
    #[error(
        "cannot {action} the LDB {}: another process is writing it; stop that one",
        path.display()
    )]
    Busy {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
    },
    /// Its position is not where its writer left it.
    #[error(
        "cannot write the LDB {}: it stands at entry {found}, but ctlfs left it at {expected}; \
         stop the other process that writes it, then mount again",
        path.display()
    )]
    Moved {
        /// The file.
        path: PathBuf,
        /// The position of the last commit.
        expected: Seq,
        /// The position in the file.
        found: Seq,
    },
    /// Missing, not permitted, or failing.
    #[error(
        "cannot {action} the LDB {}: {reason}; check the file, its directory and the disk",
        path.display()
    )]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// What the system or SQLite said.
        reason: String,
    },
}

impl LdbError {
    /// What an error of SQLite means for the LDB at `path` while doing `action` ("open", "read",
    /// "write").
    pub fn from_sqlite(path: &Path, action: &'static str, error: &rusqlite::Error) -> Self {
        let path = path.to_owned();
        match error.sqlite_error_code() {
            Some(ErrorCode::NotADatabase) => LdbError::NotAnLdb {
                path,
                reason: "it is not a SQLite database".into(),
            },
            Some(ErrorCode::DatabaseCorrupt) => LdbError::Corrupt {
                path,
                reason: message_of(error),
            },
            Some(ErrorCode::DiskFull) => LdbError::Full { path, action },
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                LdbError::Busy { path, action }
            }
            _ => LdbError::Io {
                path,
                action,
                reason: message_of(error),
            },
        }
    }
}

/// SQLite's message, without the text of the statement that rusqlite may add.
fn message_of(error: &rusqlite::Error) -> String {
    match error {
        rusqlite::Error::SqliteFailure(_, Some(message)) => message.clone(),
        rusqlite::Error::SqliteFailure(code, None) => code.to_string(),
        rusqlite::Error::SqlInputError { msg, .. } => msg.clone(),
        other => other.to_string(),
    }
}

/// What a file that is to be used as an LDB turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// Nothing yet.
    Empty,
    /// ctlstore's tables only.
    Ctlstore,
    /// An LDB that ctlfs has written.
    Ctlfs,
}

/// Refuses a file that cannot be a SQLite database, before SQLite touches it. An absent or empty
/// file passes.
pub fn check_header(path: &Path) -> Result<(), LdbError> {
    const MAGIC: &[u8; 16] = b"SQLite format 3\0";
    let io = |e: std::io::Error| LdbError::Io {
        path: path.to_owned(),
        action: "open",
        reason: e.to_string(),
    };
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io(e)),
    };
    if !file.metadata().map_err(io)?.is_file() {
        return Err(LdbError::NotAnLdb {
            path: path.to_owned(),
            reason: "it is not a regular file".into(),
        });
    }
    let mut head = Vec::with_capacity(MAGIC.len());
    file.by_ref().take(16).read_to_end(&mut head).map_err(io)?;
    if head.is_empty() || head == MAGIC {
        Ok(())
    } else {
        Err(LdbError::NotAnLdb {
            path: path.to_owned(),
            reason: "it is not a SQLite database".into(),
        })
    }
}

/// Refuses what another process's reflector cannot have written; changes nothing.
pub fn check_foreign(path: &Path) -> Result<(), LdbError> {
    check_header(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(path, flags)
        .map_err(|e| LdbError::from_sqlite(path, "open", &e))?;
    match identify(&conn, path)? {
        Contents::Empty => Err(LdbError::NotAnLdb {
            path: path.to_owned(),
            reason: "it holds no tables".into(),
        }),
        Contents::Ctlstore | Contents::Ctlfs => Ok(()),
    }
}

/// Tells what the open database holds; refuses one that belongs to another program. Reads only.
pub fn identify(conn: &Connection, path: &Path) -> Result<Contents, LdbError> {
    let tables = || -> rusqlite::Result<Vec<String>> {
        conn.prepare("SELECT name FROM sqlite_schema WHERE type = 'table' LIMIT 10000")?
            .query_map([], |row| row.get(0))?
            .collect()
    };
    let tables = tables().map_err(|e| LdbError::from_sqlite(path, "open", &e))?;
    let has = |name: &str| tables.iter().any(|t| t == name);
    if tables.is_empty() {
        return Ok(Contents::Empty);
    }
    if !has("_ldb_seq") {
        return Err(LdbError::NotAnLdb {
            path: path.to_owned(),
            reason: "it is a database of another program (it has no table _ldb_seq)".into(),
        });
    }
    if !has("_ctlfs_state") {
        return Ok(Contents::Ctlstore);
    }
    let format = conn
        .query_row(
            "SELECT value FROM _ctlfs_state WHERE name = 'format'",
            [],
            |row| row.get::<_, i64>(0),
        )
        .map_err(|e| LdbError::from_sqlite(path, "open", &e))?;
    if format == FORMAT {
        Ok(Contents::Ctlfs)
    } else {
        Err(LdbError::NotAnLdb {
            path: path.to_owned(),
            reason: format!("a newer ctlfs wrote it (format {format}, this one knows {FORMAT})"),
        })
    }
}

/// The path of a file that SQLite keeps beside the database, such as `-wal`.
pub fn sidecar(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
