//! Pins: trees that stay as they were when somebody made a directory for them.
//!
//! A pin reads through connections of its own that keep a read transaction open, so it costs no
//! copy; what it costs is that SQLite's log grows meanwhile, which is why [`super::janitor`] bounds
//! pins. Places in a pinned tree are nodes of their own: no flip touches them.
//!
//! The table's lock is held for looking and changing only, and taken alone.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::answer::{Content, Fault, Found, Lookup};
use super::readers::HeldReaders;
use super::server::Server;
use super::state::{LONG, RowCache, View};
use crate::ldb::LdbError;
use crate::ldb::reader::{Mark, Reader};
use crate::ldb::wal::{Wal, WalHold, WalHolds};
use crate::model::{Catalog, Seq};
use crate::status::PinStatus;
use crate::tree::node::{Node, PinId};

/// How many pins there may be at once. Each has up to two connections of two descriptors each.
const MAX_PINS: usize = 64;
/// How many pins that were dropped are remembered; beyond that their directories go, oldest first.
const MAX_DROPPED: usize = 64;
/// The longest name of a directory.
const MAX_NAME: usize = 255;
/// How many connections a pin reads with.
const CONNECTIONS: usize = 2;
/// Rows of a pin that were read lately are kept up to about this many bytes.
const ROW_CACHE: usize = 1 << 20;
/// How often the bounds are looked at.
const TICK: Duration = Duration::from_millis(100);

/// How long pins may live.
#[derive(Debug, Clone, Copy)]
pub struct PinLimits {
    /// For how long each.
    pub max_age: Duration,
    /// How many bytes of SQLite's log they may hold back together.
    pub max_space: u64,
}

/// One state of the LDB, kept by read transactions. Pins made at the same position share it.
pub(super) struct Snapshot {
    seq: Seq,
    catalog: Arc<Catalog>,
    readers: HeldReaders,
    /// The rows read lately.
    pub(super) rows: Mutex<RowCache>,
    _hold: WalHold,
}

/// A pinned tree.
pub(super) struct Pin {
    id: PinId,
    snapshot: Arc<Snapshot>,
    dropped: AtomicBool,
}

impl Pin {
    /// Which one it is.
    pub(super) fn id(&self) -> PinId {
        self.id
    }

    /// The position that it shows.
    pub(super) fn seq(&self) -> Seq {
        self.snapshot.seq
    }

    /// The tables of its tree.
    pub(super) fn catalog(&self) -> &Catalog {
        &self.snapshot.catalog
    }

    /// What it shows.
    pub(super) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Whether nothing of it may be handed out any more.
    pub(super) fn is_dropped(&self) -> bool {
        self.dropped.load(Ordering::Acquire)
    }

    /// Reads the state that it shows.
    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&mut Reader) -> rusqlite::Result<T>,
    ) -> Result<T, LdbError> {
        self.snapshot.readers.read(read)
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pin = (self.id, self.snapshot.seq);
        f.debug_tuple("Pin").field(&pin).finish()
    }
}

/// A directory in `.ctlfs/at`.
struct Entry {
    name: Box<[u8]>,
    uid: u32,
    gid: u32,
    made: Instant,
    seq: Seq,
    mark: Mark,
    /// `None` if it was dropped: what is left is the name, until somebody removes it.
    pin: Option<Arc<Pin>>,
}

/// All pins.
pub(super) struct Pins {
    table: Mutex<Table>,
    changed: Condvar,
    limits: PinLimits,
    holds: WalHolds,
    wal: Wal,
    /// Whether the LDB is ours to write.
    own: bool,
}

#[derive(Default)]
struct Table {
    last: u64,
    /// In the order in which they were made.
    entries: BTreeMap<PinId, Entry>,
    /// The log's size when there was no pin.
    log_before: u64,
    /// Whether the log may have grown and nobody holds it back any more.
    shrink: bool,
    closed: bool,
}

