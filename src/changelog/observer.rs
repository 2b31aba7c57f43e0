//! What the reflector tells a change log: which rows each commit changed.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use super::catch_up::each_row;
use super::line::Line;
use super::queue::{Giver, queue};
use super::writer::{Job, Writer};
use crate::ldb::reader::Reader;
use crate::model::{Catalog, ChangeSet, Extent, Table, TableRef};
use crate::reflector::CommitObserver;

/// The rows of tables that are dropped, cleared or changed as a whole are kept up to here: those
/// before the commit, and those after it.
const MAX_BYTES: usize = 64 << 20;

/// Hands over what each commit changed.
pub struct Observer {
    jobs: Option<Giver<Job>>,
    failing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    ldb: PathBuf,
    catalog: Arc<Catalog>,
    /// The rows, before the commit, of tables that change as a whole.
    old: HashSet<Line>,
    /// Whether there are more.
    unknown: bool,
    /// [`MAX_BYTES`], but for tests.
    max_bytes: usize,
}

impl Observer {
    pub(super) fn start(
        writer: Writer,
        ldb: &Path,
        catalog: Arc<Catalog>,
    ) -> std::io::Result<Self> {
        let (send, jobs) = queue();
        let failing = writer.failing();
        let thread = thread::Builder::new()
            .name("changelog".into())
            .spawn(move || writer.run(jobs))?;
        Ok(Observer {
            jobs: Some(send),
            failing,
            thread: Some(thread),
            ldb: ldb.to_owned(),
            catalog,
            old: HashSet::new(),
            unknown: false,
            max_bytes: MAX_BYTES,
        })
    }

    /// Remembers the rows of a table. Another connection sees the state before the commit until
    /// that has happened.
    fn remember(&mut self, reader: Option<&mut Reader>, table: &Table) {
        let mut bytes: usize = self.old.iter().map(Line::size).sum();
        let max_bytes = self.max_bytes;
        let read = reader.map(|reader| {
            each_row(reader, table, |line| {
                bytes += line.size();
                self.old.insert(line);
                bytes < max_bytes
            })
        });
        self.unknown |= !matches!(read, Some(Ok(()))) || bytes >= max_bytes;
    }

    /// The lines of what a commit has changed; `None` if they are too many to be held.
    fn lines(&mut self, changes: &ChangeSet) -> Option<Vec<Line>> {
        let mut lines = Vec::new();
        let mut bytes = 0;
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
                            bytes += line.size();
                            self.old.remove(&line);
                            lines.push(line);
                            bytes < self.max_bytes
                        })
                    });
                    self.unknown |= !matches!(read, Some(Ok(())));
                    if bytes >= self.max_bytes {
                        return None;
                    }
                }
            }
        }
        lines.extend(self.old.drain());
        // Commits tell their rows in no order.
        lines.sort_unstable();
        Some(lines)
    }

    fn table(&self, name: &TableRef) -> Option<Arc<Table>> {
        self.catalog.get(name).cloned()
    }
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
        let Some(jobs) = &mut self.jobs else { return };
        let there = match lines {
            Some(lines) => jobs.give(Job {
                from: changes.from,
                to: changes.to,
                lines,
                unknown: self.unknown,
            }),
            None => jobs.leave_out(),
        };
        if !there {
            // It cannot come back: nothing more is gathered for it.
            self.jobs = None;
            self.failing.store(true, Ordering::Relaxed);
            tracing::error!("the change log is written no more: its thread has ended");
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::changelog::{ChangeLog, Settings};
    use crate::ldb::LdbWriter;
    use crate::ledger::Entry;
    use crate::model::{LedgerTime, Seq};

    /// Commits statements as one batch behind `from`, and tells `observer`.
    fn commit(writer: &mut LdbWriter, observer: &mut Observer, from: u64, statements: &[&str]) {
        let mut batch = writer.begin().unwrap();
        for (seq, statement) in (from + 1..).zip(statements) {
            let entry = Entry {
                seq: Seq::new(seq),
                time: LedgerTime::from_micros(0),
                statement: (*statement).to_owned(),
            };
            batch.apply(&entry).unwrap();
        }
        let changes = batch.finish().unwrap().unwrap();
        observer.before_commit(&changes);
        batch.commit().unwrap();
        observer.after_commit(&changes);
    }

    #[test]
    fn what_is_too_much_to_be_handed_over_is_read_from_the_ldb() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("changes.log");
        let settings = Settings {
            path: path.clone(),
            max_size: 1 << 20,
        };
        let ldb = dir.path().join("ldb.db");
        let mut writer = LdbWriter::open(&ldb).unwrap();
        let log = ChangeLog::open(&settings, dir.path()).unwrap();
        let mut observer = log
            .start(&ldb, Arc::clone(writer.catalog()), Seq::ZERO)
            .unwrap();
        let table = r#"CREATE TABLE app___items ("id" INTEGER, "n" INTEGER, PRIMARY KEY("id"));"#;
        let row = r#"REPLACE INTO app___items ("id","n") VALUES(1,1),(2,2),(3,3)"#;
        commit(&mut writer, &mut observer, 0, &[table, row]);
        observer.max_bytes = 1;
        let field = r#"ALTER TABLE app___items ADD COLUMN "m" INTEGER"#;
        commit(&mut writer, &mut observer, 2, &[field]);
        drop(observer);
        let text = std::fs::read_to_string(&path).unwrap();
        let ids: Vec<&str> = text
            .lines()
            .filter_map(|line| line.split(r#""value":"#).nth(1)?.split('}').next())
            .collect();
        assert_eq!(ids, ["1", "2", "3", "1", "2", "3"], "{text}");
    }
}
