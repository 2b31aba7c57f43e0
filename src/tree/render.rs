//! Values, rows and schemas as the bytes of files. It never reads a clock or a database: the same
//! input gives the same bytes.

use std::borrow::Cow;
use std::fmt::{self, Write as _};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use crate::model::{FieldType, Table, TableSchema, Value};

/// The content of a field's file; `None` for NULL, which has no file.
///
/// Integers are decimal. Reals are the shortest decimal form that reads back the same, without an
/// exponent (`0.25`, `1`), or `inf` and `-inf`. Text and blobs are their bytes. With `newline`,
/// fields declared integer, decimal or string end in a newline.
pub fn field_bytes(ty: FieldType, value: &Value, newline: bool) -> Option<Cow<'_, [u8]>> {
    let newline = newline && ends_in_newline(ty);
    let number = match value {
        Value::Null => return None,
        Value::Text(bytes) | Value::Blob(bytes) if !newline => return Some(Cow::Borrowed(bytes)),
        Value::Text(bytes) | Value::Blob(bytes) => {
            let mut line = Vec::with_capacity(bytes.len() + 1);
            line.extend_from_slice(bytes);
            line.push(b'\n');
            return Some(Cow::Owned(line));
        }
        Value::Integer(number) => number.to_string(),
        Value::Real(number) => number.to_string(),
    };
    let mut number = number.into_bytes();
    if newline {
        number.push(b'\n');
    }
    Some(Cow::Owned(number))
}

/// The length of what [`field_bytes`] gives, without making it.
pub fn field_len(ty: FieldType, value: &Value, newline: bool) -> Option<u64> {
    let bytes = match value {
        Value::Null => return None,
        Value::Text(bytes) | Value::Blob(bytes) => bytes.len(),
        Value::Integer(number) => display_len(format_args!("{number}")),
        Value::Real(number) => display_len(format_args!("{number}")),
    };
    let newline = u64::from(newline && ends_in_newline(ty));
    // A usize always fits; u64::MAX would be a file that no kernel takes.
    Some(
        u64::try_from(bytes)
            .unwrap_or(u64::MAX)
            .saturating_add(newline),
    )
}

/// Whether `-o newline` is for fields of this type.
fn ends_in_newline(ty: FieldType) -> bool {
    matches!(
        ty,
        FieldType::Integer | FieldType::Decimal | FieldType::String
    )
}

fn display_len(text: fmt::Arguments<'_>) -> usize {
    struct Count(usize);
    impl fmt::Write for Count {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.0 += text.len();
            Ok(())
        }
    }
    let mut count = Count(0);
    // Counting does not fail.
    let _ = count.write_fmt(text);
    count.0
}

/// The content of `row.json`: one object of every field in the schema's order, and a newline.
///
/// NULL is `null`. Bytes of binary and bytestring fields are standard base64 with padding; integers
/// keep all 64 bits; reals always have a point or an exponent, and infinities are `null`, for JSON
/// has none. In the other fields text is a JSON string, with U+FFFD for what is not UTF-8, and a
/// blob is a JSON string if it is UTF-8 and base64 if not.
///
/// `values` are the row's, in the schema's order; what is missing counts as NULL.
pub fn row_json(schema: &TableSchema, values: &[Value]) -> Vec<u8> {
    let mut json = Vec::with_capacity(row_json_estimate(schema, values));
    json.push(b'{');
    for (i, field) in schema.fields().iter().enumerate() {
        if i > 0 {
            json.push(b',');
        }
        // Field names are [a-z0-9_]: nothing to escape.
        json.push(b'"');
        json.extend_from_slice(field.name.as_str().as_bytes());
        json.extend_from_slice(b"\":");
        push_value(&mut json, field.ty, values.get(i).unwrap_or(&Value::Null));
    }
    json.extend_from_slice(b"}\n");
    json
}

/// Enough room for most rows, so that the common one is written without growing.
fn row_json_estimate(schema: &TableSchema, values: &[Value]) -> usize {
    let names: usize = schema
        .fields()
        .iter()
        .map(|f| f.name.as_str().len() + 4)
        .sum();
    let values: usize = values
        .iter()
        .map(|v| v.bytes().map_or(24, |b| b.len() + b.len() / 2 + 4))
        .sum();
    names + values + 3
}

