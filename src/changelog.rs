//! The change log: a file in ctlstore's format, one line for each changed row, for programs that
//! tail it to drop what they have cached.
//!
//! It is a consumer behind the commit. The reflector's thread hands over what a commit changed; a
//! thread of its own writes it. Where that cannot keep up, where the disk is full, and after a
//! crash, what is missing is taken from the LDB's journal, or, when that does not reach back, from
//! the tables as they are: a row that has not changed may be told, one that has changed always is.
//! When rows may have gone that cannot be told any more, the numbering skips one: ctlstore's readers
//! then know that they are out of step and drop everything.

mod catch_up;
mod file;
mod line;
mod observer;
mod progress;
mod queue;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use observer::Observer;

use crate::model::{Catalog, Seq};
use file::LogFile;
use progress::Progress;
use writer::Writer;

/// What can be set of a change log.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The file.
    pub path: PathBuf,
    /// A new one is begun before it would pass this many bytes.
    pub max_size: u64,
}

/// Why a change log cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the change log {}: {reason}; {remedy}", path.display())]
pub struct ChangeLogError {
    action: &'static str,
    path: PathBuf,
    reason: std::io::Error,
    remedy: &'static str,
}

/// A change log that is open and not written yet.
pub struct ChangeLog {
    file: LogFile,
    progress: Progress,
}

impl ChangeLog {
    /// Opens or creates the file, and what is remembered of it in the directory `state`. A line that
    /// a crash has cut is removed.
    pub fn open(settings: &Settings, state: &Path) -> Result<Self, ChangeLogError> {
        let error = |action, path: &Path, remedy| {
            let path = path.to_owned();
            move |reason| ChangeLogError {
                action,
                path,
                reason,
                remedy,
            }
        };
        let file = LogFile::open(&settings.path, settings.max_size).map_err(error(
            "open",
            &settings.path,
            "name another with --changelog, or mend its permissions",
        ))?;
        let remembered = state.join("changelog");
        let progress = Progress::open(&remembered).map_err(error(
            "read what is remembered of",
            &remembered,
            "mend the permissions of the state directory",
        ))?;
        Ok(ChangeLog { file, progress })
    }

    /// Starts writing: from what was written last on, or from `position`, where the LDB `ldb` stands
    /// with the tables of `catalog`, if this is the first time.
    pub fn start(
        self,
        ldb: &Path,
        catalog: Arc<Catalog>,
        position: Seq,
    ) -> std::io::Result<Observer> {
        let writer = Writer::new(self.file, self.progress, ldb, position);
        Observer::start(writer, ldb, catalog)
    }
}
