//! The writer path, against the embedded ledger and against MariaDB: the same scenarios, and what
//! the origin then reads.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::SystemTime;

use common::central::{Place, on_both};
use common::mariadb;
use ctlfs::executive::{Effect, Executive, ExecutiveError, Mutation};
use ctlfs::ledger::{self, OriginError, OriginUrl};
use ctlfs::model::{Field, FieldName, FieldType, LedgerTime, Seq, TableRef, TableSchema, Value};
use rusqlite::Connection;

fn table() -> TableRef {
    "app/flags".parse().unwrap()
}

fn name(name: &str) -> FieldName {
    name.parse().unwrap()
}

fn schema(fields: &[(&str, FieldType)], key: &[&str]) -> TableSchema {
    let fields = fields
        .iter()
        .map(|(n, ty)| Field {
            name: name(n),
            ty: *ty,
        })
        .collect();
    let key: Vec<FieldName> = key.iter().map(|k| name(k)).collect();
    TableSchema::new(fields, &key).unwrap()
}

fn flags() -> TableSchema {
    schema(
        &[
            ("name", FieldType::String),
            ("enabled", FieldType::Integer),
            ("rollout", FieldType::Decimal),
            ("note", FieldType::Text),
            ("blob", FieldType::Binary),
            ("id", FieldType::Bytestring),
        ],
        &["name"],
    )
}

fn values(values: &[(&str, Value)]) -> Vec<(FieldName, Value)> {
    values.iter().map(|(n, v)| (name(n), v.clone())).collect()
}

fn upsert(of: &[(&str, Value)]) -> Mutation {
    Mutation::Upsert {
        table: table(),
        values: values(of),
    }
}

fn put(of: &[(&str, Value)]) -> Mutation {
    Mutation::Put {
        table: table(),
        values: values(of),
    }
}

fn delete(key: &str) -> Mutation {
    Mutation::Delete {
        table: table(),
        key: values(&[("name", Value::text(key))]),
    }
}

/// A writer with the table `app/flags`.
fn with_flags(place: &Place) -> Executive {
    let mut executive = place.executive();
    executive.init().unwrap();
    assert!(executive.create_family(&"app".parse().unwrap()).unwrap());
    executive.create_table(&table(), &flags()).unwrap();
    executive
}

#[test]
fn init_makes_everything_once() {
    on_both(|place| {
        let mut executive = place.executive();
        let made = executive.init().unwrap();
        assert_eq!(made.len(), 7, "{made:?}");
        assert_eq!(executive.init().unwrap(), Vec::<&str>::new());
        assert_eq!(place.executive().init().unwrap(), Vec::<&str>::new());
        assert!(place.entries().is_empty());
        assert_eq!(place.origin().last_seq().unwrap(), None);
        place.run("DELETE FROM locks");
        assert_eq!(executive.init().unwrap().len(), 1);
    });
}

#[test]
fn the_ledger_gets_the_exact_statements() {
    on_both(|place| {
        let mut executive = with_flags(place);
        let row = [
            ("name", Value::text("it's \\ \"new\"")),
            ("enabled", Value::Integer(i64::MIN)),
            ("rollout", Value::Real(0.25)),
            ("blob", Value::Blob(vec![0, 255])),
        ];
        let one = executive.mutate(&[upsert(&row)]).unwrap();
        let field = Field {
            name: name("more"),
            ty: FieldType::Text,
        };
        executive.add_field(&table(), &field).unwrap();
        let two = executive
            .mutate(&[
                delete("it's \\ \"new\""),
                put(&[("name", Value::text("b")), ("note", Value::text("n\0"))]),
            ])
            .unwrap();
        assert_eq!(
            place.statements(),
            [
                "CREATE TABLE app___flags (\"name\" VARCHAR(191), \"enabled\" INTEGER, \
                 \"rollout\" REAL, \"note\" TEXT, \"blob\" BLOB, \"id\" BLOB(255), \
                 PRIMARY KEY(\"name\"));",
                "REPLACE INTO app___flags \
                 (\"name\",\"enabled\",\"rollout\",\"note\",\"blob\",\"id\") \
                 VALUES('it''s \\ \"new\"',-9223372036854775808,0.25,NULL,x'00ff',NULL)",
                "ALTER TABLE app___flags ADD COLUMN \"more\" TEXT",
                "--- BEGIN",
                "DELETE FROM app___flags WHERE \"name\" = 'it''s \\ \"new\"'",
                "REPLACE INTO app___flags \
                 (\"name\",\"enabled\",\"rollout\",\"note\",\"blob\",\"id\",\"more\") \
                 VALUES('b',NULL,NULL,x'6e00',NULL,NULL,NULL)",
                "--- COMMIT",
            ]
        );
        let entries = place.entries();
        assert_eq!(one.seq, Some(entries[1].seq));
        assert_eq!(two.seq, Some(entries[6].seq));
        assert_eq!(place.origin().last_seq().unwrap(), two.seq);
        assert_eq!(
            place
                .origin()
                .seqs_between(entries[1].seq, entries[3].seq)
                .unwrap()
                .len(),
            3
        );
        let now = LedgerTime::from(SystemTime::now()).micros();
        for entry in &entries {
            assert!((entry.time.micros() - now).abs() < 60_000_000);
        }
    });
}

