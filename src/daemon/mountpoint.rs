//! The mount point: whether we may mount there, who else does, and how a mount goes away.
//!
//! Which mounts there are is read from the kernel's list; a mount itself is only ever asked with a
//! deadline.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::lock::{shown_pid, try_flock};
use super::process::Identity;
use super::{deadline, mountinfo};

const ASK: Duration = Duration::from_secs(2);

/// Why nothing can be mounted at a place, or cannot be unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountpointError {
    /// There is nothing.
    #[error("cannot mount on {path}: there is no such directory; create it with 'mkdir {path}'", path = .0.display())]
    Missing(PathBuf),
    /// It is something else.
    #[error("cannot mount on {}: it is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// It holds files, which the mount would hide.
    #[error("cannot mount on {}: the directory is not empty; give an empty one", .0.display())]
    NotEmpty(PathBuf),
    /// We may not.
    #[error("cannot mount on {}: {why}", path.display())]
    NotPermitted {
        /// The mount point.
        path: PathBuf,
        /// What is missing and what to do.
        why: String,
    },
    /// ctlfs is mounted there and alive.
    #[error(
        "cannot mount on {}: it is already a ctlfs mount{}; unmount it with 'ctlfs unmount {}'",
        path.display(), shown_pid(*pid), path.display()
    )]
    AlreadyMounted {
        /// The mount point.
        path: PathBuf,
        /// Its daemon.
        pid: Option<u32>,
    },
    /// Another ctlfs is about to mount there.
    #[error(
        "cannot mount on {}: another ctlfs daemon is mounting there just now",
        .0.display()
    )]
    Busy(PathBuf),
    /// Something else is mounted there.
    #[error(
        "cannot mount on {}: it is the mount point of another file system ({kind}); \
         give a directory within it",
        path.display()
    )]
    OtherFileSystem {
        /// The mount point.
        path: PathBuf,
        /// The other file system's type.
        kind: String,
    },
    /// There is no FUSE.
    #[error("cannot mount on {}: {why}", path.display())]
    NoFuse {
        /// The mount point.
        path: PathBuf,
        /// What is missing and what to do.
        why: String,
    },
    /// What is mounted there is not ours to unmount.
    #[error("cannot unmount {}: it is not a ctlfs mount", .0.display())]
    NotOurs(PathBuf),
    /// The system refused.
    #[error("cannot {what} {}: {reason}", path.display())]
    System {
        /// `mount on`, `unmount`.
        what: &'static str,
        /// The mount point.
        path: PathBuf,
        /// What it said.
        reason: io::Error,
    },
}

/// A directory that we may mount on, and that no other ctlfs will while this value lives.
#[derive(Debug)]
pub(crate) struct Claimed {
    /// The directory, absolute and without links.
    pub(crate) path: PathBuf,
    /// How many mounts of dead daemons were removed from it.
    pub(crate) replaced: usize,
    _lock: Option<File>,
}

/// Makes sure that we can mount on `path`; removes what dead daemons left mounted there.
pub(crate) fn claim(path: &Path) -> Result<Claimed, MountpointError> {
    let path = mountinfo::resolve(path).map_err(|error| refused(path, error))?;
    let mut replaced = 0;
    while let Some(mount) = covering(&path)? {
        if !(mount.is_ctlfs() && is_stale(&path)) {
            return Err(taken(path, &mount));
        }
        detach(&path, true).map_err(|reason| MountpointError::System {
            what: "unmount the dead mount on",
            path: path.clone(),
            reason,
        })?;
        replaced += 1;
    }
    check_directory(&path)?;
    check_fuse(&path)?;
    let lock = lock(&path)?;
    // Another daemon can have mounted between the first look and the lock.
    match covering(&path)? {
        Some(mount) => Err(taken(path, &mount)),
        None => Ok(Claimed {
            path,
            replaced,
            _lock: lock,
        }),
    }
}

fn covering(path: &Path) -> Result<Option<mountinfo::Mount>, MountpointError> {
    mountinfo::at(path).map_err(|reason| MountpointError::System {
        what: "mount on",
        path: path.to_owned(),
        reason,
    })
}

fn taken(path: PathBuf, mount: &mountinfo::Mount) -> MountpointError {
    if mount.is_ctlfs() {
        let pid = daemon_identity(&path).map(|daemon| daemon.pid);
        MountpointError::AlreadyMounted { path, pid }
    } else {
        MountpointError::OtherFileSystem {
            path,
            kind: mount.kind.clone(),
        }
    }
}

fn refused(path: &Path, error: io::Error) -> MountpointError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::NotFound => MountpointError::Missing(path),
        io::ErrorKind::NotADirectory => MountpointError::NotADirectory(path),
        io::ErrorKind::PermissionDenied => MountpointError::NotPermitted {
            path,
            why: "permission denied; give a directory that you own".into(),
        },
        _ => MountpointError::System {
            what: "mount on",
            path,
            reason: error,
        },
    }
}

