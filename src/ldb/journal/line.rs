//! One line of the journal: what a ledger transaction did to one table, as JSON. Pure.
//!
//! `{"seq":21,"begin":19,"time":"…Z","events":[…],"rows":N,"changes":[…]}`; `docs/SEMANTICS.md`
//! says what the parts mean.

use std::io::Write as _;

use crate::ldb::image::{Held, fields, held, same, unpack_key};
use crate::ldb::recorder::{Detail, Net, TableLog, Transaction};
use crate::model::{Table, Value};
use crate::tree::{name, render};

/// Appends the line, with its newline. Returns whether there was anything to tell.
pub(super) fn push(out: &mut Vec<u8>, transaction: &Transaction, log: &TableLog) -> bool {
    let start = out.len();
    // Writing to a Vec does not fail, here and below.
    let _ = write!(
        out,
        "{{\"seq\":{},\"begin\":{},\"time\":\"",
        transaction.seq, transaction.begin
    );
    // `2024-02-29 12:34:56.000123+00:00`, with the marks of RFC 3339.
    let time = transaction.time.to_timestamp();
    let (date, rest) = time.split_once(' ').unwrap_or((&time, ""));
    let _ = write!(out, "{date}T{}Z\"", rest.trim_end_matches("+00:00"));
    if !log.events.is_empty() {
        let names: Vec<&str> = log.events.iter().map(|event| event.as_str()).collect();
        let _ = write!(out, ",\"events\":[\"{}\"]", names.join("\",\""));
    }
    let mut any = !log.events.is_empty();
    match &log.detail {
        Detail::Count if log.rows > 0 => {
            any = true;
            let _ = write!(out, ",\"rows\":{}", log.rows);
        }
        Detail::Count => {}
        Detail::Rows(table, records) => {
            out.extend_from_slice(b",\"changes\":[");
            let mut first = true;
            for net in records.net() {
                if push_change(out, table, &net, first) {
                    first = false;
                    any = true;
                }
            }
            out.push(b']');
        }
    }
    if any {
        out.extend_from_slice(b"}\n");
    } else {
        out.truncate(start);
    }
    any
}

fn push_change(out: &mut Vec<u8>, table: &Table, net: &Net<'_>, first: bool) -> bool {
    let kind = match (net.old, net.new) {
        (None, None) => return false,
        (None, Some(_)) => "created",
        (Some(_), None) => "deleted",
        (Some(old), Some(new)) => {
            if old == new
                || fields(old)
                    .zip(fields(new))
                    .all(|(old, new)| same(old, new))
            {
                return false;
            }
            "updated"
        }
    };
    if !first {
        out.push(b',');
    }
    out.push(b'{');
    let key = unpack_key(net.key);
    if let Some(path) = path(table, &key) {
        match std::str::from_utf8(&path) {
            Ok(path) => {
                out.extend_from_slice(b"\"path\":");
                render::push_json(out, path);
            }
            Err(_) => {
                out.extend_from_slice(b"\"path_base64\":");
                render::push_base64(out, &path);
            }
        }
        out.push(b',');
    }
    out.extend_from_slice(b"\"key\":[");
    for (i, (field, value)) in table.schema.key_fields().zip(&key).enumerate() {
        if i > 0 {
            out.push(b',');
        }
        render::push_value(out, field.ty, value);
    }
    let _ = write!(out, "],\"kind\":\"{kind}\"");
    let both = net.old.zip(net.new);
    for (name, image, other) in [
        ("old", net.old, both.map(|(_, new)| new)),
        ("new", net.new, both.map(|(old, _)| old)),
    ] {
        if let Some(image) = image {
            let _ = write!(out, ",\"{name}\":{{");
            push_fields(out, table, image, other);
            out.push(b'}');
        }
    }
    out.push(b'}');
    true
}

/// The fields of a row; of a row that was changed, those that differ from the `other` image.
fn push_fields(out: &mut Vec<u8>, table: &Table, image: &[u8], other: Option<&[u8]>) {
    let mut others = other.map(fields);
    let mut first = true;
    for (field, value) in table.schema.fields().iter().zip(fields(image)) {
        let other = others.as_mut().and_then(Iterator::next);
        if other.is_some_and(|other| same(value, other)) {
            continue;
        }
        if !std::mem::take(&mut first) {
            out.push(b',');
        }
        let _ = write!(out, "\"{}\":", field.name);
        match held(value) {
            Some(Held::Value(value)) => render::push_value(out, field.ty, &value),
            Some(Held::Omitted(length)) => {
                let _ = write!(out, "{{\"omitted\":{length}}}");
            }
            None => render::push_value(out, field.ty, &Value::Null),
        }
    }
}

/// Where the row is, below its table's directory.
fn path(table: &Table, key: &[Value]) -> Option<Vec<u8>> {
    let mut path = Vec::with_capacity(32);
    for (field, value) in table.schema.key_fields().zip(key) {
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(&name::encode(field.ty, value)?);
    }
    Some(path)
}
