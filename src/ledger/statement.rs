//! The text of ledger statements, exactly as ctlstore writes it, and the head of a statement as a
//! log may show it.
//!
//! Pure text: nothing here runs a statement. The texts mean the same in SQLite and in a MySQL
//! session with `NO_BACKSLASH_ESCAPES,ANSI_QUOTES`.

use std::fmt::Write;

use super::{BEGIN_MARKER, COMMIT_MARKER};
use crate::model::{Field, TableRef, TableSchema, Value};

/// The longest head that [`head`] gives, in characters.
pub const MAX_HEAD: usize = 120;

/// `CREATE TABLE fam___tbl ("a" VARCHAR(191), …, PRIMARY KEY("a"));`, the only statement that ends
/// in a semicolon.
pub fn create_table(table: &TableRef, schema: &TableSchema) -> String {
    let columns = schema
        .fields()
        .iter()
        .map(|f| format!("\"{}\" {}", f.name, f.ty.sqlite_type()));
    format!("{};", create_text(table, schema, columns))
}

/// The statement that makes a table with these columns, without anything behind it.
pub(crate) fn create_text(
    table: &TableRef,
    schema: &TableSchema,
    columns: impl Iterator<Item = String>,
) -> String {
    let columns: Vec<String> = columns.collect();
    let key: Vec<String> = schema
        .key_fields()
        .map(|f| format!("\"{}\"", f.name))
        .collect();
    format!(
        "CREATE TABLE {} ({}, PRIMARY KEY({}))",
        table.sql_name(),
        columns.join(", "),
        key.join(",")
    )
}

/// `ALTER TABLE fam___tbl ADD COLUMN "c" TEXT`.
pub fn add_column(table: &TableRef, field: &Field) -> String {
    format!(
        "ALTER TABLE {} ADD COLUMN \"{}\" {}",
        table.sql_name(),
        field.name,
        field.ty.sqlite_type()
    )
}

/// `DROP TABLE IF EXISTS fam___tbl`.
pub fn drop_table(table: &TableRef) -> String {
    format!("DROP TABLE IF EXISTS {}", table.sql_name())
}

/// `DELETE FROM fam___tbl`: every row of the table.
pub fn clear(table: &TableRef) -> String {
    format!("DELETE FROM {}", table.sql_name())
}

/// `REPLACE INTO fam___tbl ("a","b") VALUES('x',1)`. `row` has a value for every field, in the
/// schema's order.
pub fn replace(table: &TableRef, schema: &TableSchema, row: &[Value]) -> String {
    let mut text = format!("REPLACE INTO {} (", table.sql_name());
    for (i, field) in schema.fields().iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        let _ = write!(text, "{comma}\"{}\"", field.name);
    }
    text.push_str(") VALUES(");
    for (i, value) in row.iter().enumerate() {
        if i > 0 {
            text.push(',');
        }
        push_literal(&mut text, value);
    }
    text.push(')');
    text
}

/// `DELETE FROM fam___tbl WHERE "k1" = 'x' AND "k2" = x'0102'`. `key` has a value for every key
/// field, in the key's order.
pub fn delete(table: &TableRef, schema: &TableSchema, key: &[Value]) -> String {
    let mut text = format!("DELETE FROM {}", table.sql_name());
    for (i, (field, value)) in schema.key_fields().zip(key).enumerate() {
        let word = if i == 0 { "WHERE" } else { "AND" };
        let _ = write!(text, " {word} \"{}\" = ", field.name);
        push_literal(&mut text, value);
    }
    text
}

/// A value as a literal. Text with a NUL byte (or that is not UTF-8) becomes a blob, as in
/// ctlstore: SQLite's text literals end at a NUL.
pub fn literal(value: &Value) -> String {
    let mut text = String::new();
    push_literal(&mut text, value);
    text
}

