//! The flip: a transaction becomes visible as a whole, at once, to every process; and a descriptor
//! that is open stays on its version for ever.
//!
//! The readers are processes, and they read through paths.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::undocumented_unsafe_blocks,
    unreachable_pub
)]

mod common {
    pub mod central;
    pub mod daemon;
    pub mod helper;
    pub mod mariadb;
}

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::central::Place as Central;
use common::daemon::{Daemon, Place, wait_until, wait_within};
use common::helper::{self, Helper};
use common::mariadb;
use ctlfs::executive::{Executive, Mutation};
use ctlfs::model::{Field, FieldType, TableRef, TableSchema, Value};
use serde_json::{Value as Json, json};

const MIB: usize = 1 << 20;

/// Two tables with two fields that the readers look at, `number` and `padded`, and one whose value
/// never changes.
fn create(executive: &mut Executive, large: bool) {
    let field = |name: &str, ty| Field {
        name: name.parse().unwrap(),
        ty,
    };
    let number = if large {
        FieldType::Text
    } else {
        FieldType::Integer
    };
    executive.init().unwrap();
    executive.create_family(&"app".parse().unwrap()).unwrap();
    for table in ["app/alpha", "app/beta", "app/gamma"] {
        let schema = TableSchema::new(
            vec![
                field("name", FieldType::String),
                field("number", number),
                field("padded", FieldType::Text),
                field("constant", FieldType::Text),
            ],
            &["name".parse().unwrap()],
        )
        .unwrap();
        executive
            .create_table(&table.parse().unwrap(), &schema)
            .unwrap();
    }
}

fn upsert(table: &str, row: &str, number: Value, padded: String) -> Mutation {
    Mutation::Upsert {
        table: table.parse::<TableRef>().unwrap(),
        values: vec![
            ("name".parse().unwrap(), Value::text(row)),
            ("number".parse().unwrap(), number),
            ("padded".parse().unwrap(), Value::text(padded)),
            ("constant".parse().unwrap(), Value::text("as it was")),
        ],
    }
}

/// The number with a tail that makes the length another one each time.
fn padded(number: u64) -> String {
    format!("{number}{}", ".".repeat((number % 23) as usize))
}

/// One transaction: both fields of both rows become `number`, and so does the name of the only row
/// of a third table.
fn flip(executive: &mut Executive, number: u64) -> u64 {
    let value = || Value::Integer(number.try_into().unwrap());
    let mut mutations = vec![
        upsert("app/alpha", "left", value(), padded(number)),
        upsert("app/beta", "right", value(), padded(number)),
        upsert("app/gamma", &number.to_string(), value(), padded(number)),
    ];
    if number > 1 {
        mutations.push(Mutation::Delete {
            table: "app/gamma".parse::<TableRef>().unwrap(),
            key: vec![(
                "name".parse().unwrap(),
                Value::text((number - 1).to_string()),
            )],
        });
    }
    executive.mutate(&mutations).unwrap().seq.unwrap().get()
}

/// One transaction with a value of 1 MiB in each of the two tables.
fn flip_large(executive: &mut Executive, number: u64) -> u64 {
    let outcome = executive
        .mutate(&[
            upsert(
                "app/alpha",
                "left",
                Value::text(large(number)),
                padded(number),
            ),
            upsert(
                "app/beta",
                "right",
                Value::text(large(number)),
                padded(number),
            ),
        ])
        .unwrap();
    outcome.seq.unwrap().get()
}

fn large(number: u64) -> String {
    format!("{number:08}").repeat(MIB / 8)
}

