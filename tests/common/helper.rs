//! Processes of a test's own: the test binary runs itself once more, with one of its `#[ignore]`d
//! tests as the program, so that what reads a mount is a process like any other.
#![allow(dead_code)]

use std::io::Read;
use std::process::{Child, Command, Stdio};

use serde_json::Value as Json;

/// What a helper is told, as JSON.
const JOB: &str = "CTLFS_TEST_HELPER_JOB";
/// What stands before a helper's answer.
const ANSWER: &str = "helper-answer: ";

/// A running helper; killed when this goes.
pub struct Helper(Child);

impl Helper {
    /// Runs the `#[ignore]`d test `name` of this binary with `job`.
    pub fn start(name: &str, job: &Json) -> Self {
        let child = Command::new(std::env::current_exe().expect("a test binary has a path"))
            .args(["--exact", name, "--ignored", "--nocapture"])
            .env(JOB, job.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test binary can be started");
        Helper(child)
    }

    /// Waits for its end and gives its answer.
    pub fn finish(mut self) -> Json {
        let mut printed = String::new();
        let out = self.0.stdout.as_mut().expect("it is piped");
        out.read_to_string(&mut printed).expect("it prints text");
        let status = self.0.wait().expect("it is our child");
        assert!(status.success(), "a helper failed: {status}\n{printed}");
        let (_, rest) = printed.split_once(ANSWER).expect("a helper answers");
        let line = rest.lines().next().unwrap_or_default();
        serde_json::from_str(line).expect("answers are JSON")
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What this process is to do; `None`, with a word about it, when it was not started as a helper.
pub fn job() -> Option<Json> {
    let Ok(job) = std::env::var(JOB) else {
        println!("this is a process of other tests; by itself it does nothing");
        return None;
    };
    Some(serde_json::from_str(&job).expect("jobs are JSON"))
}

/// Gives the answer.
pub fn answer(answer: &Json) {
    println!("{ANSWER}{answer}");
}
