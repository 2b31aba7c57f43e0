//! What the program says and leaves behind when it is called with something bad: origins,
//! passwords, mount points, devices, LDBs, state directories, documents and values. Bad ledgers
//! are the part of tests/bad_ledger.rs.
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
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::central::{Place as Central, on_both};
use common::daemon::{
    Daemon, Place, copy_program, ctlfs, mount_command, mounts_on, stderr, stdout, wait_until,
};
use common::ledger::{Ledger, Tree, errno};
use common::mariadb;

const TABLE: &str = "CREATE TABLE app___flags (\"name\" VARCHAR(191), \"enabled\" BIGINT, \
                     \"note\" MEDIUMTEXT, PRIMARY KEY(\"name\"))";
const ROW: &str =
    "REPLACE INTO app___flags (\"name\",\"enabled\",\"note\") VALUES('good',1,'as it was')";
const SECRET: &str = "hunter2";

/// The one sentence that a command which must fail said.
#[track_caller]
fn fails(output: &Output, code: i32, parts: &[&str]) -> String {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.starts_with("ctlfs: "), "{said}");
    let lines = said.lines().filter(|line| *line != "Try 'ctlfs --help'.");
    assert_eq!(lines.count(), 1, "{said}");
    assert!(stdout(output).is_empty(), "{}", stdout(output));
    assert!(!said.contains("panicked"), "{said}");
    assert!(!said.contains(SECRET), "{said}");
    for part in parts {
        assert!(said.contains(part), "{said}\nlacks {part:?}");
    }
    said
}

/// Nothing is mounted in the place and no process has to do with it.
#[track_caller]
fn nothing_left(place: &Place) {
    assert!(mounts_on(&place.mountpoint()).is_empty());
    let root = place.root();
    let root = root.to_str().unwrap();
    // A daemon that has said why it cannot start may take a moment to end.
    wait_until("no process has to do with the place", || {
        fs::read_dir("/proc").unwrap().flatten().all(|entry| {
            fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| !String::from_utf8_lossy(&line).contains(root))
                || !entry.path().join("cmdline").exists()
        })
    });
}

/// `ctlfs mount` to the background.
fn mount(place: &Place, args: &[&str]) -> Output {
    ctlfs()
        .arg("mount")
        .args(args)
        .arg("--state")
        .arg(place.state())
        .arg(place.mountpoint())
        .output()
        .unwrap()
}

/// `mount`, `put` and `apply` on an origin, which all fail alike.
#[track_caller]
fn all_fail(place: &Place, origin: &[&str], code: i32, parts: &[&str]) {
    fails(&mount(place, origin), code, parts);
    nothing_left(place);
    let document = document(place);
    for command in [
        &["put", "app/flags", "name=a"][..],
        &["delete", "app/flags", "name=a"],
        &["apply", "-f", &document],
    ] {
        let output = ctlfs().args(command).args(origin).output().unwrap();
        fails(&output, code, parts);
    }
    nothing_left(place);
}

const DOCUMENT: &str = "\
families:
  app:
    tables:
      flags:
        fields: {name: string, enabled: integer, note: text}
        key: [name]
        rows:
          - {name: good, enabled: 1, note: as it was}
";

