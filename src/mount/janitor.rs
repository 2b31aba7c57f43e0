//! The thread that keeps pins within their bounds, and takes from the kernel what it holds of those
//! that were dropped.
//!
//! A notification waits for lookups in flight, so it is sent from this thread of its own, with no
//! lock held. A pin is marked as dropped first: a lookup that registers after that is turned back
//! ([`super::state::State::settle`]), one that did before is found here.

use std::io;
use std::sync::Arc;
use std::thread;

use super::observer::Kernel;
use super::pins::Ended;
use super::server::Server;
use crate::tree::node::Node;

/// The thread. It ends when this is dropped.
pub(super) struct Janitor {
    server: Arc<Server>,
}

impl Janitor {
    pub(super) fn start(server: &Arc<Server>, kernel: impl Kernel + 'static) -> io::Result<Self> {
        let janitor = Janitor {
            server: Arc::clone(server),
        };
        let server = Arc::clone(server);
        thread::Builder::new().name("pins".into()).spawn(move || {
            while server.pins.wait() {
                tidy(&server, &kernel);
            }
        })?;
        Ok(janitor)
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        self.server.pins.close();
    }
}

/// Looks at the bounds once.
pub(super) fn tidy(server: &Server, kernel: &impl Kernel) {
    let Ended { pins, names } = server.pins.enforce();
    let mut entries = Vec::new();
    {
        let state = server.state();
        for pin in &pins {
            entries.extend(state.entries_of(pin));
        }
        if let Some(directory) = state.ino(&Node::Pins) {
            let names = names.into_iter().map(|name| (directory, name.into_vec()));
            entries.extend(names);
        }
    }
    drop(pins);
    for (parent, name) in entries {
        // Fails for what the kernel has dropped by itself, and while the mount goes away.
        let _ = kernel.invalidate_entry(parent, &name);
    }
    server.pins.shrink();
}
