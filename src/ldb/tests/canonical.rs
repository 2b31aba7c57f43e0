//! The fast way of canonical texts against the general one: a blank behind a text keeps it from
//! being canonical and changes nothing else.

use proptest::prelude::*;

use super::*;
use crate::model::{Extent, Value};

/// A column of every affinity; then what the schema of an operator's table may hold.
const EVERY: &str = r#"CREATE TABLE app___every ("k" VARCHAR(191), "i" INTEGER, "r" REAL, "t" TEXT, "b" BLOB, "n" NUMERIC, PRIMARY KEY("k","i"));"#;
const ODD: &str = r#"CREATE TABLE app___odd ("k" BLOB(255) PRIMARY KEY, "i" INTEGER NOT NULL DEFAULT 7, "t" TEXT UNIQUE, "c" INTEGER CHECK ("c" < 100), "rowid" TEXT);"#;

const TABLES: [(&str, &[&str], &str); 4] = [
    ("app___flags", &["name", "on", "note"], FLAGS),
    ("app___limits", &["id", "n"], LIMITS),
    ("app___every", &["k", "i", "r", "t", "b", "n"], EVERY),
    ("app___odd", &["k", "i", "t", "c", "rowid"], ODD),
];

fn literal() -> impl Strategy<Value = String> {
    prop_oneof![
        2 => Just("NULL".to_owned()),
        4 => (-3..4i64).prop_map(|i| i.to_string()),
        2 => any::<i64>().prop_map(|i| i.to_string()),
        1 => prop::sample::select(vec![
            // Behind the largest integer itself SQLite takes random rowids.
            "9223372036854770000", "9223372036854775808", "-9223372036854775808",
            "-9223372036854775809", "007", "-0", "0x10", "1e3", "+1", "- 1", "1.", ".5", "1.5e-3",
            "X'00'", "x'0'", "x'0g'", "TRUE", "null", "true", "false", "-0.0", "0.0", "1.0",
            "9007199254740993.0", "179769313486231580793.0", "'unclosed", "\"k\"", "\"nobody\"",
            "length('abc')", "random()", "9223372036854775807.0", "-9223372036854775808.0",
        ]).prop_map(str::to_owned),
        2 => "-?[0-9]{1,20}\\.[0-9]{1,20}",
        1 => any::<f64>().prop_map(|f| if f.is_finite() { format!("{f}") } else { "0".into() }),
        3 => prop::sample::select(vec!["'a'", "'A'", "''", "'1'", "' 1 '", "'1.0'", "'1e2'", "'0x1'"])
            .prop_map(str::to_owned),
        2 => "'([a-c0-9.e é\n😀-]|''){0,6}'",
        2 => "x'([0-9a-fA-F]{2}){0,3}'",
    ]
}

fn column(columns: &'static [&'static str]) -> impl Strategy<Value = &'static str> {
    prop_oneof![
        60 => prop::sample::select(columns.to_vec()),
        1 => prop::sample::select(vec!["nobody", "rowid", "Name", "true"]),
    ]
}

fn canonical() -> impl Strategy<Value = String> {
    prop::sample::select(TABLES.to_vec()).prop_flat_map(|(table, columns, _)| {
        let replace = prop_oneof![
            4 => Just(columns.to_vec()),
            1 => Just(columns.to_vec()).prop_shuffle(),
            1 => prop::collection::vec(column(columns), 1..5),
        ]
        .prop_flat_map(|columns| {
            let values = columns.len();
            (Just(columns), prop::collection::vec(literal(), values))
        })
        .prop_map(move |(columns, values)| {
            let columns: Vec<_> = columns.iter().map(|c| format!("\"{c}\"")).collect();
            let (columns, values) = (columns.join(","), values.join(","));
            format!("REPLACE INTO {table} ({columns}) VALUES({values})")
        });
        let delete =
            prop::collection::vec((column(columns), literal()), 1..3).prop_map(move |keys| {
                let keys: Vec<_> = keys.iter().map(|(k, v)| format!("\"{k}\" = {v}")).collect();
                format!("DELETE FROM {table} WHERE {}", keys.join(" AND "))
            });
        prop_oneof![3 => replace, 1 => delete]
    })
}

fn statement() -> impl Strategy<Value = String> {
    let mutated = (canonical(), any::<prop::sample::Index>(), "[ -~]{0,2}");
    prop_oneof![
        40 => canonical(),
        2 => mutated.prop_map(|(text, at, with)| {
            let mut chars: Vec<char> = text.chars().collect();
            let at = at.index(chars.len());
            chars.splice(at..=at, with.chars());
            chars.into_iter().collect()
        }),
        1 => prop::sample::select(TABLES.to_vec())
            .prop_map(|(table, ..)| format!("DELETE FROM {table}")),
        1 => prop::sample::select(TABLES.to_vec())
            .prop_map(|(table, ..)| format!("ALTER TABLE {table} ADD COLUMN \"nobody\" TEXT")),
        1 => prop::sample::select(TABLES.to_vec())
            .prop_map(|(table, ..)| format!("DROP TABLE IF EXISTS {table}")),
        2 => prop::sample::select(TABLES.to_vec()).prop_map(|(_, _, create)| create.to_owned()),
    ]
}

