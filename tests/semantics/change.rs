//! Section 6: change, as one process sees it.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;

use super::common::daemon::wait_until;
use super::common::ledger::{Tree, errno};
use super::{FLAGS, flag};

#[test]
fn an_open_file_never_changes() {
    let tree = Tree::new(
        &[],
        &[FLAGS, &flag("a", 1, "first"), &flag("b", 1, "first")],
    );
    let path = tree.path("app/flags/a/note");
    let json = "{\"name\":\"a\",\"enabled\":1,\"note\":\"first\"}\n";
    let content = |file: &mut File| {
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(file.metadata().unwrap().len(), text.len() as u64);
        text
    };
    // One that was read before the change, one that was not, and others of the row.
    let mut read = File::open(&path).unwrap();
    assert_eq!(content(&mut read), "first");
    let mut unread = File::open(tree.path("app/flags/b/note")).unwrap();
    let mut row = File::open(tree.path("app/flags/a/row.json")).unwrap();
    let mut seq = File::open(tree.path("app/flags/.seq")).unwrap();
    let mut schema = File::open(tree.path("app/flags/.schema.json")).unwrap();
    let before = content(&mut schema);
    let mut versions = Vec::new();
    for entries in [
        vec![flag("a", 1, "second, longer"), flag("b", 1, "2")],
        vec!["DELETE FROM app___flags WHERE name = 'a'".into()],
        vec![flag("a", 9, "again")],
        vec!["ALTER TABLE app___flags ADD COLUMN \"more\" TEXT".into()],
        vec!["DELETE FROM app___flags".into()],
        vec!["DROP TABLE IF EXISTS app___flags".into()],
    ] {
        tree.apply(&entries);
        versions.push(File::open(&path).ok());
        assert_eq!(content(&mut read), "first", "{entries:?}");
        assert_eq!(content(&mut unread), "first", "{entries:?}");
        assert_eq!(content(&mut row), json, "{entries:?}");
        assert_eq!(content(&mut seq), "3\n", "{entries:?}");
        assert_eq!(content(&mut schema), before, "{entries:?}");
        assert_eq!(read.metadata().unwrap().nlink(), 0);
    }
    let versions: Vec<Option<String>> = versions
        .iter_mut()
        .map(|file| file.as_mut().map(content))
        .collect();
    let expected = [
        Some("second, longer"),
        None,
        Some("again"),
        Some("again"),
        None,
        None,
    ];
    assert_eq!(versions, expected.map(|v| v.map(str::to_owned)));
}

#[test]
fn those_in_a_deleted_row_see_that_it_is_gone() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x")]);
    // Every way to hold a directory: open here, and as the working directory of a process.
    let directory = File::open(tree.path("app/flags/a")).unwrap();
    let open = |name: &str| {
        let name = CString::new(name).unwrap();
        // SAFETY: the name ends in a NUL and the directory is open.
        let fd = unsafe { libc::openat(directory.as_raw_fd(), name.as_ptr(), libc::O_RDONLY) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let mut file = unsafe { File::from_raw_fd(fd) };
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok(text)
    };
    assert_eq!(open("note").unwrap(), "x");
    let mut shell = std::process::Command::new("sh")
        .args([
            "-c",
            "read line; cat note; [ ! -e note ] && [ ! -e row.json ] && ! cat name",
        ])
        .current_dir(tree.path("app/flags/a"))
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    tree.apply(&["DELETE FROM app___flags WHERE name = 'a'"]);
    assert_eq!(errno(open("note")), libc::ENOENT);
    assert_eq!(errno(open("row.json")), libc::ENOENT);
    drop(shell.stdin.take());
    assert!(shell.wait().unwrap().success());
    // The row that takes its place is another directory.
    tree.apply(&[flag("a", 2, "y")]);
    assert_eq!(errno(open("note")), libc::ENOENT);
    assert_eq!(tree.read("app/flags/a/note"), b"y");
}

