//! How long a commit takes to be seen: a reader opens and reads one file over and over while it is
//! changed 2,000 times, alone and among eight busy readers of the rest of the tree.
//!
//! The clock starts before COMMIT is sent and stops when the reader has the new bytes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::undocumented_unsafe_blocks,
    unreachable_pub
)]

mod common {
    pub mod daemon;
    pub mod mariadb;
}

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, Place};
use common::mariadb::{PrivateServer, TestDatabase};
use ctlfs::executive::Executive;
use ctlfs::ledger::OriginUrl;
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Opts};
use rusqlite::Connection;

const CHANGES: u64 = 2_000;
const READERS: usize = 8;
/// Rows beside the one that changes, which the busy readers read.
const ROWS: u64 = 200;
/// What issue and design promise.
const P50: Duration = Duration::from_millis(5);
const P99: Duration = Duration::from_millis(25);

const CREATE: &str = "CREATE TABLE app___flags (\"name\" VARCHAR(191), \"value\" TEXT, \
                      PRIMARY KEY(\"name\"));";

fn row(name: &str, value: u64) -> String {
    format!("REPLACE INTO app___flags (\"name\",\"value\") VALUES('{name}','{value}')")
}

/// Commits an entry; the time just before.
trait Ledger {
    fn commit(&mut self, statement: &str) -> Instant;
}

struct MariaDb {
    runtime: tokio::runtime::Runtime,
    conn: Option<Conn>,
}

impl MariaDb {
    fn connect(database: &TestDatabase) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let opts = Opts::from_url(&database.url()).unwrap();
        let opts = mysql_async::OptsBuilder::from_opts(opts).prefer_socket(false);
        let conn = runtime.block_on(async { Conn::new(opts).await.unwrap() });
        MariaDb {
            runtime,
            conn: Some(conn),
        }
    }
}

impl Ledger for MariaDb {
    fn commit(&mut self, statement: &str) -> Instant {
        let conn = self.conn.as_mut().unwrap();
        self.runtime.block_on(async {
            conn.query_drop("BEGIN").await.unwrap();
            conn.query_drop("UPDATE locks SET clock = clock + 1 WHERE id = 'ledger'")
                .await
                .unwrap();
            conn.exec_drop(
                "INSERT INTO ctlstore_dml_ledger (statement) VALUES (?)",
                (statement,),
            )
            .await
            .unwrap();
            let before = Instant::now();
            conn.query_drop("COMMIT").await.unwrap();
            before
        })
    }
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        // Outside of the runtime, where mysql_async would want to say goodbye.
        self.conn = None;
    }
}

struct Embedded(Connection);

impl Ledger for Embedded {
    fn commit(&mut self, statement: &str) -> Instant {
        let db = &self.0;
        db.execute_batch("BEGIN IMMEDIATE; UPDATE locks SET clock = clock + 1 WHERE id = 'ledger'")
            .unwrap();
        db.execute(
            "INSERT INTO ctlstore_dml_ledger (statement) VALUES (?1)",
            [statement],
        )
        .unwrap();
        let before = Instant::now();
        db.execute_batch("COMMIT").unwrap();
        before
    }
}

/// Reads one file over and over and tells when its number has changed.
fn spin(path: PathBuf, ended: Arc<AtomicBool>) -> mpsc::Receiver<(u64, Instant)> {
    let (send, seen) = mpsc::channel();
    std::thread::spawn(move || {
        let mut last = 0;
        while !ended.load(Ordering::Relaxed) {
            let number = fs::read_to_string(&path).unwrap().parse().unwrap();
            if number != last {
                last = number;
                if send.send((number, Instant::now())).is_err() {
                    return;
                }
            }
        }
    });
    seen
}