/// Appends one value as `row.json` has it.
pub(crate) fn push_value(json: &mut Vec<u8>, ty: FieldType, value: &Value) {
    let as_base64 = matches!(ty, FieldType::Binary | FieldType::Bytestring);
    match value {
        Value::Null => json.extend_from_slice(b"null"),
        Value::Integer(number) => push_json(json, number),
        Value::Real(number) => push_json(json, number),
        Value::Text(bytes) | Value::Blob(bytes) if as_base64 => push_base64(json, bytes),
        Value::Text(bytes) => push_json(json, &String::from_utf8_lossy(bytes)),
        Value::Blob(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => push_json(json, text),
            Err(_) => push_base64(json, bytes),
        },
    }
}

/// Appends a number or a string.
pub(crate) fn push_json<T: Serialize + ?Sized>(json: &mut Vec<u8>, value: &T) {
    // Numbers and strings have no error of their own, and writing to a Vec does not fail.
    let _ = serde_json::to_writer(json, value);
}

/// Appends bytes as a string of base64.
pub(crate) fn push_base64(json: &mut Vec<u8>, bytes: &[u8]) {
    json.push(b'"');
    let start = json.len();
    json.resize(start + bytes.len().div_ceil(3) * 4, 0);
    if let Some(room) = json.get_mut(start..) {
        // Padded base64 is exactly that long.
        let _ = STANDARD.encode_slice(bytes, room);
    }
    json.push(b'"');
}

