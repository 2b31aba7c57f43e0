//! The reference model of the tree: tables in memory, and the files they ought to be.
//!
//! It shares no code with the crate: names, values and JSON are rendered here once more.

mod look;
pub mod world;

use std::collections::BTreeMap;

use base64::Engine;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

/// A step. Numbers choose from small sets, modulo their size.
#[derive(Debug, Clone)]
pub enum Op {
    /// Creates the table, if it is not there, in one of several shapes, with rows.
    Create(u8, u8, Vec<Row>),
    /// Changes rows of up to two tables in one transaction.
    Mutate(u8, u8, Vec<Row>),
    /// Adds a field.
    AddField(u8, u8),
    /// Drops the table.
    Drop(u8),
    /// Removes all rows.
    Clear(u8),
    /// Drops the table and creates it in another shape with rows; as one ledger transaction or
    /// entry by entry.
    Recreate(u8, u8, Vec<Row>, bool),
    /// An operator's own statement: a field becomes NULL in every row.
    Nullify(u8, u8),
    /// Opens a file and a directory and keeps them.
    Hold([u8; 4]),
    /// Closes them.
    Release,
}

/// What becomes of one row.
#[derive(Debug, Clone)]
pub struct Row {
    /// Upsert (0 and 1), put, delete.
    pub kind: u8,
    /// The key's values.
    pub key: [u8; 3],
    /// The other values.
    pub values: [u8; 5],
}

/// A field's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    String,
    Integer,
    Decimal,
    Text,
    Binary,
    Bytestring,
}

impl Type {
    pub const ALL: [Type; 6] = [
        Type::String,
        Type::Integer,
        Type::Decimal,
        Type::Text,
        Type::Binary,
        Type::Bytestring,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Type::String => "string",
            Type::Integer => "integer",
            Type::Decimal => "decimal",
            Type::Text => "text",
            Type::Binary => "binary",
            Type::Bytestring => "bytestring",
        }
    }
}

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub enum Datum {
    Null,
    Integer(i64),
    Decimal(f64),
    Text(String),
    Bytes(Vec<u8>),
}

/// The values that a key of this type may have.
pub fn keys(ty: Type) -> Vec<Datum> {
    let text = |t: &str| Datum::Text(t.into());
    match ty {
        Type::Integer => [0, 1, -1, i64::MAX, i64::MIN].map(Datum::Integer).into(),
        Type::Bytestring => vec![
            Datum::Bytes(vec![1]),
            Datum::Bytes(vec![]),
            Datum::Bytes(vec![0, 255, b'/']),
            Datum::Bytes(vec![0xab; 255]),
            Datum::Bytes((0..=254).collect()),
        ],
        _ => vec![
            text("a"),
            text("b"),
            text(""),
            text(".."),
            text("a/b"),
            text("100%~"),
            text(".seq"),
            text("row.json"),
            text("new\nline\u{7f}"),
            text("nul\0byte"),
            text("%"),
            text("'quoted' \"é😀\""),
            Datum::Text("😀".repeat(191)),
            Datum::Text("/".repeat(190)),
            Datum::Text(format!("{}b", "/".repeat(190))),
        ],
    }
}

/// The values that a field of this type may have.
pub fn values(ty: Type) -> Vec<Datum> {
    let text = |t: &str| Datum::Text(t.into());
    let mut values = vec![Datum::Null];
    values.extend(match ty {
        Type::String => keys(ty),
        Type::Integer => vec![
            Datum::Integer(0),
            Datum::Integer(7),
            Datum::Integer(i64::MAX),
            Datum::Integer(i64::MIN),
            Datum::Integer((1 << 53) + 1),
        ],
        Type::Decimal => [0.0, 0.25, -1.0, 1e21, 1e-7, f64::MAX, 1.0 / 3.0]
            .map(Datum::Decimal)
            .into(),
        Type::Text => vec![
            text("short"),
            text(""),
            text("two\nlines\n"),
            text("nul\0byte"),
            text("back\\slash ' \" \u{1}é"),
            Datum::Text("long and ".repeat(20_000)),
        ],
        Type::Binary | Type::Bytestring => vec![
            Datum::Bytes(vec![]),
            Datum::Bytes(vec![0]),
            Datum::Bytes((0..=200).collect()),
            Datum::Bytes(b"'; --".to_vec()),
        ],
    });
    if ty == Type::Binary {
        values.push(Datum::Bytes(
            (0..150_000_u32).map(|i| (i % 251) as u8).collect(),
        ));
    }
    values
}

