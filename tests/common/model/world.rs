//! A mount, the ledger it follows, and the model: one step changes all three, and then they are
//! compared.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use ctlfs::executive::{Executive, Mutation};
use ctlfs::ledger::statement;
use ctlfs::model::{Field, FieldName, FieldType, TableRef, TableSchema, Value};
use rusqlite::Connection;

use super::look::{is_json, open, read_at, read_whole};
use super::{Datum, Entry, Model, Op, Path, Row, Table, Type, join, keys, shape, values};
use crate::common::daemon::{Daemon, Place};

/// Two in one family, so that it stays while one of them goes.
const TABLES: [(&str, &str); 4] = [
    ("app", "flags"),
    ("app", "routes"),
    ("app_", "flags"),
    ("tls", "certs"),
];

/// A file or directory that stays open.
enum Held {
    /// With the bytes it has for ever.
    File(File, Vec<u8>),
    /// With its path, and whether it still must be the directory at that path.
    Dir(File, Path, bool),
}

/// See the module.
pub struct World {
    daemon: Daemon,
    place: Place,
    executive: Executive,
    ledger: Connection,
    model: Model,
    held: Vec<Held>,
    /// Every path that was ever asked for since the ledger's tables were last dropped.
    known: BTreeSet<Path>,
    steps: u64,
    files: u64,
}

impl World {
    pub fn new() -> Self {
        let place = Place::new();
        let mut executive = Executive::open(&place.origin().parse().unwrap()).unwrap();
        executive.init().unwrap();
        for (family, _) in TABLES {
            executive.create_family(&family.parse().unwrap()).unwrap();
        }
        let ledger = Connection::open(place.ledger()).unwrap();
        ledger
            .busy_timeout(std::time::Duration::from_secs(5))
            .unwrap();
        let daemon = Daemon::follow(&place, &place.origin(), &["--poll-interval", "1ms"]);
        World {
            daemon,
            place,
            executive,
            ledger,
            model: Model::default(),
            held: Vec::new(),
            known: BTreeSet::new(),
            steps: 0,
            files: 0,
        }
    }

    pub fn summary(&self) -> String {
        format!("{} steps, {} files compared", self.steps, self.files)
    }

    /// Plays the steps from an empty tree.
    pub fn play(&mut self, steps: &[Op]) {
        self.held.clear();
        for (family, name) in self.model.tables.keys().copied().collect::<Vec<_>>() {
            self.drop_table(family, name);
        }
        self.compare("dropping everything");
        self.known.clear();
        for (number, step) in steps.iter().enumerate() {
            self.look_at_known(&format!("before step {number}"));
            self.take(step);
            self.steps += 1;
            self.compare(&format!("step {number}, {step:?}"));
        }
    }

    fn take(&mut self, step: &Op) {
        let table = |t: u8| TABLES[usize::from(t) % TABLES.len()];
        match step {
            Op::Create(t, choice, rows) => {
                let (family, name) = table(*t);
                if !self.model.tables.contains_key(&(family, name)) {
                    self.create(family, name, *choice, rows);
                }
            }
            Op::Mutate(a, b, rows) => {
                let changes: Vec<_> = rows
                    .iter()
                    .enumerate()
                    .map(|(i, row)| (table(if i % 2 == 0 { *a } else { *b }), row))
                    .collect();
                self.mutate(&changes);
            }
            Op::AddField(t, ty) => self.add_field(table(*t), Type::ALL[usize::from(*ty) % 6]),
            Op::Drop(t) => {
                let (family, name) = table(*t);
                self.drop_table(family, name);
            }
            Op::Clear(t) => self.clear(table(*t)),
            Op::Recreate(t, choice, rows, whole) => {
                let (family, name) = table(*t);
                if *whole {
                    self.recreate(family, name, *choice, rows);
                } else {
                    self.drop_table(family, name);
                    self.create(family, name, *choice, rows);
                }
            }
            Op::Nullify(t, field) => self.nullify(table(*t), *field),
            Op::Hold(choice) => self.hold(*choice),
            Op::Release => self.held.clear(),
        }
    }

    /// Appends statements as an operator does: in one transaction with their effect, under the
    /// ledger's lock.
    fn append(&mut self, statements: &[String]) {
        let transaction = self.ledger.transaction().unwrap();
        let lock = "UPDATE locks SET clock = clock + 1 WHERE id = 'ledger'";
        assert_eq!(transaction.execute(lock, []).unwrap(), 1);
        for text in statements {
            if !text.starts_with("---") {
                transaction.execute_batch(text).unwrap();
            }
            transaction
                .execute(
                    "INSERT INTO ctlstore_dml_ledger (statement) VALUES (?1)",
                    [text],
                )
                .unwrap();
        }
        transaction.commit().unwrap();
    }