/// Eight readers, a writer as fast as it can for `time`; at least `changes` seen.
fn flips_are_atomic(central: &Central, time: Duration) {
    let mut executive = central.executive();
    create(&mut executive, false);
    flip(&mut executive, 1);
    let place = Place::new();
    let daemon = Daemon::follow(&place, &origin(central), &["--poll-interval", "1ms"]);
    let stop = place.root().join("stop");
    let readers: Vec<Helper> = (0..8)
        .map(|number| {
            let ready = place.root().join(format!("ready{number}"));
            let helper = Helper::start(
                "reader_process",
                &json!({"tree": place.mountpoint(), "stop": &stop, "ready": &ready, "number": number}),
            );
            (helper, ready)
        })
        .collect::<Vec<_>>()
        .into_iter()
        .map(|(helper, ready)| {
            wait_until("a reader reads", || ready.exists());
            helper
        })
        .collect();
    let end = Instant::now() + time;
    let mut number = 1;
    let mut seq = 0;
    // On a busy machine, or with a slow server, as long as it takes to see enough.
    while Instant::now() < end || number < 500 {
        number += 1;
        seq = flip(&mut executive, number);
    }
    daemon.wait_seq(seq);
    File::create(&stop).unwrap();
    let mut sums = [0; 3];
    let mut violations = Vec::new();
    for reader in readers {
        let answer = reader.finish();
        for (sum, name) in sums.iter_mut().zip(["reads", "changes", "stats"]) {
            *sum += answer[name].as_u64().unwrap();
        }
        violations.extend(answer["violations"].as_array().unwrap().clone());
    }
    let [reads, changes, stats] = sums;
    println!(
        "{} flips, {reads} reads and {stats} stats by 8 processes, {changes} changes seen, {} violations",
        number - 1,
        violations.len()
    );
    assert!(violations.is_empty(), "{violations:#?}");
    assert!(changes >= 1000, "only {changes} changes were seen");
}

fn origin(central: &Central) -> String {
    match central {
        Central::Embedded(dir) => format!("sqlite://{}", dir.path().join("ledger.db").display()),
        Central::MySql(database) => database.url(),
    }
}

#[test]
fn a_transaction_is_seen_as_a_whole() {
    let central = Central::Embedded(tempfile::tempdir().unwrap());
    flips_are_atomic(&central, Duration::from_secs(10));
}

#[test]
fn a_transaction_in_mariadb_is_seen_as_a_whole() {
    let central = Central::MySql(mariadb::database());
    flips_are_atomic(&central, Duration::from_secs(5));
}

/// What one reader has seen so far.
#[derive(Default)]
struct Seen {
    last: u64,
    reads: u64,
    stats: u64,
    changes: u64,
    violations: Vec<String>,
    /// The number that each inode of each file had.
    inodes: HashMap<(usize, u64), u64>,
    /// The latest value of the sequence files.
    seqs: [u64; 3],
    time: Option<(i64, i64)>,
}

impl Seen {
    fn wrong(&mut self, what: String) {
        if self.violations.len() < 5 {
            self.violations.push(what);
        }
    }

    fn number(&mut self, file: &Path, number: u64) {
        self.reads += 1;
        if number < self.last {
            let last = self.last;
            self.wrong(format!("{}: {number} after {last}", file.display()));
        }
        if number > self.last {
            self.changes += 1;
        }
        self.last = number;
    }
}

/// Reads a number: the digits before the first '.', and before anything else for JSON.
fn number_in(bytes: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(bytes).ok()?;
    let digits = match text.strip_prefix('{') {
        Some(_) => text.split_once("\"number\":")?.1.split(',').next()?,
        None => text.trim_end_matches('.'),
    };
    digits.parse().ok()
}

