//! Whole tables as one file: which files there are, and their bytes. Pure: rows come in from
//! outside, in key order, one at a time.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::render;
use crate::model::{FieldType, TableName, TableSchema, Value};

/// The directories of `.ctlfs` in which a table is a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Collection {
    /// `export`: the rows as they are.
    Export,
    /// `changes`: what happened to them lately.
    Changes,
}

impl Collection {
    /// Both.
    pub const ALL: [Collection; 2] = [Collection::Export, Collection::Changes];

    /// The directory's name.
    pub fn name(self) -> &'static str {
        match self {
            Collection::Export => "export",
            Collection::Changes => "changes",
        }
    }
}

/// A form that the rows of a table are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// The lines of `row.json`.
    Ndjson,
    /// One JSON array.
    Json,
    /// RFC 4180.
    Csv,
    /// Assignments, for `sh` and for systemd's EnvironmentFile.
    Env,
}

/// A file that shows a table as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExportFile {
    /// Its rows.
    Rows(Format),
    /// What happened to them lately.
    Changes,
}

impl ExportFile {
    /// All of them.
    pub const ALL: [ExportFile; 5] = [
        ExportFile::Rows(Format::Ndjson),
        ExportFile::Rows(Format::Json),
        ExportFile::Rows(Format::Csv),
        ExportFile::Rows(Format::Env),
        ExportFile::Changes,
    ];

    /// Where the file is.
    pub fn collection(self) -> Collection {
        match self {
            ExportFile::Rows(_) => Collection::Export,
            ExportFile::Changes => Collection::Changes,
        }
    }

    /// The file's name for a table. Names of tables have no dot.
    pub fn name(self, table: &TableName) -> String {
        let extension = match self {
            ExportFile::Rows(Format::Ndjson) | ExportFile::Changes => "ndjson",
            ExportFile::Rows(Format::Json) => "json",
            ExportFile::Rows(Format::Csv) => "csv",
            ExportFile::Rows(Format::Env) => "env",
        };
        format!("{}.{extension}", table.as_str())
    }

    /// Whether tables of this shape have the file: assignments take two fields, one being the key.
    pub fn suits(self, schema: &TableSchema) -> bool {
        match self {
            ExportFile::Rows(Format::Env) => schema.fields().len() == 2 && schema.key().len() == 1,
            _ => true,
        }
    }
}

/// Writes the rows of one table in one format.
pub struct Writer<'a> {
    schema: &'a TableSchema,
    format: Format,
    bytes: Vec<u8>,
    empty: bool,
    /// Assignments that were left out: for their name, for being NULL, for a NUL byte.
    left_out: [u64; 3],
}

impl<'a> Writer<'a> {
    /// Nothing written yet but what stands before the first row.
    pub fn new(schema: &'a TableSchema, format: Format) -> Self {
        let mut bytes = Vec::new();
        match format {
            Format::Json => bytes.push(b'['),
            Format::Csv => {
                let names = schema.fields().iter().map(|f| f.name.as_str().as_bytes());
                // [a-z0-9_] only: nothing to quote.
                bytes.extend(names.collect::<Vec<_>>().join(&b','));
                bytes.extend_from_slice(b"\r\n");
            }
            Format::Ndjson | Format::Env => {}
        }
        Writer {
            schema,
            format,
            bytes,
            empty: true,
            left_out: [0; 3],
        }
    }

    /// How many bytes there are so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Writes a row: its values in the schema's order.
    pub fn row(&mut self, values: &[Value]) {
        match self.format {
            Format::Ndjson => {
                let line = render::row_json(self.schema, values);
                self.bytes.extend_from_slice(&line);
            }
            Format::Json => {
                let separator: &[u8] = if self.empty { b"\n" } else { b",\n" };
                self.bytes.extend_from_slice(separator);
                let line = render::row_json(self.schema, values);
                let line = line.strip_suffix(b"\n").unwrap_or(&line);
                self.bytes.extend_from_slice(line);
            }
            Format::Csv => self.record(values),
            Format::Env => self.assignment(values),
        }
        self.empty = false;
    }