    fn create(&mut self, family: &'static str, name: &'static str, choice: u8, rows: &[Row]) {
        let table = shape(choice);
        self.executive
            .create_table(&reference(family, name), &schema(&table))
            .unwrap();
        self.model.tables.insert((family, name), table);
        let rows: Vec<_> = rows.iter().map(|row| ((family, name), row)).collect();
        self.mutate(&rows);
    }

    fn mutate(&mut self, changes: &[((&'static str, &'static str), &Row)]) {
        let mut mutations = Vec::new();
        for (at, row) in changes {
            let Some(table) = self.model.tables.get_mut(at) else {
                continue;
            };
            let reference = reference(at.0, at.1);
            let filled = fill(table, row);
            let names = table.key_names(&filled);
            let field = |i: usize| table.fields[i].0.parse::<FieldName>().unwrap();
            let named = |all: &[usize]| -> Vec<_> {
                all.iter()
                    .map(|i| (field(*i), value(&filled[*i])))
                    .collect()
            };
            let everything: Vec<usize> = (0..table.fields.len()).collect();
            // Every second field besides the key.
            let some: Vec<usize> = everything
                .iter()
                .copied()
                .filter(|i| table.key.contains(i) || i % 2 == 1)
                .collect();
            match row.kind {
                0 | 1 => {
                    mutations.push(Mutation::Upsert {
                        table: reference,
                        values: named(&everything),
                    });
                    table.rows.insert(names, filled);
                }
                2 => {
                    mutations.push(Mutation::Put {
                        table: reference,
                        values: named(&some),
                    });
                    let nothing = vec![Datum::Null; table.fields.len()];
                    let stored = table.rows.entry(names).or_insert(nothing);
                    for i in some {
                        stored[i] = filled[i].clone();
                    }
                }
                _ => {
                    let key = table.key.clone();
                    mutations.push(Mutation::Delete {
                        table: reference,
                        key: named(&key),
                    });
                    table.rows.remove(&names);
                    let path = row_path(at.0, at.1, &names);
                    self.loosen(&path);
                }
            }
        }
        if !mutations.is_empty() {
            self.executive.mutate(&mutations).unwrap();
        }
    }

    fn add_field(&mut self, at: (&'static str, &'static str), ty: Type) {
        let Some(table) = self.model.tables.get_mut(&at) else {
            return;
        };
        if table.fields.len() >= 7 {
            return;
        }
        let name = format!("added{}", table.fields.len());
        let field = Field {
            name: name.parse().unwrap(),
            ty: field_type(ty),
        };
        self.executive
            .add_field(&reference(at.0, at.1), &field)
            .unwrap();
        table.fields.push((name, ty));
        table
            .rows
            .values_mut()
            .for_each(|row| row.push(Datum::Null));
    }

    fn drop_table(&mut self, family: &'static str, name: &'static str) {
        self.append(&[statement::drop_table(&reference(family, name))]);
        self.model.tables.remove(&(family, name));
        self.loosen(&join(&[family.as_bytes(), name.as_bytes()]));
        self.loosen(family.as_bytes());
    }

    fn clear(&mut self, at: (&'static str, &'static str)) {
        let Some(table) = self.model.tables.get_mut(&at) else {
            return;
        };
        table.rows.clear();
        self.append(&[statement::clear(&reference(at.0, at.1))]);
        self.loosen_below(&join(&[at.0.as_bytes(), at.1.as_bytes()]));
    }

    fn recreate(&mut self, family: &'static str, name: &'static str, choice: u8, rows: &[Row]) {
        let reference = reference(family, name);
        let mut table = shape(choice);
        let schema = schema(&table);
        let mut statements = vec![
            "--- BEGIN".to_owned(),
            statement::drop_table(&reference),
            statement::create_table(&reference, &schema),
        ];
        for row in rows {
            let filled = fill(&table, row);
            let values: Vec<Value> = filled.iter().map(value).collect();
            statements.push(statement::replace(&reference, &schema, &values));
            table.rows.insert(table.key_names(&filled), filled);
        }
        statements.push("--- COMMIT".to_owned());
        self.append(&statements);
        self.model.tables.insert((family, name), table);
        self.loosen(&join(&[family.as_bytes(), name.as_bytes()]));
    }

    fn nullify(&mut self, at: (&'static str, &'static str), choice: u8) {
        let Some(table) = self.model.tables.get_mut(&at) else {
            return;
        };
        let index = usize::from(choice) % table.fields.len();
        if table.key.contains(&index) {
            return;
        }
        table
            .rows
            .values_mut()
            .for_each(|row| row[index] = Datum::Null);
        let text = format!(
            "UPDATE {} SET \"{}\" = NULL",
            reference(at.0, at.1).sql_name(),
            table.fields[index].0
        );
        self.append(&[text]);
    }

