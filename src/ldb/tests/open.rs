//! Opening, taking over, refusing, and a full disk.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use super::*;

#[test]
fn a_new_ldb_is_private_and_holds_ctlstores_tables() {
    let fixture = Fixture::with(&[LIMITS]);
    for suffix in ["", "-wal", "-shm"] {
        let mode = std::fs::metadata(sidecar(&fixture.path(), suffix))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{suffix}");
    }
    assert_eq!(fixture.rows("SELECT id, seq FROM _ldb_seq"), ["1|1"]);
    assert_eq!(
        fixture.rows("SELECT name, CAST(timestamp AS TEXT) FROM _ldb_last_update"),
        ["ledger|1970-01-01 00:00:01.000000+00:00"]
    );
    assert_eq!(
        fixture
            .rows("SELECT name, value FROM _ctlfs_state WHERE name IN ('format', 'last_digest')"),
        [
            "format|1".to_owned(),
            format!("last_digest|{}", statement_digest(LIMITS))
        ]
    );
}

#[test]
fn the_position_survives() {
    let mut fixture = Fixture::with(&[LIMITS, "SELECT 1"]);
    let position = fixture.writer.position().clone();
    assert_eq!(position.seq, Seq::new(2));
    fixture.writer.set_ready().unwrap();
    fixture.writer = LdbWriter::open(&fixture.path()).unwrap();
    assert_eq!(*fixture.writer.position(), position);
    assert!(fixture.writer.is_ready());
    assert_eq!(fixture.writer.catalog().len(), 1);
}

#[test]
fn gaps_are_remembered_within_the_window() {
    let mut fixture = Fixture::new();
    let apply = |writer: &mut LdbWriter, seqs: &[u64]| {
        let mut batch = writer.begin().unwrap();
        for seq in seqs {
            batch.apply(&entry(*seq, "SELECT 1")).unwrap();
        }
        batch.finish().unwrap();
        batch.commit().unwrap();
        let gaps = writer.gaps(Seq::ZERO, 100).unwrap();
        gaps.iter()
            .map(|(a, b)| (a.get(), b.get()))
            .collect::<Vec<_>>()
    };
    assert_eq!(apply(&mut fixture.writer, &[3, 4, 7]), [(5, 6)]);
    assert_eq!(apply(&mut fixture.writer, &[9]), [(5, 6), (8, 8)]);
    assert_eq!(apply(&mut fixture.writer, &[10_010]), [(10, 10_009)]);
}

/// As ctlstore leaves it.
const CTLSTORE: &str = "PRAGMA journal_mode = WAL;
     CREATE TABLE _ldb_seq(id INTEGER PRIMARY KEY NOT NULL, seq BIGINT NOT NULL);
     CREATE TABLE _ldb_last_update(name STRING PRIMARY KEY NOT NULL, timestamp DATETIME NOT NULL);
     INSERT INTO _ldb_seq VALUES(1, 41);
     INSERT INTO _ldb_last_update VALUES('ledger', '2024-02-29 12:34:56+00:00');
     CREATE TABLE app___limits (\"id\" INTEGER, \"n\" INTEGER, PRIMARY KEY(\"id\"));
     INSERT INTO app___limits VALUES(1, 1);";

/// The mark of the rows that came with a snapshot, as a reader takes it.
fn snapshot(writer: &LdbWriter) -> Option<(i64, i64)> {
    let value = |name: &str| {
        writer.conn.query_row(
            "SELECT value FROM _ctlfs_state WHERE name = ?1",
            [name],
            |row| row.get(0),
        )
    };
    Some((value("snapshot_seq").ok()?, value("snapshot_time").ok()?))
}

#[test]
fn a_snapshot_without_a_time_is_as_old_as_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ldb.db");
    let conn = Connection::open(&path).unwrap();
    conn.execute_batch(CTLSTORE).unwrap();
    conn.execute_batch("DELETE FROM _ldb_last_update").unwrap();
    drop(conn);
    let time = std::time::UNIX_EPOCH + Duration::from_micros(1_234_567_890_000_123);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(time).unwrap();
    let writer = LdbWriter::open(&path).unwrap();
    assert_eq!(snapshot(&writer), Some((41, 1_234_567_890_000_123)));
    assert_eq!(snapshot(&Fixture::new().writer), None);
}

