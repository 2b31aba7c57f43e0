//! Key values as file names, both ways: one value, one name. It never touches a database; whoever
//! looks a name up there compares what was found with the name again ([`matches_hashed`]).
//!
//! A name is a *body*, then for some values a *suffix*; `~` occurs nowhere in a body, so the two
//! cannot be confused.
//!
//! - Integers: decimal. Bytestrings: `0x` and lower-case hex. Strings: as themselves, with `/`, `%`,
//!   `~`, control bytes, DEL and a leading `.` written `%XX` (upper-case hex), the empty string `%`.
//! - A name that would pass 255 bytes is cut at an encoding boundary to at most 200 bytes, followed
//!   by `~` and the first 32 hex digits of the SHA-256 of the raw key bytes.
//! - SQLite stores any class in any column. A value whose class is not the canonical one of its
//!   column (text without NUL or blob with NUL in a string, integer in an integer, blob in a
//!   bytestring) is written the way of its class and ends in `~text`, `~blob`, `~integer` or
//!   `~real`.
//!
//! No name is empty, starts with `.`, contains `/` or NUL, or has more than 255 bytes.

use std::io::Write;

use sha2::{Digest, Sha256};

use crate::model::{FieldType, Value};

/// The longest name that Linux takes, in bytes.
pub const MAX_NAME: usize = 255;
/// Where the body of a name that is too long is cut, or up to three bytes before.
const CUT: usize = 200;
/// A cut steps back by at most this much: over a `%XX` or a UTF-8 character that it would split.
const MAX_STEP_BACK: usize = 3;
/// Bytes of the SHA-256 in a name that was cut.
const DIGEST: usize = 16;

/// What a file name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// This value and no other.
    Exact(Value),
    /// A value too long for a name. Each candidate still has to pass [`matches_hashed`].
    Hashed {
        /// The raw bytes that the value starts with.
        prefix: Vec<u8>,
        /// Whether it may be a [`Value::Text`].
        text: bool,
        /// Whether it may be a [`Value::Blob`].
        blob: bool,
        /// The first 16 bytes of the SHA-256 of the value's raw bytes.
        digest: [u8; DIGEST],
    },
}

/// A storage class of SQLite other than NULL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Text,
    Blob,
    Integer,
    Real,
}

impl Class {
    const ALL: [Class; 4] = [Class::Text, Class::Blob, Class::Integer, Class::Real];

    fn suffix(self) -> &'static [u8] {
        match self {
            Class::Text => b"text",
            Class::Blob => b"blob",
            Class::Integer => b"integer",
            Class::Real => b"real",
        }
    }
}

/// The one file name of a key value in a column of type `ty`.
///
/// `None` for NULL, and for NaN, which SQLite stores as NULL: a row with a NULL in its key has no
/// path.
pub fn encode(ty: FieldType, value: &Value) -> Option<Vec<u8>> {
    let mut name = Vec::with_capacity(40);
    let class = match value {
        Value::Null => return None,
        Value::Integer(number) => {
            display(&mut name, format_args!("{number}"));
            (ty != FieldType::Integer).then_some(Class::Integer)
        }
        Value::Real(number) if number.is_nan() => return None,
        Value::Real(number) => {
            // The Debug form: shortest that reads back the same, with an exponent where the plain
            // form would have hundreds of digits.
            display(&mut name, format_args!("{number:?}"));
            (ty != FieldType::Decimal).then_some(Class::Real)
        }
        Value::Text(bytes) => {
            push_string(&mut name, bytes);
            let canonical = is_string(ty) && !bytes.contains(&0);
            (!canonical).then_some(Class::Text)
        }
        Value::Blob(bytes) if is_string(ty) && bytes.contains(&0) => {
            push_string(&mut name, bytes);
            None
        }
        Value::Blob(bytes) => {
            push_hex_string(&mut name, bytes);
            (!is_bytes(ty)).then_some(Class::Blob)
        }
    };
    let suffix = class.map_or(0, |c| 1 + c.suffix().len());
    if name.len() + suffix > MAX_NAME {
        let raw = value.bytes().unwrap_or_default();
        name.truncate(cut(&name));
        name.push(b'~');
        for byte in Sha256::digest(raw).iter().take(DIGEST) {
            push_hex(&mut name, *byte, LOWER);
        }
    }
    if let Some(class) = class {
        name.push(b'~');
        name.extend_from_slice(class.suffix());
    }
    Some(name)
}

