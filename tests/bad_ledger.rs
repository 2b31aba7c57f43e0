//! Ledgers that cannot be followed: statements that fail or are refused, transactions without an
//! end, ledgers that were cut off or replaced, a full disk. The tree stays as it was, the status
//! says why, and the daemon goes on by itself once the cause is gone.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod common {
    pub mod central;
    pub mod daemon;
    pub mod ledger;
    pub mod mariadb;
}

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use common::central::{Place as Central, on_both};
use common::daemon::{Daemon, Place, ctlfs, stdout};
use common::ledger::{Ledger, Tree, names};
use serde_json::{Value as Json, json};

const TABLE: &str = "CREATE TABLE app___flags (\"name\" VARCHAR(191), \"enabled\" BIGINT, \
                     \"note\" MEDIUMTEXT, PRIMARY KEY(\"name\"))";
const ROW: &str =
    "REPLACE INTO app___flags (\"name\",\"enabled\",\"note\") VALUES('good',1,'as it was')";
/// What an operator puts in the place of a bad entry.
const NOTHING: &str = "DELETE FROM app___flags WHERE 0";
const SECRET: &str = "hunter2";

/// A change of the row's note.
fn note(text: &str) -> String {
    ROW.replace("as it was", text)
}

/// A tree that follows a ledger of either kind, and its log.
struct Followed<'a> {
    daemon: Daemon,
    central: &'a Central,
    log: PathBuf,
    _place: Place,
}

impl<'a> Followed<'a> {
    fn new(central: &'a Central) -> Self {
        central.executive().init().unwrap();
        let place = Place::new();
        append(central, TABLE);
        append(central, ROW);
        let url = match central {
            Central::Embedded(dir) => format!("sqlite://{}/ledger.db", dir.path().display()),
            Central::MySql(database) => database.url(),
        };
        let log = place.root().join("log");
        let extra = [
            "--poll-interval",
            "10ms",
            "--log-file",
            log.to_str().unwrap(),
        ];
        let daemon = Daemon::follow(&place, &url, &extra);
        Followed {
            daemon,
            central,
            log,
            _place: place,
        }
    }

    /// Appends an entry that the daemon must stop at; its sequence and the problem.
    #[track_caller]
    fn stops_at(&self, statement: &str, kind: &str) -> (u64, Json) {
        let seq = append(self.central, statement);
        // What comes after it waits.
        append(self.central, &note("behind it"));
        self.stopped_at(seq, kind)
    }

    #[track_caller]
    fn stopped_at(&self, seq: u64, kind: &str) -> (u64, Json) {
        self.daemon
            .wait_status("the daemon has stopped at the entry", |status| {
                status["problem"]["seq"] == seq
            });
        let problem = stopped(&self.daemon, kind, "");
        assert_eq!(self.daemon.seq(), seq - 1);
        (seq, problem)
    }

    /// Repairs the entry; the daemon then goes on by itself.
    fn repair(&self, seq: u64, statement: &str) {
        let statement = statement.replace('\'', "''");
        self.central.run(&format!(
            "UPDATE ctlstore_dml_ledger SET statement = '{statement}' WHERE seq = {seq}"
        ));
    }

    #[track_caller]
    fn goes_on(&self) {
        let last = last(self.central);
        self.daemon.wait_seq(last);
        healthy(&self.daemon);
        assert_eq!(read(&self.daemon), "behind it");
        let seq = append(self.central, ROW);
        self.daemon.wait_seq(seq);
    }
}

fn read(daemon: &Daemon) -> String {
    fs::read_to_string(daemon.path("app/flags/good/note")).unwrap()
}

/// The daemon has a problem of this kind, its tree is as it was, and it fails `ctlfs status`.
#[track_caller]
fn stopped(daemon: &Daemon, kind: &str, reason: &str) -> Json {
    daemon.wait_status(&format!("it has a problem of kind {kind}: {reason}"), |s| {
        let said = s["problem"]["reason"].as_str().unwrap_or_default();
        s["problem"]["kind"] == kind && said.contains(reason)
    });
    assert_eq!(read(daemon), "as it was");
    assert_eq!(names(daemon.path("app")), ["flags"]);
    let shown = ctlfs()
        .arg("status")
        .arg(daemon.mountpoint())
        .output()
        .unwrap();
    assert_eq!(shown.status.code(), Some(1), "{}", stdout(&shown));
    assert!(
        stdout(&shown).contains("health       error"),
        "{}",
        stdout(&shown)
    );
    let status = daemon.status();
    assert_eq!(status["health"], "error");
    assert!(status["problem"]["since"].is_string());
    status["problem"].clone()
}

