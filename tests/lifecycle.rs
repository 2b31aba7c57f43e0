//! The life of a mount: start, refusal, end, and what is left after each way to end.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod common {
    pub mod daemon;
}

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use common::daemon::{
    Daemon, Place, ctlfs, is_alive, mount_command, mounts_on, stderr, stdout, wait_until,
    wait_within,
};
use serde_json::Value as Json;

const DOCUMENT: &str = "
families:
  app:
    tables:
      flags:
        fields: {name: string, enabled: integer}
        key: [name]
        rows:
          - {name: one, enabled: 1}
";

/// A place whose ledger holds `app/flags/one`.
fn place() -> Place {
    let place = Place::new();
    let file = place.root().join("config.yaml");
    fs::write(&file, DOCUMENT).unwrap();
    let file = file.to_str().unwrap();
    ok(&ctlfs_at(&place, &["init"]));
    ok(&ctlfs_at(&place, &["apply", "-f", file]));
    place
}

/// Runs a command with the place's origin.
fn ctlfs_at(place: &Place, args: &[&str]) -> Output {
    let origin = place.origin();
    ctlfs()
        .args(args)
        .args(["--origin", &origin])
        .output()
        .unwrap()
}

#[track_caller]
fn ok(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
}

/// A mount in the background: its process is not our child, so it is killed by number.
struct Background<'a> {
    place: &'a Place,
    pid: u32,
}

impl<'a> Background<'a> {
    fn start(place: &'a Place) -> Self {
        let output = Self::try_start(place, &place.state());
        ok(&output);
        let status = ctlfs_status(place);
        let pid = status["pid"].as_u64().unwrap().try_into().unwrap();
        Background { place, pid }
    }

    fn try_start(place: &Place, state: &Path) -> Output {
        ctlfs()
            .args(["mount", "--poll-interval", "10ms", "--origin"])
            .arg(place.origin())
            .arg("--state")
            .arg(state)
            .arg(place.mountpoint())
            .output()
            .unwrap()
    }

    fn signal(&self, signal: i32) {
        // SAFETY: kill takes no pointers; the number is that of the daemon this test started.
        unsafe { libc::kill(self.pid.try_into().unwrap(), signal) };
    }

    fn wait_gone(&self) {
        wait_until("the daemon is gone", || !is_alive(self.pid));
        assert!(mounts_on(&self.place.mountpoint()).is_empty());
    }
}

impl Drop for Background<'_> {
    fn drop(&mut self) {
        if is_alive(self.pid) {
            self.signal(libc::SIGKILL);
        }
    }
}

fn ctlfs_status(place: &Place) -> Json {
    let text = fs::read(place.mountpoint().join(".ctlfs/status.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn enabled(place: &Place) -> String {
    fs::read_to_string(place.mountpoint().join("app/flags/one/enabled")).unwrap()
}

fn unmount(place: &Place) -> Output {
    ctlfs()
        .arg("unmount")
        .arg(place.mountpoint())
        .output()
        .unwrap()
}

#[test]
fn a_mount_goes_to_the_background_and_comes_back_down() {
    let place = place();
    let daemon = Background::start(&place);
    assert_eq!(enabled(&place), "1");

    let put = ["put", "app/flags", "name=one", "enabled=7"];
    ok(&ctlfs_at(&place, &put));
    wait_until("the change is visible", || enabled(&place) == "7");

    let shown = ctlfs()
        .arg("status")
        .arg(place.mountpoint())
        .output()
        .unwrap();
    ok(&shown);
    assert!(
        stdout(&shown).contains("health       ok"),
        "{}",
        stdout(&shown)
    );
    let json = ctlfs()
        .args(["status", "--json"])
        .arg(place.mountpoint())
        .output()
        .unwrap();
    let json: Json = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["health"], "ok");
    assert_eq!(json["counts"]["tables"], 1);
    assert_eq!(json["behind"], 0);

    ok(&unmount(&place));
    // Not "will be": unmount waits for it.
    assert!(!is_alive(daemon.pid));
    assert!(mounts_on(&place.mountpoint()).is_empty());
}

#[test]
fn a_second_mount_is_refused() {
    let place = place();
    let first = Background::start(&place);
    let said = stderr(&Background::try_start(&place, &place.root().join("other")));
    assert!(said.contains("it is already a ctlfs mount"), "{said}");
    assert!(said.contains(&format!("(pid {})", first.pid)), "{said}");
    assert!(said.contains("'ctlfs unmount "), "{said}");

    let elsewhere = Place::new();
    let output = ctlfs()
        .args(["mount", "--origin", &place.origin(), "--state"])
        .arg(place.state())
        .arg(elsewhere.mountpoint())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(
        said.contains(&format!("daemon (pid {})", first.pid)),
        "{said}"
    );
    assert!(mounts_on(&elsewhere.mountpoint()).is_empty());
    assert_eq!(enabled(&place), "1");
    ok(&unmount(&place));
}

#[test]
fn signals_end_a_daemon_even_while_files_are_open() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let place = place();
        let daemon = Background::start(&place);
        let mut open = File::open(place.mountpoint().join("app/flags/one/row.json")).unwrap();
        let mut byte = [0];
        open.read_exact(&mut byte).unwrap();
        daemon.signal(signal);
        daemon.wait_gone();
        // The lock went with it.
        let again = Background::start(&place);
        ok(&unmount(&place));
        again.wait_gone();
    }
}

