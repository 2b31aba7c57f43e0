//! What the tree answers: lookups, attributes, contents and listings, without a word of FUSE.
//!
//! Every answer is computed in the same way: take the present view, read the LDB (or a row read
//! lately), then, under the lock, check that both belong to one position ([`State::settle`]) and
//! register what is handed out. If a commit came in between, start over.
//!
//! Lock order: an open directory's lock, then the state's. Neither is held while the LDB is read
//! or a file touched, except that a directory's own lock is held while its listing goes on. Nothing
//! here waits for the reflector.

use std::hash::RandomState;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::counters::Announcements;
use super::dirs::OpenDirs;
use super::flip::Touch;
use super::kept::{Keeper, slice};
use super::load::CachedRow;
use super::readers::Readers;
use super::state::{Entered, LONG, Lifetimes, State, Version, View};
use super::{MountCounters, StatusSource};
use crate::ldb::LdbError;
use crate::ldb::reader::{At, Mark, Reader};
use crate::model::{LedgerTime, Seq, Table};
use crate::status::StatusBoard;
use crate::tree::access::AccessRules;
use crate::tree::name;
use crate::tree::node::{self, Node, Step};

/// Rows read lately are kept up to about this many bytes.
const ROW_CACHE: usize = 16 << 20;
/// Superseded versions are kept in memory up to this many bytes, beyond it in a file.
const KEPT_IN_MEMORY: u64 = 32 << 20;
/// An answer is computed anew when a commit comes in between. So many in a row mean a defect.
const MAX_TRIES: usize = 10_000;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// No such name.
    #[error("no such entry")]
    NotFound,
    /// The inode is not known, or its content is gone.
    #[error("stale inode")]
    Stale,
    /// No such extended attribute.
    #[error("no such attribute")]
    NoAttribute,
    /// A listing of what is not a directory, or a read of what is not a file.
    #[error("not a directory")]
    NotADirectory,
    /// The LDB could not be read.
    #[error("cannot read the LDB: {0}")]
    Ldb(#[from] LdbError),
    /// Kept bytes could not be read back.
    #[error("cannot read a superseded version: {0}")]
    Kept(#[from] std::io::Error),
    /// Commits came in between without end.
    #[error("the tree changed too often to compute an answer")]
    Restless,
}

/// The attributes of a file or directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes {
    pub(super) ino: u64,
    pub(super) is_dir: bool,
    pub(super) size: u64,
    pub(super) time: LedgerTime,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) links: u32,
}

/// What a lookup found.
#[derive(Debug)]
pub(super) enum Lookup {
    /// An entry.
    Found {
        attributes: Attributes,
        entry_ttl: Duration,
        attr_ttl: Duration,
    },
    /// Nothing, and for how long.
    Absent(Duration),
}

/// How to run a [`Server`].
#[derive(Debug)]
pub(super) struct ServerSettings {
    pub(super) ldb: PathBuf,
    pub(super) lifetimes: Lifetimes,
    pub(super) spill: Option<PathBuf>,
    pub(super) access: AccessRules,
    pub(super) newline: bool,
    pub(super) started: SystemTime,
}

/// See the module.
pub(super) struct Server {
    state: Mutex<State>,
    pub(super) readers: Readers,
    pub(super) keeper: Arc<Keeper>,
    pub(super) access: AccessRules,
    pub(super) newline: bool,
    pub(super) started: LedgerTime,
    pub(super) hasher: RandomState,
    /// Why a foreign LDB cannot be followed at the moment, if so.
    pub(super) trouble: Mutex<Option<String>>,
    /// Whether changes are found out by comparing contents, for want of a warning.
    pub(super) fingerprints: bool,
    pub(super) directories: OpenDirs,
    pub(super) next_directory: AtomicU64,
    pub(super) status: StatusSource,
    pub(super) board: Arc<StatusBoard>,
    /// The number of the thread that announces changes; zero while there is none.
    pub(super) announcer: Arc<AtomicU32>,
    pub(super) announced: Announcements,
}

/// What there is to say of a place.
pub(super) struct Found {
    pub(super) size: u64,
    pub(super) mark: Mark,
    /// What the content is made from.
    pub(super) content: Content,
}

pub(super) enum Content {
    None,
    Bytes(Vec<u8>),
    Row(Arc<Table>, Arc<CachedRow>),
}