#[test]
fn rows_that_are_so_already_are_not_written() {
    on_both(|place| {
        let mut executive = with_flags(place);
        let rows = [
            upsert(&[
                ("name", Value::text("a")),
                ("enabled", Value::Integer(9_007_199_254_740_993)),
                ("rollout", Value::Real(0.1 + 0.2)),
                ("note", Value::text("é😀\u{10ffff}\0'")),
                ("blob", Value::Blob((0..=255).collect())),
                ("id", Value::Blob(vec![])),
            ]),
            upsert(&[("name", Value::text("b ")), ("rollout", Value::Real(1e300))]),
            upsert(&[("name", Value::text("b")), ("rollout", Value::Real(5e-324))]),
            upsert(&[("name", Value::text("B")), ("rollout", Value::Integer(3))]),
            upsert(&[("name", Value::text("")), ("rollout", Value::Real(-0.0))]),
            upsert(&[("name", Value::text("\0"))]),
        ];
        let first = executive.mutate(&rows).unwrap();
        assert_eq!(first.count(Effect::Written), rows.len());
        let length = place.entries().len();
        for mut writer in [executive, place.executive()] {
            let again = writer.mutate(&rows).unwrap();
            assert_eq!(again.seq, None);
            assert_eq!(again.count(Effect::Unchanged), rows.len());
        }
        assert_eq!(place.entries().len(), length);
    });
}

#[test]
fn put_keeps_the_other_fields_and_delete_says_what_it_found() {
    on_both(|place| {
        let mut executive = with_flags(place);
        executive
            .mutate(&[put(&[
                ("name", Value::text("a")),
                ("enabled", Value::Integer(1)),
                ("note", Value::text("n")),
            ])])
            .unwrap();
        executive
            .mutate(&[put(&[
                ("name", Value::text("a")),
                ("note", Value::Null),
                ("rollout", Value::Real(2.5)),
            ])])
            .unwrap();
        assert!(
            place
                .statements()
                .last()
                .unwrap()
                .ends_with("VALUES('a',1,2.5,NULL,NULL,NULL)")
        );
        let length = place.entries().len();
        let missing = executive.mutate(&[delete("nobody")]).unwrap();
        assert_eq!(
            (missing.seq, missing.effects),
            (None, vec![Effect::Missing])
        );
        assert_eq!(place.entries().len(), length);
        let both = executive.mutate(&[delete("a"), delete("a")]).unwrap();
        assert_eq!(both.effects, [Effect::Written, Effect::Missing]);
    });
}

#[test]
fn mistakes_are_refused_before_anything_is_written() {
    on_both(|place| {
        let mut executive = with_flags(place);
        let length = place.entries().len();
        let good = upsert(&[("name", Value::text("good"))]);
        for bad in [
            upsert(&[("enabled", Value::Integer(1))]),
            upsert(&[("name", Value::Null)]),
            upsert(&[("name", Value::text("x")), ("nothing", Value::Null)]),
            upsert(&[("name", Value::text("x")), ("enabled", Value::text("yes"))]),
            upsert(&[("name", Value::text("x".repeat(192)))]),
            delete(&"x".repeat(192)),
        ] {
            executive.mutate(&[good.clone(), bad]).unwrap_err();
        }
        let other: TableRef = "app/nothing".parse().unwrap();
        let missing = executive.mutate(&[Mutation::Upsert {
            table: other.clone(),
            values: values(&[("name", Value::text("x"))]),
        }]);
        assert!(matches!(missing, Err(ExecutiveError::NoTable(t)) if t == other));
        let again = executive.create_table(&table(), &flags());
        assert!(matches!(again, Err(ExecutiveError::TableExists(_))));
        let family = executive.create_table(&"nobody/flags".parse().unwrap(), &flags());
        assert!(matches!(family, Err(ExecutiveError::NoFamily(_))));
        assert_eq!(place.entries().len(), length);
        assert_eq!(executive.schema(&table()).unwrap(), Some(flags()));
        assert_eq!(executive.schema(&other).unwrap(), None);
    });
}

