//! Compact pictures of rows: what change capture compares instead of the values themselves. Pure.
//!
//! An image holds, for each field, a value of up to [`INLINE`] bytes as it is and the SHA-256 of a
//! longer one, so that equal images mean equal rows and a row's image stays small. Keys are packed
//! in full, because they must come back out. The journal's images hold long values in full as far
//! as there is room.

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
const FULL_TEXT: u8 = 7;
const FULL_BLOB: u8 = 8;
const CUT_TEXT: u8 = 9;
const CUT_BLOB: u8 = 10;

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

/// Appends one value in full, or, if it is long and there is no `room`, its length and hash.
pub(super) fn push_full(image: &mut Vec<u8>, value: ValueRef<'_>, room: &mut usize) {
    let (full, cut, bytes) = match value {
        ValueRef::Text(bytes) if bytes.len() > INLINE => (FULL_TEXT, CUT_TEXT, bytes),
        ValueRef::Blob(bytes) if bytes.len() > INLINE => (FULL_BLOB, CUT_BLOB, bytes),
        short => return push_value(image, short),
    };
    let left = room.checked_sub(bytes.len());
    image.push(if left.is_some() { full } else { cut });
    image.extend_from_slice(&bytes.len().to_le_bytes());
    match left {
        Some(left) => {
            *room = left;
            image.extend_from_slice(bytes);
        }
        None => image.extend_from_slice(&Sha256::digest(bytes)),
    }
}

/// A value as a journal's image holds it.
pub(super) enum Held {
    /// All of it.
    Value(Value),
    /// Its length only.
    Omitted(u64),
}

/// What the picture of one value holds; `None` for one that is not of a journal.
pub(super) fn held(field: &[u8]) -> Option<Held> {
    let (tag, rest) = field.split_first()?;
    let word = || -> Option<[u8; 8]> { rest.get(..8)?.try_into().ok() };
    Some(Held::Value(match *tag {
        NULL => Value::Null,
        INTEGER => Value::Integer(i64::from_le_bytes(word()?)),
        REAL => Value::Real(f64::from_bits(u64::from_le_bytes(word()?))),
        TEXT => Value::Text(rest.get(1..)?.to_vec()),
        BLOB => Value::Blob(rest.get(1..)?.to_vec()),
        FULL_TEXT => Value::Text(rest.get(8..)?.to_vec()),
        FULL_BLOB => Value::Blob(rest.get(8..)?.to_vec()),
        CUT_TEXT | CUT_BLOB => return Some(Held::Omitted(u64::from_le_bytes(word()?))),
        _ => return None,
    }))
}

/// Whether the pictures of two values are of the same value.
pub(super) fn same(a: &[u8], b: &[u8]) -> bool {
    // One of them may have been kept in full and the other not.
    let hashed = |full: &[u8], cut: &[u8]| {
        matches!(
            (full.first(), cut.first()),
            (Some(&FULL_TEXT), Some(&CUT_TEXT)) | (Some(&FULL_BLOB), Some(&CUT_BLOB))
        ) && full.get(1..9) == cut.get(1..9)
            && full.get(9..).map(Sha256::digest).as_deref() == cut.get(9..)
    };
    a == b || hashed(a, b) || hashed(b, a)
}

/// The pictures of an image's values, in order.
pub(super) fn fields(mut image: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = match image.first()? {
            &INTEGER | &REAL => 9,
            &TEXT | &BLOB => 2 + usize::from(*image.get(1)?),
            &LONG_TEXT | &LONG_BLOB => 33,
            &FULL_TEXT | &FULL_BLOB => {
                let length: [u8; 8] = image.get(1..9)?.try_into().ok()?;
                usize::from_le_bytes(length).checked_add(9)?
            }
            &CUT_TEXT | &CUT_BLOB => 41,
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