#[test]
fn a_log_that_cannot_be_written_holds_nothing_up() {
    let place = place();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = mount_command(&place, &place.origin(), &["--poll-interval", "10ms"]);
    command.stderr(writer);
    let daemon = Daemon::start(command, &place.mountpoint());
    // Each of these is logged.
    for state in ["off", "on"] {
        let aside = place.root().join("aside");
        let (from, to) = match state {
            "off" => (place.ledger(), aside),
            _ => (aside, place.ledger()),
        };
        fs::rename(from, to).unwrap();
        daemon.wait_status("the origin comes and goes", |status| {
            status["problem"].is_null() == (state == "on")
        });
    }
    ok(&ctlfs_at(
        &place,
        &["put", "app/flags", "name=one", "enabled=7"],
    ));
    wait_until("the change is shown", || {
        fs::read_to_string(daemon.path("app/flags/one/enabled")).unwrap() == "7"
    });
}

#[test]
fn a_daemon_in_the_background_holds_nothing_of_its_callers() {
    use std::os::fd::AsRawFd;

    let place = place();
    let lock = place.root().join("deploy.lock");
    let held = File::create(&lock).unwrap();
    held.try_lock().unwrap();
    let fd = held.as_raw_fd();
    let mut command = ctlfs();
    command
        .args(["mount", "--origin", &place.origin(), "--state"])
        .arg(place.state())
        .arg(place.mountpoint());
    // SAFETY: fcntl is allowed between fork and exec.
    unsafe {
        command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    ok(&command.output().unwrap());
    let pid = ctlfs_status(&place)["pid"].as_u64().unwrap();
    let _daemon = Background {
        place: &place,
        pid: pid.try_into().unwrap(),
    };
    drop(held);
    // A child of another test that is just being started holds it for a moment.
    wait_until("nobody holds the lock", || {
        File::open(&lock).unwrap().try_lock().is_ok()
    });
}

#[test]
fn a_busy_mount_is_unmounted_all_the_same() {
    let place = place();
    let daemon = Background::start(&place);
    let open = File::open(place.mountpoint().join("app/flags/one/row.json")).unwrap();
    let output = unmount(&place);
    ok(&output);
    assert!(stderr(&output).contains("is in use"), "{}", stderr(&output));
    assert!(!is_alive(daemon.pid));
    assert!(mounts_on(&place.mountpoint()).is_empty());
    drop(open);
}

#[test]
fn an_unmount_from_outside_ends_the_daemon() {
    let place = place();
    let daemon = Background::start(&place);
    let status = std::process::Command::new("umount")
        .arg(place.mountpoint())
        .status()
        .unwrap();
    assert!(status.success());
    daemon.wait_gone();
}

#[test]
fn a_dead_daemons_mount_is_replaced() {
    let place = place();
    let daemon = Background::start(&place);
    daemon.signal(libc::SIGKILL);
    wait_until("it is dead", || !is_alive(daemon.pid));

    let shown = ctlfs()
        .arg("status")
        .arg(place.mountpoint())
        .output()
        .unwrap();
    assert_eq!(shown.status.code(), Some(2));
    assert!(
        stderr(&shown).contains("a stale mount"),
        "{}",
        stderr(&shown)
    );

    let output = Background::try_start(&place, &place.state());
    ok(&output);
    assert!(
        stderr(&output).contains("removed the stale mount of a dead daemon"),
        "{}",
        stderr(&output)
    );
    assert_eq!(mounts_on(&place.mountpoint()).len(), 1);
    assert_eq!(enabled(&place), "1");
    ok(&unmount(&place));
}

#[test]
fn a_dead_daemons_mount_can_be_unmounted() {
    let place = place();
    let daemon = Background::start(&place);
    daemon.signal(libc::SIGKILL);
    wait_until("it is dead", || !is_alive(daemon.pid));
    ok(&unmount(&place));
    assert!(mounts_on(&place.mountpoint()).is_empty());
}

#[test]
fn config_is_readable_while_the_origin_is_gone() {
    let place = place();
    let daemon = Background::start(&place);
    ok(&unmount(&place));
    daemon.wait_gone();

    let away = place.root().join("away.db");
    fs::rename(place.ledger(), &away).unwrap();
    let output = Background::try_start(&place, &place.state());
    ok(&output);
    assert!(
        stderr(&output).contains("cannot reach sqlite://"),
        "{}",
        stderr(&output)
    );
    assert_eq!(enabled(&place), "1");
    let shown = ctlfs()
        .arg("status")
        .arg(place.mountpoint())
        .output()
        .unwrap();
    assert_eq!(shown.status.code(), Some(1));
    assert!(stdout(&shown).contains("stale"), "{}", stdout(&shown));

    fs::rename(&away, place.ledger()).unwrap();
    wait_until("it is in contact again", || {
        ctlfs_status(&place)["health"] == "ok"
    });
    ok(&unmount(&place));
}

#[test]
fn without_config_the_origin_must_answer() {
    let place = Place::new();
    let output = Background::try_start(&place, &place.state());
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("cannot reach sqlite://"),
        "{}",
        stderr(&output)
    );
    assert!(mounts_on(&place.mountpoint()).is_empty());

    File::create(place.ledger()).unwrap();
    let output = Background::try_start(&place, &place.state());
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("ctlfs init"),
        "{}",
        stderr(&output)
    );
    assert!(mounts_on(&place.mountpoint()).is_empty());
}