fn check_directory(path: &Path) -> Result<(), MountpointError> {
    let metadata = fs::metadata(path).map_err(|error| refused(path, error))?;
    if !metadata.is_dir() {
        return Err(MountpointError::NotADirectory(path.to_owned()));
    }
    if fs::read_dir(path)
        .map_err(|error| refused(path, error))?
        .next()
        .is_some()
    {
        return Err(MountpointError::NotEmpty(path.to_owned()));
    }
    let name = c_path(path).map_err(|error| refused(path, error))?;
    // fusermount3 lets a user cover only what that user may write. Root mounts without it, also in
    // a read-only file system, where this would be refused.
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    if !is_root() && unsafe { libc::access(name.as_ptr(), libc::W_OK) } != 0 {
        return Err(refused(path, io::Error::last_os_error()));
    }
    Ok(())
}

fn check_fuse(path: &Path) -> Result<(), MountpointError> {
    let no_fuse = |why: String| {
        Err(MountpointError::NoFuse {
            path: path.to_owned(),
            why,
        })
    };
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(device) => {
            // Containers like to cover devices with something harmless.
            let metadata = device.metadata().map_err(|error| refused(path, error))?;
            if metadata.rdev() != libc::makedev(10, 229) {
                return no_fuse(
                    "/dev/fuse is something other than the FUSE device; pass the device into the \
                     container"
                        .into(),
                );
            }
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return no_fuse(
                "/dev/fuse may not be opened (permission denied); give this user or container \
                 access to the device"
                    .into(),
            );
        }
        Err(error) => {
            return no_fuse(format!(
                "/dev/fuse cannot be opened ({error}); load the kernel's FUSE module with \
                 'modprobe fuse', or pass the device into the container"
            ));
        }
    }
    if !is_root() && fusermount("--version", None).is_err() {
        return no_fuse(
            "fusermount3, which mounts for ordinary users, is not installed; install the package \
             fuse3 or run as root"
                .into(),
        );
    }
    Ok(())
}

fn lock(path: &Path) -> Result<Option<File>, MountpointError> {
    let directory = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(path)
        .map_err(|error| refused(path, error))?;
    match try_flock(&directory) {
        Ok(true) => Ok(Some(directory)),
        Ok(false) => Err(MountpointError::Busy(path.to_owned())),
        // Some network file systems cannot lock directories. The kernel's list, read again after
        // this, still tells two daemons apart that did not start in the same instant.
        Err(error) => {
            tracing::debug!(%error, "the mount point cannot be locked");
            Ok(None)
        }
    }
}

/// Whether the mount on `path` has lost its daemon.
pub(crate) fn is_stale(path: &Path) -> bool {
    let Ok(name) = c_path(path) else {
        return false;
    };
    // A stat could be answered from the kernel's cache, which outlives a daemon; statfs always asks.
    // A daemon that does not answer in time is alive, if not well.
    deadline::call(ASK, move || {
        let mut about = MaybeUninit::<libc::statfs>::uninit();
        // SAFETY: `name` is NUL-terminated, `about` is writable, and both outlive the call.
        let failed = unsafe { libc::statfs(name.as_ptr(), about.as_mut_ptr()) } != 0;
        let error = io::Error::last_os_error();
        // The second one is for a request that was waiting when the daemon died.
        failed
            && matches!(
                error.raw_os_error(),
                Some(libc::ENOTCONN | libc::ECONNABORTED)
            )
    })
    .unwrap_or(false)
}

/// Reads the status file of the mount on `path`.
pub(crate) fn read_status(path: &Path, limit: Duration) -> io::Result<Vec<u8>> {
    let file = path.join(".ctlfs/status.json");
    deadline::call(limit, move || fs::read(file)).unwrap_or_else(|| {
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "its daemon does not answer",
        ))
    })
}

/// The process that serves the mount on `path`, as far as it can be asked.
pub(crate) fn daemon_identity(path: &Path) -> Option<Identity> {
    Identity::of(&serde_json::from_slice(&read_status(path, ASK).ok()?).ok()?)
}

/// Unmounts what is on top of `path`; when `lazy`, also while it is in use.
pub(crate) fn detach(path: &Path, lazy: bool) -> io::Result<()> {
    let name = c_path(path)?;
    let flags = libc::UMOUNT_NOFOLLOW | if lazy { libc::MNT_DETACH } else { 0 };
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    if unsafe { libc::umount2(name.as_ptr(), flags) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EPERM) {
        return fusermount(if lazy { "-uz" } else { "-u" }, Some(path));
    }
    Err(error)
}

fn fusermount(option: &str, path: Option<&Path>) -> io::Result<()> {
    let mut command = Command::new("fusermount3");
    command.arg(option);
    if let Some(path) = path {
        command.arg("--").arg(path);
    }
    let output = command.stdin(Stdio::null()).output().map_err(|error| {
        io::Error::new(error.kind(), format!("cannot run fusermount3: {error}"))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    Err(io::Error::other(said.trim().to_owned()))
}

pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the path holds a NUL byte"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_cannot_be_mounted_on_say_why() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "x").unwrap();
        let cases = [
            (root.path().join("none"), "there is no such directory"),
            (file, "it is not a directory"),
            (root.path().to_owned(), "the directory is not empty"),
            ("/proc".into(), "mount point of another file system (proc)"),
        ];
        for (path, why) in cases {
            let error = claim(&path).unwrap_err().to_string();
            assert!(error.starts_with("cannot mount on /"), "{error}");
            assert!(error.contains(why), "{error}");
        }
    }
}
