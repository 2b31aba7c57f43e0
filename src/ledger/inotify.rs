//! Push from the embedded ledger: the kernel tells of every write to its file and to the log
//! beside it, which is where SQLite commits to. It never opens the database.
//!
//! The files are watched for writes and their directory for new names only, because other files
//! there may be written all the time. SQLite writes a commit before it makes it visible, and
//! waits for the disk in between.

use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::push::{Listener, Push, PushState, Settling};

/// How often a file that cannot be watched is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// SQLite writes a commit, waits for the disk, and makes it visible then, which nothing tells of. A
/// busy disk takes seconds.
const DISK: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(3);
/// How often to say that the file is there.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// A directory's entries that come and go.
const NAMES: u32 = libc::IN_CREATE | libc::IN_MOVED_TO | libc::IN_DELETE | libc::IN_MOVED_FROM;
/// What becomes of the directory itself: a watch follows it, not its name.
const MOVES: u32 = libc::IN_DELETE_SELF | libc::IN_MOVE_SELF;
const WRITES: u32 = libc::IN_MODIFY | libc::IN_DELETE_SELF | libc::IN_MOVE_SELF;

/// The files of an embedded ledger.
pub(super) struct InotifyPush {
    path: PathBuf,
    heartbeat: Duration,
}

impl InotifyPush {
    /// Watches the ledger at `path`.
    pub(super) fn new(path: &Path, heartbeat: Duration) -> Self {
        InotifyPush {
            path: path.to_owned(),
            heartbeat: heartbeat.min(HEARTBEAT),
        }
    }

    /// Watches until the directory goes away or the listener stops.
    fn follow(&self, listener: &dyn Listener, stop: &OwnedFd) -> io::Result<()> {
        // SQLite keeps its log beside the file that a link leads to.
        let path = std::fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::other("it is no path of a file"));
        };
        let inotify = Inotify::new()?;
        // First: should it be replaced in between, it is another one at the next look.
        let watched = identity(directory)?;
        let watch = inotify.add(directory, NAMES | MOVES)?;
        let beside = |suffix: &str| {
            let mut beside = name.to_owned();
            beside.push(suffix);
            beside
        };
        let mut files: Vec<File> = ["", "-wal", "-journal"]
            .map(|suffix| File {
                name: beside(suffix),
                watch: None,
            })
            .into();
        for file in &mut files {
            file.watch = inotify.add_if_there(&directory.join(&file.name))?;
        }
        listener.state(PushState::On, None);
        listener.changed(None);
        let mut buffer = vec![0; 16 << 10];
        let mut looked = Instant::now();
        loop {
            // Others may make files there all the time, so silence is not waited for.
            let rest = self.heartbeat.saturating_sub(looked.elapsed());
            let ready = wait(&[inotify.0.as_raw_fd(), stop.as_raw_fd()], rest)?;
            if listener.is_stopped() {
                return Ok(());
            }
            if looked.elapsed() >= self.heartbeat {
                looked = Instant::now();
                let now = std::fs::canonicalize(&self.path);
                match now {
                    Ok(now) if now == path && identity(directory).ok() == Some(watched) => {
                        listener.contact(!ready);
                    }
                    // A link that leads elsewhere by now, or another directory of that name.
                    Ok(_) => return Ok(()),
                    Err(_) => {}
                }
            }
            if !ready {
                continue;
            }
            let mut changed = false;
            for event in inotify.read(&mut buffer)? {
                if event.mask & libc::IN_Q_OVERFLOW != 0 {
                    return Err(io::Error::other("too many events at once; starting again"));
                }
                if event.watch == watch {
                    if event.mask & MOVES != 0 {
                        return Err(io::Error::from(io::ErrorKind::NotFound));
                    }
                    let Some(file) = files.iter_mut().find(|file| file.name == event.name) else {
                        continue;
                    };
                    // What had the name before may live on under another, or be gone.
                    if let Some(old) = file.watch.take() {
                        inotify.remove(old);
                    }
                    file.watch = inotify.add_if_there(&directory.join(&file.name))?;
                    changed = true;
                } else if let Some(file) = files.iter_mut().find(|f| f.watch == Some(event.watch)) {
                    if event.mask & libc::IN_IGNORED != 0 {
                        file.watch = None;
                    } else if event.mask & libc::IN_MOVE_SELF != 0 {
                        inotify.remove(event.watch);
                        file.watch = None;
                    }
                    changed |= event.mask & libc::IN_MODIFY != 0;
                }
            }
            if changed {
                listener.changed(None);
            }
        }
    }
}

struct File {
    name: OsString,
    watch: Option<i32>,
}

impl Push for InotifyPush {
    fn settling(&self) -> Settling {
        Settling {
            within: DISK,
            pause: Some(PAUSE),
        }
    }

