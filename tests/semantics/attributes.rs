//! Section 4: attributes.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::common::ledger::{Tree, errno};
use super::{FLAGS, flag};

/// Seconds and nanoseconds of mtime; ctime and atime are the same.
#[track_caller]
fn time(path: &Path) -> (i64, i64) {
    let meta = fs::metadata(path).unwrap();
    let mtime = (meta.mtime(), meta.mtime_nsec());
    assert_eq!(
        (meta.ctime(), meta.ctime_nsec()),
        mtime,
        "{}",
        path.display()
    );
    assert_eq!(
        (meta.atime(), meta.atime_nsec()),
        mtime,
        "{}",
        path.display()
    );
    mtime
}

#[test]
fn times_are_the_ledgers() {
    let tree = Tree::new(&[], &[FLAGS]);
    // 2020-01-01 and the days after it, UTC.
    const DAY: i64 = 86_400;
    const FIRST: i64 = 1_577_836_800;
    let at = |time: &str, entry: &str| {
        let seq = tree.ledger.append_at(Some(time), &[entry]);
        tree.wait_shown(seq);
    };
    let of = |path: &str| time(&tree.path(path));
    at("2020-01-01 00:00:00.125", &flag("a", 1, "x"));
    at("2020-01-02 00:00:00", &flag("b", 1, "x"));
    for path in ["a", "a/name", "a/enabled", "a/note", "a/row.json"] {
        assert_eq!(
            of(&format!("app/flags/{path}")),
            (FIRST, 125_000_000),
            "{path}"
        );
    }
    assert_eq!(of("app/flags/b/note"), (FIRST + DAY, 0));
    assert_eq!(of("app/flags"), (FIRST + DAY, 0));
    assert_eq!(of("app/flags/.seq"), (FIRST + DAY, 0));
    let family = of("app");

    // A change of any field is a change of the row.
    at("2020-01-03 00:00:00", &flag("a", 2, "x"));
    for path in [
        "a",
        "a/name",
        "a/enabled",
        "a/note",
        "a/row.json",
        ".seq",
        "",
    ] {
        assert_eq!(
            of(&format!("app/flags/{path}")),
            (FIRST + 2 * DAY, 0),
            "{path}"
        );
    }
    assert_eq!(of("app/flags/b/note"), (FIRST + DAY, 0));
    // Replacing a row by itself is none.
    at("2020-01-04 00:00:00", &flag("a", 2, "x"));
    assert_eq!(of("app/flags/a/enabled"), (FIRST + 2 * DAY, 0));
    assert_eq!(of("app/flags"), (FIRST + 2 * DAY, 0));
    // The set of tables.
    assert_eq!(of("app"), family);
    at(
        "2020-01-05 00:00:00",
        r#"CREATE TABLE app___more ("id" INTEGER, PRIMARY KEY("id"));"#,
    );
    assert_eq!(of("app"), (FIRST + 4 * DAY, 0));
    assert_eq!(of(""), (FIRST + 4 * DAY, 0));
}

#[test]
fn every_version_is_an_inode_of_its_own() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x")]);
    let meta = |path: &str| fs::metadata(tree.path(path)).unwrap();
    let path = "app/flags/a/enabled";
    let (enabled, note, json) = (
        meta(path),
        meta("app/flags/a/note"),
        meta("app/flags/a/row.json"),
    );
    let held = File::open(tree.path(path)).unwrap();
    for dir in ["", "app", "app/flags", "app/flags/a", ".ctlfs"] {
        assert_eq!(meta(dir).nlink(), 1, "{dir}");
    }
    assert_eq!(enabled.nlink(), 1);
    assert_eq!(enabled.blocks(), 1);
    tree.apply(&[flag("a", 2, "x")]);
    assert_ne!(meta(path).ino(), enabled.ino());
    assert_ne!(meta("app/flags/a/row.json").ino(), json.ino());
    assert_eq!(
        meta("app/flags/a/note").ino(),
        note.ino(),
        "the note has not changed"
    );
    assert_eq!(held.metadata().unwrap().ino(), enabled.ino());
    assert_eq!(held.metadata().unwrap().nlink(), 0);
    // Never again the number of a version that was there before.
    let mut seen = vec![enabled.ino()];
    for value in 3..40 {
        tree.apply(&[flag("a", value % 2, "x")]);
        let ino = meta(path).ino();
        assert!(!seen.contains(&ino));
        seen.push(ino);
    }
}

fn xattr(path: &Path, name: &str) -> std::io::Result<String> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let name = CString::new(name).unwrap();
    let mut value = vec![0_u8; 100];
    // SAFETY: the strings end in a NUL, and the buffer has the length that is given.
    let length = unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    match usize::try_from(length) {
        Ok(length) => Ok(String::from_utf8(value[..length].to_vec()).unwrap()),
        Err(_) => Err(std::io::Error::last_os_error()),
    }
}