fn push_literal(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("NULL"),
        Value::Integer(i) => {
            let _ = write!(out, "{i}");
        }
        Value::Real(r) => push_decimal(out, *r),
        Value::Blob(bytes) => push_blob(out, bytes),
        Value::Text(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) if !bytes.contains(&0) => {
                out.reserve(text.len() + 2);
                out.push('\'');
                for (i, part) in text.split('\'').enumerate() {
                    if i > 0 {
                        out.push_str("''");
                    }
                    out.push_str(part);
                }
                out.push('\'');
            }
            _ => push_blob(out, bytes),
        },
    }
}

fn push_blob(out: &mut String, bytes: &[u8]) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    out.reserve(bytes.len() * 2 + 3);
    out.push_str("x'");
    for byte in bytes {
        out.push(char::from(HEX[usize::from(byte >> 4)]));
        out.push(char::from(HEX[usize::from(byte & 15)]));
    }
    out.push('\'');
}

/// The shortest digits that read back the same, without an exponent.
///
/// MySQL reads a number without an exponent as a DECIMAL of at most 65 digits, 30 of them behind
/// the point, and would store something else for what does not fit. Only such numbers, which
/// ctlstore cannot store either, get an exponent; both databases then read them as doubles. NaN
/// has no literal and becomes NULL, and so do infinities; writers refuse them before.
fn push_decimal(out: &mut String, value: f64) {
    if !value.is_finite() {
        out.push_str("NULL");
        return;
    }
    let start = out.len();
    let _ = write!(out, "{value}");
    let (whole, fraction) = match out[start..].split_once('.') {
        Some((whole, fraction)) => (whole.len(), fraction.len()),
        None => (out.len() - start, 0),
    };
    if fraction > 30 || whole + fraction > 64 {
        out.truncate(start);
        let _ = write!(out, "{value:e}");
    }
}

/// The beginning of a statement for a log or `status.json`, up to its `VALUES(…` or its first
/// literal in quotes, which is replaced by `'…'` or `x'…'`: at most [`MAX_HEAD`] characters, on one
/// line. Numbers and names before that may stay. Comments are hidden: an apostrophe in one would
/// turn the rest inside out.
pub fn head(statement: &str) -> String {
    let marker = statement.trim();
    if marker == BEGIN_MARKER || marker == COMMIT_MARKER {
        return marker.to_owned();
    }
    let mut out = Head::default();
    let mut rest = statement.chars().peekable();
    while let Some(c) = rest.next() {
        if out.is_full() {
            break;
        }
        match c {
            '\'' => {
                out.push_str("'…'");
                loop {
                    match rest.next() {
                        // A doubled quote belongs to the literal.
                        Some('\'') if rest.peek() == Some(&'\'') => {
                            rest.next();
                        }
                        Some('\'') | None => break,
                        Some(_) => {}
                    }
                }
                // An apostrophe that was not doubled ends a literal too early: from here on, what
                // stands outside of quotes can be a value.
                if rest.peek().is_some() {
                    out.push('…');
                }
                break;
            }
            '-' if rest.peek() == Some(&'-') => {
                out.push_str("--…");
                rest.by_ref().find(|c| *c == '\n');
                out.push_space();
            }
            '#' => {
                out.push_str("#…");
                rest.by_ref().find(|c| *c == '\n');
                out.push_space();
            }
            '/' if rest.peek() == Some(&'*') => {
                rest.next();
                out.push_str("/*…*/");
                while let Some(inner) = rest.next() {
                    if inner == '*' && rest.next_if_eq(&'/').is_some() {
                        break;
                    }
                }
            }
            // Names are quoted like this; SQLite takes an unknown one for a string, so only what
            // looks like a name is shown.
            '"' | '`' | '[' => {
                let close = if c == '[' { ']' } else { c };
                let mut name = String::new();
                let mut closed = false;
                for inner in rest.by_ref() {
                    if inner == close {
                        closed = true;
                        break;
                    }
                    if name.len() <= 64 {
                        name.push(inner);
                    }
                }
                let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
                out.push(c);
                if closed && name.len() <= 64 && name.chars().all(plain) {
                    out.push_str(&name);
                } else {
                    out.push('…');
                }
                out.push(close);
            }
            c if c.is_whitespace() || c.is_control() => out.push_space(),
            '(' if out.ends_with_values() => {
                out.push_str("(…");
                break;
            }
            c => out.push(c),
        }
    }
    out.finish()
}

