//! The command line without a mount: help, usage, exit statuses, and the errors of a start.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod common {
    pub mod daemon;
}

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::{Command, Stdio};

use common::daemon::{Place, copy_program, ctlfs, mounts_on, run, stderr, stdout, wait_until};

const NOBODY: u32 = 65534;

/// `ctlfs mount` on a place, which must fail; gives what it said.
fn refused(place: &Place, args: &[&str]) -> String {
    let output = ctlfs()
        .args(["mount", "--origin", &place.origin(), "--state"])
        .arg(place.state())
        .args(args)
        .arg(place.mountpoint())
        .output()
        .unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("ctlfs: "), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(mounts_on(&place.mountpoint()).is_empty());
    said
}

#[test]
fn help_teaches() {
    let help = run(["--help"]);
    assert_eq!(help.status.code(), Some(0));
    let text = stdout(&help);
    let place = |word: &str| {
        text.find(word)
            .unwrap_or_else(|| panic!("no {word} in {text}"))
    };
    assert!(place("ctlfs dev") < place("ctlfs mount --origin"));
    for command in ["dev", "mount", "unmount", "status"] {
        let output = run([command, "--help"]);
        assert_eq!(output.status.code(), Some(0));
        let text = stdout(&output);
        assert!(text.contains("Example"), "{text}");
        assert!(text.lines().count() > 10, "{text}");
    }
    let mount = stdout(&run(["mount", "--help"]));
    for default in ["[default: 1s]", "[default: 250ms]", "[default: 30s]"] {
        assert!(mount.contains(default), "{mount}");
    }
    assert!(!mount.contains("plain_open"));
}

