//! The central database on a MySQL or MariaDB server.
//!
//! DDL cannot be part of a transaction here: it is done before the entry that says so is
//! committed, and stays if that never happens. So every field carries its entry's sequence in a
//! comment, and one whose entry the ledger does not have is a leftover: no field to anybody, and
//! removed before it is made again.

use std::collections::HashSet;

use mysql_async::prelude::Queryable;
use mysql_async::{Row, Value as Column};

use super::central::{Central, Definition, LOCK, LOCK_ROW, Step, StepError, TABLES};
use super::{ExecutiveError, check};
use crate::ledger::session::{Purpose, Session, SessionError, answer, execute};
use crate::ledger::{LEDGER_TABLE, MySqlUrl, OriginError, statement};
use crate::model::{FamilyName, Field, FieldName, FieldType, Seq, TableRef, TableSchema, Value};

/// The bytes of statements that go to the server at once; a single statement may be longer.
const BATCH_BYTES: usize = 1 << 20;

/// What a field's comment begins with; the sequence of its ledger entry follows.
const MARK: &str = "ctlfs ledger ";

/// A database on a server. Connects when it is first needed.
pub(super) struct MySqlCentral {
    session: Session,
    /// MySQL commits before and after DDL, so it runs beside the transaction.
    ddl: Session,
    /// What removes the leftovers that the open transaction came upon.
    leftovers: Vec<(TableRef, String)>,
    last_appended: Seq,
    collation: Option<&'static str>,
}