#[test]
fn composite_keys_keep_their_order() {
    on_both(|place| {
        let mut executive = with_flags(place);
        let routes: TableRef = "app/routes".parse().unwrap();
        let shape = schema(
            &[
                ("weight", FieldType::Integer),
                ("zone", FieldType::Integer),
                ("host", FieldType::String),
                ("id", FieldType::Bytestring),
            ],
            &["host", "zone", "id"],
        );
        executive.create_table(&routes, &shape).unwrap();
        assert_eq!(executive.schema(&routes).unwrap(), Some(shape));
        let rows: Vec<Mutation> = (0..1200)
            .map(|i| Mutation::Upsert {
                table: routes.clone(),
                values: values(&[
                    ("host", Value::text(format!("h'{}", i % 40))),
                    ("zone", Value::Integer(i64::MAX - i)),
                    ("id", Value::Blob(vec![0, 1, 39])),
                ]),
            })
            .collect();
        assert_eq!(
            executive.mutate(&rows).unwrap().count(Effect::Written),
            1200
        );
        assert_eq!(
            executive.mutate(&rows).unwrap().count(Effect::Unchanged),
            1200
        );
        let gone = Mutation::Delete {
            table: routes.clone(),
            key: values(&[
                ("zone", Value::Integer(i64::MAX)),
                ("id", Value::Blob(vec![0, 1, 39])),
                ("host", Value::text("h'0")),
            ]),
        };
        executive.mutate(&[gone]).unwrap();
        assert_eq!(
            place.statements().last().unwrap(),
            "DELETE FROM app___routes WHERE \"host\" = 'h''0' AND \
             \"zone\" = 9223372036854775807 AND \"id\" = x'000127'"
        );
    });
}

#[test]
fn concurrent_writers_append_whole_transactions_in_order() {
    on_both(|place| {
        with_flags(place);
        let start = place.entries().len();
        let (writers, each) = (4_i64, 10_i64);
        std::thread::scope(|scope| {
            for writer in 0..writers {
                scope.spawn(move || {
                    let mut executive = place.executive();
                    let mut last = Seq::ZERO;
                    for i in 0..each {
                        let row = |key: &str| {
                            put(&[
                                ("name", Value::text(key)),
                                ("enabled", Value::Integer(writer * 1000 + i)),
                            ])
                        };
                        let outcome = executive.mutate(&[row("a"), row("b")]).unwrap();
                        let seq = outcome.seq.unwrap();
                        assert!(seq > last);
                        last = seq;
                    }
                });
            }
        });
        let statements = place.statements().split_off(start);
        assert_eq!(
            statements.len(),
            usize::try_from(writers * each * 4).unwrap()
        );
        for transaction in statements.chunks(4) {
            assert_eq!(transaction[0], "--- BEGIN");
            assert_eq!(transaction[3], "--- COMMIT");
            assert_eq!(
                transaction[1].replace("'a'", "'b'"),
                transaction[2],
                "two writers' statements were mixed"
            );
        }
    });
}

#[test]
fn every_value_is_found_again_as_it_was_written() {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};

    on_both(|place| {
        let executive = std::cell::RefCell::new(with_flags(place));
        let text = "([\\x00-\\x7f]|[^\u{0}]){0,12}";
        let row = (
            text,
            any::<i64>(),
            any::<f64>().prop_filter("SQL has no such number", |f| f.is_finite()),
            text,
            proptest::collection::vec(any::<u8>(), 0..30),
        );
        let mut runner = TestRunner::new(Config {
            cases: 200,
            failure_persistence: None,
            ..Config::default()
        });
        runner
            .run(&row, |(key, integer, decimal, note, bytes)| {
                let row = [upsert(&[
                    ("name", Value::text(key)),
                    ("enabled", Value::Integer(integer)),
                    ("rollout", Value::Real(decimal)),
                    ("note", Value::text(note)),
                    ("blob", Value::Blob(bytes.clone())),
                    ("id", Value::Blob(bytes)),
                ])];
                let mut executive = executive.borrow_mut();
                executive.mutate(&row).unwrap();
                let again = executive.mutate(&row).unwrap();
                prop_assert_eq!(again.effects, [Effect::Unchanged]);
                Ok(())
            })
            .unwrap();
    });
}

