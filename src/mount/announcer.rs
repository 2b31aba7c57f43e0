//! The thread that touches the mount: it renames, makes and removes entries as an announcement
//! says, so that the kernel's VFS raises the events that inotify watchers wait for.
//!
//! It works on a private clone of the mount, which does not keep the visible one busy. It has a
//! table of file descriptors of its own, without `/dev/fuse`: should the process be killed while
//! this thread waits for an answer to one of its own requests, the device is closed all the same,
//! the kernel ends the connection, and the thread can die. For the same reason nothing is logged
//! here: the log's descriptor is not in this table.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// How long an announcement is waited for, and so much more for each step. Somebody who holds the
/// lock of a directory in the kernel can hold up an announcement there.
const PATIENCE: Duration = Duration::from_secs(2);
const PATIENCE_A_STEP: Duration = Duration::from_millis(1);

/// What to do in one directory, one after the other.
#[derive(Debug)]
pub(super) struct Job {
    /// The directory, from the root of the tree; empty for the root itself.
    pub(super) directory: CString,
    /// What to do there.
    pub(super) steps: Vec<Step>,
}

/// One event.
#[derive(Debug)]
pub(super) enum Step {
    /// An entry moves in, in the place of what has its name.
    MoveIn {
        /// What it is called where it is staged.
        staged: CString,
        /// The name it gets.
        name: CString,
    },
    /// A directory is made.
    Make(CString),
    /// A file is removed.
    Unlink(CString),
    /// A directory is removed.
    RemoveDir(CString),
}

/// How announcing went.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// How many steps were done.
    pub(super) done: u64,
    /// How many were not.
    pub(super) failed: u64,
    /// Why the first of those was not.
    pub(super) error: Option<io::Error>,
}

/// A handle on the thread. Dropping it ends the thread, and with it the clone of the mount.
pub(super) struct Announcer {
    jobs: Sender<Vec<Job>>,
    outcomes: Receiver<Outcome>,
    /// Announcements whose outcome has not come in time.
    overdue: usize,
    /// Whether the one under way is given up.
    given_up: Arc<AtomicBool>,
}

impl Announcer {
    /// Starts the thread for the mount on `mountpoint`, in which `stage` is the name of the
    /// directory, in the root, that entries move in from. `tid` is set to the thread's number
    /// before it makes the first request, and back to zero when it ends.
    pub(super) fn start(
        mountpoint: &Path,
        stage: &str,
        tid: Arc<AtomicU32>,
    ) -> io::Result<Announcer> {
        let mountpoint = CString::new(mountpoint.as_os_str().as_bytes())?;
        let stage = CString::new(stage)?;
        let (jobs, todo) = channel::<Vec<Job>>();
        let (report, outcomes) = channel();
        let (ready, started) = channel();
        let given_up = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&given_up);
        std::thread::Builder::new()
            .name("announcer".into())
            .spawn(move || {
                let place = match Place::open(&mountpoint, &stage, &tid) {
                    Ok(place) => place,
                    Err(error) => {
                        let _ = ready.send(Err(error));
                        return;
                    }
                };
                let _ = ready.send(Ok(()));
                while let Ok(jobs) = todo.recv() {
                    if report.send(place.announce(&jobs, &stop)).is_err() {
                        break;
                    }
                }
                tid.store(0, Ordering::Release);
            })?;
        match started.recv() {
            Ok(Ok(())) => Ok(Announcer {
                jobs,
                outcomes,
                overdue: 0,
                given_up,
            }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("its thread ended")),
        }
    }

    /// Carries the jobs out and waits until they are done, but not for ever. `None` if they are not
    /// yet, or if earlier ones are not: then these are left out.
    pub(super) fn announce(&mut self, jobs: Vec<Job>) -> io::Result<Option<Outcome>> {
        let ended = || io::Error::other("the thread has ended");
        while self.overdue > 0 {
            match self.outcomes.try_recv() {
                Ok(_) => self.overdue -= 1,
                Err(std::sync::mpsc::TryRecvError::Empty) => return Ok(None),
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return Err(ended()),
            }
        }
        let steps: usize = jobs.iter().map(|job| job.steps.len()).sum();
        let steps = u32::try_from(steps).unwrap_or(u32::MAX);
        self.given_up.store(false, Ordering::Release);
        self.jobs.send(jobs).map_err(|_| ended())?;
        let patience = PATIENCE + PATIENCE_A_STEP.saturating_mul(steps);
        match self.outcomes.recv_timeout(patience) {
            Ok(outcome) => Ok(Some(outcome)),
            Err(RecvTimeoutError::Timeout) => {
                self.given_up.store(true, Ordering::Release);
                self.overdue += 1;
                Ok(None)
            }
            Err(RecvTimeoutError::Disconnected) => Err(ended()),
        }
    }
}

