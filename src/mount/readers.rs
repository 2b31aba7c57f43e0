//! The connections that the LDB is read with: those of the workers, as many as are in use at once,
//! and those that stay at one state of it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::ldb::LdbError;
use crate::ldb::reader::Reader;
use crate::model::Seq;

/// Up to how many connections that nobody uses those of a pin are kept for others.
const ENOUGH: usize = 8;

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
        let (mut reader, generation) = self.take()?;
        let answer = read(&mut reader);
        self.give(reader, generation);
        answer.map_err(|error| self.error(&error))
    }

    /// A reader that stays at the LDB as it is now.
    pub(super) fn hold(self: &Arc<Self>) -> Result<HeldReaders, LdbError> {
        let (mut reader, generation) = self.take()?;
        match reader.hold() {
            Ok(seq) => Ok(HeldReaders {
                home: Arc::clone(self),
                generation,
                seq,
                idle: Mutex::new(vec![reader]),
                returned: Condvar::new(),
            }),
            // With its transaction.
            Err(error) => Err(self.error(&error)),
        }
    }

    /// Another file stands at the path: from now on that one is read.
    pub(super) fn reopen(&self) {
        let mut idle = self.idle();
        idle.generation += 1;
        let old = std::mem::take(&mut idle.readers);
        drop(idle);
        drop(old);
    }

    fn take(&self) -> Result<(Reader, u64), LdbError> {
        let (reader, generation) = {
            let mut idle = self.idle();
            (idle.readers.pop(), idle.generation)
        };
        match reader {
            Some(reader) => Ok((reader, generation)),
            None => Ok((Reader::open(&self.path)?, generation)),
        }
    }

    fn give(&self, reader: Reader, generation: u64) {
        let mut idle = self.idle();
        if idle.generation == generation {
            idle.readers.push(reader);
        }
    }

    fn error(&self, error: &rusqlite::Error) -> LdbError {
        LdbError::from_sqlite(&self.path, "read", error)
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Readers that stay at one state of the LDB until this is dropped.
pub(super) struct HeldReaders {
    home: Arc<Readers>,
    generation: u64,
    seq: Seq,
    idle: Mutex<Vec<Reader>>,
    returned: Condvar,
}

impl HeldReaders {
    /// The position that they are at.
    pub(super) fn seq(&self) -> Seq {
        self.seq
    }

    /// Adds up to `more` readers, as far as they can be had at the same position: a commit may have
    /// come in between.
    pub(super) fn add(&mut self, more: usize) -> Result<(), LdbError> {
        for _ in 0..more {
            let (mut reader, generation) = self.home.take()?;
            let held = reader.hold().map_err(|error| self.home.error(&error))?;
            if held != self.seq || generation != self.generation {
                self.put_away(reader);
                break;
            }
            self.idle().push(reader);
        }
        Ok(())
    }

    /// Reads with one of them, when one is free. Reads end, so the wait is a short one.
    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&mut Reader) -> rusqlite::Result<T>,
    ) -> Result<T, LdbError> {
        let mut idle = self.idle();
        let reader = loop {
            match idle.pop() {
                Some(reader) => break reader,
                None => {
                    idle = self
                        .returned
                        .wait(idle)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        drop(idle);
        let mut taken = Taken {
            from: self,
            reader: Some(reader),
        };
        match &mut taken.reader {
            Some(reader) => read(reader).map_err(|error| self.home.error(&error)),
            None => Err(self.home.error(&rusqlite::Error::InvalidQuery)),
        }
    }

    fn put_away(&self, mut reader: Reader) {
        let enough = self.home.idle().readers.len() >= ENOUGH;
        // One whose transaction does not end is closed, and ends it thereby.
        if !enough && reader.release().is_ok() {
            self.home.give(reader, self.generation);
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Reader>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for HeldReaders {
    fn drop(&mut self) {
        let readers = std::mem::take(&mut *self.idle());
        for reader in readers {
            self.put_away(reader);
        }
    }
}

/// Gives a reader back also when reading panics: others wait for it.
struct Taken<'a> {
    from: &'a HeldReaders,
    reader: Option<Reader>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.from.idle().extend(self.reader.take());
        self.from.returned.notify_one();
    }
}
