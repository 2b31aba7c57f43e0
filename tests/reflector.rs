//! The reflector between a real embedded ledger, filled by the executive, and a real LDB: crashes
//! at any commit, a full disk, and an LDB that ctlstore began.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ctlfs::executive::{Executive, Mutation};
use ctlfs::ldb::LdbWriter;
use ctlfs::ldb::reader::Reader;
use ctlfs::ledger::{self, OriginUrl};
use ctlfs::model::{ChangeSet, Field, FieldName, FieldType, Seq, TableRef, TableSchema, Value};
use ctlfs::reflector::{CommitObserver, Reflector, Settings, StopHandle};
use ctlfs::status::{ProblemKind, StatusBoard};
use proptest::prelude::*;
use rusqlite::Connection;

/// A ledger in a directory of its own, with the table `app/flags`.
struct Ledger {
    dir: tempfile::TempDir,
    executive: Executive,
}

fn table() -> TableRef {
    "app/flags".parse().unwrap()
}

fn name(name: &str) -> FieldName {
    name.parse().unwrap()
}

impl Ledger {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut executive = Executive::open(&url(dir.path())).unwrap();
        executive.init().unwrap();
        executive.create_family(&"app".parse().unwrap()).unwrap();
        let field = |n: &str, ty| Field { name: name(n), ty };
        let fields = vec![
            field("name", FieldType::String),
            field("id", FieldType::Integer),
            field("note", FieldType::Text),
        ];
        let schema = TableSchema::new(fields, &[name("name"), name("id")]).unwrap();
        executive.create_table(&table(), &schema).unwrap();
        Ledger { dir, executive }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("ledger.db")
    }

    /// One ledger transaction that sets the notes of these rows; `None` deletes one.
    fn write(&mut self, rows: &[(u8, Option<String>)]) {
        let key = |id: u8| {
            vec![
                (name("name"), Value::text(format!("it's {}", id % 3))),
                (name("id"), Value::Integer(id.into())),
            ]
        };
        let mutations = rows.iter().map(|(id, note)| match note {
            Some(note) => {
                let mut values = key(*id);
                values.push((name("note"), Value::text(note.clone())));
                Mutation::Upsert {
                    table: table(),
                    values,
                }
            }
            None => Mutation::Delete {
                table: table(),
                key: key(*id),
            },
        });
        self.executive
            .mutate(&mutations.collect::<Vec<_>>())
            .unwrap();
    }

    fn last(&self) -> Seq {
        let mut origin = ledger::open(&url(self.dir.path())).unwrap();
        origin.last_seq().unwrap().unwrap()
    }

    fn reflector(
        &self,
        ldb: &Path,
        observer: impl CommitObserver + 'static,
        board: &Arc<StatusBoard>,
        batch_entries: usize,
    ) -> Reflector {
        Reflector::new(
            ledger::open(&url(self.dir.path())).unwrap(),
            LdbWriter::open(ldb).unwrap(),
            Box::new(observer),
            Arc::clone(board),
            Settings {
                batch_entries,
                poll_interval: Duration::from_millis(5),
                ..Settings::default()
            },
        )
    }

    /// Whether the LDB holds what the ledger's data table does, at the ledger's end.
    fn check(&self, ldb: &Path) {
        assert_eq!(rows(ldb), rows(&self.file()));
        let at: i64 = query(ldb, "SELECT seq FROM _ldb_seq");
        assert_eq!(Seq::from_sql(at), self.last());
        let unmatched: i64 = query(
            ldb,
            "SELECT count(*) FROM _ctlfs_rows___app___flags
             WHERE id NOT IN (SELECT _rowid_ FROM app___flags)",
        );
        assert_eq!(unmatched, 0, "records of rows that are gone");
    }
}

fn url(dir: &Path) -> OriginUrl {
    OriginUrl::sqlite(&dir.join("ledger.db")).unwrap()
}

