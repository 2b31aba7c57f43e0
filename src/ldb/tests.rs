//! Tests of the writer: what it lets through, what it records, and that its change sets are true.

use std::path::PathBuf;

use rusqlite::Connection;

use super::*;
use crate::ledger::Entry;
use crate::model::{ChangeSet, LedgerTime, Seq};

mod canonical;
mod capture;
mod guard;
mod journal;
mod open;
mod rollback;

/// An LDB in a directory of its own.
struct Fixture {
    dir: tempfile::TempDir,
    writer: LdbWriter,
    next: u64,
}

fn entry(seq: u64, statement: &str) -> Entry {
    Entry {
        seq: Seq::new(seq),
        time: LedgerTime::from_micros(i64::try_from(seq).unwrap() * 1_000_000),
        statement: statement.into(),
    }
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let writer = LdbWriter::open(&dir.path().join("ldb.db")).unwrap();
        Fixture {
            dir,
            writer,
            next: 1,
        }
    }

    fn with(statements: &[&str]) -> Self {
        let mut fixture = Self::new();
        fixture.apply(statements).unwrap();
        fixture
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("ldb.db")
    }

    /// Applies the statements as one batch.
    fn apply(&mut self, statements: &[&str]) -> Result<ChangeSet, ApplyError> {
        let first = self.next;
        let mut batch = self.writer.begin()?;
        for (seq, statement) in (first..).zip(statements) {
            batch.apply(&entry(seq, statement))?;
        }
        let changes = batch.finish()?.unwrap();
        batch.commit()?;
        self.next += u64::try_from(statements.len()).unwrap();
        Ok(changes)
    }

    fn reader(&self) -> Connection {
        Connection::open(self.path()).unwrap()
    }

    /// The rows of a query, as SQL literals.
    fn rows(&self, query: &str) -> Vec<String> {
        let conn = self.reader();
        let mut statement = conn.prepare(query).unwrap();
        let columns = statement.column_count();
        let rows = statement.query_map([], |row| {
            let values: Vec<String> = (0..columns)
                .map(|i| match row.get_ref(i).unwrap() {
                    rusqlite::types::ValueRef::Null => "NULL".into(),
                    rusqlite::types::ValueRef::Integer(i) => i.to_string(),
                    rusqlite::types::ValueRef::Real(r) => format!("{r:?}"),
                    rusqlite::types::ValueRef::Text(t) => String::from_utf8_lossy(t).into_owned(),
                    rusqlite::types::ValueRef::Blob(b) => format!("x{b:02x?}"),
                })
                .collect();
            Ok(values.join("|"))
        });
        rows.unwrap().map(Result::unwrap).collect()
    }
}

const FLAGS: &str = r#"CREATE TABLE app___flags ("name" VARCHAR(191), "on" INTEGER, "note" TEXT, PRIMARY KEY("name"));"#;
const LIMITS: &str = r#"CREATE TABLE app___limits ("id" INTEGER, "n" INTEGER, PRIMARY KEY("id"));"#;
