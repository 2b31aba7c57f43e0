//! The state directory and its lock: one daemon writes one LDB.
//!
//! The lock is the kernel's (`flock`), so it ends with the process however that ends. The number in
//! the file is only there to be shown.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
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
    /// Others could read or replace what is in it.
    #[error("cannot use the state directory {}: {why}", path.display())]
    Exposed {
        /// The directory.
        path: PathBuf,
        /// How, and what to do.
        why: String,
    },
}

/// What a daemon keeps in its state directory, and what its names begin with.
const DATABASES: [&str; 6] = [
    "ldb.db",
    "ldb.db-wal",
    "ldb.db-shm",
    "ledger.db",
    "ledger.db-wal",
    "ledger.db-shm",
];
const OURS: [&str; 5] = ["ldb.db", "ledger.db", "changelog", "ctlfs.log", "lock"];

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
    /// Creates `path` (0700) if it is missing, and locks it. What is there already is closed to
    /// everybody else.
    pub(crate) fn lock(path: &Path) -> Result<Self, LockError> {
        let unusable = |reason| LockError::Unusable {
            path: path.to_owned(),
            reason,
        };
        prepare(path)?;
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

/// Creates the state directory `path` (0700) if it is missing. What is there already is closed to
/// everybody else, and must not be somebody else's.
pub(crate) fn prepare(path: &Path) -> Result<(), LockError> {
    create(path).map_err(|reason| LockError::Unusable {
        path: path.to_owned(),
        reason,
    })?;
    check_directory(path)?;
    for name in DATABASES {
        make_private(path, &path.join(name), 0o600)?;
    }
    Ok(())
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

/// Closes a directory that was there before. One with other things in it is somebody's for other
/// purposes, such as /tmp, and stays as it is: then others must not be able to replace files in it.
fn check_directory(path: &Path) -> Result<(), LockError> {
    let unusable = |reason| LockError::Unusable {
        path: path.to_owned(),
        reason,
    };
    let mut shared = false;
    for entry in fs::read_dir(path).map_err(unusable)? {
        let name = entry.map_err(unusable)?.file_name();
        let name = name.to_string_lossy();
        shared |= !OURS.iter().any(|ours| name.starts_with(ours));
    }
    if !shared {
        return make_private(path, path, 0o700);
    }
    let metadata = fs::metadata(path).map_err(unusable)?;
    if metadata.mode() & 0o022 == 0 {
        return check_owner(path, path, &metadata);
    }
    Err(LockError::Exposed {
        path: path.to_owned(),
        why: "it holds other things and other users may write in it; give one of its own with \
              --state"
            .into(),
    })
}

/// Takes every right of group and others from `file`, which belongs to the state directory `path`,
/// if it exists. By name: closing a descriptor of an LDB would drop the locks that SQLite holds on
/// it for this process.
fn make_private(path: &Path, file: &Path, mode: u32) -> Result<(), LockError> {
    let unusable = |reason| LockError::Unusable {
        path: path.to_owned(),
        reason,
    };
    let metadata = match fs::metadata(file) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(unusable(error)),
    };
    check_owner(path, file, &metadata)?;
    if metadata.mode() & 0o077 == 0 {
        return Ok(());
    }
    match fs::set_permissions(file, fs::Permissions::from_mode(mode)) {
        // Whoever closes a database last takes its log away.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        set => set.map_err(unusable),
    }
}

/// Refuses what another user owns and so can open to anybody.
fn check_owner(path: &Path, file: &Path, metadata: &fs::Metadata) -> Result<(), LockError> {
    let owner = metadata.uid();
    // SAFETY: geteuid has no preconditions and cannot fail.
    let own = unsafe { libc::geteuid() };
    if owner == own {
        return Ok(());
    }
    let what = match file.file_name() {
        Some(name) if file != path => name.display().to_string(),
        _ => "it".to_owned(),
    };
    Err(LockError::Exposed {
        path: path.to_owned(),
        why: format!(
            "{what} belongs to another user (uid {owner}); give it to uid {own} with chown, or \
             give another directory with --state"
        ),
    })
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

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_was_there_before_is_closed_to_others() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path();
        chmod(path, 0o755);
        for name in DATABASES {
            fs::write(path.join(name), "").unwrap();
            chmod(&path.join(name), 0o644);
        }
        let _state = StateDir::lock(path).unwrap();
        assert_eq!(mode(path), 0o700);
        for name in DATABASES {
            assert_eq!(mode(&path.join(name)), 0o600, "{name}");
        }
    }

    #[test]
    fn a_directory_for_other_things_is_left_as_it_is() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path();
        fs::write(path.join("notes"), "").unwrap();
        fs::write(path.join("ldb.db"), "").unwrap();
        chmod(path, 0o777);
        let error = StateDir::lock(path).unwrap_err().to_string();
        assert!(error.contains("other users may write in it"), "{error}");
        assert_eq!(mode(path), 0o777);
        chmod(path, 0o755);
        let _state = StateDir::lock(path).unwrap();
        assert_eq!((mode(path), mode(&path.join("ldb.db"))), (0o755, 0o600));
    }

    #[test]
    fn an_ldb_of_another_user_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("ldb.db");
        fs::write(&file, "").unwrap();
        std::os::unix::fs::chown(&file, Some(12_345), None).expect("run the tests as root");
        let error = StateDir::lock(root.path()).unwrap_err().to_string();
        assert!(error.contains("another user (uid 12345)"), "{error}");
    }

    #[test]
    fn a_file_is_no_state_directory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = StateDir::lock(file.path()).unwrap_err().to_string();
        assert!(error.contains("Not a directory"), "{error}");
    }
}