/// Threads that read the other rows as fast as they can, until the flag is set.
fn busy(tree: &Path, ended: &Arc<AtomicBool>) -> Arc<AtomicU64> {
    let reads = Arc::new(AtomicU64::new(0));
    for reader in 0..READERS {
        let (tree, ended, reads) = (tree.to_owned(), Arc::clone(ended), Arc::clone(&reads));
        std::thread::spawn(move || {
            let mut number = u64::try_from(reader).unwrap();
            while !ended.load(Ordering::Relaxed) {
                number = (number + 7) % ROWS;
                let path = tree.join(format!("app/flags/r{number}/value"));
                assert!(!fs::read(path).unwrap().is_empty());
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    reads
}

/// The whole of it on a mounted ledger.
fn measure(what: &str, daemon: &Daemon, ledger: &mut dyn Ledger) {
    let mut next = 1;
    for readers in [false, true] {
        let ended = Arc::new(AtomicBool::new(false));
        let _guard = EndOnDrop(Arc::clone(&ended));
        let seen = spin(daemon.path("app/flags/a/value"), Arc::clone(&ended));
        let reads = readers.then(|| busy(daemon.mountpoint(), &ended));
        let began = Instant::now();
        let mut delays = Vec::new();
        for _ in 0..CHANGES {
            let before = ledger.commit(&row("a", next));
            let at = loop {
                let (number, at) = seen
                    .recv_timeout(Duration::from_secs(20))
                    .expect("the change is seen");
                // The first that a new reader sees is the last of the round before.
                if number == next {
                    break at;
                }
            };
            delays.push(at.saturating_duration_since(before));
            next += 1;
        }
        let took = began.elapsed();
        delays.sort_unstable();
        let at = |percent: usize| delays[(delays.len() - 1) * percent / 100];
        println!(
            "{what}, {}: commit to visible p50 {:?}, p99 {:?}, at most {:?}, {CHANGES} changes in {took:?}{}",
            if readers {
                "eight busy readers"
            } else {
                "alone"
            },
            at(50),
            at(99),
            at(100),
            reads.map_or_else(String::new, |reads| format!(
                ", {} other reads",
                reads.load(Ordering::Relaxed)
            )),
        );
        assert!(at(50) <= P50, "p50 {:?}", at(50));
        assert!(at(99) <= P99, "p99 {:?}", at(99));
    }
    let delay = &daemon.status()["delay"];
    println!("{what}: status.json says {delay}");
    assert_eq!(delay["count"], 1000);
    assert!(delay["p50_ms"].as_f64().unwrap() <= 20.0, "{delay}");
}

struct EndOnDrop(Arc<AtomicBool>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn fill(ledger: &mut dyn Ledger) {
    ledger.commit(CREATE);
    ledger.commit(&row("a", 0));
    for number in 0..ROWS {
        ledger.commit(&row(&format!("r{number}"), number));
    }
}

fn init(url: &str) {
    let url: OriginUrl = url.parse().unwrap();
    Executive::open(&url).unwrap().init().unwrap();
}

fn follow(place: &Place, origin: &str) -> Daemon {
    let daemon = Daemon::follow(place, origin, &["--log-level", "warn"]);
    daemon.wait_status("push is on", |s| s["push"]["state"] == "on");
    daemon
}

#[test]
fn a_commit_in_mariadb_is_seen_within_milliseconds() {
    let server = PrivateServer::with_binlog(&[]);
    let database = server.database();
    init(&database.url());
    let mut ledger = MariaDb::connect(&database);
    fill(&mut ledger);
    let place = Place::new();
    let daemon = follow(&place, &database.url());
    measure("MariaDB", &daemon, &mut ledger);
}

#[test]
fn a_commit_in_an_embedded_ledger_is_seen_within_milliseconds() {
    let place = Place::new();
    init(&place.origin());
    let db = Connection::open(place.ledger()).unwrap();
    db.busy_timeout(Duration::from_secs(20)).unwrap();
    let mut ledger = Embedded(db);
    fill(&mut ledger);
    let daemon = follow(&place, &place.origin());
    measure("embedded", &daemon, &mut ledger);
}