impl Table {
    fn live(&self) -> impl DoubleEndedIterator<Item = &Entry> {
        self.entries.values().filter(|entry| entry.pin.is_some())
    }

    fn named(&self, name: &[u8]) -> Option<PinId> {
        let mut entries = self.entries.iter();
        entries
            .find(|(_, entry)| *entry.name == *name)
            .map(|(id, _)| *id)
    }

    /// Whether one more of this name can be.
    fn check(&self, name: &[u8]) -> Result<(), Fault> {
        if name.len() > MAX_NAME {
            return Err(Fault::NameTooLong);
        }
        if name.starts_with(b".") {
            return Err(Fault::BadName);
        }
        if self.named(name).is_some() {
            return Err(Fault::Exists);
        }
        if self.live().count() >= MAX_PINS {
            return Err(Fault::TooManyPins);
        }
        Ok(())
    }

    /// To be called when one has gone.
    fn note_end(&mut self, own: bool) {
        let last = own && self.live().next().is_none();
        self.shrink |= last;
    }
}

/// What the bounds have ended.
#[derive(Default)]
pub(super) struct Ended {
    /// Pins that were dropped.
    pub(super) pins: Vec<Arc<Pin>>,
    /// Directories that are gone, having been dropped before.
    pub(super) names: Vec<Box<[u8]>>,
}

impl Pins {
    pub(super) fn new(limits: PinLimits, wal: Wal, own: bool) -> Self {
        Pins {
            table: Mutex::default(),
            changed: Condvar::new(),
            limits,
            holds: WalHolds::default(),
            wal,
            own,
        }
    }

    /// Who holds the log back.
    pub(super) fn holds(&self) -> &WalHolds {
        &self.holds
    }

    /// The names of all.
    pub(super) fn names(&self) -> Vec<Vec<u8>> {
        let table = self.table();
        table.entries.values().map(|e| e.name.to_vec()).collect()
    }

    /// A pin, unless it was dropped.
    fn live(&self, id: PinId) -> Option<Arc<Pin>> {
        self.table().entries.get(&id)?.pin.clone()
    }

    /// The owner and time of a pin's directory, also when the pin was dropped.
    pub(super) fn directory(&self, id: PinId) -> Option<(u32, u32, Mark)> {
        let table = self.table();
        let entry = table.entries.get(&id)?;
        Some((entry.uid, entry.gid, entry.mark))
    }

    /// A live pin's snapshot at this position.
    fn at(&self, seq: Seq) -> Option<Arc<Snapshot>> {
        let table = self.table();
        let pin = table.live().rfind(|entry| entry.seq == seq)?.pin.as_ref()?;
        Some(Arc::clone(&pin.snapshot))
    }

    fn insert(
        &self,
        name: &[u8],
        (uid, gid): (u32, u32),
        snapshot: Arc<Snapshot>,
        mark: Mark,
        log: u64,
    ) -> Result<PinId, Fault> {
        let mut table = self.table();
        table.check(name)?;
        table.last += 1;
        let id = PinId(table.last);
        // While the log is still to be made small, it counts from where it was small.
        if table.live().next().is_none() && !table.shrink {
            table.log_before = log;
        }
        if log.saturating_sub(table.log_before) > self.limits.max_space {
            return Err(Fault::TooManyPins);
        }
        table.entries.insert(
            id,
            Entry {
                name: name.into(),
                uid,
                gid,
                made: Instant::now(),
                seq: snapshot.seq,
                mark,
                pin: Some(Arc::new(Pin {
                    id,
                    snapshot,
                    dropped: AtomicBool::new(false),
                })),
            },
        );
        drop(table);
        self.changed.notify_all();
        Ok(id)
    }

