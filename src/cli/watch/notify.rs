//! inotify, as far as it takes to learn that a look is worthwhile.
//!
//! It is only a hint: where no events are raised, looking now and then finds the same.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::thread;

use super::Event;

/// More directories are not watched; then the position is looked at.
const MAX_DIRECTORIES: usize = 64;

/// Tells of events in directories.
pub(super) struct Notifier {
    inotify: File,
    told: Arc<AtomicBool>,
}

impl Notifier {
    /// Sends [`Event::Changed`] when something happens, and no more of them until
    /// [`Notifier::seen`] is called.
    pub(super) fn start(events: Sender<Event>) -> io::Result<Self> {
        // SAFETY: it takes flags only; the descriptor is checked below.
        let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let inotify = unsafe { File::from_raw_fd(fd) };
        let mut reader = inotify.try_clone()?;
        let told = Arc::new(AtomicBool::new(false));
        let tell = Arc::clone(&told);
        thread::Builder::new()
            .name("inotify".into())
            .spawn(move || {
                let mut buffer = [0; 4096];
                while reader.read(&mut buffer).is_ok_and(|n| n > 0) {
                    if !tell.swap(true, Ordering::AcqRel) && events.send(Event::Changed).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Notifier { inotify, told })
    }

    /// The event was received: what happens from now on is told again.
    pub(super) fn seen(&self) {
        self.told.store(false, Ordering::Release);
    }

    /// Watches these directories, as far as they exist. Those that are watched already stay so.
    pub(super) fn watch(&self, directories: &[PathBuf]) {
        const MASK: u32 = libc::IN_CREATE
            | libc::IN_DELETE
            | libc::IN_MOVED_TO
            | libc::IN_CLOSE_WRITE
            | libc::IN_ONLYDIR;
        for directory in directories.iter().take(MAX_DIRECTORIES) {
            if let Ok(path) = CString::new(directory.as_os_str().as_bytes()) {
                // SAFETY: `path` is NUL-terminated and outlives the call.
                unsafe {
                    libc::inotify_add_watch(self.inotify.as_raw_fd(), path.as_ptr(), MASK);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn what_happens_in_a_directory_is_told_once_until_it_was_seen() {
        let dir = tempfile::tempdir().unwrap();
        let (send, events) = mpsc::channel();
        let notifier = Notifier::start(send).unwrap();
        notifier.watch(&[dir.path().to_owned(), dir.path().join("absent")]);
        let limit = Duration::from_secs(30);
        for name in ["a", "b"] {
            std::fs::write(dir.path().join("new"), "").unwrap();
            std::fs::rename(dir.path().join("new"), dir.path().join(name)).unwrap();
            assert!(matches!(events.recv_timeout(limit), Ok(Event::Changed)));
            assert!(events.try_recv().is_err());
            notifier.seen();
        }
    }
}
