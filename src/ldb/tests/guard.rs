//! What ledger statements may and may not do.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::*;

#[test]
fn statements_that_touch_more_than_config_tables_are_refused() {
    let mut fixture = Fixture::with(&[FLAGS, LIMITS]);
    let before = fixture.rows("SELECT type, name, sql FROM sqlite_schema ORDER BY name");
    let elsewhere = fixture.dir.path().join("elsewhere.db");
    let attach = format!("ATTACH '{}' AS x", elsewhere.display());
    let vacuum_into = format!("VACUUM INTO '{}'", elsewhere.display());
    let refused = [
        attach.as_str(),
        vacuum_into.as_str(),
        "VACUUM",
        "DETACH main",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA user_version = 7",
        "SELECT * FROM pragma_table_info('app___flags')",
        "DROP TABLE _ldb_seq",
        "DROP TABLE IF EXISTS _ctlfs_state",
        "UPDATE _ldb_seq SET seq = 0",
        "DELETE FROM _ctlfs_tables",
        "REPLACE INTO _ctlfs_state(name, value) VALUES('ready', 1)",
        "INSERT INTO app___limits SELECT seq, 1 FROM _ldb_seq",
        "INSERT INTO app___flags(name) SELECT name FROM sqlite_schema",
        "INSERT INTO sqlite_schema(name) VALUES('x')",
        "DELETE FROM sqlite_master",
        "CREATE TABLE app___copy AS SELECT name FROM sqlite_schema",
        "CREATE TABLE other(a INTEGER PRIMARY KEY)",
        "CREATE TABLE App___Upper(a INTEGER PRIMARY KEY)",
        "CREATE TABLE _ctlfs_rows___app___x(id INTEGER PRIMARY KEY)",
        "CREATE TEMP TABLE app___temp(a INTEGER PRIMARY KEY)",
        "CREATE TABLE temp.app___temp(a INTEGER PRIMARY KEY)",
        "CREATE INDEX app___index ON app___flags(note)",
        "CREATE VIEW app___view AS SELECT 1",
        "CREATE TRIGGER app___trigger AFTER INSERT ON app___flags BEGIN SELECT 1; END",
        "CREATE VIRTUAL TABLE app___virtual USING fts5(a)",
        "ALTER TABLE app___flags RENAME TO other",
        "ALTER TABLE app___flags RENAME TO App___Flags",
        "ALTER TABLE _ldb_seq RENAME TO app___stolen",
        "ANALYZE",
        "REINDEX",
        "BEGIN",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT a",
        "RELEASE a",
        "UPDATE app___limits SET n = random()",
        "UPDATE app___limits SET n = randomblob(4)",
        "UPDATE app___flags SET note = datetime('now')",
        "UPDATE app___flags SET note = CURRENT_TIMESTAMP",
        "UPDATE app___flags SET note = load_extension('x')",
        "UPDATE app___flags SET note = sqlite_version()",
        "UPDATE app___limits SET n = last_insert_rowid()",
        "UPDATE app___limits SET n = changes()",
        "INSERT INTO app___flags(name) SELECT value FROM json_each('[1]')",
        "INSERT INTO app___flags(name) SELECT 1 FROM generate_series(1, 2)",
        "REPLACE INTO app___flags (\"name\") VALUES(\"bare\")",
        "REPLACE INTO app___flags (\"name\") VALUES('a'); DROP TABLE _ldb_seq",
        "REPLACE INTO app___flags (\"name\") VALUES('a'); COMMIT",
        "REPLACE INTO missing___table (\"a\") VALUES(1)",
        "REPLACE INTO app___flags (\"name\") VALUES('it's hidden')",
        "REPLACE INTO app___flags (\"name\") VALUES('a",
        "REPLACE INTO app___flags (\"name\") VALUES('a') \0 DROP TABLE _ldb_seq",
        "nonsense",
    ];
    for statement in refused {
        match fixture.apply(&[
            r#"REPLACE INTO app___limits ("id","n") VALUES(1,1)"#,
            statement,
        ]) {
            Err(ApplyError::Statement(reason)) => {
                assert!(
                    !reason.contains("bare") && !reason.contains("hidden"),
                    "{reason}"
                );
            }
            other => panic!("{statement}: {other:?}"),
        }
        assert_eq!(fixture.rows("SELECT count(*) FROM app___limits"), ["0"]);
        assert_eq!(fixture.rows("SELECT count(*) FROM app___flags"), ["0"]);
        assert_eq!(
            fixture.rows("SELECT seq FROM _ldb_seq"),
            ["2"],
            "{statement}"
        );
    }
    assert!(!elsewhere.exists());
    let after = fixture.rows("SELECT type, name, sql FROM sqlite_schema ORDER BY name");
    assert_eq!(before, after);
    // And the writer is none the worse for it.
    fixture
        .apply(&[r#"REPLACE INTO app___limits ("id","n") VALUES(1,1)"#])
        .unwrap();
    assert_eq!(fixture.rows("SELECT * FROM app___limits"), ["1|1"]);
}

#[test]
fn tables_are_not_read_without_their_columns_either() {
    let mut fixture = Fixture::with(&[FLAGS, LIMITS]);
    // A table of somebody else's.
    let other = "CREATE TABLE notes(a); INSERT INTO notes VALUES(1);";
    fixture.writer.conn.execute_batch(other).unwrap();
    for table in [
        "_ctlfs_gaps",
        "_CTLFS_GAPS",
        "_ctlfs_rows___app___flags",
        "_ldb_seq",
        "notes",
        "sqlite_schema",
        "sqlite_temp_master",
        "SQLite_Master",
        "dbstat",
        "pragma_table_list",
        "pragma_table_info('app___flags')",
        "json_each('[1]')",
        "main._ctlfs_gaps",
    ] {
        for statement in [
            format!("INSERT INTO app___limits SELECT 1, count(*) FROM {table}"),
            format!("INSERT INTO app___limits SELECT 1, 1 WHERE EXISTS (SELECT 1 FROM {table})"),
            format!(
                "INSERT INTO app___limits SELECT 1, 1 WHERE NOT EXISTS (SELECT 1 FROM {table})"
            ),
            format!("CREATE TABLE app___copy AS SELECT 1 AS a FROM {table}"),
            format!("UPDATE app___limits SET n = 1 FROM {table}"),
            format!("SELECT 1; DELETE FROM app___limits WHERE (SELECT count(*) FROM {table})"),
        ] {
            match fixture.apply(&[statement.as_str()]) {
                Err(ApplyError::Statement(_)) => {}
                other => panic!("{statement}: {other:?}"),
            }
        }
    }
    assert_eq!(fixture.rows("SELECT * FROM app___limits"), [""; 0]);
    for statement in [
        "WITH c(i) AS (SELECT 7) INSERT INTO app___limits SELECT 1, count(*) FROM c",
        "WITH c(i) AS (SELECT 7) UPDATE app___limits SET n = n + 1 WHERE EXISTS (SELECT 1 FROM c)",
        "INSERT INTO app___limits SELECT 2, count(*) FROM (SELECT 1 UNION SELECT 2) AS s",
        "INSERT INTO app___limits SELECT 3, count(*) FROM APP___FLAGS",
    ] {
        fixture.apply(&[statement]).unwrap();
    }
    assert_eq!(
        fixture.rows("SELECT * FROM app___limits ORDER BY id"),
        ["1|2", "2|2", "3|0"]
    );
}

#[test]
fn our_own_function_is_out_of_reach() {
    let mut fixture = Fixture::with(&[
        LIMITS,
        r#"REPLACE INTO app___limits ("id","n") VALUES(1,1)"#,
    ]);
    let trigger: String = fixture
        .writer
        .conn
        .query_row("SELECT sql FROM temp.sqlite_schema LIMIT 1", [], |row| {
            row.get(0)
        })
        .unwrap();
    let function = trigger
        .split_once("SELECT ")
        .and_then(|(_, call)| call.split_once('('))
        .unwrap()
        .0;
    let statement = format!("UPDATE app___limits SET n = {function}(0, 1, 2, 3, 4)");
    assert!(matches!(
        fixture.apply(&[statement.as_str()]),
        Err(ApplyError::Statement(_))
    ));
}

#[test]
fn statements_that_change_config_tables_pass() {
    let mut fixture = Fixture::with(&[FLAGS, LIMITS]);
    let allowed = [
        "REPLACE INTO app___flags (\"name\",\"on\",\"note\") VALUES('a',true,NULL)",
        "INSERT INTO app___flags VALUES('b', 2, upper('x') || substr('yz', 1, 1))",
        "INSERT OR IGNORE INTO app___flags VALUES('b', 3, 'z')",
        "INSERT INTO app___flags(name, \"on\") VALUES('b', 4) ON CONFLICT(name) DO UPDATE SET \"on\" = 5",
        "UPDATE app___flags SET note = (SELECT group_concat(name) FROM app___flags)",
        "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 5) \
         INSERT INTO app___limits SELECT i, i FROM c",
        "DELETE FROM app___limits WHERE \"id\" IN (SELECT 1 FROM app___flags)",
        "",
        "-- just a comment",
        ";",
        "UPDATE app___limits SET n = n + 1; DELETE FROM app___limits WHERE id = 5;",
        "SELECT 1",
        "ALTER TABLE app___flags ADD COLUMN \"c\" TEXT",
        "ALTER TABLE app___flags ADD COLUMN \"d\" INTEGER NOT NULL DEFAULT 7",
        "UPDATE app___flags SET c = 'c'",
        "ALTER TABLE app___flags DROP COLUMN note",
        "ALTER TABLE app___flags RENAME COLUMN c TO e",
        "ALTER TABLE app___limits RENAME TO app___bounds",
        "CREATE TABLE app___copy AS SELECT * FROM app___flags",
        "CREATE TABLE IF NOT EXISTS app___flags (\"x\" INTEGER PRIMARY KEY)",
        "CREATE TABLE app___two (\"a\" INTEGER, \"b\" BLOB(255), \"c\" REAL UNIQUE, PRIMARY KEY(\"b\", \"a\"));",
        "DROP TABLE IF EXISTS app___two",
        "DROP TABLE IF EXISTS app___two",
        "DROP TABLE app___copy",
    ];
    for statement in allowed {
        if let Err(e) = fixture.apply(&[statement]) {
            panic!("{statement}: {e}");
        }
    }
    assert_eq!(
        fixture.rows("SELECT * FROM app___flags ORDER BY name"),
        ["a|1|c|7", "b|5|c|7"]
    );
    assert_eq!(
        fixture.rows("SELECT * FROM app___bounds ORDER BY id"),
        ["2|3", "3|4", "4|5"]
    );
    assert_eq!(
        fixture.rows("SELECT name FROM sqlite_schema WHERE name GLOB '_ctlfs_rows*' ORDER BY 1"),
        ["_ctlfs_rows___app___bounds", "_ctlfs_rows___app___flags"]
    );
}

#[test]
fn values_do_not_show_in_errors() {
    let mut fixture = Fixture::with(&[FLAGS, LIMITS]);
    for statement in [
        "UPDATE app___limits SET n = 0x1122334455667788990011",
        "INSERT INTO app___limits SELECT 1, json_extract('{}', 'secret')",
        "INSERT INTO app___flags(name) VALUES(json('secret'))",
        "INSERT INTO app___flags(name) VALUES(secret)",
        "INSERT INTO app___flags(name) VALUES('a' secret)",
        "INSERT INTO app___limits SELECT 1, abs(-9223372036854775808)",
    ] {
        let reason = fixture.apply(&[statement]).unwrap_err().to_string();
        assert!(
            !reason.contains("secret") && !reason.contains("112233"),
            "{reason}"
        );
    }
    let statement = "INSERT INTO app___limits VALUES(1, 2), (1, 3)";
    let reason = fixture.apply(&[statement]).unwrap_err().to_string();
    assert_eq!(reason, "UNIQUE constraint failed: app___limits.id");
}

#[test]
fn an_endless_statement_is_stopped() {
    let endless = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c) \
                   INSERT INTO app___limits SELECT 1, count(*) FROM c";
    let mut fixture = Fixture::with(&[LIMITS]);
    fixture
        .writer
        .set_statement_limit(Duration::from_millis(50));
    match fixture.apply(&[endless]) {
        Err(ApplyError::Statement(reason)) => assert!(reason.contains("50ms"), "{reason}"),
        other => panic!("{other:?}"),
    }
    fixture.writer.set_statement_limit(Duration::from_secs(60));
    fixture.writer.stop_on(Arc::new(AtomicBool::new(true)));
    assert_eq!(fixture.apply(&[endless]).unwrap_err(), ApplyError::Stopped);
}

#[test]
fn misplaced_markers_name_both_entries() {
    let mut fixture = Fixture::with(&[LIMITS]);
    for (statements, numbers) in [
        (&["--- BEGIN", "--- BEGIN"], ["2", "3"]),
        (&["SELECT 1", "--- COMMIT"], ["2", "3"]),
    ] {
        match fixture.apply(statements) {
            Err(ApplyError::Order(reason)) => {
                assert!(numbers.iter().all(|n| reason.contains(n)), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    let mut batch = fixture.writer.begin().unwrap();
    batch.apply(&entry(2, "--- BEGIN")).unwrap();
    batch.finish().unwrap();
    assert!(
        batch.commit().is_err(),
        "part of a transaction was committed"
    );
    assert_eq!(fixture.rows("SELECT seq FROM _ldb_seq"), ["1"]);
}