fn xattrs(path: &Path) -> Vec<String> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut names = vec![0_u8; 1000];
    // SAFETY: the path ends in a NUL, and the buffer has the length that is given.
    let length = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let names = &names[..usize::try_from(length).unwrap()];
    names
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8(name.to_vec()).unwrap())
        .collect()
}

#[test]
fn attributes_tell_the_sequence_and_the_type() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x"), &flag("b", 1, "x")]);
    let seq = |path: &str| xattr(&tree.path(path), "user.ctlfs.seq");
    let ty = |path: &str| xattr(&tree.path(path), "user.ctlfs.type");
    for (path, sequence, kind) in [
        ("app/flags", Some("3"), None),
        ("app/flags/.seq", Some("3"), None),
        ("app/flags/a", Some("2"), None),
        ("app/flags/a/name", Some("2"), Some("string")),
        ("app/flags/a/enabled", Some("2"), Some("integer")),
        ("app/flags/b/note", Some("3"), Some("text")),
        ("app/flags/b/row.json", Some("3"), Some("json")),
        ("app", None, None),
        ("", None, None),
        (".ctlfs/seq", None, None),
    ] {
        assert_eq!(seq(path).ok().as_deref(), sequence, "{path}");
        assert_eq!(ty(path).ok().as_deref(), kind, "{path}");
        let mut listed = Vec::new();
        listed.extend(sequence.map(|_| "user.ctlfs.seq"));
        listed.extend(kind.map(|_| "user.ctlfs.type"));
        assert_eq!(xattrs(&tree.path(path)), listed, "{path}");
    }
    assert_eq!(
        errno(xattr(&tree.path("app/flags/a/note"), "user.other")),
        libc::ENODATA
    );
    let after = tree.apply(&[flag("a", 1, "y")]);
    assert_eq!(seq("app/flags/a/enabled").unwrap(), after.to_string());
    assert_eq!(seq("app/flags/b").unwrap(), "3");
}

#[test]
fn everything_that_would_change_the_tree_fails() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x")]);
    let row = tree.path("app/flags/a");
    let file = row.join("note");
    let elsewhere = tree.place.root().join("elsewhere");
    fs::write(&elsewhere, b"").unwrap();
    let read_only = |what: &str, result: std::io::Result<()>| {
        assert_eq!(errno(result), libc::EROFS, "{what}");
    };
    for directory in [
        tree.path(""),
        tree.path(".ctlfs"),
        tree.path("app"),
        tree.path("app/flags"),
        row.clone(),
    ] {
        read_only("create", File::create(directory.join("new")).map(drop));
        read_only("mkdir", fs::create_dir(directory.join("new")));
        read_only(
            "symlink",
            std::os::unix::fs::symlink("x", directory.join("new")),
        );
        read_only(
            "chmod",
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)),
        );
    }
    // Root may open a file for writing, whatever its mode; it is the write that fails.
    let writable = OpenOptions::new().write(true).open(&file).unwrap();
    read_only("write", (&writable).write_all(b"new"));
    let appending = OpenOptions::new().append(true).open(&file).unwrap();
    read_only("append", (&appending).write_all(b"new"));
    read_only(
        "truncate",
        OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(&file)
            .map(drop),
    );
    read_only("unlink", fs::remove_file(&file));
    read_only("rmdir", fs::remove_dir(&row));
    read_only("rename", fs::rename(&file, row.join("other")));
    read_only("replace", fs::rename(row.join("name"), &file));
    read_only("link", fs::hard_link(&file, row.join("other")));
    read_only(
        "chmod",
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)),
    );
    read_only("chown", std::os::unix::fs::chown(&file, Some(1), Some(1)));
    let opened = File::open(&file).unwrap();
    read_only(
        "utimes",
        opened.set_modified(SystemTime::now() - Duration::from_secs(9)),
    );
    let name = CString::new(file.as_os_str().as_bytes()).unwrap();
    // SAFETY: the strings end in a NUL, and the value has the length that is given.
    let set = unsafe {
        libc::setxattr(
            name.as_ptr(),
            c"user.x".as_ptr(),
            c"1".as_ptr().cast(),
            1,
            0,
        )
    };
    assert_eq!(
        (set, std::io::Error::last_os_error().raw_os_error()),
        (-1, Some(libc::EROFS))
    );
    // SAFETY: as above.
    let truncated = unsafe { libc::truncate(name.as_ptr(), 0) };
    assert_eq!(
        (truncated, std::io::Error::last_os_error().raw_os_error()),
        (-1, Some(libc::EROFS))
    );
    assert_eq!(fs::read(&file).unwrap(), b"x");
}