impl Server {
    /// Opens the LDB and stands ready to answer.
    pub(super) fn new(
        settings: ServerSettings,
        status: StatusSource,
        board: Arc<StatusBoard>,
    ) -> Result<Self, LdbError> {
        let readers = Readers::open(&settings.ldb)?;
        let catalog = readers.read(Reader::catalog)?;
        let view = View {
            seq: catalog.seq,
            catalog: Arc::new(catalog.value),
            epoch: 0,
        };
        Ok(Server {
            state: Mutex::new(State::new(view, settings.lifetimes, ROW_CACHE)),
            readers,
            keeper: Keeper::new(KEPT_IN_MEMORY, settings.spill),
            access: settings.access,
            newline: settings.newline,
            started: settings.started.into(),
            hasher: RandomState::new(),
            trouble: Mutex::default(),
            fingerprints: matches!(settings.lifetimes, Lifetimes::For(_)),
            directories: Mutex::default(),
            next_directory: AtomicU64::new(1),
            status,
            board,
            announcer: Arc::default(),
            announced: Announcements::default(),
        })
    }

    /// The LDB's path.
    pub(super) fn ldb(&self) -> &Path {
        self.readers.path()
    }

    /// The state. Hold it briefly: every answer needs it.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks `name` up in the directory `parent`.
    pub(super) fn lookup(&self, parent: u64, name: &[u8]) -> Result<Lookup, Fault> {
        self.lookup_as(parent, name, None)
    }

    /// Answers a lookup of `name` in `parent` with `node`, whatever else the name would lead to.
    pub(super) fn lookup_node(
        &self,
        parent: u64,
        name: &[u8],
        node: Node,
    ) -> Result<Lookup, Fault> {
        self.lookup_as(parent, name, Some(node))
    }

    fn lookup_as(&self, parent: u64, name: &[u8], known: Option<Node>) -> Result<Lookup, Fault> {
        for _ in 0..MAX_TRIES {
            let (directory, view) = {
                let state = self.state();
                let slot = state.slot(parent).ok_or(Fault::Stale)?;
                if slot.detached {
                    return Err(Fault::NotFound);
                }
                (slot.node.clone(), state.view())
            };
            let step = match &known {
                Some(node) => Step::Node(node.clone()),
                None => node::step(&view.catalog, &directory, name),
            };
            let node = match step {
                Step::Nothing => None,
                Step::Node(Node::ControlFile(file)) => return self.lookup_control(file),
                Step::Node(node) => Some(node),
                Step::Hashed {
                    table,
                    prefix,
                    ty,
                    start,
                } => {
                    let found = self.read(|reader| {
                        reader.find_key(&table, &prefix, &start, |value| {
                            name::matches_hashed(ty, value, name)
                        })
                    });
                    let Some(found) = self.checked(&view, found)? else {
                        continue;
                    };
                    if !self.state().settle(&view, found.seq) {
                        self.catch_up()?;
                        continue;
                    }
                    found.value.map(|value| {
                        let key = prefix.iter().cloned().chain([value]).collect();
                        Node::Dir(Arc::new(table.name.clone()), key)
                    })
                }
            };
            let Some(node) = node else {
                let mut state = self.state();
                if state.settle(&view, view.seq) {
                    return Ok(Lookup::Absent(state.enter_absent(parent, name, None)));
                }
                drop(state);
                self.catch_up()?;
                continue;
            };
            let loaded = self.load(&view, &node);
            let Some(found) = self.checked(&view, loaded)? else {
                continue;
            };
            if known.is_some() && found.value.is_none() {
                return Ok(Lookup::Absent(Duration::ZERO));
            }
            let Some(entered) = self.register(&view, parent, name, node.clone(), &found) else {
                self.catch_up()?;
                continue;
            };
            return Ok(match (entered, found.value) {
                (Registered::Entry(entered), Some(found)) => Lookup::Found {
                    attributes: self.attributes(&node, entered.ino, &found, 1),
                    entry_ttl: entered.entry_ttl,
                    attr_ttl: entered.attr_ttl,
                },
                (Registered::Absent(ttl), _)
                | (Registered::Entry(Entered { entry_ttl: ttl, .. }), None) => Lookup::Absent(ttl),
            });
        }
        Err(Fault::Restless)
    }

