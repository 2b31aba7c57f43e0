//! What the kernel knows: inodes and the places they stand for, the rows read lately, the names
//! answered as absent, and the transition under way.
//!
//! [`State`] is plain data behind one mutex (see [`super::server`]); nothing here does IO, sends a
//! notification or blocks.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;

use super::announcing::Announcing;
use super::control::Handed;
use super::flip::{Touch, Transition};
use super::kept::Kept;
use super::load::CachedRow;
use super::pins::Pin;
use crate::ldb::reader::Mark;
use crate::model::{Catalog, Seq, TableRef};
use crate::tree::node::{ControlFile, Node, SharedKey};

/// The inode of the mount point, as the kernel fixes it.
pub(super) const ROOT: u64 = 1;
/// How long the kernel may keep what only a notification makes invalid.
pub(super) const LONG: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long it may keep that a name is absent. The kernel does not tell when it drops such an
/// entry, so each is remembered for just this long.
const ABSENT: Duration = Duration::from_secs(60);
/// How many absent names are remembered at the most; beyond that they are not cached.
const ABSENT_LIMIT: usize = 65_536;

/// How often, at the most, the absent names are gone through for such as have expired.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// The bytes and time of a version that no longer follows the LDB.
#[derive(Debug)]
pub(super) struct Version {
    /// The content; `None` for directories.
    pub(super) bytes: Option<Arc<Kept>>,
    /// The entry that made it.
    pub(super) mark: Mark,
}

/// An inode that the kernel holds.
#[derive(Debug)]
pub(super) struct Slot {
    /// The place it stands for.
    pub(super) node: Node,
    /// How often the kernel was told of it, less what it has forgotten.
    lookups: u64,
    /// Content that is fixed: of a version being superseded, or of a control file.
    pub(super) version: Option<Arc<Version>>,
    /// Whether the place has moved on to another inode, or is gone.
    pub(super) detached: bool,
    /// Whether it was found to be larger than what is shown as one file.
    pub(super) too_large: bool,
    /// A fingerprint of the content, where changes come without a warning.
    pub(super) fingerprint: u64,
}

/// The position and tables that an answer is computed against.
#[derive(Debug, Clone)]
pub(super) struct View {
    /// The position.
    pub(super) seq: Seq,
    /// The tables at that position.
    pub(super) catalog: Arc<Catalog>,
    /// Goes up whenever a commit was found out afterwards.
    pub(super) epoch: u64,
    /// The pin whose state this is; `None` for the present one.
    pub(super) pin: Option<Arc<Pin>>,
}

/// How an entry went to the kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entered {
    /// The inode.
    pub(super) ino: u64,
    /// How long the name may be kept.
    pub(super) entry_ttl: Duration,
    /// How long the attributes may be kept.
    pub(super) attr_ttl: Duration,
}

/// Where changes come from, and so how long answers hold.
#[derive(Debug, Clone, Copy)]
pub(super) enum Lifetimes {
    /// Every commit is announced before it happens: answers hold until then.
    UntilNotified,
    /// Commits are found out afterwards: answers hold this long.
    For(Duration),
}

/// See the module.
#[derive(Debug)]
pub(super) struct State {
    view: View,
    lifetimes: Lifetimes,
    slots: HashMap<u64, Slot>,
    inodes: HashMap<Node, u64>,
    next: u64,
    pub(super) transition: Option<Transition>,
    /// Names that were looked up during the last flip: the kernel may hold them, expired, and with
    /// them versions that nobody reads.
    pub(super) expired: Vec<(u64, Vec<u8>)>,
    absent: HashMap<(u64, Box<[u8]>), Instant>,
    swept: Instant,
    rows: RowCache,
    /// The latest versions of the control files.
    pub(super) controls: HashMap<ControlFile, Handed>,
    /// What the thread that announces changes is answered.
    pub(super) announcing: Announcing,
}

impl State {
    /// The state of a new mount: the kernel knows the root only.
    pub(super) fn new(view: View, lifetimes: Lifetimes, row_bytes: usize) -> Self {
        let mut state = State {
            view,
            lifetimes,
            slots: HashMap::new(),
            inodes: HashMap::new(),
            next: ROOT,
            transition: None,
            expired: Vec::new(),
            absent: HashMap::new(),
            swept: Instant::now(),
            rows: RowCache::new(row_bytes),
            controls: HashMap::new(),
            announcing: Announcing::default(),
        };
        state.allocate(Node::Root, 0);
        state
    }

