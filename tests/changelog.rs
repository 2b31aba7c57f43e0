//! The change log file: its lines, its numbering over restarts and crashes, its rotation, and that
//! trouble with it holds nothing up.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::undocumented_unsafe_blocks,
    unreachable_pub
)]

mod common {
    pub mod daemon;
    pub mod ledger;
}

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::daemon::{Daemon, Place, detach_all, run, stderr, wait_until};
use common::ledger::Ledger;
use serde_json::{Value as Json, json};

const ITEMS: &str = r#"CREATE TABLE app___items ("id" INTEGER, "n" INTEGER, PRIMARY KEY("id"));"#;
const PAIRS: &str = r#"CREATE TABLE app___pairs ("raw" BLOB(255), "n" INTEGER, "name" VARCHAR(191), PRIMARY KEY("name","raw"));"#;

fn item(id: u64, n: u64) -> String {
    format!(r#"REPLACE INTO app___items ("id","n") VALUES({id},{n})"#)
}

/// A ledger, a change log, and the daemons that come and go on them.
struct Log {
    ledger: Ledger,
    place: Place,
    extra: Vec<&'static str>,
}

impl Log {
    fn new(extra: &[&'static str]) -> Self {
        let place = Place::new();
        Log {
            ledger: Ledger::create(&place),
            place,
            extra: extra.to_vec(),
        }
    }

    fn path(&self) -> PathBuf {
        self.place.root().join("changes.log")
    }

    fn older(&self) -> PathBuf {
        self.place.root().join("changes.log.1")
    }

    fn mount(&self) -> Daemon {
        self.mount_with(&self.path())
    }

    fn mount_with(&self, path: &Path) -> Daemon {
        let mut extra = vec!["--changelog", path.to_str().unwrap()];
        extra.extend(&self.extra);
        Daemon::mount(&self.place, &extra)
    }

    /// Appends entries and waits until the tree shows them.
    fn apply<S: AsRef<str>>(&self, daemon: &Daemon, statements: &[S]) -> u64 {
        let seq = self.ledger.append(statements);
        daemon.wait_seq(seq);
        seq
    }

    fn lines(&self) -> Vec<Json> {
        lines(&self.path())
    }

    /// Waits until it is remembered that the line `number` was written: who dies before that tells
    /// it again.
    fn wait_remembered(&self, number: u64) {
        let path = self.place.state().join("changelog");
        wait_until(&format!("line {number} is remembered"), || {
            let text = fs::read_to_string(&path).unwrap_or_default();
            text.trim_end().ends_with(&format!(" {number:020}"))
        });
    }

    /// Waits until the log holds so many lines.
    fn wait_lines(&self, count: usize) -> Vec<Json> {
        wait_until(&format!("there are {count} lines"), || {
            self.lines().len() >= count
        });
        self.lines()
    }
}

/// The whole lines of a file. While it is written, the last may be there in part.
fn lines(path: &Path) -> Vec<Json> {
    let text = fs::read(path).unwrap_or_default();
    let end = text
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |at| at + 1);
    let text = std::str::from_utf8(&text[..end]).unwrap();
    text.lines()
        .map(|l| serde_json::from_str(l).expect(l))
        .collect()
}

fn numbers(lines: &[Json]) -> Vec<u64> {
    lines.iter().map(|l| l["seq"].as_u64().unwrap()).collect()
}

/// The integer keys.
fn ids(lines: &[Json]) -> Vec<i64> {
    lines
        .iter()
        .map(|l| l["key"][0]["value"].as_i64().unwrap())
        .collect()
}

#[test]
fn each_changed_row_has_one_line_in_ctlstores_form() {
    let log = Log::new(&[]);
    log.ledger.append(&[ITEMS, PAIRS]);
    let daemon = log.mount();
    log.apply(&daemon, &[item(7, 1)]);
    // Replaced: one line.
    log.apply(&daemon, &[item(7, 2)]);
    // Replaced by itself: nothing has changed.
    log.apply(&daemon, &[item(7, 2)]);
    log.apply(
        &daemon,
        &[r#"REPLACE INTO app___pairs ("raw","n","name") VALUES(x'00ff',1,'it''s')"#],
    );
    log.apply(&daemon, &[r#"DELETE FROM app___items WHERE "id" = 7"#]);
    let lines = log.wait_lines(4);
    let seven = |seq: u64| {
        json!({"seq":seq,"family":"app","table":"items",
               "key":[{"name":"id","type":"INTEGER","value":7}]})
    };
    assert_eq!(
        lines,
        [
            seven(1),
            seven(2),
            // The key's fields in the table's order, as ctlstore has them.
            json!({"seq":3,"family":"app","table":"pairs","key":[
                {"name":"raw","type":"BLOB(255)","value":"AP8="},
                {"name":"name","type":"VARCHAR(191)","value":"it's"}]}),
            seven(4),
        ]
    );
    let text = fs::read_to_string(log.path()).unwrap();
    assert!(text.starts_with(
        "{\"seq\":1,\"family\":\"app\",\"table\":\"items\",\"key\":[{\"name\":\"id\","
    ));
    assert_eq!(fs::metadata(log.path()).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn the_numbering_goes_on_over_restarts_and_what_was_missed_is_written() {
    let log = Log::new(&[]);
    log.ledger.append(&[ITEMS]);
    let mut daemon = log.mount();
    log.apply(&daemon, &[item(1, 1)]);
    log.wait_lines(1);
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
    drop(daemon);
    // While no daemon runs, and while one runs without a change log.
    log.ledger.append(&[item(2, 1)]);
    let plain = Daemon::mount(&log.place, &[]);
    plain.wait_seq(log.ledger.append(&[item(3, 1)]));
    drop(plain);
    let daemon = log.mount();
    log.apply(&daemon, &[item(4, 1)]);
    let lines = log.wait_lines(4);
    assert_eq!(numbers(&lines), [1, 2, 3, 4]);
    assert_eq!(ids(&lines), [1, 2, 3, 4]);
}

#[test]
fn a_killed_daemon_leaves_whole_lines_and_misses_no_row() {
    let log = Log::new(&[]);
    log.ledger.append(&[ITEMS]);
    let mut changed = BTreeSet::new();
    for round in 0..8 {
        let daemon = log.mount();
        for i in 0..40 {
            let id = round * 100 + i;
            changed.insert(i64::try_from(id).unwrap());
            log.ledger
                .transaction(&[item(id, 1), item(round * 100, id)]);
        }
        wait_until("it is being written", || {
            fs::metadata(log.path()).is_ok_and(|m| m.len() > 200 * round)
        });
        daemon.signal(libc::SIGKILL);
    }
    let daemon = log.mount();
    log.apply(&daemon, &[item(9_999, 1)]);
    wait_until("the last was written", || {
        ids(&log.lines()).contains(&9_999)
    });
    let lines = log.lines();
    let count = u64::try_from(lines.len()).unwrap();
    assert_eq!(numbers(&lines), (1..=count).collect::<Vec<_>>());
    changed.insert(9_999);
    assert_eq!(ids(&lines).into_iter().collect::<BTreeSet<_>>(), changed);
}

#[test]
fn a_cut_line_is_removed_at_the_start() {
    let log = Log::new(&[]);
    log.ledger.append(&[ITEMS]);
    let daemon = log.mount();
    log.apply(&daemon, &[item(1, 1)]);
    log.wait_remembered(1);
    daemon.signal(libc::SIGKILL);
    drop(daemon);
    let mut text = fs::read_to_string(log.path()).unwrap();
    text.push_str("{\"seq\":2,\"fam");
    fs::write(log.path(), text).unwrap();
    let daemon = log.mount();
    log.apply(&daemon, &[item(2, 1)]);
    assert_eq!(ids(&log.wait_lines(2)), [1, 2]);
    assert_eq!(numbers(&log.lines()), [1, 2]);
}

#[test]
fn a_full_log_is_begun_anew_and_readers_can_finish_the_old_one() {
    let log = Log::new(&["--changelog-size", "2KiB"]);
    log.ledger.append(&[ITEMS]);
    let daemon = log.mount();
    log.apply(&daemon, &[item(0, 0)]);
    log.wait_lines(1);
    let mut read = Vec::new();
    let mut reader = BufReader::new(File::open(log.path()).unwrap());
    let mut drain = |read: &mut Vec<u64>, path: &Path| {
        let mut line = String::new();
        loop {
            line.clear();
            if reader.read_line(&mut line).unwrap() == 0 {
                let own = reader.get_ref().metadata().unwrap().ino();
                // For a moment there is none.
                match File::open(path) {
                    Ok(file) if file.metadata().unwrap().ino() != own => {
                        reader = BufReader::new(file);
                        continue;
                    }
                    _ => return,
                }
            }
            read.push(
                serde_json::from_str::<Json>(&line).unwrap()["seq"]
                    .as_u64()
                    .unwrap(),
            );
        }
    };
    for i in 1..=200 {
        log.apply(&daemon, &[item(i, i)]);
        wait_until("it was written", || {
            drain(&mut read, &log.path());
            read.last() == Some(&(i + 1))
        });
        for path in [log.path(), log.older()] {
            assert!(fs::metadata(path).map_or(0, |m| m.len()) <= 2048 + 1);
        }
    }
    assert_eq!(read, (1..=201).collect::<Vec<_>>());
    assert!(log.older().exists());
    log.wait_remembered(201);
    drop(daemon);
    // Also when the daemon starts anew the moment the file was begun.
    fs::write(log.path(), "").unwrap();
    let daemon = log.mount();
    log.apply(&daemon, &[item(1, 2)]);
    let next = numbers(&log.wait_lines(1))[0];
    assert_eq!(next, 202);
}

#[test]
fn rows_of_tables_that_are_cleared_dropped_or_altered_are_told() {
    let log = Log::new(&[]);
    let rows: Vec<String> = (0..2_500).map(|i| item(i, i)).collect();
    log.ledger.append(&[ITEMS]);
    log.ledger.transaction(&rows);
    let daemon = log.mount();
    let all: BTreeSet<i64> = (0..2_500).collect();
    let told = |from: usize| {
        ids(&log.lines()[from..])
            .into_iter()
            .collect::<BTreeSet<_>>()
    };
    let mut from = log.wait_lines(2_500).len();
    for statement in [
        "ALTER TABLE app___items ADD COLUMN \"c\" TEXT",
        "DELETE FROM app___items",
    ] {
        log.apply(&daemon, &[statement]);
        let count = log.wait_lines(from + 2_500).len();
        assert_eq!(count, from + 2_500, "{statement}");
        assert_eq!(told(from), all, "{statement}");
        from = count;
    }
    log.apply(&daemon, &[item(1, 1)]);
    from = log.wait_lines(from + 1).len();
    log.apply(&daemon, &["DROP TABLE IF EXISTS app___items"]);
    let lines = log.wait_lines(from + 1);
    assert_eq!(ids(&lines[from..]), [1]);
    let count = u64::try_from(lines.len()).unwrap();
    assert_eq!(numbers(&lines), (1..=count).collect::<Vec<_>>());
}

/// When rows went that nothing tells of any more, a number is skipped: by that ctlstore's readers
/// know that they have to drop everything.
#[test]
fn a_number_is_skipped_when_something_cannot_be_told() {
    let log = Log::new(&[]);
    log.ledger.append(&[ITEMS, PAIRS]);
    let daemon = log.mount();
    log.apply(&daemon, &[item(1, 1), item(2, 1)]);
    log.wait_remembered(2);
    drop(daemon);
    // More than the journal keeps, while nobody writes the log.
    log.ledger
        .append(&["DELETE FROM app___items WHERE \"id\" = 1"]);
    let rows: Vec<String> = (0..6_000).map(|i| item(2, i)).collect();
    let last = log.ledger.append(&rows);
    let plain = Daemon::mount(&log.place, &[]);
    plain.wait_seq(last);
    drop(plain);
    let _daemon = log.mount();
    let lines = log.wait_lines(3);
    assert_eq!(numbers(&lines), [1, 2, 4]);
    // Of the table that changed every row that is there, of the other none.
    assert_eq!(ids(&lines), [1, 2, 2]);
}

/// A file system of a few pages, unmounted at the end.
struct Small(PathBuf);

impl Small {
    fn new(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
            .arg(&path)
            .status()
            .unwrap();
        assert!(
            mounted.success(),
            "a tmpfs can be mounted: this test needs root"
        );
        Small(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        detach_all(&self.0);
    }
}

#[test]
fn a_full_disk_holds_up_nothing_and_is_caught_up_with() {
    let log = Log::new(&[]);
    log.ledger.append(&[ITEMS]);
    let small = Small::new(log.place.root().join("small"));
    let path = small.0.join("changes.log");
    let daemon = log.mount_with(&path);
    log.apply(&daemon, &[item(0, 0)]);
    wait_until("it is written", || lines(&path).len() == 1);
    let ballast = small.0.join("ballast");
    // As much as fits.
    let _ = fs::write(&ballast, vec![0; 1 << 20]);
    let rows: Vec<String> = (1..=400).map(|i| item(i, i)).collect();
    for rows in rows.chunks(50) {
        // The tree goes on.
        log.apply(&daemon, rows);
    }
    let stuck = lines(&path);
    assert!(stuck.len() < 200, "the disk was not full: {}", stuck.len());
    fs::remove_file(&ballast).unwrap();
    wait_until("the rest is written", || ids(&lines(&path)).contains(&400));
    let lines = lines(&path);
    let count = u64::try_from(lines.len()).unwrap();
    assert_eq!(numbers(&lines), (1..=count).collect::<Vec<_>>());
    assert_eq!(
        ids(&lines).into_iter().collect::<BTreeSet<_>>(),
        (0..=400).collect()
    );
    drop(daemon);
}

#[test]
fn a_change_log_that_cannot_be_written_is_refused_at_the_start() {
    let log = Log::new(&[]);
    log.ledger.append(&[ITEMS]);
    let place = &log.place;
    let mountpoint = place.mountpoint();
    let mount = |extra: &[&str]| {
        let origin = place.origin();
        let state = place.state();
        let mut args = vec!["mount", "--foreground", "--state", state.to_str().unwrap()];
        args.extend(extra);
        if !extra.contains(&"--ldb") {
            args.extend(["--origin", &origin]);
        }
        args.push(mountpoint.to_str().unwrap());
        run(args)
    };
    let refused = mount(&["--changelog", "/nowhere/changes.log"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = stderr(&refused);
    assert!(
        said.contains("cannot open the change log /nowhere/changes.log"),
        "{said}"
    );
    let refused = mount(&[
        "--ldb",
        "/nowhere/ldb.db",
        "--changelog",
        "/tmp/changes.log",
    ]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("--changelog goes with --origin"));
}