#[test]
fn an_ldb_of_somebody_else_is_mounted_as_it_is() {
    let place = place();
    let first = Background::start(&place);
    let other = Place::new();
    let mut command = ctlfs();
    command
        .args(["mount", "--foreground", "--check-interval", "10ms", "--ldb"])
        .arg(place.state().join("ldb.db"))
        .arg("--state")
        .arg(other.state())
        .arg(other.mountpoint())
        // One for other commands must not get in the way.
        .env("CTLFS_ORIGIN", place.origin());
    let mut second = Daemon::start(command, &other.mountpoint());
    assert_eq!(enabled(&other), "1");
    let status = second.status();
    assert_eq!(
        (&status["mode"], &status["health"]),
        (&"ldb".into(), &"ok".into())
    );
    assert_eq!(status["origin"], Json::Null);
    ok(&ctlfs_at(
        &place,
        &["put", "app/flags", "name=one", "enabled=2"],
    ));
    wait_until("the change is visible in both", || {
        enabled(&place) == "2" && enabled(&other) == "2"
    });
    second.signal(libc::SIGTERM);
    assert_eq!(second.wait(), Some(0));
    ok(&unmount(&place));
    first.wait_gone();
}

#[test]
fn the_locks_on_somebody_elses_ldb_are_kept() {
    let place = place();
    let first = Background::start(&place);
    let other = Place::new();
    let ldb = place.state().join("ldb.db");
    let mut command = ctlfs();
    command
        .args(["mount", "--foreground", "--check-interval", "10ms", "--ldb"])
        .arg(&ldb)
        .arg("--state")
        .arg(other.state())
        .arg(other.mountpoint());
    let second = Daemon::start(command, &other.mountpoint());
    // POSIX locks go when their process closes any descriptor of the file.
    for _ in 0..20 {
        assert_eq!(second.status()["health"], "ok");
    }
    let inode = format!(":{}", fs::metadata(&ldb).unwrap().ino());
    let pid = second.pid().to_string();
    let locks = fs::read_to_string("/proc/locks").unwrap();
    let held = locks.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.contains(&"POSIX")
            && words.contains(&pid.as_str())
            && words.iter().any(|word| word.ends_with(&inode))
    });
    assert!(held, "{locks}");
    drop(second);
    ok(&unmount(&place));
    first.wait_gone();
}

#[test]
fn an_end_leaves_what_somebody_mounted_on_top() {
    let place = place();
    let mut daemon = Daemon::mount(&place, &[]);
    mount_tmpfs(&place.mountpoint(), 0);
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
    let mounts = mounts_on(&place.mountpoint());
    assert_eq!(mounts.len(), 2, "{mounts:?}");
    assert!(mounts[1].contains(" - tmpfs "), "{mounts:?}");
}

