//! Batches that SQLite rolled back on its own: the next one must capture and record every change.

use std::time::Duration;

use super::*;
use crate::model::Extent;

const LOST: &str = r#"REPLACE INTO app___limits ("id","n") VALUES(7,7)"#;
const ROW: &str = r#"REPLACE INTO app___limits ("id","n") VALUES(1,1)"#;

/// An LDB as after a start: tables, and no triggers yet.
fn started() -> Fixture {
    let mut fixture = Fixture::with(&[FLAGS, LIMITS]);
    fixture.writer = LdbWriter::open(&fixture.path()).unwrap();
    fixture
}

/// Applies [`ROW`] and checks that the change set and the records tell of it, and of nothing else.
fn check_row(fixture: &mut Fixture) {
    let seq = fixture.next;
    let changes = fixture.apply(&[ROW]).unwrap();
    let [change] = &*changes.tables else {
        panic!("the change set: {:?}", changes.tables);
    };
    assert_eq!(change.table.sql_name(), "app___limits");
    match &change.extent {
        Extent::Rows { rows, .. } => assert_eq!(rows.len(), 1, "{rows:?}"),
        Extent::Whole => panic!("the rows were not told"),
    }
    assert_eq!(fixture.rows("SELECT * FROM app___limits"), ["1|1"]);
    assert_eq!(
        fixture.rows("SELECT id, seq FROM _ctlfs_rows___app___limits"),
        [format!("1|{seq}")]
    );
    assert_eq!(
        fixture.rows("SELECT seq FROM _ctlfs_tables WHERE name = 'app___limits'"),
        [seq.to_string()]
    );
}

#[test]
fn changes_are_captured_after_a_disk_was_full_in_a_statement() {
    let many = "WITH RECURSIVE c(i) AS (SELECT 8 UNION ALL SELECT i + 1 FROM c WHERE i < 20000) \
                INSERT INTO app___limits SELECT i, i FROM c";
    let mut fixture = started();
    fixture.writer.limit_pages(1);
    let error = fixture.apply(&[LOST, many]).unwrap_err();
    assert!(
        matches!(error, ApplyError::Ldb(LdbError::Full { .. })),
        "{error}"
    );
    fixture.writer.limit_pages(1_000_000);
    check_row(&mut fixture);
}

#[test]
fn changes_are_captured_after_a_commit_failed() {
    let mut fixture = started();
    // SQLite takes the same way as when the disk is full at the COMMIT.
    fixture.writer.conn.commit_hook(Some(|| true)).unwrap();
    fixture.apply(&[LOST]).unwrap_err();
    fixture
        .writer
        .conn
        .commit_hook(None::<fn() -> bool>)
        .unwrap();
    check_row(&mut fixture);
}

#[test]
fn an_ldb_that_somebody_else_moves_is_not_written() {
    let mut fixture = started();
    let other = fixture.reader();
    other.execute("UPDATE _ldb_seq SET seq = 5", []).unwrap();
    let error = fixture.apply(&[ROW]).unwrap_err();
    assert!(
        matches!(error, ApplyError::Ldb(LdbError::Moved { .. })),
        "{error}"
    );
    other.execute("UPDATE _ldb_seq SET seq = 2", []).unwrap();
    check_row(&mut fixture);
}

#[test]
fn creating_a_table_that_is_there_changes_nothing() {
    let mut fixture = started();
    let again = r#"CREATE TABLE IF NOT EXISTS app___limits ("id" INTEGER PRIMARY KEY)"#;
    let changes = fixture.apply(&[LOST, again]).unwrap();
    assert_eq!(changes.tables.len(), 1);
    assert!(matches!(changes.tables[0].extent, Extent::Rows { .. }));
    assert_eq!(changes.catalog, None);
    let changes = fixture.apply(&[again]).unwrap();
    assert!(changes.tables.is_empty(), "{:?}", changes.tables);
}

#[test]
fn changes_are_captured_after_the_time_limit() {
    let endless = "WITH RECURSIVE c(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM c) \
                   INSERT INTO app___limits SELECT i, i FROM c";
    let mut fixture = started();
    let limit = Duration::from_millis(50);
    fixture.writer.set_statement_limit(limit);
    fixture.apply(&[LOST, endless]).unwrap_err();
    fixture.writer.set_statement_limit(Duration::from_secs(60));
    check_row(&mut fixture);
}

#[test]
fn changes_are_captured_after_or_rollback() {
    let mut fixture = started();
    let conflict = "INSERT OR ROLLBACK INTO app___limits SELECT 7, 8";
    let error = fixture.apply(&[LOST, conflict]).unwrap_err();
    assert!(matches!(error, ApplyError::Statement(_)), "{error}");
    check_row(&mut fixture);
}
