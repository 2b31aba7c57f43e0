//! Keys as file names, through a real mount: whatever is in a key, its row has one path, every
//! path leads to its row, and no other spelling leads anywhere.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod common {
    pub mod daemon;
    pub mod ledger;
}

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use common::ledger::Tree;
use ctlfs::model::{FieldType, Value};
use ctlfs::tree::name;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use rusqlite::types::ValueRef;

/// A table of keys: its key's types, and keys of as many parts.
#[derive(Debug, Clone)]
struct Batch {
    types: Vec<FieldType>,
    keys: Vec<Vec<Value>>,
}

const COLUMNS: [&str; 3] = ["a", "b", "c"];

impl Batch {
    fn one(ty: FieldType, values: impl IntoIterator<Item = Value>) -> Self {
        Batch {
            types: vec![ty],
            keys: values.into_iter().map(|value| vec![value]).collect(),
        }
    }

    /// The statements that make `table` hold the keys.
    fn statements(&self, table: &str) -> Vec<String> {
        let columns: Vec<String> = COLUMNS
            .iter()
            .zip(&self.types)
            .map(|(name, ty)| format!("\"{name}\" {}", ty.sqlite_type()))
            .collect();
        let key = &COLUMNS[..self.types.len()];
        let key: Vec<String> = key.iter().map(|name| format!("\"{name}\"")).collect();
        let key = key.join(",");
        let columns = columns.join(", ");
        let create =
            format!("CREATE TABLE {table} ({columns}, \"note\" TEXT, PRIMARY KEY({key}));");
        let rows = self.keys.iter().map(|values| {
            let values: Vec<String> = values.iter().map(literal).collect();
            let values = values.join(",");
            format!("REPLACE INTO {table} ({key},\"note\") VALUES({values},'note')")
        });
        std::iter::once(create).chain(rows).collect()
    }
}

/// A value as SQL that stores exactly its class and bytes, as far as the column's affinity lets it.
fn literal(value: &Value) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    match value {
        Value::Null => "NULL".into(),
        Value::Integer(number) => number.to_string(),
        Value::Real(number) if number.is_infinite() => {
            let sign = if *number < 0.0 { "-" } else { "" };
            format!("{sign}9e999")
        }
        Value::Real(number) => format!("{number:?}"),
        Value::Blob(bytes) => format!("x'{}'", hex(bytes)),
        Value::Text(bytes) => format!("CAST(x'{}' AS TEXT)", hex(bytes)),
    }
}

fn value_of(value: ValueRef<'_>) -> Value {
    match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(number) => Value::Integer(number),
        ValueRef::Real(number) => Value::Real(number),
        ValueRef::Text(bytes) => Value::Text(bytes.to_vec()),
        ValueRef::Blob(bytes) => Value::Blob(bytes.to_vec()),
    }
}

/// What the field file of a value holds.
fn content(value: &Value) -> Option<Vec<u8>> {
    match value {
        Value::Null => None,
        Value::Integer(number) => Some(number.to_string().into_bytes()),
        Value::Real(number) => Some(number.to_string().into_bytes()),
        Value::Text(bytes) | Value::Blob(bytes) => Some(bytes.clone()),
    }
}

/// The keys that the LDB holds, whatever the ledger said.
fn stored(tree: &Tree, table: &str, parts: usize) -> Vec<Vec<Value>> {
    let columns = COLUMNS[..parts].join(",");
    let ldb = tree.ldb();
    let mut query = ldb
        .prepare(&format!("SELECT {columns} FROM {table}"))
        .unwrap();
    query
        .query_map([], |row| {
            Ok((0..parts)
                .map(|i| value_of(row.get_ref(i).unwrap()))
                .collect())
        })
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap()
}

/// The entries of a directory that are not ctlfs's own.
fn listed(directory: &Path) -> Vec<Vec<u8>> {
    fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_vec())
        .filter(|name| !matches!(name.as_slice(), b".schema.json" | b".seq"))
        .collect()
}

fn below(directory: &Path, name: &[u8]) -> PathBuf {
    directory.join(OsStr::from_bytes(name))
}

