//! The central database on a MySQL or MariaDB server.

use mysql_async::prelude::Queryable;
use mysql_async::{Row, Value as Column};

use super::ExecutiveError;
use super::central::{Central, Definition, LOCK, LOCK_ROW, Step, StepError, TABLES};
use crate::ledger::session::{Purpose, Session, SessionError, answer, execute};
use crate::ledger::{LEDGER_TABLE, MySqlUrl, OriginError, statement};
use crate::model::{FamilyName, Field, FieldType, Seq, TableRef, TableSchema, Value};

/// The bytes of statements that go to the server at once; a single statement may be longer.
const BATCH_BYTES: usize = 1 << 20;

/// A database on a server. Connects when it is first needed.
pub(super) struct MySqlCentral {
    session: Session,
    /// MySQL commits before and after DDL, so it runs beside the transaction.
    ddl: Session,
    /// DDL that ran for the open transaction, undone if that does not commit.
    defined: Vec<Defined>,
    last_appended: Seq,
    collation: Option<&'static str>,
}

struct Defined {
    undo: String,
    /// The ledger entry that says so.
    seq: Seq,
}

impl MySqlCentral {
    pub(super) fn new(url: &MySqlUrl) -> Result<Self, OriginError> {
        Ok(MySqlCentral {
            session: Session::new(url, Purpose::Write)?,
            ddl: Session::new(url, Purpose::Write)?,
            defined: Vec::new(),
            last_appended: Seq::ZERO,
            collation: None,
        })
    }

    fn error(&self, error: SessionError) -> StepError {
        explain(error, self.session.origin())
    }

    /// The binary collation of data tables, without padding where the server has one: keys are
    /// then equal exactly when SQLite finds them equal.
    fn collation(&mut self) -> Step<&'static str> {
        if let Some(known) = self.collation {
            return Ok(known);
        }
        let sql = "SELECT collation_name FROM information_schema.collations \
                   WHERE collation_name IN ('utf8mb4_nopad_bin', 'utf8mb4_0900_bin')";
        let names: Vec<String> = self
            .ddl
            .run_again(async |conn| answer(conn.query(sql)).await)
            .map_err(|e| self.error(e))?;
        let known = ["utf8mb4_nopad_bin", "utf8mb4_0900_bin"]
            .into_iter()
            .find(|c| names.iter().any(|n| n.eq_ignore_ascii_case(c)))
            .unwrap_or("utf8mb4_bin");
        self.collation = Some(known);
        Ok(known)
    }

    /// Rows of a query inside the transaction.
    fn query(&mut self, sql: &str) -> Step<Vec<Row>> {
        self.session
            .run(async |conn| answer(conn.query(sql)).await)
            .map_err(|e| self.error(e))
    }

    fn run(&mut self, sql: &str) -> Step<()> {
        self.session
            .run(async |conn| execute(conn, sql).await)
            .map_err(|e| self.error(e))
    }

    /// Takes back DDL whose ledger entry is not there. What cannot be taken back stays: an empty
    /// table or field that nobody reads.
    fn undo(&mut self) {
        for defined in std::mem::take(&mut self.defined).into_iter().rev() {
            let sql = format!(
                "SELECT COUNT(*) FROM {LEDGER_TABLE} WHERE seq = {}",
                defined.seq
            );
            let committed: Result<Option<u64>, _> = self
                .ddl
                .run_again(async |conn| answer(conn.query_first(&sql)).await);
            if matches!(committed, Ok(Some(0))) {
                let _ = self
                    .ddl
                    .run(async |conn| execute(conn, &defined.undo).await);
            }
        }
    }
}

fn explain(error: SessionError, origin: &str) -> StepError {
    match error.code() {
        // Deadlock, lock wait timeout, table definition changed, record changed since last read.
        Some(1213) => StepError::Conflict("deadlock".into()),
        Some(1205) => StepError::Conflict("a lock was held for too long".into()),
        Some(1020 | 1412) => StepError::Conflict("the data changed meanwhile".into()),
        Some(1153) => OriginError::Failed {
            origin: origin.to_owned(),
            reason: "a statement is larger than the server's max_allowed_packet; raise it there"
                .into(),
        }
        .into(),
        _ => error.into_origin(origin.to_owned()).into(),
    }
}

impl Central for MySqlCentral {
    fn describe(&self) -> String {
        self.session.origin().to_owned()
    }

