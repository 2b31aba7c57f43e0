//! Listings of large tables: every key once and in order while rows come and go, in bounded memory,
//! at a cost near that of a local disk.
//!
//! One test, so that nothing else runs while it takes times.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod common {
    pub mod daemon;
    pub mod ledger;
}

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, EndOnDrop, Place, wait_within};
use common::ledger::{Ledger, shown};

/// Rows of the large table.
const ROWS: u64 = 1_000_000;
/// Rows of each table with a composite key.
const PAIRS: u64 = 200_000;
/// What the daemon may use.
const MEMORY_MIB: f64 = 100.0;
/// How much more than a directory of the local disk a listing may cost.
const COST: f64 = 4.0;
/// Timed listings of each kind.
const ROUNDS: usize = 5;

/// One key in so many goes and comes back while the table is listed.
const CHURN: u64 = 500;

fn key(i: u64) -> String {
    format!("k{i:08}")
}

fn churns(i: u64) -> bool {
    i % CHURN == 7
}

/// Fills the ledger: a table of many rows, and two with composite keys. Many rows to an entry, for
/// how they get into the LDB is not what is looked at.
fn fill(ledger: &Ledger) {
    const AT_ONCE: u64 = 500;
    let mut statements = vec![
        r#"CREATE TABLE big___rows ("name" VARCHAR(191), "n" INTEGER, PRIMARY KEY("name"));"#
            .into(),
        r#"CREATE TABLE big___wide ("one" VARCHAR(191), "two" INTEGER, PRIMARY KEY("one","two"));"#
            .into(),
        r#"CREATE TABLE big___deep ("one" INTEGER, "two" VARCHAR(191), PRIMARY KEY("one","two"));"#
            .into(),
    ];
    let mut add = |table: &str, count: u64, row: &dyn Fn(u64) -> String| {
        for first in (0..count).step_by(usize::try_from(AT_ONCE).unwrap()) {
            let rows: Vec<String> = (first..first + AT_ONCE).map(row).collect();
            statements.push(format!(
                "INSERT INTO big___{table} VALUES {}",
                rows.join(",")
            ));
        }
    };
    add("rows", ROWS, &|i| format!("('{}',0)", key(i)));
    add("wide", PAIRS, &|i| format!("('only',{i})"));
    add("deep", PAIRS, &|i| format!("({i},'x')"));
    ledger.append(&statements);
}

/// An empty directory entry for each row, on the disk that programs are built on.
fn fill_disk(directory: &Path) {
    // Links to a few files: the names are what a listing costs.
    const LINKS: u64 = 60_000;
    let mut target = PathBuf::new();
    for i in 0..ROWS {
        let path = directory.join(key(i));
        if i % LINKS == 0 {
            File::create(&path).unwrap();
            target = path;
        } else {
            fs::hard_link(&target, &path).unwrap();
        }
    }
}

fn memory(daemon: &Daemon, field: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024.0
}

