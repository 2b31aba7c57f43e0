//! Section 7: an LDB that another process writes.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ctlfs::ldb::LdbWriter;
use ctlfs::ledger::Entry;
use ctlfs::model::{LedgerTime, Seq};
use rusqlite::Connection;

use super::common::daemon::{Daemon, Place, ctlfs, wait_until};
use super::common::ledger::{errno, names};
use super::{FLAGS, flag};

/// As ctlstore leaves it.
const CTLSTORE: &str = "PRAGMA journal_mode = WAL;
    CREATE TABLE _ldb_seq(id INTEGER PRIMARY KEY NOT NULL, seq BIGINT NOT NULL);
    CREATE TABLE _ldb_last_update(name STRING PRIMARY KEY NOT NULL, timestamp DATETIME NOT NULL);
    INSERT INTO _ldb_seq VALUES(1, 41);
    INSERT INTO _ldb_last_update VALUES('ledger', '2024-02-29 12:34:56+00:00');";

/// How often the mounts here look at their LDB.
const INTERVAL: Duration = Duration::from_millis(100);

struct Foreign {
    daemon: Daemon,
    ldb: Connection,
    file: PathBuf,
    _place: Place,
}

impl Foreign {
    fn new(statements: &[&str]) -> Self {
        let place = Place::new();
        let file = place.root().join("ctlstore.db");
        let ldb = Connection::open(&file).unwrap();
        ldb.execute_batch(CTLSTORE).unwrap();
        for statement in statements {
            ldb.execute_batch(statement).unwrap();
        }
        Foreign {
            daemon: mount(&place, &file),
            ldb,
            file,
            _place: place,
        }
    }

    /// Commits a statement as ctlstore does, with its sequence.
    fn write(&self, statement: &str) {
        self.ldb
            .execute_batch(&format!(
                "BEGIN; {statement}; UPDATE _ldb_seq SET seq = seq + 1; COMMIT"
            ))
            .unwrap();
    }
}

fn mount(place: &Place, file: &Path) -> Daemon {
    let mut command = ctlfs();
    command
        .args([
            "mount",
            "--foreground",
            "--check-interval",
            "100ms",
            "--ldb",
        ])
        .arg(file)
        .arg("--state")
        .arg(place.state())
        .arg(place.mountpoint());
    Daemon::start(command, &place.mountpoint())
}

