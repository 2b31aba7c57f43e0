//! The flip as the reflector drives it: what the kernel may hold is invalidated before the commit,
//! attributes once more after it.
//!
//! A notification takes a lock of the directory in the kernel and waits for the lookups in flight
//! there, which need this daemon's workers. So none is sent while the state's lock is held, and no
//! worker ever waits for this thread.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use fuser::{INodeNo, Notifier};

use super::announcer::{Announcer, Job};
use super::flip::Plan;
use super::server::Server;
use crate::model::{Catalog, ChangeSet, Extent, TableRef};
use crate::reflector::CommitObserver;
use crate::tree::node::Node;

/// After so many changed rows the state's lock is let go for a moment.
const ROWS_AT_ONCE: usize = 256;

/// What the flip asks of the kernel.
pub(super) trait Kernel: Send {
    /// Forget what `name` in the directory `parent` leads to, or that it leads nowhere.
    fn invalidate_entry(&self, parent: u64, name: &[u8]) -> io::Result<()>;
    /// Forget the attributes of `ino`, but not its pages.
    fn invalidate_attributes(&self, ino: u64) -> io::Result<()>;
}

impl Kernel for Notifier {
    fn invalidate_entry(&self, parent: u64, name: &[u8]) -> io::Result<()> {
        self.inval_entry(INodeNo(parent), OsStr::from_bytes(name))
    }

    fn invalidate_attributes(&self, ino: u64) -> io::Result<()> {
        // A negative offset leaves the cached pages alone.
        self.inval_inode(INodeNo(ino), -1, 0)
    }
}

/// The thread that announces, while there is one.
pub(super) type SharedAnnouncer = Arc<Mutex<Option<Announcer>>>;

/// Carries out the flip for one mount.
pub(super) struct Flipper<K> {
    server: Arc<Server>,
    kernel: K,
    announcer: SharedAnnouncer,
    /// The tables before the commit under way.
    before: Arc<Catalog>,
    /// Inodes whose attributes are different ones once the commit has happened.
    attributes: Vec<u64>,
    /// Whether a failed notification was logged already.
    complained: bool,
    /// Whether a failed announcement was logged already.
    announcement_failed: bool,
    /// Tables that changed and were not announced: their `.seq` comes with the next announcement.
    missed: HashSet<TableRef>,
}

impl<K: Kernel> Flipper<K> {
    pub(super) fn new(server: Arc<Server>, kernel: K, announcer: SharedAnnouncer) -> Self {
        Flipper {
            server,
            kernel,
            announcer,
            before: Arc::default(),
            attributes: Vec::new(),
            complained: false,
            announcement_failed: false,
            missed: HashSet::new(),
        }
    }

    /// Invalidates the entries of `plan`, then keeps the old bytes of those files that the kernel
    /// did not forget thereby: the ones that somebody has open.
    fn carry_out(&mut self, plan: Plan) {
        for (parent, name) in plan.entries {
            let sent = self.kernel.invalidate_entry(parent, &name);
            self.note(sent);
        }
        for (ino, node) in plan.keep {
            if self
                .server
                .state()
                .slot(ino)
                .is_none_or(|slot| slot.version.is_some())
            {
                continue;
            }
            match self.server.old_version(&node) {
                Ok(version) => {
                    let version = version.map(Arc::new);
                    if let (Some(version), Some(slot)) =
                        (&version, self.server.state().slot_mut(ino))
                    {
                        slot.version.get_or_insert_with(|| Arc::clone(version));
                    }
                }
                Err(fault) => {
                    tracing::error!(%fault, "an open file may lose its content: its old version cannot be kept");
                }
            }
        }
        // Until the commit they are handed out for no time at all.
        self.invalidate_attributes(plan.attributes.iter().copied());
        self.attributes.extend(plan.attributes);
    }

    fn invalidate_attributes(&mut self, inodes: impl IntoIterator<Item = u64>) {
        for ino in inodes {
            let sent = self.kernel.invalidate_attributes(ino);
            self.note(sent);
        }
    }

