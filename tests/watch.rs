//! `ctlfs watch` as it is run: what it tells of which change, that it misses none, and when its
//! commands run.
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

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::daemon::{
    DEADLINE, Daemon, EndOnDrop, Place, copy_program, ctlfs, run, stderr, wait_until,
};
use common::ledger::{Ledger, Tree};
use serde_json::{Value as Json, json};

const FLAGS: &str = r#"CREATE TABLE app___flags ("name" VARCHAR(191), "on" INTEGER, "note" TEXT, "raw" BLOB, PRIMARY KEY("name"));"#;
const LIMITS: &str = r#"CREATE TABLE app___limits ("id" INTEGER, "n" INTEGER, PRIMARY KEY("id"));"#;

fn flag(name: &str, on: u64, note: &str) -> String {
    format!(
        r#"REPLACE INTO app___flags ("name","on","note","raw") VALUES('{name}',{on},{note},NULL)"#
    )
}

fn limit(id: u64, n: u64) -> String {
    format!(r#"REPLACE INTO app___limits ("id","n") VALUES({id},{n})"#)
}

type Lines = Arc<Mutex<Vec<String>>>;

/// A running `ctlfs watch`; killed when this goes.
struct Watch {
    child: Child,
    out: Lines,
    err: Lines,
    readers: Vec<JoinHandle<()>>,
}

fn collect(from: impl Read + Send + 'static, into: &Lines) -> JoinHandle<()> {
    let into = Arc::clone(into);
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = String::new();
        while from.read_line(&mut line).is_ok_and(|n| n > 0) {
            // Who is killed may leave a part of one.
            if line.ends_with('\n') {
                into.lock().unwrap().push(line.trim_end().to_owned());
            }
            line.clear();
        }
    })
}