    /// Registers what a lookup found; `None` if a commit came in between.
    fn register(
        &self,
        view: &View,
        parent: u64,
        name: &[u8],
        node: Node,
        found: &At<Option<Found>>,
    ) -> Option<Registered> {
        let mut version = None;
        let fingerprint = self.fingerprint(&node, found.value.as_ref());
        loop {
            let mut state = self.state();
            if !state.settle(view, found.seq) {
                return None;
            }
            let Some(found) = &found.value else {
                return Some(Registered::Absent(state.enter_absent(
                    parent,
                    name,
                    Some(&node),
                )));
            };
            // A file that is about to change keeps its bytes from the moment it is handed out:
            // after the commit they could not be had any more.
            let about_to_change = !node.is_dir() && state.touch(&node) == Touch::Entry;
            if about_to_change && version.is_none() {
                drop(state);
                let bytes = self.bytes(&node, found).unwrap_or_default();
                version = Some(Arc::new(Version {
                    bytes: Some(self.keeper.keep(bytes.into_owned())),
                    mark: found.mark,
                }));
                continue;
            }
            let entered = state.enter(node, fingerprint);
            if about_to_change && let Some(slot) = state.slot_mut(entered.ino) {
                slot.version.get_or_insert_with(|| {
                    version.unwrap_or_else(|| {
                        Arc::new(Version {
                            bytes: None,
                            mark: found.mark,
                        })
                    })
                });
            }
            return Some(Registered::Entry(entered));
        }
    }

    /// Whether `ino` is `.ctlfs` or in it.
    pub(super) fn is_control(&self, ino: u64) -> bool {
        let state = self.state();
        let node = state.slot(ino).map(|slot| &slot.node);
        matches!(node, Some(Node::Control | Node::ControlFile(_)))
    }

    /// The kernel drops `count` references to `ino`.
    pub(super) fn forget(&self, ino: u64, count: u64) {
        let forgotten = self.state().forget(ino, count);
        // Kept bytes go with it, perhaps from a file: not under the lock.
        drop(forgotten);
    }

    /// The attributes of an inode, and how long they hold.
    pub(super) fn getattr(&self, ino: u64) -> Result<(Attributes, Duration), Fault> {
        match self.inspect(ino)? {
            Inode::Present {
                node,
                found,
                fingerprint,
                attr_ttl,
            } => {
                let Some(found) = found else {
                    if !node.is_dir() {
                        return Err(Fault::Stale);
                    }
                    // A row that went with its whole table and may come back: until then its
                    // directory, if a process is in it, is one that has been removed.
                    let time = self.started;
                    let seq = Seq::ZERO;
                    let found = Found {
                        size: 0,
                        mark: Mark { seq, time },
                        content: Content::None,
                    };
                    return Ok((self.attributes(&node, ino, &found, 0), Duration::ZERO));
                };
                // The size of another version would end a read of this one too soon.
                if fingerprint != self.fingerprint(&node, Some(&found)) {
                    return Err(Fault::Stale);
                }
                Ok((self.attributes(&node, ino, &found, 1), attr_ttl))
            }
            Inode::Fixed {
                node,
                version,
                detached,
            } => {
                if version.bytes.is_none() && !node.is_dir() {
                    return Err(Fault::Stale);
                }
                let found = Found {
                    size: version.bytes.as_ref().map_or(0, |b| b.len()),
                    mark: version.mark,
                    content: Content::None,
                };
                // Until the commit, a version whose bytes are kept already still has its name.
                let ttl = match node {
                    _ if detached => LONG,
                    Node::ControlFile(_) => LONG,
                    _ => Duration::ZERO,
                };
                let links = u32::from(!detached);
                Ok((self.attributes(&node, ino, &found, links), ttl))
            }
        }
    }

    /// Up to `size` bytes of a file from `offset`.
    pub(super) fn read_file(&self, ino: u64, offset: u64, size: u32) -> Result<Vec<u8>, Fault> {
        match self.inspect(ino)? {
            Inode::Fixed { node, version, .. } => {
                if let Node::ControlFile(file) = node {
                    self.control_was_read(file, ino);
                }
                let bytes = version.bytes.as_ref().ok_or(Fault::Stale)?;
                Ok(bytes.read(offset, size)?)
            }
            Inode::Present {
                node,
                found,
                fingerprint,
                ..
            } => {
                let found = found.ok_or(Fault::Stale)?;
                if fingerprint != self.fingerprint(&node, Some(&found)) {
                    return Err(Fault::Stale);
                }
                let bytes = self.bytes(&node, &found).ok_or(Fault::Stale)?;
                Ok(slice(&bytes, offset, size).to_vec())
            }
        }
    }

