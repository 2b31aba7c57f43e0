//! Values on their way into and out of SQLite, for the parts that speak it: the LDB and the embedded
//! ledger. Knows no table.

use rusqlite::types::{ToSql, ToSqlOutput, ValueRef};

use crate::model::Value;

/// A value as an SQL parameter, without copying its bytes.
pub(crate) struct Bound<'a>(pub(crate) &'a Value);

impl Bound<'_> {
    /// The value, in SQLite's terms.
    pub(crate) fn value(&self) -> ValueRef<'_> {
        match self.0 {
            Value::Null => ValueRef::Null,
            Value::Integer(i) => ValueRef::Integer(*i),
            Value::Real(r) => ValueRef::Real(*r),
            Value::Text(bytes) => ValueRef::Text(bytes),
            Value::Blob(bytes) => ValueRef::Blob(bytes),
        }
    }
}

impl ToSql for Bound<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(self.value()))
    }
}

/// A copy of a value that SQLite holds.
pub(crate) fn value_of(value: ValueRef<'_>) -> Value {
    match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(i) => Value::Integer(i),
        ValueRef::Real(r) => Value::Real(r),
        ValueRef::Text(bytes) => Value::Text(bytes.to_vec()),
        ValueRef::Blob(bytes) => Value::Blob(bytes.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use crate::model::LedgerTime;

    #[test]
    fn times_agree_with_sqlite() {
        let db = Connection::open_in_memory().unwrap();
        for days in (-700_000..2_900_000_i64).step_by(997) {
            let text: String = db
                .query_row(
                    "SELECT datetime(?1 * 86400 + 45296, 'unixepoch')",
                    [days],
                    |r| r.get(0),
                )
                .unwrap();
            assert_eq!(
                LedgerTime::parse(text.as_bytes()).map(LedgerTime::micros),
                Some((days * 86_400 + 45_296) * 1_000_000),
                "{text}"
            );
        }
    }
}