#[test]
fn the_version_is_printed() {
    let output = run(["--version"]);
    assert_eq!(
        stdout(&output),
        format!("ctlfs {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn wrong_calls_exit_with_2() {
    for args in [
        &[][..],
        &["no-such-command"],
        &["mount"],
        &["mount", "/ctl"],
        &[
            "mount",
            "--origin",
            "sqlite:///x",
            "--poll-interval",
            "0s",
            "/ctl",
        ],
        &["mount", "--origin", "sqlite:///x", "--threads", "0", "/ctl"],
        &[
            "mount",
            "--origin",
            "sqlite:///x",
            "--log-level",
            "info=loud=no",
            "/ctl",
        ],
        &["mount", "--origin", "sqlite:///x", "-o", "sync", "/ctl"],
        &["mount", "--origin", "sqlite:///x", "-o", "rw", "/ctl"],
        &["status"],
        &["dev", "--no-such-option", "/ctl"],
    ] {
        let output = run(args);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{args:?}: {}",
            stderr(&output)
        );
        assert!(stdout(&output).is_empty(), "{args:?}");
    }
    let said = stderr(&run([
        "mount",
        "--origin",
        "sqlite:///x",
        "-o",
        "newline,sync",
        "/ctl",
    ]));
    assert!(
        said.contains("\"sync\"") && said.contains("newline"),
        "{said}"
    );
}

#[test]
fn a_closed_pipe_is_no_panic() {
    let script = format!("'{}' mount --help | head -c 1", env!("CARGO_BIN_EXE_ctlfs"));
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(stderr(&output), "");
}

#[test]
fn mount_points_that_cannot_be_used_say_why() {
    let place = Place::new();
    fs::write(place.mountpoint().join("file"), "x").unwrap();
    assert!(refused(&place, &[]).contains("the directory is not empty"));

    fs::remove_file(place.mountpoint().join("file")).unwrap();
    fs::remove_dir(place.mountpoint()).unwrap();
    let said = refused(&place, &[]);
    let mkdir = format!("create it with 'mkdir {}'", place.mountpoint().display());
    assert!(said.contains(&mkdir), "{said}");

    fs::write(place.mountpoint(), "x").unwrap();
    assert!(refused(&place, &[]).contains("it is not a directory"));
}

#[test]
fn a_state_directory_that_cannot_be_used_says_why() {
    let place = Place::new();
    fs::write(place.state(), "x").unwrap();
    let said = refused(&place, &[]);
    assert!(said.contains("cannot use the state directory"), "{said}");
    assert!(said.contains("--state"), "{said}");
}

#[test]
fn a_state_directory_in_use_is_refused() {
    let place = Place::new();
    fs::create_dir(place.state()).unwrap();
    let lock = place.state().join("lock");
    fs::write(&lock, "4711\n").unwrap();
    let mut holder = Command::new("flock")
        .arg(&lock)
        .args(["sh", "-c", "echo locked; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 7];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut said).unwrap();
    let error = refused(&place, &[]);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert!(error.contains("another ctlfs daemon (pid 4711)"), "{error}");
}

/// Runs `ctlfs mount` on a place as nobody, from a copy that nobody can reach. Only root can become
/// nobody: run by anyone else, this fails rather than passes.
fn mount_as_nobody(place: &Place) -> String {
    let program = place.root().join("ctlfs");
    if !program.exists() {
        fs::set_permissions(place.root(), fs::Permissions::from_mode(0o755)).unwrap();
        copy_program(&program);
    }
    let output = Command::new("setpriv")
        .args([&format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}")])
        .arg("--clear-groups")
        .arg(&program)
        .args(["mount", "--origin", &place.origin(), "--state"])
        .arg(place.state())
        .arg(place.mountpoint())
        .env_remove("CTLFS_ORIGIN")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(mounts_on(&place.mountpoint()).is_empty());
    stderr(&output)
}

#[test]
fn ordinary_users_hear_what_they_may_not() {
    let place = Place::new();
    fs::create_dir(place.state()).unwrap();
    let said = mount_as_nobody(&place);
    assert!(said.contains("cannot use the state directory"), "{said}");
    assert!(
        said.contains("it belongs to another user (uid 0)"),
        "{said}"
    );

    chown(place.state(), Some(NOBODY), Some(NOBODY)).unwrap();
    let said = mount_as_nobody(&place);
    assert!(said.contains("cannot mount on"), "{said}");
    assert!(
        said.contains("permission denied; give a directory that you own"),
        "{said}"
    );
}

#[test]
fn ldbs_that_are_none_are_refused() {
    let place = Place::new();
    let file = place.root().join("ldb.db");
    let mount = || {
        let output = ctlfs()
            .args(["mount", "--ldb"])
            .arg(&file)
            .arg("--state")
            .arg(place.state())
            .arg(place.mountpoint())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(mounts_on(&place.mountpoint()).is_empty());
        stderr(&output)
    };
    assert!(mount().contains("No such file"));
    fs::write(&file, "").unwrap();
    assert!(mount().contains("it holds no tables"));
    fs::write(&file, "something else altogether").unwrap();
    assert!(mount().contains("it is not a SQLite database"));
}

#[test]
fn an_origin_beside_an_ldb_is_refused_even_with_a_password() {
    let place = Place::new();
    let output = ctlfs()
        .args(["mount", "--ldb", "ldb.db"])
        .args(["--origin", "mysql://me:hidden@localhost/db"])
        .arg(place.mountpoint())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    assert!(said.contains("cannot be used with"), "{said}");
    assert!(!said.contains("hidden"), "{said}");
}

#[test]
fn what_is_not_mounted_is_no_mount() {
    let place = Place::new();
    for args in [&["status"][..], &["status", "--json"]] {
        let output = ctlfs().args(args).arg(place.mountpoint()).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("ctlfs is not mounted there"));
    }
    let output = ctlfs()
        .arg("unmount")
        .arg(place.mountpoint())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("it is not a ctlfs mount"));
    let output = run(["unmount", "/proc"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot unmount /proc: it is not a ctlfs mount"));
}

/// Kills the child however the test ends.
struct Kill(std::process::Child);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_password_does_not_stay_in_the_process_list() {
    // A server that accepts and says nothing keeps the start waiting.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    for joined in [false, true] {
        let place = Place::new();
        let url = format!("mysql://me:hunter2@127.0.0.1:{port}/ctldb");
        let mut command = ctlfs();
        command.args(["mount", "--foreground"]);
        if joined {
            command.arg(format!("--origin={url}"));
        } else {
            command.args(["--origin", &url]);
        }
        let child = command
            .arg("--state")
            .arg(place.state())
            .arg(place.mountpoint())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let child = Kill(child);
        let proc = format!("/proc/{}", child.0.id());
        // The start has passed the exec once it has its lock.
        wait_until("the daemon has its state directory", || {
            place.state().join("lock").exists() || !std::path::Path::new(&proc).exists()
        });
        let cmdline = fs::read(format!("{proc}/cmdline")).unwrap();
        let shown = String::from_utf8_lossy(&cmdline).replace('\0', " ");
        assert!(shown.contains("mount"), "{shown}");
        assert!(
            !shown.contains("hunter2") && !shown.contains("--origin"),
            "{shown}"
        );
    }
}

#[test]
fn no_message_shows_a_password() {
    for args in [
        &["mount", "mysql://me:hunter2@h/d", "/a", "/b"][..],
        &["status", "--x=mysql://me:hunter2@h/d"],
        &["mount", "--origin", "mysql://me:hunter2@h:port/d", "/ctl"],
        &["mount", "--origin", "postgres://me:hunter2@h/d", "/ctl"],
    ] {
        let output = run(args);
        assert_ne!(output.status.code(), Some(0));
        let said = stderr(&output) + &stdout(&output);
        assert!(!said.contains("hunter2"), "{args:?}: {said}");
    }
    let help = ctlfs()
        .args(["mount", "--help"])
        .env("CTLFS_ORIGIN", "mysql://me:hunter2@h/d")
        .output()
        .unwrap();
    assert!(!stdout(&help).contains("hunter2"));
}