    /// What answers are to be computed against now.
    pub(super) fn view(&self) -> View {
        self.view.clone()
    }

    /// Whether a row that was read at `seq` for `view` may be kept and handed out later.
    pub(super) fn may_keep(&mut self, view: &View, seq: Seq) -> bool {
        self.settle(view, seq) && view.epoch == self.view.epoch
    }

    /// Moves to where an LDB is that someone else writes. What was read before is not kept.
    pub(super) fn follow(&mut self, seq: Seq, catalog: Option<Arc<Catalog>>) {
        self.view.epoch += 1;
        self.rows.clear();
        self.advance(seq, catalog);
    }

    /// Moves to another position. The caller has dealt with what changed in between.
    pub(super) fn advance(&mut self, seq: Seq, catalog: Option<Arc<Catalog>>) {
        self.view.seq = seq;
        if let Some(catalog) = catalog {
            self.view.catalog = catalog;
        }
    }

    /// Whether an answer computed against `view`, from data read at `seq`, holds now. If the data
    /// shows that the commit under way has happened, its flip is completed first.
    ///
    /// Where no commit is announced there is nothing to hold an answer to but the tables' shape: it
    /// is right when it was read, and soon asked for again.
    pub(super) fn settle(&mut self, view: &View, seq: Seq) -> bool {
        if let Some(pin) = &view.pin {
            return !pin.is_dropped();
        }
        if matches!(self.lifetimes, Lifetimes::For(_)) {
            return Arc::ptr_eq(&view.catalog, &self.view.catalog);
        }
        self.seen(seq).seq == seq && view.seq == seq
    }

    /// Somebody has read what the LDB holds at `seq`. If that shows that the commit under way has
    /// happened, its flip is completed.
    pub(super) fn seen(&mut self, seq: Seq) -> View {
        if self.transition.as_ref().is_some_and(|t| t.to == seq) {
            self.finish();
        }
        self.view()
    }

    /// The entries at the top of a pinned tree that the kernel may hold, and all others below them.
    pub(super) fn entries_of(&self, pin: &Pin) -> Vec<(u64, Vec<u8>)> {
        let Some(root) = self.ino(&Node::Root.pinned(Some(pin.id()))) else {
            return Vec::new();
        };
        let families = pin.catalog().families();
        families
            .filter(|family| {
                let node = Node::Family((*family).clone()).pinned(Some(pin.id()));
                self.ino(&node).is_some()
            })
            .map(|family| (root, family.as_str().as_bytes().to_vec()))
            .collect()
    }

    /// The inode, if the kernel may still hold it.
    pub(super) fn slot(&self, ino: u64) -> Option<&Slot> {
        self.slots.get(&ino)
    }

    /// For changing an inode's version.
    pub(super) fn slot_mut(&mut self, ino: u64) -> Option<&mut Slot> {
        self.slots.get_mut(&ino)
    }

    /// All inodes.
    pub(super) fn slots(&self) -> impl Iterator<Item = (u64, &Slot)> {
        self.slots.iter().map(|(ino, slot)| (*ino, slot))
    }

    /// How many inodes the kernel holds.
    pub(super) fn slot_count(&self) -> usize {
        self.slots.len()
    }

    /// The inode that stands for `node` now.
    pub(super) fn ino(&self, node: &Node) -> Option<u64> {
        self.inodes.get(node).copied()
    }

    /// Hands `node` to the kernel once more: under its present inode, or a new one.
    pub(super) fn enter(&mut self, node: Node, fingerprint: u64) -> Entered {
        let touch = self.touch(&node);
        let ttl = self.lifetime_of(&node);
        let known = self.ino(&node).filter(|ino| {
            // Where no warning comes, a changed content is what makes a new version.
            self.slots
                .get(ino)
                .is_some_and(|slot| slot.fingerprint == fingerprint)
        });
        let ino = match known {
            Some(ino) => ino,
            None => {
                if let Some(old) = self.ino(&node) {
                    self.detach(old);
                }
                self.allocate(node, fingerprint)
            }
        };
        if let Some(slot) = self.slots.get_mut(&ino) {
            slot.lookups += 1;
        }
        if let Some(transition) = self.transition.as_mut().filter(|_| touch == Touch::Entry) {
            transition.late.push(ino);
        }
        Entered {
            ino,
            entry_ttl: if touch == Touch::Entry {
                Duration::ZERO
            } else {
                ttl
            },
            attr_ttl: if touch == Touch::None {
                ttl
            } else {
                Duration::ZERO
            },
        }
    }