/// A table as the model has it.
#[derive(Debug, Clone)]
pub struct Table {
    pub fields: Vec<(String, Type)>,
    /// Positions of the key fields.
    pub key: Vec<usize>,
    /// By the names of the directories that lead to the row.
    pub rows: BTreeMap<Vec<Vec<u8>>, Vec<Datum>>,
}

/// Fields, and the positions of those of the key.
type Shape = (&'static [(&'static str, Type)], &'static [usize]);

/// The shapes that a table may have.
pub fn shape(choice: u8) -> Table {
    use Type::{Binary, Bytestring, Decimal, Integer, String, Text};
    let shapes: [Shape; 7] = [
        (&[("name", String), ("enabled", Integer)], &[0]),
        (&[("id", Integer), ("note", Text), ("ratio", Decimal)], &[0]),
        // Another type under the same names.
        (&[("name", Bytestring), ("enabled", Text)], &[0]),
        (
            &[
                ("region", String),
                ("path", String),
                ("weight", Decimal),
                ("blob", Binary),
            ],
            &[0, 1],
        ),
        // The key's order is not the fields'.
        (
            &[("note", Text), ("part", Integer), ("name", String)],
            &[2, 1],
        ),
        (
            &[
                ("a", Bytestring),
                ("b", Integer),
                ("c", String),
                ("d", Bytestring),
            ],
            &[2, 0, 1],
        ),
        // No field but the key.
        (&[("name", String)], &[0]),
    ];
    let (fields, key) = shapes[usize::from(choice) % shapes.len()];
    Table {
        fields: fields.iter().map(|(n, t)| ((*n).to_owned(), *t)).collect(),
        key: key.to_vec(),
        rows: BTreeMap::new(),
    }
}

/// The name of a key's directory.
pub fn name(value: &Datum) -> Vec<u8> {
    // What must not be divided by a cut, one by one.
    let mut units: Vec<Vec<u8>> = Vec::new();
    let raw = match value {
        Datum::Integer(number) => return number.to_string().into_bytes(),
        Datum::Bytes(bytes) => {
            units.push(b"0x".to_vec());
            units.extend(bytes.iter().map(|b| format!("{b:02x}").into_bytes()));
            bytes.clone()
        }
        Datum::Text(text) => {
            if text.is_empty() {
                return b"%".to_vec();
            }
            for (i, c) in text.chars().enumerate() {
                let escaped =
                    matches!(c, '/' | '%' | '~' | '\0'..='\x1f' | '\x7f') || (i == 0 && c == '.');
                units.push(if escaped {
                    format!("%{:02X}", c as u32).into_bytes()
                } else {
                    c.to_string().into_bytes()
                });
            }
            text.clone().into_bytes()
        }
        Datum::Null | Datum::Decimal(_) => panic!("no key"),
    };
    let whole = units.concat();
    if whole.len() <= 255 {
        return whole;
    }
    let mut cut = Vec::new();
    for unit in units {
        if cut.len() + unit.len() > 200 {
            break;
        }
        cut.extend(unit);
    }
    let digest = Sha256::digest(&raw);
    let hex: String = digest.iter().take(16).map(|b| format!("{b:02x}")).collect();
    cut.push(b'~');
    cut.extend(hex.into_bytes());
    cut
}

