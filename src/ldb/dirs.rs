//! Which key directories came or went with the rows of a batch.

use std::collections::HashMap;

use rusqlite::{Connection, params_from_iter};

use crate::model::{DirChange, Key, RowChange, RowKind, Table, Value};
use crate::sqlite::Bound;

/// The prefixes of the rows' keys that existed before the batch and no longer do, or the other way
/// round. `conn` shows the state after the batch.
pub(super) fn changed(
    conn: &Connection,
    table: &Table,
    rows: &[RowChange],
) -> rusqlite::Result<Vec<DirChange>> {
    let depth = table.schema.key().len();
    let mut dirs = Vec::new();
    for length in 1..depth {
        // How many rows came and went below each prefix.
        let mut counts: HashMap<&[Value], (i64, i64)> = HashMap::new();
        for row in rows {
            let Some(prefix) = row.key.get(..length) else {
                continue;
            };
            let count = match row.kind {
                RowKind::Created => (1, 0),
                RowKind::Deleted => (0, 1),
                RowKind::Updated => continue,
            };
            let sum = counts.entry(prefix).or_default();
            *sum = (sum.0 + count.0, sum.1 + count.1);
        }
        let condition: Vec<_> = table
            .schema
            .key_fields()
            .take(length)
            .enumerate()
            .map(|(i, field)| format!("\"{}\" IS ?{}", field.name, i + 1))
            .collect();
        let mut count = conn.prepare_cached(&format!(
            "SELECT count(*) FROM (SELECT 1 FROM main.\"{}\" WHERE {} LIMIT ?{})",
            table.name.sql_name(),
            condition.join(" AND "),
            length + 1
        ))?;
        for (prefix, (created, deleted)) in counts {
            // One more than came is enough to know that one was there before.
            let limit = Value::Integer(created + 1);
            let values = prefix.iter().chain(std::iter::once(&limit)).map(Bound);
            let after: i64 = count.query_row(params_from_iter(values), |row| row.get(0))?;
            let (before, exists) = (deleted > 0 || after > created, after > 0);
            if before != exists {
                dirs.push(DirChange {
                    prefix: Key::from(prefix),
                    exists,
                });
            }
        }
    }
    Ok(dirs)
}
