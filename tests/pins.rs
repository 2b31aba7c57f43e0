//! Pins: trees that stay as they were, `.ctlfs/at`, and `ctlfs with-snapshot`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod common {
    pub mod daemon;
    pub mod helper;
    pub mod ledger;
}

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, EndOnDrop, Place, ctlfs, stderr, stdout, wait_until, wait_within};
use common::helper::{self, Helper};
use common::ledger::{Ledger, Tree, errno, names};
use serde_json::json;
use sha2::{Digest, Sha256};

const FLAGS: &str = r#"CREATE TABLE app___flags ("name" VARCHAR(191), "enabled" INTEGER, "note" TEXT, PRIMARY KEY("name"));"#;

fn flag(name: &str, enabled: usize, note: &str) -> String {
    format!("REPLACE INTO app___flags VALUES('{name}',{enabled},'{note}')")
}

fn pin(tree: &Daemon, name: &str) -> PathBuf {
    let path = tree.path(".ctlfs/at").join(name);
    fs::create_dir(&path).unwrap();
    path
}

fn seq_of(path: &Path) -> u64 {
    let text = fs::read_to_string(path).unwrap();
    text.trim_end().parse().unwrap()
}

/// One number for everything in a directory but `.ctlfs`: names in the order of their listing,
/// kinds, lengths, times and bytes.
fn hash_of(root: &Path) -> String {
    fn walk(directory: &Path, hash: &mut Sha256, count: &mut usize) {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            if entry.file_name() == ".ctlfs" {
                continue;
            }
            let meta = fs::symlink_metadata(&path).unwrap();
            hash.update(entry.file_name().as_bytes());
            hash.update([0, u8::from(meta.is_dir())]);
            if meta.is_dir() {
                walk(&path, hash, count);
                continue;
            }
            hash.update(meta.len().to_le_bytes());
            hash.update(meta.mtime().to_le_bytes());
            hash.update(meta.mtime_nsec().to_le_bytes());
            hash.update(fs::read(&path).unwrap());
            *count += 1;
        }
        hash.update([1]);
    }
    let (mut hash, mut count) = (Sha256::new(), 0);
    walk(root, &mut hash, &mut count);
    let digest = hash.finalize();
    format!("{count} files {digest:x?}")
}

