//! Sections 1 to 3: files, and the names above them.

use std::fs;

use super::common::daemon::wait_until;
use super::common::ledger::{Tree, errno, names};
use super::{EVERY_TYPE, FLAGS, flag};

const FULL: &str = "REPLACE INTO app___types VALUES('full',-9223372036854775808,0.25,'two\nlines\n',x'00ff0a',x'0a00')";

#[test]
fn a_field_file_is_exactly_the_value() {
    let big = "1e300";
    let tree = Tree::new(
        &[],
        &[
            EVERY_TYPE,
            FULL,
            &format!(
                "REPLACE INTO app___types VALUES('more',9007199254740993,{big},'grüße',x'',x'')"
            ),
            "REPLACE INTO app___types VALUES('whole',0,1,'',NULL,NULL)",
        ],
    );
    let one_and_zeros = format!("1{}", "0".repeat(300));
    for (path, expected) in [
        ("full/name", &b"full"[..]),
        ("full/i", b"-9223372036854775808"),
        ("full/d", b"0.25"),
        ("full/t", b"two\nlines\n"),
        ("full/b", b"\x00\xff\n"),
        ("full/k", b"\n\x00"),
        ("more/i", b"9007199254740993"),
        ("more/d", one_and_zeros.as_bytes()),
        ("more/t", "grüße".as_bytes()),
        ("more/b", b""),
        ("whole/i", b"0"),
        ("whole/d", b"1"),
        ("whole/t", b""),
    ] {
        let path = format!("app/types/{path}");
        assert_eq!(tree.read(&path), expected, "{path}");
        let size = fs::metadata(tree.path(&path)).unwrap().len();
        assert_eq!(size, expected.len() as u64, "{path}");
    }
}

#[test]
fn a_null_has_no_file_and_an_empty_value_an_empty_one() {
    let tree = Tree::new(
        &[],
        &[
            FLAGS,
            "REPLACE INTO app___flags (name, enabled, note) VALUES('a', NULL, '')",
        ],
    );
    let row = tree.path("app/flags/a");
    assert_eq!(names(&row), ["name", "note", "row.json"]);
    assert_eq!(errno(fs::metadata(row.join("enabled"))), libc::ENOENT);
    assert_eq!(fs::metadata(row.join("note")).unwrap().len(), 0);
    // Absent names are remembered, and forgotten when the value comes.
    tree.apply(&["UPDATE app___flags SET enabled = 1, note = NULL"]);
    assert_eq!(names(&row), ["name", "enabled", "row.json"]);
    assert_eq!(fs::read(row.join("enabled")).unwrap(), b"1");
    assert_eq!(errno(fs::metadata(row.join("note"))), libc::ENOENT);
}

#[test]
fn newline_ends_integers_decimals_and_strings() {
    let tree = Tree::new(&["-o", "newline"], &[EVERY_TYPE, FULL]);
    for (field, expected) in [
        ("name", &b"full\n"[..]),
        ("i", b"-9223372036854775808\n"),
        ("d", b"0.25\n"),
        ("t", b"two\nlines\n"),
        ("b", b"\x00\xff\n"),
        ("k", b"\n\x00"),
    ] {
        let path = format!("app/types/full/{field}");
        assert_eq!(tree.read(&path), expected, "{field}");
        let size = fs::metadata(tree.path(&path)).unwrap().len();
        assert_eq!(size, expected.len() as u64, "{field}");
    }
}

#[test]
fn row_json_and_schema_json_are_files_of_the_tree() {
    let tree = Tree::new(
        &[],
        &[
            EVERY_TYPE,
            FULL,
            "REPLACE INTO app___types (name, d) VALUES('a/b', 1)",
        ],
    );
    assert_eq!(
        tree.text("app/types/full/row.json"),
        "{\"name\":\"full\",\"i\":-9223372036854775808,\"d\":0.25,\"t\":\"two\\nlines\\n\",\"b\":\"AP8K\",\"k\":\"CgA=\"}\n"
    );
    assert_eq!(
        tree.text("app/types/a%2Fb/row.json"),
        "{\"name\":\"a/b\",\"i\":null,\"d\":1.0,\"t\":null,\"b\":null,\"k\":null}\n"
    );
    assert_eq!(
        tree.text("app/types/.schema.json"),
        "{\"family\":\"app\",\"table\":\"types\",\"fields\":[{\"name\":\"name\",\"type\":\"string\"},\
         {\"name\":\"i\",\"type\":\"integer\"},{\"name\":\"d\",\"type\":\"decimal\"},{\"name\":\"t\",\"type\":\"text\"},\
         {\"name\":\"b\",\"type\":\"binary\"},{\"name\":\"k\",\"type\":\"bytestring\"}],\"key\":[\"name\"]}\n"
    );
}