    fn blind_spot(&self) -> &'static str {
        "the ledger's file may be written by another host, of which this one's kernel does not tell"
    }

    fn run(&mut self, listener: &dyn Listener) {
        let stop = match eventfd() {
            Ok(stop) => Arc::new(stop),
            Err(error) => {
                listener.state(
                    PushState::Off,
                    Some(format!("cannot watch {}: {error}", self.path.display())),
                );
                return;
            }
        };
        let stopper = Arc::clone(&stop);
        listener.on_stop(Box::new(move || signal(&stopper)));
        while !listener.is_stopped() {
            if let Err(error) = self.follow(listener, &stop) {
                let reason = format!("cannot watch {}: {error}", self.path.display());
                // Without instances or watches to be had, there is no push until a person acts.
                let state = match error.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOSPC | libc::ENOSYS) => {
                        PushState::Off
                    }
                    _ => PushState::Connecting,
                };
                listener.state(state, Some(reason));
            }
            // Ends at once when stopped; an error of poll itself ends the pause early at worst.
            let _ = wait(&[stop.as_raw_fd()], RETRY);
        }
    }
}

struct Inotify(OwnedFd);

struct Event {
    watch: i32,
    mask: u32,
    name: OsString,
}

impl Inotify {
    fn new() -> io::Result<Self> {
        // SAFETY: no pointers; a descriptor that is not negative is new and ours.
        unsafe {
            let fd = libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Inotify(OwnedFd::from_raw_fd(fd)))
        }
    }

    fn add(&self, path: &Path, mask: u32) -> io::Result<i32> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: the path is a NUL-terminated string that outlives the call.
        let watch = unsafe { libc::inotify_add_watch(self.0.as_raw_fd(), path.as_ptr(), mask) };
        if watch < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(watch)
    }

    /// Watches the writes to a file, unless there is none.
    fn add_if_there(&self, path: &Path) -> io::Result<Option<i32>> {
        match self.add(path, WRITES) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            added => added.map(Some),
        }
    }

    fn remove(&self, watch: i32) {
        // SAFETY: no pointers. It fails when the kernel has removed the watch already.
        unsafe { libc::inotify_rm_watch(self.0.as_raw_fd(), watch) };
    }

    /// The events that are there now.
    fn read(&self, buffer: &mut [u8]) -> io::Result<Vec<Event>> {
        // SAFETY: the pointer and length are of one buffer that is ours to write.
        let length =
            unsafe { libc::read(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        let Ok(length) = usize::try_from(length) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Vec::new()),
                _ => Err(error),
            };
        };
        Ok(events(buffer.get(..length).unwrap_or_default()))
    }
}

/// What tells a directory from another one of the same name.
fn identity(directory: &Path) -> io::Result<(u64, u64)> {
    let meta = std::fs::metadata(directory)?;
    Ok((meta.dev(), meta.ino()))
}

/// Takes `struct inotify_event`s apart: the watch, the mask, a cookie and the length of the name, of
/// four bytes each, then the name, filled up with NULs.
fn events(mut bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<16>() {
        let [w0, w1, w2, w3, m0, m1, m2, m3, _, _, _, _, l0, l1, l2, l3] = *head;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        let Some((name, rest)) = rest.split_at_checked(length) else {
            break;
        };
        let name = CStr::from_bytes_until_nul(name).map_or(&[][..], CStr::to_bytes);
        events.push(Event {
            watch: i32::from_ne_bytes([w0, w1, w2, w3]),
            mask: u32::from_ne_bytes([m0, m1, m2, m3]),
            name: OsString::from_vec(name.to_vec()),
        });
        bytes = rest;
    }
    events
}

