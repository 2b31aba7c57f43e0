//! Change sets and last-change records against a model: the tables before and after.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proptest::prelude::*;
use rusqlite::types::Value as Sql;

use super::*;
use crate::model::{Extent, RowKind, TableRef, Value};

const ROUTES: &str = r#"CREATE TABLE app___routes ("a" VARCHAR(191), "b" INTEGER, "c" BLOB(255), "v" TEXT, "w" REAL, PRIMARY KEY("c", "b", "a"));"#;

/// The key's columns, the columns, and the create statement of the tables under test.
const TABLES: [(&str, &[usize], &[&str], &str); 3] = [
    ("app___flags", &[0], &["name", "on", "note"], FLAGS),
    ("app___limits", &[0], &["id", "n"], LIMITS),
    (
        "app___routes",
        &[2, 1, 0],
        &["a", "b", "c", "v", "w"],
        ROUTES,
    ),
];

type Row = Vec<Sql>;
/// Rows by the text of their key, with rowid and record.
type Rows = BTreeMap<String, (Row, Option<(i64, i64)>)>;

fn snapshot(conn: &Connection, table: &str, key: &[usize]) -> Rows {
    let mut statement = conn
        .prepare(&format!(
            "SELECT m.seq, m.time, t.* FROM {table} t LEFT JOIN _ctlfs_rows___{table} m ON m.id = t._rowid_"
        ))
        .unwrap();
    let columns = statement.column_count();
    let rows = statement.query_map([], |row| {
        let values: Row = (2..columns).map(|i| row.get(i).unwrap()).collect();
        let record = row
            .get::<_, Option<i64>>(0)?
            .map(|seq| (seq, row.get(1).unwrap()));
        let name = format!("{:?}", key.iter().map(|i| &values[*i]).collect::<Vec<_>>());
        Ok((name, (values, record)))
    });
    rows.unwrap().map(Result::unwrap).collect()
}

fn sql(value: &Value) -> Sql {
    match value {
        Value::Null => Sql::Null,
        Value::Integer(i) => Sql::Integer(*i),
        Value::Real(r) => Sql::Real(*r),
        Value::Text(t) => Sql::Text(String::from_utf8(t.clone()).unwrap()),
        Value::Blob(b) => Sql::Blob(b.clone()),
    }
}

/// All proper prefixes of the rows' keys.
fn prefixes(rows: &Rows, key: &[usize]) -> BTreeSet<String> {
    rows.values()
        .flat_map(|(values, _)| {
            (1..key.len()).map(move |n| {
                format!(
                    "{:?}",
                    key[..n].iter().map(|i| &values[*i]).collect::<Vec<_>>()
                )
            })
        })
        .collect()
}

/// Checks what a change set says of one table; `exact` if it must name the rows.
fn check(changes: &ChangeSet, table: usize, before: &Rows, after: &Rows, exact: bool) {
    let (name, key, columns, _) = TABLES[table];
    let name = TableRef::from_sql_name(name).unwrap();
    let change = changes.tables.iter().filter(|t| t.table == name);
    let change: Vec<_> = change.collect();
    assert!(change.len() <= 1, "a table is listed twice");
    let mut expected: HashMap<String, (RowKind, Vec<usize>)> = HashMap::new();
    for key in before.keys().chain(after.keys()) {
        let (old, new) = (before.get(key), after.get(key));
        let null = vec![Sql::Null; columns.len()];
        let (a, b) = (old.map_or(&null, |r| &r.0), new.map_or(&null, |r| &r.0));
        let fields: Vec<usize> = (0..columns.len()).filter(|i| a[*i] != b[*i]).collect();
        let kind = match (old, new) {
            (None, _) => RowKind::Created,
            (_, None) => RowKind::Deleted,
            _ if fields.is_empty() => continue,
            _ => RowKind::Updated,
        };
        expected.insert(key.clone(), (kind, fields));
    }
    match change.first().map(|c| &c.extent) {
        None => assert!(expected.is_empty(), "changes were missed: {expected:?}"),
        Some(Extent::Whole) => assert!(!exact, "the rows were not told"),
        Some(Extent::Rows { rows, dirs }) => {
            assert_eq!(rows.len(), expected.len());
            for row in rows {
                let values: Vec<Sql> = row.key.iter().map(sql).collect();
                let (kind, fields) = &expected[&format!("{values:?}")];
                assert_eq!(row.kind, *kind);
                assert_eq!(row.fields.iter().collect::<Vec<_>>(), *fields);
            }
            let (old, new) = (prefixes(before, key), prefixes(after, key));
            let told: BTreeSet<(String, bool)> = dirs
                .iter()
                .map(|d| {
                    let values: Vec<Sql> = d.prefix.iter().map(sql).collect();
                    (format!("{values:?}"), d.exists)
                })
                .collect();
            assert_eq!(told.len(), dirs.len());
            let wanted = new
                .difference(&old)
                .map(|p| (p.clone(), true))
                .chain(old.difference(&new).map(|p| (p.clone(), false)))
                .collect();
            assert_eq!(told, wanted);
        }
    }
}