    fn hold(&mut self, choice: [u8; 4]) {
        let tree: Vec<(Path, Entry)> = self.model.tree().into_iter().collect();
        for choice in choice {
            let Some((path, entry)) = tree.get(usize::from(choice) % tree.len().max(1)) else {
                return;
            };
            let file = open(&self.at(path), *entry == Entry::Dir);
            self.held.push(match entry {
                Entry::File(bytes) => Held::File(file, bytes.clone()),
                Entry::Dir => Held::Dir(file, path.clone(), true),
                Entry::Json(_) | Entry::Seq => {
                    // Whatever it is now.
                    let bytes = fs::read(self.at(path)).unwrap();
                    Held::File(file, bytes)
                }
            });
        }
    }

    /// The directory at `path` and what is below may have gone and come again: one that is held
    /// need not be the one at its path any more.
    fn loosen(&mut self, path: &[u8]) {
        for held in &mut self.held {
            if let Held::Dir(_, at, firm) = held {
                // A prefix of several key parts can go with its last row.
                let below = |a: &[u8], b: &[u8]| a == b || a.starts_with(&[b, b"/"].concat());
                let tables = path.split(|b| *b == b'/').count();
                *firm &= !(below(at, path) || (tables > 2 && below(path, at) && deep(at)));
            }
        }
    }

    fn loosen_below(&mut self, path: &[u8]) {
        for held in &mut self.held {
            if let Held::Dir(_, at, firm) = held {
                *firm &= !at.starts_with(&[path, b"/"].concat());
            }
        }
    }

    fn at(&self, path: &[u8]) -> PathBuf {
        self.daemon.path(OsStr::from_bytes(path))
    }

    /// Asks for every path that was ever known, in the kernel's memory or not.
    fn look_at_known(&self, when: &str) {
        let tree = self.model.tree();
        for path in &self.known {
            let found = fs::symlink_metadata(self.at(path));
            let shown = String::from_utf8_lossy(path);
            match (tree.get(path), found) {
                (None, Err(error)) => {
                    let absent = [libc::ENOENT, libc::ENOTDIR];
                    assert!(
                        absent.contains(&error.raw_os_error().unwrap()),
                        "{when}: {shown}: {error}"
                    );
                }
                (None, Ok(_)) => panic!("{when}: {shown} is there, and should not be"),
                (Some(_), Err(error)) => panic!("{when}: {shown} should be there: {error}"),
                (Some(entry), Ok(meta)) => {
                    assert_eq!(meta.is_dir(), *entry == Entry::Dir, "{when}: {shown}");
                    if let Entry::File(bytes) = entry {
                        assert_eq!(
                            meta.len(),
                            bytes.len() as u64,
                            "{when}: the size of {shown}"
                        );
                    }
                }
            }
        }
    }

    /// Waits for the mount, and compares all of it with the model.
    fn compare(&mut self, when: &str) {
        let last: Option<i64> = self
            .ledger
            .query_row("SELECT max(seq) FROM ctlstore_dml_ledger", [], |row| {
                row.get(0)
            })
            .unwrap();
        let last = last.unwrap_or(0).cast_unsigned();
        self.daemon.wait_seq(last);
        let tree = self.model.tree();
        self.known.extend(tree.keys().cloned());
        self.known.extend(self.model.absent());
        let tops = TABLES.iter();
        self.known.extend(
            tops.flat_map(|(f, t)| [f.as_bytes().to_vec(), join(&[f.as_bytes(), t.as_bytes()])]),
        );
        // First by name, with whatever the kernel remembers, then all there is.
        self.look_at_known(when);
        self.compare_held(when, &tree);
        let found = self.walk(last, when);
        for (path, entry) in &tree {
            let shown = String::from_utf8_lossy(path);
            assert!(found.contains_key(path), "{when}: {shown} is not listed");
            let same = match (entry, &found[path]) {
                (Entry::Seq, Entry::File(_)) => true,
                (Entry::Json(json), Entry::File(bytes)) => is_json(bytes, json),
                (expected, found) => expected == found,
            };
            assert!(same, "{when}: {shown} is {:?}, not {entry:?}", found[path]);
        }
        for path in found.keys() {
            let shown = String::from_utf8_lossy(path);
            assert!(
                tree.contains_key(path),
                "{when}: {shown} is listed, and should not be"
            );
        }
        self.files += found.len() as u64;
    }

