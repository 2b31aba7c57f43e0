//! Checks of mutations against a table's schema. Pure: what passes here is a row or key that both
//! databases hold as it is.

use crate::model::{Field, FieldName, FieldType, TableRef, TableSchema, Value};

use super::ExecutiveError;

/// The characters a string holds, as VARCHAR(191) counts them.
const MAX_STRING: usize = 191;
/// The bytes a bytestring holds.
const MAX_BYTESTRING: usize = 255;
/// The bytes that MEDIUMTEXT and MEDIUMBLOB hold, the ledger's statements included.
const MAX_MEDIUM: usize = (1 << 24) - 1;

/// A whole row for the values, in the schema's order; fields that are not named are taken from
/// `before`, or are NULL.
pub(super) fn row(
    table: &TableRef,
    schema: &TableSchema,
    values: &[(FieldName, Value)],
    before: Option<&[Value]>,
) -> Result<Vec<Value>, ExecutiveError> {
    let mut row = match before {
        Some(before) => before.to_vec(),
        None => vec![Value::Null; schema.fields().len()],
    };
    for (index, value) in assigned(table, schema, values)? {
        if let Some(place) = row.get_mut(index) {
            *place = value;
        }
    }
    Ok(row)
}

/// The key that the values give; other fields among them are left aside.
pub(super) fn key(
    table: &TableRef,
    schema: &TableSchema,
    values: &[(FieldName, Value)],
) -> Result<Vec<Value>, ExecutiveError> {
    let assigned = assigned(table, schema, values)?;
    schema
        .key()
        .iter()
        .zip(schema.key_fields())
        .map(|(index, field)| {
            let value = assigned
                .iter()
                .find(|(i, _)| i == index)
                .map(|(_, v)| v.clone())
                .ok_or_else(|| ExecutiveError::MissingKey {
                    table: table.clone(),
                    field: field.name.clone(),
                })?;
            if value.is_null() {
                return Err(bad(table, field, "a key field cannot be NULL"));
            }
            Ok(value)
        })
        .collect()
}

/// The key of a deletion, which names nothing else.
pub(super) fn only_key(
    table: &TableRef,
    schema: &TableSchema,
    values: &[(FieldName, Value)],
) -> Result<Vec<Value>, ExecutiveError> {
    let key = key(table, schema, values)?;
    let other = values
        .iter()
        .find(|(name, _)| !schema.key_fields().any(|f| f.name == *name));
    match other {
        None => Ok(key),
        Some((field, _)) => Err(ExecutiveError::NotAKey {
            table: table.clone(),
            field: field.clone(),
        }),
    }
}

/// The key within a whole row.
pub(super) fn key_of(schema: &TableSchema, row: &[Value]) -> Vec<Value> {
    schema
        .key()
        .iter()
        .filter_map(|i| row.get(*i).cloned())
        .collect()
}

/// Whether the ledger can hold a statement about a row of the table.
pub(super) fn length(table: &TableRef, statement: &str) -> Result<(), ExecutiveError> {
    if statement.len() > MAX_MEDIUM {
        return Err(ExecutiveError::StatementTooLong {
            table: table.clone(),
            bytes: statement.len(),
        });
    }
    Ok(())
}

fn assigned(
    table: &TableRef,
    schema: &TableSchema,
    values: &[(FieldName, Value)],
) -> Result<Vec<(usize, Value)>, ExecutiveError> {
    let mut assigned: Vec<(usize, Value)> = Vec::with_capacity(values.len());
    for (name, value) in values {
        let known = schema
            .index_of(name.as_str())
            .and_then(|i| Some((i, schema.fields().get(i)?)));
        let Some((index, field)) = known else {
            let fields: Vec<&str> = schema.fields().iter().map(|f| f.name.as_str()).collect();
            return Err(ExecutiveError::UnknownField {
                table: table.clone(),
                field: name.clone(),
                fields: fields.join(", "),
            });
        };
        if assigned.iter().any(|(i, _)| *i == index) {
            return Err(ExecutiveError::RepeatedField {
                table: table.clone(),
                field: name.clone(),
            });
        }
        let value = stored(field.ty, value).map_err(|reason| bad(table, field, reason))?;
        assigned.push((index, value));
    }
    Ok(assigned)
}

fn bad(table: &TableRef, field: &Field, reason: impl Into<String>) -> ExecutiveError {
    ExecutiveError::BadValue {
        table: table.clone(),
        field: field.name.clone(),
        reason: reason.into(),
    }
}

