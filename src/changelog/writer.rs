//! The thread that writes a change log.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use super::catch_up::{self, Missed};
use super::file::LogFile;
use super::line::Line;
use super::progress::Progress;
use super::queue::{Item, Taker};
use crate::ldb::LdbError;
use crate::ldb::reader::Reader;
use crate::model::Seq;

/// Lines are written in pieces of about this size.
const PIECE: usize = 64 << 10;
/// How often writing is tried again after it has failed.
const RETRY: Duration = Duration::from_secs(1);

/// What one commit changed.
pub(super) struct Job {
    pub(super) from: Seq,
    pub(super) to: Seq,
    pub(super) lines: Vec<Line>,
    /// Whether that may not be all of it.
    pub(super) unknown: bool,
}

/// Writes a change log.
pub(super) struct Writer {
    file: LogFile,
    progress: Progress,
    ldb: PathBuf,
    /// Up to which entry of the ledger everything is written.
    written: Seq,
    /// The number of the last line.
    number: u64,
    /// Lines that are not in the file yet.
    pending: Vec<u8>,
    /// The number of the last line in the file.
    flushed: u64,
    /// Whether the next line skips a number, and whether one has since `written`.
    skip: bool,
    skipped: bool,
    /// Whether something was missed before it began.
    behind: bool,
    failing: Arc<AtomicBool>,
}

/// Why nothing more could be written now.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("{0}")]
    File(#[from] io::Error),
    #[error("{0}")]
    Ldb(#[from] LdbError),
    #[error("the LDB cannot be read: {0}")]
    Sqlite(#[from] rusqlite::Error),
}

impl Writer {
    /// Goes on where `progress` says; for the first time, at `position`.
    pub(super) fn new(file: LogFile, progress: Progress, ldb: &Path, position: Seq) -> Self {
        let (written, number) = progress.found.unwrap_or((position, 0));
        // A crash may have come after lines were written, and a crash of the machine before they
        // reached the disk.
        let number = number.max(file.last_number.unwrap_or(0));
        // Nobody knows what was missed since the last line of a log that was written before.
        let unknown = progress.found.is_none() && file.last_number.is_some();
        // The LDB is built anew, perhaps from another ledger.
        let anew = position < written;
        let (written, skip) = (written.min(position), unknown || anew);
        // Decided before the reflector goes on: what it commits from here on is handed over.
        let behind = written < position;
        Writer {
            file,
            progress,
            ldb: ldb.to_owned(),
            written,
            number,
            pending: Vec::new(),
            flushed: number,
            skip,
            skipped: false,
            behind,
            failing: Arc::default(),
        }
    }

    /// Whether writing fails now, and what is handed over is not taken.
    pub(super) fn failing(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.failing)
    }

    /// Writes what comes until nothing more can come.
    pub(super) fn run(mut self, mut jobs: Taker<Job>) {
        let begun = if self.behind {
            self.catch_up()
        } else {
            self.done(self.written)
        };
        self.note(begun);
        loop {
            if self.failing.load(Ordering::Relaxed) {
                match jobs.take(Some(RETRY)) {
                    // The journal has it.
                    Ok(_) => continue,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                let caught_up = self.catch_up();
                self.note(caught_up);
                if !self.failing.load(Ordering::Relaxed) {
                    // A commit in between was not handed over.
                    let caught_up = self.catch_up();
                    self.note(caught_up);
                }
            } else {
                let done = match jobs.take(None) {
                    Ok(Item::Job(job)) => self.take(&job),
                    Ok(Item::LeftOut) => self.catch_up(),
                    Err(_) => return,
                };
                self.note(done);
            }
        }
    }

    fn take(&mut self, job: &Job) -> Result<(), Failed> {
        if job.to <= self.written {
            return Ok(());
        }
        if job.from != self.written {
            return self.catch_up();
        }
        self.skip |= job.unknown;
        for line in &job.lines {
            self.push(line)?;
        }
        self.done(job.to)
    }

    /// Writes what is missing.
    fn catch_up(&mut self) -> Result<(), Failed> {
        let mut reader = Reader::open(&self.ldb)?;
        let position = reader.position()?;
        if position <= self.written {
            return self.done(self.written);
        }
        let upto = catch_up::read(&mut reader, self.written, |missed| match missed {
            Missed::Row(line) => self.push(line),
            Missed::Unknown => {
                self.skip = true;
                Ok(())
            }
        })?;
        self.done(upto)
    }

    fn push(&mut self, line: &Line) -> Result<(), Failed> {
        if std::mem::take(&mut self.skip) {
            self.number += 1;
            self.skipped = true;
        }
        let before = self.pending.len();
        line.push(&mut self.pending, self.number + 1);
        let length = self.pending.len() - before;
        if !self.file.has_room(before, length) {
            let line = self.pending.split_off(before);
            self.flush()?;
            self.file.rotate()?;
            self.pending = line;
        }
        self.number += 1;
        if self.pending.len() >= PIECE {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failed> {
        self.file.append(&self.pending)?;
        self.pending.clear();
        self.flushed = self.number;
        Ok(())
    }

    fn done(&mut self, upto: Seq) -> Result<(), Failed> {
        self.flush()?;
        // The next line will show it, whenever that comes.
        let number = self.number + u64::from(self.skip);
        self.progress.store(upto, number)?;
        (self.number, self.flushed, self.written) = (number, number, upto);
        (self.skip, self.skipped) = (false, false);
        Ok(())
    }

    /// Remembers and tells whether writing fails.
    fn note(&mut self, result: Result<(), Failed>) {
        let failed = result.is_err();
        let before = self.failing.swap(failed, Ordering::Relaxed);
        if failed {
            // What did not get into the file has no number.
            self.pending.clear();
            self.number = self.flushed;
            self.skip |= std::mem::take(&mut self.skipped);
        }
        match result {
            Err(why) if !before => tracing::warn!(
                "cannot write the change log: {why}; trying again, and writing then what is missing"
            ),
            Ok(()) if before => tracing::info!("writing the change log again"),
            _ => {}
        }
    }
}
