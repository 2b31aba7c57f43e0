//! One line of a change log, as ctlstore writes it:
//! `{"seq":1,"family":"f","table":"t","key":[{"name":"id","type":"INTEGER","value":1}]}`. Pure.

use std::fmt::Write as _;

use serde_json::Value as Json;

use crate::model::{Table, Value};
use crate::tree::render;

/// A changed row, without the number that its line gets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Line(Box<str>);

impl Line {
    /// The row of `table` with this key.
    pub(super) fn new(table: &Table, key: &[Value]) -> Self {
        let values = table.schema.key_fields().zip(key).map(|(field, value)| {
            let mut json = Vec::new();
            render::push_value(&mut json, field.ty, value);
            // JSON is text.
            String::from_utf8_lossy(&json).into_owned()
        });
        Self::of(table, values)
    }

    /// The same with the key's values as the journal has them.
    pub(super) fn of_json(table: &Table, key: &[Json]) -> Self {
        Self::of(table, key.iter().map(Json::to_string))
    }

    fn of(table: &Table, values: impl Iterator<Item = String>) -> Self {
        // ctlstore lists the key's fields in the table's order, not in the key's.
        let mut key: Vec<_> = table.schema.key().iter().zip(values).collect();
        key.sort_by_key(|(index, _)| **index);
        let mut line = format!(
            ",\"family\":\"{}\",\"table\":\"{}\",\"key\":[",
            table.name.family, table.name.table
        );
        let fields = table.schema.fields();
        for (i, (index, value)) in key.into_iter().enumerate() {
            if let Some(field) = fields.get(*index) {
                let comma = if i > 0 { "," } else { "" };
                // Writing to a String does not fail.
                let _ = write!(
                    line,
                    "{comma}{{\"name\":\"{}\",\"type\":\"{}\",\"value\":{value}}}",
                    field.name,
                    field.ty.sqlite_type()
                );
            }
        }
        line.push_str("]}\n");
        Line(line.into())
    }

    /// Appends it with its number and a newline.
    pub(super) fn push(&self, out: &mut Vec<u8>, number: u64) {
        out.extend_from_slice(format!("{{\"seq\":{number}{}", self.0).as_bytes());
    }

    /// How many bytes it takes in memory, about.
    pub(super) fn size(&self) -> usize {
        self.0.len() + 32
    }
}

/// The number of a line.
pub(super) fn number_of(line: &[u8]) -> Option<u64> {
    serde_json::from_slice::<Json>(line).ok()?["seq"].as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Field, FieldType, TableSchema};

    #[test]
    fn lines_are_ctlstores() {
        let field = |name: &str, ty| Field {
            name: name.parse().unwrap(),
            ty,
        };
        let fields = vec![
            field("id", FieldType::Integer),
            field("note", FieldType::Text),
            field("name", FieldType::String),
            field("raw", FieldType::Bytestring),
        ];
        let key = ["raw", "name", "id"].map(|k| k.parse().unwrap());
        let table = Table {
            name: "app/flags".parse().unwrap(),
            schema: TableSchema::new(fields, &key).unwrap(),
        };
        let line = Line::new(
            &table,
            &[
                Value::Blob(vec![0, 255]),
                Value::text("it's \"so\""),
                Value::Integer(i64::MIN),
            ],
        );
        let mut text = Vec::new();
        line.push(&mut text, 7);
        assert_eq!(
            String::from_utf8(text.clone()).unwrap(),
            "{\"seq\":7,\"family\":\"app\",\"table\":\"flags\",\"key\":[\
             {\"name\":\"id\",\"type\":\"INTEGER\",\"value\":-9223372036854775808},\
             {\"name\":\"name\",\"type\":\"VARCHAR(191)\",\"value\":\"it's \\\"so\\\"\"},\
             {\"name\":\"raw\",\"type\":\"BLOB(255)\",\"value\":\"AP8=\"}]}\n"
        );
        assert_eq!(number_of(&text), Some(7));
        let json = serde_json::json!(["AP8=", "it's \"so\"", i64::MIN]);
        assert_eq!(Line::of_json(&table, json.as_array().unwrap()), line);
    }
}