fn query<T: rusqlite::types::FromSql>(file: &Path, sql: &str) -> T {
    let conn = Connection::open(file).unwrap();
    conn.query_row(sql, [], |row| row.get(0)).unwrap()
}

fn rows(file: &Path) -> Vec<(String, i64, Option<String>)> {
    let conn = Connection::open(file).unwrap();
    let mut statement = conn
        .prepare("SELECT name, id, note FROM app___flags ORDER BY name, id")
        .unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
    rows.unwrap().map(Result::unwrap).collect()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Copies the LDB at one commit as a killed process would leave it: in the middle of the
/// transaction, or right behind it.
struct Crash {
    ldb: PathBuf,
    image: PathBuf,
    /// How many calls to let pass.
    countdown: usize,
}

impl Crash {
    fn call(&mut self) {
        if self.countdown == 0 {
            for suffix in ["", "-wal", "-shm"] {
                let file = |path: &Path| PathBuf::from(format!("{}{suffix}", path.display()));
                std::fs::copy(file(&self.ldb), file(&self.image)).unwrap();
            }
        }
        self.countdown = self.countdown.wrapping_sub(1);
    }
}

impl CommitObserver for Crash {
    fn before_commit(&mut self, _: &ChangeSet) {
        self.call();
    }
    fn after_commit(&mut self, _: &ChangeSet) {
        self.call();
    }
    fn commit_failed(&mut self, _: &ChangeSet) {}
}

type Transaction = Vec<(u8, Option<String>)>;

fn transaction() -> impl Strategy<Value = Transaction> {
    let note = prop::option::weighted(0.7, "['a-cé]{0,4}");
    prop::collection::vec((0u8..12, note), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn a_crash_at_any_commit_loses_and_repeats_nothing(
        rounds in prop::collection::vec(
            (prop::collection::vec(transaction(), 1..6), 1usize..6, 0usize..8),
            1..6,
        )
    ) {
        let mut ledger = Ledger::new();
        let mut ldb = ledger.dir.path().join("ldb.db");
        let board = Arc::default();
        for (round, (transactions, batch_entries, countdown)) in rounds.into_iter().enumerate() {
            for transaction in transactions {
                ledger.write(&transaction);
            }
            let image = ledger.dir.path().join(format!("image{round}.db"));
            let crash = Crash { ldb: ldb.clone(), image: image.clone(), countdown };
            let mut reflector = ledger.reflector(&ldb, crash, &board, batch_entries);
            reflector.catch_up(&StopHandle::new()).unwrap();
            drop(reflector);
            ledger.check(&ldb);
            if image.exists() {
                ldb = image;
            }
        }
        let mut reflector = ledger.reflector(&ldb, (), &board, 10_000);
        reflector.catch_up(&StopHandle::new()).unwrap();
        ledger.check(&ldb);
    }
}

/// A small file system of its own, gone with the value.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (target, kind) = (c_path(dir.path()), c"tmpfs");
        let options = CString::new(options).unwrap();
        // SAFETY: all pointers are to NUL-terminated strings that outlive the call.
        let result = unsafe {
            libc::mount(
                kind.as_ptr(),
                target.as_ptr(),
                kind.as_ptr(),
                0,
                options.as_ptr().cast(),
            )
        };
        let error = std::io::Error::last_os_error();
        assert_eq!(result, 0, "cannot mount a tmpfs ({error}); run as root");
        Tmpfs(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let target = c_path(self.0.path());
        // SAFETY: the pointer is to a NUL-terminated string that outlives the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// Stops the reflector's thread also when the test fails.
struct Running {
    stop: StopHandle,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Running {
    fn start(mut reflector: Reflector) -> Self {
        let stop = StopHandle::new();
        let handle = stop.clone();
        let thread = Some(std::thread::spawn(move || reflector.run(&handle)));
        Running { stop, thread }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.stop();
        let joined = self.thread.take().map(std::thread::JoinHandle::join);
        assert!(
            std::thread::panicking() || joined.is_none_or(|j| j.is_ok()),
            "the reflector panicked"
        );
    }
}

#[test]
fn a_full_disk_stops_the_reflector_until_space_is_freed() {
    let disk = Tmpfs::mount("size=4m,mode=0700");
    let ldb = disk.0.path().join("ldb.db");
    let mut ledger = Ledger::new();
    ledger.write(&[(1, Some("before".into()))]);
    let board = Arc::<StatusBoard>::default();
    let running = Running::start(ledger.reflector(&ldb, (), &board, 10_000));
    let problem = || board.progress().problem;
    wait_until("the first row is there", || board.progress().ready);
    let before = rows(&ldb);
    assert_eq!(before, rows(&ledger.file()));

    let filler = disk.0.path().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    let full = std::io::copy(&mut std::io::repeat(b'x'), &mut file).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    for id in 0..4 {
        ledger.write(&[(id, Some("after".repeat(20_000)))]);
    }
    wait_until("the problem is noticed", || problem().is_some());
    let noticed = problem().unwrap();
    assert_eq!(noticed.kind, ProblemKind::Storage, "{}", noticed.reason);
    assert_eq!(rows(&ldb), before);
    let mut reader = Reader::open(&ldb).unwrap();
    let table = Arc::clone(reader.catalog().unwrap().value.get(&table()).unwrap());
    let key = [Value::text("it's 1"), Value::Integer(1)];
    let row = reader.row(&table, &key).unwrap().value.unwrap();
    assert_eq!(row.values[2], Value::text("before"));

    drop(file);
    std::fs::remove_file(filler).unwrap();
    wait_until("it goes on", || problem().is_none());
    wait_until("it is there", || board.progress().applied == ledger.last());
    ledger.check(&ldb);
    drop(running);
}

#[test]
fn an_ldb_that_ctlstore_began_is_gone_on_with() {
    let mut ledger = Ledger::new();
    ledger.write(&[(1, Some("old".into())), (2, Some("old".into()))]);
    let taken_at = ledger.last();
    // As ctlstore would have replayed it.
    let ldb = ledger.dir.path().join("ldb.db");
    let conn = Connection::open(&ldb).unwrap();
    conn.execute_batch(&format!(
        "PRAGMA journal_mode = WAL;
         CREATE TABLE _ldb_seq(id INTEGER PRIMARY KEY NOT NULL, seq BIGINT NOT NULL);
         CREATE TABLE _ldb_last_update(name STRING PRIMARY KEY NOT NULL, timestamp DATETIME NOT NULL);
         INSERT INTO _ldb_seq VALUES(1, {taken_at});
         INSERT INTO _ldb_last_update VALUES('ledger', '2024-02-29 12:34:56.000123+00:00');"
    ))
    .unwrap();
    let mut origin = ledger::open(&url(ledger.dir.path())).unwrap();
    for entry in origin.fetch(Seq::ZERO).unwrap() {
        conn.execute_batch(&entry.statement).unwrap();
    }
    drop(conn);
    ledger.write(&[(2, Some("new".into())), (3, Some("new".into()))]);

    let board = Arc::default();
    let mut reflector = ledger.reflector(&ldb, (), &board, 10_000);
    reflector.catch_up(&StopHandle::new()).unwrap();
    ledger.check(&ldb);
    let mut reader = Reader::open(&ldb).unwrap();
    let table = Arc::clone(reader.catalog().unwrap().value.get(&table()).unwrap());
    let mut mark = |id: i64| {
        let key = [Value::text(format!("it's {id}")), Value::Integer(id)];
        reader.row(&table, &key).unwrap().value.unwrap().mark
    };
    let old = mark(1);
    assert_eq!(old.seq, taken_at);
    assert_eq!(old.time.micros(), 1_709_210_096_000_123);
    assert!(mark(2).seq > taken_at);
}
