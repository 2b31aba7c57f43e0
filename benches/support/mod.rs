//! What the benchmarks share: percentiles, tables, scratch directories and the daemon under test.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Durations of one kind of operation.
#[derive(Default)]
pub struct Sample(Vec<u64>);

impl Sample {
    /// None yet.
    pub const fn new() -> Self {
        Sample(Vec::new())
    }

    /// Times `operation` once.
    pub fn time<T>(&mut self, operation: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = operation();
        self.0
            .push(u64::try_from(start.elapsed().as_nanos()).unwrap());
        result
    }

    /// Adds an operation that was timed elsewhere.
    pub fn add(&mut self, took: Duration) {
        self.0.push(u64::try_from(took.as_nanos()).unwrap());
    }

    /// The `q` quantile in microseconds.
    pub fn quantile(&mut self, q: f64) -> f64 {
        self.0.sort_unstable();
        let last = self.0.len() - 1;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let index = (last as f64 * q).round() as usize;
        self.0[index] as f64 / 1000.0
    }

    /// A row of the table: name, median, 99th percentile, in microseconds.
    pub fn row(&mut self, name: &str) -> String {
        format!(
            "| {name} | {:.1} µs | {:.1} µs |",
            self.quantile(0.5),
            self.quantile(0.99)
        )
    }
}

/// A small generator of numbers without a pattern (SplitMix64); the same ones in each run.
pub struct Numbers(pub u64);

impl Numbers {
    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// A `ctlfs mount` that ends with this value.
pub struct Daemon {
    child: Child,
    /// Where the tree is.
    pub mountpoint: PathBuf,
}

impl Daemon {
    /// Mounts in the foreground and waits for `first`, a path below the mount point, to be
    /// readable; says how long that took.
    pub fn mount(mountpoint: &Path, arguments: &[&str], first: &str) -> (Self, Duration) {
        std::fs::create_dir_all(mountpoint).unwrap();
        let start = Instant::now();
        let child = Command::new(env!("CARGO_BIN_EXE_ctlfs"))
            .args(["mount", "--foreground", "--log-level", "warn"])
            .args(arguments)
            .arg(mountpoint)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let daemon = Daemon {
            child,
            mountpoint: mountpoint.to_owned(),
        };
        while std::fs::read(mountpoint.join(first)).is_err() {
            assert!(
                start.elapsed() < Duration::from_secs(600),
                "the mount did not become readable"
            );
            std::thread::sleep(Duration::from_micros(500));
        }
        (daemon, start.elapsed())
    }

    /// A number of `/proc/PID/status`, in MiB.
    pub fn memory(&self, field: &str) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|l| l.starts_with(field)).unwrap();
        let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib / 1024.0
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `status.json`.
    pub fn status(&self) -> serde_json::Value {
        let text = std::fs::read(self.mountpoint.join(".ctlfs/status.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}

/// Lets a process, with all its threads, run on these processors only.
pub fn pin(process: u32, processors: &str) {
    let status = Command::new("taskset")
        .args(["-a", "-p", "-c", processors, &process.to_string()])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = Command::new(env!("CARGO_BIN_EXE_ctlfs"))
            .arg("unmount")
            .arg(&self.mountpoint)
            .stdout(Stdio::null())
            .status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
