//! The numbers of docs/PERFORMANCE.md, measured side by side in one run on one LDB of 1,000,000
//! rows. `cargo bench` prints the table; it needs root (or fusermount3), /dev/fuse, /dev/shm and
//! mariadbd (or CTLFS_TEST_MYSQL_URL). `cargo bench -- hot cold` measures only those parts.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(unreachable_pub)]
#[path = "../tests/common/mariadb.rs"]
mod mariadb;
#[allow(unreachable_pub)]
mod support;

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ctlfs::executive::Executive;
use ctlfs::ldb::LdbWriter;
use ctlfs::ledger::{self, Origin, OriginUrl};
use ctlfs::reflector::{Reflector, Settings, StopHandle};
use ctlfs::status::StatusBoard;
use rusqlite::Connection;
use support::{Daemon, Numbers, Sample};

/// Rows of the LDB.
const ROWS: u64 = 1_000_000;
/// Entries applied from MariaDB.
const MYSQL_ENTRIES: u64 = 300_000;
/// Bytes of the field that is read hot.
const HOT_BYTES: usize = 1024;
/// Rounds of hot reads, and reads of each kind in a round.
const HOT_ROUNDS: usize = 200;
const HOT_READS: usize = 200;
/// Random rows read for the first time.
const COLD_READS: u64 = 20_000;
/// Pins made, one after the other.
const PINS: usize = 500;
/// Changes announced, one after the other.
const ANNOUNCED: u64 = 1000;
/// Different files read before memory is looked at.
const MEMORY_FILES: u64 = 200_000;

fn main() {
    let parts: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    let scratch = tempfile::tempdir().unwrap();
    let state = scratch.path().join("state");
    let ledger_file = scratch.path().join("ledger.db");
    fill_embedded(&ledger_file);

    println!("| what | p50 | p99 |\n| --- | --- | --- |");
    let (entries, took) = replay(&ledger_file, &state);
    println!(
        "| apply from the embedded ledger, {entries} entries | {:.0} entries/s | |",
        entries as f64 / took.as_secs_f64()
    );
    if wanted("mysql") {
        apply_from_mariadb(scratch.path());
    }
    let origin = format!("sqlite://{}", ledger_file.display());
    let state_arg = state.to_str().unwrap().to_owned();
    let arguments = ["--origin", &origin, "--state", &state_arg];
    let mountpoint = scratch.path().join("ctl");
    let first = "bench/rows/k00500000/note";
    if wanted("mount") {
        mount_time(&mountpoint, &arguments, first);
    }
    let (daemon, _) = Daemon::mount(&mountpoint, &arguments, first);
    if wanted("hot") {
        hot(
            &daemon,
            scratch.path(),
            &[&arguments[..], &["-o", "plain_open"]].concat(),
        );
    }
    if wanted("cold") {
        cold(&daemon, &state.join("ldb.db"));
    }
    if wanted("pins") {
        pins(&daemon);
    }
    if wanted("announce") {
        announce(&daemon, &ledger_file);
    }
    if wanted("memory") {
        drop(daemon);
        memory(&Daemon::mount(&mountpoint, &arguments, first).0);
    }
}

/// A ledger with one entry for each row, written straight into its table: how it got there is not
/// what is measured.
fn fill_embedded(file: &Path) {
    let url: OriginUrl = format!("sqlite://{}", file.display()).parse().unwrap();
    Executive::open(&url).unwrap().init().unwrap();
    let ledger = Connection::open(file).unwrap();
    ledger
        .execute_batch(&format!(
            "BEGIN;
             INSERT INTO ctlstore_dml_ledger (statement) VALUES ('{CREATE}');
             WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS} - 1)
             INSERT INTO ctlstore_dml_ledger (statement)
             SELECT 'REPLACE INTO bench___rows (\"name\",\"enabled\",\"rollout\",\"note\") VALUES('
                 || '''k' || printf('%08d', i) || ''',' || (i % 2) || ',0.25,''note of row '
                 || i || ''')' FROM n;
             INSERT INTO ctlstore_dml_ledger (statement)
             SELECT 'REPLACE INTO bench___rows (\"name\",\"enabled\",\"rollout\",\"note\") '
                 || 'VALUES(''hot'',1,0.5,''' || '{note}' || ''')';
             COMMIT;",
            note = "x".repeat(HOT_BYTES),
        ))
        .unwrap();
}

const CREATE: &str = "CREATE TABLE bench___rows (\"name\" VARCHAR(191), \"enabled\" INTEGER, \
                      \"rollout\" REAL, \"note\" TEXT, PRIMARY KEY(\"name\"));";

fn catch_up(origin: Box<dyn Origin>, state: &Path) -> (u64, Duration) {
    std::fs::create_dir_all(state).unwrap();
    let writer = LdbWriter::open(&state.join("ldb.db")).unwrap();
    let board = Arc::new(StatusBoard::default());
    let mut reflector = Reflector::new(
        origin,
        writer,
        Box::new(()),
        Arc::clone(&board),
        Settings::default(),
    );
    let start = Instant::now();
    reflector.catch_up(&StopHandle::new()).unwrap();
    (board.progress().entries_applied, start.elapsed())
}

fn replay(ledger_file: &Path, state: &Path) -> (u64, Duration) {
    let url: OriginUrl = format!("sqlite://{}", ledger_file.display())
        .parse()
        .unwrap();
    let (entries, took) = catch_up(ledger::open(&url).unwrap(), state);
    assert_eq!(entries, ROWS + 2);
    (entries, took)
}

fn apply_from_mariadb(scratch: &Path) {
    let database = mariadb::database();
    let url: OriginUrl = database.url().parse().unwrap();
    Executive::open(&url).unwrap().init().unwrap();
    database.run(&format!(
        "INSERT INTO ctlstore_dml_ledger (statement) VALUES ('{CREATE}')"
    ));
    database.run(&format!(
        "INSERT INTO ctlstore_dml_ledger (statement) \
         SELECT CONCAT('REPLACE INTO bench___rows (\"name\",\"enabled\",\"rollout\",\"note\") VALUES(''k', \
         LPAD(seq, 8, '0'), ''',', seq % 2, ',0.25,''note of row ', seq, ''')') \
         FROM seq_1_to_{MYSQL_ENTRIES}"
    ));
    let (entries, took) = catch_up(ledger::open(&url).unwrap(), &scratch.join("mysql"));
    assert_eq!(entries, MYSQL_ENTRIES + 1);
    println!(
        "| apply from MariaDB, {entries} entries | {:.0} entries/s | |",
        entries as f64 / took.as_secs_f64()
    );
}