/// What a name stands for in a column of type `ty`; `None` for every name that [`encode`] gives to
/// no value.
///
/// SQLite compares across classes (the text `5` equals the integer 5 in an integer column, the real
/// 5.0 everywhere), so a row found by the value still has to pass [`matches_hashed`].
pub fn decode(ty: FieldType, name: &[u8]) -> Option<Decoded> {
    if name.len() > MAX_NAME {
        return None;
    }
    let mut parts = name.split(|b| *b == b'~');
    let body = parts.next()?;
    let (digest, class) = match (parts.next(), parts.next(), parts.next()) {
        (None, _, _) => (None, None),
        (Some(suffix), None, _) => match class_of(suffix) {
            Some(class) => (None, Some(class)),
            None => (Some(digest_of(suffix)?), None),
        },
        (Some(digest), Some(class), None) => (Some(digest_of(digest)?), Some(class_of(class)?)),
        _ => return None,
    };
    match digest {
        None => {
            let value = read_body(ty, body, class)?;
            (encode(ty, &value)? == name).then_some(Decoded::Exact(value))
        }
        Some(digest) => read_cut(ty, body, class, digest),
    }
}

/// Whether `name`, cut or not, is the name of `value`.
pub fn matches_hashed(ty: FieldType, value: &Value, name: &[u8]) -> bool {
    encode(ty, value).is_some_and(|own| own == name)
}

/// Types whose canonical storage is text.
fn is_string(ty: FieldType) -> bool {
    matches!(ty, FieldType::String | FieldType::Text)
}

/// Types whose canonical storage is a blob.
fn is_bytes(ty: FieldType) -> bool {
    matches!(ty, FieldType::Bytestring | FieldType::Binary)
}

/// Reads a whole body, leniently: the caller encodes the value again and compares.
fn read_body(ty: FieldType, body: &[u8], class: Option<Class>) -> Option<Value> {
    let class = match class {
        Some(class) => class,
        None if is_string(ty) => {
            let raw = unescape(body)?;
            return Some(if raw.contains(&0) {
                Value::Blob(raw)
            } else {
                Value::Text(raw)
            });
        }
        None if is_bytes(ty) => Class::Blob,
        None if ty == FieldType::Integer => Class::Integer,
        None => Class::Real,
    };
    Some(match class {
        Class::Text => Value::Text(unescape(body)?),
        Class::Blob => Value::Blob(unhex(body.strip_prefix(b"0x")?)?),
        Class::Integer => Value::Integer(std::str::from_utf8(body).ok()?.parse().ok()?),
        Class::Real => Value::Real(std::str::from_utf8(body).ok()?.parse().ok()?),
    })
}

/// Reads the body of a name that was cut.
fn read_cut(
    ty: FieldType,
    body: &[u8],
    class: Option<Class>,
    digest: [u8; DIGEST],
) -> Option<Decoded> {
    if !(CUT - MAX_STEP_BACK..=CUT).contains(&body.len()) {
        return None;
    }
    let mut again = Vec::with_capacity(CUT);
    let as_string = match class {
        None if is_string(ty) => true,
        None if is_bytes(ty) => false,
        Some(Class::Text) => true,
        // A canonical class is never named.
        Some(Class::Blob) if !is_bytes(ty) => false,
        _ => return None,
    };
    let prefix = if as_string {
        let prefix = unescape(body)?;
        push_string(&mut again, &prefix);
        prefix
    } else {
        let prefix = unhex(body.strip_prefix(b"0x")?)?;
        push_hex_string(&mut again, &prefix);
        prefix
    };
    let has_nul = prefix.contains(&0);
    let (text, blob) = match class {
        None if is_string(ty) => (!has_nul, true),
        Some(Class::Text) => (true, false),
        // In a string column a blob with a NUL is written as a string.
        Some(Class::Blob) if is_string(ty) => (false, !has_nul),
        _ => (false, true),
    };
    (again == body && (text || blob)).then_some(Decoded::Hashed {
        prefix,
        text,
        blob,
        digest,
    })
}

