//! The life of a daemon: locks, LDB, mount, reflector, and an orderly end.
//!
//! The order of a start is: state directory, mount point, LDB, origin (only when there is no
//! config yet), mount, reflector. So whatever can fail for a reason that a person has to mend fails
//! before anything is mounted, and everything after the mount is undone on the way out.

mod background;
mod deadline;
mod lock;
mod log;
mod mountinfo;
mod mountpoint;
mod process;
mod signals;
mod slice;
mod users;
mod wiring;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::changelog::{ChangeLog, ChangeLogError};
use crate::config::{self, Follow};
use crate::ledger::{Origin, OriginError};
use crate::model::Seq;
use crate::status::{self, Counters, Follows, ProblemKind, StaticInfo, StatusBoard};

pub(crate) use background::{Fork, Outcome, Reporter, fork};
pub(crate) use deadline::wait_until;
pub use lock::LockError;
pub(crate) use lock::prepare as prepare_state;
pub(crate) use log::is_level;
use mountinfo::MountId;
pub(crate) use mountinfo::{Mount, at as mount_at, is_mounted, read as mounts, resolve};
pub use mountpoint::MountpointError;
pub(crate) use mountpoint::{daemon_identity, detach, is_root, is_stale, read_status};
pub(crate) use process::Process;
pub(crate) use signals::{
    Mask, block as block_signals, broken_pipe_kills, children_are_told, exit_now,
};
pub(crate) use wiring::{access_rules, prepare_embedded};

/// How long a start with config at hand waits for a word from the origin before it returns.
const FIRST_CONTACT: Duration = Duration::from_secs(3);
/// How long an unmount may take before it is forced, and the reflector before it is left behind.
const GOODBYE: Duration = Duration::from_secs(3);

/// Why a daemon did not start, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state directory.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The mount point.
    #[error(transparent)]
    Mountpoint(#[from] MountpointError),
    /// The origin, when there is no config yet to serve without it.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// An LDB of our own.
    #[error("{0}")]
    Ldb(String),
    /// An LDB of somebody else.
    #[error("cannot mount the LDB {}: {reason}", path.display())]
    ForeignLdb {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The mount itself.
    #[error("{0}")]
    Mount(String),
    /// The log.
    #[error("cannot write the log {}: {reason}", path.display())]
    Log {
        /// The file, or standard error.
        path: PathBuf,
        /// What the system said.
        reason: io::Error,
    },
    /// The change log.
    #[error(transparent)]
    ChangeLog(ChangeLogError),
    /// A thread or the signals.
    #[error("cannot start the daemon: {0}")]
    System(#[from] io::Error),
    /// The FUSE session broke.
    #[error("{0}")]
    Session(String),
}

/// What ends or moves a daemon.
enum Event {
    Signal(i32),
    Unmounted(Result<(), String>),
    ReflectorEnded,
}

/// Whether an interrupt has something to undo.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing is mounted and the main thread may wait for a server: the process can simply end.
    Starting,
    /// The main thread has something to undo, and listens.
    Undo,
}

/// Runs a daemon until it is unmounted or told to stop. `reporter` hears how the start goes;
/// `on_ready` is called once the tree is readable. A process calls this at most once, and with no
/// other thread running.
pub(crate) fn run(
    config: &config::Daemon,
    reporter: &mut Reporter,
    on_ready: impl FnOnce(),
) -> Result<(), Error> {
    let blocked = signals::block()?;
    // Before any other thread is started, which inherits it.
    slice::shorten();
    let state = lock::StateDir::lock(&config.state_dir)?;
    start_log(config, state.path())?;
    let place = mountpoint::claim(&config.mountpoint)?;
    if place.replaced > 0 {
        reporter.warn(&format!(
            "removed the stale mount of a dead daemon from {}",
            place.path.display()
        ));
    }

    let (send, events) = mpsc::channel();
    // An embedded ledger answers or fails; only a server can keep a start waiting for long.
    let phase = Arc::new(Mutex::new(match &config.follow {
        Follow::Origin { url, .. } if wiring::may_hang(url) => Phase::Starting,
        Follow::Origin { .. } | Follow::Ldb { .. } => Phase::Undo,
    }));
    watch_signals(blocked, config.foreground, Arc::clone(&phase), send.clone())?;

    let feed = Feed::prepare(config, state.path(), reporter)?;
    let board = Arc::new(StatusBoard::default());
    *phase.lock().unwrap_or_else(PoisonError::into_inner) = Phase::Undo;
    let live = Live::mount(config, &place.path, feed, &board, &send)?;
    tracing::info!(mountpoint = %place.path.display(), "mounted");

    let ended = live.start(reporter, &board, &events);
    let ended = match ended {
        Some(event) => event,
        None => {
            reporter.ready();
            on_ready();
            live.serve(&events)
        }
    };
    let session_over = matches!(ended, Event::Unmounted(_));
    let result = match ended {
        Event::Signal(signal) => {
            tracing::info!("{}: unmounting", signals::name(signal));
            Ok(())
        }
        Event::Unmounted(Ok(())) => {
            tracing::info!("unmounted");
            Ok(())
        }
        Event::Unmounted(Err(reason)) => Err(Error::Session(reason)),
        Event::ReflectorEnded => Ok(()),
    };
    live.end(&events, session_over);
    tracing::info!("ended");
    result
}

fn start_log(config: &config::Daemon, state: &Path) -> Result<(), Error> {
    let file = match (&config.log_file, config.foreground) {
        (Some(path), _) => Some(path.clone()),
        (None, true) => None,
        (None, false) => Some(state.join("ctlfs.log")),
    };
    log::init(file.as_deref(), &config.log_level, !config.foreground).map_err(|reason| Error::Log {
        path: file.unwrap_or_else(|| "standard error".into()),
        reason,
    })
}

fn watch_signals(
    blocked: signals::Blocked,
    foreground: bool,
    phase: Arc<Mutex<Phase>>,
    events: Sender<Event>,
) -> io::Result<()> {
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut asked = false;
            while let Ok(signal) = blocked.wait() {
                if signal == libc::SIGHUP && !foreground {
                    // A daemon has no terminal to lose.
                    continue;
                }
                // Held while the process ends, so that nothing can be mounted in that moment.
                let phase = phase.lock().unwrap_or_else(PoisonError::into_inner);
                if asked || *phase == Phase::Starting {
                    signals::exit_now(signal);
                }
                asked = true;
                // The main thread listens for as long as there is something to undo.
                let _ = events.send(Event::Signal(signal));
            }
        })?;
    Ok(())
}