#[test]
#[ignore = "a process of the other tests"]
fn reader_process() {
    let Some(job) = helper::job() else { return };
    let tree = PathBuf::from(job["tree"].as_str().unwrap());
    let stop = job["stop"].as_str().unwrap();
    let me = job["number"].as_u64().unwrap();
    let mut files: Vec<PathBuf> = ["alpha/left", "beta/right"]
        .iter()
        .flat_map(|row| ["number", "padded"].map(|f| tree.join("app").join(row).join(f)))
        .collect();
    if me % 4 == 3 {
        files.push(tree.join("app/alpha/left/row.json"));
        files.push(tree.join("app/beta/right/row.json"));
    }
    let seqs = ["app/alpha/.seq", "app/beta/.seq", ".ctlfs/seq"].map(|f| tree.join(f));
    let mut seen = Seen::default();
    let mut buffer = vec![0; 4096];
    let mut read = |file: &mut File| {
        let length = file.read(&mut buffer).unwrap();
        assert_eq!(file.read(&mut buffer[length..]).unwrap(), 0);
        buffer[..length].to_vec()
    };
    fs::write(job["ready"].as_str().unwrap(), "").unwrap();
    for round in 0_u64.. {
        let forward = (round + me).is_multiple_of(2);
        for step in 0..files.len() {
            let index = if forward {
                step
            } else {
                files.len() - 1 - step
            };
            let path = &files[index];
            let named = (me % 2 == 1).then(|| fs::metadata(path).unwrap());
            let mut file = File::open(path).unwrap();
            let bytes = read(&mut file);
            let Some(number) = number_in(&bytes) else {
                seen.wrong(format!("{}: {bytes:?}", path.display()));
                continue;
            };
            seen.number(path, number);
            let Some(named) = named else { continue };
            seen.stats += 1;
            let held = file.metadata().unwrap();
            if held.len() != bytes.len() as u64 {
                seen.wrong(format!(
                    "{}: {} bytes of {}",
                    path.display(),
                    bytes.len(),
                    held.len()
                ));
            }
            if named.ino() == held.ino() && named.len() != held.len() {
                seen.wrong(format!(
                    "{}: stat {} fstat {}",
                    path.display(),
                    named.len(),
                    held.len()
                ));
            }
            let before = *seen.inodes.entry((index, held.ino())).or_insert(number);
            if before != number {
                seen.wrong(format!(
                    "{}: inode {} was {before}, is {number}",
                    path.display(),
                    held.ino()
                ));
            }
        }
        if me % 4 == 2 {
            let gamma = tree.join("app/gamma");
            let mut rows: Vec<u64> = fs::read_dir(&gamma)
                .unwrap()
                .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
                .collect();
            if rows.is_empty() {
                seen.wrong("the only row is not listed".into());
            }
            // The kernel asks for more until there is none: that may be the next one.
            rows.sort_unstable();
            for number in rows {
                seen.number(&gamma, number);
            }
        }
        if me % 4 == 1 {
            for (index, path) in seqs.iter().enumerate() {
                let bytes = read(&mut File::open(path).unwrap());
                let seq: u64 = std::str::from_utf8(&bytes)
                    .unwrap()
                    .trim_end()
                    .parse()
                    .unwrap();
                let least = if index == 2 {
                    seen.seqs.iter().copied().max().unwrap()
                } else {
                    seen.seqs[index]
                };
                if seq < least {
                    seen.wrong(format!("{}: {seq} after {least}", path.display()));
                }
                seen.seqs[index] = seq;
            }
            // A file that has not changed lies in a row that has: its times are the row's.
            let times = ["number", "constant"].map(|file| {
                let meta = fs::metadata(tree.join("app/alpha/left").join(file)).unwrap();
                (meta.mtime(), meta.mtime_nsec())
            });
            if times[1] < times[0] || seen.time.is_some_and(|before| times[0] < before) {
                seen.wrong(format!("times went back: {:?} then {times:?}", seen.time));
            }
            seen.time = Some(times[1]);
        }
        if round % 16 == 0 && Path::new(stop).exists() {
            break;
        }
    }
    helper::answer(&json!({
        "reads": seen.reads, "changes": seen.changes, "stats": seen.stats,
        "violations": seen.violations,
    }));
}

/// Four readers of values of 1 MiB, two of which keep descriptors open over the flips.
fn large_values_are_never_torn(central: &Central, flips: u64) {
    let mut executive = central.executive();
    create(&mut executive, true);
    flip_large(&mut executive, 1);
    let place = Place::new();
    let daemon = Daemon::follow(&place, &origin(central), &["--poll-interval", "1ms"]);
    let stop = place.root().join("stop");
    let readers: Vec<Helper> = (0..4)
        .map(|number| {
            let ready = place.root().join(format!("ready{number}"));
            let job = json!({
                "tree": place.mountpoint(), "stop": &stop, "ready": &ready, "number": number,
                "hold": number % 2 == 1,
            });
            (Helper::start("large_reader_process", &job), ready)
        })
        .collect::<Vec<_>>()
        .into_iter()
        .map(|(helper, ready)| {
            wait_until("a reader reads", || ready.exists());
            helper
        })
        .collect();
    let mut seq = 0;
    for number in 2..flips + 2 {
        seq = flip_large(&mut executive, number);
        // The flips are many while the readers are slow: not all at once.
        wait_until("the tree follows", || daemon.seq() + 8 >= seq);
    }
    daemon.wait_seq(seq);
    File::create(&stop).unwrap();
    let mut reads = 0;
    let mut changes = 0;
    let mut held = 0;
    for reader in readers {
        let answer = reader.finish();
        reads += answer["reads"].as_u64().unwrap();
        changes += answer["changes"].as_u64().unwrap();
        held += answer["held"].as_u64().unwrap();
    }
    println!(
        "{flips} flips of 2 x 1 MiB, {reads} whole reads, {changes} changes seen, {held} versions held and read again"
    );
    assert!(changes >= 20 && held >= 10);
    // Nobody holds anything any more: what was kept for them goes, at the latest when a name that
    // was looked up during the last flip is asked for again.
    daemon.wait_status("nothing superseded is kept", |status| {
        let look = std::process::Command::new("find")
            .arg(daemon.path(""))
            .args(["-size", "+1", "-name", "nothing"])
            .status();
        assert!(look.unwrap().success());
        kept(status) < MIB as u64
    });
}

