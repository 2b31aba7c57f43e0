//! The one place that knows how LDB, reflector and mount are put together.
//!
//! The rest of the daemon sees them through the types of this file only.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use crate::changelog::{self, ChangeLog};
use crate::ldb::{self, LdbError, LdbWriter};
use crate::mount::{self, MountCounters, MountError, PinLimits, Source};
use crate::reflector::{CommitObserver, Reflector, Settings, StopHandle};

use super::{Error, users};
use crate::config::{self, Follow};
use crate::executive::{self, Document, Executive};
use crate::ledger::{self, Origin, OriginError, OriginUrl};
use crate::model::{ChangeSet, Seq};
use crate::status::{Counters, Problem, ProblemKind, StatusBoard};
use crate::tree::access::{AccessError, AccessRules, Principal};

pub(crate) use crate::mount::{Announcements, Mounted};

/// Understands the rules of `--access`, in their order. What they leave out belongs to whoever
/// mounts.
pub(crate) fn access_rules(rules: &[String]) -> Result<AccessRules, AccessError> {
    // SAFETY: neither call has preconditions or can fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    AccessRules::parse(rules, uid, gid, &|principal| match principal {
        Principal::User(name) => users::uid(name),
        Principal::Group(name) => users::gid(name),
    })
}

/// Whether the first call to this origin can take long.
pub(super) fn may_hang(url: &OriginUrl) -> bool {
    matches!(url, OriginUrl::MySql(_))
}

/// Creates the tables of an embedded ledger where they are missing. If nothing was ever written to
/// it, loads `sample`, in the form that 'ctlfs apply' reads.
pub(crate) fn prepare_embedded(
    url: &OriginUrl,
    sample: Option<&str>,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut executive = Executive::open(url)?;
    executive.init()?;
    if let Some(sample) = sample
        && ledger::open(url)?.last_seq()?.is_none()
    {
        let document = Document::parse("the sample", Path::new(""), sample)?;
        executive::apply(document, &mut executive, &mut |_| {})?;
    }
    Ok(())
}

/// An LDB of our own, and where it stands.
pub(super) struct Ldb {
    writer: LdbWriter,
    pub(super) path: PathBuf,
    /// Its position.
    pub(super) seq: Seq,
    /// Whether it has ever held everything that its ledger had.
    pub(super) ready: bool,
}

/// Opens or creates the LDB in the state directory.
pub(super) fn open_ldb(path: PathBuf) -> Result<Ldb, Error> {
    let writer = LdbWriter::open(&path).map_err(|error| Error::Ldb(error.to_string()))?;
    let seq = writer.position().seq;
    let ready = writer.is_ready();
    Ok(Ldb {
        writer,
        path,
        seq,
        ready,
    })
}