#[test]
fn superseded_versions_spill_to_the_state_directory() {
    // Five versions of 12 MiB: two fit into memory.
    const SIZE: usize = 12 << 20;
    let tree = Tree::new(&[], &[FLAGS]);
    let big = |letter: char| {
        format!(
            "REPLACE INTO app___flags (name, note) VALUES('a', replace(hex(zeroblob({})), '00', '{letter}{letter}'))",
            SIZE / 2
        )
    };
    let mut open = Vec::new();
    for letter in ['a', 'b', 'c', 'd', 'e'] {
        tree.apply(&[big(letter)]);
        open.push((letter, File::open(tree.path("app/flags/a/note")).unwrap()));
    }
    tree.apply(&[flag("a", 1, "small")]);
    let cache = || tree.daemon.status()["cache"].clone();
    let held = cache();
    assert!(
        held["spilled_bytes"].as_u64().unwrap() >= 3 * SIZE as u64,
        "{held}"
    );
    assert!(held["kept_bytes"].as_u64().unwrap() <= 32 << 20, "{held}");
    for (letter, file) in &mut open {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), SIZE);
        assert!(bytes.iter().all(|b| char::from(*b) == *letter));
    }
    drop(open);
    wait_until("nothing is kept any more", || {
        let cache = cache();
        cache["spilled_bytes"] == 0 && cache["kept_bytes"].as_u64().unwrap() < 1 << 20
    });
    // It had no name in the first place.
    let files: Vec<_> = fs::read_dir(tree.place.state())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| !name.to_string_lossy().starts_with("ldb.db") && name != "lock")
        .collect();
    assert!(files.is_empty(), "{files:?}");
}

#[test]
fn a_file_that_was_read_is_read_again_without_the_daemon() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x")]);
    let path = tree.path("app/flags/a/note");
    let counts = || tree.daemon.status()["requests"].clone();
    let of = |counts: &serde_json::Value, kind: &str| counts[kind].as_u64().unwrap_or(0);
    let read = || assert_eq!(fs::read(&path).unwrap(), b"x");
    // The first may be the one that teaches the kernel not to ask; the stat refreshes the atime.
    read();
    read();
    let before = counts();
    for _ in 0..100 {
        read();
    }
    let after = counts();
    for kind in ["open", "getattr"] {
        assert_eq!(of(&before, kind), of(&after, kind), "{kind}");
    }
    // Looking at the counts is a lookup of .ctlfs, one of the file, and a read or two of it.
    for kind in ["lookup", "read"] {
        assert!(
            of(&after, kind) <= of(&before, kind) + 3,
            "{kind}: {before} {after}"
        );
    }
}

#[test]
fn reads_go_on_without_the_ledger() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x"), &flag("b", 1, "y")]);
    assert_eq!(tree.read("app/flags/a/note"), b"x");
    fs::rename(tree.place.ledger(), tree.place.root().join("away")).unwrap();
    tree.daemon.wait_status("the origin is missed", |status| {
        status["problem"]["kind"] == "origin"
    });
    // Warm and cold.
    assert_eq!(tree.read("app/flags/a/note"), b"x");
    assert_eq!(tree.read("app/flags/b/note"), b"y");
    fs::rename(tree.place.root().join("away"), tree.place.ledger()).unwrap();
    tree.daemon
        .wait_status("it is there again", |status| status["problem"].is_null());
    tree.apply(&[flag("b", 1, "z")]);
    assert_eq!(tree.read("app/flags/b/note"), b"z");
}

#[test]
fn a_statement_that_fails_stops_the_reflector_and_not_the_tree() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x")]);
    let bad = tree
        .ledger
        .append(&["INSERT INTO app___missing VALUES('secret value')"]);
    tree.ledger.append(&[flag("a", 1, "after")]);
    tree.daemon
        .wait_status("it has stopped", |status| status["health"] == "error");
    let problem = tree.daemon.status()["problem"].clone();
    assert_eq!(
        (&problem["kind"], &problem["seq"]),
        (&"statement".into(), &bad.into())
    );
    assert!(!problem.to_string().contains("secret"), "{problem}");
    assert_eq!(tree.read("app/flags/a/note"), b"x");
    assert_eq!(tree.text(".ctlfs/seq"), "2\n");
    tree.ledger.run(&format!(
        "UPDATE ctlstore_dml_ledger SET statement = 'DELETE FROM app___flags WHERE 0' WHERE seq = {bad}"
    ));
    tree.daemon
        .wait_status("it goes on", |status| status["problem"].is_null());
    tree.wait_shown(bad + 1);
    assert_eq!(tree.read("app/flags/a/note"), b"after");
}
