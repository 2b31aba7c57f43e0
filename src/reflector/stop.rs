//! How the reflector's thread is told to stop, or to look at its origin now, also while it waits.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::model::Seq;

/// Stops a reflector. Clones stop the same one.
#[derive(Debug, Clone, Default)]
pub struct StopHandle(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    flag: Arc<AtomicBool>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stopped: bool,
    wakes: Wakes,
    /// What [`StopHandle::stop`] calls.
    on_stop: Vec<Box<dyn FnOnce() + Send>>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stopped: {}, {:?}", self.stopped, self.wakes)
    }
}

/// The calls for a look that came since they were last taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Wakes {
    /// The highest sequence that the ledger was said to have.
    pub(super) known: Option<Seq>,
    /// Something happened that has no sequence.
    pub(super) unknown: bool,
}

impl Wakes {
    pub(super) fn any(self) -> bool {
        self.unknown || self.known.is_some()
    }
}

impl StopHandle {
    /// A handle that has not been used.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the reflector to stop. It commits nothing more, and returns soon.
    pub fn stop(&self) {
        self.0.flag.store(true, Ordering::Relaxed);
        let mut calls = Vec::new();
        self.change(|state| {
            state.stopped = true;
            calls = std::mem::take(&mut state.on_stop);
        });
        for call in calls {
            call();
        }
    }

    /// Makes the reflector look at its origin now instead of at the end of its interval.
    pub fn wake(&self) {
        self.change(|state| state.wakes.unknown = true);
    }

    /// Makes the reflector look now, and again soon, until it finds this sequence: the ledger has
    /// it, or is about to.
    pub fn wake_for(&self, seq: Seq) {
        self.change(|state| state.wakes.known = state.wakes.known.max(Some(seq)));
    }

    /// Whether [`StopHandle::stop`] was called.
    pub fn is_stopped(&self) -> bool {
        self.0.flag.load(Ordering::Relaxed)
    }

    /// The flag that [`StopHandle::stop`] sets, for code that cannot wait on a handle.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0.flag)
    }

    /// Has `call` called once by [`StopHandle::stop`]; at once if that was called already.
    pub(super) fn on_stop(&self, call: Box<dyn FnOnce() + Send>) {
        let mut late = Some(call);
        self.change(|state| {
            if !state.stopped {
                state.on_stop.extend(late.take());
            }
        });
        if let Some(call) = late {
            call();
        }
    }

    /// Takes the calls for a look. Whoever takes them looks afterwards, so that none is lost.
    pub(super) fn take_wakes(&self) -> Wakes {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut state.wakes)
    }

    /// Waits for `timeout`, less if stopped or woken. Returns whether it was stopped.
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        let until = Instant::now().checked_add(timeout);
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.stopped || state.wakes.any() {
                return state.stopped;
            }
            let left = until.map_or(timeout, |u| u.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return false;
            }
            state = self
                .0
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for `timeout`, less if stopped, whoever wakes meanwhile.
    pub(super) fn wait_stopped(&self, timeout: Duration) {
        let state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .0
            .changed
            .wait_timeout_while(state, timeout, |state| !state.stopped);
        drop(waited);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        drop(state);
        self.0.changed.notify_all();
    }
}
