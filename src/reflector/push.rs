//! Push as the reflector uses it: a thread that listens to the origin, wakes the reflector, and keeps
//! the board up to date.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tracing::{error, info, warn};

use super::StopHandle;
use crate::ledger::push::{Listener, Push, PushState};
use crate::model::Seq;
use crate::status::{self, ProblemKind, StatusBoard};

/// The pause after a panic of the listening thread.
const AFTER_PANIC: Duration = Duration::from_secs(60);

/// Starts the thread that listens. It ends soon after `stop`.
pub(super) fn start(
    mut push: Box<dyn Push>,
    stop: &StopHandle,
    board: &Arc<StatusBoard>,
    poll_interval: Duration,
) {
    let ear = Ear {
        stop: stop.clone(),
        board: Arc::clone(board),
        poll_interval,
    };
    ear.board.update(|p| p.push.state = PushState::Connecting);
    let started = std::thread::Builder::new()
        .name("push".into())
        .spawn(move || {
            while !ear.is_stopped() {
                // It reads what a server sends with code of others, and is not needed to go on.
                if catch_unwind(AssertUnwindSafe(|| push.run(&ear))).is_ok() {
                    break;
                }
                error!("push failed unexpectedly; it starts again in a while");
                ear.state(PushState::Off, Some("it failed unexpectedly".into()));
                ear.stop.wait_stopped(AFTER_PANIC);
            }
        });
    if let Err(error) = started {
        let reason = format!("cannot start a thread for it: {error}");
        warn!("push is off: {reason}");
        board.update(|p| {
            p.push = status::Push {
                state: PushState::Off,
                reason: Some(reason),
            };
        });
    }
}

/// What the thread tells reaches the reflector and the board.
struct Ear {
    stop: StopHandle,
    board: Arc<StatusBoard>,
    poll_interval: Duration,
}

impl Listener for Ear {
    fn changed(&self, seq: Option<Seq>) {
        match seq {
            Some(seq) => {
                self.board.update(|p| {
                    if Some(seq) >= p.origin_last {
                        p.saw_last(seq, SystemTime::now());
                    }
                });
                self.stop.wake_for(seq);
            }
            None => self.stop.wake(),
        }
    }

    fn contact(&self, quiet: bool) {
        self.board.update(|p| {
            // While the ledger cannot be read, it is no use that the server lives.
            if (p.problem.as_ref()).is_some_and(|problem| problem.kind == ProblemKind::Origin) {
                return;
            }
            let now = SystemTime::now();
            p.last_contact = Some(now);
            if quiet && p.problem.is_none() && p.origin_last == Some(p.applied) {
                p.origin_last_seen = Some(now);
                if p.caught_up.is_some() {
                    p.caught_up = Some(now);
                }
            }
        });
    }

    fn state(&self, state: PushState, reason: Option<String>) {
        let now = status::Push { state, reason };
        let mut before = None;
        self.board.update(|p| {
            before = Some(std::mem::replace(&mut p.push, now.clone()));
        });
        if before.as_ref() == Some(&now) {
            return;
        }
        let reason = now.reason.as_deref().unwrap_or_default();
        let was_so = before.is_some_and(|b| b.state == state && b.reason.is_some());
        match now.state {
            PushState::On => info!("changes are pushed"),
            PushState::Off => warn!(
                "push is off, polling every {}: {reason}",
                humantime::format_duration(self.poll_interval)
            ),
            // Once for each outage, whatever it is called from one attempt to the next.
            PushState::Connecting if was_so => {}
            PushState::Connecting => warn!(
                "push is interrupted, polling every {}: {reason}",
                humantime::format_duration(self.poll_interval)
            ),
        }
        // Another state is another pace; and what broke may have kept something back.
        if !was_so {
            self.stop.wake();
        }
    }

    fn is_stopped(&self) -> bool {
        self.stop.is_stopped()
    }

    fn on_stop(&self, call: Box<dyn FnOnce() + Send>) {
        self.stop.on_stop(call);
    }
}

/// Says, once for each stream, that it does not tell of everything, and why that may be so.
pub(super) fn distrust(board: &StatusBoard, poll_interval: Duration, why: &str) {
    let mut new = None;
    board.update(|p| {
        if p.push.state == PushState::On && p.push.reason.is_none() {
            let reason = format!("an entry appeared that push did not tell of: {why}");
            p.push.reason = Some(reason.clone());
            new = Some(reason);
        }
    });
    if let Some(reason) = new {
        warn!(
            "polling every {} besides: {reason}",
            humantime::format_duration(poll_interval)
        );
    }
}
