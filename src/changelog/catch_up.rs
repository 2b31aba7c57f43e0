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
    let found = reader.tables_since(from)?;
    let (catalog, lost) = found.value;
    if lost {
        // The table is gone, and its rows with it.
        take(Missed::Unknown)?;
    }
    for table in catalog.tables() {
        // Read after the position: of it or later, so nothing up to there is missing.
        if reader.table_mark(table)?.value.seq <= from {
            continue;
        }
        let told = Told::of(&reader.journal(table)?.value, table, from).unwrap_or(Told::NOTHING);
        if told.unknown {
            take(Missed::Unknown)?;
        }
        for line in &told.lines {
            take(Missed::Row(line))?;
        }
        if told.all {
            let mut result = Ok(());
            each_row(reader, table, |line| {
                result = take(Missed::Row(&line));
                result.is_ok()
            })?;
            result?;
        }
    }
    Ok(found.seq)
}

/// Hands `take` the line of every row that there is, until it returns false.
pub(super) fn each_row(
    reader: &mut Reader,
    table: &Table,
    mut take: impl FnMut(Line) -> bool,
) -> rusqlite::Result<()> {
    let key = table.schema.key();
    reader.scan(
        table,
        |_| true,
        |values| {
            let key: Vec<_> = key
                .iter()
                .filter_map(|index| values.get(*index).cloned())
                .collect();
            take(Line::new(table, &key))
        },
    )?;
    Ok(())
}

/// What a table's journal tells.
struct Told {
    /// The rows that changed, as far as they are listed.
    lines: Vec<Line>,
    /// Whether every row that is there may have changed.
    all: bool,
    /// Whether rows may have gone that are not listed.
    unknown: bool,
}

impl Told {
    const NOTHING: Told = Told {
        lines: Vec::new(),
        all: true,
        unknown: true,
    };

    /// What it tells behind `from`; `None` if that is not all.
    fn of(journal: &[u8], table: &Table, from: Seq) -> Option<Self> {
        let mut lines = journal.split(|b| *b == b'\n').filter(|l| !l.is_empty());
        let header: Json = serde_json::from_slice(lines.next()?).ok()?;
        if header["floor"].as_u64()? > from.get() {
            return None;
        }
        let mut told = Told {
            lines: Vec::new(),
            all: false,
            unknown: false,
        };
        for line in lines {
            let line: Json = serde_json::from_slice(line).ok()?;
            if line["seq"].as_u64()? <= from.get() {
                continue;
            }
            let counted = line["rows"].is_u64();
            told.all |= counted;
            told.unknown |= counted;
            for event in line["events"].as_array().into_iter().flatten() {
                match event.as_str()? {
                    // There was nothing before, and rows that went are listed or counted.
                    "created" | "cleared" => {}
                    "altered" => told.all = true,
                    _ => told.unknown = true,
                }
            }
            for change in line["changes"].as_array().into_iter().flatten() {
                let key = change["key"].as_array()?;
                told.lines.push(Line::of_json(table, key));
            }
        }
        Some(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Field, FieldType, TableSchema};

    fn told(lines: &str, from: u64) -> Option<(usize, bool, bool)> {
        let field = Field {
            name: "id".parse().unwrap(),
            ty: FieldType::Integer,
        };
        let key = ["id".parse().unwrap()];
        let table = Table {
            name: "app/items".parse().unwrap(),
            schema: TableSchema::new(vec![field], &key).unwrap(),
        };
        let told = Told::of(lines.as_bytes(), &table, Seq::new(from))?;
        Some((told.lines.len(), told.all, told.unknown))
    }

    #[test]
    fn a_journal_says_how_much_it_tells() {
        let row = r#"{"seq":5,"changes":[{"key":[1]},{"key":[2]}]}"#;
        for (lines, from, expected) in [
            (
                format!("{{\"floor\":4}}\n{row}\n"),
                4,
                Some((2, false, false)),
            ),
            (
                format!("{{\"floor\":4}}\n{row}\n"),
                5,
                Some((0, false, false)),
            ),
            (format!("{{\"floor\":4}}\n{row}\n"), 3, None),
            (
                format!("{{\"floor\":0}}\n{{\"seq\":3,\"events\":[\"created\"]}}\n{row}\n"),
                0,
                Some((2, false, false)),
            ),
            (
                "{\"floor\":0}\n{\"seq\":3,\"events\":[\"altered\"]}\n".into(),
                0,
                Some((0, true, false)),
            ),
            (
                "{\"floor\":0}\n{\"seq\":3,\"rows\":5000}\n".into(),
                0,
                Some((0, true, true)),
            ),
            (
                "{\"floor\":0}\n{\"seq\":3,\"events\":[\"dropped\",\"created\"]}\n".into(),
                0,
                Some((0, false, true)),
            ),
            ("nonsense".into(), 0, None),
        ] {
            assert_eq!(told(&lines, from), expected, "{lines}");
        }
    }
}
