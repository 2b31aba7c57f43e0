//! The embedded central database: a SQLite file that several processes of one machine may write.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, params_from_iter};

use super::ExecutiveError;
use super::central::{Central, Definition, LOCK, LOCK_ROW, Step, StepError, TABLES};
use crate::ledger::embedded::{describe, explain};
use crate::ledger::{LEDGER_TABLE, OriginError, statement};
use crate::model::{FamilyName, Field, FieldType, Seq, TableRef, TableSchema, Value};
use crate::sqlite::{Bound, value_of};

/// How long a transaction waits for other writers.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// A SQLite file, opened when it is first needed. Only `init` creates it.
pub(super) struct EmbeddedCentral {
    path: PathBuf,
    db: Option<Connection>,
}

impl EmbeddedCentral {
    pub(super) fn new(path: &Path) -> Self {
        EmbeddedCentral {
            path: path.to_owned(),
            db: None,
        }
    }

    fn connect(&mut self) -> Step<()> {
        if self.db.is_some() {
            return Ok(());
        }
        if let Err(e) = std::fs::metadata(&self.path) {
            return Err(OriginError::Unreachable {
                origin: self.describe(),
                reason: format!("{e}; 'ctlfs init' creates the file"),
            }
            .into());
        }
        let db = open(&self.path).map_err(|e| self.error(&e))?;
        self.db = Some(db);
        Ok(())
    }

    fn error(&self, error: &rusqlite::Error) -> StepError {
        match error.sqlite_error_code() {
            // Not tried again: SQLite has waited already.
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => ExecutiveError::Conflict {
                origin: self.describe(),
                reason: format!(
                    "another process kept it locked for {} s",
                    BUSY_TIMEOUT.as_secs()
                ),
            }
            .into(),
            Some(ErrorCode::ReadOnly) => OriginError::Failed {
                origin: self.describe(),
                reason: "the file cannot be written by this user".into(),
            }
            .into(),
            Some(ErrorCode::DiskFull) => OriginError::Failed {
                origin: self.describe(),
                reason: "the disk is full".into(),
            }
            .into(),
            _ => explain(error, self.describe()).into(),
        }
    }

    fn with<T>(&mut self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Step<T> {
        self.connect()?;
        let Some(db) = &self.db else {
            return Err(OriginError::Unreachable {
                origin: self.describe(),
                reason: "it is not open".into(),
            }
            .into());
        };
        work(db).map_err(|e| self.error(&e))
    }
}

fn open(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    db.busy_timeout(BUSY_TIMEOUT)?;
    // A commit survives a power cut: an LDB that has already applied it must never be ahead.
    db.execute_batch("PRAGMA synchronous = FULL")?;
    db.set_prepared_statement_cache_capacity(64);
    Ok(db)
}

impl Central for EmbeddedCentral {
    fn describe(&self) -> String {
        describe(&self.path)
    }