    /// Hands a content to the kernel that is fixed for this inode alone.
    pub(super) fn enter_frozen(&mut self, node: Node, version: Arc<Version>) -> Entered {
        self.next += 1;
        self.enter_again(self.next, node, version)
    }

    /// Hands the fixed content of `ino` to the kernel once more, whether it still has it or not.
    pub(super) fn enter_again(&mut self, ino: u64, node: Node, version: Arc<Version>) -> Entered {
        let slot = self.slots.entry(ino).or_insert(Slot {
            node,
            lookups: 0,
            version: Some(version),
            detached: false,
            too_large: false,
            fingerprint: 0,
        });
        slot.lookups += 1;
        Entered {
            ino,
            entry_ttl: Duration::ZERO,
            attr_ttl: LONG,
        }
    }

    /// Hands the directory that entries move in from to the kernel.
    pub(super) fn enter_stage(&mut self) -> Entered {
        let version = Arc::new(Version {
            bytes: None,
            mark: Mark::default(),
        });
        let entered = self.enter_frozen(Node::Control, version);
        self.announcing.stage = Some(entered.ino);
        entered
    }

    /// Hands an inode that the kernel has to it once more; false if it has forgotten it.
    pub(super) fn enter_old(&mut self, ino: u64) -> bool {
        let slot = self.slots.get_mut(&ino);
        slot.map(|slot| slot.lookups += 1).is_some()
    }

    /// How long the kernel may keep that `parent` has no `name`; `node` is what the name would
    /// lead to, if anything.
    pub(super) fn enter_absent(
        &mut self,
        parent: u64,
        name: &[u8],
        node: Option<&Node>,
    ) -> Duration {
        if let Some(slot) = self.slots.get(&parent)
            && slot.node.pin().is_some()
        {
            // A pinned tree never changes, and what the kernel holds of it goes with the families.
            return match slot.node.place() {
                Node::Root => Duration::ZERO,
                _ => LONG,
            };
        }
        let touched = match node {
            Some(node) => self.touch(node) != Touch::None,
            None => self.touches_names_in(parent),
        };
        match self.lifetimes {
            _ if touched || self.announcing.pending => Duration::ZERO,
            Lifetimes::For(ttl) => ttl,
            Lifetimes::UntilNotified => {
                let now = Instant::now();
                if self.absent.len() >= ABSENT_LIMIT && self.swept + SWEEP_EVERY <= now {
                    self.swept = now;
                    self.absent.retain(|_, until| *until > now);
                }
                if self.absent.len() >= ABSENT_LIMIT {
                    return Duration::ZERO;
                }
                // Remembered a little longer than the kernel keeps it.
                self.absent
                    .insert((parent, name.into()), now + ABSENT + Duration::from_secs(5));
                ABSENT
            }
        }
    }

    /// Whether the kernel may hold that `parent` has no `name`.
    pub(super) fn is_absent(&self, parent: u64, name: &[u8]) -> bool {
        // The key's owned form is needed to ask; both are small.
        !self.absent.is_empty() && self.absent.contains_key(&(parent, name.into()))
    }

    /// The names held as absent below the directories for which `of` says yes.
    pub(super) fn absent_in(&self, of: impl Fn(&Slot) -> bool) -> Vec<(u64, Vec<u8>)> {
        self.absent
            .keys()
            .filter(|(parent, _)| self.slots.get(parent).is_some_and(&of))
            .map(|(parent, name)| (*parent, name.to_vec()))
            .collect()
    }

    /// The kernel has dropped `count` of its references to `ino`. Returns the inode if that was the
    /// last: to be dropped when the lock is not held, for kept bytes may be in a file.
    pub(super) fn forget(&mut self, ino: u64, count: u64) -> Option<Slot> {
        if ino == ROOT {
            return None;
        }
        let slot = self.slots.get_mut(&ino)?;
        slot.lookups = slot.lookups.saturating_sub(count);
        if slot.lookups > 0 {
            return None;
        }
        let slot = self.slots.remove(&ino)?;
        if self.inodes.get(&slot.node) == Some(&ino) {
            self.inodes.remove(&slot.node);
        }
        Some(slot)
    }