    fn init(&mut self) -> Step<Vec<&'static str>> {
        let origin = self.session.origin().to_owned();
        self.ddl
            .run_again(async |conn| {
                let there: Vec<String> = answer(conn.query(
                    "SELECT table_name FROM information_schema.tables \
                     WHERE table_schema = DATABASE()",
                ))
                .await?;
                let mut made = Vec::new();
                for table in &TABLES {
                    if there.iter().any(|t| t == table.name) {
                        continue;
                    }
                    let sql = format!(
                        "CREATE TABLE IF NOT EXISTS {} ({}) \
                         ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4",
                        table.name, table.mysql
                    );
                    execute(conn, &sql).await?;
                    made.push(table.name);
                }
                let lock = "INSERT IGNORE INTO locks (id, clock) VALUES ('ledger', 0)";
                execute(conn, lock).await?;
                if conn.affected_rows() > 0 && !made.contains(&"locks") {
                    made.push(LOCK_ROW);
                }
                Ok(made)
            })
            .map_err(|e| explain(e, &origin))
    }

    fn begin(&mut self) -> Step<()> {
        self.defined.clear();
        let locked = self
            .session
            .run_again(async |conn| {
                execute(conn, "START TRANSACTION").await?;
                execute(conn, LOCK).await?;
                Ok(conn.affected_rows())
            })
            .map_err(|e| self.error(e));
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
        let committed = self.session.run(async |conn| execute(conn, "COMMIT").await);
        match committed {
            Ok(()) => {
                self.defined.clear();
                Ok(())
            }
            Err(e) => {
                let refused = e.code().is_some();
                let error = self.error(e);
                self.rollback();
                Err(match error {
                    StepError::Failed(ExecutiveError::Origin(origin)) if !refused => {
                        ExecutiveError::CommitUnknown {
                            origin: self.describe(),
                            reason: match origin {
                                OriginError::Unreachable { reason, .. } => reason,
                                other => other.to_string(),
                            },
                        }
                        .into()
                    }
                    other => other,
                })
            }
        }
    }

    fn rollback(&mut self) {
        if self.session.is_connected() && self.run("ROLLBACK").is_err() {
            self.session.drop_connection();
        }
        self.undo();
    }

    fn has_family(&mut self, family: &FamilyName) -> Step<bool> {
        let sql = format!("SELECT 1 FROM families WHERE name = '{family}'");
        Ok(!self.query(&sql)?.is_empty())
    }

    fn add_family(&mut self, family: &FamilyName) -> Step<()> {
        self.run(&format!("INSERT INTO families (name) VALUES ('{family}')"))
    }

    fn schema(&mut self, table: &TableRef) -> Step<Option<TableSchema>> {
        let columns = self.query(&format!(
            "SELECT column_name, column_type FROM information_schema.columns \
             WHERE table_schema = DATABASE() AND table_name = '{}' ORDER BY ordinal_position",
            table.sql_name()
        ))?;
        if columns.is_empty() {
            return Ok(None);
        }
        let foreign = |reason: String| ExecutiveError::ForeignTable {
            table: table.clone(),
            reason,
        };
        let name = |text: String| {
            text.parse()
                .map_err(|e: crate::model::NameError| foreign(e.to_string()))
        };
        let mut fields = Vec::with_capacity(columns.len());
        for row in columns {
            let mut texts = texts(row);
            let (ty, field) = (texts.pop(), texts.pop());
            fields.push(Field {
                name: name(field.unwrap_or_default())?,
                ty: FieldType::from_sqlite(&ty.unwrap_or_default()),
            });
        }
        let key = self
            .query(&format!(
                "SELECT column_name FROM information_schema.statistics \
                 WHERE table_schema = DATABASE() AND table_name = '{}' \
                 AND index_name = 'PRIMARY' ORDER BY seq_in_index",
                table.sql_name()
            ))?
            .into_iter()
            .flat_map(texts)
            .map(name)
            .collect::<Result<Vec<_>, _>>()?;
        let schema = TableSchema::new(fields, &key).map_err(|e| foreign(e.to_string()))?;
        Ok(Some(schema))
    }

    fn rows(
        &mut self,
        table: &TableRef,
        schema: &TableSchema,
        keys: &[&[Value]],
    ) -> Step<Vec<Vec<Value>>> {
        let list = |names: &mut dyn Iterator<Item = &Field>| {
            names
                .map(|f| format!("\"{}\"", f.name))
                .collect::<Vec<_>>()
                .join(",")
        };
        let select = format!(
            "SELECT {} FROM {} WHERE ({}) IN (",
            list(&mut schema.fields().iter()),
            table.sql_name(),
            list(&mut schema.key_fields())
        );
        let tuples = keys.iter().map(|key| {
            let parts: Vec<String> = key.iter().map(statement::literal).collect();
            format!("({})", parts.join(","))
        });
        let mut found = Vec::new();
        for batch in batches(tuples, ',') {
            for row in self.query(&format!("{select}{batch})"))? {
                found.push(decode(row, table, schema)?);
            }
        }
        Ok(found)
    }

    fn has_rows(&mut self, table: &TableRef) -> Step<bool> {
        let sql = format!("SELECT 1 FROM {} LIMIT 1", table.sql_name());
        Ok(!self.query(&sql)?.is_empty())
    }

    fn write(&mut self, statements: &[String]) -> Step<()> {
        for batch in batches(statements.iter(), ';') {
            self.run(&batch)?;
        }
        Ok(())
    }

    fn append(&mut self, statements: &[String]) -> Step<Seq> {
        let insert = format!("INSERT INTO {LEDGER_TABLE} (statement) VALUES ");
        let tuples: Vec<String> = statements
            .iter()
            .map(|text| format!("({})", statement::literal(&Value::text(text.as_str()))))
            .collect();
        // The last one alone: the server tells the first sequence of an INSERT, and steps between
        // sequences differ from cluster to cluster.
        if let Some((last, before)) = tuples.split_last() {
            for batch in batches(before.iter(), ',') {
                self.run(&format!("{insert}{batch}"))?;
            }
            let sql = format!("{insert}{last}");
            let seq = self
                .session
                .run(async |conn| {
                    execute(conn, &sql).await?;
                    Ok(conn.last_insert_id())
                })
                .map_err(|e| self.error(e))?;
            self.last_appended = Seq::new(seq.unwrap_or(0));
        }
        Ok(self.last_appended)
    }

    fn define(&mut self, table: &TableRef, definition: &Definition<'_>) -> Step<()> {
        let (sql, undo) = match definition {
            Definition::Create(schema) => {
                let columns = schema
                    .fields()
                    .iter()
                    .map(|f| format!("\"{}\" {}", f.name, f.ty.mysql_type()));
                let text = statement::create_text(table, schema, columns);
                let collation = self.collation()?;
                (
                    format!(
                        "{text} ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE {collation}"
                    ),
                    format!("DROP TABLE {}", table.sql_name()),
                )
            }
            Definition::Add(field) => (
                format!(
                    "ALTER TABLE {} ADD COLUMN \"{}\" {}",
                    table.sql_name(),
                    field.name,
                    field.ty.mysql_type()
                ),
                format!(
                    "ALTER TABLE {} DROP COLUMN \"{}\"",
                    table.sql_name(),
                    field.name
                ),
            ),
        };
        // Connected before, and run once: DDL must not be repeated blindly.
        let made = self
            .ddl
            .run_again(async |conn| execute(conn, "DO 0").await)
            .and_then(|()| self.ddl.run(async |conn| execute(conn, &sql).await));
        made.map_err(|e| self.error(e))?;
        self.defined.push(Defined {
            undo,
            seq: self.last_appended,
        });
        Ok(())
    }
}

