//! What the thread that announces changes is answered: it alone is shown what a name led to before
//! the commit, and the entries that move in.
//!
//! It is told apart by the number of the thread that makes the request. Everybody else is answered
//! as ever.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::server::{Attributes, Content, Fault, Found, Lookup, Server};
use super::state::{Entered, ROOT, Version};
use crate::ldb::reader::Mark;
use crate::model::Seq;
use crate::tree::node::Node;

/// At most so many inodes are remembered as replaced by one flip.
pub(super) const MAX_SUPERSEDED: usize = 32_768;

/// What the announcing thread is answered.
#[derive(Debug, Default)]
pub(super) struct Announcing {
    /// Whether changes are announced at all.
    pub(super) on: bool,
    /// The name of the directory, in the root, that entries move in from.
    pub(super) stage_name: Vec<u8>,
    /// Its inode.
    pub(super) stage: Option<u64>,
    /// Whether a commit has happened that is not announced yet. Until then nobody may remember that
    /// a name is absent: the kernel would take it for so when the announcing thread removes it.
    pub(super) pending: bool,
    /// What the last flip moved on from.
    pub(super) superseded: Vec<(Node, u64)>,
    pub(super) staged: HashMap<Vec<u8>, Node>,
    /// By the directory's place: which inode it has may change while it is removed.
    pub(super) targets: HashMap<(Node, Vec<u8>), Target>,
    /// Numbers the staged entries.
    pub(super) next: u64,
}

/// What a name leads to for the announcing thread.
#[derive(Debug, Clone)]
pub(super) enum Target {
    /// To nothing; `makes` is what a directory of that name becomes.
    Absent {
        /// The place that is made.
        makes: Option<Node>,
    },
    /// To the inode that was there before the commit, or nothing if the kernel has dropped it.
    Old(u64),
    /// To the inode that was there before the commit, or one that nobody else has: something has to
    /// be there for it to be removed.
    Going(Option<u64>, Node),
    /// To an entry that moves in.
    Staged(Node),
}

impl Announcing {
    /// Notes that `node` has moved on from `ino`.
    pub(super) fn note(&mut self, node: &Node, ino: u64) {
        // There are a few of these for each table, and whoever watches for the table has them.
        let of_table = matches!(node, Node::TableFile(..) | Node::Export(..));
        if self.on && (of_table || self.superseded.len() < MAX_SUPERSEDED) {
            self.superseded.push((node.clone(), ino));
        }
    }

    /// What the announcing thread is to see of `name` in the directory `parent`, which has the inode
    /// `ino`; `None` for what everybody sees.
    fn target(&self, ino: u64, parent: &Node, name: &[u8]) -> Option<Target> {
        if Some(ino) == self.stage {
            return self.staged.get(name).cloned().map(Target::Staged);
        }
        self.targets.get(&(parent.clone(), name.to_vec())).cloned()
    }

    /// Everything has been announced.
    pub(super) fn clear(&mut self) {
        self.pending = false;
        self.staged.clear();
        self.targets.clear();
    }
}

impl Server {
    /// Whether a request of the thread `tid` is the announcing thread's.
    pub(super) fn is_announcer(&self, tid: u32) -> bool {
        tid != 0 && self.announcer.load(Ordering::Acquire) == tid
    }

    /// Whether the removal of `name` from `parent` is to be announced. The announcing thread may be
    /// late, and the place have come back meanwhile.
    pub(super) fn announces_removal(&self, parent: u64, name: &[u8]) -> bool {
        let state = self.state();
        let target = state
            .slot(parent)
            .and_then(|slot| state.announcing.target(parent, &slot.node, name));
        matches!(target, Some(Target::Going(..)))
    }

    /// A name as the announcing thread sees it.
    pub(super) fn lookup_announcing(&self, parent: u64, name: &[u8]) -> Result<Lookup, Fault> {
        let target = {
            let mut state = self.state();
            if parent == ROOT && name == state.announcing.stage_name {
                let entered = state.enter_stage();
                drop(state);
                return Ok(self.stage(entered));
            }
            let directory = &state.slot(parent).ok_or(Fault::Stale)?.node;
            state.announcing.target(parent, directory, name)
        };
        match target {
            None => self.lookup(parent, name),
            Some(Target::Staged(node)) => self.lookup_node(parent, name, node),
            Some(Target::Absent { .. }) => Ok(Lookup::Absent(Duration::ZERO)),
            // The kernel may have dropped it, and with it every watch.
            Some(Target::Old(ino)) => {
                let shown = self.show_old(ino);
                Ok(shown.unwrap_or(Lookup::Absent(Duration::ZERO)))
            }
            Some(Target::Going(ino, node)) => {
                let shown = ino.and_then(|ino| self.show_old(ino));
                Ok(shown.unwrap_or_else(|| self.ghost(node)))
            }
        }
    }

    /// Hands a superseded inode to the kernel once more; `None` if it has dropped it.
    fn show_old(&self, ino: u64) -> Option<Lookup> {
        let attributes = self.old_attributes(ino)?;
        self.state().enter_old(ino).then(|| shown_once(attributes))
    }

    /// The attributes of a superseded inode, as the kernel has them; `None` if it does not.
    fn old_attributes(&self, ino: u64) -> Option<Attributes> {
        let unmade = {
            let state = self.state();
            let slot = state.slot(ino)?;
            match &slot.node {
                node @ Node::Export(_, file) if slot.version.is_none() => {
                    Some((node.clone(), *file))
                }
                _ => None,
            }
        };
        match unmade {
            // As a lookup answered: another size would cut off what the kernel has cached.
            Some((node, file)) => {
                let found = Found {
                    size: self.size_before(file),
                    ..self.nothing()
                };
                Some(self.attributes(&node, ino, &found, 1))
            }
            None => self.getattr(ino).ok().map(|(attributes, _)| attributes),
        }
    }

    /// Makes the directory `name` in `parent`, as an announcement has it.
    pub(super) fn make_announced(&self, parent: u64, name: &[u8]) -> Result<Lookup, Fault> {
        let target = {
            let state = self.state();
            let directory = &state.slot(parent).ok_or(Fault::Stale)?.node;
            state.announcing.target(parent, directory, name)
        };
        match target {
            Some(Target::Absent { makes: Some(node) }) => self.lookup_node(parent, name, node),
            _ => Err(Fault::NotFound),
        }
    }

    /// The directory that entries move in from.
    fn stage(&self, entered: Entered) -> Lookup {
        let found = self.nothing();
        Lookup::Found {
            attributes: self.attributes(&Node::Control, entered.ino, &found, 1),
            entry_ttl: entered.entry_ttl,
            attr_ttl: entered.attr_ttl,
        }
    }

    /// An inode for something that is removed before anybody else sees it.
    fn ghost(&self, node: Node) -> Lookup {
        let found = self.nothing();
        let version = Arc::new(Version {
            bytes: None,
            mark: found.mark,
        });
        let entered = self.state().enter_frozen(node.clone(), version);
        shown_once(self.attributes(&node, entered.ino, &found, 1))
    }

    fn nothing(&self) -> Found {
        Found {
            size: 0,
            mark: Mark {
                seq: Seq::ZERO,
                time: self.started,
            },
            content: Content::None,
        }
    }
}

/// An entry that the kernel asks for again at each use.
fn shown_once(attributes: Attributes) -> Lookup {
    Lookup::Found {
        // A name leads to it, for this one thread.
        attributes: Attributes {
            links: 1,
            ..attributes
        },
        entry_ttl: Duration::ZERO,
        attr_ttl: Duration::ZERO,
    }
}