    /// The place of `ino` moves on: the next lookup of it gets another inode.
    pub(super) fn detach(&mut self, ino: u64) {
        let Some(slot) = self.slots.get_mut(&ino) else {
            return;
        };
        slot.detached = true;
        if self.inodes.get(&slot.node) == Some(&ino) {
            self.inodes.remove(&slot.node);
        }
    }

    /// The place of `ino` has moved on because of a commit, which may have to be announced.
    pub(super) fn supersede(&mut self, ino: u64) {
        if let Some(slot) = self.slots.get(&ino).filter(|slot| !slot.detached) {
            self.announcing.note(&slot.node, ino);
        }
        self.detach(ino);
    }

    /// How long answers hold that nothing is about to change.
    pub(super) fn lifetime(&self) -> Duration {
        match self.lifetimes {
            Lifetimes::UntilNotified => LONG,
            Lifetimes::For(ttl) => ttl,
        }
    }

    /// The same for a place: a pinned one never changes.
    pub(super) fn lifetime_of(&self, node: &Node) -> Duration {
        match node.pin() {
            Some(_) => LONG,
            None => self.lifetime(),
        }
    }

    /// The rows read lately. They are those of the present view.
    pub(super) fn rows(&mut self) -> &mut RowCache {
        &mut self.rows
    }

    fn touches_names_in(&self, parent: u64) -> bool {
        let (Some(transition), Some(slot)) = (&self.transition, self.slots.get(&parent)) else {
            return false;
        };
        match slot.node.table() {
            // A name too long to hold its key may be one of the rows that come.
            Some(table) => transition.touches(table),
            None => transition.catalog.is_some(),
        }
    }

    fn allocate(&mut self, node: Node, fingerprint: u64) -> u64 {
        let ino = if node == Node::Root {
            ROOT
        } else {
            self.next + 1
        };
        self.next = ino;
        self.inodes.insert(node.clone(), ino);
        self.slots.insert(
            ino,
            Slot {
                node,
                lookups: 0,
                version: None,
                detached: false,
                too_large: false,
                fingerprint,
            },
        );
        ino
    }
}

/// The rows read lately, within a bound of bytes.
#[derive(Debug)]
pub(super) struct RowCache {
    rows: LruCache<(Arc<TableRef>, SharedKey), Arc<CachedRow>>,
    bytes: usize,
    limit: usize,
}

impl RowCache {
    pub(super) fn new(limit: usize) -> Self {
        RowCache {
            rows: LruCache::unbounded(),
            bytes: 0,
            limit,
        }
    }

    /// How many rows there are.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// A row, if it was read lately.
    pub(super) fn get(&mut self, table: &Arc<TableRef>, key: &SharedKey) -> Option<Arc<CachedRow>> {
        self.rows
            .get(&(Arc::clone(table), Arc::clone(key)))
            .cloned()
    }

    /// Keeps a row. The newest is kept whatever its size, so that a large file is not read from
    /// the LDB once for each part of it.
    pub(super) fn insert(&mut self, table: &Arc<TableRef>, key: &SharedKey, row: Arc<CachedRow>) {
        self.bytes += weight(&row);
        if let Some((_, old)) = self.rows.push((Arc::clone(table), Arc::clone(key)), row) {
            self.bytes -= weight(&old);
        }
        while self.bytes > self.limit && self.rows.len() > 1 {
            if let Some((_, old)) = self.rows.pop_lru() {
                self.bytes -= weight(&old);
            }
        }
    }

    /// Drops one row.
    pub(super) fn remove(&mut self, table: &Arc<TableRef>, key: &SharedKey) {
        if let Some(old) = self.rows.pop(&(Arc::clone(table), Arc::clone(key))) {
            self.bytes -= weight(&old);
        }
    }

    /// Drops the rows for which `stale` says yes.
    pub(super) fn remove_where(&mut self, stale: impl Fn(&TableRef, &SharedKey) -> bool) {
        let keys: Vec<_> = self
            .rows
            .iter()
            .map(|(k, _)| k)
            .filter(|(t, k)| stale(t, k))
            .cloned()
            .collect();
        for (table, key) in keys {
            self.remove(&table, &key);
        }
    }

    /// Drops all rows.
    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.bytes = 0;
    }
}

/// About how much memory a cached row takes.
fn weight(row: &CachedRow) -> usize {
    const ENTRY: usize = 200;
    let values: usize = row
        .row
        .values
        .iter()
        .map(|v| v.bytes().map_or(0, <[u8]>::len) + size_of_val(v))
        .sum();
    ENTRY + values
}