#[test]
fn a_pinned_tree_stays_as_it_was() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "old"), &flag("b", 2, "goes")]);
    // What is known of the tree must not stand in for the pin.
    let live = hash_of(tree.daemon.mountpoint());
    let at = pin(&tree.daemon, "one");
    assert_eq!(names(tree.path(".ctlfs/at")), ["one"]);
    let before = hash_of(&at);
    assert_eq!(before, live);
    assert_eq!(names(&at), ["app"]);
    tree.apply(&[
        flag("a", 1, "new"),
        "DELETE FROM app___flags WHERE \"name\" = 'b'".into(),
        flag("c", 3, "comes"),
        r#"CREATE TABLE other___things ("id" INTEGER, PRIMARY KEY("id"));"#.into(),
    ]);
    assert_eq!(fs::read(at.join("app/flags/a/note")).unwrap(), b"old");
    assert_eq!(tree.text("app/flags/a/note"), "new");
    assert_eq!(
        names(at.join("app/flags")),
        [".schema.json", ".seq", "a", "b"]
    );
    assert_eq!(seq_of(&at.join("app/flags/.seq")), 3);
    let absent = |path: &str| errno(fs::metadata(at.join(path)));
    for path in [
        "app/flags/c",
        "app/flags/c/note",
        "other",
        ".ctlfs",
        "app/none",
    ] {
        assert_eq!(absent(path), libc::ENOENT, "{path}");
    }
    // Not even its shape.
    tree.apply(&[r#"ALTER TABLE app___flags ADD COLUMN "more" TEXT"#]);
    assert_eq!(absent("app/flags/a/more"), libc::ENOENT);
    tree.apply(&["DROP TABLE app___flags"]);
    assert_eq!(errno(fs::metadata(tree.path("app"))), libc::ENOENT);
    assert_eq!(hash_of(&at), before);
    // A later pin is of later, beside it.
    let later = pin(&tree.daemon, "two");
    assert_eq!(names(&later), ["other"]);
    fs::remove_dir(&later).unwrap();
    assert_eq!(hash_of(&at), before);
    fs::remove_dir(&at).unwrap();
    assert_eq!(errno(fs::metadata(&at)), libc::ENOENT);
    assert_eq!(names(tree.path(".ctlfs/at")), [""; 0]);
    // The name is free for another, of now.
    let again = pin(&tree.daemon, "one");
    assert_eq!(names(&again), ["other"]);
    // Pins are not written in, and nothing else is made or removed.
    for path in [
        again.join("x"),
        again.join("other/x"),
        tree.path("x"),
        tree.path(".ctlfs/x"),
        tree.path(".ctlfs/export/x"),
    ] {
        assert_eq!(errno(fs::create_dir(&path)), libc::EROFS, "{path:?}");
    }
    assert_eq!(errno(fs::remove_dir(again.join("other"))), libc::EROFS);
    assert_eq!(errno(fs::remove_dir(tree.path("other"))), libc::EROFS);
    assert_eq!(errno(fs::write(tree.path(".ctlfs/at/x"), "")), libc::EROFS);
}

#[test]
fn names_of_pins_are_ordinary_names_and_there_are_not_too_many() {
    let tree = Tree::new(&[], &[FLAGS]);
    let at = tree.path(".ctlfs/at");
    pin(&tree.daemon, "a");
    assert_eq!(errno(fs::create_dir(at.join("a"))), libc::EEXIST);
    assert_eq!(errno(fs::create_dir(at.join(".a"))), libc::EINVAL);
    assert_eq!(errno(fs::remove_dir(at.join("b"))), libc::ENOENT);
    fs::create_dir(at.join("x".repeat(255))).unwrap();
    let long = errno(fs::create_dir(at.join("x".repeat(256))));
    assert_eq!(long, libc::ENAMETOOLONG);
    fs::create_dir(at.join("größe 🦀")).unwrap();
    let mut made = 3;
    let refused = loop {
        match fs::create_dir(at.join(format!("n{made}"))) {
            Ok(()) => made += 1,
            Err(error) => break error.raw_os_error().unwrap(),
        }
        assert!(made < 1000);
    };
    assert_eq!(refused, libc::ENOSPC);
    assert_eq!(names(&at).len(), made);
    let status = tree.daemon.status();
    assert_eq!(status["pins"].as_array().unwrap().len(), made);
    assert_eq!(status["pins"][0]["name"], "a");
    assert_eq!(status["pins"][0]["seq"], 1);
    assert_eq!(status["pins"][0]["dropped"], false);
    fs::remove_dir(at.join("a")).unwrap();
    pin(&tree.daemon, "b");
}

#[test]
fn files_of_a_dropped_pin_are_stale_or_as_they_were() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "old"), &flag("b", 1, "unread")]);
    let at = pin(&tree.daemon, "one");
    let read = File::open(at.join("app/flags/a/note")).unwrap();
    let mut bytes = [0; 3];
    read.read_exact_at(&mut bytes, 0).unwrap();
    let unread = File::open(at.join("app/flags/b/note")).unwrap();
    tree.apply(&[flag("a", 1, "new"), flag("b", 1, "changed")]);
    fs::remove_dir(&at).unwrap();
    match read.read_at(&mut bytes, 0) {
        Ok(count) => assert_eq!(&bytes[..count], b"old"),
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ESTALE)),
    }
    assert_eq!(errno((&unread).read(&mut [0; 10])), libc::ESTALE);
}

/// One of the eight: hashes a pinned tree again and again.
#[test]
#[ignore = "a process of another test"]
fn hashing_process() {
    let Some(job) = helper::job() else { return };
    let root = PathBuf::from(job["root"].as_str().unwrap());
    let first = hash_of(&root);
    for _ in 1..job["times"].as_u64().unwrap() {
        assert_eq!(hash_of(&root), first);
    }
    helper::answer(&json!(first));
}