fn kept(status: &Json) -> u64 {
    let cache = &status["cache"];
    cache["kept_bytes"].as_u64().unwrap() + cache["spilled_bytes"].as_u64().unwrap()
}

#[test]
fn large_values_are_whole() {
    let central = Central::Embedded(tempfile::tempdir().unwrap());
    large_values_are_never_torn(&central, 60);
}

#[test]
fn large_values_from_mariadb_are_whole() {
    let central = Central::MySql(mariadb::database());
    large_values_are_never_torn(&central, 25);
}

/// A version that is held open.
struct Held {
    file: File,
    ino: u64,
    /// What was read of it at first; `None` if it was only opened.
    number: Option<u64>,
    /// The number last seen when it was opened.
    least: u64,
}

impl Held {
    /// Reads it again, long after.
    fn check(&self, last: u64) {
        let number = read_large(&self.file, MIB / 4);
        assert_eq!(number, self.number.unwrap_or(number));
        assert!(number >= self.least);
        assert_eq!(self.file.metadata().unwrap().ino(), self.ino);
        if number < last {
            let what = "a superseded version has no link";
            wait_within(Duration::from_secs(5), what, || {
                self.file.metadata().unwrap().nlink() == 0
            });
        }
    }
}

/// The number that all of a large value consists of.
fn whole(bytes: &[u8]) -> u64 {
    assert_eq!(bytes.len(), MIB);
    let first = &bytes[..8];
    if let Some(at) = bytes.chunks(8).position(|chunk| chunk != first) {
        panic!(
            "torn at {}: {:?} then {:?}",
            at * 8,
            String::from_utf8_lossy(first),
            String::from_utf8_lossy(&bytes[at * 8..][..8])
        );
    }
    std::str::from_utf8(first).unwrap().parse().unwrap()
}

fn read_large(file: &File, chunk: usize) -> u64 {
    let mut bytes = Vec::with_capacity(MIB);
    let mut buffer = vec![0; chunk];
    loop {
        let length = file.read_at(&mut buffer, bytes.len() as u64).unwrap();
        if length == 0 {
            return whole(&bytes);
        }
        bytes.extend_from_slice(&buffer[..length]);
    }
}

#[test]
#[ignore = "a process of the other tests"]
fn large_reader_process() {
    let Some(job) = helper::job() else { return };
    let tree = PathBuf::from(job["tree"].as_str().unwrap());
    let stop = Path::new(job["stop"].as_str().unwrap());
    let me = job["number"].as_u64().unwrap() as usize;
    let hold = job["hold"] == true;
    let files = ["alpha/left", "beta/right"].map(|row| tree.join("app").join(row).join("number"));
    let (mut reads, mut changes, mut held_again, mut last) = (0_u64, 0_u64, 0_u64, 0);
    let mut held: Vec<Held> = Vec::new();
    let mut inodes: HashMap<(usize, u64), u64> = HashMap::new();
    fs::write(job["ready"].as_str().unwrap(), "").unwrap();
    for round in me.. {
        let index = round % 2;
        let file = File::open(&files[index]).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!(meta.len(), MIB as u64);
        let ino = meta.ino();
        let new = !inodes.contains_key(&(index, ino));
        if hold && new && round % 5 == 0 {
            // Its first byte is read after it was superseded.
            held.push(Held {
                file,
                ino,
                number: None,
                least: last,
            });
            continue;
        }
        let number = read_large(&file, [4096, 65_536, 130_001, MIB][round / 2 % 4]);
        assert!(number >= last, "{number} after {last}");
        reads += 1;
        changes += u64::from(number > last);
        last = number;
        assert_eq!(*inodes.entry((index, ino)).or_insert(number), number);
        if hold && new {
            held.push(Held {
                file,
                ino,
                number: Some(number),
                least: number,
            });
        }
        let enough = stop.exists();
        if held.len() >= 12 || enough {
            for old in held.drain(..) {
                old.check(last);
                held_again += 1;
            }
        }
        if enough {
            break;
        }
    }
    helper::answer(&json!({"reads": reads, "changes": changes, "held": held_again}));
}
