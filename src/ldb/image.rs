//! Compact pictures of rows: what change capture compares instead of the values themselves. Pure.
//!
//! An image holds, for each field, a value of up to [`INLINE`] bytes as it is and the SHA-256 of a
//! longer one, so that equal images mean equal rows and a row's image stays small. Keys are packed
//! in full, because they must come back out.

use rusqlite::types::ValueRef;
use sha2::{Digest, Sha256};

use crate::model::{FieldSet, Key, Value};

/// Values longer than this are kept as their hash.
const INLINE: usize = 64;

const NULL: u8 = 0;
const INTEGER: u8 = 1;
const REAL: u8 = 2;
const TEXT: u8 = 3;
const BLOB: u8 = 4;
const LONG_TEXT: u8 = 5;
const LONG_BLOB: u8 = 6;

/// Appends the picture of one value.
pub(super) fn push_value(image: &mut Vec<u8>, value: ValueRef<'_>) {
    let (short, long, bytes) = match value {
        ValueRef::Null => return image.push(NULL),
        ValueRef::Integer(i) => {
            image.push(INTEGER);
            return image.extend_from_slice(&i.to_le_bytes());
        }
        ValueRef::Real(r) => {
            image.push(REAL);
            return image.extend_from_slice(&r.to_bits().to_le_bytes());
        }
        ValueRef::Text(bytes) => (TEXT, LONG_TEXT, bytes),
        ValueRef::Blob(bytes) => (BLOB, LONG_BLOB, bytes),
    };
    match u8::try_from(bytes.len()) {
        Ok(length) if usize::from(length) <= INLINE => {
            image.extend_from_slice(&[short, length]);
            image.extend_from_slice(bytes);
        }
        _ => {
            image.push(long);
            image.extend_from_slice(&Sha256::digest(bytes));
        }
    }
}

/// The pictures of an image's values, in order.
fn fields(mut image: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = match image.first()? {
            &INTEGER | &REAL => 9,
            &TEXT | &BLOB => 2 + usize::from(*image.get(1)?),
            &LONG_TEXT | &LONG_BLOB => 33,
            _ => 1,
        };
        let (field, rest) = image.split_at_checked(length)?;
        image = rest;
        Some(field)
    })
}

/// The fields that differ between two images of one table.
pub(super) fn difference(a: &[u8], b: &[u8]) -> FieldSet {
    fields(a)
        .zip(fields(b))
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .map(|(i, _)| i)
        .collect()
}

/// The fields that are not NULL.
pub(super) fn present(image: &[u8]) -> FieldSet {
    fields(image)
        .enumerate()
        .filter(|(_, field)| field.first() != Some(&NULL))
        .map(|(i, _)| i)
        .collect()
}

/// Appends one key value in full. Returns whether it was NULL, which identifies no row.
pub(super) fn push_key(packed: &mut Vec<u8>, value: ValueRef<'_>) -> bool {
    let (tag, bytes) = match value {
        ValueRef::Null => {
            packed.push(NULL);
            return true;
        }
        ValueRef::Integer(i) => {
            packed.push(INTEGER);
            packed.extend_from_slice(&i.to_le_bytes());
            return false;
        }
        ValueRef::Real(r) => {
            packed.push(REAL);
            packed.extend_from_slice(&r.to_bits().to_le_bytes());
            return false;
        }
        ValueRef::Text(bytes) => (TEXT, bytes),
        ValueRef::Blob(bytes) => (BLOB, bytes),
    };
    packed.push(tag);
    packed.extend_from_slice(&bytes.len().to_le_bytes());
    packed.extend_from_slice(bytes);
    false
}

/// The key that [`push_key`] packed.
pub(super) fn unpack_key(packed: &[u8]) -> Key {
    let mut rest = packed;
    let mut take = |n: usize| -> Option<&[u8]> {
        let (taken, left) = rest.split_at_checked(n)?;
        rest = left;
        Some(taken)
    };
    let mut values = Vec::new();
    let mut next = || -> Option<Value> {
        let tag = *take(1)?.first()?;
        if tag == NULL {
            return Some(Value::Null);
        }
        let word: [u8; 8] = take(8)?.try_into().ok()?;
        Some(match tag {
            INTEGER => Value::Integer(i64::from_le_bytes(word)),
            REAL => Value::Real(f64::from_bits(u64::from_le_bytes(word))),
            _ => {
                let bytes = take(usize::from_le_bytes(word))?.to_vec();
                if tag == TEXT {
                    Value::Text(bytes)
                } else {
                    Value::Blob(bytes)
                }
            }
        })
    };
    while let Some(value) = next() {
        values.push(value);
    }
    values.into_boxed_slice()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back_out() {
        let long = vec![b'k'; 300];
        let mut packed = Vec::new();
        for value in [
            ValueRef::Integer(i64::MIN),
            ValueRef::Text(&long),
            ValueRef::Blob(b""),
            ValueRef::Real(0.5),
        ] {
            assert!(!push_key(&mut packed, value));
        }
        assert_eq!(
            *unpack_key(&packed),
            [
                Value::Integer(i64::MIN),
                Value::Text(long),
                Value::Blob(vec![]),
                Value::Real(0.5)
            ]
        );
    }

    #[test]
    fn images_tell_which_fields_differ() {
        let image = |values: &[ValueRef<'_>]| {
            let mut image = Vec::new();
            values.iter().for_each(|v| push_value(&mut image, *v));
            image
        };
        let (x, mut y) = ([7u8; 65], [7u8; 65]);
        y[64] = 8;
        let a = image(&[ValueRef::Null, ValueRef::Blob(&x), ValueRef::Text(b"t")]);
        let b = image(&[
            ValueRef::Integer(1),
            ValueRef::Blob(&y),
            ValueRef::Text(b"t"),
        ]);
        assert_eq!(difference(&a, &b).iter().collect::<Vec<_>>(), [0, 1]);
        assert_eq!(present(&a).iter().collect::<Vec<_>>(), [1, 2]);
        let (text, blob) = (
            image(&[ValueRef::Text(b"t")]),
            image(&[ValueRef::Blob(b"t")]),
        );
        assert_eq!(difference(&text, &blob).iter().collect::<Vec<_>>(), [0]);
    }
}