#[test]
fn eight_processes_see_one_pinned_tree_under_full_write_load() {
    const ROWS: usize = 10_000;
    let place = Place::new();
    let ledger = Ledger::create(&place);
    let mut statements = vec![FLAGS.to_owned()];
    statements.extend((0..ROWS).map(|i| flag(&format!("row{i:05}"), i, &format!("note {i}"))));
    ledger.append(&statements);
    // However long the machine takes.
    let bounds = ["--pin-max-age", "2h", "--pin-max-space", "64GiB"];
    let daemon = Daemon::mount_within(Duration::from_secs(120), &place, &bounds);
    let done = AtomicBool::new(false);
    let (pinned, hash) = thread::scope(|scope| {
        let _end = EndOnDrop(&done);
        // Every row again and again, some going and coming.
        let writer = scope.spawn(|| {
            let ledger = Ledger::open(&place.ledger());
            let mut number = ROWS;
            while !done.load(Ordering::Relaxed) {
                let changes: Vec<String> = (0..100)
                    .flat_map(|i| {
                        number += 1;
                        let name = format!("row{:05}", (number * 7) % ROWS);
                        let gone = format!("DELETE FROM app___flags WHERE \"name\" = '{name}'");
                        let put = flag(&name, number, &format!("changed {number}"));
                        if i % 10 == 0 { vec![gone] } else { vec![put] }
                    })
                    .collect();
                let seq = ledger.transaction(&changes);
                // As fast as they are applied, but not faster.
                wait_within(Duration::from_secs(60), "the writes are applied", || {
                    daemon.seq() + 2000 > seq
                });
            }
        });
        let start = daemon.seq();
        wait_until("the load is on", || daemon.seq() > start + 500);
        let at = pin(&daemon, "hashed");
        let status = daemon.status();
        let pinned = status["pins"][0]["seq"].as_u64().unwrap();
        let helpers: Vec<Helper> = (0..8)
            .map(|_| Helper::start("hashing_process", &json!({"root": at, "times": 3})))
            .collect();
        let hashes: Vec<String> = helpers
            .into_iter()
            .map(|h| h.finish().as_str().unwrap().to_owned())
            .collect();
        assert!(hashes.iter().all(|h| *h == hashes[0]), "{hashes:?}");
        // A listing of the tree as it is now is another one.
        let shown = daemon.seq();
        assert!(shown > pinned + 1000, "{pinned} {shown}: there was no load");
        done.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        fs::remove_dir(&at).unwrap();
        (pinned, hashes[0].clone())
    });
    // The ledger up to that sequence, replayed by itself.
    let other = Place::new();
    let file = other.ledger();
    Ledger::open(&place.ledger()).run(&format!("VACUUM INTO '{}'", file.display()));
    let copy = Ledger::open(&other.ledger());
    copy.run(&format!(
        "DELETE FROM ctlstore_dml_ledger WHERE seq > {pinned}"
    ));
    let replayed = Daemon::mount_within(Duration::from_secs(120), &other, &[]);
    wait_until("the copy is replayed", || replayed.seq() == pinned);
    assert_eq!(hash_of(replayed.mountpoint()), hash);
}

#[test]
fn a_pin_is_dropped_for_its_age() {
    let tree = Tree::new(
        &["--pin-max-age", "2s"],
        &[FLAGS, &flag("a", 1, "old"), &flag("b", 1, "unread")],
    );
    let made = Instant::now();
    let at = pin(&tree.daemon, "old");
    assert_eq!(fs::read(at.join("app/flags/a/note")).unwrap(), b"old");
    // Not there, and remembered so.
    assert_eq!(errno(fs::metadata(at.join("none"))), libc::ENOENT);
    let open = File::open(at.join("app/flags/b/note")).unwrap();
    let directory = File::open(at.join("app/flags")).unwrap();
    tree.apply(&[flag("a", 1, "new"), flag("b", 1, "changed")]);
    tree.daemon
        .wait_status("the pin is dropped", |s| s["pins"][0]["dropped"] == true);
    assert!(made.elapsed() >= Duration::from_secs(2));
    wait_until("what the kernel holds of it is gone", || {
        fs::metadata(at.join("app")).is_err()
    });
    for path in [
        "app",
        "app/flags",
        "app/flags/a/note",
        "app/flags/b",
        "none",
    ] {
        assert_eq!(errno(fs::metadata(at.join(path))), libc::ESTALE, "{path}");
    }
    assert_eq!(errno(fs::read_dir(&at)), libc::ESTALE);
    assert_eq!(errno((&open).read(&mut [0; 10])), libc::ESTALE);
    drop(directory);
    // Its directory stays until somebody removes it, and keeps its name.
    assert!(fs::metadata(&at).unwrap().is_dir());
    assert_eq!(errno(fs::create_dir(&at)), libc::EEXIST);
    fs::remove_dir(&at).unwrap();
    let again = pin(&tree.daemon, "old");
    assert_eq!(fs::read(again.join("app/flags/a/note")).unwrap(), b"new");
}