/// Waits until one of the descriptors can be read; `false` if none can after `timeout`.
fn wait(descriptors: &[i32], timeout: Duration) -> io::Result<bool> {
    let mut polled: Vec<libc::pollfd> = descriptors
        .iter()
        .map(|fd| libc::pollfd {
            fd: *fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let count = libc::nfds_t::try_from(polled.len()).unwrap_or(0);
    let timeout = i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    // SAFETY: the pointer and count are of one array that is ours to write.
    match unsafe { libc::poll(polled.as_mut_ptr(), count, timeout) } {
        0 => Ok(false),
        n if n > 0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            error => Err(error),
        },
    }
}

fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; a descriptor that is not negative is new and ours.
    unsafe {
        let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

fn signal(eventfd: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: the pointer and length are of one array. It fails only when the counter is full,
    // and then it can be read as well.
    unsafe { libc::write(eventfd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use rusqlite::Connection;

    use super::*;
    use crate::model::Seq;

    /// Counts what it is told.
    #[derive(Default)]
    struct Counts {
        changes: AtomicU32,
        contacts: AtomicU32,
        on: AtomicBool,
        stopped: AtomicBool,
        on_stop: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
    }

    impl Listener for Counts {
        fn changed(&self, _: Option<Seq>) {
            self.changes.fetch_add(1, Ordering::SeqCst);
        }
        fn contact(&self, _: bool) {
            self.contacts.fetch_add(1, Ordering::SeqCst);
        }
        fn state(&self, state: PushState, _: Option<String>) {
            self.on.store(state == PushState::On, Ordering::SeqCst);
        }
        fn is_stopped(&self) -> bool {
            self.stopped.load(Ordering::SeqCst)
        }
        fn on_stop(&self, call: Box<dyn FnOnce() + Send>) {
            self.on_stop.lock().unwrap().push(call);
        }
    }

    fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(Instant::now() < deadline, "in vain: {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Runs `scenario` with a watch on `path`, then checks that the watch ends when told to.
    fn watching(path: &Path, scenario: impl FnOnce(&Counts)) {
        let counts = Arc::new(Counts::default());
        let mut push = InotifyPush::new(path, Duration::from_millis(50));
        let listener = Arc::clone(&counts);
        let thread = std::thread::spawn(move || push.run(&*listener));
        scenario(&counts);
        counts.stopped.store(true, Ordering::SeqCst);
        wait_until("it can be stopped", || {
            !counts.on_stop.lock().unwrap().is_empty()
        });
        for call in counts.on_stop.lock().unwrap().drain(..) {
            call();
        }
        thread.join().unwrap();
    }

    fn ledger(path: &Path) -> Connection {
        let db = Connection::open(path).unwrap();
        db.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE IF NOT EXISTS t (x)")
            .unwrap();
        db
    }

    /// Does something and waits until it is told.
    #[track_caller]
    fn told(counts: &Counts, what: &str, action: impl FnOnce()) {
        let before = counts.changes.load(Ordering::SeqCst);
        action();
        wait_until(what, || counts.changes.load(Ordering::SeqCst) > before);
    }

    fn insert(db: &Connection) {
        db.execute_batch("INSERT INTO t VALUES (1)").unwrap();
    }

    #[test]
    fn every_commit_is_told_also_of_a_file_that_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.db");
        watching(&path, |counts| {
            wait_until("it is on", || counts.on.load(Ordering::SeqCst));
            assert_eq!(
                counts.contacts.load(Ordering::SeqCst),
                0,
                "there is no file yet"
            );
            let mut db = None;
            told(counts, "the file appears", || db = Some(ledger(&path)));
            let db = db.unwrap();
            for _ in 0..3 {
                told(counts, "a commit", || insert(&db));
                db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
            }
            let other = dir.path().join("other.db");
            insert(&ledger(&other));
            drop(db);
            told(counts, "another file takes its place", || {
                std::fs::rename(&other, &path).unwrap();
            });
            let db = ledger(&path);
            for _ in 0..3 {
                told(counts, "a commit in the other", || insert(&db));
            }
            db.execute_batch("PRAGMA journal_mode = DELETE").unwrap();
            told(counts, "a commit without a log", || insert(&db));
            let aside = dir.path().join("aside.db");
            told(counts, "it is taken away", || {
                std::fs::rename(&path, &aside).unwrap()
            });
            told(counts, "it is back", || {
                std::fs::rename(&aside, &path).unwrap()
            });
            told(counts, "a commit behind that", || insert(&db));
            let contacts = counts.contacts.load(Ordering::SeqCst);
            wait_until("contact, whatever else is written there", || {
                std::fs::write(dir.path().join("other"), "").unwrap();
                std::fs::remove_file(dir.path().join("other")).unwrap();
                counts.contacts.load(Ordering::SeqCst) > contacts + 2
            });
        });
    }

    #[test]
    fn another_directory_of_the_same_name_is_watched() {
        let dir = tempfile::tempdir().unwrap();
        let (above, aside) = (dir.path().join("above"), dir.path().join("aside"));
        let path = above.join("state/ledger.db");
        std::fs::create_dir_all(above.join("state")).unwrap();
        drop(ledger(&path));
        watching(&path, |counts| {
            wait_until("it is on", || counts.on.load(Ordering::SeqCst));
            let mut db = None;
            told(counts, "the other directory is noticed", || {
                std::fs::rename(&above, &aside).unwrap();
                std::fs::create_dir_all(above.join("state")).unwrap();
                db = Some(ledger(&path));
            });
            let db = db.unwrap();
            told(counts, "a commit there", || insert(&db));
        });
    }

    #[test]
    fn a_link_and_a_directory_that_is_made_later_do() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real");
        let link = dir.path().join("link.db");
        std::os::unix::fs::symlink(real.join("ledger.db"), &link).unwrap();
        std::fs::create_dir(&real).unwrap();
        let db = ledger(&real.join("ledger.db"));
        watching(&link, |counts| {
            wait_until("it is on", || counts.on.load(Ordering::SeqCst));
            told(counts, "a commit behind a link", || insert(&db));
        });
        let later = dir.path().join("later");
        watching(&later.join("ledger.db"), |counts| {
            std::fs::create_dir(&later).unwrap();
            let db = ledger(&later.join("ledger.db"));
            wait_until("it is on", || counts.on.load(Ordering::SeqCst));
            told(counts, "a commit", || insert(&db));
        });
    }
}
