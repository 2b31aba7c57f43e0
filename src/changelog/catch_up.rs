//! What a change log has missed, read from the LDB: from its journal as far as that reaches, and
//! otherwise every row that there is of the tables that have changed.

use serde_json::Value as Json;

use super::line::Line;
use crate::ldb::reader::Reader;
use crate::model::{Seq, Table};

/// Something that was missed.
pub(super) enum Missed<'a> {
    /// A row that may have changed.
    Row(&'a Line),
    /// Rows may have gone that nothing tells of any more.
    Unknown,
}

/// Hands `take` every row that may have changed behind `from`, table by table; more rows than that
/// are harmless. Returns up to which entry of the ledger that is all.
pub(super) fn read<E: From<rusqlite::Error>>(
    reader: &mut Reader,
    from: Seq,
    mut take: impl FnMut(Missed<'_>) -> Result<(), E>,
) -> Result<Seq, E> {
    let catalog = reader.catalog()?;
    let shown = |name: &str| catalog.value.tables().any(|t| t.name.sql_name() == name);
    if reader
        .journaled_tables(from)?
        .iter()
        .any(|name| !shown(name))
    {
        // It is gone, and its rows with it.
        take(Missed::Unknown)?;
    }
    for table in catalog.value.tables() {
        // Read after the position: of it or later, so nothing up to there is missing.
        if reader.table_mark(table)?.value.seq <= from {
            continue;
        }
        match journaled(&reader.journal(table)?.value, table, from) {
            Some(lines) => {
                for line in &lines {
                    take(Missed::Row(line))?;
                }
            }
            None => {
                take(Missed::Unknown)?;
                let mut result = Ok(());
                let key: Vec<usize> = table.schema.key().to_vec();
                reader.scan(
                    table,
                    |_| true,
                    |values| {
                        let key: Vec<_> = key
                            .iter()
                            .filter_map(|index| values.get(*index).cloned())
                            .collect();
                        result = take(Missed::Row(&Line::new(table, &key)));
                        result.is_ok()
                    },
                )?;
                result?;
            }
        }
    }
    Ok(catalog.seq)
}

/// The rows that a table's journal tells of behind `from`; `None` if it does not tell of them all.
fn journaled(journal: &[u8], table: &Table, from: Seq) -> Option<Vec<Line>> {
    let mut lines = journal.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    let header: Json = serde_json::from_slice(lines.next()?).ok()?;
    if header["floor"].as_u64()? > from.get() {
        return None;
    }
    let mut keys = Vec::new();
    for line in lines {
        let line: Json = serde_json::from_slice(line).ok()?;
        if line["seq"].as_u64()? <= from.get() {
            continue;
        }
        for change in line["changes"].as_array()? {
            keys.push(Line::of_json(table, change["key"].as_array()?));
        }
    }
    Some(keys)
}