/// Joins texts with a separator into batches of at most [`BATCH_BYTES`], or of one longer text.
fn batches<T: AsRef<str>>(texts: impl Iterator<Item = T>, separator: char) -> Vec<String> {
    let mut batches: Vec<String> = Vec::new();
    for text in texts {
        let text = text.as_ref();
        match batches.last_mut() {
            Some(batch) if batch.len() + text.len() < BATCH_BYTES => {
                batch.push(separator);
                batch.push_str(text);
            }
            _ => batches.push(text.to_owned()),
        }
    }
    batches
}

/// The columns of a row as text; NULL as the empty string.
fn texts(row: Row) -> Vec<String> {
    row.unwrap_raw()
        .into_iter()
        .map(|column| match column {
            Some(Column::Bytes(bytes)) => String::from_utf8_lossy(&bytes).into_owned(),
            _ => String::new(),
        })
        .collect()
}

/// A row of the text protocol as the LDB holds it.
fn decode(row: Row, table: &TableRef, schema: &TableSchema) -> Step<Vec<Value>> {
    schema
        .fields()
        .iter()
        .zip(row.unwrap_raw())
        .map(|(field, column)| {
            let bytes = match column {
                None | Some(Column::NULL) => return Ok(Value::Null),
                Some(Column::Bytes(bytes)) => bytes,
                Some(other) => other.as_sql(true).into_bytes(),
            };
            let number = || std::str::from_utf8(&bytes).unwrap_or("");
            let value = match field.ty {
                FieldType::Integer => number().parse().ok().map(Value::Integer),
                FieldType::Decimal => number().parse().ok().map(Value::Real),
                FieldType::String | FieldType::Text if !bytes.contains(&0) => {
                    Some(Value::Text(bytes))
                }
                _ => Some(Value::Blob(bytes)),
            };
            value.ok_or_else(|| {
                ExecutiveError::ForeignTable {
                    table: table.clone(),
                    reason: format!(
                        "field {} holds something that is no {}",
                        field.name, field.ty
                    ),
                }
                .into()
            })
        })
        .collect()
}
