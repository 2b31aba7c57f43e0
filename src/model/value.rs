//! Values as the LDB holds them.

use std::fmt;
use std::hash::{Hash, Hasher};

/// One value: SQLite's storage classes, which are what an LDB holds whatever a column was declared
/// as. (ctlstore writes a string that contains a NUL byte as a blob, for example.)
#[derive(Clone)]
pub enum Value {
    /// SQL's NULL: the field's file does not exist.
    Null,
    /// A whole number, all 64 bits of it.
    Integer(i64),
    /// A floating-point number.
    Real(f64),
    /// Text. UTF-8, unless somebody cast other bytes to text in the database; they are kept.
    Text(Vec<u8>),
    /// Raw bytes.
    Blob(Vec<u8>),
}

impl Value {
    /// A text value.
    pub fn text(text: impl Into<String>) -> Self {
        Value::Text(text.into().into_bytes())
    }

    /// Whether this is SQL's NULL.
    pub fn is_null(&self) -> bool {
        matches!(self, Value::Null)
    }

    /// The bytes of a text or a blob.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Value::Text(bytes) | Value::Blob(bytes) => Some(bytes),
            Value::Null | Value::Integer(_) | Value::Real(_) => None,
        }
    }
}

/// Values are equal when SQLite would hold the same thing: the same class and the same bits.
impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Value::Null, Value::Null) => true,
            (Value::Integer(a), Value::Integer(b)) => a == b,
            (Value::Real(a), Value::Real(b)) => a.to_bits() == b.to_bits(),
            (Value::Text(a), Value::Text(b)) | (Value::Blob(a), Value::Blob(b)) => a == b,
            _ => false,
        }
    }
}

impl Eq for Value {}

impl Hash for Value {
    fn hash<H: Hasher>(&self, state: &mut H) {
        std::mem::discriminant(self).hash(state);
        match self {
            Value::Null => {}
            Value::Integer(i) => i.hash(state),
            Value::Real(r) => r.to_bits().hash(state),
            Value::Text(b) | Value::Blob(b) => b.hash(state),
        }
    }
}

/// Shows the class and size only: values are the users' data and may be secrets.
impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("NULL"),
            Value::Integer(_) => f.write_str("integer"),
            Value::Real(_) => f.write_str("real"),
            Value::Text(b) => write!(f, "text of {} bytes", b.len()),
            Value::Blob(b) => write!(f, "blob of {} bytes", b.len()),
        }
    }
}

/// The values of a row's key fields, in the key's order; or a prefix of them.
pub type Key = Box<[Value]>;
