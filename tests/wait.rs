//! `ctlfs wait`, and the `--wait` of the commands that write: they return when a mount shows what
//! was written, and say why when it does not.
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

use std::fs;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, Place, ctlfs, run, stderr, stdout, wait_until};
use common::ledger::{Ledger, Tree};

const CREATE: &str = "CREATE TABLE app___flags (\"name\" VARCHAR(191), \"value\" TEXT, \
                      PRIMARY KEY(\"name\"));";

fn row(value: &str) -> String {
    format!("REPLACE INTO app___flags (\"name\",\"value\") VALUES('a','{value}')")
}

fn tree() -> Tree {
    Tree::new(&[], &[CREATE, &row("first")])
}

/// `ctlfs wait` in the background; killed when the test ends early.
struct Waiter(Option<Child>);

impl Waiter {
    fn start(tree: &Tree, arguments: &[&str]) -> Self {
        let child = ctlfs()
            .arg("wait")
            .arg(tree.daemon.mountpoint())
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Waiter(Some(child))
    }

    fn is_waiting(&mut self) -> bool {
        self.0.as_mut().unwrap().try_wait().unwrap().is_none()
    }

    fn finish(mut self) -> Output {
        wait_until("the command ends", || !self.is_waiting());
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn wait_returns_when_the_sequence_is_shown() {
    let tree = tree();
    let seq = tree.daemon.seq();
    let shown = Waiter::start(&tree, &["--seq", &seq.to_string()]).finish();
    assert_eq!(shown.status.code(), Some(0), "{}", stderr(&shown));
    assert_eq!(
        (stdout(&shown), stderr(&shown)),
        (String::new(), String::new())
    );
    let next = (seq + 1).to_string();
    let mut waiter = Waiter::start(&tree, &["--seq", &next, "--timeout", "1m"]);
    assert!(waiter.is_waiting());
    tree.ledger.append(&[row("second")]);
    let shown = waiter.finish();
    assert_eq!(shown.status.code(), Some(0), "{}", stderr(&shown));
    assert_eq!(tree.text("app/flags/a/value"), "second");
}

#[test]
fn wait_says_where_it_stands_when_the_time_is_up() {
    let tree = tree();
    let seq = tree.daemon.seq();
    let late = Waiter::start(&tree, &["--seq", "4711", "--timeout", "100ms"]).finish();
    assert_eq!(late.status.code(), Some(1));
    let said = stderr(&late);
    assert!(
        said.contains("does not show sequence 4711 after "),
        "{said}"
    );
    assert!(said.contains(&format!("it stands at {seq}")), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    // And why, when it knows.
    tree.ledger.append(&["DROP TABLE _ldb_seq"]);
    tree.daemon
        .wait_status("it has a problem", |s| !s["problem"].is_null());
    let late = Waiter::start(&tree, &["--seq", "4711", "--timeout", "100ms"]).finish();
    assert!(stderr(&late).contains("it would "), "{}", stderr(&late));
}

#[test]
fn wait_needs_a_mount_and_ends_with_it() {
    let place = Place::new();
    let mountpoint = place.mountpoint();
    let none = run(["wait", mountpoint.to_str().unwrap(), "--seq", "1"]);
    assert_eq!(none.status.code(), Some(2));
    assert!(stderr(&none).contains("not mounted"), "{}", stderr(&none));
    for signal in [libc::SIGKILL, libc::SIGTERM] {
        let tree = tree();
        let mut waiter = Waiter::start(&tree, &["--seq", "4711"]);
        assert!(waiter.is_waiting());
        tree.daemon.signal(signal);
        let ended = waiter.finish();
        assert_eq!(ended.status.code(), Some(2), "{}", stderr(&ended));
        assert_eq!(stderr(&ended).lines().count(), 1, "{}", stderr(&ended));
    }
    let usage = run(["wait", "/ctl"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn wait_keeps_its_timeout_when_the_daemon_does_not_answer() {
    let tree = tree();
    tree.daemon.signal(libc::SIGSTOP);
    let began = Instant::now();
    let late = Waiter::start(&tree, &["--seq", "4711", "--timeout", "200ms"]).finish();
    tree.daemon.signal(libc::SIGCONT);
    assert_eq!(late.status.code(), Some(1), "{}", stderr(&late));
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[test]
fn what_was_written_with_wait_is_shown_when_the_command_returns() {
    let place = Place::new();
    Ledger::create(&place);
    let document = place.root().join("config.yaml");
    let text = "families: {app: {tables: {flags: {fields: {name: string, value: text}, \
                key: [name], rows: [{name: a, value: first}]}}}}";
    fs::write(&document, text).unwrap();
    let daemon = Daemon::mount(&place, &[]);
    let (origin, mountpoint) = (place.origin(), place.mountpoint());
    let write = |arguments: &[&str]| {
        let output = ctlfs()
            .args(arguments)
            .args(["--origin", &origin, "--wait", mountpoint.to_str().unwrap()])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    };
    let value = || fs::read_to_string(daemon.path("app/flags/a/value")).unwrap();
    write(&["apply", "-f", document.to_str().unwrap()]);
    assert_eq!(value(), "first");
    for number in 0..20 {
        let said = write(&["put", "app/flags", "name=a", &format!("value={number}")]);
        assert!(said.contains("at ledger sequence"), "{said}");
        assert_eq!(value(), number.to_string());
    }
    let said = write(&["put", "app/flags", "name=a", "value=19"]);
    assert!(said.contains("so already"), "{said}");
    write(&["delete", "app/flags", "name=a"]);
    assert!(!daemon.path("app/flags/a").exists());
}

#[test]
fn put_with_wait_fails_before_it_writes_where_nothing_is_mounted() {
    let tree = tree();
    let origin = tree.place.origin();
    let elsewhere = tree.place.root().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let seq = tree.daemon.seq();
    let put = ctlfs()
        .args([
            "put",
            "app/flags",
            "name=a",
            "value=never",
            "--origin",
            &origin,
        ])
        .arg("--wait")
        .arg(&elsewhere)
        .output()
        .unwrap();
    assert_eq!(put.status.code(), Some(2), "{}", stderr(&put));
    assert!(
        stderr(&put).contains("not mounted there"),
        "{}",
        stderr(&put)
    );
    let last = tree.ledger.append(&[row("next")]);
    assert_eq!(last, seq + 1, "it was written all the same");
    // A time limit without anything to wait for is a mistake.
    let put = run([
        "put",
        "--origin",
        &origin,
        "--timeout",
        "1s",
        "app/flags",
        "name=a",
    ]);
    assert_eq!(put.status.code(), Some(2), "{}", stderr(&put));
}