#[test]
fn pins_are_dropped_for_the_space_they_hold_back() {
    let tree = Tree::new(
        &["--pin-max-space", "24MiB"],
        &[FLAGS, &flag("a", 1, "old"), &flag("b", 1, "unread")],
    );
    let wal = || {
        fs::metadata(tree.place.state().join("ldb.db-wal"))
            .unwrap()
            .len()
    };
    let at = pin(&tree.daemon, "large");
    let other = pin(&tree.daemon, "larger");
    let note = "x".repeat(1 << 20);
    let read = || fs::read(at.join("app/flags/a/note"));
    let mut rounds = 0;
    let mut most = 0;
    loop {
        rounds += 1;
        assert!(rounds < 500, "the pin was never dropped");
        tree.apply(&[flag("a", rounds, &note), flag("b", rounds, "changed")]);
        let status = tree.daemon.status();
        most = most.max(status["pins_held_bytes"].as_u64().unwrap());
        match read() {
            Ok(bytes) => assert_eq!(bytes, b"old"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
                break;
            }
        }
    }
    println!("dropped after {rounds} MiB of changes; {most} bytes were reported as held back");
    assert!(rounds > 10 && most > 8 << 20);
    assert_eq!(
        errno(fs::metadata(at.join("app/flags/b/note"))),
        libc::ESTALE
    );
    assert_eq!(errno(fs::metadata(other.join("app"))), libc::ESTALE);
    // What they held back is given back, without another change.
    wait_until("the log is small again", || wal() < 8 << 20);
    tree.daemon
        .wait_status("nothing is held back", |s| s["pins_held_bytes"] == 0);
    assert_eq!(tree.text("app/flags/b/note"), "changed");
    for path in [at, other] {
        fs::remove_dir(path).unwrap();
    }
}

#[test]
fn a_pin_does_not_slow_commits() {
    let mut statements = vec![FLAGS.to_owned()];
    statements.extend((0..1000).map(|i| flag(&format!("row{i:05}"), i, &"x".repeat(100))));
    let tree = Tree::new(&[], &statements);
    let note = "y".repeat(100_000);
    let load = |rounds: usize| {
        let begun = Instant::now();
        for round in 0..rounds {
            tree.apply(&[flag("row00001", round, &note)]);
        }
        begun.elapsed() / u32::try_from(rounds).unwrap()
    };
    load(50);
    let free = load(200);
    let at = pin(&tree.daemon, "held");
    // Far beyond where the writer waits for readers when there is no pin.
    load(800);
    let wal = fs::metadata(tree.place.state().join("ldb.db-wal"))
        .unwrap()
        .len();
    assert!(wal > 70 << 20, "{wal}");
    let held = load(200);
    println!(
        "a change of 100 KB is shown after {free:?}, with a pin that holds {wal} bytes {held:?}"
    );
    // Waiting for the pin would take 200 ms each time.
    assert!(
        held < free * 3 + Duration::from_millis(100),
        "{held:?} {free:?}"
    );
    fs::remove_dir(&at).unwrap();
    wait_until("the log is small again", || {
        fs::metadata(tree.place.state().join("ldb.db-wal"))
            .unwrap()
            .len()
            < 8 << 20
    });
}

