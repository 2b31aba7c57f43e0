//! The mount: serves the tree over FUSE, and keeps the kernel's caches right while the LDB changes.
//!
//! [`mount`] puts the tree in place and returns while threads of its own serve it. [`fs`] is the
//! only file that speaks FUSE's requests; [`server`] answers them from the LDB; [`state`] is what
//! the kernel was told; [`flip`] and [`observer`] make a commit visible.

mod answer;
mod control;
mod counters;
mod dirs;
mod export;
mod flip;
mod fs;
mod inode;
mod kept;
mod listing;
mod load;
mod observer;
mod readers;
mod server;
mod state;
#[cfg(test)]
mod tests;
mod xattr;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, SystemTime};

use fuser::{BackgroundSession, Config, MountOption, Notifier, Session, SessionACL};

use self::counters::Requests;
use self::export::Renderer;
use self::fs::Fs;
use self::observer::Flipper;
use self::server::{Server, ServerSettings};
use self::state::Lifetimes;
use crate::ldb::LdbError;
use crate::ldb::reader::Reader;
use crate::model::Seq;
use crate::reflector::CommitObserver;
use crate::status::StatusBoard;
use crate::tree::access::AccessRules;

/// What to mount, and how.
#[derive(Debug)]
pub struct Settings {
    /// Where the tree appears: an existing directory.
    pub mountpoint: PathBuf,
    /// The LDB to show.
    pub ldb: PathBuf,
    /// Who writes it.
    pub source: Source,
    /// Where superseded versions that are still open go when memory is short.
    pub state_dir: Option<PathBuf>,
    /// Modes and owners.
    pub access: AccessRules,
    /// Whether integer, decimal and string fields end with a newline.
    pub newline: bool,
    /// How many bytes a table may have that is shown as one file.
    pub export_max_size: u64,
    /// Whether users other than the one who mounts may enter.
    pub allow_other: bool,
    /// How many requests are served at once.
    pub threads: usize,
    /// Whether OPEN is answered in the ordinary way; for comparison only.
    pub plain_open: bool,
    /// Whether the kernel is to take the mount for read-only. Otherwise it is writable for what the
    /// daemon does through it and for pins; every other write is refused all the same.
    pub read_only: bool,
}

/// Who writes the LDB.
#[derive(Debug, Clone, Copy)]
pub enum Source {
    /// This process, which tells [`Mounted::observer`] of each commit: readers see whole
    /// transactions.
    Owned,
    /// Another process: changes are found out, at the latest after this long.
    Foreign {
        /// How stale an answer may be.
        check_interval: Duration,
    },
}

/// Renders `status.json`, at each lookup of it. Must not wait for anything.
pub type StatusSource = Box<dyn Fn(&MountCounters) -> Vec<u8> + Send + Sync>;

/// What the mount knows of itself.
#[derive(Debug, Clone, Default)]
pub struct MountCounters {
    /// Requests of the kernel so far, by kind.
    pub requests: BTreeMap<&'static str, u64>,
    /// Requests of the kernel so far.
    pub requests_total: u64,
    /// Inodes that the kernel holds.
    pub nodes: u64,
    /// Bytes of superseded versions in memory.
    pub kept_bytes: u64,
    /// Bytes of superseded versions in the state directory.
    pub spilled_bytes: u64,
    /// The position of the tree.
    pub seq: Seq,
    /// Families in the tree.
    pub families: u64,
    /// Tables in the tree.
    pub tables: u64,
    /// What the kernel lacks, and what follows from it.
    pub fallbacks: Vec<String>,
    /// Why a foreign LDB cannot be followed at the moment, if so.
    pub trouble: Option<String>,
}

/// Why a tree could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The LDB cannot be read.
    #[error(transparent)]
    Ldb(#[from] LdbError),
    /// The kernel or fusermount3 refused.
    #[error("cannot mount on {}: {source}", .mountpoint.display())]
    Refused {
        /// The mount point.
        mountpoint: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// The session broke off.
    #[error("the mount on {} broke off: {source}", .mountpoint.display())]
    Broken {
        /// The mount point.
        mountpoint: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
}

/// A mounted tree. Dropping it unmounts.
pub struct Mounted {
    session: Option<BackgroundSession>,
    notifier: Notifier,
    server: Arc<Server>,
    mountpoint: PathBuf,
    /// Dropped to end the thread that watches a foreign LDB.
    _watcher: Option<Sender<()>>,
}

/// Mounts the tree. When this returns, it can be read.
pub fn mount(
    settings: Settings,
    status: StatusSource,
    board: Arc<StatusBoard>,
) -> Result<Mounted, MountError> {
    let requests = Arc::new(Requests::default());
    let lifetimes = match settings.source {
        Source::Owned => Lifetimes::UntilNotified,
        // Half for the kernel's entries, half for the check that drops the rows read lately.
        Source::Foreign { check_interval } => Lifetimes::For(check_interval / 2),
    };
    let status: StatusSource = {
        let requests = Arc::clone(&requests);
        Box::new(move |counters| {
            let counts = requests.counts();
            status(&MountCounters {
                requests_total: counts.values().sum(),
                requests: counts,
                fallbacks: requests.fallbacks(),
                ..counters.clone()
            })
        })
    };
    let server = Arc::new(Server::new(
        ServerSettings {
            ldb: settings.ldb,
            lifetimes,
            spill: settings.state_dir,
            access: settings.access,
            newline: settings.newline,
            export_max_size: settings.export_max_size,
            started: SystemTime::now(),
        },
        status,
        board,
    )?);
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("ctlfs".into()),
        MountOption::Subtype("ctlfs".into()),
        MountOption::DefaultPermissions,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoExec,
        MountOption::NoAtime,
    ];
    config.mount_options.push(if settings.read_only {
        MountOption::RO
    } else {
        MountOption::RW
    });
    config.acl = if settings.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(settings.threads.max(1));
    let refused = |source| MountError::Refused {
        mountpoint: settings.mountpoint.clone(),
        source,
    };
    let renderer = Renderer::start(&server).map_err(refused)?;
    let fs = Fs::new(
        Arc::clone(&server),
        requests,
        renderer,
        !settings.plain_open,
    );
    let session = Session::new(fs, &settings.mountpoint, &config).map_err(refused)?;
    let session = session.spawn().map_err(refused)?;
    let watcher = match settings.source {
        Source::Owned => None,
        Source::Foreign { check_interval } => Some(watch(&server, check_interval / 2)?),
    };
    Ok(Mounted {
        notifier: session.notifier(),
        session: Some(session),
        server,
        mountpoint: settings.mountpoint,
        _watcher: watcher,
    })
}

/// Starts a thread that drops what was read of a foreign LDB when that has changed.
fn watch(server: &Arc<Server>, interval: Duration) -> Result<Sender<()>, LdbError> {
    let (stop, stopped) = channel();
    let server = Arc::clone(server);
    let mut watched = Watched {
        reader: Reader::open(server.ldb())?,
        files: None,
        seen: None,
    };
    std::thread::spawn(move || {
        while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
            let trouble = watched.check(&server).err().map(|fault| fault.to_string());
            let mut before = server.trouble();
            if let Some(trouble) = &trouble
                && before.as_ref() != Some(trouble)
            {
                tracing::warn!(%trouble, "cannot follow the LDB");
            }
            *before = trouble;
        }
    });
    Ok(stop)
}