#[test]
fn root_mounts_in_a_read_only_file_system() {
    let place = Place::new();
    ok(&ctlfs_at(&place, &["init"]));
    // Under the place's own mount point, so that it goes away with the place.
    let outer = place.mountpoint();
    mount_tmpfs(&outer, 0);
    let inner = outer.join("ctl");
    fs::create_dir(&inner).unwrap();
    mount_tmpfs(&outer, libc::MS_REMOUNT | libc::MS_RDONLY);
    assert!(fs::create_dir(outer.join("more")).is_err());
    let mut command = ctlfs();
    command
        .args(["mount", "--foreground", "--origin", &place.origin()])
        .arg("--state")
        .arg(place.state())
        .arg(&inner);
    let mut daemon = Daemon::start(command, &inner);
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
}

#[test]
fn a_hangup_under_nohup_changes_nothing() {
    let place = place();
    let mut command =
        common::daemon::mount_command(&place, &place.origin(), &["--poll-interval", "10ms"]);
    // SAFETY: signal is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            Ok(())
        });
    }
    let mut daemon = Daemon::start(command, &place.mountpoint());
    daemon.signal(libc::SIGHUP);
    ok(&ctlfs_at(
        &place,
        &["put", "app/flags", "name=one", "enabled=3"],
    ));
    wait_until("the change is visible", || enabled(&place) == "3");
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
}

#[test]
fn a_state_directory_that_was_open_to_others_is_closed() {
    let place = place();
    let daemon = Background::start(&place);
    ok(&unmount(&place));
    daemon.wait_gone();
    let ldb = place.state().join("ldb.db");
    fs::set_permissions(place.state(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&ldb, fs::Permissions::from_mode(0o644)).unwrap();
    let again = Background::start(&place);
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!((mode(&place.state()), mode(&ldb)), (0o700, 0o600));
    ok(&unmount(&place));
    again.wait_gone();
}

/// Mounts a tmpfs on `path`, or changes it.
fn mount_tmpfs(path: &Path, flags: libc::c_ulong) {
    let target = CString::new(path.as_os_str().as_bytes()).unwrap();
    let kind = c"tmpfs";
    // SAFETY: the strings are NUL-terminated and outlive the call; no options are given.
    let failed = unsafe {
        libc::mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            std::ptr::null(),
        )
    } != 0;
    let error = std::io::Error::last_os_error();
    assert!(!failed, "cannot mount a tmpfs ({error}); run as root");
}

#[test]
fn dev_shows_the_sample_and_cleans_up() {
    let place = Place::new();
    let tree = place.root().join("tree");
    let mut command = ctlfs();
    command
        .args(["dev", "--sample", "--poll-interval", "10ms"])
        .arg(&tree)
        .stdout(Stdio::piped());
    let mut dev = Dev(command.spawn().unwrap(), tree.clone());
    let printed = BufReader::new(dev.0.stdout.take().unwrap());
    let commands: Vec<String> = printed
        .lines()
        .map_while(Result::ok)
        .filter(|line| line.starts_with("  "))
        .take(4)
        .collect();
    assert_eq!(commands.len(), 4);
    // They work as they are printed.
    for command in &commands {
        let output = std::process::Command::new("sh")
            .args(["-c", command])
            .output();
        let output = output.unwrap();
        assert!(output.status.success(), "{command}: {}", stderr(&output));
    }
    let read = |path: &str| fs::read(tree.join(path)).unwrap();
    wait_within(Duration::from_secs(10), "the put is visible", || {
        read("app/flags/new-checkout/enabled") == b"0"
    });
    assert_eq!(read("app/flags/new-checkout/rollout"), b"0.25");
    assert_eq!(
        read("edge/routes/eu/%2Fapi%2Fv2%2Forders/backend"),
        b"orders-eu"
    );
    assert_eq!(
        read("tls/certs/www.example.com/fingerprint"),
        [0xde, 0xad, 0xbe, 0xef, 0, 1, 2, 3, 0xff]
    );
    assert!(read("tls/certs/www.example.com/certificate").starts_with(b"-----BEGIN"));
    assert_eq!(read("tls/revoked/0x01020304/reason"), b"keyCompromise");

    dev.signal(libc::SIGINT);
    let status = dev.0.wait().unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(mounts_on(&tree).is_empty());
    assert!(!tree.exists(), "dev created it, so dev removes it");
    assert!(place.root().join("tree.state/ledger.db").exists());
}

/// A `ctlfs dev`, killed and detached however the test ends.
struct Dev(std::process::Child, std::path::PathBuf);

impl Dev {
    fn signal(&self, signal: i32) {
        // SAFETY: kill takes no pointers; the process is our child and not yet waited for.
        unsafe { libc::kill(self.0.id().try_into().unwrap(), signal) };
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        common::daemon::detach_all(&self.1);
    }
}