fn mount_time(mountpoint: &Path, arguments: &[&str], first: &str) {
    let mut times: Vec<Duration> = (0..9)
        .map(|_| Daemon::mount(mountpoint, arguments, first).1)
        .collect();
    times.sort();
    println!(
        "| mounting until the first read | {:.1} ms | {:.1} ms (worst of {}) |",
        times[times.len() / 2].as_secs_f64() * 1e3,
        times[times.len() - 1].as_secs_f64() * 1e3,
        times.len()
    );
}

fn open_read_close(path: &Path, buffer: &mut [u8]) -> usize {
    File::open(path).unwrap().read(buffer).unwrap()
}

/// Hot reads of the same bytes in four places, in turns, so that all meet the same machine.
fn hot(daemon: &Daemon, scratch: &Path, plain: &[&str]) {
    let ctlfs = daemon.mountpoint.join("bench/rows/hot/note");
    let bytes = std::fs::read(&ctlfs).unwrap();
    assert_eq!(bytes.len(), HOT_BYTES);
    // As deep as the tree, so that the walk costs the same.
    let copy = |root: &Path| {
        let directory = root.join("bench/rows/hot");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("note"), &bytes).unwrap();
        directory.join("note")
    };
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let plain_state = scratch.join("plain-state");
    std::fs::create_dir_all(&plain_state).unwrap();
    let plain_state = plain_state.to_str().unwrap().to_owned();
    let plain: Vec<&str> = plain
        .iter()
        .scan(false, |is_state, argument| {
            let value = if *is_state { &plain_state } else { *argument };
            *is_state = *argument == "--state";
            Some(value)
        })
        .collect();
    let ldb = Path::new(&plain_state).join("ldb.db");
    let source = scratch.join("state/ldb.db");
    Connection::open(&source)
        .unwrap()
        .execute("VACUUM INTO ?1", [ldb.to_str().unwrap()])
        .unwrap();
    let (plain_daemon, _) = Daemon::mount(&scratch.join("plain"), &plain, "bench/rows/hot/note");
    let places = [
        ("hot open+read+close, ctlfs", ctlfs),
        ("the same, ext4", copy(&scratch.join("ext4"))),
        ("the same, tmpfs", copy(shm.path())),
        (
            "the same, ordinary OPEN reply",
            plain_daemon.mountpoint.join("bench/rows/hot/note"),
        ),
    ];
    let mut samples = places.each_ref().map(|_| Sample::default());
    let mut buffer = [0; 2 * HOT_BYTES];
    for round in 0..=HOT_ROUNDS {
        for ((_, path), sample) in places.iter().zip(&mut samples) {
            for _ in 0..HOT_READS {
                let mut unused = Sample::default();
                // The first round warms up.
                let sample = if round == 0 {
                    &mut unused
                } else {
                    &mut *sample
                };
                let read = sample.time(|| open_read_close(path, &mut buffer));
                assert_eq!(read, HOT_BYTES);
            }
        }
    }
    for ((name, _), sample) in places.iter().zip(&mut samples) {
        println!("{}", sample.row(name));
    }
    let ratio = samples[0].quantile(0.5) / samples[1].quantile(0.5);
    println!("| hot ctlfs ÷ ext4 | {ratio:.2} | |");
}