#[test]
fn ledgers_made_by_ctlstore_are_read_and_written() {
    let database = mariadb::database();
    database.run(
        "CREATE TABLE families (id INTEGER AUTO_INCREMENT PRIMARY KEY, \
             name VARCHAR(191) NOT NULL UNIQUE); \
         CREATE TABLE ctlstore_dml_ledger (seq INTEGER AUTO_INCREMENT PRIMARY KEY, \
             leader_ts DATETIME DEFAULT CURRENT_TIMESTAMP, statement MEDIUMTEXT NOT NULL); \
         CREATE TABLE locks (id VARCHAR(191) PRIMARY KEY, clock BIGINT NOT NULL DEFAULT 0); \
         INSERT INTO locks VALUES ('ledger', 0); \
         SET time_zone = '+00:00'; \
         INSERT INTO ctlstore_dml_ledger (seq, leader_ts, statement) \
             VALUES (7, '2024-02-29 12:34:56', '--- BEGIN'), (9, NULL, '--- COMMIT')",
    );
    let place = Place::MySql(database);
    let entries = place.entries();
    assert_eq!(entries[0].seq, Seq::new(7));
    assert_eq!(entries[0].time.micros(), 1_709_210_096_000_000);
    assert_eq!(entries[1].time.micros(), 0);
    let mut executive = place.executive();
    executive.create_family(&"app".parse().unwrap()).unwrap();
    let seq = executive.create_table(&table(), &flags()).unwrap();
    assert_eq!(seq, Seq::new(10));
    let outcome = executive
        .mutate(&[upsert(&[("name", Value::text("a"))])])
        .unwrap();
    assert_eq!(outcome.seq, Some(Seq::new(11)));
    let last = place.entries().pop().unwrap();
    let now = LedgerTime::from(SystemTime::now()).micros();
    assert!((last.time.micros() - now).abs() < 60_000_000);
}

#[test]
fn a_connection_that_broke_is_made_again() {
    let database = mariadb::database();
    let origin_url: OriginUrl = database.url().parse().unwrap();
    let place = Place::MySql(database);
    let Place::MySql(database) = &place else {
        unreachable!()
    };
    let mut executive = with_flags(&place);
    let mut origin = ledger::open(&origin_url).unwrap();
    for i in 0..3 {
        executive
            .mutate(&[put(&[
                ("name", Value::text("a")),
                ("enabled", Value::Integer(i)),
            ])])
            .unwrap();
        assert_eq!(origin.fetch(Seq::new(1)).unwrap(), place.entries());
        database.hang_up();
    }
}

#[test]
fn a_server_that_never_answers_is_given_up() {
    // The kernel completes the connection; nobody ever speaks on it.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("mysql://me:hunter2@{}/ctldb", silent.local_addr().unwrap());
    let start = std::time::Instant::now();
    let error = ledger::open(&url.parse().unwrap())
        .unwrap()
        .last_seq()
        .unwrap_err();
    assert!(matches!(error, OriginError::Unreachable { .. }), "{error}");
    assert!(start.elapsed() < std::time::Duration::from_secs(20));
}

#[test]
fn large_answers_come_in_parts() {
    on_both(|place| {
        let mut executive = with_flags(place);
        let rows: Vec<Mutation> = (0..40)
            .map(|i| {
                upsert(&[
                    ("name", Value::text(format!("r{i}"))),
                    ("note", Value::text("x".repeat(1 << 20))),
                ])
            })
            .collect();
        executive.mutate(&rows).unwrap();
        let mut origin = place.origin();
        let first = origin.fetch(Seq::new(1)).unwrap();
        let bytes: usize = first.iter().map(|e| e.statement.len()).sum();
        assert!(bytes < 18 << 20, "{bytes} bytes in one answer");
        assert_eq!(place.entries().len(), 43);
    });
}

#[test]
fn an_answer_goes_on_behind_an_entry_of_any_size() {
    on_both(|place| {
        let mut executive = with_flags(place);
        for (name, size) in [
            ("a", 1),
            ("b", 9 << 20),
            ("c", 1),
            ("d", 13 << 20),
            ("e", 1),
        ] {
            let note = Value::text("x".repeat(size));
            let row = upsert(&[("name", Value::text(name)), ("note", note)]);
            executive.mutate(&[row]).unwrap();
        }
        let all: Vec<Seq> = place.entries().iter().map(|e| e.seq).collect();
        // As the reflector does: from the entry that it has, which is in the answer.
        let mut origin = place.origin();
        let mut seen = vec![all[0]];
        while seen.len() < all.len() {
            let last = seen[seen.len() - 1];
            let more = origin.fetch(last).unwrap();
            assert_eq!(more[0].seq, last);
            assert!(more.len() > 1, "nothing behind {last}, but {all:?}");
            seen.extend(more[1..].iter().map(|e| e.seq));
        }
        assert_eq!(seen, all);
    });
}