#[test]
fn who_may_pin_follows_the_access_rules() {
    const STRANGER: u32 = 54_321;
    const READERS: u32 = 54_322;
    let can = |user: u32, group: u32, script: &str, path: &Path| {
        let mut command = Command::new("setpriv");
        command.args([
            format!("--reuid={user}"),
            format!("--regid={group}"),
            "--clear-groups".into(),
        ]);
        command.args(["sh", "-c", script, "sh"]).arg(path);
        command.stderr(Stdio::null()).status().unwrap().success()
    };
    let secrets =
        r#"CREATE TABLE secrets___keys ("name" VARCHAR(191), "value" TEXT, PRIMARY KEY("name"));"#;
    let mount = |rules: &[&str]| {
        let entries = [
            FLAGS,
            &flag("a", 1, "open"),
            secrets,
            "INSERT INTO secrets___keys VALUES('a', 'hidden')",
        ];
        let tree = Tree::new(rules, &entries);
        fs::set_permissions(tree.place.root(), Permissions::from_mode(0o755)).unwrap();
        tree
    };
    let rule = format!("secrets/**=0440:root:{READERS}");
    let tree = mount(&["--access", &rule]);
    let at = tree.path(".ctlfs/at");
    let mode = |path: &Path| {
        let meta = fs::metadata(path).unwrap();
        (meta.mode() & 0o7777, meta.uid(), meta.gid())
    };
    assert_eq!(mode(&at), (0o1777, 0, 0));
    let mine = at.join("mine");
    assert!(can(STRANGER, STRANGER, "mkdir \"$1\"", &mine));
    assert_eq!(mode(&mine), (0o555, STRANGER, STRANGER));
    assert_eq!(tree.daemon.status()["pins"][0]["uid"], STRANGER);
    // Inside, the rules of the tree.
    assert!(can(
        STRANGER,
        STRANGER,
        "cat \"$1\"",
        &mine.join("app/flags/a/note")
    ));
    let secret = mine.join("secrets/keys/a/value");
    assert_eq!(fs::read(&secret).unwrap(), b"hidden");
    assert!(!can(STRANGER, STRANGER, "cat \"$1\"", &secret));
    assert!(can(STRANGER, READERS, "cat \"$1\"", &secret));
    // Who made it may drop it, and root.
    let other = at.join("other");
    assert!(can(STRANGER + 7, READERS, "mkdir \"$1\"", &other));
    assert!(!can(STRANGER + 7, READERS, "rmdir \"$1\"", &mine));
    assert!(can(STRANGER, STRANGER, "rmdir \"$1\"", &mine));
    fs::remove_dir(&other).unwrap();

    let closed = mount(&["--access", &format!(".ctlfs=0440:root:{READERS}")]);
    let at = closed.path(".ctlfs/at");
    assert_eq!(mode(&at), (0o1770, 0, READERS));
    assert!(!can(STRANGER, STRANGER, "mkdir \"$1\"", &at.join("a")));
    assert!(can(STRANGER, READERS, "mkdir \"$1\"", &at.join("a")));

    let read_only = mount(&["-o", "ro"]);
    let made = fs::create_dir(read_only.path(".ctlfs/at/a"));
    assert_eq!(errno(made), libc::EROFS);
}

#[test]
fn with_snapshot_runs_a_command_on_a_pin_and_drops_it() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "value")]);
    let run = |command: &[&str]| {
        ctlfs()
            .arg("with-snapshot")
            .arg(tree.daemon.mountpoint())
            .arg("--")
            .args(command)
            .output()
            .unwrap()
    };
    let pins = || names(tree.path(".ctlfs/at")).len();
    let output = run(&[
        "sh",
        "-c",
        "cat \"$CTLFS_ROOT/app/flags/a/note\"; ls -d \"$CTLFS_ROOT\"",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let root = tree.path(".ctlfs/at/with-snapshot-");
    assert!(
        stdout(&output).starts_with(&format!("value{}", root.display())),
        "{}",
        stdout(&output)
    );
    assert_eq!(pins(), 0);
    assert_eq!(run(&["sh", "-c", "exit 7"]).status.code(), Some(7));
    assert_eq!(run(&["sh", "-c", "kill -KILL $$"]).status.code(), Some(137));
    let output = run(&["/no/such/program"]);
    assert_eq!(output.status.code(), Some(127));
    assert!(
        stderr(&output).contains("/no/such/program"),
        "{}",
        stderr(&output)
    );
    assert_eq!(run(&["/"]).status.code(), Some(126));
    assert_eq!(pins(), 0);
    let output = ctlfs()
        .arg("with-snapshot")
        .args([tree.place.root().as_os_str(), "true".as_ref()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("not a ctlfs mount"),
        "{}",
        stderr(&output)
    );
    assert_eq!(
        ctlfs()
            .arg("with-snapshot")
            .arg("/")
            .output()
            .unwrap()
            .status
            .code(),
        Some(2)
    );
}

#[test]
fn with_snapshot_passes_signals_on_and_drops_its_pin() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "value")]);
    let pins = || names(tree.path(".ctlfs/at")).len();
    let started = tree.place.root().join("started");
    // The command says when it runs; the one that cleans up ends with a status of its own.
    let cleans_up = "trap 'exit 9' TERM INT HUP; : >\"$1\"; while :; do sleep 0.05; done";
    let plain = ": >\"$1\"; exec sleep 1000";
    for (script, signal, code) in [
        (cleans_up, libc::SIGTERM, 9),
        (cleans_up, libc::SIGINT, 9),
        (cleans_up, libc::SIGHUP, 9),
        (plain, libc::SIGTERM, 128 + libc::SIGTERM),
    ] {
        let mut child = ctlfs()
            .arg("with-snapshot")
            .arg(tree.daemon.mountpoint())
            .args(["--", "sh", "-c", script, "sh"])
            .arg(&started)
            .spawn()
            .unwrap();
        wait_until("the command runs", || started.exists());
        assert_eq!(pins(), 1);
        let pid = i32::try_from(child.id()).unwrap();
        // SAFETY: kill takes no pointers; the process is our child and not yet waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
        let mut status = None;
        wait_until("it has ended", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        assert_eq!(status.unwrap().code(), Some(code), "{signal}");
        assert_eq!(pins(), 0);
        fs::remove_file(&started).unwrap();
    }
}

