//! Everything at once: readers, listers, watchers, pins and a steady stream of transactions. At the
//! end every process is one that can be ended, and the tree shows what the ledger says.
//!
//! `CTLFS_SOAK_SECONDS` sets how long it runs; a short while unless it is set.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod common {
    pub mod daemon;
    pub mod ledger;
    pub mod watcher;
}

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::daemon::wait_until;
use common::ledger::Tree;
use common::watcher::Watcher;

/// Transactions a second.
const RATE: u32 = 500;
const ROWS: u64 = 200;

const TABLE: &str = r#"CREATE TABLE app___load ("id" INTEGER, "a" INTEGER, "b" INTEGER, "note" TEXT, PRIMARY KEY("id"));"#;

fn row(id: u64, value: u64) -> String {
    format!(
        "REPLACE INTO app___load (\"id\",\"a\",\"b\",\"note\") VALUES({id},{value},{value},'n{value}')"
    )
}

/// Reads rows; `a` and `b` always change together, and so they are in any row.json. Rows 100 apart
/// do, and so they are in any export.
const READER: &str = r#"
import os, sys, json, random
root = sys.argv[1]
print("watching", flush=True)
while True:
    if random.randrange(50) == 0:
        with open(root + "/.ctlfs/export/app/load.ndjson", "rb") as f:
            rows = {row["id"]: row["a"] for row in map(json.loads, f)}
        if any(rows.get(id) != rows.get(id + 100) for id in range(100)):
            print("torn export", rows, flush=True)
    row = root + "/app/load/%d" % random.randrange(200)
    try:
        with open(row + "/row.json", "rb") as f:
            value = json.loads(f.read())
        if value["a"] != value["b"]:
            print("torn", value, flush=True)
        os.stat(row + "/note")
    except (FileNotFoundError, NotADirectoryError):
        pass
"#;

/// Lists and walks.
const LISTER: &str = r#"
echo watching
while :; do
    ls -lR "$1/app" >/dev/null 2>&1
    cat "$1/.ctlfs/export/app/load.csv" "$1/.ctlfs/changes/app/load.ndjson" >/dev/null 2>&1
    find "$1/.ctlfs" -maxdepth 3 >/dev/null 2>&1
done
"#;

/// Pins the tree, reads a few rows twice, of which those 100 apart are the same, and lets it go.
const PINNER: &str = r#"
echo watching
while :; do
    pin="$1/.ctlfs/at/soak-$$"
    mkdir "$pin" || { echo "cannot pin"; continue; }
    a=$(cat "$pin"/app/load/1*/a | sha256sum)
    b=$(cat "$pin"/app/load/1*/a | sha256sum)
    [ "$a" = "$b" ] || echo "torn pin"
    a=$(cat "$pin"/app/load/[1-9]/a)
    b=$(cat "$pin"/app/load/10[1-9]/a)
    [ "$a" = "$b" ] || echo "torn transaction in a pin"
    rmdir "$pin" || echo "cannot unpin"
done
"#;

fn shell(script: &str, root: &Path) -> Watcher {
    let watcher = Watcher::start(Command::new("bash").args(["-c", script, "sh"]).arg(root));
    watcher.wait_for("watching");
    watcher
}

/// Processes of which the kernel says that they wait for something that cannot be interrupted.
fn hung(pids: &[u32]) -> Vec<u32> {
    let uninterruptible = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
            stat.rsplit_once(") ")
                .is_some_and(|(_, r)| r.starts_with('D'))
        })
    };
    pids.iter().copied().filter(uninterruptible).collect()
}

#[test]
fn nothing_hangs_under_everything_at_once() {
    let seconds = std::env::var("CTLFS_SOAK_SECONDS")
        .map_or(20, |text| text.parse().expect("a number of seconds"));
    let rows: Vec<String> = (0..ROWS).map(|id| row(id, 0)).collect();
    let tree = Tree::new(&[], &[&[TABLE.to_owned()], &rows[..]].concat());
    let root = tree.daemon.mountpoint().to_owned();
    let python = || {
        let watcher = Watcher::start(Command::new("python3").args(["-c", READER]).arg(&root));
        watcher.wait_for("watching");
        watcher
    };
    let quiet = vec![
        python(),
        python(),
        shell(LISTER, &root),
        shell(PINNER, &root),
    ];
    let watchers = vec![
        Watcher::inotifywait(&["-r"], &[tree.path("app")]),
        Watcher::inotifywait(&["-e", "moved_to"], &[tree.path("app/load")]),
    ];
    let done = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicU64::new(0));
    let writer = {
        let (done, written) = (Arc::clone(&done), Arc::clone(&written));
        let ledger = common::ledger::Ledger::open(&tree.place.ledger());
        std::thread::spawn(move || {
            let began = Instant::now();
            let mut last = 0;
            for n in 1u32.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                // A pace, not a wait.
                let due = began + Duration::from_secs(1) / RATE * n;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                let n = u64::from(n);
                let id = n % (ROWS / 2);
                let pair = [id, id + ROWS / 2];
                last = ledger.transaction(&pair.map(|id| match n % 17 {
                    0 => format!("DELETE FROM app___load WHERE \"id\" = {id}"),
                    _ => row(id, n),
                }));
                written.store(n, Ordering::Relaxed);
            }
            last
        })
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut heard = 0;
    let mut faults = Vec::new();
    wait_within_soak(end, || {
        for watcher in &quiet {
            faults.extend(watcher.rest().into_iter().map(|(_, line)| line));
        }
        heard += watchers.iter().map(|w| w.rest().len()).sum::<usize>();
    });
    done.store(true, Ordering::Relaxed);
    let last = writer.join().unwrap();
    tree.wait_shown(last);
    let transactions = written.load(Ordering::Relaxed);
    let announced = tree.daemon.status()["announce"].clone();
    println!("{transactions} transactions in {seconds} s, {heard} events heard, {announced}");
    assert_eq!(faults, [] as [&str; 0]);
    assert!(heard > 1000, "{heard} events");
    assert_eq!(announced["on"], true);
    assert_eq!(announced["failed"], 0);

    let mut pids: Vec<u32> = quiet
        .iter()
        .chain(&watchers)
        .flat_map(Watcher::pids)
        .collect();
    wait_until("no process waits for ever", || {
        hung(&[&pids[..], &[tree.daemon.pid()]].concat()).is_empty()
    });
    drop((quiet, watchers));
    wait_until("every process has ended", || {
        pids.retain(|pid| common::daemon::is_alive(*pid));
        pids.is_empty()
    });
    // What is shown is what the ledger says.
    for id in 0..ROWS {
        let half = ROWS / 2;
        let last = (1..=transactions).rev().find(|n| n % half == id % half);
        let expected = match last {
            Some(n) if n % 17 == 0 => None,
            last => Some(last.unwrap_or(0).to_string()),
        };
        let found = fs::read_to_string(tree.path(format!("app/load/{id}/a"))).ok();
        assert_eq!(
            found, expected,
            "row {id} after {transactions} transactions"
        );
    }
}

/// Runs `work` again and again until `end`.
fn wait_within_soak(end: Instant, mut work: impl FnMut()) {
    while Instant::now() < end {
        work();
        std::thread::sleep(Duration::from_millis(20));
    }
}