fn statement() -> impl Strategy<Value = String> {
    let text = prop_oneof![
        Just("NULL".to_owned()),
        Just("''".to_owned()),
        Just("'x'".to_owned()),
        Just(format!("'{}'", "y".repeat(65))),
        Just(format!("'{}z'", "y".repeat(64))),
        Just("x'00'".to_owned()),
    ];
    let (key, small) = (0..4i64, 0..3i64);
    let name = || prop::sample::select(vec!["'a'", "'b'", "''", "'A'"]);
    prop_oneof![
        4 => (name(), small.clone(), text.clone()).prop_map(|(k, n, t)| format!(
            r#"REPLACE INTO app___flags ("name","on","note") VALUES({k},{n},{t})"#)),
        2 => name().prop_map(|k| format!(r#"DELETE FROM app___flags WHERE "name" = {k}"#)),
        1 => name().prop_map(|k| format!("UPDATE app___flags SET name = name || {k} WHERE length(name) < 2")),
        4 => (key.clone(), small.clone()).prop_map(|(k, n)| format!(
            r#"REPLACE INTO app___limits ("id","n") VALUES({k},{n})"#)),
        2 => key.clone().prop_map(|k| format!(r#"DELETE FROM app___limits WHERE "id" = {k}"#)),
        1 => small.clone().prop_map(|n| format!("UPDATE OR REPLACE app___limits SET id = id + {n}")),
        1 => small.clone().prop_map(|n| format!("UPDATE app___limits SET n = {n}")),
        4 => (name(), key, prop::sample::select(vec!["x'00'", "x'ff'"]), text).prop_map(|(a, b, c, v)| format!(
            r#"REPLACE INTO app___routes ("a","b","c","v","w") VALUES({a},{b},{c},{v},1.5)"#)),
        2 => name().prop_map(|k| format!(r#"DELETE FROM app___routes WHERE "a" = {k}"#)),
        1 => small.prop_map(|n| format!("UPDATE app___routes SET w = {n}")),
        1 => prop::sample::select(vec!["app___flags", "app___limits", "app___routes"])
            .prop_map(|t| format!("DELETE FROM {t}")),
    ]
}

/// Applies batches and checks each. With `max_rows` the detail is lost early.
fn run(batches: &[Vec<String>], max_rows: Option<usize>) {
    let mut fixture = Fixture::with(&[FLAGS, LIMITS, ROUTES]);
    if let Some(max_rows) = max_rows {
        fixture.writer.capture.set_max_rows(max_rows);
    }
    let reader = fixture.reader();
    let all = |reader: &Connection| -> Vec<Rows> {
        TABLES
            .iter()
            .map(|(name, key, ..)| snapshot(reader, name, key))
            .collect()
    };
    let mut before = all(&reader);
    for batch in batches {
        let (from, statements) = (fixture.next, batch.iter().map(String::as_str));
        let changes = fixture.apply(&statements.collect::<Vec<_>>()).unwrap();
        let after = all(&reader);
        for (i, (name, ..)) in TABLES.iter().enumerate() {
            check(&changes, i, &before[i], &after[i], max_rows.is_none());
            for (key, (values, record)) in &after[i] {
                let (seq, time) = record.expect("a row without a record");
                assert_eq!(time, seq * 1_000_000);
                match before[i].get(key) {
                    Some((old, old_record)) if old == values => {
                        // In overflow A→B→A counts as a change.
                        if max_rows.is_none() {
                            assert_eq!(Some((seq, time)), *old_record, "{name} {key}");
                        }
                    }
                    _ => assert!(seq >= i64::try_from(from).unwrap(), "{name} {key}"),
                }
            }
            let records: i64 = reader
                .query_row(
                    &format!("SELECT count(*) FROM _ctlfs_rows___{name}"),
                    [],
                    |r| r.get(0),
                )
                .unwrap();
            assert_eq!(usize::try_from(records).unwrap(), after[i].len(), "{name}");
        }
        before = after;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn change_sets_are_the_difference_of_the_tables(
        batches in prop::collection::vec(prop::collection::vec(statement(), 1..12), 1..6)
    ) {
        run(&batches, None);
    }

    #[test]
    fn without_detail_the_records_are_right_still(
        batches in prop::collection::vec(prop::collection::vec(statement(), 1..12), 1..6),
        max_rows in 0usize..3
    ) {
        run(&batches, Some(max_rows));
    }
}

#[test]
fn a_row_replaced_by_itself_keeps_its_record_though_it_moves() {
    let a = r#"REPLACE INTO app___flags ("name","on","note") VALUES('a',1,NULL)"#;
    let mut fixture = Fixture::with(&[FLAGS, a]);
    let rowid = fixture.rows("SELECT _rowid_ FROM app___flags");
    let b = r#"REPLACE INTO app___flags ("name","on","note") VALUES('b',1,NULL)"#;
    let changes = fixture.apply(&[b, a]).unwrap();
    assert_eq!(changes.tables.len(), 1);
    assert_ne!(
        fixture.rows("SELECT _rowid_ FROM app___flags WHERE name = 'a'"),
        rowid,
        "the row did not move; the test shows nothing"
    );
    let records = "SELECT t.name, m.seq FROM app___flags t JOIN _ctlfs_rows___app___flags m \
                   ON m.id = t._rowid_ ORDER BY 1";
    assert_eq!(fixture.rows(records), ["a|2", "b|3"]);
    assert_eq!(
        fixture.rows("SELECT name, seq, time FROM _ctlfs_tables"),
        ["app___flags|3|3000000"]
    );
    assert!(fixture.apply(&[a]).unwrap().tables.is_empty());
}

#[test]
fn shapes_are_told_whole_with_the_new_catalog() {
    let mut fixture = Fixture::new();
    let a = r#"REPLACE INTO app___limits ("id","n") VALUES(1,1)"#;
    let changes = fixture.apply(&[LIMITS, a]).unwrap();
    assert!(matches!(changes.tables[..], [ref t] if matches!(t.extent, Extent::Whole)));
    assert_eq!(changes.catalog.unwrap().len(), 1);
    let changes = fixture
        .apply(&[
            r#"REPLACE INTO app___limits ("id","n") VALUES(1,2)"#,
            r#"ALTER TABLE app___limits ADD COLUMN "c" TEXT"#,
            r#"REPLACE INTO app___limits ("id","n","c") VALUES(2,2,'c')"#,
        ])
        .unwrap();
    assert!(matches!(changes.tables[..], [ref t] if matches!(t.extent, Extent::Whole)));
    assert_eq!(
        fixture.rows("SELECT id, seq FROM _ctlfs_rows___app___limits"),
        ["1|3", "2|5"]
    );
    assert_eq!(
        fixture.rows("SELECT value FROM _ctlfs_state WHERE name = 'schema_time'"),
        ["5000000"]
    );
    let changes = fixture
        .apply(&[r#"UPDATE app___limits SET c = 'd'"#])
        .unwrap();
    assert!(changes.catalog.is_none());
    assert!(matches!(&changes.tables[0].extent, Extent::Rows { rows, .. } if rows.len() == 2));
    let changes = fixture
        .apply(&["DROP TABLE IF EXISTS app___limits"])
        .unwrap();
    assert!(changes.catalog.unwrap().is_empty());
    assert_eq!(fixture.rows("SELECT * FROM _ctlfs_tables"), [""; 0]);
}

#[test]
fn a_failed_batch_leaves_capture_as_it_was() {
    let mut fixture = Fixture::with(&[LIMITS]);
    let a = r#"REPLACE INTO app___limits ("id","n") VALUES(1,1)"#;
    assert!(
        fixture
            .apply(&[a, "ALTER TABLE app___limits ADD COLUMN c TEXT", "bad"])
            .is_err()
    );
    assert_eq!(
        fixture
            .writer
            .catalog()
            .tables()
            .next()
            .unwrap()
            .schema
            .fields()
            .len(),
        2
    );
    let changes = fixture.apply(&[a]).unwrap();
    assert!(matches!(&changes.tables[0].extent, Extent::Rows { rows, .. } if rows.len() == 1));
    assert_eq!(
        fixture.rows("SELECT id, seq FROM _ctlfs_rows___app___limits"),
        ["1|2"]
    );
}