impl MySqlCentral {
    pub(super) fn new(url: &MySqlUrl) -> Result<Self, OriginError> {
        Ok(MySqlCentral {
            session: Session::new(url, Purpose::Write)?,
            ddl: Session::new(url, Purpose::Write)?,
            leftovers: Vec::new(),
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

    /// Those of the sequences, from the fields' comments, whose ledger entries never came to be.
    fn uncommitted(&mut self, table: &TableRef, mut seqs: Vec<Seq>) -> Step<Vec<Seq>> {
        seqs.sort_unstable();
        seqs.dedup();
        if seqs.is_empty() {
            return Ok(seqs);
        }
        let list: Vec<String> = seqs.iter().map(Seq::to_string).collect();
        let name = table.sql_name();
        // By its text too: after a crash some servers give a sequence again.
        let entries = self.query(&format!(
            "SELECT seq FROM {LEDGER_TABLE} WHERE seq IN ({}) AND \
             (statement LIKE 'CREATE TABLE %{name} %' OR statement LIKE 'ALTER TABLE %{name} %')",
            list.join(",")
        ))?;
        let entries: Vec<String> = entries.into_iter().flat_map(texts).collect();
        seqs.retain(|seq| !entries.contains(&seq.to_string()));
        if !seqs.is_empty() {
            // Older entries may have been removed from a ledger that was shortened.
            let first = self.query(&format!("SELECT MIN(seq) FROM {LEDGER_TABLE}"))?;
            let first = first.into_iter().flat_map(texts).next();
            if let Some(first) = first.and_then(|text| text.parse().ok()).map(Seq::new) {
                seqs.retain(|seq| *seq >= first);
            }
        }
        Ok(seqs)
    }

    /// The error for a table whose collation finds rows of other keys.
    fn confused(&mut self, table: &TableRef) -> Step<ExecutiveError> {
        let collations = self.query(&format!(
            "SELECT DISTINCT collation_name FROM information_schema.columns \
             WHERE table_schema = DATABASE() AND table_name = '{}' AND column_key = 'PRI' \
             AND collation_name IS NOT NULL",
            table.sql_name()
        ))?;
        let collations: Vec<String> = collations.into_iter().flat_map(texts).collect();
        Ok(ExecutiveError::Collation {
            table: table.clone(),
            collation: collations.join(", "),
        })
    }

    /// Whether a query has a row. Outside the transaction, which would lock the table against DDL.
    fn finds(&mut self, sql: &str) -> Step<bool> {
        let row: Option<Row> = self
            .ddl
            .run_again(async |conn| answer(conn.query_first(sql)).await)
            .map_err(|e| self.error(e))?;
        Ok(row.is_some())
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

/// A COMMIT's error. The server's own no says that nothing was written; anything else leaves that
/// open.
fn commit_failed(error: SessionError, origin: &str) -> StepError {
    if error.is_refusal() {
        return explain(error, origin);
    }
    let reason = match error.into_origin(origin.to_owned()) {
        OriginError::Unreachable { reason, .. } | OriginError::Failed { reason, .. } => reason,
        other => other.to_string(),
    };
    ExecutiveError::CommitUnknown {
        origin: origin.to_owned(),
        reason,
    }
    .into()
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
        self.leftovers.clear();
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
        self.session
            .run(async |conn| execute(conn, "COMMIT").await)
            .map_err(|e| commit_failed(e, self.session.origin()))
    }

    fn rollback(&mut self) {
        if self.session.is_connected() && self.run("ROLLBACK").is_err() {
            self.session.drop_connection();
        }
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
            "SELECT column_name, column_type, column_comment FROM information_schema.columns \
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
        let columns: Vec<[String; 3]> = columns
            .into_iter()
            .filter_map(|row| texts(row).try_into().ok())
            .collect();
        let marks = columns.iter().filter_map(|[.., comment]| marked(comment));
        let uncommitted = self.uncommitted(table, marks.collect())?;
        let is_leftover =
            |comment: &str| marked(comment).is_some_and(|seq| uncommitted.contains(&seq));
        let sql_name = table.sql_name();
        // Nobody can have written to a leftover: what holds something is none.
        if columns.iter().all(|[.., comment]| is_leftover(comment))
            && !self.finds(&format!("SELECT 1 FROM {sql_name} LIMIT 1"))?
        {
            self.leftovers
                .push((table.clone(), format!("DROP TABLE {sql_name}")));
            return Ok(None);
        }
        let mut fields = Vec::with_capacity(columns.len());
        for [field, ty, comment] in columns {
            let field: FieldName = name(field)?;
            if is_leftover(&comment)
                && !self.finds(&format!(
                    "SELECT 1 FROM {sql_name} WHERE \"{field}\" IS NOT NULL LIMIT 1"
                ))?
            {
                let remove = format!("ALTER TABLE {sql_name} DROP COLUMN \"{field}\"");
                self.leftovers.push((table.clone(), remove));
                continue;
            }
            fields.push(Field {
                name: field,
                ty: FieldType::from_sqlite(&ty),
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
        let asked: HashSet<&[Value]> = keys.iter().copied().collect();
        let mut found = Vec::new();
        for batch in batches(tuples, ',') {
            for row in self.query(&format!("{select}{batch})"))? {
                let row = decode(row, table, schema)?;
                if !asked.contains(check::key_of(schema, &row).as_slice()) {
                    return Err(self.confused(table)?.into());
                }
                found.push(row);
            }
        }
        Ok(found)
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
        let mark = format!("COMMENT '{MARK}{}'", self.last_appended);
        let column = |f: &Field, ty: &str| -> String { format!("\"{}\" {ty} {mark}", f.name) };
        let sql = match definition {
            Definition::Create(schema) => {
                let columns = schema.fields().iter();
                let columns = columns.map(|f| column(f, f.ty.mysql_type()));
                let text = statement::create_text(table, schema, columns);
                let collation = self.collation()?;
                format!("{text} ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE {collation}")
            }
            Definition::Add(field) => format!(
                "ALTER TABLE {} ADD COLUMN {}",
                table.sql_name(),
                column(field, field.ty.mysql_type())
            ),
        };
        // Connected before, and run once: DDL must not be repeated blindly.
        self.ddl
            .run_again(async |conn| execute(conn, "DO 0").await)
            .map_err(|e| self.error(e))?;
        let leftovers = std::mem::take(&mut self.leftovers);
        let leftovers = leftovers.into_iter().filter(|(of, _)| of == table);
        for sql in leftovers.map(|(_, remove)| remove).chain([sql]) {
            self.ddl
                .run(async |conn| execute(conn, &sql).await)
                .map_err(|e| self.error(e))?;
        }
        Ok(())
    }
}

/// The ledger sequence in a field's comment; `None` for fields that others made.
fn marked(comment: &str) -> Option<Seq> {
    comment.strip_prefix(MARK)?.parse().ok().map(Seq::new)
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

#[cfg(test)]
mod tests {
    use mysql_async::{Error, ServerError};

    use super::*;

    #[test]
    fn only_a_refused_commit_is_known_not_to_have_happened() {
        let says = |code| {
            let error = Error::Server(ServerError {
                code,
                message: "why".into(),
                state: "HY000".into(),
            });
            commit_failed(SessionError::Database(error), "mysql://db/ctldb")
        };
        let is_unknown = |e| matches!(e, StepError::Failed(ExecutiveError::CommitUnknown { .. }));
        // Shutdown, connection aborted, query interrupted, connection killed, idle for too long.
        for code in [1053, 1152, 1317, 1927, 4031] {
            assert!(is_unknown(says(code)), "{code}");
        }
        assert!(matches!(says(1213), StepError::Conflict(_)));
        for code in [1030, 1114, 1290] {
            assert!(!is_unknown(says(code)), "{code}");
        }
        for lost in [SessionError::Silent, SessionError::Gone] {
            assert!(is_unknown(commit_failed(lost, "mysql://db/ctldb")));
        }
    }
}