/// Everything in the LDB but the digest, with storage classes.
fn contents(fixture: &Fixture) -> Vec<String> {
    let mut all = Vec::new();
    for table in fixture.rows("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name") {
        let columns = fixture.rows(&format!(
            "SELECT 'typeof(\"' || name || '\"), \"' || name || '\"' FROM pragma_table_info('{table}')"
        ));
        let rows = fixture.rows(&format!(
            "SELECT _rowid_, {} FROM {table} ORDER BY _rowid_",
            columns.join(", ")
        ));
        let rows = rows.into_iter().filter(|row| !row.contains("last_digest|"));
        all.extend(rows.map(|row| format!("{table}|{row}")));
    }
    all
}

/// The values of a key, which their own `Debug` may hide.
fn key(key: &[Value]) -> String {
    let values = key.iter().map(|value| match value {
        Value::Null => "NULL".into(),
        Value::Integer(i) => i.to_string(),
        Value::Real(r) => format!("{:x}", r.to_bits()),
        Value::Text(text) => format!("t{text:?}"),
        Value::Blob(blob) => format!("b{blob:?}"),
    });
    values.collect::<Vec<String>>().join(" ")
}

/// A change set as a text that does not depend on the order of its rows.
fn told(changes: ChangeSet) -> String {
    let tables = changes.tables.into_iter().map(|table| {
        let mut lines = match table.extent {
            Extent::Whole => vec!["whole".to_owned()],
            Extent::Rows { rows, dirs } => {
                let rows = rows
                    .iter()
                    .map(|row| format!("{:?} {:?} {}", row.kind, row.fields, key(&row.key)));
                let dirs = dirs
                    .iter()
                    .map(|dir| format!("{} {}", dir.exists, key(&dir.prefix)));
                rows.chain(dirs).collect()
            }
        };
        lines.sort();
        format!("{}: {lines:?}", table.table)
    });
    let mut tables: Vec<_> = tables.collect();
    tables.sort();
    format!(
        "{} {} {:?} {tables:?}",
        changes.from, changes.to, changes.time
    )
}

proptest! {
    #[test]
    fn canonical_texts_do_what_sqlite_makes_of_them(
        batches in prop::collection::vec(prop::collection::vec(statement(), 1..8), 1..12)
    ) {
        let create = TABLES.map(|(.., create)| create);
        let (mut fast, mut general) = (Fixture::with(&create), Fixture::with(&create));
        for batch in batches {
            let blank: Vec<String> = batch.iter().map(|text| format!("{text} ")).collect();
            let blank: Vec<&str> = blank.iter().map(String::as_str).collect();
            let batch: Vec<&str> = batch.iter().map(String::as_str).collect();
            let told_fast = fast.apply(&batch).map(told);
            prop_assert_eq!(told_fast, general.apply(&blank).map(told), "{:?}", batch);
            prop_assert_eq!(contents(&fast), contents(&general), "{:?}", batch);
        }
    }
}

#[test]
fn canonical_texts_take_the_fast_way() {
    let mut fixture = Fixture::with(&[FLAGS]);
    let replace =
        |n: u32| format!(r#"REPLACE INTO app___flags ("name","on","note") VALUES('a',{n},NULL)"#);
    let way = |fixture: &mut Fixture, text: &str| {
        fixture
            .writer
            .guard
            .enter(std::time::Duration::from_secs(1));
        let done = fixture.writer.run_canonical(text);
        fixture.writer.guard.leave();
        done.is_some()
    };
    assert!(
        !way(&mut fixture, &replace(1)),
        "nothing captures the change"
    );
    fixture.apply(&[&replace(1)]).unwrap();
    assert!(way(&mut fixture, &replace(2)));
    assert!(way(
        &mut fixture,
        r#"DELETE FROM app___flags WHERE "name" = 'a'"#
    ));
    fixture.writer.capture.reset();
    assert!(!way(
        &mut fixture,
        r#"DELETE FROM app___flags WHERE "nobody" = 'a'"#
    ));
    assert!(!way(&mut fixture, r#"DELETE FROM _ldb_seq WHERE "id" = 1"#));
    fixture
        .apply(&["ALTER TABLE app___flags ADD COLUMN \"c\" TEXT"])
        .unwrap();
    assert!(
        !way(&mut fixture, &replace(3)),
        "the table's shape has changed"
    );
}