/// Where the tree's data comes from, opened and checked as far as it must be before mounting.
enum Feed {
    Reflected {
        ldb: Box<wiring::Ldb>,
        origin: Box<dyn Origin>,
        changelog: Option<Box<ChangeLog>>,
        poll_interval: Duration,
    },
    Foreign(PathBuf),
}

impl Feed {
    fn prepare(
        config: &config::Daemon,
        state: &Path,
        reporter: &mut Reporter,
    ) -> Result<Self, Error> {
        match &config.follow {
            Follow::Ldb { file, .. } => {
                wiring::identify_foreign_ldb(file)?;
                Ok(Feed::Foreign(file.clone()))
            }
            Follow::Origin { url, poll_interval } => {
                let ldb = Box::new(wiring::open_ldb(state.join("ldb.db"))?);
                let mut origin = wiring::open_origin(url)?;
                if start_of(&ldb) == Start::Empty {
                    // Without config of its own a mount would only hide a wrong URL.
                    let last = origin.last_seq()?;
                    tracing::info!(origin = %origin.describe(), ?last, "reached the origin");
                    if last.is_none() {
                        reporter.warn(&format!("the ledger of {} is empty", origin.describe()));
                    }
                }
                let changelog = wiring::open_changelog(config, state)?.map(Box::new);
                Ok(Feed::Reflected {
                    ldb,
                    origin,
                    changelog,
                    poll_interval: *poll_interval,
                })
            }
        }
    }
}

/// How much config there was before this start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// None: without the origin there is nothing to show.
    Empty,
    /// A first catch-up was begun and not finished.
    Partial,
    /// Everything that the ledger once had.
    Whole,
}

fn start_of(ldb: &wiring::Ldb) -> Start {
    match (ldb.seq, ldb.ready) {
        (Seq::ZERO, _) => Start::Empty,
        (_, true) => Start::Whole,
        (_, false) => Start::Partial,
    }
}

/// What runs once the tree is mounted. Dropping it unmounts.
struct Live {
    path: PathBuf,
    /// Which mount is ours, if it was seen in the kernel's list.
    id: Option<MountId>,
    /// Whether it is still ours to unmount.
    mounted: bool,
    reflector: Option<wiring::Running>,
    start: Start,
}