    fn remove(&self, name: &[u8]) -> Option<(PinId, Option<Arc<Pin>>)> {
        let mut table = self.table();
        let id = table.named(name)?;
        let pin = table.entries.remove(&id)?.pin;
        if let Some(pin) = &pin {
            pin.dropped.store(true, Ordering::Release);
            table.note_end(self.own);
        }
        drop(table);
        self.changed.notify_all();
        Some((id, pin))
    }

    /// Waits until there is something to look at; false at the end.
    pub(super) fn wait(&self) -> bool {
        let mut table = self.table();
        if !table.closed {
            let idle = table.live().next().is_none() && !table.shrink;
            let poisoned = PoisonError::into_inner;
            table = if idle {
                self.changed.wait(table).unwrap_or_else(poisoned)
            } else {
                let waited = self.changed.wait_timeout(table, TICK);
                waited.unwrap_or_else(PoisonError::into_inner).0
            };
        }
        !table.closed
    }

    /// Ends the waiting.
    pub(super) fn close(&self) {
        self.table().closed = true;
        self.changed.notify_all();
    }

    /// Drops the pins that are beyond a bound.
    ///
    /// The log cannot start anew while a single pin reads from it, however young. So when there is
    /// too much of it all pins go: fewer would set nothing free.
    pub(super) fn enforce(&self) -> Ended {
        let (log, now) = (self.wal.len(), Instant::now());
        let mut table = self.table();
        let full = log.saturating_sub(table.log_before) > self.limits.max_space;
        let mut ended = Ended::default();
        for entry in table.entries.values_mut() {
            let age = now.saturating_duration_since(entry.made);
            if (full || age > self.limits.max_age)
                && let Some(pin) = entry.pin.take()
            {
                pin.dropped.store(true, Ordering::Release);
                let why = if full { "space" } else { "age" };
                let name = String::from_utf8_lossy(&entry.name);
                tracing::warn!(%name, seq = %entry.seq, ?age, "dropped a pin for its {why}");
                ended.pins.push(pin);
            }
        }
        if !ended.pins.is_empty() {
            table.note_end(self.own);
            while table.entries.len() - table.live().count() > MAX_DROPPED {
                let mut entries = table.entries.iter();
                let oldest = entries.find(|(_, entry)| entry.pin.is_none());
                let Some(oldest) = oldest.map(|(id, _)| *id) else {
                    break;
                };
                ended
                    .names
                    .extend(table.entries.remove(&oldest).map(|e| e.name));
            }
        }
        ended
    }