/// A foreign LDB as it was last looked at.
struct Watched {
    reader: Reader,
    /// Device and inode of the LDB and of its log.
    files: Option<[Option<(u64, u64)>; 2]>,
    /// `PRAGMA schema_version` and `PRAGMA data_version`.
    seen: Option<(i64, i64)>,
}

impl Watched {
    /// One look: whether other files stand in the place of those that are open (a snapshot is put
    /// there by renaming), or somebody has committed.
    ///
    /// The files are only ever looked at by name. To open and close the LDB would take away the
    /// locks that SQLite holds on it for this whole process, as POSIX has it.
    fn check(&mut self, server: &Server) -> Result<(), server::Fault> {
        let ldb = server.ldb();
        let identity = |path: &Path| {
            use std::os::unix::fs::MetadataExt;
            std::fs::metadata(path).map(|m| (m.dev(), m.ino()))
        };
        let missing = |error: std::io::Error| LdbError::Io {
            path: ldb.to_owned(),
            action: "check",
            reason: error.to_string(),
        };
        let files = [
            Some(identity(ldb).map_err(missing)?),
            identity(&crate::ldb::sidecar(ldb, "-wal")).ok(),
        ];
        if self.files.is_some_and(|before| before != files) {
            self.reader = Reader::open(ldb)?;
            server.readers.reopen();
            server.board.update(|p| p.damage = None);
            self.seen = None;
        }
        let seen = self
            .reader
            .schema_version()
            .and_then(|schema| Ok((schema, self.reader.data_version()?)))
            .map_err(|error| LdbError::from_sqlite(ldb, "check", &error))?;
        if self.seen != Some(seen) {
            server.follow(self.seen.is_none_or(|before| before.0 != seen.0))?;
        }
        self.files = Some(files);
        self.seen = Some(seen);
        Ok(())
    }
}

impl Mounted {
    /// Whoever writes the LDB tells this of each commit.
    pub fn observer(&self) -> Box<dyn CommitObserver> {
        Box::new(Flipper::new(
            Arc::clone(&self.server),
            self.notifier.clone(),
        ))
    }

    /// Whether the tree is no longer mounted.
    pub fn is_finished(&self) -> bool {
        self.session
            .as_ref()
            .is_none_or(|session| session.guard.is_finished())
    }

    /// Waits until somebody unmounts the tree.
    pub fn wait(mut self) -> Result<(), MountError> {
        let Some(session) = self.session.take() else {
            return Ok(());
        };
        // What else is in it would unmount by path once more; by then something else may be there.
        let session = std::mem::ManuallyDrop::new(session);
        // SAFETY: `session` is neither used nor dropped after this, so the handle has one owner.
        let guard = unsafe { std::ptr::read(&session.guard) };
        let broken = |source| MountError::Broken {
            mountpoint: self.mountpoint.clone(),
            source,
        };
        match guard.join() {
            Ok(ended) => ended.map_err(broken),
            Err(_) => Err(broken(std::io::Error::other(
                "a thread of the session panicked",
            ))),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let Some(session) = self.session.take() else {
            return;
        };
        if !session.guard.is_finished() {
            // Files that are open stay readable for as long as the daemon lives.
            if let Err(error) = detach(&self.mountpoint) {
                let mountpoint = self.mountpoint.display();
                tracing::warn!(%error, %mountpoint, "cannot unmount");
            }
        }
        // Its own drop would unmount by path once more; by then something else may be there.
        std::mem::forget(session);
    }
}

/// Unmounts lazily: with umount2 where that is allowed, else with fusermount3.
fn detach(mountpoint: &Path) -> std::io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(mountpoint.as_os_str().as_bytes())?;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    if unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) } == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::EPERM) {
        return Err(error);
    }
    let output = std::process::Command::new("fusermount3")
        .args(["-u", "-z", "--"])
        .arg(mountpoint)
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(std::io::Error::other(
        String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    ))
}
