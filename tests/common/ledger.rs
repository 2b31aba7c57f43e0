//! An embedded ledger that a test appends statements to by hand, and the daemon that follows it.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ctlfs::executive::Executive;
use ctlfs::ledger::OriginUrl;
use rusqlite::Connection;

use super::daemon::{Daemon, Place, wait_within};

/// How long a change may take to be shown: the machine may be loaded.
const APPLIED: Duration = Duration::from_secs(60);

/// The ledger of a place.
pub struct Ledger(Connection);

impl Ledger {
    /// Creates the ledger of `place`.
    pub fn create(place: &Place) -> Self {
        let url = OriginUrl::sqlite(&place.ledger()).unwrap();
        Executive::open(&url).unwrap().init().unwrap();
        Self::open(&place.ledger())
    }

    /// Opens the ledger that is there.
    pub fn open(file: &Path) -> Self {
        let db = Connection::open(file).unwrap();
        db.busy_timeout(Duration::from_secs(30)).unwrap();
        // What a test writes need not survive the machine.
        db.execute_batch("PRAGMA synchronous = OFF").unwrap();
        Ledger(db)
    }

    /// Appends entries in one transaction of the database; the sequence of the last.
    pub fn append<S: AsRef<str>>(&self, statements: &[S]) -> u64 {
        self.append_at(None, statements)
    }

    /// The same with a time of the entries, such as `2024-02-29 12:34:56.789`.
    pub fn append_at<S: AsRef<str>>(&self, time: Option<&str>, statements: &[S]) -> u64 {
        let db = &self.0;
        db.execute_batch("BEGIN IMMEDIATE; UPDATE locks SET clock = clock + 1 WHERE id = 'ledger'")
            .unwrap();
        let mut insert = db
            .prepare_cached(
                "INSERT INTO ctlstore_dml_ledger (leader_ts, statement) VALUES \
                 (coalesce(?1, strftime('%Y-%m-%d %H:%M:%f', 'now')), ?2)",
            )
            .unwrap();
        for statement in statements {
            insert.execute((time, statement.as_ref())).unwrap();
        }
        db.execute_batch("COMMIT").unwrap();
        db.last_insert_rowid().try_into().unwrap()
    }

    /// Appends a ledger transaction: the statements between its markers.
    pub fn transaction<S: AsRef<str>>(&self, statements: &[S]) -> u64 {
        let all: Vec<&str> = std::iter::once("--- BEGIN")
            .chain(statements.iter().map(AsRef::as_ref))
            .chain(std::iter::once("--- COMMIT"))
            .collect();
        self.append(&all)
    }

    /// Runs SQL on the ledger's database.
    pub fn run(&self, sql: &str) {
        self.0.execute_batch(sql).unwrap();
    }
}

/// A mounted tree with its ledger.
pub struct Tree {
    // First, so that it ends before its directories go.
    pub daemon: Daemon,
    pub ledger: Ledger,
    pub place: Place,
}

impl Tree {
    /// A tree of these ledger entries, mounted with `extra` arguments.
    pub fn new<S: AsRef<str>>(extra: &[&str], statements: &[S]) -> Self {
        let place = Place::new();
        let ledger = Ledger::create(&place);
        ledger.append(statements);
        let daemon = Daemon::mount(&place, extra);
        Tree {
            daemon,
            ledger,
            place,
        }
    }

    /// Appends entries and waits until the tree shows them; the sequence of the last.
    pub fn apply<S: AsRef<str>>(&self, statements: &[S]) -> u64 {
        let seq = self.ledger.append(statements);
        self.wait_shown(seq);
        seq
    }

    /// Waits until the tree shows everything up to `seq`; fails at once if the reflector stops.
    pub fn wait_shown(&self, seq: u64) {
        wait_within(APPLIED, "the tree shows the ledger", || {
            if shown(self.daemon.mountpoint()) >= seq {
                return true;
            }
            let status = self.daemon.status();
            assert!(status["problem"].is_null(), "{}", status["problem"]);
            false
        });
    }

    /// A path in the tree.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.daemon.path(path)
    }

    /// A file of the tree.
    #[track_caller]
    pub fn read(&self, path: impl AsRef<Path>) -> Vec<u8> {
        let path = self.path(path);
        fs::read(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
    }

    /// A file of the tree that is UTF-8.
    #[track_caller]
    pub fn text(&self, path: impl AsRef<Path>) -> String {
        String::from_utf8(self.read(path)).unwrap()
    }

    /// The daemon's LDB, opened for reading.
    pub fn ldb(&self) -> Connection {
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
        Connection::open_with_flags(self.place.state().join("ldb.db"), flags).unwrap()
    }
}

/// The sequence that a mounted tree shows.
pub fn shown(mountpoint: &Path) -> u64 {
    let text = fs::read_to_string(mountpoint.join(".ctlfs/seq")).unwrap();
    text.trim_end().parse().unwrap()
}

/// The names in a directory, in the order of its listing.
#[track_caller]
pub fn names(directory: impl AsRef<Path>) -> Vec<String> {
    fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// The number of the error that an operation must fail with.
#[track_caller]
pub fn errno<T>(result: std::io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("it succeeded"),
        Err(error) => error.raw_os_error().unwrap(),
    }
}