#[derive(Default)]
struct Head {
    text: String,
    chars: usize,
}

impl Head {
    fn is_full(&self) -> bool {
        self.chars > MAX_HEAD
    }

    fn push(&mut self, c: char) {
        self.text.push(c);
        self.chars += 1;
    }

    fn push_str(&mut self, text: &str) {
        text.chars().for_each(|c| self.push(c));
    }

    /// Whether what comes next in parentheses are values, quoted or not.
    fn ends_with_values(&self) -> bool {
        let word = self.text.trim_end().rsplit(' ').next();
        word.is_some_and(|word| word.eq_ignore_ascii_case("VALUES"))
    }

    fn push_space(&mut self) {
        if !self.text.is_empty() && !self.text.ends_with(' ') {
            self.push(' ');
        }
    }

    fn finish(self) -> String {
        if self.is_full() {
            let mut cut: String = self.text.chars().take(MAX_HEAD - 1).collect();
            cut.push('…');
            cut
        } else {
            self.text.trim_end().to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rusqlite::Connection;

    use super::*;
    use crate::model::FieldType;

    fn flags() -> (TableRef, TableSchema) {
        let field = |name: &str, ty| Field {
            name: name.parse().unwrap(),
            ty,
        };
        let fields = FieldType::ALL
            .into_iter()
            .map(|ty| field(ty.as_str(), ty))
            .collect();
        let key = ["string", "bytestring"].map(|k| k.parse().unwrap());
        (
            "app/flags".parse().unwrap(),
            TableSchema::new(fields, &key).unwrap(),
        )
    }

    #[test]
    fn statements_are_ctlstores() {
        let (table, schema) = flags();
        assert_eq!(
            create_table(&table, &schema),
            "CREATE TABLE app___flags (\"string\" VARCHAR(191), \"integer\" INTEGER, \"decimal\" \
             REAL, \"text\" TEXT, \"binary\" BLOB, \"bytestring\" BLOB(255), \
             PRIMARY KEY(\"string\",\"bytestring\"));"
        );
        assert_eq!(
            add_column(&table, &schema.fields()[3]),
            "ALTER TABLE app___flags ADD COLUMN \"text\" TEXT"
        );
        assert_eq!(drop_table(&table), "DROP TABLE IF EXISTS app___flags");
        assert_eq!(clear(&table), "DELETE FROM app___flags");
        let row = [
            Value::text("it's"),
            Value::Integer(i64::MIN),
            Value::Real(0.25),
            Value::Null,
            Value::Blob(vec![]),
            Value::Blob(vec![1, 0xab]),
        ];
        assert_eq!(
            replace(&table, &schema, &row),
            "REPLACE INTO app___flags (\"string\",\"integer\",\"decimal\",\"text\",\"binary\",\
             \"bytestring\") VALUES('it''s',-9223372036854775808,0.25,NULL,x'',x'01ab')"
        );
        assert_eq!(
            delete(&table, &schema, &[row[0].clone(), row[5].clone()]),
            "DELETE FROM app___flags WHERE \"string\" = 'it''s' AND \"bytestring\" = x'01ab'"
        );
    }

    #[test]
    fn decimals_have_no_exponent_where_mysql_reads_them_exactly() {
        for (value, text) in [
            (1e21, "1000000000000000000000"),
            (1e-7, "0.0000001"),
            (-2.5, "-2.5"),
            (1e300, "1e300"),
            (1.5e-40, "1.5e-40"),
            (f64::NAN, "NULL"),
        ] {
            assert_eq!(literal(&Value::Real(value)), text);
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<i64>().prop_map(Value::Integer),
            any::<f64>()
                .prop_filter("SQL has no such number", |f| f.is_finite())
                .prop_map(Value::Real),
            any::<i32>().prop_map(|n| Value::Real(f64::from(n) / 1000.0)),
            any::<String>().prop_map(Value::text),
            "['\"\\\\\n\0a😀;%-]{0,20}".prop_map(Value::text),
            proptest::collection::vec(any::<u8>(), 0..40).prop_map(Value::Blob),
        ]
    }

    fn column(row: &rusqlite::Row<'_>) -> Value {
        use rusqlite::types::ValueRef;
        match row.get_ref(0).unwrap() {
            ValueRef::Null => Value::Null,
            ValueRef::Integer(i) => Value::Integer(i),
            ValueRef::Real(r) => Value::Real(r),
            ValueRef::Text(t) => Value::Text(t.into()),
            ValueRef::Blob(b) => Value::Blob(b.into()),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn sqlite_reads_every_literal_back(value in value()) {
            let db = Connection::open_in_memory().unwrap();
            let declared = if matches!(value, Value::Real(_)) { "REAL" } else { "" };
            db.execute_batch(&format!(
                "CREATE TABLE t (v {declared}); INSERT INTO t VALUES({})",
                literal(&value)
            )).unwrap();
            let back = db.query_row("SELECT v FROM t", [], |r| Ok(column(r))).unwrap();
            let expected = match value {
                Value::Text(t) if t.contains(&0) => Value::Blob(t),
                // SQLite stores a REAL without a fraction as an integer, which has no minus zero.
                Value::Real(0.0) => Value::Real(0.0),
                other => other,
            };
            if let (Value::Real(a), Value::Real(b)) = (&back, &expected) {
                prop_assert_eq!(a.to_bits(), b.to_bits(), "{} {}", a, b);
            }
            prop_assert!(back == expected, "{:?} came back as {:?}", expected, back);
        }

        #[test]
        fn a_head_shows_no_literal(secret in "[A-Z'\"`;\n]{1,30}", number in any::<u8>()) {
            let value = Value::text(format!("Q{secret}Q"));
            let (table, schema) = flags();
            let mut row = vec![Value::Integer(number.into()); 6];
            row[0] = value.clone();
            row[3] = value;
            let head = head(&replace(&table, &schema, &row));
            prop_assert!(head.chars().count() <= MAX_HEAD);
            prop_assert!(!head.contains('Q'), "{}", head);
        }

        #[test]
        fn a_head_survives_anything(statement in any::<String>()) {
            prop_assert!(head(&statement).chars().count() <= MAX_HEAD);
        }
    }

    #[test]
    fn heads_hide_values() {
        for (statement, expected) in [
            (
                "DELETE FROM app___t WHERE \"k\" = 'it''s' AND \"b\" = x'01'",
                "DELETE FROM app___t WHERE \"k\" = '…'…",
            ),
            (
                "INSERT INTO t VALUES(1,'it's never doubled')",
                "INSERT INTO t VALUES(…",
            ),
            (
                "INSERT INTO t VALUES('never closed",
                "INSERT INTO t VALUES(…",
            ),
            (
                "INSERT INTO t VALUES(\"never closed",
                "INSERT INTO t VALUES(…",
            ),
            ("a  \n\t b", "a b"),
            ("SELECT \"a b\", `c`, [d]", "SELECT \"…\", `c`, [d]"),
            ("--- BEGIN", "--- BEGIN"),
            (
                "-- don't\nDELETE FROM t WHERE a='secret'",
                "--… DELETE FROM t WHERE a='…'",
            ),
            (
                "/* don't **/ DELETE FROM t WHERE a='secret'-1",
                "/*…*/ DELETE FROM t WHERE a='…'…",
            ),
            (
                "DELETE FROM t # don't\n; SELECT 'secret'",
                "DELETE FROM t #… ; SELECT '…'",
            ),
        ] {
            assert_eq!(head(statement), expected);
        }
    }
}
