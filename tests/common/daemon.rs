//! Runs the `ctlfs` program on directories of a test's own, and takes everything away again.
//!
//! [`Daemon`] is the guard: when it goes, however the test ends, its process is killed and its
//! mount detached. Nothing here waits without a deadline.
#![allow(dead_code)]

use std::ffi::{CString, OsStr};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value as Json;

/// Long enough for a loaded machine; a test that works never waits for it.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Sets a flag when it goes, also when a test fails: the threads that wait for the flag are waited
/// for.
pub struct EndOnDrop<'a>(pub &'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Polls `condition` until it holds; panics with `what` when it does not in time.
pub fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    wait_within(DEADLINE, what, condition);
}

/// The same with a deadline of the caller's.
pub fn wait_within(deadline: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !condition() {
        assert!(
            Instant::now() < end,
            "waited {deadline:?} in vain until {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The program, with an environment that does not depend on the caller's.
pub fn ctlfs() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ctlfs"));
    command
        .env_remove("CTLFS_ORIGIN")
        .env_remove("CTLFS_LOG")
        .stdin(Stdio::null());
    command
}

/// Runs the program to its end; kills it when that does not come.
pub fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    let program = ctlfs();
    let mut command = Command::new("timeout");
    command
        .args(["-s", "KILL", "120"])
        .arg(program.get_program());
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("the program can be started")
}

/// Copies the program, for users who may not enter its own directory. By another process: a child
/// of this one that is just being started would hold the copy open for writing, and it could not be
/// run.
pub fn copy_program(to: &Path) {
    let copied = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_ctlfs"))
        .arg(to)
        .status();
    assert!(copied.expect("cp can be run").success());
}

/// What a command printed on standard error.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What a command printed on standard output.
pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The lines of mountinfo for a mount on `path`; empty when there is none.
pub fn mounts_on(path: &Path) -> Vec<String> {
    let wanted = path.to_str().expect("test paths are UTF-8");
    fs::read_to_string("/proc/self/mountinfo")
        .expect("mountinfo can be read")
        .lines()
        .filter(|line| line.split(' ').nth(4) == Some(wanted))
        .map(str::to_owned)
        .collect()
}

/// Whether a process with this number exists and is no zombie.
pub fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']))
    })
}

/// Directories for one mount: removed at the end, whatever is mounted there.
pub struct Place {
    root: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let place = Place {
            root: tempfile::tempdir().expect("a temporary directory"),
        };
        fs::create_dir(place.mountpoint()).expect("a mount point");
        place
    }

    pub fn root(&self) -> PathBuf {
        self.root.path().canonicalize().expect("it exists")
    }

    pub fn mountpoint(&self) -> PathBuf {
        self.root().join("ctl")
    }

    pub fn state(&self) -> PathBuf {
        self.root().join("state")
    }

    /// The embedded ledger of this place.
    pub fn ledger(&self) -> PathBuf {
        self.root().join("ledger.db")
    }

    pub fn origin(&self) -> String {
        format!("sqlite://{}", self.ledger().display())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        detach_all(&self.mountpoint());
    }
}

/// Detaches whatever is mounted on `path`.
pub fn detach_all(path: &Path) {
    let name = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
    while !mounts_on(path).is_empty() {
        // SAFETY: `name` is a NUL-terminated string that outlives the call.
        let failed = unsafe { libc::umount2(name.as_ptr(), libc::MNT_DETACH) } != 0;
        if failed {
            let helped = Command::new("fusermount3")
                .args(["-u", "-z", "--"])
                .arg(path)
                .stderr(Stdio::null())
                .status();
            if !helped.is_ok_and(|status| status.success()) {
                return;
            }
        }
    }
}

/// `ctlfs mount --foreground` in the directories of `place`.
pub fn mount_command(place: &Place, origin: &str, extra: &[&str]) -> Command {
    let mut command = ctlfs();
    command
        .args(["mount", "--foreground", "--origin", origin, "--state"])
        .arg(place.state())
        .args(extra)
        .arg(place.mountpoint());
    command
}

/// A daemon in the foreground, as a child of the test.
pub struct Daemon {
    child: Child,
    mountpoint: PathBuf,
}

impl Daemon {
    /// Starts `ctlfs mount --foreground` with `extra` arguments on a place's ledger, and waits until
    /// the tree is readable.
    pub fn mount(place: &Place, extra: &[&str]) -> Self {
        let mut args = vec!["--poll-interval", "10ms"];
        args.extend(extra);
        Self::follow(place, &place.origin(), &args)
    }

    /// The same for a ledger that takes long to replay.
    pub fn mount_within(deadline: Duration, place: &Place, extra: &[&str]) -> Self {
        let mut args = vec!["--poll-interval", "10ms"];
        args.extend(extra);
        let command = mount_command(place, &place.origin(), &args);
        Self::start_within(deadline, command, &place.mountpoint())
    }

    /// The same on any origin, with no arguments of its own.
    pub fn follow(place: &Place, origin: &str, extra: &[&str]) -> Self {
        Self::start(mount_command(place, origin, extra), &place.mountpoint())
    }

    /// Starts any command of the program that mounts in the foreground.
    pub fn start(command: Command, mountpoint: &Path) -> Self {
        Self::start_within(DEADLINE, command, mountpoint)
    }

    fn start_within(deadline: Duration, mut command: Command, mountpoint: &Path) -> Self {
        let child = command.spawn().expect("the program can be started");
        let mut daemon = Daemon {
            child,
            mountpoint: mountpoint.to_owned(),
        };
        wait_within(deadline, "the tree is mounted and ready", || {
            if let Some(status) = daemon.child.try_wait().expect("it is our child") {
                panic!("the daemon ended: {status}");
            }
            daemon.try_status().is_some_and(|s| s["ready"] == true)
        });
        daemon
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// A path in the tree.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.mountpoint.join(path)
    }

    fn try_status(&self) -> Option<Json> {
        serde_json::from_slice(&fs::read(self.path(".ctlfs/status.json")).ok()?).ok()
    }

    /// status.json as it is now.
    pub fn status(&self) -> Json {
        self.try_status().expect("status.json can be read")
    }

    /// The position that the tree shows.
    pub fn seq(&self) -> u64 {
        let text = fs::read_to_string(self.path(".ctlfs/seq")).expect("seq can be read");
        text.trim_end().parse().expect("a sequence")
    }

    /// Waits until the tree shows the ledger up to `seq`.
    pub fn wait_seq(&self, seq: u64) {
        wait_until(&format!("the tree is at {seq}"), || self.seq() >= seq);
    }

    /// Waits until status.json satisfies `condition`.
    pub fn wait_status(&self, what: &str, condition: impl Fn(&Json) -> bool) {
        wait_until(what, || self.try_status().is_some_and(|s| condition(&s)));
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).expect("process numbers fit");
        // SAFETY: kill takes no pointers; the process is our child and not yet waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "cannot signal");
    }

    /// Waits for the end; gives the exit status, or `None` after a signal.
    pub fn wait(&mut self) -> Option<i32> {
        let mut status = None;
        wait_until("the daemon has ended", || {
            status = self.child.try_wait().expect("it is our child");
            status.is_some()
        });
        status.and_then(|status| status.code())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already; if it cannot end, that is not waited for.
        let _ = self.child.kill();
        let end = Instant::now() + DEADLINE;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        detach_all(&self.mountpoint);
    }
}
