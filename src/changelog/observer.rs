//! What the reflector tells a change log: which rows each commit changed.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::thread::{self, JoinHandle};

use super::line::Line;
use super::writer::{Job, Writer};
use crate::ldb::reader::Reader;
use crate::model::{Catalog, ChangeSet, Extent, Table, TableRef};
use crate::reflector::CommitObserver;

/// So many commits may wait to be written before the reflector waits for them.
const WAITING: usize = 16;
/// The rows of tables that are dropped, cleared or changed as a whole are kept up to here.
const MAX_OLD: usize = 64 << 20;

/// Hands over what each commit changed.
pub struct Observer {
    jobs: Option<SyncSender<Job>>,
    failing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    ldb: PathBuf,
    catalog: Arc<Catalog>,
    /// The rows, before the commit, of tables that change as a whole.
    old: HashSet<Line>,
    /// Whether there are more.
    unknown: bool,
}

impl Observer {
    pub(super) fn start(
        writer: Writer,
        ldb: &Path,
        catalog: Arc<Catalog>,
    ) -> std::io::Result<Self> {
        let (send, jobs) = mpsc::sync_channel(WAITING);
        let failing = writer.failing();
        let thread = thread::Builder::new()
            .name("changelog".into())
            .spawn(move || writer.run(&jobs))?;
        Ok(Observer {
            jobs: Some(send),
            failing,
            thread: Some(thread),
            ldb: ldb.to_owned(),
            catalog,
            old: HashSet::new(),
            unknown: false,
        })
    }

    /// Remembers the rows of a table. Another connection sees the state before the commit until
    /// that has happened.
    fn remember(&mut self, reader: Option<&mut Reader>, table: &Table) {
        let mut bytes: usize = self.old.iter().map(Line::size).sum();
        let read = reader.map(|reader| {
            each_row(reader, table, |line| {
                bytes += line.size();
                self.old.insert(line);
                bytes < MAX_OLD
            })
        });
        self.unknown |= !matches!(read, Some(Ok(()))) || bytes >= MAX_OLD;
    }

    /// The lines of what a commit has changed.
    fn lines(&mut self, changes: &ChangeSet) -> Vec<Line> {
        let mut lines = Vec::new();
        let mut reader = None;
        for change in &changes.tables {
            let Some(table) = self.table(&change.table) else {
                continue;
            };
            match &change.extent {
                Extent::Rows { rows, .. } => {
                    lines.extend(rows.iter().map(|row| Line::new(&table, &row.key)));
                }
                Extent::Whole => {
                    if reader.is_none() {
                        reader = Reader::open(&self.ldb).ok();
                    }
                    let read = reader.as_mut().map(|reader| {
                        each_row(reader, &table, |line| {
                            self.old.remove(&line);
                            lines.push(line);
                            true
                        })
                    });
                    self.unknown |= !matches!(read, Some(Ok(())));
                }
            }
        }
        lines.extend(self.old.drain());
        // Commits tell their rows in no order.
        lines.sort_unstable();
        lines
    }

    fn table(&self, name: &TableRef) -> Option<Arc<Table>> {
        self.catalog.get(name).cloned()
    }
}

fn each_row(
    reader: &mut Reader,
    table: &Table,
    mut take: impl FnMut(Line) -> bool,
) -> rusqlite::Result<()> {
    let key = table.schema.key();
    reader.scan(
        table,
        |_| true,
        |values| {
            let key: Vec<_> = key
                .iter()
                .filter_map(|index| values.get(*index).cloned())
                .collect();
            take(Line::new(table, &key))
        },
    )?;
    Ok(())
}

impl CommitObserver for Observer {
    fn before_commit(&mut self, changes: &ChangeSet) {
        self.old.clear();
        self.unknown = false;
        let whole = changes
            .tables
            .iter()
            .filter(|change| matches!(change.extent, Extent::Whole))
            .filter_map(|change| self.table(&change.table));
        let whole: Vec<_> = whole.collect();
        if whole.is_empty() {
            return;
        }
        if self.failing.load(Ordering::Relaxed) {
            // It may be written again by the time of the commit.
            self.unknown = true;
            return;
        }
        let mut reader = Reader::open(&self.ldb).ok();
        for table in whole {
            self.remember(reader.as_mut(), &table);
        }
    }

    fn after_commit(&mut self, changes: &ChangeSet) {
        if let Some(catalog) = &changes.catalog {
            self.catalog = Arc::clone(catalog);
        }
        // What is not handed over is found in the journal later.
        if self.failing.load(Ordering::Relaxed) {
            return;
        }
        let lines = self.lines(changes);
        let job = Job {
            from: changes.from,
            to: changes.to,
            lines,
            unknown: self.unknown,
        };
        if let Some(jobs) = &self.jobs {
            // The thread takes until we let go, so this does not wait for a disk that is full.
            let _ = jobs.send(job);
        }
    }

    fn commit_failed(&mut self, _: &ChangeSet) {
        self.old.clear();
    }
}

impl Drop for Observer {
    /// Waits until what was handed over is written.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
