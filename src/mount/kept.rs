//! The bytes of versions that have been superseded but are still open somewhere: in memory up to a
//! limit, beyond it in an unlinked file of the state directory.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Keeps bytes until nobody needs them any more.
#[derive(Debug)]
pub(super) struct Keeper {
    limit: u64,
    directory: Option<PathBuf>,
    memory: AtomicU64,
    spilled: AtomicU64,
    file: Mutex<Spill>,
}

#[derive(Debug, Default)]
struct Spill {
    file: Option<Arc<File>>,
    end: u64,
    live: u64,
}

/// Bytes that are kept while this exists.
#[derive(Debug)]
pub(super) struct Kept {
    keeper: Arc<Keeper>,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Memory(Box<[u8]>),
    File {
        file: Arc<File>,
        offset: u64,
        length: u64,
    },
}

impl Keeper {
    /// Keeps up to `limit` bytes in memory and the others in a file of `directory`; without one,
    /// everything in memory.
    pub(super) fn new(limit: u64, directory: Option<PathBuf>) -> Arc<Self> {
        Arc::new(Keeper {
            limit,
            directory,
            memory: AtomicU64::new(0),
            spilled: AtomicU64::new(0),
            file: Mutex::default(),
        })
    }

    /// Bytes held in memory and in the file.
    pub(super) fn sizes(&self) -> (u64, u64) {
        (
            self.memory.load(Ordering::Relaxed),
            self.spilled.load(Ordering::Relaxed),
        )
    }

    /// Keeps `bytes`. If the file cannot take them they stay in memory: an open file must not lose
    /// its content because a disk is full.
    pub(super) fn keep(self: &Arc<Self>, bytes: Vec<u8>) -> Arc<Kept> {
        let length = bytes.len() as u64;
        let place = if self.memory.load(Ordering::Relaxed) + length <= self.limit {
            Place::Memory(bytes.into())
        } else {
            match self.spill(&bytes) {
                Ok(place) => place,
                Err(error) => {
                    tracing::warn!(%error, "cannot spill a superseded version to the state directory; keeping it in memory");
                    Place::Memory(bytes.into())
                }
            }
        };
        match &place {
            Place::Memory(_) => self.memory.fetch_add(length, Ordering::Relaxed),
            Place::File { .. } => self.spilled.fetch_add(length, Ordering::Relaxed),
        };
        Arc::new(Kept {
            keeper: Arc::clone(self),
            place,
        })
    }

    fn spill(&self, bytes: &[u8]) -> io::Result<Place> {
        let length = bytes.len() as u64;
        let (file, offset) = {
            let mut spill = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            let file = match &spill.file {
                Some(file) => Arc::clone(file),
                None => {
                    let directory = self.directory.as_ref().ok_or(io::ErrorKind::NotFound)?;
                    let file = File::options()
                        .read(true)
                        .write(true)
                        .mode(0o600)
                        .custom_flags(libc::O_TMPFILE)
                        .open(directory)?;
                    let file = Arc::new(file);
                    spill.file = Some(Arc::clone(&file));
                    file
                }
            };
            let offset = spill.end;
            spill.end += length;
            spill.live += length;
            (file, offset)
        };
        match file.write_all_at(bytes, offset) {
            Ok(()) => Ok(Place::File {
                file,
                offset,
                length,
            }),
            Err(error) => {
                self.release(offset, length, &file);
                Err(error)
            }
        }
    }

    fn release(&self, offset: u64, length: u64, file: &File) {
        punch(file, offset, length);
        let mut spill = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        spill.live = spill.live.saturating_sub(length);
        if spill.live == 0 {
            // Nobody reads it now: begin a new file rather than grow the offsets for ever.
            *spill = Spill::default();
        }
    }
}

/// Gives the range's blocks back to the disk. Best effort: some file systems cannot.
fn punch(file: &File, offset: u64, length: u64) {
    use std::os::fd::AsRawFd;
    let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else {
        return;
    };
    // SAFETY: fallocate takes no pointers; the descriptor is open for as long as `file` is borrowed.
    unsafe {
        libc::fallocate(
            file.as_raw_fd(),
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            length,
        );
    }
}

impl Kept {
    /// How many bytes there are.
    pub(super) fn len(&self) -> u64 {
        match &self.place {
            Place::Memory(bytes) => bytes.len() as u64,
            Place::File { length, .. } => *length,
        }
    }

    /// Up to `size` bytes from `offset`.
    pub(super) fn read(&self, offset: u64, size: u32) -> io::Result<Vec<u8>> {
        match &self.place {
            Place::Memory(bytes) => Ok(slice(bytes, offset, size).to_vec()),
            Place::File {
                file,
                offset: start,
                length,
            } => {
                let wanted = length.saturating_sub(offset).min(u64::from(size));
                let mut bytes = vec![0; usize::try_from(wanted).unwrap_or(0)];
                file.read_exact_at(&mut bytes, start + offset)?;
                Ok(bytes)
            }
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let length = self.len();
        match &self.place {
            Place::Memory(_) => {
                self.keeper.memory.fetch_sub(length, Ordering::Relaxed);
            }
            Place::File {
                file,
                offset,
                length,
            } => {
                self.keeper.spilled.fetch_sub(*length, Ordering::Relaxed);
                self.keeper.release(*offset, *length, file);
            }
        }
    }
}

/// The part of `bytes` that a read of `size` bytes at `offset` gets.
pub(super) fn slice(bytes: &[u8], offset: u64, size: u32) -> &[u8] {
    let start = usize::try_from(offset)
        .unwrap_or(usize::MAX)
        .min(bytes.len());
    let end = start.saturating_add(size as usize).min(bytes.len());
    bytes.get(start..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_beyond_the_limit_are_spilled_and_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let keeper = Keeper::new(100, Some(directory.path().to_path_buf()));
        let small = keeper.keep(vec![1; 100]);
        let large = keeper.keep(vec![2; 5000]);
        let other = keeper.keep(b"abcdef".to_vec());
        assert_eq!(keeper.sizes(), (100, 5006));
        assert_eq!(large.read(4990, 100).unwrap(), vec![2; 10]);
        assert_eq!(other.read(2, 3).unwrap(), b"cde");
        assert_eq!(other.read(9, 3).unwrap(), b"");
        assert_eq!(
            std::fs::read_dir(directory.path()).unwrap().count(),
            0,
            "the file has no name"
        );
        drop((small, large, other));
        assert_eq!(keeper.sizes(), (0, 0));
        assert_eq!(keeper.keep(vec![3; 200]).read(0, 1).unwrap(), [3]);
    }

    #[test]
    fn without_a_place_to_spill_bytes_stay_in_memory() {
        let keeper = Keeper::new(1, None);
        let kept = keeper.keep(vec![7; 50]);
        assert_eq!(keeper.sizes(), (50, 0));
        assert_eq!(kept.read(0, 99).unwrap(), vec![7; 50]);
    }
}