#[track_caller]
fn healthy(daemon: &Daemon) {
    daemon.wait_status("it is well again", |status| {
        status["health"] == "ok" && status["problem"].is_null()
    });
    let shown = ctlfs()
        .arg("status")
        .arg(daemon.mountpoint())
        .output()
        .unwrap();
    assert_eq!(shown.status.code(), Some(0), "{}", stdout(&shown));
}

/// Appends an entry by hand, as an operator does; its sequence.
fn append(central: &Central, statement: &str) -> u64 {
    let statement = statement.replace('\'', "''");
    central.run(&format!(
        "INSERT INTO ctlstore_dml_ledger (statement) VALUES ('{statement}')"
    ));
    last(central)
}

fn last(central: &Central) -> u64 {
    central.entries().last().map_or(0, |entry| entry.seq.get())
}

#[test]
fn a_poison_statement_stops_the_tree_where_it_is_until_it_is_repaired() {
    on_both(|central| {
        let tree = Followed::new(central);
        for (poison, head, reason) in [
            (
                "REPLACE INTO app___missing (\"name\") VALUES('hunter2')",
                "REPLACE INTO app___missing",
                "no such table",
            ),
            (
                "INSERT INTO app___flags (\"name\",\"note\") VALUES('good','hunter2')",
                "INSERT INTO app___flags",
                "UNIQUE",
            ),
            (
                "REPLACE INTO app___flags (\"name\") VALUES('it's hunter2')",
                "REPLACE INTO app___flags",
                "syntax",
            ),
            (
                "REPLACE INTO app___flags (\"name\") VALUES(hunter2)",
                "REPLACE INTO app___flags",
                "no such column",
            ),
            (
                "REPLACE INTO app___flags (\"name\",\"enabled\") VALUES('hunter2",
                "REPLACE INTO app___flags",
                "",
            ),
            (
                "REPLACE INTO app___flags (\"nope\") VALUES('hunter2')",
                "REPLACE INTO app___flags",
                "nope",
            ),
            ("GIVE ME 'hunter2'", "GIVE ME", "syntax"),
        ] {
            let (seq, problem) = tree.stops_at(poison, "statement");
            let shown = problem["statement"].as_str().unwrap();
            assert!(shown.starts_with(head), "{shown}");
            assert!(
                problem["reason"].as_str().unwrap().contains(reason),
                "{problem}"
            );
            assert!(
                !tree.daemon.status().to_string().contains(SECRET),
                "{problem}"
            );
            tree.repair(seq, NOTHING);
            tree.goes_on();
        }
        // The right statement in its place is applied.
        let (seq, _) = tree.stops_at(
            "REPLACE INTO app___flagz (\"name\") VALUES('late')",
            "statement",
        );
        tree.repair(seq, "REPLACE INTO app___flags (\"name\") VALUES('late')");
        tree.goes_on();
        assert!(tree.daemon.path("app/flags/late").exists());
        let log = fs::read_to_string(&tree.log).unwrap();
        assert!(log.contains("cannot apply a ledger entry"), "{log}");
        assert!(!log.contains(SECRET), "{log}");
    });
}

#[test]
fn a_poison_statement_takes_its_transaction_with_it() {
    on_both(|central| {
        let tree = Followed::new(central);
        append(central, "--- BEGIN");
        append(central, &note("part of it"));
        let seq = append(central, "REPLACE INTO app___missing (\"name\") VALUES('x')");
        append(central, "--- COMMIT");
        append(central, &note("behind it"));
        tree.daemon
            .wait_status("it has stopped", |s| s["problem"]["seq"] == seq);
        stopped(&tree.daemon, "statement", "no such table");
        assert_eq!(tree.daemon.seq(), seq - 3);
        tree.repair(seq, NOTHING);
        tree.goes_on();
    });
}