/// Where to cut a body that is too long.
fn cut(body: &[u8]) -> usize {
    let at = |i: usize| body.get(i).copied();
    // '%' only ever opens an escape, which has three bytes.
    if at(CUT - 1) == Some(b'%') {
        return CUT - 1;
    }
    if at(CUT - 2) == Some(b'%') {
        return CUT - 2;
    }
    // A UTF-8 character is a lead byte and at most three continuation bytes. A continuation byte
    // that follows no such lead is not UTF-8 and belongs to no character to keep whole.
    let continues = |i: usize| at(i).is_some_and(|b| (0x80..0xc0).contains(&b));
    (CUT - MAX_STEP_BACK..=CUT)
        .rev()
        .find(|i| !continues(*i))
        .filter(|i| at(*i).is_some_and(|b| b >= 0xc0))
        .unwrap_or(CUT)
}

const UPPER: &[u8; 16] = b"0123456789ABCDEF";
const LOWER: &[u8; 16] = b"0123456789abcdef";

fn push_hex(out: &mut Vec<u8>, byte: u8, digits: &[u8; 16]) {
    for nibble in [byte >> 4, byte & 0xf] {
        out.extend(digits.get(usize::from(nibble)));
    }
}

fn display(out: &mut Vec<u8>, number: std::fmt::Arguments<'_>) {
    // Writing to a Vec does not fail.
    let _ = out.write_fmt(number);
}

/// Writes `0x` and hex, as far as a name can use it.
fn push_hex_string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(b"0x");
    for byte in bytes {
        if out.len() > MAX_NAME {
            break;
        }
        push_hex(out, *byte, LOWER);
    }
}

/// Writes a string with its escapes, as far as a name can use it.
fn push_string(out: &mut Vec<u8>, bytes: &[u8]) {
    if bytes.is_empty() {
        out.push(b'%');
    }
    for (i, byte) in bytes.iter().enumerate() {
        if out.len() > MAX_NAME {
            break;
        }
        match byte {
            0..0x20 | 0x7f | b'/' | b'%' | b'~' => {
                out.push(b'%');
                push_hex(out, *byte, UPPER);
            }
            b'.' if i == 0 => out.extend_from_slice(b"%2E"),
            _ => out.push(*byte),
        }
    }
}

/// Undoes [`push_string`], and accepts escapes that it would not write.
fn unescape(body: &[u8]) -> Option<Vec<u8>> {
    if body == b"%" {
        return Some(Vec::new());
    }
    let mut raw = Vec::with_capacity(body.len());
    let mut bytes = body.iter();
    while let Some(byte) = bytes.next() {
        raw.push(match byte {
            b'%' => hex_digit(*bytes.next()?)? << 4 | hex_digit(*bytes.next()?)?,
            _ => *byte,
        });
    }
    Some(raw)
}

fn unhex(digits: &[u8]) -> Option<Vec<u8>> {
    let (pairs, []) = digits.as_chunks::<2>() else {
        return None;
    };
    pairs
        .iter()
        .map(|[high, low]| Some(hex_digit(*high)? << 4 | hex_digit(*low)?))
        .collect()
}

fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

fn class_of(suffix: &[u8]) -> Option<Class> {
    Class::ALL.into_iter().find(|c| c.suffix() == suffix)
}

fn digest_of(suffix: &[u8]) -> Option<[u8; DIGEST]> {
    if suffix.iter().any(u8::is_ascii_uppercase) {
        return None;
    }
    unhex(suffix)?.try_into().ok()
}

#[cfg(test)]
mod tests;