/// The clone of the mount, as the thread holds it.
struct Place {
    root: OwnedFd,
    stage: OwnedFd,
}

impl Place {
    /// To be called on the thread itself, which has its own descriptors from then on.
    fn open(mountpoint: &CStr, stage: &CStr, tid: &AtomicU32) -> io::Result<Place> {
        // SAFETY: close_range takes no pointers. With CLOSE_RANGE_UNSHARE it first gives the calling
        // thread a copy of the table and closes only there; no descriptor of that copy is used by
        // this thread.
        check(unsafe {
            let unshare = libc::CLOSE_RANGE_UNSHARE.cast_signed();
            libc::close_range(3, libc::c_uint::MAX, unshare)
        })?;
        // SAFETY: `mountpoint` ends in a NUL and outlives the call.
        let root = unsafe {
            libc::syscall(
                libc::SYS_open_tree,
                libc::AT_FDCWD,
                mountpoint.as_ptr(),
                OPEN_TREE_CLONE | libc::O_CLOEXEC.cast_unsigned(),
            )
        };
        let root = owned(i32::try_from(root).unwrap_or(-1))?;
        // SAFETY: gettid has no preconditions.
        let own = unsafe { libc::gettid() };
        tid.store(own.cast_unsigned(), Ordering::Release);
        // Only the daemon of this very mount knows the name: what is found is ours.
        let stage = open_directory(root.as_raw_fd(), stage);
        if stage.is_err() {
            tid.store(0, Ordering::Release);
        }
        Ok(Place {
            root,
            stage: stage?,
        })
    }

    /// Does the steps one after the other, until `given_up`.
    fn announce(&self, jobs: &[Job], given_up: &AtomicBool) -> Outcome {
        let mut outcome = Outcome::default();
        for job in jobs {
            let opened;
            let directory = if job.directory.is_empty() {
                &self.root
            } else {
                match open_directory(self.root.as_raw_fd(), &job.directory) {
                    Ok(directory) => {
                        opened = directory;
                        &opened
                    }
                    Err(error) => {
                        outcome.failed += job.steps.len() as u64;
                        outcome.error.get_or_insert(error);
                        continue;
                    }
                }
            };
            for step in &job.steps {
                if given_up.load(Ordering::Acquire) {
                    return outcome;
                }
                match self.step(directory.as_raw_fd(), step) {
                    Ok(()) => outcome.done += 1,
                    Err(error) => {
                        outcome.failed += 1;
                        outcome.error.get_or_insert(error);
                    }
                }
            }
        }
        outcome
    }

    fn step(&self, directory: RawFd, step: &Step) -> io::Result<()> {
        // SAFETY: each name ends in a NUL and outlives the call; the descriptors are open.
        check(unsafe {
            match step {
                Step::MoveIn { staged, name } => libc::renameat(
                    self.stage.as_raw_fd(),
                    staged.as_ptr(),
                    directory,
                    name.as_ptr(),
                ),
                Step::Make(name) => libc::mkdirat(directory, name.as_ptr(), 0o555),
                Step::Unlink(name) => libc::unlinkat(directory, name.as_ptr(), 0),
                Step::RemoveDir(name) => {
                    libc::unlinkat(directory, name.as_ptr(), libc::AT_REMOVEDIR)
                }
            }
        })
    }
}

/// From `linux/mount.h`.
const OPEN_TREE_CLONE: libc::c_uint = 1;

fn open_directory(at: RawFd, path: &CStr) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: `path` ends in a NUL and outlives the call; `at` is open.
    owned(unsafe { libc::openat(at, path.as_ptr(), flags) })
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    check(fd.min(0))?;
    // SAFETY: the kernel just gave us this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
