//! A program that watches files and prints what it sees, line by line.
#![allow(dead_code)]

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use super::daemon::DEADLINE;

/// A running program; killed, with whatever it has started, when this goes.
pub struct Watcher {
    child: Child,
    what: String,
    lines: Receiver<(Instant, String)>,
}

impl Watcher {
    /// Starts a command; its lines, from standard output and standard error, are noted with the
    /// time at which they came.
    pub fn start(command: &mut Command) -> Self {
        let what = format!("{command:?}");
        let mut child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {what}: {error}"));
        let (send, lines) = channel();
        let streams: [Box<dyn std::io::Read + Send>; 2] = [
            Box::new(child.stdout.take().expect("it is piped")),
            Box::new(child.stderr.take().expect("it is piped")),
        ];
        for stream in streams {
            let send = send.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                    let line = String::from_utf8_lossy(&line).into_owned();
                    if send.send((Instant::now(), line)).is_err() {
                        break;
                    }
                }
            });
        }
        Watcher { child, what, lines }
    }

    /// `inotifywait -m` on `paths`, once it watches.
    pub fn inotifywait<S: AsRef<std::ffi::OsStr>>(args: &[&str], paths: &[S]) -> Self {
        let mut command = Command::new("inotifywait");
        command.args(["-m", "--format", "%e %w%f"]);
        command.args(args).args(paths);
        let watcher = Watcher::start(&mut command);
        watcher.wait_for("Watches established.");
        watcher
    }

    /// The next line, and when it came.
    #[track_caller]
    pub fn next(&self) -> (Instant, String) {
        self.next_before(Instant::now() + DEADLINE)
    }

    #[track_caller]
    fn next_before(&self, end: Instant) -> (Instant, String) {
        let left = end.saturating_duration_since(Instant::now());
        let line = self.lines.recv_timeout(left);
        line.unwrap_or_else(|error| panic!("{} does not say it: {error}", self.what))
    }

    /// The lines up to the one that ends like this, without it.
    #[track_caller]
    pub fn until(&self, end: &str) -> Vec<String> {
        let deadline = Instant::now() + DEADLINE;
        let mut lines = Vec::new();
        loop {
            let (_, line) = self.next_before(deadline);
            if line.ends_with(end) {
                return lines;
            }
            lines.push(line);
        }
    }

    /// Waits for a line that ends like this.
    #[track_caller]
    pub fn wait_for(&self, end: &str) {
        self.until(end);
    }

    /// The processes of its group, itself first.
    pub fn pids(&self) -> Vec<u32> {
        let own = self.child.id();
        let in_group = |pid: &u32| {
            // The group is the third word behind the name, which may hold anything.
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
            rest.split(' ').nth(2) == Some(own.to_string().as_str())
        };
        let entries = std::fs::read_dir("/proc").expect("there is a /proc");
        let pids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
        std::iter::once(own)
            .chain(pids.filter(|pid| *pid != own).filter(in_group))
            .collect()
    }

    /// What has come and was not looked at.
    pub fn rest(&self) -> Vec<(Instant, String)> {
        self.lines.try_iter().collect()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // The group stays until the child is waited for, so the number is no other's.
        if let Ok(group) = i32::try_from(self.child.id()) {
            // SAFETY: kill takes no pointers.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
        let _ = self.child.wait();
    }
}