    fn note(&mut self, sent: io::Result<()>) {
        // ENOTCONN and ENODEV: the mount is going away, and its caches with it.
        if let Err(error) = sent
            && !matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ENODEV))
            && !std::mem::replace(&mut self.complained, true)
        {
            tracing::error!(%error, "the kernel refused an invalidation; readers may see old values");
        }
    }

    fn carry_out_rows(&mut self, changes: &ChangeSet) {
        for change in &changes.tables {
            match &change.extent {
                Extent::Whole => {
                    let plan = self.server.state().collect_table(&change.table);
                    self.carry_out(plan);
                }
                Extent::Rows { rows, dirs } => {
                    let table = Arc::new(change.table.clone());
                    let (plan, fields) = {
                        let mut state = self.server.state();
                        let fields = state
                            .view()
                            .catalog
                            .get(&table)
                            .map_or(0, |table| table.schema.fields().len());
                        (state.collect_rows_table(&table), fields)
                    };
                    self.carry_out(plan);
                    for rows in rows.chunks(ROWS_AT_ONCE) {
                        let mut plan = Plan::default();
                        {
                            let mut state = self.server.state();
                            for row in rows {
                                state.collect_row(&mut plan, &table, &row.key, row.kind, fields);
                            }
                        }
                        self.carry_out(plan);
                    }
                    let mut plan = Plan::default();
                    for dir in dirs {
                        let node = Node::Dir(Arc::clone(&table), dir.prefix.as_ref().into());
                        self.server.state().collect_node(&mut plan, node);
                    }
                    self.carry_out(plan);
                }
            }
        }
    }
}

impl<K: Kernel> Flipper<K> {
    /// Raises the events of a commit that has happened. No lock that a worker needs is held: the
    /// announcing thread is served by the workers.
    fn announce(&mut self, changes: &ChangeSet) {
        let missed = std::mem::take(&mut self.missed);
        let jobs = self
            .server
            .plan_announcement(changes, &self.before, &missed);
        if jobs.is_empty() {
            self.server.end_announcement();
            return;
        }
        let began = Instant::now();
        let steps: u64 = jobs.iter().map(|job: &Job| job.steps.len() as u64).sum();
        let outcome = {
            let mut announcer = self
                .announcer
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            match announcer.as_mut() {
                Some(announcer) => announcer.announce(jobs),
                None => Ok(None),
            }
        };
        self.server.end_announcement();
        let failure = match outcome {
            Ok(Some(outcome)) => {
                self.server.announced.note(outcome.done, began.elapsed());
                outcome.error.map(|error| (outcome.failed, error))
            }
            Ok(None) => Some((steps, io::ErrorKind::TimedOut.into())),
            Err(error) => Some((steps, error)),
        };
        let Some((failed, error)) = failure else {
            return;
        };
        self.missed = missed;
        self.missed
            .extend(changes.tables.iter().map(|change| change.table.clone()));
        self.server.announced.fail(failed);
        if self.server.state().announcing.on
            && !std::mem::replace(&mut self.announcement_failed, true)
        {
            tracing::warn!(%error, "cannot announce some changes: who watches them hears nothing");
        }
    }
}

impl<K: Kernel> CommitObserver for Flipper<K> {
    fn before_commit(&mut self, changes: &ChangeSet) {
        self.attributes.clear();
        let plan = {
            let mut state = self.server.state();
            self.before = state.view().catalog;
            state.begin(changes);
            state.collect_catalog(changes)
        };
        self.carry_out(plan);
        self.carry_out_rows(changes);
    }

    fn after_commit(&mut self, changes: &ChangeSet) {
        let expired = {
            let mut state = self.server.state();
            state.finish();
            std::mem::take(&mut state.expired)
        };
        for (parent, name) in expired {
            let sent = self.kernel.invalidate_entry(parent, &name);
            self.note(sent);
        }
        let inodes: Vec<u64> = {
            let state = self.server.state();
            self.attributes
                .drain(..)
                .filter(|ino| state.slot(*ino).is_some())
                .collect()
        };
        // A lookup that was answered before the transition can have brought its attributes to the
        // kernel after they were invalidated: no lock makes one wait for the other.
        self.invalidate_attributes(inodes);
        self.announce(changes);
    }

    fn commit_failed(&mut self, _: &ChangeSet) {
        let kept = self.server.state().abandon();
        drop(kept);
    }
}
