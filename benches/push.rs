//! The numbers of docs/PERFORMANCE.md about push: how long a commit takes to be seen with it and
//! with polling every second, in one run, and what an idle host costs the server. `cargo bench
//! --bench push` prints the table; it needs root (or fusermount3), /dev/fuse and mariadbd.
//!
//! The clock starts before COMMIT is sent and stops when a reader that opens and reads the file
//! over and over has the new bytes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(unreachable_pub)]
#[path = "../tests/common/mariadb.rs"]
mod mariadb;
#[allow(unreachable_pub)]
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use ctlfs::executive::Executive;
use ctlfs::ledger::OriginUrl;
use mariadb::PrivateServer;
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Opts, OptsBuilder};
use rusqlite::Connection;
use support::{Daemon, Numbers, Sample};

/// Changes with push; with polling each takes half a second.
const PUSHED: u64 = 2_000;
const POLLED: u64 = 60;
/// For how long an idle host is watched.
const IDLE: Duration = Duration::from_secs(120);

const CREATE: &str = "CREATE TABLE bench___rows (\"name\" VARCHAR(191), \"value\" INTEGER, \
                      PRIMARY KEY(\"name\"));";

fn row(value: u64) -> String {
    format!("REPLACE INTO bench___rows (\"name\",\"value\") VALUES('a',{value})")
}

fn main() {
    let scratch = tempfile::tempdir().unwrap();
    println!("| what | p50 | p99 |\n| --- | --- | --- |");
    let server = PrivateServer::with_binlog(&[]);
    let database = server.database();
    let origin = server_with_ledger(&database.url());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let opts = OptsBuilder::from_opts(Opts::from_url(&origin).unwrap()).prefer_socket(false);
    let mut conn = runtime.block_on(async { Conn::new(opts).await.unwrap() });
    let mut commit = |statement: &str| {
        runtime.block_on(async {
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
    };
    both(
        "MariaDB",
        &scratch.path().join("mariadb"),
        &origin,
        &mut commit,
    );
    idle(
        &server,
        &scratch.path().join("idle"),
        &server.follower(&database),
    );
    // Outside of its runtime, where the driver would want to say goodbye.
    drop(conn);

    let file = scratch.path().join("ledger.db");
    let origin = server_with_ledger(&format!("sqlite://{}", file.display()));
    let db = Connection::open(&file).unwrap();
    db.busy_timeout(Duration::from_secs(20)).unwrap();
    let mut commit = |statement: &str| {
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
    };
    both(
        "the embedded ledger",
        &scratch.path().join("embedded"),
        &origin,
        &mut commit,
    );
}

fn server_with_ledger(url: &str) -> String {
    let parsed: OriginUrl = url.parse().unwrap();
    Executive::open(&parsed).unwrap().init().unwrap();
    url.to_owned()
}

/// With push and with polling, on one ledger.
fn both(what: &str, place: &Path, origin: &str, commit: &mut dyn FnMut(&str) -> Instant) {
    std::fs::create_dir_all(place).unwrap();
    commit(CREATE);
    commit(&row(0));
    let mut next = 1;
    let mut medians = Vec::new();
    for (push, changes, how) in [
        ("auto", PUSHED, "push"),
        ("off", POLLED, "polling every second"),
    ] {
        let state = place.join(push);
        let arguments = ["--origin", origin, "--push", push, "--state"];
        let arguments = [&arguments[..], &[state.to_str().unwrap()]].concat();
        std::fs::create_dir_all(&state).unwrap();
        let (daemon, _) = Daemon::mount(&place.join("ctl"), &arguments, "bench/rows/a/value");
        wait("push is as asked", || {
            (daemon.status()["push"]["state"] == "on") == (push == "auto")
        });
        let mut sample = changes_seen(&daemon, next, changes, commit);
        next += changes;
        println!(
            "{}",
            sample.row(&format!(
                "commit to visible, {what}, {how} ({changes} changes)"
            ))
        );
        medians.push(sample.quantile(0.5));
    }
    println!(
        "| {what}, polling ÷ push | {:.0} | |",
        medians[1] / medians[0]
    );
}

fn changes_seen(
    daemon: &Daemon,
    first: u64,
    changes: u64,
    commit: &mut dyn FnMut(&str) -> Instant,
) -> Sample {
    let ended = Arc::new(AtomicBool::new(false));
    let seen = spin(daemon.mountpoint.join("bench/rows/a/value"), &ended);
    let mut numbers = Numbers(7);
    let mut sample = Sample::default();
    for number in first..first + changes {
        // At no fixed distance from the change before, which polling would be in step with.
        let pause = Duration::from_micros(numbers.below(2_000));
        let until = Instant::now() + pause;
        wait("a moment has passed", || Instant::now() >= until);
        let before = commit(&row(number));
        let at = loop {
            let (shown, at) = seen.recv_timeout(Duration::from_secs(60)).unwrap();
            if shown == number {
                break at;
            }
        };
        sample.add(at.saturating_duration_since(before));
    }
    ended.store(true, Ordering::Relaxed);
    sample
}

/// Reads one file over and over and tells when its number has changed.
fn spin(path: PathBuf, ended: &Arc<AtomicBool>) -> Receiver<(u64, Instant)> {
    let (send, seen) = mpsc::channel();
    let ended = Arc::clone(ended);
    std::thread::spawn(move || {
        let mut last = u64::MAX;
        while !ended.load(Ordering::Relaxed) {
            let number = std::fs::read_to_string(&path).unwrap().parse().unwrap();
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

fn idle(server: &PrivateServer, place: &Path, origin: &str) {
    std::fs::create_dir_all(place).unwrap();
    let state = place.join("state");
    std::fs::create_dir_all(&state).unwrap();
    let arguments = ["--origin", origin, "--state", state.to_str().unwrap()];
    let (daemon, _) = Daemon::mount(&place.join("ctl"), &arguments, "bench/rows/a/value");
    wait("push is on", || daemon.status()["push"]["state"] == "on");
    let settled = Instant::now() + Duration::from_secs(5);
    wait("it is quiet", || Instant::now() >= settled);
    let (before, began) = (server.counter("Questions"), Instant::now());
    wait("the window is over", || began.elapsed() >= IDLE);
    let took = began.elapsed();
    let after = server.counter("Questions");
    // What a look at the counter itself costs.
    let own = server.counter("Questions") - after;
    let queries = after - before - own;
    println!(
        "| an idle host, push on: queries in {:.0} s | {queries} ({:.3}/s) | |",
        took.as_secs_f64(),
        queries as f64 / took.as_secs_f64()
    );
}

fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(600);
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}