impl Live {
    fn mount(
        config: &config::Daemon,
        path: &Path,
        feed: Feed,
        board: &Arc<StatusBoard>,
        events: &Sender<Event>,
    ) -> Result<Self, Error> {
        let allow_other = config
            .options
            .allow_other
            .unwrap_or_else(mountpoint::is_root);
        let ldb = match &feed {
            Feed::Reflected { ldb, .. } => &ldb.path,
            Feed::Foreign(path) => path,
        };
        let status = status_source(config, path, &feed, Arc::clone(board));
        let mounted = wiring::mount(config, path, ldb, allow_other, status, board)?;
        // From here on the mount goes away with `live`, whatever happens.
        let mut live = Live {
            path: path.to_owned(),
            id: mountinfo::at(path)
                .ok()
                .flatten()
                .filter(Mount::is_ctlfs)
                .map(|mount| mount.id),
            mounted: true,
            reflector: None,
            start: Start::Whole,
        };
        end_announcements_with(live.id, mounted.announcements())?;
        if let Feed::Reflected {
            ldb,
            origin,
            changelog,
            poll_interval,
        } = feed
        {
            live.start = start_of(&ldb);
            let events = events.clone();
            let running = wiring::reflect(
                origin,
                *ldb,
                &mounted,
                changelog.map(|c| *c),
                board,
                // Several times before the tree would count as stale.
                (poll_interval, config.push.then_some(config.stale_after / 4)),
                move || {
                    let _ = events.send(Event::ReflectorEnded);
                },
            )?;
            live.reflector = Some(running);
        }
        let events = events.clone();
        thread::Builder::new()
            .name("session".into())
            .spawn(move || {
                let end = mounted.wait().map_err(|error| error.to_string());
                let _ = events.send(Event::Unmounted(end));
            })?;
        Ok(live)
    }

