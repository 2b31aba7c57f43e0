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

pub(super) use super::answer::{Attributes, Content, Fault, Found, Inode, Lookup};
use super::counters::Announcements;
use super::dirs::OpenDirs;
use super::flip::Touch;
use super::kept::Keeper;
use super::pins::{PinLimits, Pins};
use super::readers::Readers;
use super::state::{Entered, Lifetimes, State, Version, View};
use super::{MountCounters, StatusSource};
use crate::ldb::LdbError;
use crate::ldb::reader::{At, Reader};
use crate::ldb::wal::Wal;
use crate::model::LedgerTime;
use crate::status::StatusBoard;
use crate::tree::access::AccessRules;
use crate::tree::name;
use crate::tree::node::{self, Node, Step};

/// Rows read lately are kept up to about this many bytes.
const ROW_CACHE: usize = 16 << 20;
/// Superseded versions are kept in memory up to this many bytes, beyond it in a file.
const KEPT_IN_MEMORY: u64 = 32 << 20;
/// An answer is computed anew when a commit comes in between. So many in a row mean a defect.
pub(super) const MAX_TRIES: usize = 10_000;

/// How to run a [`Server`].
#[derive(Debug)]
pub(super) struct ServerSettings {
    pub(super) ldb: PathBuf,
    pub(super) lifetimes: Lifetimes,
    pub(super) spill: Option<PathBuf>,
    pub(super) access: AccessRules,
    pub(super) newline: bool,
    pub(super) export_max_size: u64,
    pub(super) pin_limits: PinLimits,
    pub(super) started: SystemTime,
}

/// See the module.
pub(super) struct Server {
    state: Mutex<State>,
    pub(super) readers: Arc<Readers>,
    pub(super) pins: Pins,
    pub(super) keeper: Arc<Keeper>,
    pub(super) access: AccessRules,
    pub(super) newline: bool,
    /// How large a table may be that is shown as one file.
    pub(super) export_max_size: u64,
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

impl Server {
    /// Opens the LDB and stands ready to answer.
    pub(super) fn new(
        settings: ServerSettings,
        status: StatusSource,
        board: Arc<StatusBoard>,
    ) -> Result<Self, LdbError> {
        let readers = Arc::new(Readers::open(&settings.ldb)?);
        let catalog = readers.read(Reader::catalog)?;
        let view = View {
            seq: catalog.seq,
            catalog: Arc::new(catalog.value),
            epoch: 0,
            pin: None,
        };
        Ok(Server {
            state: Mutex::new(State::new(view, settings.lifetimes, ROW_CACHE)),
            readers,
            pins: Pins::new(
                settings.pin_limits,
                Wal::of(&settings.ldb),
                matches!(settings.lifetimes, Lifetimes::UntilNotified),
            ),
            keeper: Keeper::new(KEPT_IN_MEMORY, settings.spill),
            access: settings.access,
            newline: settings.newline,
            export_max_size: settings.export_max_size,
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
            if directory == Node::Pins {
                return Ok(self.lookup_pin(name));
            }
            let view = self.view_in(&directory, view)?;
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
                    let found = self.read_in(&view, |reader| {
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
                        Node::Dir(Arc::new(table.name.clone()), key).pinned(directory.pin())
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
                (Registered::Entry(entered, size), Some(found)) => Lookup::Found {
                    attributes: Attributes {
                        size: size.unwrap_or(found.size),
                        ..self.attributes(&node, entered.ino, &found, 1)
                    },
                    entry_ttl: entered.entry_ttl,
                    attr_ttl: entered.attr_ttl,
                },
                (Registered::Absent(ttl), _)
                | (Registered::Entry(Entered { entry_ttl: ttl, .. }, _), None) => {
                    Lookup::Absent(ttl)
                }
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
            let about_to_change =
                !node.is_dir() && !node.is_lazy() && state.touch(&node) == Touch::Entry;
            if about_to_change && version.is_none() {
                drop(state);
                let bytes = self.bytes(&node, found).unwrap_or_default();
                version = Some(Arc::new(Version {
                    bytes: Some(self.keeper.keep(bytes.into_owned())),
                    mark: found.mark,
                }));
                continue;
            }
            let (lazy, is_file) = (node.is_lazy(), !node.is_dir());
            let mut entered = state.enter(node, fingerprint);
            if is_file && state.announcing.pending && Some(parent) != state.announcing.stage {
                // The kernel has to ask again when this name is the target of an announcement.
                entered.entry_ttl = Duration::ZERO;
            }
            let mut size = None;
            if lazy {
                let slot = state.slot(entered.ino);
                let version = slot.and_then(|slot| slot.version.as_ref());
                size = version.and_then(|v| v.bytes.as_ref()).map(|b| b.len());
                if size.is_none() {
                    entered.attr_ttl = Duration::ZERO;
                }
            }
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
            return Some(Registered::Entry(entered, size));
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

    /// Why a foreign LDB cannot be followed at the moment, if so.
    pub(super) fn trouble(&self) -> MutexGuard<'_, Option<String>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the kernel holds and what is kept for it.
    pub(super) fn counters(&self) -> MountCounters {
        let (kept_bytes, spilled_bytes) = self.keeper.sizes();
        let (pins, pins_held_bytes) = self.pins.status();
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
            pins,
            pins_held_bytes,
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
}

enum Registered {
    /// With the size, where that is known only of this inode.
    Entry(Entered, Option<u64>),
    Absent(Duration),
}