    fn init(&mut self) -> Step<Vec<&'static str>> {
        let created = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.path);
        if let Err(e) = created
            && e.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(OriginError::Unreachable {
                origin: self.describe(),
                reason: format!("the file cannot be created: {e}"),
            }
            .into());
        }
        // Both counts in one statement: another 'init' may be at it.
        let (tables, ledgers): (i64, i64) = self.with(|db| {
            db.query_row(
                "SELECT COUNT(*), COUNT(*) FILTER (WHERE name = ?1) FROM sqlite_master",
                [LEDGER_TABLE],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )
        })?;
        if tables > 0 && ledgers == 0 {
            return Err(OriginError::Failed {
                origin: self.describe(),
                reason: "the file is a database of another program; name one that holds a ledger, \
                         or one that does not exist yet"
                    .into(),
            }
            .into());
        }
        // Readers and a writer do not wait for each other in WAL mode, which stays with the file.
        self.with(|db| db.execute_batch("PRAGMA journal_mode = WAL; BEGIN IMMEDIATE"))
            .map_err(|e| match e {
                // The switch to WAL does not wait for another process that is just doing it.
                StepError::Failed(ExecutiveError::Conflict { reason, .. }) => {
                    StepError::Conflict(reason)
                }
                other => other,
            })?;
        let made = self.with(|db| {
            let mut made = Vec::new();
            for table in &TABLES {
                let there: bool = db.query_row(
                    "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?1)",
                    [table.name],
                    |row| row.get(0),
                )?;
                if !there {
                    db.execute_batch(&format!("CREATE TABLE {} ({})", table.name, table.sqlite))?;
                    made.push(table.name);
                }
            }
            let lock = "INSERT OR IGNORE INTO locks (id, clock) VALUES ('ledger', 0)";
            if db.execute(lock, [])? > 0 && !made.contains(&"locks") {
                made.push(LOCK_ROW);
            }
            db.execute_batch("COMMIT")?;
            Ok(made)
        });
        if made.is_err() {
            self.rollback();
        }
        made
    }

    fn begin(&mut self) -> Step<()> {
        let locked = self.with(|db| {
            // IMMEDIATE: a transaction that began by reading could not wait for another writer.
            db.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
            db.prepare_cached(LOCK)?.execute([])
        });
        match locked {
            Ok(0) => {
                self.rollback();
                Err(OriginError::NotInitialised {
                    origin: self.describe(),
                }
                .into())
            }
            Ok(_) => Ok(()),
            Err(e) => {
                self.rollback();
                Err(e)
            }
        }
    }

    fn commit(&mut self) -> Step<()> {
        self.with(|db| db.prepare_cached("COMMIT")?.execute([]))?;
        Ok(())
    }

    fn rollback(&mut self) {
        let failed = match &self.db {
            Some(db) if !db.is_autocommit() => db.execute_batch("ROLLBACK").is_err(),
            _ => false,
        };
        if failed {
            self.db = None;
        }
    }

    fn has_family(&mut self, family: &FamilyName) -> Step<bool> {
        self.with(|db| {
            db.prepare_cached("SELECT 1 FROM families WHERE name = ?1")?
                .exists([family.as_str()])
        })
    }

    fn add_family(&mut self, family: &FamilyName) -> Step<()> {
        self.with(|db| {
            db.prepare_cached("INSERT INTO families (name) VALUES (?1)")?
                .execute([family.as_str()])
        })?;
        Ok(())
    }

    fn schema(&mut self, table: &TableRef) -> Step<Option<TableSchema>> {
        let columns: Vec<(String, String, i64)> = self.with(|db| {
            db.prepare_cached("SELECT name, type, pk FROM pragma_table_info(?1)")?
                .query_map([table.sql_name()], |row| {
                    Ok((row.get(0)?, row.get(1)?, row.get(2)?))
                })?
                .collect()
        })?;
        if columns.is_empty() {
            return Ok(None);
        }
        let foreign = |reason: String| ExecutiveError::ForeignTable {
            table: table.clone(),
            reason,
        };
        let mut fields = Vec::with_capacity(columns.len());
        let mut key = Vec::new();
        for (name, declared, pk) in columns {
            let field = Field {
                name: name
                    .parse()
                    .map_err(|e: crate::model::NameError| foreign(e.to_string()))?,
                ty: FieldType::from_sqlite(&declared),
            };
            if pk > 0 {
                key.push((pk, field.name.clone()));
            }
            fields.push(field);
        }
        key.sort();
        let key: Vec<_> = key.into_iter().map(|(_, name)| name).collect();
        let schema = TableSchema::new(fields, &key).map_err(|e| foreign(e.to_string()))?;
        Ok(Some(schema))
    }

    fn rows(
        &mut self,
        table: &TableRef,
        schema: &TableSchema,
        keys: &[&[Value]],
    ) -> Step<Vec<Vec<Value>>> {
        let columns: Vec<String> = schema
            .fields()
            .iter()
            .map(|f| format!("\"{}\"", f.name))
            .collect();
        let condition: Vec<String> = schema
            .key_fields()
            .map(|f| format!("\"{}\" = ?", f.name))
            .collect();
        let sql = format!(
            "SELECT {} FROM {} WHERE {}",
            columns.join(","),
            table.sql_name(),
            condition.join(" AND ")
        );
        self.with(|db| {
            let mut query = db.prepare_cached(&sql)?;
            let mut found = Vec::new();
            for key in keys {
                let row = query
                    .query_row(params_from_iter(key.iter().map(Bound)), |row| {
                        (0..columns.len())
                            .map(|i| row.get_ref(i).map(value_of))
                            .collect::<rusqlite::Result<Vec<_>>>()
                    })
                    .optional()?;
                found.extend(row);
            }
            Ok(found)
        })
    }

    fn write(&mut self, statements: &[String]) -> Step<()> {
        self.with(|db| {
            for text in statements {
                db.prepare(text)?.execute([])?;
            }
            Ok(())
        })
    }

    fn append(&mut self, statements: &[String]) -> Step<Seq> {
        let sql = format!("INSERT INTO {LEDGER_TABLE} (statement) VALUES (?1)");
        self.with(|db| {
            let mut insert = db.prepare_cached(&sql)?;
            for text in statements {
                insert.execute([text])?;
            }
            Ok(Seq::from_sql(db.last_insert_rowid()))
        })
    }

    fn define(&mut self, table: &TableRef, definition: &Definition<'_>) -> Step<()> {
        let text = match definition {
            Definition::Create(schema) => statement::create_table(table, schema),
            Definition::Add(field) => statement::add_column(table, field),
        };
        self.with(|db| db.execute_batch(&text))
    }
}