    /// Waits until there is something to read: with an LDB that was never whole, the first
    /// catch-up; otherwise just long enough to say whether the origin is there. Gives the event that ended
    /// the daemon, if one did.
    fn start(
        &self,
        reporter: &mut Reporter,
        board: &StatusBoard,
        events: &Receiver<Event>,
    ) -> Option<Event> {
        self.reflector.as_ref()?;
        let began = Instant::now();
        let mut said = began;
        let mut warned = false;
        let mut pause = Duration::from_millis(1);
        loop {
            let progress = board.progress();
            if let Some(problem) = progress.problem.filter(|_| !warned) {
                warned = true;
                reporter.warn(&problem.reason);
                // An empty tree is worth waiting for the origin to come back. Anything else waits
                // for a person, and what there is can be read meanwhile.
                if self.start != Start::Empty || problem.kind != ProblemKind::Origin {
                    return None;
                }
            }
            let done = match self.start {
                Start::Empty | Start::Partial => progress.caught_up.is_some(),
                Start::Whole => progress.last_contact.is_some(),
            };
            if done {
                return None;
            }
            let silent = self.start != Start::Empty && progress.last_contact.is_none();
            if silent && began.elapsed() > FIRST_CONTACT {
                reporter.warn("the origin has not answered yet; showing what was there before");
                return None;
            }
            if self.start != Start::Whole && said.elapsed() >= Duration::from_secs(1) {
                said = Instant::now();
                if let Some(last) = progress.origin_last {
                    reporter.progress(&format!(
                        "replaying the ledger: {} of {last} entries",
                        progress.applied
                    ));
                }
            }
            match events.recv_timeout(pause) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
                Ok(Event::ReflectorEnded) => {
                    tracing::error!("the reflector has ended; the tree stays as it is");
                    reporter.warn("the reflector has ended; see the log");
                    return None;
                }
                Ok(event) => return Some(event),
            }
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// Waits for the end.
    fn serve(&self, events: &Receiver<Event>) -> Event {
        loop {
            match events.recv() {
                Ok(Event::ReflectorEnded) => {
                    tracing::error!("the reflector has ended; the tree stays as it is");
                }
                Ok(event) => return event,
                Err(mpsc::RecvError) => return Event::Unmounted(Ok(())),
            }
        }
    }

    /// Stops the reflector and unmounts. Readers that hold files open do not delay it: the mount
    /// leaves the tree at once, and their files answer as long as this process lives.
    fn end(mut self, events: &Receiver<Event>, session_over: bool) {
        // Unless its connection was broken off, it has been unmounted; and then the kernel may have
        // given its numbers to another mount.
        self.mounted &= !session_over || mountpoint::is_stale(&self.path);
        if let Some(reflector) = &self.reflector {
            reflector.stop();
        }
        if self.unmount() {
            wait_until(GOODBYE, || {
                events.try_iter().any(|e| matches!(e, Event::Unmounted(_))) || !self.is_there()
            });
        } else if self.is_there() {
            tracing::warn!(
                "something else is mounted on top of {}; leaving the dead mount beneath it",
                self.path.display()
            );
        }
        if let Some(reflector) = &self.reflector
            && !wait_until(GOODBYE, || reflector.is_finished())
        {
            // It is in the middle of a call to the origin. What it has not committed SQLite undoes.
            tracing::warn!("the reflector is still busy; leaving it");
        }
    }

    /// Whether our mount is there, be it on top or not.
    fn is_there(&self) -> bool {
        match self.id {
            Some(id) => mountinfo::is_mounted(id),
            None => self.is_on_top(),
        }
    }

    /// Whether unmounting by path would hit our mount, and not one that somebody put on top or, once
    /// ours was gone, in its place. When the kernel's list cannot be read, it is worth a try.
    fn is_on_top(&self) -> bool {
        let Ok(top) = mountinfo::at(&self.path) else {
            return true;
        };
        match self.id {
            Some(id) => top.is_some_and(|mount| mount.id == id),
            None => top.is_some_and(|mount| mount.is_ctlfs()),
        }
    }

    /// Takes our mount away, at most once; tells whether it did.
    fn unmount(&mut self) -> bool {
        if !(self.mounted && self.is_on_top()) {
            return false;
        }
        match mountpoint::detach(&self.path, true) {
            Ok(()) => self.mounted = false,
            Err(error) => tracing::error!(%error, "cannot unmount {}", self.path.display()),
        }
        !self.mounted
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// Ends the announcements when somebody unmounts the tree: the clone of the mount that they are made
/// through would keep the file system, and so this process, alive.
fn end_announcements_with(
    id: Option<MountId>,
    announcements: wiring::Announcements,
) -> io::Result<()> {
    let Some(id) = id else {
        tracing::warn!("changes raise no inotify events: the mount is not in the kernel's list");
        announcements.end();
        return Ok(());
    };
    thread::Builder::new()
        .name("mountinfo".into())
        .spawn(move || {
            if let Err(error) = mountinfo::wait_gone(id) {
                tracing::warn!(%error, "changes raise no more inotify events: the kernel's list of mounts cannot be watched");
            }
            announcements.end();
        })?;
    Ok(())
}

/// What renders status.json for this daemon.
fn status_source(
    config: &config::Daemon,
    mountpoint: &Path,
    feed: &Feed,
    board: Arc<StatusBoard>,
) -> impl Fn(&Counters<'_>, Option<&str>) -> Vec<u8> + Send + Sync + 'static {
    let mountpoint = mountpoint.to_owned();
    let started = SystemTime::now();
    let identity = process::Identity::own();
    let stale_after = config.stale_after;
    let origin = match feed {
        Feed::Reflected { origin, .. } => Some(origin.describe()),
        Feed::Foreign(_) => None,
    };
    let (file, interval) = match &config.follow {
        Follow::Origin { poll_interval, .. } => (PathBuf::new(), *poll_interval),
        Follow::Ldb {
            file,
            check_interval,
        } => (file.clone(), *check_interval),
    };
    // A foreign LDB is not looked at here: closing any descriptor of it would drop the locks that
    // SQLite holds for this process's readers.
    move |counters, unreadable| {
        let follows = match &origin {
            Some(origin) => Follows::Origin {
                origin,
                poll_interval: interval,
            },
            None => Follows::Ldb {
                file: &file,
                check_interval: interval,
                unreadable,
            },
        };
        let info = StaticInfo {
            pid: identity.pid,
            pid_namespace: identity.namespace,
            pid_started: identity.started,
            mountpoint: &mountpoint,
            follows,
            started,
            stale_after,
        };
        status::render_json(&board.progress(), counters, &info, SystemTime::now())
    }
}