/// Puts the batch into a table of its own, and holds the tree to it.
fn check(tree: &Tree, number: usize, batch: &Batch) -> Result<(), TestCaseError> {
    let table = format!("names___t{number}xx");
    tree.apply(&batch.statements(&table));
    let directory = tree.path(format!("names/t{number}xx"));
    let keys = stored(tree, &table, batch.types.len());

    // What each directory must list: the names of the key parts below it.
    let mut expected: BTreeMap<PathBuf, BTreeSet<Vec<u8>>> = BTreeMap::new();
    expected.entry(directory.clone()).or_default();
    let mut rows: BTreeMap<PathBuf, &Vec<Value>> = BTreeMap::new();
    for key in keys.iter().filter(|key| !key.iter().any(Value::is_null)) {
        let mut path = directory.clone();
        for (ty, value) in batch.types.iter().zip(key) {
            let name = name::encode(*ty, value).unwrap();
            prop_assert!(!name.is_empty() && name.len() <= 255);
            expected
                .entry(path.clone())
                .or_default()
                .insert(name.clone());
            path = below(&path, &name);
        }
        prop_assert!(rows.insert(path, key).is_none(), "two rows have one path");
    }
    for (directory, names) in &expected {
        let found = listed(directory);
        let set: BTreeSet<Vec<u8>> = found.iter().cloned().collect();
        prop_assert_eq!(found.len(), set.len(), "a name is listed twice");
        prop_assert_eq!(&set, names);
    }
    for (path, key) in &rows {
        for (column, value) in COLUMNS.iter().zip(*key) {
            let read = fs::read(path.join(column)).ok();
            prop_assert_eq!(read, content(value), "{:?}/{}", path, column);
        }
        prop_assert_eq!(fs::read(path.join("note")).unwrap(), b"note");
    }
    for (directory, names) in &expected {
        for name in names {
            for other in other_spellings(name) {
                if !names.contains(&other) {
                    let found = fs::symlink_metadata(below(directory, &other));
                    let error = found.err().and_then(|error| error.raw_os_error());
                    prop_assert!(
                        matches!(error, Some(libc::ENOENT | libc::ENAMETOOLONG)),
                        "{:?} leads somewhere: {:?}",
                        OsStr::from_bytes(&other),
                        error
                    );
                }
            }
        }
    }
    tree.apply(&[format!("DROP TABLE IF EXISTS {table}")]);
    prop_assert!(!directory.exists());
    Ok(())
}

/// Names that look as if they might lead to the same place.
fn other_spellings(name: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for prefix in [&b"0"[..], b"+", b"-", b" ", b"0x", b"%"] {
        all.push([prefix, name].concat());
    }
    for suffix in [
        &b"0"[..],
        b" ",
        b"%",
        b".0",
        b"~text",
        b"~blob",
        b"~integer",
        b"~real",
    ] {
        all.push([name, suffix].concat());
    }
    all.push(name.to_ascii_uppercase());
    all.push(name.to_ascii_lowercase());
    all.push(name[..name.len() - 1].to_vec());
    // Another digit at the end: the digest, where there is one.
    let mut wrong = name.to_vec();
    if let Some(last) = wrong.last_mut() {
        *last = if *last == b'0' { b'1' } else { b'0' };
    }
    all.push(wrong);
    // Written as an escape although it need not be.
    all.push([format!("%{:02X}", name[0]).as_bytes(), &name[1..]].concat());
    if let Some(at) = name.iter().position(|b| *b == b'~') {
        all.push(name[..at].to_vec());
        all.push([&name[..at], b"~d41d8cd98f00b204e9800998ecf8427e"].concat());
    }
    all.retain(|other| {
        other != name
            && !other.is_empty()
            && *other != b"."
            && *other != b".."
            && !other.contains(&b'/')
    });
    all
}

#[test]
fn every_kind_of_key_has_one_path() {
    use FieldType::{Bytestring, Integer, String};
    let long = |end: &str| Value::text(format!("{}{end}", "p".repeat(200)));
    let text = |t: &str| Value::text(t);
    let blob = |b: &[u8]| Value::Blob(b.to_vec());
    let bytes: Vec<u8> = (0..=255).collect();
    let batches = [
        Batch::one(
            String,
            [
                "",
                ".",
                "..",
                "...",
                ".a",
                "/",
                "//",
                "a/b",
                "\n",
                "a\nb",
                "\t",
                "\r",
                "\u{1b}[31m",
                "\u{7f}",
                "%",
                "%%",
                "100%",
                "%2F",
                "%2f",
                "~",
                "a~b",
                "~text",
                "~blob",
                " ",
                " a ",
                "*",
                "?",
                "-rf",
                "'",
                "\"",
                "\\",
                "$HOME",
                "row.json",
                ".schema.json",
                ".seq",
                "größe 🦀",
                "a",
                "A",
                "00",
                "0x00",
                "x~text",
            ]
            .map(text)
            .into_iter()
            .chain([
                text(&"🦀".repeat(191)),
                text(&"a".repeat(255)),
                text(&"a".repeat(256)),
                text(&"/".repeat(191)),
                blob(b"a\0b"),
                Value::Text(b"a\0b".to_vec()),
                blob(b"\0"),
                blob(b"a"),
                blob(b""),
                blob(&bytes),
                Value::Text(bytes[1..].to_vec()),
                Value::Text(vec![0xff, 0xfe]),
            ]),
        ),
        // Many long keys that begin alike: the digest tells them apart.
        Batch::one(
            String,
            (0..40)
                .map(|i| long(&format!("{i}{}", "q".repeat(100))))
                .chain([
                    long(""),
                    long("x"),
                    blob(&[b"p".repeat(200), vec![0; 100]].concat()),
                ]),
        ),
        Batch::one(String, (1..=255u8).map(|byte| Value::Text(vec![byte]))),
        Batch::one(String, (0..=255u8).map(|byte| blob(&[byte]))),
        Batch::one(
            Integer,
            [i64::MIN, i64::MIN + 1, -10, -1, 0, 1, 9, 10, i64::MAX].map(Value::Integer),
        ),
        Batch::one(
            Bytestring,
            (0..=255usize)
                .map(|length| blob(&bytes[..length]))
                .chain((0..=255u8).map(|byte| blob(&[byte])))
                .chain((0..20u8).map(|end| blob(&[vec![7; 200], vec![end]].concat())))
                .chain([
                    text("0x00"),
                    text("x"),
                    Value::Integer(5),
                    Value::Real(0.25),
                ]),
        ),
        Batch {
            types: vec![Integer, String, Bytestring],
            keys: vec![
                vec![Value::Integer(1), text("a/b"), blob(b"")],
                vec![Value::Integer(1), text("a/b"), blob(b"\0")],
                vec![Value::Integer(1), text(""), text("")],
                vec![text("one"), text("%"), Value::Real(f64::INFINITY)],
                vec![text(""), blob(b"x"), Value::Integer(-1)],
                vec![Value::Real(0.5), text(&"🦀".repeat(191)), blob(&[9; 255])],
                vec![blob(b"1"), text("."), blob(b".")],
                vec![Value::Null, text("no path"), blob(b"")],
            ],
        },
    ];
    let tree = Tree::new::<&str>(&[], &[]);
    for (number, batch) in batches.iter().enumerate() {
        check(&tree, number, batch).unwrap();
    }
}