#[test]
fn statements_that_reach_beyond_config_are_refused() {
    let central = Central::Embedded(tempfile::tempdir().unwrap());
    let tree = Followed::new(&central);
    let stolen = central_dir(&central).join("stolen.db");
    let attach = format!("ATTACH DATABASE '{}' AS x", stolen.display());
    let vacuum = format!("VACUUM INTO '{}'", stolen.display());
    for statement in [
        attach.as_str(),
        vacuum.as_str(),
        "DETACH DATABASE main",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA writable_schema = ON",
        "DROP TABLE _ldb_seq",
        "UPDATE _ldb_seq SET seq = 4711",
        "DELETE FROM _ctlfs_state",
        "REPLACE INTO app___flags (\"name\") SELECT sql FROM sqlite_schema",
        "CREATE TRIGGER t AFTER INSERT ON app___flags BEGIN DELETE FROM app___flags; END",
        "CREATE VIEW app___view AS SELECT 1",
        "CREATE TABLE other(a)",
        "SELECT load_extension('/tmp/x')",
        "REPLACE INTO app___flags (\"name\") VALUES(load_extension('/tmp/x'))",
        "VACUUM",
        "REINDEX",
        "ANALYZE",
        "BEGIN",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT a",
        "DELETE FROM sqlite_schema",
        "UPDATE sqlite_schema SET sql = ''",
        "DELETE FROM app___flags; DELETE FROM _ldb_seq",
        "DELETE FROM app___flags; COMMIT",
    ] {
        let seq = append(&central, statement);
        append(&central, &note("behind it"));
        tree.daemon
            .wait_status(&format!("it refuses {statement}"), |status| {
                assert!(status["seq"].as_u64() < Some(seq), "it took {statement}");
                status["problem"]["seq"] == seq
            });
        let problem = stopped(&tree.daemon, "statement", "");
        assert!(
            !problem["reason"].as_str().unwrap().is_empty(),
            "{statement}"
        );
        tree.repair(seq, NOTHING);
        tree.goes_on();
    }
    assert!(!stolen.exists());
}

fn central_dir(central: &Central) -> PathBuf {
    match central {
        Central::Embedded(dir) => dir.path().to_owned(),
        Central::MySql(_) => unreachable!(),
    }
}

#[test]
fn a_transaction_without_an_end_is_not_applied() {
    on_both(|central| {
        let tree = Followed::new(central);
        let begin = append(central, "--- BEGIN");
        append(central, &note("behind it"));
        let (_, problem) = tree.stopped_at(begin, "ledger");
        assert!(
            problem["reason"].as_str().unwrap().contains("has no end"),
            "{problem}"
        );
        append(central, "--- COMMIT");
        tree.goes_on();

        // One within the other.
        append(central, "--- BEGIN");
        append(central, &note("behind it"));
        let inner = append(central, "--- BEGIN");
        append(central, "--- COMMIT");
        tree.daemon
            .wait_status("it has stopped", |s| s["problem"]["seq"] == inner);
        stopped(&tree.daemon, "ledger", "within the one that began");
        tree.repair(inner, NOTHING);
        tree.goes_on();

        // An end without a beginning.
        let (seq, problem) = tree.stops_at("--- COMMIT", "ledger");
        assert!(
            problem["reason"]
                .as_str()
                .unwrap()
                .contains("did not begin"),
            "{problem}"
        );
        tree.repair(seq, NOTHING);
        tree.goes_on();
    });
}