/// The content of a field's file; `None` if there is none.
pub fn content(value: &Datum) -> Option<Vec<u8>> {
    Some(match value {
        Datum::Null => return None,
        Datum::Integer(number) => number.to_string().into_bytes(),
        Datum::Decimal(number) => format!("{number}").into_bytes(),
        Datum::Text(text) => text.clone().into_bytes(),
        Datum::Bytes(bytes) => bytes.clone(),
    })
}

/// What a place in the tree is.
#[derive(Debug, Clone, PartialEq)]
pub enum Entry {
    Dir,
    /// A file with exactly these bytes.
    File(Vec<u8>),
    /// A file with this JSON and a newline.
    Json(Json),
    /// A file with a sequence.
    Seq,
}

/// A path below the mount point, in bytes.
pub type Path = Vec<u8>;

pub fn join(parts: &[&[u8]]) -> Path {
    parts.join(&b'/')
}

/// All tables, by family and name.
#[derive(Debug, Clone, Default)]
pub struct Model {
    pub tables: BTreeMap<(&'static str, &'static str), Table>,
}

impl Model {
    /// Everything that the tree ought to hold, but for the daemon's own directory.
    pub fn tree(&self) -> BTreeMap<Path, Entry> {
        let mut tree = BTreeMap::new();
        for ((family, name), table) in &self.tables {
            let (family, name) = (family.as_bytes(), name.as_bytes());
            tree.insert(family.to_vec(), Entry::Dir);
            let top = join(&[family, name]);
            tree.insert(
                join(&[&top, b".schema.json"]),
                Entry::Json(table.schema(family, name)),
            );
            tree.insert(join(&[&top, b".seq"]), Entry::Seq);
            for (key, row) in &table.rows {
                let mut at = top.clone();
                for part in key {
                    at = join(&[&at, part]);
                    tree.insert(at.clone(), Entry::Dir);
                }
                for ((field, _), value) in table.fields.iter().zip(row) {
                    if let Some(bytes) = content(value) {
                        tree.insert(join(&[&at, field.as_bytes()]), Entry::File(bytes));
                    }
                }
                tree.insert(join(&[&at, b"row.json"]), Entry::Json(table.json(row)));
            }
            tree.insert(top, Entry::Dir);
        }
        tree
    }

    /// Paths that are not there but easily could be.
    pub fn absent(&self) -> Vec<Path> {
        let mut absent = Vec::new();
        for ((family, name), table) in &self.tables {
            for (key, row) in &table.rows {
                let mut at = join(&[family.as_bytes(), name.as_bytes()]);
                for part in key {
                    at = join(&[&at, part]);
                }
                for ((field, _), value) in table.fields.iter().zip(row) {
                    if *value == Datum::Null {
                        absent.push(join(&[&at, field.as_bytes()]));
                    }
                }
            }
        }
        absent
    }
}

impl Table {
    pub fn key_names(&self, row: &[Datum]) -> Vec<Vec<u8>> {
        self.key.iter().map(|i| name(&row[*i])).collect()
    }

    fn schema(&self, family: &[u8], name: &[u8]) -> Json {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        let fields = self.fields.iter();
        json!({
            "family": text(family),
            "table": text(name),
            "fields": fields.map(|(n, t)| json!({"name": n, "type": t.name()})).collect::<Vec<_>>(),
            "key": self.key.iter().map(|i| self.fields[*i].0.clone()).collect::<Vec<_>>(),
        })
    }

    fn json(&self, row: &[Datum]) -> Json {
        let fields = self.fields.iter().zip(row);
        let values = fields.map(|((name, _), value)| {
            let json = match value {
                Datum::Null => Json::Null,
                Datum::Integer(number) => json!(number),
                Datum::Decimal(number) => json!(number),
                Datum::Text(text) => json!(text),
                Datum::Bytes(bytes) => {
                    json!(base64::engine::general_purpose::STANDARD.encode(bytes))
                }
            };
            (name.clone(), json)
        });
        Json::Object(values.collect())
    }
}
