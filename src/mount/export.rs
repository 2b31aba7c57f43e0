//! Tables as files, made when they are first asked for: who makes them, once for all who ask, and
//! away from the workers that answer everything else.
//!
//! A lookup of such a file says how large it may get at the most and lets the kernel keep that for
//! no time at all. So the kernel asks for the attributes when the file is opened, for with
//! `default_permissions` it checks the mode, and learns the size. Should it ever read without
//! having asked, as it does for `sendfile` and page faults, a short answer shows it the end; a size
//! of zero would have been the end. Once made, the content is fixed for this inode, as that of any
//! version.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::answer::Fault;
use super::server::{MAX_TRIES, Server};
use super::state::{Version, View};
use crate::ldb::reader::Mark;
use crate::model::{Seq, Table};
use crate::tree::export::{ExportFile, Format, Writer};
use crate::tree::node::Node;

/// More than the journal holds.
const CHANGES_SIZE: u64 = 1 << 30;
/// How many files are made at once, each with its content in memory: a small one need not wait
/// for a large one.
const THREADS: usize = 2;

/// Answers a request once the file it is about has been made, or could not be.
pub(super) type Answer = Box<dyn FnOnce(&Server) + Send>;

/// Makes the files. Dropping it ends its threads when they have answered what was asked.
pub(super) struct Renderer {
    queue: Arc<Queue>,
}

#[derive(Default)]
struct Queue {
    work: Mutex<Work>,
    more: Condvar,
}

#[derive(Default)]
struct Work {
    inodes: VecDeque<u64>,
    /// Who waits for an inode. It is there from the first request until its file is made, so that
    /// those who ask meanwhile share it.
    waiting: HashMap<u64, Vec<Answer>>,
    closed: bool,
}

impl Renderer {
    /// Starts the threads.
    pub(super) fn start(server: &Arc<Server>) -> io::Result<Self> {
        let renderer = Renderer {
            queue: Arc::default(),
        };
        for _ in 0..THREADS {
            let (queue, server) = (Arc::clone(&renderer.queue), Arc::clone(server));
            thread::Builder::new()
                .name("export".into())
                .spawn(move || queue.work_off(&server))?;
        }
        Ok(renderer)
    }

    /// Has the file of `ino` made, if it is not yet, and `answer` called afterwards.
    pub(super) fn submit(&self, ino: u64, answer: Answer) {
        let mut work = self.queue.work();
        match work.waiting.get_mut(&ino) {
            Some(waiting) => waiting.push(answer),
            None => {
                work.waiting.insert(ino, vec![answer]);
                work.inodes.push_back(ino);
                drop(work);
                self.queue.more.notify_one();
            }
        }
    }
}

impl Drop for Renderer {
    fn drop(&mut self) {
        self.queue.work().closed = true;
        self.queue.more.notify_all();
    }
}

impl Queue {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<u64> {
        let mut work = self.work();
        loop {
            if let Some(ino) = work.inodes.pop_front() {
                return Some(ino);
            }
            if work.closed {
                return None;
            }
            work = self.more.wait(work).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn work_off(&self, server: &Server) {
        while let Some(ino) = self.next() {
            // Should it panic, those who wait get an error, and the next file is made.
            match catch_unwind(AssertUnwindSafe(|| server.render(ino))) {
                Ok(Ok(()) | Err(Fault::Stale | Fault::TooLarge)) => {}
                Ok(Err(fault)) => tracing::error!(%fault, "cannot show a table as a file"),
                Err(_) => tracing::error!("a table could not be shown: a defect of ctlfs"),
            }
            let answers = self.work().waiting.remove(&ino).unwrap_or_default();
            for answer in answers {
                if catch_unwind(AssertUnwindSafe(|| answer(server))).is_err() {
                    tracing::error!("a request failed in a way that is a defect of ctlfs");
                }
            }
        }
    }
}

impl Server {
    /// Whether the content of `ino` has to be made before anything can be said of it.
    pub(super) fn awaits_rendering(&self, ino: u64) -> bool {
        let state = self.state();
        state
            .slot(ino)
            .is_some_and(|slot| slot.node.is_lazy() && slot.version.is_none() && !slot.too_large)
    }

