//! Follows a ledger statement that created, altered or dropped a table: keeps the tables of the
//! rows' last changes beside their config tables, and tells which tables changed.

use std::collections::BTreeSet;

use rusqlite::Connection;

use super::rows_table;
use super::writer::create_row_table;
use crate::model::TableRef;

/// The tables of the database at one moment.
pub(super) struct Shape(BTreeSet<String>);

impl Shape {
    /// As it is now.
    pub(super) fn of(conn: &Connection) -> rusqlite::Result<Self> {
        conn.prepare_cached("SELECT name FROM main.sqlite_schema WHERE type = 'table'")?
            .query_map([], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()
            .map(Shape)
    }
}

/// Compares with the shape `before` the statement that reshaped the tables `named`. Returns the
/// changed config tables; or, as the inner error, what the statement must not have done.
pub(super) fn follow(
    conn: &Connection,
    before: &Shape,
    named: &[String],
) -> rusqlite::Result<Result<BTreeSet<TableRef>, String>> {
    let after = Shape::of(conn)?;
    let appeared: Vec<&String> = after.0.difference(&before.0).collect();
    let vanished: Vec<&String> = before.0.difference(&after.0).collect();
    for name in &appeared {
        if TableRef::from_sql_name(name).is_none() {
            return Ok(Err(format!(
                "it would make a table {name}; ledger statements may only make tables that are \
                 called family___table, in lower case"
            )));
        }
    }
    match (&*vanished, &*appeared) {
        ([old], [new]) => {
            // A rename. The rows keep their rowids.
            let (old, new) = (rows_table(old), rows_table(new));
            conn.execute_batch(&format!("DROP TABLE IF EXISTS main.\"{new}\""))?;
            if after.0.contains(&old) {
                conn.execute_batch(&format!("ALTER TABLE main.\"{old}\" RENAME TO \"{new}\""))?;
            }
        }
        _ => {
            for name in vanished.iter().chain(&appeared) {
                let rows = rows_table(name);
                conn.execute_batch(&format!("DROP TABLE IF EXISTS main.\"{rows}\""))?;
            }
        }
    }
    for name in &vanished {
        conn.execute("DELETE FROM _ctlfs_tables WHERE name = ?1", [name])?;
    }
    for name in &appeared {
        create_row_table(conn, name)?;
    }
    let altered = named.iter().filter(|name| after.0.contains(*name));
    Ok(Ok(vanished
        .into_iter()
        .chain(appeared)
        .chain(altered)
        .filter_map(|name| TableRef::from_sql_name(name))
        .collect()))
}