    fn walk(&self, last: u64, when: &str) -> BTreeMap<Path, Entry> {
        let mut found = BTreeMap::new();
        let mut open: Vec<Path> = vec![Vec::new()];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(self.at(&directory)).unwrap() {
                let entry = entry.unwrap();
                let name = entry.file_name().into_vec();
                if directory.is_empty() && name == b".ctlfs" {
                    continue;
                }
                let path = if directory.is_empty() {
                    name
                } else {
                    join(&[&directory, &name])
                };
                let shown = String::from_utf8_lossy(&path);
                let meta = fs::symlink_metadata(self.at(&path)).unwrap();
                assert_eq!(
                    entry.file_type().unwrap(),
                    meta.file_type(),
                    "{when}: {shown}"
                );
                let entry = if meta.is_dir() {
                    open.push(path.clone());
                    Entry::Dir
                } else {
                    let bytes = fs::read(self.at(&path)).unwrap();
                    assert_eq!(
                        bytes.len() as u64,
                        meta.len(),
                        "{when}: the size of {shown}"
                    );
                    if path.ends_with(b"/.seq") && path.iter().filter(|b| **b == b'/').count() == 2
                    {
                        let text = std::str::from_utf8(&bytes).unwrap();
                        let seq: u64 = text.strip_suffix('\n').unwrap().parse().unwrap();
                        assert!(seq <= last, "{when}: {shown} is {seq}");
                    }
                    Entry::File(bytes)
                };
                assert!(
                    found.insert(path.clone(), entry).is_none(),
                    "{when}: listed twice"
                );
            }
        }
        found
    }

    fn compare_held(&self, when: &str, tree: &BTreeMap<Path, Entry>) {
        for held in &self.held {
            match held {
                Held::File(file, bytes) => {
                    let mut again = vec![0; bytes.len() + 1];
                    let length = read_whole(file, &mut again);
                    assert!(
                        again[..length] == bytes[..],
                        "{when}: an open file has changed"
                    );
                    assert_eq!(file.metadata().unwrap().len(), bytes.len() as u64);
                }
                Held::Dir(directory, path, firm) => {
                    let prefix = [&path[..], b"/"].concat();
                    let children = self
                        .known
                        .iter()
                        .filter(|p| p.starts_with(&prefix) && !p[prefix.len()..].contains(&b'/'));
                    for child in children {
                        let found = read_at(directory, &child[prefix.len()..]);
                        let shown = String::from_utf8_lossy(child);
                        match (tree.get(child), found) {
                            (None, None) => {}
                            (Some(Entry::File(bytes)), Some(Some(found))) => {
                                assert!(*bytes == found, "{when}: {shown}, by its open directory");
                            }
                            (Some(_), Some(_)) => {}
                            (Some(_), None) => {
                                assert!(!firm, "{when}: {shown} is not in its open directory");
                            }
                            (None, Some(_)) => {
                                panic!(
                                    "{when}: {shown} is in its open directory, and should not be"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Before the mount goes.
        self.held.clear();
        let _ = &self.place;
    }
}

/// Whether a path is below a table.
fn deep(path: &[u8]) -> bool {
    path.iter().filter(|b| **b == b'/').count() >= 2
}

fn row_path(family: &str, name: &str, key: &[Vec<u8>]) -> Path {
    let mut path = join(&[family.as_bytes(), name.as_bytes()]);
    for part in key {
        path = join(&[&path, part]);
    }
    path
}

/// The values that a row's numbers choose.
fn fill(table: &Table, row: &Row) -> Vec<Datum> {
    let mut chosen = Vec::new();
    for (index, (_, ty)) in table.fields.iter().enumerate() {
        let (from, number) = match table.key.iter().position(|k| *k == index) {
            Some(part) => (keys(*ty), row.key[part % 3]),
            None => (values(*ty), row.values[index % 5]),
        };
        chosen.push(from[usize::from(number) % from.len()].clone());
    }
    chosen
}

fn reference(family: &str, name: &str) -> TableRef {
    TableRef {
        family: family.parse().unwrap(),
        table: name.parse().unwrap(),
    }
}

fn field_type(ty: Type) -> FieldType {
    ty.name().parse().unwrap()
}

fn schema(table: &Table) -> TableSchema {
    let fields: Vec<Field> = table
        .fields
        .iter()
        .map(|(name, ty)| Field {
            name: name.parse().unwrap(),
            ty: field_type(*ty),
        })
        .collect();
    let key: Vec<FieldName> = table.key.iter().map(|i| fields[*i].name.clone()).collect();
    TableSchema::new(fields, &key).unwrap()
}

fn value(datum: &Datum) -> Value {
    match datum {
        Datum::Null => Value::Null,
        Datum::Integer(number) => Value::Integer(*number),
        Datum::Decimal(number) => Value::Real(*number),
        Datum::Text(text) => Value::text(text.clone()),
        Datum::Bytes(bytes) => Value::Blob(bytes.clone()),
    }
}