/// The content of `.schema.json`: one object and a newline.
///
/// `{"family":…,"table":…,"fields":[{"name":…,"type":…},…],"key":[…]}`, fields in the table's order
/// and the key's fields in the key's.
pub fn schema_json(table: &Table) -> Vec<u8> {
    #[derive(Serialize)]
    struct Schema<'a> {
        family: &'a str,
        table: &'a str,
        fields: Vec<Field<'a>>,
        key: Vec<&'a str>,
    }
    #[derive(Serialize)]
    struct Field<'a> {
        name: &'a str,
        r#type: &'a str,
    }
    let fields = table.schema.fields().iter().map(|field| Field {
        name: field.name.as_str(),
        r#type: field.ty.as_str(),
    });
    let mut json = Vec::new();
    push_json(
        &mut json,
        &Schema {
            family: table.name.family.as_str(),
            table: table.name.table.as_str(),
            fields: fields.collect(),
            key: table.schema.key_fields().map(|f| f.name.as_str()).collect(),
        },
    );
    json.push(b'\n');
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Field;
    use proptest::prelude::*;

    fn table(fields: &[(&str, FieldType)], key: &[&str]) -> Table {
        let fields = fields.iter().map(|(name, ty)| Field {
            name: name.parse().unwrap(),
            ty: *ty,
        });
        let key: Vec<_> = key.iter().map(|k| k.parse().unwrap()).collect();
        Table {
            name: "app/flags".parse().unwrap(),
            schema: TableSchema::new(fields.collect(), &key).unwrap(),
        }
    }

    fn field(ty: FieldType, value: &Value, newline: bool) -> Option<String> {
        let bytes = field_bytes(ty, value, newline)?;
        assert_eq!(
            field_len(ty, value, newline),
            Some(bytes.len() as u64),
            "{value:?}"
        );
        Some(String::from_utf8(bytes.into_owned()).unwrap())
    }

    #[test]
    fn fields_hold_exactly_the_value() {
        use FieldType::{Binary, Decimal, Integer, String, Text};
        for (ty, value, plain, with_newline) in [
            (
                Integer,
                Value::Integer(i64::MIN),
                "-9223372036854775808",
                "-9223372036854775808\n",
            ),
            (Decimal, Value::Real(0.25), "0.25", "0.25\n"),
            (Decimal, Value::Real(1.0), "1", "1\n"),
            (Decimal, Value::Real(-0.0), "-0", "-0\n"),
            (
                Decimal,
                Value::Real(1e21),
                "1000000000000000000000",
                "1000000000000000000000\n",
            ),
            (Decimal, Value::Real(f64::INFINITY), "inf", "inf\n"),
            (Decimal, Value::Real(f64::NEG_INFINITY), "-inf", "-inf\n"),
            (String, Value::text(""), "", "\n"),
            (String, Value::text("a\n"), "a\n", "a\n\n"),
            (String, Value::Blob(b"a\0".to_vec()), "a\0", "a\0\n"),
            (Text, Value::text("a"), "a", "a"),
            (Binary, Value::Blob(vec![1]), "\u{1}", "\u{1}"),
        ] {
            assert_eq!(field(ty, &value, false).as_deref(), Some(plain));
            assert_eq!(field(ty, &value, true).as_deref(), Some(with_newline));
        }
        assert_eq!(field_bytes(Integer, &Value::Null, true), None);
        assert_eq!(field_len(Integer, &Value::Null, true), None);
    }

    #[test]
    fn row_json_by_example() {
        use FieldType::{Binary, Bytestring, Decimal, Integer, String, Text};
        let table = table(
            &[
                ("name", String),
                ("n", Integer),
                ("d", Decimal),
                ("t", Text),
                ("b", Binary),
                ("k", Bytestring),
                ("absent", Text),
            ],
            &["name", "n"],
        );
        let row = [
            Value::text("a\"\\\n\u{1}é"),
            Value::Integer(i64::MAX),
            Value::Real(1.0),
            Value::Null,
            Value::Blob(vec![0, 255, 16, 1]),
            Value::Blob(vec![]),
        ];
        assert_eq!(
            std::string::String::from_utf8(row_json(&table.schema, &row)).unwrap(),
            "{\"name\":\"a\\\"\\\\\\n\\u0001é\",\"n\":9223372036854775807,\"d\":1.0,\"t\":null,\
             \"b\":\"AP8QAQ==\",\"k\":\"\",\"absent\":null}\n"
        );
        let row = [
            Value::Blob(b"a\0".to_vec()),
            Value::text("7"),
            Value::Real(f64::INFINITY),
            Value::Text(b"a\xff".to_vec()),
            Value::text("b"),
            Value::Integer(1),
            Value::Blob(vec![0xff]),
        ];
        assert_eq!(
            std::string::String::from_utf8(row_json(&table.schema, &row)).unwrap(),
            "{\"name\":\"a\\u0000\",\"n\":\"7\",\"d\":null,\"t\":\"a\u{fffd}\",\"b\":\"Yg==\",\
             \"k\":1,\"absent\":\"/w==\"}\n"
        );
    }

    #[test]
    fn schema_json_by_example() {
        let table = table(
            &[("n", FieldType::Integer), ("name", FieldType::String)],
            &["name", "n"],
        );
        assert_eq!(
            String::from_utf8(schema_json(&table)).unwrap(),
            "{\"family\":\"app\",\"table\":\"flags\",\"fields\":[{\"name\":\"n\",\"type\":\
             \"integer\"},{\"name\":\"name\",\"type\":\"string\"}],\"key\":[\"name\",\"n\"]}\n"
        );
    }

    proptest! {
        #[test]
        fn reals_read_back_the_same(bits in any::<u64>()) {
            let number = f64::from_bits(bits);
            prop_assume!(!number.is_nan());
            let text = field(FieldType::Decimal, &Value::Real(number), false).unwrap();
            prop_assert!(!text.contains('e') && !text.contains('E'), "{}", text);
            prop_assert_eq!(text.parse::<f64>().unwrap().to_bits(), bits);
        }

        #[test]
        fn row_json_reads_back(text in any::<String>(), bytes in any::<Vec<u8>>(), n in any::<i64>(), d in any::<f64>()) {
            let table = table(
                &[
                    ("t", FieldType::Text),
                    ("b", FieldType::Binary),
                    ("n", FieldType::Integer),
                    ("d", FieldType::Decimal),
                    ("k", FieldType::String),
                ],
                &["k"],
            );
            let row = [
                Value::text(text.clone()),
                Value::Blob(bytes.clone()),
                Value::Integer(n),
                Value::Real(d),
                Value::text("k"),
            ];
            let json = row_json(&table.schema, &row);
            prop_assert_eq!(json.last(), Some(&b'\n'));
            prop_assert_eq!(json.iter().filter(|b| **b == b'\n').count(), 1);
            let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
            prop_assert_eq!(json["t"].as_str(), Some(text.as_str()));
            prop_assert_eq!(STANDARD.decode(json["b"].as_str().unwrap()).unwrap(), bytes);
            prop_assert_eq!(json["n"].as_i64(), Some(n));
            if d.is_finite() {
                prop_assert!((json["d"].as_f64().unwrap() - d).abs() <= d.abs() * 1e-15);
            } else {
                prop_assert!(json["d"].is_null());
            }
        }
    }
}