/// The value as the databases hold it in a field of this type, or what is wrong with it.
///
/// A whole number in a decimal field becomes a decimal if that is exact. Text with a NUL byte
/// becomes a blob, which is what ctlstore's statement text makes of it. Minus zero becomes zero:
/// SQLite stores no other.
pub fn stored(ty: FieldType, value: &Value) -> Result<Value, String> {
    let found = match value {
        Value::Null => return Ok(Value::Null),
        Value::Integer(_) => "an integer",
        Value::Real(_) => "a decimal",
        Value::Text(_) => "text",
        Value::Blob(_) => "bytes",
    };
    match (ty, value) {
        (FieldType::Integer, Value::Integer(_)) => Ok(value.clone()),
        (FieldType::Decimal, Value::Real(r)) if !r.is_finite() => {
            Err("neither infinity nor NaN can be stored".into())
        }
        (FieldType::Decimal, Value::Real(r)) => Ok(Value::Real(if *r == 0.0 { 0.0 } else { *r })),
        (FieldType::Decimal, Value::Integer(i)) => exact_decimal(*i)
            .map(Value::Real)
            .ok_or_else(|| "the number has more digits than a decimal holds".into()),
        (FieldType::String | FieldType::Text, Value::Text(bytes)) => {
            let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8 text")?;
            if ty == FieldType::Text {
                limit(bytes.len(), MAX_MEDIUM, "bytes", ty)?;
            } else {
                limit(text.chars().count(), MAX_STRING, "characters", ty)?;
            }
            Ok(if bytes.contains(&0) {
                Value::Blob(bytes.clone())
            } else {
                value.clone()
            })
        }
        (FieldType::Binary, Value::Blob(bytes)) => {
            limit(bytes.len(), MAX_MEDIUM, "bytes", ty).map(|()| value.clone())
        }
        (FieldType::Bytestring, Value::Blob(bytes)) => {
            limit(bytes.len(), MAX_BYTESTRING, "bytes", ty).map(|()| value.clone())
        }
        _ => Err(format!("expected {}, found {found}", expected(ty))),
    }
}

/// What a field of this type takes, in words.
pub fn expected(ty: FieldType) -> &'static str {
    match ty {
        FieldType::String | FieldType::Text => "text",
        FieldType::Integer => "an integer",
        FieldType::Decimal => "a decimal",
        FieldType::Binary | FieldType::Bytestring => "bytes",
    }
}

fn limit(size: usize, max: usize, unit: &str, ty: FieldType) -> Result<(), String> {
    if size > max {
        return Err(format!("it has {size} {unit}; a {ty} holds at most {max}"));
    }
    Ok(())
}

/// The double that equals the integer, if there is one.
fn exact_decimal(integer: i64) -> Option<f64> {
    // Through text, the one conversion in std that neither truncates nor wraps.
    let decimal: f64 = integer.to_string().parse().ok()?;
    (format!("{decimal}") == integer.to_string()).then_some(decimal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_held_to_the_fields_type() {
        let text = |n: usize| Value::text("é".repeat(n));
        let blob = |n: usize| Value::Blob(vec![0; n]);
        assert!(stored(FieldType::String, &text(191)).is_ok());
        assert!(stored(FieldType::String, &text(192)).is_err());
        assert!(stored(FieldType::Bytestring, &blob(255)).is_ok());
        assert!(stored(FieldType::Bytestring, &blob(256)).is_err());
        assert!(stored(FieldType::Text, &text(1 << 23)).is_err());
        assert!(stored(FieldType::Decimal, &Value::Real(f64::NAN)).is_err());
        assert!(stored(FieldType::Integer, &Value::Real(1.0)).is_err());
        assert_eq!(
            stored(FieldType::Decimal, &Value::Integer(3)),
            Ok(Value::Real(3.0))
        );
        assert!(stored(FieldType::Decimal, &Value::Integer(i64::MAX)).is_err());
        assert_eq!(
            stored(FieldType::Decimal, &Value::Real(-0.0)),
            Ok(Value::Real(0.0))
        );
        assert_eq!(
            stored(FieldType::String, &Value::text("a\0b")),
            Ok(Value::Blob(b"a\0b".to_vec()))
        );
        assert_eq!(
            stored(FieldType::Integer, &Value::text("yes")),
            Err("expected an integer, found text".into())
        );
    }
}