    /// Makes the content of `ino`, if it is not there yet.
    ///
    /// It is the content that the table has now, also if the inode has been superseded meanwhile:
    /// nobody was shown anything of it before.
    pub(super) fn render(&self, ino: u64) -> Result<(), Fault> {
        for _ in 0..MAX_TRIES {
            let (node, view) = {
                let state = self.state();
                let slot = state.slot(ino).ok_or(Fault::Stale)?;
                if slot.version.is_some() || slot.too_large {
                    return Ok(());
                }
                (slot.node.clone(), state.view())
            };
            let Node::Export(name, file) = &node else {
                return Ok(());
            };
            // It went with its table before anybody asked.
            let table = view.catalog.get(name).ok_or(Fault::Stale)?;
            let rendered = match file {
                ExportFile::Rows(format) => self.render_rows(&view, table, *format),
                ExportFile::Changes => self.render_changes(&view, table),
            };
            let Some(rendered) = self.checked(&view, rendered)? else {
                continue;
            };
            return match rendered {
                Rendered::Done(bytes, mark) => {
                    let version = Arc::new(Version {
                        bytes: Some(self.keeper.keep(bytes)),
                        mark,
                    });
                    if let Some(slot) = self.state().slot_mut(ino) {
                        slot.version.get_or_insert_with(|| Arc::clone(&version));
                    }
                    Ok(())
                }
                Rendered::TooLarge => {
                    if let Some(slot) = self.state().slot_mut(ino) {
                        slot.too_large = true;
                    }
                    Err(Fault::TooLarge)
                }
                Rendered::Moved => {
                    self.catch_up()?;
                    continue;
                }
            };
        }
        Err(Fault::Restless)
    }

    fn render_rows(&self, view: &View, table: &Table, format: Format) -> Result<Rendered, Fault> {
        let mut writer = Writer::new(&table.schema, format);
        let mut moved = false;
        let mut too_large = false;
        let scanned = self.read(|reader| {
            reader.scan(
                table,
                |seq| {
                    moved = !self.shows(view, seq);
                    !moved
                },
                |values| {
                    writer.row(values);
                    too_large = self.is_too_large(writer.len());
                    !too_large
                },
            )
        })?;
        if moved {
            return Ok(Rendered::Moved);
        }
        if too_large {
            return Ok(Rendered::TooLarge);
        }
        // What stands behind the last row counts as well.
        let bytes = writer.finish();
        Ok(if self.is_too_large(bytes.len()) {
            Rendered::TooLarge
        } else {
            Rendered::Done(bytes, scanned.value)
        })
    }

    fn render_changes(&self, view: &View, table: &Table) -> Result<Rendered, Fault> {
        let (journal, mark) =
            self.read(|reader| Ok((reader.journal(table)?, reader.table_mark(table)?)))?;
        if !self.shows(view, journal.seq) {
            return Ok(Rendered::Moved);
        }
        // The journal has bounds of its own.
        Ok(Rendered::Done(journal.value, mark.value))
    }

    /// The size of an export that is not made yet: no less than it will be.
    pub(super) fn size_before(&self, file: ExportFile) -> u64 {
        match file {
            ExportFile::Rows(_) => self.export_max_size,
            ExportFile::Changes => self.export_max_size.max(CHANGES_SIZE),
        }
    }

    fn is_too_large(&self, length: usize) -> bool {
        u64::try_from(length).unwrap_or(u64::MAX) > self.export_max_size
    }

    /// Whether data read at `seq` is of the tables that `view` has; from here on, nothing older is
    /// shown anywhere.
    fn shows(&self, view: &View, seq: Seq) -> bool {
        // The content is fixed for its inode, so it does not matter whether the tree moves on.
        self.state().settle(view, seq) || (seq == view.seq && !self.fingerprints)
    }
}

/// How making a file went.
enum Rendered {
    Done(Vec<u8>, Mark),
    TooLarge,
    /// A commit came in between.
    Moved,
}