#[test]
fn an_entry_that_cannot_be_read_is_an_error_once_it_is_next() {
    // MySQL keeps such text out of its table.
    let place = Place::Embedded(tempfile::tempdir().unwrap());
    let mut executive = with_flags(&place);
    let row = upsert(&[("name", Value::text("a"))]);
    executive.mutate(&[row]).unwrap();
    let last = place.entries().last().unwrap().seq;
    place.run("INSERT INTO ctlstore_dml_ledger (statement) VALUES (x'ff00')");
    let mut origin = place.origin();
    assert_eq!(origin.fetch(Seq::new(1)).unwrap().last().unwrap().seq, last);
    let error = origin.fetch(last).unwrap_err();
    assert!(matches!(error, OriginError::Failed { .. }), "{error}");
}

#[test]
fn the_embedded_ledger_is_private_and_only_init_creates_it() {
    use std::os::unix::fs::PermissionsExt;

    let place = Place::Embedded(tempfile::tempdir().unwrap());
    let Place::Embedded(dir) = &place else {
        unreachable!()
    };
    let path = dir.path().join("ledger.db");
    let missing = place.origin().fetch(Seq::new(1)).unwrap_err();
    assert!(matches!(missing, OriginError::Unreachable { .. }));
    place.executive().schema(&table()).unwrap_err();
    assert!(!path.exists());
    let mut executive = with_flags(&place);
    executive
        .mutate(&[upsert(&[("name", Value::text("a"))])])
        .unwrap();
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let file = file.unwrap();
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{:?}", file.path());
    }
    // A ledger that was replaced is noticed.
    let mut origin = place.origin();
    assert!(origin.last_seq().unwrap().is_some());
    drop(executive);
    for file in std::fs::read_dir(dir.path()).unwrap() {
        std::fs::remove_file(file.unwrap().path()).unwrap();
    }
    place.executive().init().unwrap();
    assert_eq!(origin.last_seq().unwrap(), None);
}

#[test]
fn init_leaves_the_database_of_another_program_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.db");
    let place = Place::Embedded(dir);
    place.run("CREATE TABLE bookmarks (url TEXT)");
    let before = std::fs::read(&path).unwrap();
    let error = place.executive().init().unwrap_err();
    assert!(error.to_string().contains("another program"));
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn wrong_origins_are_told_apart_and_never_show_the_password() {
    let database = mariadb::database();
    let fetch = |url: &str| {
        let url: OriginUrl = url.parse().unwrap();
        let error = ledger::open(&url).unwrap().fetch(Seq::new(1)).unwrap_err();
        let written = Executive::open(&url).unwrap().schema(&table()).unwrap_err();
        for text in [
            error.to_string(),
            format!("{error:?}"),
            written.to_string(),
            format!("{written:?}"),
        ] {
            assert!(!text.contains("hunter2"), "{text}");
            assert!(!text.contains("p@ss"), "{text}");
        }
        error
    };
    let empty = fetch(&database.url());
    assert!(
        matches!(empty, OriginError::NotInitialised { .. }),
        "{empty}"
    );
    assert!(empty.to_string().contains("ctlfs init"));
    let denied = fetch(&database.url_with_password("hunter2"));
    assert!(matches!(denied, OriginError::Denied { .. }), "{denied}");
    let unknown = fetch(
        &database
            .url()
            .replace(database.name(), "ctlfs_test_no_such"),
    );
    assert!(
        matches!(unknown, OriginError::NoDatabase { .. }),
        "{unknown}"
    );
    let closed = fetch("mysql://me:hunter2@127.0.0.1:1/ctldb");
    assert!(
        matches!(closed, OriginError::Unreachable { .. }),
        "{closed}"
    );
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.db");
    std::fs::write(&file, "certainly not a database, but long enough to look").unwrap();
    let foreign = fetch(&format!("sqlite://{}", file.display()));
    assert!(matches!(foreign, OriginError::Failed { .. }), "{foreign}");
    let file = dir.path().join("empty.db");
    Connection::open(&file)
        .unwrap()
        .execute_batch("CREATE TABLE t (x)")
        .unwrap();
    let empty = fetch(&format!("sqlite://{}", file.display()));
    assert!(
        matches!(empty, OriginError::NotInitialised { .. }),
        "{empty}"
    );
}