    /// The whole file.
    pub fn finish(mut self) -> Vec<u8> {
        match self.format {
            Format::Json if self.empty => self.bytes.extend_from_slice(b"]\n"),
            Format::Json => self.bytes.extend_from_slice(b"\n]\n"),
            Format::Env => self.remark(),
            Format::Ndjson | Format::Csv => {}
        }
        self.bytes
    }

    fn record(&mut self, values: &[Value]) {
        for (i, field) in self.schema.fields().iter().enumerate() {
            if i > 0 {
                self.bytes.push(b',');
            }
            // NULL is nothing at all, the empty string a pair of quotes.
            if let Some(value) = values.get(i)
                && let Some(text) = text_of(field.ty, value)
            {
                push_csv(&mut self.bytes, &text);
            }
        }
        self.bytes.extend_from_slice(b"\r\n");
    }

    fn assignment(&mut self, values: &[Value]) {
        let [bad_name, null, nul] = &mut self.left_out;
        let Some(key) = self.schema.key().first().copied() else {
            return;
        };
        let name = match values.get(key) {
            Some(Value::Text(name)) if is_shell_name(name) => name,
            _ => {
                *bad_name += 1;
                return;
            }
        };
        let field = self.schema.fields().get(1 - key.min(1));
        let value = values.get(1 - key.min(1));
        let Some(text) = field.zip(value).and_then(|(f, v)| text_of(f.ty, v)) else {
            *null += 1;
            return;
        };
        if text.contains(&0) {
            *nul += 1;
            return;
        }
        self.bytes.extend_from_slice(name);
        self.bytes.push(b'=');
        push_shell(&mut self.bytes, &text);
        self.bytes.push(b'\n');
    }

    /// Says in a comment what was left out, if anything was.
    fn remark(&mut self) {
        let why = [
            "whose key is no shell name",
            "with NULL",
            "whose value has a NUL byte",
        ];
        for (count, why) in self.left_out.into_iter().zip(why) {
            if count > 0 {
                let rows = if count == 1 { "row" } else { "rows" };
                let remark = format!("# left out: {count} {rows} {why}\n");
                self.bytes.extend_from_slice(remark.as_bytes());
            }
        }
    }
}

/// A value as text, as `row.json` has it but without its quotes; numbers as in field files. `None`
/// for NULL.
fn text_of(ty: FieldType, value: &Value) -> Option<Cow<'_, [u8]>> {
    let base64 = |bytes: &[u8]| Cow::Owned(STANDARD.encode(bytes).into_bytes());
    let as_base64 = matches!(ty, FieldType::Binary | FieldType::Bytestring);
    match value {
        Value::Null | Value::Integer(_) | Value::Real(_) => render::field_bytes(ty, value, false),
        Value::Text(bytes) | Value::Blob(bytes) if as_base64 => Some(base64(bytes)),
        Value::Text(bytes) => Some(match String::from_utf8_lossy(bytes) {
            Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
            Cow::Owned(text) => Cow::Owned(text.into_bytes()),
        }),
        Value::Blob(bytes) => Some(match std::str::from_utf8(bytes) {
            Ok(text) => Cow::Borrowed(text.as_bytes()),
            Err(_) => base64(bytes),
        }),
    }
}

fn push_csv(out: &mut Vec<u8>, text: &[u8]) {
    let special = |b: &u8| matches!(b, b'"' | b',' | b'\r' | b'\n');
    if !text.is_empty() && !text.iter().any(special) {
        out.extend_from_slice(text);
        return;
    }
    out.push(b'"');
    for byte in text {
        if *byte == b'"' {
            out.push(b'"');
        }
        out.push(*byte);
    }
    out.push(b'"');
}

fn is_shell_name(name: &[u8]) -> bool {
    let first = name.first().is_some_and(|b| !b.is_ascii_digit());
    first && name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_')
}