#[test]
fn seq_files_follow_the_ledger() {
    let tree = Tree::new(&[], &[FLAGS, EVERY_TYPE, &flag("a", 1, "")]);
    let first = (tree.text("app/flags/.seq"), tree.text("app/types/.seq"));
    assert_eq!(first, ("3\n".into(), "2\n".into()));
    let seq = tree.apply(&[flag("a", 2, "")]);
    assert_eq!(tree.text("app/flags/.seq"), format!("{seq}\n"));
    assert_eq!(tree.text("app/types/.seq"), "2\n");
    assert_eq!(tree.text(".ctlfs/seq"), format!("{seq}\n"));
    // An entry without an effect moves the position, not the table.
    let after = tree.apply(&[flag("a", 2, "")]);
    assert_eq!(tree.text("app/flags/.seq"), format!("{seq}\n"));
    assert_eq!(tree.text(".ctlfs/seq"), format!("{after}\n"));
}

#[test]
fn control_files_show_the_daemon() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "")]);
    let status = tree.daemon.status();
    assert_eq!(status["health"], "ok");
    assert_eq!(status["seq"], 2);
    assert_eq!(status["pid"], tree.daemon.pid());
    assert_eq!(
        (&status["counts"]["families"], &status["counts"]["tables"]),
        (&1.into(), &1.into())
    );
    assert_eq!(tree.read(".ctlfs/ready"), b"");
    assert_eq!(
        names(tree.path(".ctlfs")),
        ["status.json", "seq", "ready", "export", "changes"]
    );
    // One open, one state: byte by byte, while the state goes on.
    let file = fs::File::open(tree.path(".ctlfs/status.json")).unwrap();
    let size = file.metadata().unwrap().len();
    let mut bytes = Vec::new();
    for offset in 0..size {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        bytes.extend(byte);
        if offset % 200 == 0 {
            tree.apply(&[flag("a", offset.try_into().unwrap(), "")]);
        }
    }
    let frozen: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(frozen["seq"], 2);
    assert!(tree.daemon.status()["seq"].as_u64().unwrap() > 2);
    // Looked up twice, as cp does: one file.
    let path = tree.path(".ctlfs/status.json");
    let looked = fs::metadata(&path).unwrap();
    let opened = fs::File::open(&path).unwrap().metadata().unwrap();
    assert_eq!((looked.ino(), looked.len()), (opened.ino(), opened.len()));
    // And never one that was read before.
    let requests = |status: serde_json::Value| status["requests"]["total"].as_u64().unwrap();
    let before = requests(tree.daemon.status());
    assert!(requests(tree.daemon.status()) > before);
}

#[test]
fn values_of_16_mib_are_readable() {
    let tree = Tree::new(
        &[],
        &[
            FLAGS,
            "INSERT INTO app___flags (name, note) VALUES('big', replace(hex(zeroblob(8388608)), '00', 'xy'))",
        ],
    );
    let bytes = tree.read("app/flags/big/note");
    assert_eq!(bytes.len(), 16 << 20);
    assert!(bytes.chunks(2).all(|pair| pair == b"xy"));
    let json: serde_json::Value =
        serde_json::from_slice(&tree.read("app/flags/big/row.json")).unwrap();
    assert_eq!(json["note"].as_str().unwrap().len(), 16 << 20);
}