#[test]
fn a_ledger_that_does_not_continue_is_refused() {
    on_both(|central| {
        let tree = Followed::new(central);
        let seq = append(central, ROW);
        tree.daemon.wait_seq(seq);
        let restore = |statement: &str, seq: u64| {
            let statement = statement.replace('\'', "''");
            central.run(&format!(
                "DELETE FROM ctlstore_dml_ledger WHERE seq = {seq}"
            ));
            central.run(&format!(
                "INSERT INTO ctlstore_dml_ledger (seq, statement) VALUES ({seq}, '{statement}')"
            ));
        };
        // Restored to an older state.
        central.run(&format!(
            "DELETE FROM ctlstore_dml_ledger WHERE seq >= {seq}"
        ));
        stopped(
            &tree.daemon,
            "ledger",
            &format!("no entry {seq} and none behind it"),
        );
        restore(ROW, seq);
        healthy(&tree.daemon);
        // Cut off beyond the position.
        central.run(&format!(
            "DELETE FROM ctlstore_dml_ledger WHERE seq >= {seq}"
        ));
        restore(&note("never shown"), seq + 5);
        stopped(
            &tree.daemon,
            "ledger",
            &format!("truncated beyond entry {seq}"),
        );
        central.run(&format!(
            "DELETE FROM ctlstore_dml_ledger WHERE seq > {seq}"
        ));
        restore(ROW, seq);
        healthy(&tree.daemon);
        // Another ledger at the same place.
        restore(&note("never shown"), seq);
        stopped(&tree.daemon, "ledger", "another ledger");
        restore(ROW, seq);
        healthy(&tree.daemon);
        assert_eq!(tree.daemon.seq(), seq);

        // An entry that appears behind the position.
        restore(ROW, seq + 3);
        tree.daemon.wait_seq(seq + 3);
        healthy(&tree.daemon);
        restore(&note("never shown"), seq + 1);
        tree.daemon
            .wait_status("the late entry is seen", |s| s["late"] == json!([seq + 1]));
        let shown = ctlfs()
            .arg("status")
            .arg(tree.daemon.mountpoint())
            .output()
            .unwrap();
        assert_eq!(shown.status.code(), Some(1));
        assert!(
            stdout(&shown).contains("never applied"),
            "{}",
            stdout(&shown)
        );
        assert_eq!(read(&tree.daemon), "as it was");
        let log = fs::read_to_string(&tree.log).unwrap();
        assert!(log.contains("appeared behind the position"), "{log}");
    });
}

#[test]
fn another_file_in_the_ledgers_place_is_refused() {
    let tree = Tree::new(&[], &[TABLE, ROW]);
    let elsewhere = Place::new();
    let other = Ledger::create(&elsewhere);
    other.append(&[TABLE, &note("never shown"), ROW]);
    drop(other);
    // The old ledger goes away as a whole, with what SQLite keeps beside it.
    let away = |from: &str, to: &str| {
        for suffix in ["-wal", "-shm", ""] {
            let path = |name: &str| tree.place.root().join(format!("{name}{suffix}"));
            // Not each of them needs to be there.
            let _ = fs::rename(path(from), path(to));
        }
    };
    fs::copy(elsewhere.ledger(), tree.place.root().join("new.db")).unwrap();
    away("ledger.db", "kept.db");
    away("new.db", "ledger.db");
    stopped(&tree.daemon, "ledger", "another ledger");
    away("ledger.db", "new.db");
    away("kept.db", "ledger.db");
    healthy(&tree.daemon);
}

/// A small file system of memory on a directory, gone with this value.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&path).unwrap();
        let small = Small(path);
        small.options(options);
        small
    }

    fn options(&self, options: &str) {
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "none"])
            .arg(&self.0)
            .status()
            .unwrap();
        assert!(status.success(), "only root can mount a tmpfs");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        common::daemon::detach_all(&self.0);
    }
}

#[test]
fn a_full_disk_stops_the_tree_until_there_is_space() {
    let place = Place::new();
    let small = Small::mount(place.state(), "size=2m,mode=700");
    let ledger = Ledger::create(&place);
    ledger.append(&[TABLE, ROW]);
    let log = place.root().join("log");
    let daemon = Daemon::mount(&place, &["--log-file", log.to_str().unwrap()]);
    let value = "x".repeat(64 << 10);
    let rows: Vec<String> = (0..100)
        .map(|i| format!("REPLACE INTO app___flags (\"name\",\"note\") VALUES('row{i}','{value}')"))
        .collect();
    let last = ledger.append(&rows);
    let problem = stopped(&daemon, "storage", "no space is left");
    assert!(
        problem["reason"]
            .as_str()
            .unwrap()
            .contains("free some space"),
        "{problem}"
    );
    assert!(daemon.seq() < last);
    small.options("remount,size=64m");
    daemon.wait_seq(last);
    healthy(&daemon);
    for i in 0..100 {
        let note = fs::read(daemon.path(format!("app/flags/row{i}/note"))).unwrap();
        assert_eq!(note.len(), value.len());
    }
    let log = fs::read_to_string(log).unwrap();
    assert!(
        log.contains("no space is left") && !log.contains("xxxx"),
        "{log}"
    );
}