#[test]
fn changes_of_another_process_appear_within_the_interval() {
    let tree = Foreign::new(&[FLAGS, &flag("a", 1, "first")]);
    let path = tree.daemon.path("app/flags/a/note");
    // A version that was superseded between open and read is stale.
    let read = || fs::read_to_string(&path).unwrap_or_else(|error| error.to_string());
    assert_eq!(read(), "first");
    let ino = fs::metadata(&path).unwrap().ino();
    let mut quickest = Duration::MAX;
    let texts = ["second", "third, longer", "", "5", "6", "7"];
    for (round, text) in texts.into_iter().enumerate() {
        tree.write(&flag("a", 1, text));
        let committed = Instant::now();
        wait_until("the change is visible", || read() == text);
        quickest = quickest.min(committed.elapsed());
        wait_until("the sequence too", || {
            fs::read_to_string(tree.daemon.path(".ctlfs/seq")).unwrap()
                == format!("{}\n", 42 + round)
        });
    }
    // A loaded machine may be slow to look; it cannot be so every time.
    assert!(quickest < 2 * INTERVAL, "{quickest:?}");
    assert_ne!(fs::metadata(&path).unwrap().ino(), ino);
    // One that does not move the sequence, as an operator's.
    tree.ldb.execute_batch(&flag("a", 1, "by hand")).unwrap();
    wait_until("the change is visible", || read() == "by hand");
    // Rows, fields, tables and families.
    assert_eq!(
        errno(fs::metadata(tree.daemon.path("app/flags/b"))),
        libc::ENOENT
    );
    tree.write(&flag("b", 1, "new"));
    wait_until("the row is there", || {
        tree.daemon.path("app/flags/b/note").exists()
    });
    tree.write("DELETE FROM app___flags WHERE name = 'a'");
    wait_until("the row is gone", || {
        !tree.daemon.path("app/flags/a").exists()
    });
    tree.write(r#"CREATE TABLE web___routes ("id" INTEGER, PRIMARY KEY("id")); INSERT INTO web___routes VALUES(1)"#);
    wait_until("the family is there", || {
        tree.daemon.path("web/routes/1/id").exists()
    });
    tree.write(
        "ALTER TABLE app___flags ADD COLUMN \"owner\" TEXT; UPDATE app___flags SET owner = 'me'",
    );
    wait_until("the field is there", || {
        fs::read(tree.daemon.path("app/flags/b/owner")).is_ok_and(|owner| owner == b"me")
    });
    tree.write("DROP TABLE app___flags");
    wait_until("the family is gone", || {
        names(tree.daemon.mountpoint()) == [".ctlfs", "web"]
    });
    let status = tree.daemon.status();
    assert_eq!(
        (&status["health"], &status["mode"]),
        (&"ok".into(), &"ldb".into())
    );
}

#[test]
fn an_ldb_that_ctlfs_writes_can_be_mounted_by_another() {
    let place = Place::new();
    let file = place.root().join("ldb.db");
    let mut writer = LdbWriter::open(&file).unwrap();
    let mut seq = 0;
    let mut apply = |statements: &[&str]| {
        let mut batch = writer.begin().unwrap();
        for statement in statements {
            seq += 1;
            let entry = Entry {
                seq: Seq::new(seq),
                time: LedgerTime::from_micros(1_577_836_800_000_000 + i64::try_from(seq).unwrap()),
                statement: (*statement).to_owned(),
            };
            batch.apply(&entry).unwrap();
        }
        batch.finish().unwrap();
        batch.commit().unwrap();
    };
    apply(&[FLAGS, &flag("a", 1, "x"), &flag("b", 1, "x")]);
    let daemon = mount(&place, &file);
    let meta = |path: &str| fs::metadata(daemon.path(path)).unwrap();
    assert_eq!(meta("app/flags/a/note").mtime_nsec(), 2_000);
    assert_eq!(meta("app/flags/b/note").mtime_nsec(), 3_000);
    apply(&[&flag("a", 2, "x")]);
    wait_until("the change is visible", || {
        fs::read(daemon.path("app/flags/a/enabled")).is_ok_and(|value| value == b"2")
    });
    wait_until("so is its time", || {
        meta("app/flags/a/note").mtime_nsec() == 4_000
    });
    assert_eq!(meta("app/flags/b/note").mtime_nsec(), 3_000);
}

#[test]
fn a_held_file_of_another_processs_ldb_is_never_torn() {
    const SIZE: usize = 1 << 20;
    let tree = Foreign::new(&[FLAGS, &flag("a", 1, &"a".repeat(SIZE))]);
    let path = tree.daemon.path("app/flags/a/note");
    // As long as before, shorter, longer.
    let versions = [(b'a', SIZE), (b'b', SIZE), (b'c', 300_000), (b'd', SIZE)];
    for pair in versions.windows(2) {
        let ((old, size), (new, new_size)) = (&pair[0], &pair[1]);
        let mut file = File::open(&path).unwrap();
        let mut bytes = vec![0; 1000];
        file.read_exact(&mut bytes).unwrap();
        tree.write(&flag(
            "a",
            1,
            &char::from(*new).to_string().repeat(*new_size),
        ));
        wait_until("the new version is shown", || {
            fs::read(&path).is_ok_and(|bytes| bytes.first() == Some(new))
        });
        match file.metadata() {
            Ok(meta) => assert_eq!(meta.len(), *size as u64),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ESTALE)),
        }
        match file.read_to_end(&mut bytes) {
            Ok(_) => assert_eq!(bytes.len(), *size),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ESTALE)),
        }
        assert!(bytes.iter().all(|b| b == old));
    }
}

#[test]
fn an_ldb_of_another_process_stays_as_it_is() {
    let tree = Foreign::new(&[FLAGS, &flag("a", 1, "x")]);
    // Everything into the file itself, so that its bytes are all there is.
    let checkpoint = || {
        tree.ldb
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| {
                row.get::<_, i64>(0)
            })
            .unwrap()
    };
    wait_until("the file is written back", || checkpoint() == 0);
    let before = fs::read(&tree.file).unwrap();
    assert_eq!(
        fs::read(tree.daemon.path("app/flags/a/note")).unwrap(),
        b"x"
    );
    let all = names(tree.daemon.path("app/flags/a"));
    assert_eq!(all, ["name", "enabled", "note", "row.json"]);
    for name in all {
        fs::read(tree.daemon.path("app/flags/a").join(name)).unwrap();
    }
    wait_until("the file is written back", || checkpoint() == 0);
    assert!(
        fs::read(&tree.file).unwrap() == before,
        "the LDB was written"
    );
    // The times are the LDB's.
    let meta = fs::metadata(tree.daemon.path("app/flags/a/note")).unwrap();
    assert_eq!(meta.mtime(), 1_709_210_096);
}

#[test]
fn an_ldb_that_cannot_be_read_shows_in_the_status() {
    let tree = Foreign::new(&[FLAGS, &flag("a", 1, "x")]);
    assert_eq!(tree.daemon.status()["health"], "ok");
    fs::rename(&tree.file, tree.file.with_extension("away")).unwrap();
    tree.daemon
        .wait_status("it is missed", |status| status["health"] == "error");
    assert_eq!(tree.daemon.status()["problem"]["kind"], "storage");
    assert_eq!(
        fs::read(tree.daemon.path("app/flags/a/note")).unwrap(),
        b"x"
    );
    fs::rename(tree.file.with_extension("away"), &tree.file).unwrap();
    tree.daemon
        .wait_status("it is there again", |status| status["health"] == "ok");
}
