//! The state directory and its lock: one daemon writes one LDB.
//!
//! The lock is the kernel's (`flock`), so it ends with the process however that ends. The number in
//! the file is only there to be shown.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Why a state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// It cannot be created or written.
    #[error(
        "cannot use the state directory {}: {reason}; give one that you can write with --state",
        path.display()
    )]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        reason: io::Error,
    },
    /// Another daemon has it.
    #[error(
        "cannot use the state directory {}: another ctlfs daemon{} is using it; unmount that one \
         or give another directory with --state",
        path.display(), shown_pid(*pid)
    )]
    Locked {
        /// The directory.
        path: PathBuf,
        /// The other daemon, if its number could be read.
        pid: Option<u32>,
    },
}

pub(crate) fn shown_pid(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

/// A state directory that is ours until this value is dropped.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    lock: File,
}

impl StateDir {
    /// Creates `path` (0700) if it is missing, and locks it.
    pub(crate) fn lock(path: &Path) -> Result<Self, LockError> {
        let unusable = |reason| LockError::Unusable {
            path: path.to_owned(),
            reason,
        };
        create(path).map_err(unusable)?;
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(unusable)?;
        if !try_flock(&lock).map_err(unusable)? {
            let mut text = String::new();
            // Without its number the error is still true.
            let _ = lock.read_to_string(&mut text);
            return Err(LockError::Locked {
                path: path.to_owned(),
                pid: text.trim().parse().ok(),
            });
        }
        lock.set_len(0).map_err(unusable)?;
        writeln!(lock, "{}", std::process::id()).map_err(unusable)?;
        Ok(StateDir {
            path: path.to_owned(),
            lock,
        })
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        // The file stays: unlinking a lock file lets two processes hold "the" lock.
        let _ = self.lock.set_len(0).and_then(|()| self.lock.rewind());
    }
}

/// Creates the directory `path`, readable by nobody else, unless it is there already.
pub(crate) fn create(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if fs::metadata(path)?.is_dir() {
                Ok(())
            } else {
                Err(io::Error::from_raw_os_error(libc::ENOTDIR))
            }
        }
        other => other,
    }
}

/// Takes the exclusive lock if nobody else has it.
pub(crate) fn try_flock(file: &File) -> io::Result<bool> {
    // SAFETY: flock takes no pointers, and the descriptor is open for as long as `file` is borrowed.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock {
        Ok(false)
    } else {
        Err(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_state_directory_has_one_owner() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        let first = StateDir::lock(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let error = StateDir::lock(&path).unwrap_err().to_string();
        assert!(
            error.contains(&format!("(pid {})", std::process::id())),
            "{error}"
        );
        drop(first);
        assert_eq!(StateDir::lock(&path).unwrap().path(), path);
    }

    #[test]
    fn a_file_is_no_state_directory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = StateDir::lock(file.path()).unwrap_err().to_string();
        assert!(error.contains("Not a directory"), "{error}");
    }
}