impl Watch {
    fn start<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        let mut command = ctlfs();
        command.arg("watch").args(args);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (out, err) = (Lines::default(), Lines::default());
        let readers = vec![
            collect(child.stdout.take().unwrap(), &out),
            collect(child.stderr.take().unwrap(), &err),
        ];
        Watch {
            child,
            out,
            err,
            readers,
        }
    }

    /// Starts one that remembers in `state`, and waits until it has begun.
    fn started(state: &Path, args: &[&OsStr]) -> Self {
        let watch = Self::start(
            [OsStr::new("--state"), state.as_os_str()]
                .iter()
                .chain(args),
        );
        wait_until("the watch has begun", || state.exists());
        watch
    }

    fn lines(&self) -> Vec<String> {
        self.out.lock().unwrap().clone()
    }

    fn json(&self) -> Vec<Json> {
        let parse = |line: String| serde_json::from_str(&line).expect(&line);
        self.lines().into_iter().map(parse).collect()
    }

    fn errors(&self) -> String {
        self.err.lock().unwrap().join("\n")
    }

    /// Waits for a line about the entry `seq`.
    fn wait_seq(&self, seq: u64) {
        wait_until(&format!("{seq} was told; {}", self.errors()), || {
            self.json().iter().any(|line| line["seq"] == seq)
        });
    }

    fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).unwrap();
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Waits for its end; the exit status, or `None` after a signal.
    fn wait(&mut self) -> Option<i32> {
        let mut status = None;
        wait_until("the watch has ended", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        status.unwrap().code()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn seqs(lines: &[Json]) -> Vec<u64> {
    lines.iter().map(|l| l["seq"].as_u64().unwrap()).collect()
}

/// A file of a test's own, with the lines in it.
fn lines_of(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn changes_are_told_with_old_and_new_values() {
    let tree = Tree::new(&[], &[FLAGS, LIMITS]);
    let state = tree.place.root().join("seen");
    let table = tree.path("app/flags");
    let watch = Watch::started(&state, &[OsStr::new("--json"), table.as_os_str()]);
    let created = tree.apply(&[flag("a", 1, "'x'")]);
    tree.apply(&[limit(1, 1)]);
    let updated = tree.apply(&[flag("a", 2, "NULL")]);
    let same = tree.apply(&[flag("a", 2, "NULL")]);
    let binary =
        tree.apply(&[r#"UPDATE app___flags SET "raw" = x'00ff', "on" = 9223372036854775807"#]);
    tree.ledger.transaction(&[
        flag("b", 1, "''"),
        limit(2, 2),
        r#"DELETE FROM app___flags WHERE "name" = 'a'"#.into(),
    ]);
    let deleted = same + 5;
    watch.wait_seq(deleted + 1);
    let lines = watch.json();
    assert_eq!(seqs(&lines), [created, updated, binary, deleted + 1]);
    let change = |line: &Json| line["tables"][0]["changes"].clone();
    assert_eq!(
        change(&lines[0]),
        json!([{"path":"a","key":["a"],"kind":"created",
                "new":{"name":"a","on":1,"note":"x","raw":null}}])
    );
    assert_eq!(
        change(&lines[1]),
        json!([{"path":"a","key":["a"],"kind":"updated",
                "old":{"on":1,"note":"x"},"new":{"on":2,"note":null}}])
    );
    assert_eq!(
        change(&lines[2]),
        json!([{"path":"a","key":["a"],"kind":"updated",
                "old":{"on":2,"raw":null},"new":{"on":9223372036854775807_i64,"raw":"AP8="}}])
    );
    let table = &lines[3]["tables"];
    assert_eq!(table.as_array().unwrap().len(), 1, "{table}");
    assert_eq!(
        (&table[0]["family"], &table[0]["table"]),
        (&json!("app"), &json!("flags"))
    );
    assert_eq!(
        change(&lines[3]),
        json!([
            {"path":"b","key":["b"],"kind":"created",
             "new":{"name":"b","on":1,"note":"","raw":null}},
            {"path":"a","key":["a"],"kind":"deleted",
             "old":{"name":"a","on":9223372036854775807_i64,"note":null,"raw":"AP8="}}
        ])
    );
    assert_eq!(watch.errors(), "");
}

#[test]
fn only_what_touches_the_path_is_told() {
    let tree = Tree::new(&[], &[FLAGS, LIMITS]);
    let state = tree.place.root().join("seen");
    // It need not exist yet.
    let field = tree.path("app/flags/a/note");
    let mut watch = Watch::started(&state, &[field.as_os_str()]);
    let first = tree.apply(&[flag("a", 1, "'x'")]);
    tree.apply(&[flag("a", 2, "'x'"), flag("b", 1, "'x'"), limit(1, 1)]);
    let last = tree.apply(&[flag("a", 2, "'y'")]);
    wait_until("both were told", || watch.lines().len() >= 2);
    watch.signal(libc::SIGTERM);
    assert_eq!(watch.wait(), Some(0));
    let lines = watch.lines();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].starts_with(&format!("{first} ")), "{lines:?}");
    assert!(lines[1].starts_with(&format!("{last} ")), "{lines:?}");
    assert!(
        lines[1].ends_with("Z app/flags/a: note \"x\" -> \"y\""),
        "{lines:?}"
    );
    // What happened elsewhere is behind it as well.
    assert!(
        fs::read_to_string(&state)
            .unwrap()
            .trim()
            .parse::<u64>()
            .unwrap()
            >= last
    );
}

#[test]
fn history_is_told_in_order_over_all_tables() {
    let tree = Tree::new(&[], &[FLAGS, LIMITS]);
    let first = tree.apply(&[flag("a", 1, "NULL")]);
    tree.apply(&[limit(1, 1), flag("a", 2, "NULL"), limit(1, 2)]);
    let last = tree
        .ledger
        .transaction(&[limit(2, 1), flag("a", 3, "NULL")]);
    tree.wait_shown(last);
    let since = first.to_string();
    let watch = Watch::start([
        OsStr::new("--json"),
        OsStr::new("--since"),
        OsStr::new(&since),
        tree.path("").as_os_str(),
    ]);
    watch.wait_seq(last);
    let lines = watch.json();
    assert_eq!(seqs(&lines), [first + 1, first + 2, first + 3, last]);
    assert_eq!(lines[3]["begin"], last - 3);
    assert_eq!(lines[3]["tables"].as_array().unwrap().len(), 2);
}

#[test]
fn tables_that_come_and_go_are_told() {
    let tree = Tree::new(&[], &[FLAGS]);
    let state = tree.place.root().join("seen");
    let family = tree.path("app");
    let watch = Watch::started(&state, &[OsStr::new("--json"), family.as_os_str()]);
    let created = tree.apply(&[LIMITS]);
    let filled = tree.apply(&[limit(1, 1)]);
    let altered = tree.apply(&["ALTER TABLE app___limits ADD COLUMN \"c\" TEXT"]);
    let cleared = tree.apply(&["DELETE FROM app___limits"]);
    watch.wait_seq(cleared);
    let dropped = tree.apply(&["DROP TABLE IF EXISTS app___limits"]);
    watch.wait_seq(dropped);
    let events: Vec<_> = watch
        .json()
        .iter()
        .map(|l| (l["seq"].as_u64().unwrap(), l["tables"][0]["events"].clone()))
        .collect();
    assert_eq!(
        events,
        [
            (created, json!(["created"])),
            (filled, Json::Null),
            (altered, json!(["altered"])),
            (cleared, json!(["cleared"])),
            (dropped, json!(["dropped"])),
        ]
    );
}

#[test]
fn history_that_is_gone_is_told_as_a_gap() {
    let place = Place::new();
    let ledger = Ledger::create(&place);
    ledger.append(&[LIMITS]);
    let rows: Vec<String> = (0..5_000).map(|i| limit(i, i)).collect();
    let last = ledger.append(&rows);
    let daemon = Daemon::mount(&place, &[]);
    daemon.wait_seq(last);
    let watch = Watch::start([
        OsStr::new("--json"),
        OsStr::new("--since"),
        OsStr::new("1"),
        daemon.path("app/limits").as_os_str(),
    ]);
    watch.wait_seq(last);
    let lines = watch.json();
    assert_eq!(lines[0]["gap"]["after"], 1);
    let floor = lines[0]["gap"]["to"].as_u64().unwrap();
    let rest: Vec<u64> = (floor + 1..=last).collect();
    assert_eq!(seqs(&lines[1..]), rest);
    assert!(rest.len() >= 200, "{}", rest.len());
}

/// Everything of a stream of transactions arrives, whatever is killed meanwhile: the daemon, the
/// watch, or both.
#[test]
fn nothing_is_missed_when_the_daemon_or_the_watch_is_killed() {
    let place = Place::new();
    let ledger = Ledger::create(&place);
    let start = ledger.append(&[FLAGS, LIMITS]);
    let mount = || Daemon::mount(&place, &[]);
    let mut daemon = Some(mount());
    let state = place.root().join("seen");
    let root = place.mountpoint();
    let begin = || Watch::started(&state, &[OsStr::new("--json"), root.as_os_str()]);
    let mut watch = begin();
    // As many may be written as the journal keeps: what is missed then is missed by a defect.
    let allowed = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (file, stop) = (place.ledger(), Arc::clone(&stop));
        let allowed = Arc::clone(&allowed);
        std::thread::spawn(move || {
            let ledger = Ledger::open(&file);
            let mut seqs = Vec::new();
            for i in 0.. {
                while i >= allowed.load(Ordering::Relaxed) && !stop.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                seqs.push(if i % 3 == 0 {
                    ledger.transaction(&[flag("a", i, "'x'"), limit(i % 7, i)])
                } else {
                    ledger.append(&[limit(i % 7, i)])
                });
            }
            seqs
        })
    };
    let _end = EndOnDrop(&stop);
    let mut told: Vec<u64> = Vec::new();
    let mut take = |watch: &Watch| {
        let lines = watch.json();
        assert!(lines.iter().all(|l| l["gap"].is_null()), "{lines:?}");
        let seqs = seqs(&lines);
        assert!(seqs.is_sorted_by(|a, b| a < b), "each run tells in order");
        told.extend(seqs);
    };
    for round in 0..6 {
        let before = watch.lines().len();
        allowed.fetch_add(600, Ordering::Relaxed);
        wait_until("changes arrive", || watch.lines().len() > before + 20);
        if round % 3 != 1 {
            daemon.as_ref().unwrap().signal(libc::SIGKILL);
            // Dropping it takes the dead mount away.
            daemon = None;
        }
        if round % 3 != 0 {
            watch.signal(libc::SIGKILL);
            watch.wait();
            take(&watch);
        }
        if daemon.is_none() {
            daemon = Some(mount());
        }
        if round % 3 != 0 {
            watch = begin();
        }
    }
    stop.store(true, Ordering::Relaxed);
    let written = writer.join().unwrap();
    watch.wait_seq(*written.last().unwrap());
    take(&watch);
    let unique: std::collections::BTreeSet<u64> = told.iter().copied().collect();
    let missing: Vec<_> = written
        .iter()
        .filter(|seq| **seq > start && !unique.contains(seq))
        .collect();
    assert!(missing.is_empty(), "never told: {missing:?}");
    assert_eq!(unique.len(), written.len(), "told what was not written");
    println!("{} transactions, {} deliveries", written.len(), told.len());
}

#[test]
fn a_watch_waits_for_its_mount_to_come_back() {
    let tree = Tree::new(&[], &[FLAGS]);
    let state = tree.place.root().join("seen");
    let root = tree.path("");
    let watch = Watch::started(&state, &[OsStr::new("--json"), root.as_os_str()]);
    let Tree {
        mut daemon,
        ledger,
        place,
    } = tree;
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
    drop(daemon);
    wait_until("it says that it waits", || {
        watch.errors().contains("waiting for ")
    });
    let seq = ledger.append(&[flag("a", 1, "NULL")]);
    let _daemon = Daemon::mount(&place, &[]);
    watch.wait_seq(seq);
    wait_until("it says so", || watch.errors().contains("is there again"));
    assert_eq!(watch.errors().matches("waiting for ").count(), 1);
}

#[test]
fn what_was_undone_again_while_the_daemon_was_away_is_told() {
    let tree = Tree::new(&[], &[FLAGS.to_owned(), flag("a", 1, "NULL")]);
    let state = tree.place.root().join("seen");
    let root = tree.path("");
    let watch = Watch::started(&state, &[OsStr::new("--json"), root.as_os_str()]);
    tree.read(".ctlfs/changes/app/flags.ndjson");
    let Tree {
        daemon,
        ledger,
        place,
    } = tree;
    drop(daemon);
    let undone = [
        ledger.append(&[flag("a", 2, "NULL")]),
        ledger.append(&[flag("a", 1, "NULL")]),
        ledger.append(&[flag("b", 1, "NULL")]),
        ledger.append(&[r#"DELETE FROM app___flags WHERE "name" = 'b'"#]),
    ];
    let _daemon = Daemon::mount(&place, &[]);
    watch.wait_seq(undone[3]);
    assert_eq!(seqs(&watch.json()), undone);
}

/// A command that says when it runs, and goes on while the file `hold` is there.
struct Job {
    dir: tempfile::TempDir,
}

impl Job {
    fn new() -> Self {
        Job {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self) -> String {
        format!(
            "cd {} || exit; mkdir busy || echo overlap >> overlaps\n\
             cat >> input; echo \"$CTLFS_SEQ\" >> runs; echo \"$CTLFS_PATHS\" >> paths\n\
             echo \"$CTLFS_ROOT\" > root\n\
             while [ -e hold ]; do sleep 0.01; done; rmdir busy",
            self.dir.path().display()
        )
    }

    fn told(&self) -> Vec<u64> {
        let lines = lines_of(&self.path("input"));
        let parse = |line: &String| serde_json::from_str::<Json>(line).unwrap();
        seqs(&lines.iter().map(parse).collect::<Vec<_>>())
    }

    fn runs(&self) -> Vec<u64> {
        let lines = lines_of(&self.path("runs"));
        lines.iter().map(|l| l.parse().unwrap()).collect()
    }
}

#[test]
fn commands_never_overlap_and_what_comes_meanwhile_is_given_to_the_next() {
    let tree = Tree::new(&[], &[LIMITS]);
    let state = tree.place.root().join("seen");
    let job = Job::new();
    fs::write(job.path("hold"), "").unwrap();
    let (command, table) = (job.command(), tree.path("app/limits"));
    let mut watch = Watch::started(
        &state,
        &[
            OsStr::new("--exec"),
            OsStr::new(&command),
            table.as_os_str(),
        ],
    );
    let first = tree.apply(&[limit(0, 0)]);
    wait_until("the command runs", || job.runs() == [first]);
    for i in 1..=30 {
        tree.apply(&[limit(i % 3, i)]);
    }
    let last = first + 30;
    assert_eq!(job.runs(), [first], "it runs once still");
    // Not delivered before the command has succeeded.
    assert!(
        fs::read_to_string(&state)
            .unwrap()
            .trim()
            .parse::<u64>()
            .unwrap()
            < first
    );
    fs::remove_file(job.path("hold")).unwrap();
    wait_until("the rest was delivered", || {
        job.told().last() == Some(&last) && !job.path("busy").exists()
    });
    watch.signal(libc::SIGTERM);
    assert_eq!(watch.wait(), Some(0));
    assert_eq!(job.told(), (first..=last).collect::<Vec<_>>());
    // The thirty came while the first ran: one more run, or a second one for the very last of them.
    assert!(job.runs().len() <= 3, "{:?}", job.runs());
    assert!(!job.path("overlaps").exists(), "two commands ran at once");
    let root = tree.place.mountpoint();
    let paths = lines_of(&job.path("paths"));
    assert_eq!(paths[0], format!("{}/app/limits/0", root.display()));
    assert!(
        paths.len() <= 1 + 3 * 2,
        "each path once in a run: {paths:?}"
    );
    assert_eq!(lines_of(&job.path("root")), [root.display().to_string()]);
    assert_eq!(fs::read_to_string(&state).unwrap(), format!("{last}\n"));
    assert!(watch.lines().is_empty());
}

#[test]
fn a_command_that_fails_is_run_again_with_what_came_since() {
    let tree = Tree::new(&[], &[LIMITS]);
    let state = tree.place.root().join("seen");
    let job = Job::new();
    let dir = job.dir.path().display();
    let command = format!("cat >> {dir}/input; echo run >> {dir}/runs; [ -e {dir}/good ]");
    let root = tree.path("");
    let watch = Watch::started(
        &state,
        &[OsStr::new("--exec"), OsStr::new(&command), root.as_os_str()],
    );
    let first = tree.apply(&[limit(0, 0)]);
    wait_until("the failure is told", || {
        watch.errors().contains("ended with exit status 1")
    });
    let second = tree.apply(&[limit(0, 1)]);
    fs::write(job.path("good"), "").unwrap();
    wait_until("both were delivered", || {
        fs::read_to_string(&state).unwrap() == format!("{second}\n")
    });
    // How often it failed before there was something new, depends.
    let mut told = job.told();
    assert!(told.iter().filter(|seq| **seq == first).count() >= 2);
    told.sort_unstable();
    told.dedup();
    assert_eq!(told, [first, second]);
}

#[test]
fn a_burst_is_delivered_together() {
    let tree = Tree::new(&[], &[LIMITS]);
    let state = tree.place.root().join("seen");
    let job = Job::new();
    let (command, root) = (job.command(), tree.path(""));
    let _watch = Watch::started(
        &state,
        &[
            OsStr::new("--debounce"),
            OsStr::new("2s"),
            OsStr::new("--exec"),
            OsStr::new(&command),
            root.as_os_str(),
        ],
    );
    let burst: Vec<String> = (0..10).map(|i| limit(0, i)).collect();
    let first = tree.apply(&burst) - 9;
    wait_until("it was delivered", || !job.runs().is_empty());
    assert_eq!(job.runs(), [first + 9]);
    assert_eq!(job.told(), (first..=first + 9).collect::<Vec<_>>());
}

#[test]
fn a_command_that_runs_gets_to_finish() {
    let tree = Tree::new(&[], &[LIMITS]);
    let state = tree.place.root().join("seen");
    let job = Job::new();
    fs::write(job.path("hold"), "").unwrap();
    let (command, root) = (job.command(), tree.path(""));
    let mut watch = Watch::started(
        &state,
        &[OsStr::new("--exec"), OsStr::new(&command), root.as_os_str()],
    );
    let seq = tree.apply(&[limit(0, 0)]);
    wait_until("the command runs", || job.runs() == [seq]);
    watch.signal(libc::SIGINT);
    fs::remove_file(job.path("hold")).unwrap();
    assert_eq!(watch.wait(), Some(0));
    assert!(!job.path("busy").exists(), "it was not let finish");
    assert_eq!(fs::read_to_string(&state).unwrap(), format!("{seq}\n"));
}

#[test]
fn a_signal_ends_a_command() {
    let tree = Tree::new(&[], &[LIMITS]);
    let state = tree.place.root().join("seen");
    let root = tree.path("");
    for (name, number) in [("TERM", libc::SIGTERM), ("INT", libc::SIGINT)] {
        let command = format!("kill -{name} $$; exec sleep 600");
        let _ = fs::remove_file(&state);
        let watch = Watch::started(
            &state,
            &[OsStr::new("--exec"), OsStr::new(&command), root.as_os_str()],
        );
        tree.apply(&[limit(0, u64::try_from(number).unwrap())]);
        wait_until("it ended by the signal", || {
            watch
                .errors()
                .contains(&format!("ended with signal {number}"))
        });
    }
}

#[test]
fn a_parent_that_ignores_its_children_is_no_hindrance() {
    let tree = Tree::new(&[], &[LIMITS]);
    let state = tree.place.root().join("seen");
    let mut command = ctlfs();
    command
        .args(["watch", "--exec", "true", "--state"])
        .args([state.as_os_str(), tree.path("").as_os_str()]);
    // SAFETY: signal is allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            Ok(())
        });
    }
    let watch = Watch::spawn(command);
    wait_until("the watch has begun", || state.exists());
    let seq = tree.apply(&[limit(0, 1)]);
    wait_until("it is delivered", || {
        fs::read_to_string(&state).unwrap() == format!("{seq}\n")
    });
    assert_eq!(watch.errors(), "");
}

#[test]
fn a_signal_ends_it_when_nobody_reads_its_output() {
    let tree = Tree::new(&[], &[FLAGS]);
    let note = format!("'{}'", "x".repeat(1_000));
    for number in 0..1_500 {
        tree.ledger.append(&[flag("a", number, &note)]);
    }
    let mut command = ctlfs();
    command
        .args(["watch", "--json", "--since", "0"])
        .arg(tree.path(""))
        .stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // More than a pipe holds is there to be written: once it is full, the writer waits.
    let pipe = child.stdout.take().unwrap();
    let mut watch = Watch {
        child,
        out: Lines::default(),
        err: Lines::default(),
        readers: Vec::new(),
    };
    let waiting = || {
        let mut bytes: libc::c_int = 0;
        // SAFETY: FIONREAD stores a number, for which there is room.
        let asked = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
        assert_eq!(asked, 0);
        bytes
    };
    wait_until("the pipe is full", || waiting() >= 50_000);
    watch.signal(libc::SIGTERM);
    assert_eq!(watch.wait(), Some(128 + libc::SIGTERM));
}

#[test]
fn a_process_is_signalled() {
    let tree = Tree::new(&[], &[LIMITS]);
    let state = tree.place.root().join("seen");
    let dir = tempfile::tempdir().unwrap();
    let (pid, got) = (dir.path().join("pid"), dir.path().join("got"));
    let script = format!(
        "trap 'echo got >> {got}' USR2; echo $$ > {pid}.new; mv {pid}.new {pid}\n\
         while :; do sleep 0.02; done",
        got = got.display(),
        pid = pid.display()
    );
    let child = Command::new("sh").args(["-c", &script]).spawn().unwrap();
    let _guard = Watch {
        child,
        out: Lines::default(),
        err: Lines::default(),
        readers: Vec::new(),
    };
    wait_until("the process is there", || pid.exists());
    let receiver = format!("{}:USR2", pid.display());
    let root = tree.path("");
    let _watch = Watch::started(
        &state,
        &[
            OsStr::new("--signal"),
            OsStr::new(&receiver),
            root.as_os_str(),
        ],
    );
    for i in 1..=3 {
        let seq = tree.apply(&[limit(0, i)]);
        wait_until("it got the signal", || {
            lines_of(&got).len() >= usize::try_from(i).unwrap()
        });
        wait_until("that was remembered", || {
            fs::read_to_string(&state).unwrap() == format!("{seq}\n")
        });
    }
    assert_eq!(lines_of(&got).len(), 3);
}

#[test]
fn paths_that_cannot_be_watched_are_refused() {
    let tree = Tree::new(&[], &[FLAGS]);
    let watch = |path: &Path| run([OsStr::new("watch"), path.as_os_str()]);
    let outside = watch(&tree.place.root());
    assert_eq!(outside.status.code(), Some(2));
    assert!(stderr(&outside).contains("it is in no ctlfs mount"));
    let own = watch(&tree.path(".ctlfs/seq"));
    assert_eq!(own.status.code(), Some(2));
    assert!(stderr(&own).contains("holds no config"), "{}", stderr(&own));
    assert_eq!(watch(&tree.path("No")).status.code(), Some(2));
    let state = tree.place.root().join("bad");
    fs::write(&state, "none\n").unwrap();
    let bad = run([
        OsStr::new("watch"),
        OsStr::new("--state"),
        state.as_os_str(),
        tree.path("").as_os_str(),
    ]);
    assert_eq!(bad.status.code(), Some(1));
    assert!(
        stderr(&bad).contains("holds no sequence"),
        "{}",
        stderr(&bad)
    );
}

#[test]
fn an_ldb_of_another_process_cannot_be_watched() {
    let tree = Tree::new(&[], &[FLAGS]);
    let other = Place::new();
    let mut command = ctlfs();
    command.args(["mount", "--foreground", "--state"]);
    command.arg(other.state()).arg("--ldb");
    command
        .arg(tree.place.state().join("ldb.db"))
        .arg(other.mountpoint());
    let daemon = Daemon::start(command, &other.mountpoint());
    let refused = run([OsStr::new("watch"), daemon.mountpoint().as_os_str()]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains("which another process writes"),
        "{}",
        stderr(&refused)
    );
}

#[test]
fn the_access_rules_hold_for_watchers() {
    let secrets = r#"CREATE TABLE secrets___keys ("name" VARCHAR(191), PRIMARY KEY("name"));"#;
    let tree = Tree::new(&["--access", "secrets/**=0400"], &[LIMITS, secrets]);
    fs::set_permissions(tree.place.root(), fs::Permissions::from_mode(0o755)).unwrap();
    // The program's own directory may be closed to other users.
    let program = tree.place.root().join("ctlfs");
    copy_program(&program);
    let as_nobody = |path: &Path| {
        let mut command = Command::new(&program);
        command
            .args(["watch", "--json", "--since", "0"])
            .arg(path)
            .stdin(Stdio::null())
            .uid(65_534)
            .gid(65_534);
        Watch::spawn(command)
    };
    let last = tree.apply(&[
        r#"REPLACE INTO secrets___keys ("name") VALUES('x')"#.to_owned(),
        limit(1, 1),
    ]);
    let mut named = as_nobody(&tree.path("secrets/keys"));
    assert_eq!(named.wait(), Some(1));
    assert!(
        named.errors().contains("Permission denied"),
        "{}",
        named.errors()
    );
    let all = as_nobody(&tree.path(""));
    all.wait_seq(last);
    let families: Vec<_> = all
        .json()
        .iter()
        .map(|l| l["tables"][0]["family"].clone())
        .collect();
    assert_eq!(families, ["app", "app"]);
    let notice = "not watching secrets: Permission denied";
    wait_until("it says so", || all.errors().contains(notice));
    assert_eq!(all.errors().matches(notice).count(), 1, "{}", all.errors());
}

/// How soon a change is told; the number is printed, and only held to what a loaded machine keeps.
#[test]
fn changes_are_told_soon() {
    let tree = Tree::new(&[], &[LIMITS]);
    let state = tree.place.root().join("seen");
    let table = tree.path("app/limits");
    let watch = Watch::started(&state, &[OsStr::new("--json"), table.as_os_str()]);
    let seq_file = tree.path("app/limits/.seq");
    let mut delays = Vec::new();
    for i in 0..100 {
        let seq = tree.ledger.append(&[limit(0, i)]);
        let text = format!("{seq}\n");
        let written = Instant::now();
        while fs::read_to_string(&seq_file).unwrap() != text {
            assert!(written.elapsed() < DEADLINE, "{seq} is not shown");
            std::thread::yield_now();
        }
        let shown = Instant::now();
        while watch.lines().len() <= usize::try_from(i).unwrap() {
            std::thread::yield_now();
            assert!(shown.elapsed() < DEADLINE, "{}", watch.errors());
        }
        delays.push(shown.elapsed());
    }
    delays.sort();
    println!(
        "visible to told: p50 {:?}, p99 {:?}",
        delays[50], delays[98]
    );
    assert!(delays[50] < Duration::from_millis(500), "{:?}", delays[50]);
}