    /// Why a foreign LDB cannot be followed at the moment, if so.
    pub(super) fn trouble(&self) -> MutexGuard<'_, Option<String>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the kernel holds and what is kept for it.
    pub(super) fn counters(&self) -> MountCounters {
        let (kept_bytes, spilled_bytes) = self.keeper.sizes();
        let state = self.state();
        let view = state.view();
        MountCounters {
            nodes: state.slot_count() as u64,
            announced: self.announced.counts(state.announcing.on),
            kept_bytes,
            spilled_bytes,
            seq: view.seq,
            families: view.catalog.families().count() as u64,
            tables: view.catalog.len() as u64,
            trouble: self.trouble().clone(),
            ..MountCounters::default()
        }
    }

    /// The bytes of a file as they are before the commit under way, and their time; `None` if it
    /// has none.
    pub(super) fn old_version(&self, node: &Node) -> Result<Option<Version>, Fault> {
        let view = self.state().view();
        let Some(found) = self.load(&view, node)?.value else {
            return Ok(None);
        };
        let bytes = self
            .bytes(node, &found)
            .map(|bytes| self.keeper.keep(bytes.into_owned()));
        Ok(Some(Version {
            bytes,
            mark: found.mark,
        }))
    }

    /// For an LDB that someone else writes: moves to where it stands now. The tables are read again
    /// if `reshaped`.
    pub(super) fn follow(&self, reshaped: bool) -> Result<(), Fault> {
        let (seq, catalog) = if reshaped {
            let now = self.read(Reader::catalog)?;
            (now.seq, Some(now.value))
        } else {
            (self.read(Reader::position)?, None)
        };
        let mut state = self.state();
        let present = state.view().catalog;
        let catalog = catalog.filter(|catalog| *catalog != *present);
        state.follow(seq, catalog.map(Arc::new));
        Ok(())
    }

    /// After an answer that did not hold. With a warning of each commit the state has moved on
    /// already; without, this is where it does.
    pub(super) fn catch_up(&self) -> Result<(), Fault> {
        if self.fingerprints {
            self.follow(true)
        } else {
            Ok(())
        }
    }

    /// What an inode stands for now.
    pub(super) fn inspect(&self, ino: u64) -> Result<Inode, Fault> {
        for _ in 0..MAX_TRIES {
            let (node, view, version, detached) = {
                let state = self.state();
                let slot = state.slot(ino).ok_or(Fault::Stale)?;
                (
                    slot.node.clone(),
                    state.view(),
                    slot.version.clone(),
                    slot.detached,
                )
            };
            if let Some(version) = version {
                return Ok(Inode::Fixed {
                    node,
                    version,
                    detached,
                });
            }
            if detached {
                // A directory that is gone, or a version whose bytes nobody kept.
                let version = Arc::new(Version {
                    bytes: None,
                    mark: Mark {
                        seq: Seq::ZERO,
                        time: self.started,
                    },
                });
                return Ok(Inode::Fixed {
                    node,
                    version,
                    detached,
                });
            }
            let loaded = self.load(&view, &node);
            let Some(loaded) = self.checked(&view, loaded)? else {
                continue;
            };
            let mut state = self.state();
            if !state.settle(&view, loaded.seq) {
                drop(state);
                self.catch_up()?;
                continue;
            }
            let Some(slot) = state.slot(ino) else {
                return Err(Fault::Stale);
            };
            if slot.version.is_some() || slot.detached {
                continue;
            }
            let attr_ttl = match state.touch(&node) {
                Touch::None => state.lifetime(),
                Touch::Attributes | Touch::Entry => Duration::ZERO,
            };
            let fingerprint = slot.fingerprint;
            return Ok(Inode::Present {
                node,
                found: loaded.value,
                fingerprint,
                attr_ttl,
            });
        }
        Err(Fault::Restless)
    }
}

/// What an inode stands for.
pub(super) enum Inode {
    /// A place of the tree as it is now; `found` is `None` if it does not exist (any more).
    Present {
        node: Node,
        found: Option<Found>,
        fingerprint: u64,
        attr_ttl: Duration,
    },
    /// A content that no longer follows the tree, and whether its place has moved on already.
    Fixed {
        node: Node,
        version: Arc<Version>,
        detached: bool,
    },
}

enum Registered {
    Entry(Entered),
    Absent(Duration),
}
