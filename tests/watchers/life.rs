//! What announcing must never get in the way of: unmounting, and dying.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::common::daemon::{Daemon, Place, mounts_on, wait_until};
use super::common::ledger::Ledger;
use super::common::watcher::Watcher;
use super::{FLAGS, flag};

/// Changes one flag again and again until it is dropped.
struct Changes {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Changes {
    fn start(ledger: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, ledger) = (Arc::clone(&stop), ledger.to_owned());
        let thread = std::thread::spawn(move || {
            let ledger = Ledger::open(&ledger);
            let mut value = 0;
            while !stopped.load(Ordering::Relaxed) {
                value += 1;
                ledger.append(&[flag("a", value, "x")]);
            }
        });
        Changes {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn place() -> Place {
    let place = Place::new();
    Ledger::create(&place).append(&[FLAGS, &flag("a", 0, "x")]);
    place
}

/// A mount that announces.
fn announcing(place: &Place) -> (Daemon, Watcher) {
    let daemon = Daemon::mount(place, &[]);
    let watcher = Watcher::inotifywait(&["-r", "-e", "moved_to"], &[daemon.path("app/flags")]);
    daemon.wait_status("changes are announced", |status| {
        status["announce"]["entries"].as_u64() > Some(20)
    });
    (daemon, watcher)
}

/// Unmounts in earnest. A child of another test, while it is being started, holds what this process
/// has open for a moment.
fn unmount(path: &CStr) {
    wait_until("it is unmounted", || {
        // SAFETY: the path ends in a NUL and outlives the call.
        let failed = unsafe { libc::umount2(path.as_ptr(), 0) } != 0;
        let error = std::io::Error::last_os_error();
        assert!(
            !failed || error.raw_os_error() == Some(libc::EBUSY),
            "{error}"
        );
        !failed
    });
}

#[test]
fn umount_works_while_changes_are_announced() {
    let place = place();
    let _changes = Changes::start(&place.ledger());
    for _ in 0..3 {
        let (mut daemon, watcher) = announcing(&place);
        drop(watcher);
        let path = CString::new(daemon.mountpoint().as_os_str().as_bytes()).unwrap();
        unmount(&path);
        assert_eq!(daemon.wait(), Some(0));
        assert!(mounts_on(&place.mountpoint()).is_empty());
    }
}

#[test]
fn what_is_mounted_in_its_place_stays() {
    let place = place();
    let path = CString::new(place.mountpoint().as_os_str().as_bytes()).unwrap();
    for round in 0..6 {
        let extra = ["--announce", ["auto", "off"][round % 2]];
        let mut daemon = Daemon::mount(&place, &extra);
        unmount(&path);
        // The kernel gives the new mount the number that has just become free.
        // SAFETY: the strings end in a NUL, and a tmpfs takes no data.
        let mounted = unsafe {
            libc::mount(
                c"none".as_ptr(),
                path.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                std::ptr::null(),
            ) == 0
        };
        let error = std::io::Error::last_os_error();
        assert!(mounted, "{error}");
        assert_eq!(daemon.wait(), Some(0));
        let left = mounts_on(&place.mountpoint());
        // SAFETY: as above.
        unsafe { libc::umount2(path.as_ptr(), 0) };
        assert_eq!(left.len(), 1, "{left:?}");
    }
}

#[test]
fn a_daemon_killed_while_it_announces_is_gone() {
    let place = place();
    let _changes = Changes::start(&place.ledger());
    for _ in 0..12 {
        let (mut daemon, watcher) = announcing(&place);
        daemon.signal(libc::SIGKILL);
        // It could wait for ever for an answer to a request of its own.
        assert_eq!(daemon.wait(), None);
        wait_until("the mount is dead", || {
            let error = std::fs::metadata(place.mountpoint().join(".ctlfs/seq"));
            error.is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN))
        });
        drop(watcher);
    }
}

#[test]
fn a_stopped_daemon_leaves_nothing() {
    let place = place();
    let _changes = Changes::start(&place.ledger());
    let (mut daemon, _watcher) = announcing(&place);
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
    assert!(mounts_on(&place.mountpoint()).is_empty());
}