fn string_bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        prop::sample::select(vec![
            "/", "%", "~", ".", "\n", "\x7f", "..", "🦀", "é", "a", "%2F", "~text", "0x", "\u{80}",
            "'",
        ])
        .prop_map(|s| s.as_bytes().to_vec()),
        any::<u8>().prop_map(|b| vec![b]),
    ];
    prop_oneof![
        4 => prop::collection::vec(piece.clone(), 0..12).prop_map(|p| p.concat()),
        2 => prop::collection::vec(piece.clone(), 60..260).prop_map(|p| p.concat()),
        2 => (piece, 0..260usize).prop_map(|(p, n)| p.repeat(n)),
        1 => any::<String>().prop_map(String::into_bytes),
    ]
}

/// A value that belongs into a column of the type.
fn usual(ty: FieldType) -> BoxedStrategy<Value> {
    match ty {
        FieldType::Integer => prop_oneof![
            any::<i64>().prop_map(Value::Integer),
            (-3..3i64).prop_map(Value::Integer),
            prop::sample::select(vec![i64::MIN, i64::MAX]).prop_map(Value::Integer),
        ]
        .boxed(),
        FieldType::Bytestring => prop::collection::vec(any::<u8>(), 0..=255)
            .prop_map(Value::Blob)
            .boxed(),
        _ => string_bytes()
            .prop_map(|bytes| {
                if bytes.contains(&0) {
                    Value::Blob(bytes)
                } else {
                    Value::Text(bytes)
                }
            })
            .boxed(),
    }
}

/// What an operator can put there by hand.
fn unusual() -> BoxedStrategy<Value> {
    prop_oneof![
        string_bytes().prop_map(Value::Text),
        string_bytes().prop_map(Value::Blob),
        any::<i64>().prop_map(Value::Integer),
        // Never whole: SQLite takes 5 and 5.0 for the same key.
        (any::<i32>(), 1..4u8).prop_map(|(n, q)| Value::Real(f64::from(n) + f64::from(q) / 4.0)),
    ]
    .boxed()
}

fn batches() -> impl Strategy<Value = Batch> {
    let types = [FieldType::String, FieldType::Integer, FieldType::Bytestring];
    prop::collection::vec(prop::sample::select(types.to_vec()), 1..=3).prop_flat_map(|types| {
        // A single integer key is the rowid, which takes integers only.
        let strict = types == [FieldType::Integer];
        let key: Vec<BoxedStrategy<Value>> = types
            .iter()
            .map(|ty| {
                if strict {
                    usual(*ty)
                } else {
                    prop_oneof![4 => usual(*ty), 1 => unusual()].boxed()
                }
            })
            .collect();
        prop::collection::vec(key, 1..60).prop_map(move |keys| Batch {
            types: types.clone(),
            keys,
        })
    })
}

#[test]
fn any_key_maps_to_a_name_and_back() {
    let tree = Tree::new::<&str>(&[], &[]);
    let mut runner = TestRunner::new(Config {
        cases: 40,
        max_shrink_iters: 200,
        ..Config::default()
    });
    let number = std::cell::Cell::new(0);
    runner
        .run(&batches(), |batch| {
            number.set(number.get() + 1);
            check(&tree, number.get(), &batch)
        })
        .unwrap();
}
