//! What an error of a ledger statement means, in words that hold no values.

use std::path::Path;
use std::time::Duration;

use rusqlite::ErrorCode;

use super::authorizer::Guard;
use super::batch::ApplyError;
use super::{LdbError, message_of};

/// The statement would do something that none may.
pub(super) fn refused(what: &str) -> ApplyError {
    ApplyError::Statement(format!(
        "it would {what}; ledger statements may only change rows and shapes of config tables"
    ))
}

/// What an error of a ledger statement means.
pub(super) fn judge(
    error: &rusqlite::Error,
    guard: &Guard,
    path: &Path,
    limit: Duration,
) -> ApplyError {
    if let Some(what) = guard.take_notes().refused {
        return refused(&what);
    }
    match error.sqlite_error_code() {
        Some(ErrorCode::OperationInterrupted) if guard.is_stopped() => ApplyError::Stopped,
        Some(ErrorCode::OperationInterrupted) => ApplyError::Statement(format!(
            "it did not end within {}",
            humantime::format_duration(limit)
        )),
        Some(
            ErrorCode::DiskFull
            | ErrorCode::SystemIoFailure
            | ErrorCode::CannotOpen
            | ErrorCode::NotADatabase
            | ErrorCode::DatabaseCorrupt
            | ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::OutOfMemory
            | ErrorCode::ReadOnly,
        ) => ApplyError::Ldb(LdbError::from_sqlite(path, "write", error)),
        _ => ApplyError::Statement(redact(error)),
    }
}

/// SQLite's message if it holds names only; others may hold pieces of the statement, or values.
fn redact(error: &rusqlite::Error) -> String {
    const SAFE: [&str; 14] = [
        "no such table: ",
        "no such function: ",
        "table ",
        "UNIQUE constraint failed: ",
        "NOT NULL constraint failed: ",
        "CHECK constraint failed: ",
        "duplicate column name: ",
        "cannot ",
        "Cannot ",
        "datatype mismatch",
        "string or blob too big",
        "too many ",
        "error in table ",
        "all VALUES must have the same number of terms",
    ];
    let message = message_of(error);
    let counts = message.ends_with(" columns") && message.contains(" values for ");
    if counts || SAFE.iter().any(|start| message.starts_with(start)) {
        return message;
    }
    let at = match error {
        rusqlite::Error::SqlInputError { offset, .. } if *offset >= 0 => {
            format!(" at byte {offset} of the statement")
        }
        _ => String::new(),
    };
    let known = [
        ("near ", "a syntax error"),
        ("unrecognized token", "a syntax error"),
        ("no such column", "no such column"),
        ("incomplete input", "the statement is incomplete"),
    ];
    let kind = known.iter().find(|(start, _)| message.starts_with(start));
    match (kind, error.sqlite_error()) {
        (Some((_, kind)), _) => format!("{kind}{at}"),
        (None, Some(code)) => format!(
            "SQLite refuses it{at} (error {}); its message may hold values and is not shown",
            code.extended_code
        ),
        (None, None) => format!("it cannot be run{at}"),
    }
}