/// A value as both `sh` and systemd read it back: bare where no byte means anything to either, else
/// in single quotes. A single quote itself stands between double quotes: systemd takes `\'` behind
/// a quoted part for the beginning of a bare one, and quotes within that for themselves.
fn push_shell(out: &mut Vec<u8>, text: &[u8]) {
    let safe = |b: &u8| b.is_ascii_alphanumeric() || b"_./:@%+,=-".contains(b);
    if !text.is_empty() && text.iter().all(safe) {
        out.extend_from_slice(text);
        return;
    }
    out.push(b'\'');
    for byte in text {
        match byte {
            b'\'' => out.extend_from_slice(b"'\"'\"'"),
            byte => out.push(*byte),
        }
    }
    out.push(b'\'');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Field;

    fn schema(fields: &[(&str, FieldType)], key: &[&str]) -> TableSchema {
        let fields = fields.iter().map(|(name, ty)| Field {
            name: name.parse().unwrap(),
            ty: *ty,
        });
        let key: Vec<_> = key.iter().map(|k| k.parse().unwrap()).collect();
        TableSchema::new(fields.collect(), &key).unwrap()
    }

    fn written(schema: &TableSchema, format: Format, rows: &[Vec<Value>]) -> String {
        let mut writer = Writer::new(schema, format);
        rows.iter().for_each(|row| writer.row(row));
        String::from_utf8(writer.finish()).unwrap()
    }

    #[test]
    fn exports_by_example() {
        use FieldType::{Binary, Decimal, Integer, String, Text};
        let schema = schema(
            &[
                ("name", String),
                ("n", Integer),
                ("d", Decimal),
                ("t", Text),
                ("b", Binary),
            ],
            &["name"],
        );
        let rows = [
            vec![
                Value::text("a"),
                Value::Integer(i64::MIN),
                Value::Real(1.0),
                Value::text("say \"hi\",\nthen go"),
                Value::Blob(vec![0, 255]),
            ],
            vec![
                Value::text(""),
                Value::Null,
                Value::Null,
                Value::text(""),
                Value::Null,
            ],
        ];
        assert_eq!(
            written(&schema, Format::Csv, &rows),
            "name,n,d,t,b\r\na,-9223372036854775808,1,\"say \"\"hi\"\",\nthen go\",AP8=\r\n\
             \"\",,,\"\",\r\n"
        );
        let [first, second] = rows
            .each_ref()
            .map(|row| std::string::String::from_utf8(render::row_json(&schema, row)).unwrap());
        assert_eq!(
            written(&schema, Format::Ndjson, &rows),
            format!("{first}{second}")
        );
        assert_eq!(
            written(&schema, Format::Json, &rows),
            format!("[\n{},\n{}\n]\n", first.trim_end(), second.trim_end())
        );
        assert_eq!(written(&schema, Format::Json, &[]), "[]\n");
        assert_eq!(written(&schema, Format::Ndjson, &[]), "");
        assert_eq!(written(&schema, Format::Csv, &[]), "name,n,d,t,b\r\n");
    }

    #[test]
    fn assignments_by_example() {
        let schema = schema(
            &[("value", FieldType::Text), ("name", FieldType::String)],
            &["name"],
        );
        let row = |name: &str, value: &str| vec![Value::text(value), Value::text(name)];
        let rows = [
            row("PATH", "/bin:/usr/bin"),
            row("_x9", "it's $HOME"),
            row("EMPTY", ""),
            row("9x", "no name"),
            row("a-b", "no name"),
            row("NUL", "a\0b"),
            vec![Value::Null, Value::text("NULL")],
        ];
        assert_eq!(
            written(&schema, Format::Env, &rows),
            "PATH=/bin:/usr/bin\n_x9='it'\"'\"'s $HOME'\nEMPTY=''\n\
             # left out: 2 rows whose key is no shell name\n# left out: 1 row with NULL\n\
             # left out: 1 row whose value has a NUL byte\n"
        );
    }

    #[test]
    fn assignments_are_for_a_key_and_its_value_only() {
        use FieldType::{Integer, String};
        let env = ExportFile::Rows(Format::Env);
        let suits = |fields: &[(&str, FieldType)], key: &[&str]| env.suits(&schema(fields, key));
        assert!(suits(&[("a", String), ("b", Integer)], &["a"]));
        assert!(suits(&[("a", Integer), ("b", String)], &["b"]));
        assert!(!suits(&[("a", String)], &["a"]));
        assert!(!suits(&[("a", String), ("b", Integer)], &["a", "b"]));
        assert!(!suits(
            &[("a", String), ("b", Integer), ("c", Integer)],
            &["a"]
        ));
    }
}
