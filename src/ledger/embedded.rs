//! The embedded ledger: the same schema in a SQLite file, for one machine. This origin opens it
//! read-only and never creates it; the executive writes it at the same time.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, ErrorCode, OpenFlags, Row};

use super::{Entry, LEDGER_TABLE, Origin, OriginError};
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
                if bytes >= ANSWER_BYTES {
                    break;
                }
            }
            Ok((entries, None))
        })?;
        match broken {
            // What stands before it can still be applied; the next fetch starts with it.
            Some(reason) if entries.is_empty() => Err(OriginError::Failed { origin, reason }),
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
}

/// Decodes a row; the inner error says what is wrong without the statement.
fn entry(row: &Row<'_>) -> rusqlite::Result<Result<Entry, String>> {
    let seq: i64 = row.get(0)?;
    // A time that cannot be read, which nothing depends on, counts as the epoch, as in MySQL.
    let time = match row.get_ref(1)? {
        ValueRef::Text(text) => micros(text).unwrap_or(0),
        _ => 0,
    };
    let statement = match row.get_ref(2)? {
        ValueRef::Text(text) | ValueRef::Blob(text) => std::str::from_utf8(text).ok(),
        _ => None,
    };
    Ok(match statement {
        Some(statement) => Ok(Entry {
            seq: Seq::from_sql(seq),
            time: LedgerTime::from_micros(time),
            statement: statement.to_owned(),
        }),
        None => Err(format!("the statement of ledger entry {seq} is not text")),
    })
}

/// Microseconds since the Unix epoch of `YYYY-MM-DD HH:MM:SS[.f…]`, UTC, as SQLite's own functions
/// write it (`T` for the space and a final `Z` are fine too).
fn micros(text: &[u8]) -> Option<i64> {
    let number = |range: std::ops::Range<usize>| {
        text.get(range)?.iter().try_fold(0_i64, |n, digit| {
            digit
                .is_ascii_digit()
                .then(|| n * 10 + i64::from(digit - b'0'))
        })
    };
    let separator = |at: usize, allowed: &[u8]| allowed.contains(text.get(at)?).then_some(());
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    separator(4, b"-")?;
    separator(7, b"-")?;
    separator(10, b" T")?;
    separator(13, b":")?;
    separator(16, b":")?;
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let rest = text.get(19..)?;
    let rest = rest.strip_suffix(b"Z").unwrap_or(rest);
    let fraction = match rest.split_first() {
        None => 0,
        Some((b'.', digits)) if !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) => {
            (0..6).fold(0, |n, i| {
                n * 10 + i64::from(digits.get(i).map_or(0, |d| d - b'0'))
            })
        }
        Some(_) => return None,
    };
    // Days since 1970-01-01 in the Gregorian calendar, with years that begin in March.
    let shifted = if month > 2 { year } else { year - 1 };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = 365 * shifted + shifted / 4 - shifted / 100 + shifted / 400 + day_of_year - 719_468;
    let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second;
    Some(seconds * 1_000_000 + fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_sqlite_writes_them() {
        for (text, expected) in [
            ("1970-01-01 00:00:00", Some(0)),
            ("2024-02-29 12:34:56.789", Some(1_709_210_096_789_000)),
            ("2024-02-29T12:34:56.7890123Z", Some(1_709_210_096_789_012)),
            ("1969-12-31 23:59:59", Some(-1_000_000)),
            ("2000-03-01 00:00:00.000001", Some(951_868_800_000_001)),
            ("2024-02-29", None),
            ("2024-13-01 00:00:00", None),
            ("2024-02-29 12:34:56.", None),
            ("now, or thereabouts", None),
        ] {
            assert_eq!(micros(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn times_agree_with_sqlite() {
        let db = Connection::open_in_memory().unwrap();
        for days in (-700_000..2_900_000_i64).step_by(997) {
            let text: String = db
                .query_row(
                    "SELECT datetime(?1 * 86400 + 45296, 'unixepoch')",
                    [days],
                    |r| r.get(0),
                )
                .unwrap();
            assert_eq!(
                micros(text.as_bytes()),
                Some((days * 86_400 + 45_296) * 1_000_000),
                "{text}"
            );
        }
    }
}