    /// Makes the log small again if it was held back, once nobody does.
    pub(super) fn shrink(&self) {
        if !self.table().shrink || self.holds.any() {
            return;
        }
        let done = {
            // Meanwhile the writer need not try the same.
            let _hold = self.holds.take();
            self.wal.shrink()
        };
        match done {
            Ok(true) => self.table().shrink = false,
            // Somebody was reading: at the next tick.
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%error, "the log that pins held back stays large for now");
                self.table().shrink = false;
            }
        }
    }

    /// What to say of them, and how many bytes of the log they hold back.
    pub(super) fn status(&self) -> (Vec<PinStatus>, u64) {
        let log = self.wal.len();
        let table = self.table();
        let pins = table.entries.values().map(|entry| PinStatus {
            name: String::from_utf8_lossy(&entry.name).into_owned(),
            seq: entry.seq,
            age: entry.made.elapsed(),
            uid: entry.uid,
            dropped: entry.pin.is_none(),
        });
        let pins = pins.collect();
        let held_back = match table.live().next() {
            Some(_) => log.saturating_sub(table.log_before),
            None => 0,
        };
        (pins, held_back)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// What answers about `node` are computed against: `present`, or the state that a pin keeps.
    pub(super) fn view_in(&self, node: &Node, present: View) -> Result<View, Fault> {
        let Some(id) = node.pin() else {
            return Ok(present);
        };
        let pin = self.pins.live(id).ok_or(Fault::Stale)?;
        Ok(View {
            seq: pin.snapshot.seq,
            catalog: Arc::clone(&pin.snapshot.catalog),
            epoch: 0,
            pin: Some(pin),
        })
    }

    /// The same for an answer that is not held to a position.
    pub(super) fn view_of(&self, node: &Node) -> Result<View, Fault> {
        let present = self.state().view();
        self.view_in(node, present)
    }

    /// Looks up a pin.
    pub(super) fn lookup_pin(&self, name: &[u8]) -> Lookup {
        let id = self.pins.table().named(name);
        match id.and_then(|id| Some((id, self.pins.directory(id)?.2))) {
            Some((id, mark)) => self.enter_pin(id, mark),
            None => Lookup::Absent(Duration::ZERO),
        }
    }

    fn enter_pin(&self, id: PinId, mark: Mark) -> Lookup {
        let node = Node::Root.pinned(Some(id));
        let entered = self.state().enter(node.clone(), 0);
        let found = Found {
            size: 0,
            mark,
            content: Content::None,
        };
        Lookup::Found {
            attributes: self.attributes(&node, entered.ino, &found, 1),
            entry_ttl: LONG,
            attr_ttl: LONG,
        }
    }

    /// Makes the directory `name` in `parent`, if that is where pins are: the tree as it is now,
    /// owned by `owner`.
    pub(super) fn make_pin(
        &self,
        parent: u64,
        name: &[u8],
        owner: (u32, u32),
    ) -> Result<Lookup, Fault> {
        self.check_pins(parent)?;
        self.pins.table().check(name)?;
        let log = self.pins.wal.len();
        let snapshot = self.snapshot()?;
        let time = snapshot.readers.read(Reader::schema_time);
        let time = time.map_err(|error| self.damaged(error))?;
        let mark = Mark {
            seq: time.seq,
            time: time.value,
        };
        let id = self.pins.insert(name, owner, snapshot, mark, log)?;
        Ok(self.enter_pin(id, mark))
    }

    /// Removes the directory `name` in `parent`, if that is a pin.
    pub(super) fn remove_pin(&self, parent: u64, name: &[u8]) -> Result<(), Fault> {
        self.check_pins(parent)?;
        let (id, pin) = self.pins.remove(name).ok_or(Fault::NotFound)?;
        {
            let mut state = self.state();
            if let Some(ino) = state.ino(&Node::Root.pinned(Some(id))) {
                state.detach(ino);
            }
        }
        // Its connections go with it, if nobody reads from it at the moment.
        drop(pin);
        Ok(())
    }

    fn check_pins(&self, parent: u64) -> Result<(), Fault> {
        let state = self.state();
        let parent = state.slot(parent).ok_or(Fault::Stale)?;
        if parent.node == Node::Pins {
            Ok(())
        } else {
            Err(Fault::ReadOnly)
        }
    }

    /// The state of the LDB now. It is never older than anything that a reader was shown before.
    fn snapshot(&self) -> Result<Arc<Snapshot>, Fault> {
        let hold = self.pins.holds.take();
        let mut readers = self.readers.hold()?;
        let seq = readers.seq();
        let catalog = if self.fingerprints {
            if !readers.read(Reader::can_hold)? {
                return Err(Fault::CannotPin);
            }
            None
        } else {
            if let Some(shared) = self.pins.at(seq) {
                return Ok(shared);
            }
            // What the pin shows nobody may miss in the tree from here on.
            let view = self.state().seen(seq);
            (view.seq == seq).then_some(view.catalog)
        };
        let catalog = match catalog {
            Some(catalog) => catalog,
            None => Arc::new(readers.read(Reader::catalog)?.value),
        };
        if !self.fingerprints {
            // Positions tell states apart only where we write them.
            readers.add(CONNECTIONS - 1)?;
        }
        Ok(Arc::new(Snapshot {
            seq,
            catalog,
            readers,
            rows: Mutex::new(RowCache::new(ROW_CACHE)),
            _hold: hold,
        }))
    }
}