fn document(place: &Place) -> String {
    let file = place.root().join("config.yaml");
    fs::write(&file, DOCUMENT).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn origins_that_are_wrong_are_told_apart() {
    let place = Place::new();
    let fails = |url: &str, code, parts: &[&str]| all_fail(&place, &["--origin", url], code, parts);
    fails("postgres://h/d", 2, &["not a URL ctlfs knows", "mysql://"]);
    fails("mysql://u:hunter2@h:3306", 2, &["names no database"]);
    fails("mysql://u@h:99999/d", 2, &["invalid port"]);
    fails("mysql://u@h:port/d", 2, &["invalid port"]);
    fails("sqlite://ledger.db", 2, &["absolute path"]);
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = unused.local_addr().unwrap().port();
    drop(unused);
    let closed = format!("mysql://u:hunter2@127.0.0.1:{port}/d");
    fails(
        &closed,
        1,
        &[
            "cannot reach mysql://u:***@127.0.0.1:",
            "refused",
            "check the host and port",
        ],
    );

    // An embedded ledger that is missing, something else, or without its tables.
    let missing = place.origin();
    fails(&missing, 1, &["cannot reach sqlite://", "'ctlfs init'"]);
    assert!(!place.ledger().exists());
    fs::write(place.ledger(), "something else altogether, and not short").unwrap();
    fails(&missing, 1, &["not a SQLite database"]);
    let empty = rusqlite::Connection::open(place.root().join("other.db")).unwrap();
    empty.execute_batch("CREATE TABLE mine(a)").unwrap();
    drop(empty);
    let other = format!("sqlite://{}", place.root().join("other.db").display());
    fails(&other, 1, &["holds no ledger", "'ctlfs init"]);
}

#[test]
fn servers_without_a_ledger_say_what_to_run() {
    let place = Place::new();
    let database = mariadb::database();
    let fails = |url: &str, parts: &[&str]| all_fail(&place, &["--origin", url], 1, parts);
    fails(&database.url(), &["holds no ledger", "'ctlfs init"]);
    let unknown = database.url().replace(database.name(), "no_such_db");
    fails(&unknown, &["no such database", "'ctlfs init'"]);
    let wrong = database.url_with_password(SECRET);
    fails(&wrong, &["refused the login", "user and password"]);
}

#[test]
fn a_password_is_shown_nowhere() {
    let place = Place::new();
    let central = Central::MySql(mariadb::database());
    let Central::MySql(database) = &central else {
        unreachable!()
    };
    central.executive().init().unwrap();
    central.run(&format!(
        "INSERT INTO ctlstore_dml_ledger (statement) VALUES ('{TABLE}')"
    ));
    let file = place.root().join("pw");
    let file = file.to_str().unwrap();
    let log = place.root().join("log");
    let log = log.to_str().unwrap();
    // Neither the right one, nor a wrong one with config at hand.
    for (url, in_file, right) in [
        (database.url(), None, true),
        (
            database.url_with_password("x"),
            Some(database.password()),
            true,
        ),
        (database.url_with_password(SECRET), None, false),
        (database.url_with_password("x"), Some(SECRET), false),
    ] {
        let mut extra = vec!["--log-file", log, "--poll-interval", "10ms"];
        if let Some(password) = in_file {
            fs::write(file, password).unwrap();
            extra.extend(["--password-file", file]);
        }
        let mut command = mount_command(&place, &url, &extra);
        command.stderr(Stdio::piped());
        let daemon = Daemon::start(command, &place.mountpoint());
        if !right {
            daemon.wait_status("the login is refused", |status| {
                status["problem"]["kind"] == "origin"
            });
            let reason = daemon.status()["problem"]["reason"].to_string();
            assert!(reason.contains("refused the login"), "{reason}");
        }
        let cmdline = fs::read(format!("/proc/{}/cmdline", daemon.pid())).unwrap();
        let shown = [
            String::from_utf8_lossy(&cmdline).into_owned(),
            daemon.status().to_string(),
            fs::read_to_string(log).unwrap(),
        ]
        .concat();
        for password in [SECRET, database.password()] {
            assert!(!shown.contains(password), "{shown}");
        }
        let encoded: String = database
            .password()
            .bytes()
            .map(|b| format!("%{b:02x}"))
            .collect();
        assert!(!shown.contains(&encoded), "{shown}");
    }
}

#[test]
fn a_wrong_password_file_is_named() {
    let place = Place::new();
    let url = "mysql://u@127.0.0.1:1/d";
    let missing = ["--origin", url, "--password-file", "/no/such/file"];
    all_fail(&place, &missing, 1, &["password file /no/such/file"]);
    let bytes = place.root().join("bytes");
    fs::write(&bytes, b"hunter2\xff").unwrap();
    let bytes = ["--origin", url, "--password-file", bytes.to_str().unwrap()];
    all_fail(&place, &bytes, 1, &["not UTF-8"]);
}

/// Runs a shell script in a mount namespace of its own, with the program as `$1`.
fn in_a_namespace(script: &str, args: &[&Path]) -> Output {
    Command::new("unshare")
        .args(["-m", "sh", "-ec", script, "sh"])
        .arg(env!("CARGO_BIN_EXE_ctlfs"))
        .args(args)
        .env_remove("CTLFS_ORIGIN")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn without_the_fuse_device_nothing_is_mounted() {
    let place = Place::new();
    Ledger::create(&place);
    fs::set_permissions(place.root(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = place.root().join("program");
    copy_program(&program);
    fs::create_dir(place.state()).unwrap();
    let nobody = Some(65534);
    for path in [place.mountpoint(), place.ledger()] {
        chown(path, nobody, nobody).unwrap();
    }
    let bare = "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3;";
    for (prepare, become_, parts) in [
        ("", "", ["/dev/fuse cannot be opened", "'modprobe fuse'"]),
        (
            "mknod -m 666 /dev/fuse c 1 3;",
            "",
            ["something other than the FUSE device", "container"],
        ),
        (
            "mknod -m 600 /dev/fuse c 10 229; chown -R 65534 \"$4\";",
            "setpriv --reuid=65534 --regid=65534 --clear-groups",
            ["/dev/fuse may not be opened", "permission denied"],
        ),
    ] {
        let script = format!(
            "{bare} {prepare} exec {become_} \"$2\" mount --origin \"sqlite://$3\" --state \"$4\" \"$5\""
        );
        let output = in_a_namespace(
            &script,
            &[
                &program,
                &place.ledger(),
                &place.state(),
                &place.mountpoint(),
            ],
        );
        fails(&output, 1, &["cannot mount on", parts[0], parts[1]]);
        nothing_left(&place);
        assert!(!place.state().join("ldb.db").exists());
    }
    // Nor without any device.
    let script = "mount -t tmpfs none /dev; exec \"$1\" mount --origin \"sqlite://$2\" --state \"$3\" \"$4\"";
    let output = in_a_namespace(
        script,
        &[&place.ledger(), &place.state(), &place.mountpoint()],
    );
    fails(&output, 1, &["cannot go to the background", "/dev/null"]);
    nothing_left(&place);
}

#[test]
fn places_of_others_are_left_alone() {
    let place = Place::new();
    Ledger::create(&place);
    let origin = place.origin();
    let script = "mount -t tmpfs none \"$5\"; exec \"$2\" mount --origin \"sqlite://$3\" --state \"$4\" \"$5\"";
    let program = Path::new(env!("CARGO_BIN_EXE_ctlfs"));
    let output = in_a_namespace(
        script,
        &[
            program,
            &place.ledger(),
            &place.state(),
            &place.mountpoint(),
        ],
    );
    fails(
        &output,
        1,
        &["another file system (tmpfs)", "directory within it"],
    );
    nothing_left(&place);

    let tree = Tree::new(&[], &[TABLE, ROW]);
    let within = tree.path("app/flags");
    for (command, code) in [("status", 2), ("unmount", 1)] {
        let output = ctlfs().arg(command).arg(&within).output().unwrap();
        fails(&output, code, &["app/flags", "not"]);
        let output = ctlfs().arg(command).arg("/no/such/place").output().unwrap();
        fails(&output, code, &["cannot", "/no/such/place", "No such file"]);
    }
    let output = ctlfs()
        .args(["mount", "--origin", &origin, "--state"])
        .arg(place.state())
        .arg(&within)
        .output()
        .unwrap();
    fails(&output, 1, &["cannot mount on", "app/flags"]);
    // The tree itself is no state directory.
    let output = ctlfs()
        .args(["mount", "--origin", &origin, "--state"])
        .arg(tree.path("state"))
        .arg(place.mountpoint())
        .output()
        .unwrap();
    fails(
        &output,
        1,
        &["state directory", "Read-only file system", "--state"],
    );
    nothing_left(&place);
    assert_eq!(tree.text("app/flags/good/note"), "as it was");
}

#[test]
fn a_state_directory_that_cannot_be_written_is_named() {
    let place = Place::new();
    Ledger::create(&place);
    fs::create_dir(place.state()).unwrap();
    for sub in ["", "/below"] {
        let script = format!(
            "mount -t tmpfs -o ro none \"$4\"; exec \"$2\" mount --origin \"sqlite://$3\" --state \"$4\"{sub} \"$5\""
        );
        let program = Path::new(env!("CARGO_BIN_EXE_ctlfs"));
        let output = in_a_namespace(
            &script,
            &[
                program,
                &place.ledger(),
                &place.state(),
                &place.mountpoint(),
            ],
        );
        let parts = ["cannot use the state directory", "Read-only", "--state"];
        fails(&output, 1, &parts);
        nothing_left(&place);
    }
    let output = ctlfs()
        .args(["mount", "--state", "/dev/null", "--origin", &place.origin()])
        .arg(place.mountpoint())
        .output()
        .unwrap();
    fails(&output, 1, &["/dev/null", "Not a directory", "--state"]);
    nothing_left(&place);
}

/// An LDB of two hundred rows, as a daemon left it.
fn good_ldb(place: &Place) -> Vec<u8> {
    let ledger = Ledger::create(place);
    ledger.append(&[TABLE, ROW]);
    let rows: Vec<String> = (0..200)
        .map(|i| {
            let note = "x".repeat(1000);
            format!("REPLACE INTO app___flags (\"name\",\"enabled\",\"note\") VALUES('r{i:03}',{i},'{note}')")
        })
        .collect();
    ledger.append(&rows);
    let mut daemon = Daemon::mount(place, &[]);
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
    // All of it into the one file.
    let file = place.state().join("ldb.db");
    let db = rusqlite::Connection::open(&file).unwrap();
    // The rows are to be what most of its pages are of.
    db.execute_batch("DELETE FROM _ctlfs_changes; VACUUM")
        .unwrap();
    db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        .unwrap();
    db.close().unwrap();
    fs::read(file).unwrap()
}

/// Bytes that are no page of SQLite's.
fn garbage(length: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_be_bytes()[3] | 0x80
        })
        .collect()
}

#[test]
fn ldbs_that_are_damaged_or_of_others_are_left_as_they_are() {
    let place = Place::new();
    let good = good_ldb(&place);
    let own = place.state().join("ldb.db");
    let foreign = place.root().join("foreign.db");
    let other = place.root().join("other.db");
    let mine = rusqlite::Connection::open(&other).unwrap();
    mine.execute_batch("CREATE TABLE mine(a); INSERT INTO mine VALUES(1)")
        .unwrap();
    drop(mine);
    let half = good.len() / 2;
    let schema = [&good[..100], &garbage(good.len() - 100)].concat();
    let pages = [&good[..4096], &garbage(good.len() - 4096)].concat();
    for (bytes, own_says, foreign_says) in [
        (
            garbage(9000),
            "not a SQLite database",
            "not a SQLite database",
        ),
        (good[..50].to_vec(), "is damaged", "is damaged"),
        (good[..half + 100].to_vec(), "is damaged", "is damaged"),
        (schema, "is damaged", "is damaged"),
        (pages, "is damaged", "is damaged"),
        (
            fs::read(&other).unwrap(),
            "of another program",
            "of another program",
        ),
    ] {
        for suffix in ["-wal", "-shm"] {
            let _ = fs::remove_file(place.state().join(format!("ldb.db{suffix}")));
        }
        fs::write(&own, &bytes).unwrap();
        let output = mount(&place, &["--origin", &place.origin()]);
        let said = fails(&output, 1, &[own_says, own.to_str().unwrap()]);
        assert!(said.contains("remove it") || said.contains("move this one away"));
        assert!(fs::read(&own).unwrap() == bytes, "{said}");
        nothing_left(&place);

        fs::write(&foreign, &bytes).unwrap();
        let output = mount(&place, &["--ldb", foreign.to_str().unwrap()]);
        let said = fails(&output, 1, &[foreign_says, foreign.to_str().unwrap()]);
        assert!(!said.contains("remove it"), "it is not ours: {said}");
        assert!(fs::read(&foreign).unwrap() == bytes, "{said}");
        nothing_left(&place);
    }
    // The ledger has all of it still.
    fs::remove_file(&own).unwrap();
    let daemon = Daemon::mount(&place, &[]);
    assert_eq!(
        fs::read(daemon.path("app/flags/good/note")).unwrap(),
        b"as it was"
    );
}

#[test]
fn damage_within_an_ldb_is_an_error_and_never_a_wrong_value() {
    let place = Place::new();
    let mut bytes = good_ldb(&place);
    let pages = bytes.len() / 4096;
    // Somewhere among the rows.
    let from = pages / 2 * 4096;
    bytes[from..from + 8 * 4096].copy_from_slice(&garbage(8 * 4096));
    let foreign = place.root().join("foreign.db");
    fs::write(&foreign, &bytes).unwrap();
    fs::write(place.state().join("ldb.db"), &bytes).unwrap();
    let mut by_ldb = ctlfs();
    by_ldb
        .args(["mount", "--foreground", "--ldb"])
        .arg(&foreign)
        .arg("--state")
        .arg(place.root().join("state2"))
        .arg(place.mountpoint());
    let by_origin = mount_command(&place, &place.origin(), &["--poll-interval", "10ms"]);
    for (command, advice) in [
        (by_ldb, "build it anew"),
        (by_origin, "built anew from the ledger"),
    ] {
        let mut daemon = Daemon::start(command, &place.mountpoint());
        let mut failed = 0;
        for i in 0..200 {
            match fs::read(daemon.path(format!("app/flags/r{i:03}/note"))) {
                Ok(note) => assert_eq!(note, "x".repeat(1000).as_bytes()),
                result => {
                    assert_eq!(errno(result), libc::EIO);
                    failed += 1;
                }
            }
        }
        assert!((1..200).contains(&failed), "{failed} reads failed");
        let shown = ctlfs()
            .arg("status")
            .arg(daemon.mountpoint())
            .output()
            .unwrap();
        assert_eq!(shown.status.code(), Some(1));
        let shown = stdout(&shown);
        assert!(
            shown.contains("the LDB is damaged") && shown.contains(advice),
            "{shown}"
        );
        assert_eq!(daemon.status()["problem"]["kind"], "storage");
        daemon.signal(libc::SIGTERM);
        assert_eq!(daemon.wait(), Some(0));
    }
    assert!(fs::read(&foreign).unwrap() == bytes);
}

/// The last sequence of the ledger.
fn last(central: &Central) -> u64 {
    central.entries().last().map_or(0, |entry| entry.seq.get())
}

#[test]
fn documents_with_mistakes_write_nothing() {
    on_both(|central| {
        let place = Place::new();
        central.executive().init().unwrap();
        let url = match central {
            Central::Embedded(dir) => format!("sqlite://{}/ledger.db", dir.path().display()),
            Central::MySql(database) => database.url(),
        };
        let apply = |file: &str| {
            ctlfs()
                .args(["apply", "--origin", &url, "-f", file])
                .output()
                .unwrap()
        };
        let file = document(&place);
        let first = apply(&file);
        assert!(first.status.success(), "{}", stderr(&first));
        let before = last(central);
        let long = format!("name: {}", "é".repeat(192));
        let row = "          - {name: good, enabled: 1, note: as it was}\n";
        let twice = format!("{row}{row}");
        for (find, replace, said) in [
            ("families:", "familes:", ":1: unknown field `familes`"),
            (
                "{name: good,",
                "{name: good",
                ":8: while parsing a flow mapping",
            ),
            ("key: [name]", "key: [name", ":7: "),
            ("  app:", "\tapp:", ":2: tabs"),
            ("  app:", "  app: 3", ":"),
            (
                row,
                &twice,
                ":9: app/flags row 2 has the same key as the row on line 8",
            ),
            (
                "name: good",
                &long,
                ":8: app/flags row 1, field \"name\": it has 192 characters",
            ),
            (
                "enabled: 1",
                "enabled: 99999999999999999999",
                ":8: app/flags row 1, field \"enabled\": the number does not fit into 64 bits",
            ),
            (
                "enabled: 1",
                "enabled: -99999999999999999999",
                ":8: app/flags row 1, field \"enabled\": the number does not fit into 64 bits",
            ),
            (
                "enabled: 1",
                "enabled: [1]",
                ":8: app/flags row 1, field \"enabled\": expected an integer, found a list",
            ),
            (
                "enabled: 1,",
                "enabled: 1, enabled: 2,",
                ":8: duplicate mapping key: enabled\n",
            ),
            ("flags:", "a__b:", ":4: invalid table name \"a__b\""),
            ("flags:", "f:", ":4: invalid table name \"f\""),
            ("app:", "App-1:", ":2: invalid family name \"App-1\""),
            (
                "enabled: integer",
                "en-abled: integer",
                ":5: app/flags: invalid field name",
            ),
        ] {
            assert!(DOCUMENT.contains(find), "{find}");
            fs::write(&file, DOCUMENT.replacen(find, replace, 1)).unwrap();
            fails(&apply(&file), 1, &[&format!("{file}{said}")]);
        }
        let json = "{\"families\": {\"app\": {\"tables\": {\"flags\": {\"rows\": [{\"name\": \"z\"},,]}}}}}";
        for (bytes, said) in [
            (&b""[..], "unexpected end"),
            (b"[1, 2]", "expected"),
            (b"families:\n  app: \xff\n", "valid UTF-8"),
            (json.as_bytes(), ":1: "),
        ] {
            fs::write(&file, bytes).unwrap();
            fails(&apply(&file), 1, &[&file, said]);
        }
        let directory = place.root();
        fails(&apply(directory.to_str().unwrap()), 1, &["Is a directory"]);
        assert_eq!(last(central), before);
    });
}

#[test]
fn values_with_mistakes_write_nothing() {
    on_both(|central| {
        let place = Place::new();
        central.executive().init().unwrap();
        let url = match central {
            Central::Embedded(dir) => format!("sqlite://{}/ledger.db", dir.path().display()),
            Central::MySql(database) => database.url(),
        };
        let apply = ctlfs()
            .args(["apply", "--origin", &url, "-f", &document(&place)])
            .output()
            .unwrap();
        assert!(apply.status.success());
        let before = last(central);
        for (command, code, parts) in [
            (
                &["put", "app/nothing", "name=a"][..],
                1,
                ["no table app/nothing", "'ctlfs apply'"],
            ),
            (
                &["put", "none/flags", "name=a"],
                1,
                ["no table none/flags", "'ctlfs apply'"],
            ),
            (&["put", "flags", "name=a"], 2, ["FAMILY/TABLE", ""]),
            (
                &["put", "app/flags", "name=a", "note=@/no/such"],
                1,
                ["field \"note\" from /no/such", "No such file"],
            ),
            (
                &["put", "app/flags", "name=a", "note=@/"],
                1,
                ["field \"note\" from /", "Is a directory"],
            ),
            (
                &["put", "app/flags", "name=a", SECRET],
                2,
                ["no '='", "FIELD=VALUE"],
            ),
            (
                &["put", "app/flags", "name=a", "enabled=hunter2"],
                2,
                ["field \"enabled\"", "expected an integer"],
            ),
            (
                &["put", "app/flags", "name=a", "enabled=9223372036854775808"],
                2,
                ["field \"enabled\"", "64 bits"],
            ),
            (
                &["put", "app/flags", "enabled=1"],
                2,
                ["key field name is missing", "must be given"],
            ),
            (
                &["put", "app/flags", "name:=null"],
                2,
                ["field \"name\"", "cannot be NULL"],
            ),
            (
                &["put", "app/flags", "name=a", "nope=hunter2"],
                2,
                ["no field nope", "name, enabled, note"],
            ),
            (&["delete", "app/flags", "enabled=1"], 2, ["key field", ""]),
            (
                &["delete", "app/flags", "name=a"],
                1,
                ["no row app/flags \"a\"", "nothing was written"],
            ),
            (
                &["delete", "app/flags", "name"],
                2,
                ["no '='", "FIELD=VALUE"],
            ),
        ] {
            let output = ctlfs()
                .args(command)
                .args(["--origin", &url])
                .output()
                .unwrap();
            fails(&output, code, &parts);
        }
        assert_eq!(last(central), before);
    });
}

#[test]
fn a_reader_that_stops_reading_is_no_panic() {
    let tree = Tree::new(&[], &[TABLE]);
    for args in ["status \"$2\"", "status --json \"$2\"", "--help"] {
        let script = format!("\"$1\" {args} | head -n 1");
        let output = Command::new("sh")
            .args(["-c", &script, "sh", env!("CARGO_BIN_EXE_ctlfs")])
            .arg(tree.daemon.mountpoint())
            .output()
            .unwrap();
        assert_eq!(stderr(&output), "");
        assert_eq!(stdout(&output).lines().count(), 1);
    }
}