#[test]
fn an_ldb_of_another_process_can_be_pinned() {
    let place = Place::new();
    let file = place.root().join("ctlstore.db");
    let ldb = rusqlite::Connection::open(&file).unwrap();
    ldb.execute_batch(
        "PRAGMA journal_mode = WAL;
        CREATE TABLE _ldb_seq(id INTEGER PRIMARY KEY NOT NULL, seq BIGINT NOT NULL);
        CREATE TABLE _ldb_last_update(name STRING PRIMARY KEY NOT NULL, timestamp DATETIME NOT NULL);
        INSERT INTO _ldb_seq VALUES(1, 41);
        INSERT INTO _ldb_last_update VALUES('ledger', '2024-02-29 12:34:56+00:00');",
    )
    .unwrap();
    ldb.execute_batch(FLAGS).unwrap();
    ldb.execute_batch(&flag("a", 1, "old")).unwrap();
    let mut command = ctlfs();
    command
        .args(["mount", "--foreground", "--check-interval", "50ms", "--ldb"])
        .arg(&file)
        .arg("--state")
        .arg(place.state())
        .arg(place.mountpoint());
    let daemon = Daemon::start(command, &place.mountpoint());
    let at = pin(&daemon, "one");
    let before = hash_of(&at);
    // Without its sequence, as an operator writes.
    ldb.execute_batch(&flag("a", 1, "new")).unwrap();
    ldb.execute_batch("DROP TABLE IF EXISTS app___none")
        .unwrap();
    wait_until("the change is shown", || {
        fs::read(daemon.path("app/flags/a/note")).is_ok_and(|note| note == b"new")
    });
    assert_eq!(hash_of(&at), before);
    let later = pin(&daemon, "two");
    assert_eq!(fs::read(later.join("app/flags/a/note")).unwrap(), b"new");
    ldb.execute_batch("DROP TABLE app___flags").unwrap();
    assert_eq!(hash_of(&at), before);
    fs::remove_dir(&at).unwrap();
    fs::remove_dir(&later).unwrap();
}

#[test]
fn pins_made_and_dropped_under_load_are_never_older_than_what_was_seen() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 0, "x"), &flag("b", 0, "x")]);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _end = EndOnDrop(&done);
        let makers: Vec<_> = (0..4)
            .map(|i| {
                let (daemon, done) = (&tree.daemon, &done);
                scope.spawn(move || {
                    let mut made = 0;
                    let enabled =
                        |path: &Path| -> u64 { fs::read_to_string(path).unwrap().parse().unwrap() };
                    while !done.load(Ordering::Relaxed) {
                        let before = enabled(&daemon.path("app/flags/a/enabled"));
                        let at = pin(daemon, &format!("maker{i}"));
                        let a = enabled(&at.join("app/flags/a/enabled"));
                        let b = enabled(&at.join("app/flags/b/enabled"));
                        // Whoever has seen the pin sees nothing older in the tree.
                        let after = enabled(&daemon.path("app/flags/b/enabled"));
                        assert!(
                            before <= a && a == b && b <= after,
                            "{before} {a} {b} {after}"
                        );
                        fs::remove_dir(&at).unwrap();
                        made += 1;
                    }
                    made
                })
            })
            .collect();
        for number in 1..=400 {
            let seq = tree
                .ledger
                .transaction(&[flag("a", number, "y"), flag("b", number, "y")]);
            wait_until("it is shown", || tree.daemon.seq() >= seq);
        }
        done.store(true, Ordering::Relaxed);
        let made: BTreeMap<usize, u64> = makers
            .into_iter()
            .enumerate()
            .map(|(i, maker)| (i, maker.join().unwrap()))
            .collect();
        println!("pins made: {made:?}");
        assert!(made.values().all(|n| *n > 20), "{made:?}");
    });
    assert_eq!(tree.daemon.status()["pins"], json!([]));
}