/// Reads of random rows that nobody has read before, beside a SELECT of the same rows: first where
/// the scheduler puts reader and daemon, then with both on one processor. Where waking another
/// processor is dear, as in many virtual machines, that is most of the difference.
fn cold(daemon: &Daemon, ldb: &Path) {
    first_reads(daemon, ldb, 1, "first read ever of a random row's field");
    let everywhere = format!(
        "0-{}",
        std::thread::available_parallelism().unwrap().get() - 1
    );
    for process in [daemon.pid(), std::process::id()] {
        support::pin(process, "0");
    }
    first_reads(
        daemon,
        ldb,
        2,
        "the same, reader and daemon on one processor",
    );
    for process in [daemon.pid(), std::process::id()] {
        support::pin(process, &everywhere);
    }
}

fn first_reads(daemon: &Daemon, ldb: &Path, seed: u64, what: &str) {
    let mut numbers = Numbers(seed);
    let names: Vec<String> = (0..COLD_READS + COLD_READS / 10)
        .map(|_| format!("k{:08}", numbers.below(ROWS)))
        .collect();
    // The first tenth warms up.
    let (warm_up, measured) = names.split_at(names.len() / 11);
    let mut buffer = [0; 256];
    let mut read = |sample: &mut Sample, name: &String| {
        let row = daemon.mountpoint.join("bench/rows").join(name);
        let path = row.join("note");
        assert!(sample.time(|| open_read_close(&path, &mut buffer)) > 0);
    };
    let connection = Connection::open(ldb).unwrap();
    let mut select = connection
        .prepare("SELECT note FROM bench___rows WHERE name = ?1")
        .unwrap();
    let mut select = |sample: &mut Sample, name: &String| {
        let note: String = sample.time(|| select.query_row([name], |row| row.get(0)).unwrap());
        assert!(!note.is_empty());
    };
    let mut files = Sample::default();
    let mut selects = Sample::default();
    warm_up
        .iter()
        .for_each(|name| read(&mut Sample::default(), name));
    measured.iter().for_each(|name| read(&mut files, name));
    warm_up
        .iter()
        .for_each(|name| select(&mut Sample::default(), name));
    measured.iter().for_each(|name| select(&mut selects, name));
    println!("{}", files.row(what));
    println!("{}", selects.row("SELECT of the same rows, prepared"));
}

/// Making a pin, the first read of a random row in it, and removing it. Each is made when there is
/// no other, which it could share its snapshot with.
/// Changes one field of a row that is known to the kernel, again and again, and shows what the
/// daemon says of the time that announcing took: the field, `row.json` and the table's `.seq`.
fn announce(daemon: &Daemon, ledger_file: &Path) {
    let ledger = Connection::open(ledger_file).unwrap();
    ledger.execute_batch("PRAGMA synchronous = OFF").unwrap();
    let value = daemon.mountpoint.join("bench/rows/k00000007/enabled");
    let announced = |count: u64| {
        let start = Instant::now();
        loop {
            let status = daemon.status();
            if status["announce"]["entries"].as_u64().unwrap() >= count {
                return status["announce"].clone();
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{status}");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    std::fs::read(&value).unwrap();
    let before = daemon.status()["announce"]["entries"].as_u64().unwrap();
    for i in 1..=ANNOUNCED {
        ledger
            .execute(
                "INSERT INTO ctlstore_dml_ledger (statement) VALUES (?1)",
                [format!(
                    "UPDATE bench___rows SET \"enabled\" = {} WHERE \"name\" = 'k00000007'",
                    i + 1
                )],
            )
            .unwrap();
        announced(before + 3 * i);
    }
    let times = announced(before + 3 * ANNOUNCED);
    println!(
        "| announcing one changed field (with row.json and .seq) | {} ms | {} ms |",
        times["p50_ms"], times["p99_ms"]
    );
}

fn pins(daemon: &Daemon) {
    let mut numbers = Numbers(3);
    let mut buffer = [0; 256];
    let [mut made, mut read, mut removed] = [const { Sample::new() }; 3];
    for i in 0..PINS {
        let pin = daemon.mountpoint.join(format!(".ctlfs/at/bench{i}"));
        made.time(|| std::fs::create_dir(&pin).unwrap());
        let row = format!("bench/rows/k{:08}/note", numbers.below(ROWS));
        let path = pin.join(row);
        assert!(read.time(|| open_read_close(&path, &mut buffer)) > 0);
        removed.time(|| std::fs::remove_dir(&pin).unwrap());
    }
    println!("{}", made.row("making a pin"));
    println!(
        "{}",
        read.row("the first read in it, of a random row's field")
    );
    println!("{}", removed.row("removing it"));
}

/// What the daemon holds after reading many different files, each of a different row.
fn memory(daemon: &Daemon) {
    let mut buffer = [0; 256];
    for i in 0..MEMORY_FILES {
        let path = daemon
            .mountpoint
            .join(format!("bench/rows/k{:08}/note", i * 5));
        assert!(open_read_close(&path, &mut buffer) > 0);
    }
    println!(
        "| memory after reading {MEMORY_FILES} different files | {:.0} MiB resident ({:.0} MiB anonymous) | {} inodes |",
        daemon.memory("VmRSS"),
        daemon.memory("RssAnon"),
        daemon.status()["cache"]["nodes"]
    );
}