#[test]
fn tables_come_change_and_go_with_their_ddl() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x")]);
    let root = tree.daemon.mountpoint();
    assert_eq!(names(root), [".ctlfs", "app"]);
    assert_eq!(errno(fs::metadata(tree.path("web"))), libc::ENOENT);
    assert_eq!(errno(fs::metadata(tree.path("app/limits"))), libc::ENOENT);
    // New families and tables, although the kernel was told that they are absent.
    tree.apply(&[
        r#"CREATE TABLE web___routes ("id" INTEGER, PRIMARY KEY("id"));"#,
        r#"CREATE TABLE app___limits ("id" INTEGER, PRIMARY KEY("id"));"#,
        "INSERT INTO web___routes VALUES(7)",
    ]);
    assert_eq!(names(root), [".ctlfs", "app", "web"]);
    assert_eq!(names(tree.path("app")), ["flags", "limits"]);
    assert_eq!(tree.read("web/routes/7/id"), b"7");
    // A new field.
    assert_eq!(
        errno(fs::metadata(tree.path("app/flags/a/owner"))),
        libc::ENOENT
    );
    tree.apply(&[
        "ALTER TABLE app___flags ADD COLUMN \"owner\" TEXT",
        "UPDATE app___flags SET owner = 'me'",
    ]);
    assert_eq!(tree.read("app/flags/a/owner"), b"me");
    assert!(
        tree.text("app/flags/.schema.json")
            .contains("{\"name\":\"owner\",\"type\":\"text\"}")
    );
    assert!(
        tree.text("app/flags/a/row.json")
            .ends_with(",\"owner\":\"me\"}\n")
    );
    // A table that cannot be shown hides nothing else.
    tree.apply(&["CREATE TABLE app___heap (\"id\" TEXT)", &flag("b", 1, "")]);
    assert_eq!(names(tree.path("app")), ["flags", "limits"]);
    // Cleared, dropped, and made anew with another key.
    tree.apply(&["DELETE FROM app___flags"]);
    assert_eq!(names(tree.path("app/flags")), [".schema.json", ".seq"]);
    assert_eq!(errno(fs::metadata(tree.path("app/flags/a"))), libc::ENOENT);
    tree.apply(&[
        "DROP TABLE IF EXISTS web___routes",
        "DROP TABLE IF EXISTS app___flags",
    ]);
    assert_eq!(names(root), [".ctlfs", "app"]);
    assert_eq!(errno(fs::read(tree.path("web/routes/7/id"))), libc::ENOENT);
    assert_eq!(errno(fs::read(tree.path("app/flags/.seq"))), libc::ENOENT);
    tree.apply(&[
        r#"CREATE TABLE app___flags ("name" INTEGER, "enabled" INTEGER, PRIMARY KEY("name"));"#,
        "INSERT INTO app___flags VALUES(5, 6)",
    ]);
    assert_eq!(tree.read("app/flags/5/enabled"), b"6");
    assert_eq!(errno(fs::metadata(tree.path("app/flags/a"))), libc::ENOENT);
}

#[test]
fn a_null_in_a_key_has_no_path() {
    let tree = Tree::new(
        &[],
        &[
            FLAGS,
            "INSERT INTO app___flags VALUES(NULL, 1, 'nowhere')",
            "INSERT INTO app___flags VALUES('a', 1, 'here')",
        ],
    );
    assert_eq!(names(tree.path("app/flags")), [".schema.json", ".seq", "a"]);
}

#[test]
fn composite_keys_are_nested_directories() {
    let tree = Tree::new(
        &[],
        &[
            r#"CREATE TABLE web___routes ("region" VARCHAR(191), "to" VARCHAR(191), "port" INTEGER, PRIMARY KEY("region","port"));"#,
            "INSERT INTO web___routes VALUES('eu', 'a', 80)",
            "INSERT INTO web___routes VALUES('eu', 'b', 443)",
            "INSERT INTO web___routes VALUES('us', 'c', 80)",
        ],
    );
    let table = tree.path("web/routes");
    assert_eq!(names(&table), [".schema.json", ".seq", "eu", "us"]);
    assert_eq!(names(table.join("eu")), ["80", "443"]);
    assert_eq!(fs::read(table.join("eu/443/to")).unwrap(), b"b");
    assert_eq!(errno(fs::metadata(table.join("eu/row.json"))), libc::ENOENT);
    assert_eq!(errno(fs::metadata(table.join("asia"))), libc::ENOENT);
    tree.apply(&["DELETE FROM web___routes WHERE region = 'eu' AND port = 80"]);
    assert_eq!(names(table.join("eu")), ["443"]);
    tree.apply(&[
        "DELETE FROM web___routes WHERE region = 'eu' AND port = 443",
        "INSERT INTO web___routes VALUES('asia', 'd', 1)",
    ]);
    assert_eq!(errno(fs::metadata(table.join("eu"))), libc::ENOENT);
    assert_eq!(errno(fs::read(table.join("eu/443/to"))), libc::ENOENT);
    assert_eq!(fs::read(table.join("asia/1/to")).unwrap(), b"d");
    wait_until("the listing follows", || {
        names(&table) == [".schema.json", ".seq", "asia", "us"]
    });
}