fn time_of_ls(directory: &Path) -> Duration {
    let start = Instant::now();
    let status = Command::new("ls")
        .arg("-f")
        .arg(directory)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    start.elapsed()
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

/// A directory through the calls of the C library, which remember positions.
struct Dir(*mut libc::DIR);

impl Dir {
    fn open(path: &Path) -> Self {
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the path ends in a NUL and outlives the call.
        let dir = unsafe { libc::opendir(path.as_ptr()) };
        assert!(!dir.is_null(), "{}", std::io::Error::last_os_error());
        Dir(dir)
    }

    /// The next name that is not ctlfs's own.
    fn next(&mut self) -> Option<String> {
        loop {
            // SAFETY: the directory is open, and the entry is copied before the next call.
            let name = unsafe {
                let entry = libc::readdir(self.0);
                if entry.is_null() {
                    return None;
                }
                CStr::from_ptr((*entry).d_name.as_ptr())
                    .to_str()
                    .unwrap()
                    .to_owned()
            };
            if !name.starts_with('.') {
                return Some(name);
            }
        }
    }

    fn tell(&mut self) -> libc::c_long {
        // SAFETY: the directory is open.
        unsafe { libc::telldir(self.0) }
    }

    fn seek(&mut self, position: libc::c_long) {
        // SAFETY: the directory is open and the position is from `tell` on it.
        unsafe { libc::seekdir(self.0, position) }
    }

    fn rewind(&mut self) {
        // SAFETY: the directory is open.
        unsafe { libc::rewinddir(self.0) }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // SAFETY: the directory is open and not used afterwards.
        unsafe { libc::closedir(self.0) };
    }
}

/// Replaces, deletes and inserts rows until told to stop; counts its transactions.
fn write(ledger: &Ledger, tree: &Path, stop: &AtomicBool, written: &AtomicU64) {
    let mut round = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        let statements: Vec<String> = (0..50)
            .map(|j| {
                let at = (round * 7919 + j * 20_011) % ROWS;
                let churning = at / CHURN * CHURN + 7;
                match j % 5 {
                    0 => format!("DELETE FROM big___rows WHERE name = '{}'", key(churning)),
                    1 => format!(
                        "REPLACE INTO big___rows (name, n) VALUES('{}', {round})",
                        key(churning)
                    ),
                    // Between two keys that stay.
                    2 => format!(
                        "REPLACE INTO big___rows (name, n) VALUES('{}x', {round})",
                        key(churning)
                    ),
                    3 => format!("DELETE FROM big___rows WHERE name = '{}x'", key(churning)),
                    _ if churns(at) => "DELETE FROM big___rows WHERE name = ''".into(),
                    _ => format!(
                        "REPLACE INTO big___rows (name, n) VALUES('{}', {round})",
                        key(at)
                    ),
                }
            })
            .collect();
        let seq = ledger.transaction(&statements);
        written.fetch_add(1, Ordering::Relaxed);
        // No further ahead of what is shown than that the listing meets the changes.
        wait_within(Duration::from_secs(60), "the writer goes on", || {
            shown(tree) + 2_000 > seq || stop.load(Ordering::Relaxed)
        });
    }
}

/// A listing taken while the table changes: what stays is listed once, all else at most once, in
/// the keys' order.
fn assert_complete(names: impl Iterator<Item = String>) -> u64 {
    let mut last = String::new();
    let mut expected = (0..ROWS).filter(|i| !churns(*i)).map(key);
    let mut next = expected.next();
    let mut count = 0;
    for name in names {
        assert!(last < name, "{name:?} is listed after {last:?}");
        count += 1;
        if next.as_ref() == Some(&name) {
            next = expected.next();
        } else {
            let number: u64 = name[1..9].parse().unwrap();
            assert!(churns(number), "{name:?} is listed instead of {next:?}");
        }
        last = name;
    }
    assert_eq!(next, None, "rows are missing from the listing");
    count
}

fn keys_are_listed_once_while_rows_change(daemon: &Daemon, place: &Place) {
    let stop = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    thread::scope(|scope| {
        let _end = EndOnDrop(&stop);
        let writer = scope.spawn(|| {
            write(
                &Ledger::open(&place.ledger()),
                daemon.mountpoint(),
                &stop,
                &written,
            )
        });
        let before = (shown(daemon.mountpoint()), written.load(Ordering::Relaxed));
        let directory = daemon.path("big/rows");
        let mut dir = Dir::open(&directory);
        let first = assert_complete(std::iter::from_fn(|| dir.next()));
        dir.rewind();
        let again = assert_complete(std::iter::from_fn(|| dir.next()));
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        let seen = shown(daemon.mountpoint()) - before.0;
        assert!(seen > 500, "only {seen} entries were shown meanwhile");
        println!(
            "listed {first} and {again} keys while {} transactions of 50 statements came and {seen} entries were shown",
            written.load(Ordering::Relaxed) - before.1,
        );
        wait_within(Duration::from_secs(60), "the tree has caught up", || {
            daemon.status()["behind"] == 0
        });
    });
}