#[test]
fn an_ldb_of_ctlstores_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ldb.db");
    Connection::open(&path)
        .unwrap()
        .execute_batch(CTLSTORE)
        .unwrap();
    let mut writer = LdbWriter::open(&path).unwrap();
    assert_eq!(writer.position().seq, Seq::new(41));
    assert_eq!(writer.position().digest, None);
    assert_eq!(snapshot(&writer), Some((41, 1_709_210_096_000_000)));
    assert_eq!(
        writer.position().time,
        Some(LedgerTime::from_micros(1_709_210_096_000_000))
    );
    let mut batch = writer.begin().unwrap();
    let replace = r#"REPLACE INTO app___limits ("id","n") VALUES(2,2)"#;
    batch.apply(&entry(42, replace)).unwrap();
    let changes = batch.finish().unwrap().unwrap();
    assert_eq!((changes.from, changes.to), (Seq::new(41), Seq::new(42)));
    batch.commit().unwrap();
    drop(writer);
    let writer = LdbWriter::open(&path).unwrap();
    assert_eq!(snapshot(&writer), Some((41, 1_709_210_096_000_000)));
    drop(writer);
    // ctlstore goes on, and then we do: what we recorded no longer holds.
    Connection::open(&path)
        .unwrap()
        .execute_batch(
            "UPDATE _ldb_seq SET seq = 43; UPDATE app___limits SET n = 3;
             UPDATE _ldb_last_update SET timestamp = '2024-02-29 12:34:57+00:00'",
        )
        .unwrap();
    for _ in 0..2 {
        let writer = LdbWriter::open(&path).unwrap();
        assert_eq!(writer.position().digest, None);
        assert_eq!(snapshot(&writer), Some((43, 1_709_210_097_000_000)));
    }
    let writer = LdbWriter::open(&path).unwrap();
    let records: i64 = writer
        .conn
        .query_row("SELECT count(*) FROM _ctlfs_rows___app___limits", [], |r| {
            r.get(0)
        })
        .unwrap();
    assert_eq!(records, 0);
}

#[test]
fn files_of_others_are_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text");
    std::fs::write(&text, "a text that is none of our business").unwrap();
    let other = dir.path().join("other.db");
    Connection::open(&other)
        .unwrap()
        .execute_batch("CREATE TABLE bookmarks(url TEXT); INSERT INTO bookmarks VALUES('x');")
        .unwrap();
    for path in [&text, &other] {
        let before = std::fs::read(path).unwrap();
        let error = LdbWriter::open(path).err().unwrap();
        assert!(matches!(error, LdbError::NotAnLdb { .. }), "{error}");
        assert!(error.to_string().contains("name another file"), "{error}");
        assert_eq!(std::fs::read(path).unwrap(), before);
    }
    let error = LdbWriter::open(dir.path()).err().unwrap();
    assert!(matches!(error, LdbError::NotAnLdb { .. }), "{error}");
    let missing = dir.path().join("no/such/directory.db");
    let error = LdbWriter::open(&missing).err().unwrap();
    assert!(matches!(error, LdbError::Io { .. }), "{error}");
}

#[test]
fn a_damaged_file_says_so() {
    let fixture = Fixture::with(&[LIMITS]);
    let path = fixture.dir.path().join("damaged.db");
    fixture
        .writer
        .conn
        .execute("VACUUM INTO ?1", [path.to_str().unwrap()])
        .unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[100..3000].fill(0xa5);
    std::fs::write(&path, bytes).unwrap();
    let error = LdbWriter::open(&path).err().unwrap();
    assert!(matches!(error, LdbError::Corrupt { .. }), "{error}");
}

#[test]
fn a_full_disk_loses_nothing() {
    let mut fixture = Fixture::with(&[FLAGS]);
    fixture.writer.limit_pages(1);
    let note = "n".repeat(100_000);
    let big = format!(r#"REPLACE INTO app___flags ("name","on","note") VALUES('big',1,'{note}')"#);
    let small = r#"REPLACE INTO app___flags ("name","on","note") VALUES('a',1,NULL)"#;
    let error = fixture.apply(&[small, &big]).unwrap_err();
    assert!(
        matches!(error, ApplyError::Ldb(LdbError::Full { .. })),
        "{error}"
    );
    assert_eq!(fixture.rows("SELECT seq FROM _ldb_seq"), ["1"]);
    fixture.writer.limit_pages(1_000_000);
    fixture.apply(&[small, &big]).unwrap();
    assert_eq!(fixture.rows("SELECT count(*) FROM app___flags"), ["2"]);
}
