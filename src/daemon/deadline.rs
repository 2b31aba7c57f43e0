//! Calls that may never return, given a deadline: anything that asks a FUSE mount something waits
//! for its daemon, which may be stopped.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Runs `call` on a thread of its own and gives its answer, or `None` when there is none in time.
/// The thread is then left behind, and ends with its call or with the process.
pub(crate) fn call<T: Send + 'static>(
    limit: Duration,
    call: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (send, receive) = mpsc::channel();
    thread::Builder::new()
        .name("asking".into())
        .spawn(move || {
            // Nobody listens any more after the deadline.
            let _ = send.send(call());
        })
        .ok()?;
    receive.recv_timeout(limit).ok()
}

/// Polls `done` until it holds or the time is up; says whether it held.
pub(crate) fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
}