fn positions_can_be_returned_to(daemon: &Daemon, directory: &str) {
    let directory = daemon.path(directory);
    let mut dir = Dir::open(&directory);
    let mut positions: BTreeMap<usize, libc::c_long> = BTreeMap::new();
    let mut names = Vec::new();
    loop {
        let i = names.len();
        if i % 9_973 == 0 || i < 40 || (i + 5) % 4096 < 10 {
            positions.insert(i, dir.tell());
        }
        match dir.next() {
            Some(name) => names.push(name),
            None => break,
        }
    }
    let end = dir.tell();
    // Forward, then backward, reading on a little past what one page holds.
    for (i, position) in positions.iter().chain(positions.iter().rev()) {
        dir.seek(*position);
        let run = if i % 9_973 == 0 { 1_500 } else { 3 };
        for expected in names.iter().skip(*i).take(run) {
            assert_eq!(dir.next().as_ref(), Some(expected), "behind position {i}");
        }
    }
    dir.seek(end);
    assert_eq!(dir.next(), None);
    dir.rewind();
    assert!(names.iter().all(|name| dir.next().as_ref() == Some(name)));
    assert_eq!(dir.next(), None);
}

fn composite_keys_are_listed(daemon: &Daemon) {
    let list = |path: &str| -> Vec<String> {
        let start = Instant::now();
        let mut dir = Dir::open(&daemon.path(path));
        let names: Vec<String> = std::iter::from_fn(|| dir.next()).collect();
        println!("{path}: {} names in {:.2?}", names.len(), start.elapsed());
        names
    };
    assert_eq!(list("big/wide"), ["only"]);
    let numbers = |names: Vec<String>| {
        names
            .iter()
            .map(|n| n.parse::<u64>().unwrap())
            .collect::<Vec<_>>()
    };
    let all: Vec<u64> = (0..PAIRS).collect();
    assert_eq!(numbers(list("big/wide/only")), all);
    assert_eq!(numbers(list("big/deep")), all);
    assert_eq!(list("big/deep/199999"), ["x"]);
    positions_can_be_returned_to(daemon, "big/wide/only");
    positions_can_be_returned_to(daemon, "big/deep");
}

fn listings_cost_about_as_much_as_a_disks(daemon: &Daemon, disk: &Path) {
    let tree = daemon.path("big/rows");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let (a, b) = (time_of_ls(&tree), time_of_ls(disk));
        // The first warms up both.
        if round > 0 {
            ours.push(a);
            theirs.push(b);
        }
    }
    let (ours, theirs) = (median(ours), median(theirs));
    let ratio = ours / theirs;
    println!(
        "ls -f of {ROWS} names: ctlfs {ours:.3} s, local disk {theirs:.3} s, ratio {ratio:.2}"
    );
    assert!(
        ratio <= COST,
        "a listing costs {ratio:.2} times one of the local disk"
    );
}

#[test]
fn large_tables_are_listed_completely_quickly_and_in_little_memory() {
    let place = Place::new();
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let start = Instant::now();
    let daemon = thread::scope(|scope| {
        scope.spawn(|| fill_disk(disk.path()));
        fill(&Ledger::create(&place));
        println!("filled the ledger after {:.1?}", start.elapsed());
        // The first catch-up is not what is looked at here: a second daemon lists.
        drop(Daemon::mount_within(Duration::from_secs(240), &place, &[]));
        println!("replayed it after {:.1?}", start.elapsed());
        Daemon::mount(&place, &[])
    });
    println!("filled the disk after {:.1?}", start.elapsed());

    listings_cost_about_as_much_as_a_disks(&daemon, disk.path());
    println!("timed after {:.1?}", start.elapsed());
    keys_are_listed_once_while_rows_change(&daemon, &place);
    println!("listed under changes after {:.1?}", start.elapsed());
    positions_can_be_returned_to(&daemon, "big/rows");
    println!("sought after {:.1?}", start.elapsed());
    composite_keys_are_listed(&daemon);
    let (now, peak) = (memory(&daemon, "VmRSS"), memory(&daemon, "VmHWM"));
    println!(
        "the daemon uses {now:.0} MiB, at most {peak:.0} MiB; all done after {:.1?}",
        start.elapsed()
    );
    assert!(peak < MEMORY_MIB, "the daemon used {peak:.0} MiB");
}
