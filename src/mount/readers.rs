//! The connections that workers read the LDB with: as many as are in use at once.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ldb::LdbError;
use crate::ldb::reader::Reader;

/// Readers of one LDB.
pub(super) struct Readers {
    path: PathBuf,
    idle: Mutex<Idle>,
}

struct Idle {
    readers: Vec<Reader>,
    /// Goes up when the file at the path has become another: older readers are not used again.
    generation: u64,
}

impl Readers {
    /// Opens the first reader of the LDB at `path`.
    pub(super) fn open(path: &Path) -> Result<Self, LdbError> {
        let readers = vec![Reader::open(path)?];
        Ok(Readers {
            path: path.to_owned(),
            idle: Mutex::new(Idle {
                readers,
                generation: 0,
            }),
        })
    }

    /// The LDB's path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads with a reader that nobody else uses meanwhile.
    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&mut Reader) -> rusqlite::Result<T>,
    ) -> Result<T, LdbError> {
        let (reader, generation) = {
            let mut idle = self.idle();
            (idle.readers.pop(), idle.generation)
        };
        let mut reader = match reader {
            Some(reader) => reader,
            None => Reader::open(&self.path)?,
        };
        let answer = read(&mut reader);
        let mut idle = self.idle();
        if idle.generation == generation {
            idle.readers.push(reader);
        }
        drop(idle);
        answer.map_err(|error| LdbError::from_sqlite(&self.path, "read", &error))
    }

    /// Another file stands at the path: from now on that one is read.
    pub(super) fn reopen(&self) {
        let mut idle = self.idle();
        idle.generation += 1;
        let old = std::mem::take(&mut idle.readers);
        drop(idle);
        drop(old);
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
