//! Push: what an origin offers so that a change is looked for the moment it is made.
//!
//! A push never reads the ledger and never says what has changed: it says *that*, and the
//! reflector then reads as always. So whatever it misses, the polling underneath finds.

use std::time::Duration;

use crate::model::Seq;

/// Learns of changes of a ledger as they are made.
pub trait Push: Send {
    /// Tells `listener` until that is stopped. It has a thread of its own, and reconnects by
    /// itself for as long as it takes.
    fn run(&mut self, listener: &dyn Listener);

    /// How to look for a change that was told of without a sequence.
    fn settling(&self) -> Settling;

    /// Why it may not tell of a change.
    fn blind_spot(&self) -> &'static str;
}

/// How a change that was told of becomes one that can be read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Settling {
    /// How long that may take.
    pub within: Duration,
    /// The longest pause between looks in the first second, where looks are cheap.
    pub pause: Option<Duration>,
}

/// Whoever wants to know.
pub trait Listener: Send + Sync {
    /// The ledger has changed, or is about to: an event can come before the change can be read.
    /// `seq` is an entry that it then has; `None` when that is not known.
    fn changed(&self, seq: Option<Seq>);

    /// The origin is there. `quiet`: and everything that happened there until now was told.
    fn contact(&self, quiet: bool);

    /// How push is doing; said again whenever that changes.
    fn state(&self, state: PushState, reason: Option<String>);

    /// Whether to end.
    fn is_stopped(&self) -> bool;

    /// Has `call` called, once and from any thread, when it is time to end; at once if it is.
    fn on_stop(&self, call: Box<dyn FnOnce() + Send>);
}

/// How push is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PushState {
    /// There is none: the origin is polled.
    #[default]
    Off,
    /// It is being set up or has just broken: the origin is polled meanwhile.
    Connecting,
    /// Changes are told as they are made.
    On,
}

impl PushState {
    /// The word in status.json.
    pub fn as_str(self) -> &'static str {
        match self {
            PushState::Off => "off",
            PushState::Connecting => "connecting",
            PushState::On => "on",
        }
    }
}