/// Whether `path` is an LDB. Everything that is in it is the mount's to read. Only for the start:
/// nothing may open the file beside SQLite once it is read.
pub(super) fn identify_foreign_ldb(path: &Path) -> Result<(), Error> {
    // An LDB of our own may be missing at first.
    fs::metadata(path).map_err(|error| Error::ForeignLdb {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    ldb::check_foreign(path).map_err(|error| foreign_error(path, error))
}

/// What an error of an LDB means that is not ours to remove.
fn foreign_error(path: &Path, error: LdbError) -> Error {
    let reason = match error {
        LdbError::NotAnLdb { reason, .. } => format!("{reason}; name the file of an LDB"),
        LdbError::Corrupt { reason, .. } => {
            format!("it is damaged ({reason}); let the process that writes it build it anew")
        }
        other => return Error::Ldb(other.to_string()),
    };
    Error::ForeignLdb {
        path: path.to_owned(),
        reason,
    }
}

/// The ledger, not connected yet.
pub(super) fn open_origin(url: &OriginUrl) -> Result<Box<dyn Origin>, OriginError> {
    ledger::open(url)
}

/// Mounts. `status` renders status.json; it is also told why a foreign LDB cannot be followed, if so.
pub(super) fn mount(
    config: &config::Daemon,
    mountpoint: &Path,
    ldb: &Path,
    allow_other: bool,
    status: impl Fn(&Counters<'_>, Option<&str>) -> Vec<u8> + Send + Sync + 'static,
    board: &Arc<StatusBoard>,
) -> Result<Mounted, Error> {
    let settings = mount::Settings {
        mountpoint: mountpoint.to_owned(),
        ldb: ldb.to_owned(),
        source: match config.follow {
            Follow::Origin { .. } => Source::Owned,
            Follow::Ldb { check_interval, .. } => Source::Foreign { check_interval },
        },
        state_dir: Some(config.state_dir.clone()),
        access: config.access.clone(),
        newline: config.options.newline,
        export_max_size: config.export_max_size,
        pin_limits: PinLimits {
            max_age: config.pin_max_age,
            max_space: config.pin_max_space,
        },
        allow_other,
        threads: config.threads,
        plain_open: config.options.plain_open,
        announce: config.announce,
        read_only: config.options.read_only,
    };
    let render = Box::new(move |counters: &MountCounters| {
        let shown = Counters {
            seq: counters.seq,
            families: counters.families,
            tables: counters.tables,
            requests: &counters.requests,
            requests_total: counters.requests_total,
            nodes: counters.nodes,
            kept_bytes: counters.kept_bytes,
            spilled_bytes: counters.spilled_bytes,
            announced: counters.announced,
            fallbacks: &counters.fallbacks,
            pins: &counters.pins,
            pins_held_bytes: counters.pins_held_bytes,
        };
        status(&shown, counters.trouble.as_deref())
    });
    mount::mount(settings, render, Arc::clone(board)).map_err(|error| {
        match (error, &config.follow) {
            (MountError::Ldb(error), Follow::Ldb { file, .. }) => foreign_error(file, error),
            (error, _) => Error::Mount(error.to_string()),
        }
    })
}

/// Opens the change log, if there is to be one.
pub(super) fn open_changelog(
    config: &config::Daemon,
    state: &Path,
) -> Result<Option<ChangeLog>, Error> {
    let open = |settings| ChangeLog::open(settings, state);
    config
        .changelog
        .as_ref()
        .map(open)
        .transpose()
        .map_err(Error::ChangeLog)
}

/// The mount and the change log, as one. The change log comes last: what it does takes nobody's
/// time between the steps of a flip.
struct Both {
    mount: Box<dyn CommitObserver>,
    changelog: changelog::Observer,
}

impl CommitObserver for Both {
    fn before_commit(&mut self, changes: &ChangeSet) {
        self.changelog.before_commit(changes);
        self.mount.before_commit(changes);
    }

    fn after_commit(&mut self, changes: &ChangeSet) {
        self.mount.after_commit(changes);
        self.changelog.after_commit(changes);
    }

    fn commit_failed(&mut self, changes: &ChangeSet) {
        self.mount.commit_failed(changes);
        self.changelog.commit_failed(changes);
    }
}

/// The running reflector.
pub(super) struct Running {
    stop: StopHandle,
    thread: JoinHandle<()>,
}

/// Starts the reflector on a thread of its own; `ended` is called when it ends, however it does.
pub(super) fn reflect(
    origin: Box<dyn Origin>,
    mut ldb: Ldb,
    mounted: &Mounted,
    changelog: Option<ChangeLog>,
    board: &Arc<StatusBoard>,
    (poll_interval, push): (Duration, Option<Duration>),
    ended: impl FnOnce() + Send + 'static,
) -> std::io::Result<Running> {
    let settings = Settings {
        poll_interval,
        push,
        ..Settings::default()
    };
    ldb.writer.respect(mounted.wal_holds());
    let mut observer = mounted.observer();
    if let Some(changelog) = changelog {
        let catalog = Arc::clone(ldb.writer.catalog());
        let changelog = changelog.start(&ldb.path, catalog, ldb.seq)?;
        observer = Box::new(Both {
            mount: observer,
            changelog,
        });
    }
    let mut reflector = Reflector::new(origin, ldb.writer, observer, Arc::clone(board), settings);
    let stop = StopHandle::new();
    let (handle, end_board) = (stop.clone(), Arc::clone(board));
    let thread = thread::Builder::new()
        .name("reflector".into())
        .spawn(move || {
            let _ended = OnDrop(Some(|| {
                if !handle.is_stopped() {
                    broken(&end_board);
                }
                ended();
            }));
            reflector.run(&handle);
        })?;
    Ok(Running { stop, thread })
}

/// Tells that the reflector has ended by itself: nothing else would.
fn broken(board: &StatusBoard) {
    board.update(|p| {
        p.problem = Some(Problem {
            kind: ProblemKind::Storage,
            seq: None,
            statement: None,
            reason: "the reflector failed unexpectedly; start the daemon anew".into(),
            since: SystemTime::now(),
        });
    });
}

impl Running {
    /// Asks it to end; returns at once.
    pub(super) fn stop(&self) {
        self.stop.stop();
    }

    /// Whether it has ended.
    pub(super) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

struct OnDrop<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        if let Some(call) = self.0.take() {
            call();
        }
    }
}
