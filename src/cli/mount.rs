//! `ctlfs mount`: starts a daemon and reports how its start went.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};

use super::{Error, secret};
use crate::changelog;
use crate::config::{self, Follow, Options};
use crate::daemon::{self, Fork, Outcome, Reporter};
use crate::ledger::OriginUrl;

/// Mount config as files.
///
/// With --origin, replays the ledger into a local database in the state directory and mounts that.
/// Reads never wait for the origin: with it down, or the network gone, the tree shows what it last
/// had. With --ldb, mounts a database that another process writes, such as ctlstore's reflector.
///
/// Returns when the tree is readable and leaves a daemon behind, or says what went wrong and leaves
/// nothing. A first mount replays the whole ledger before it returns; later ones wait no longer than 3
/// seconds for an origin that is down. The daemon ends with 'ctlfs unmount', umount, SIGTERM or SIGINT.
#[derive(Args)]
#[command(verbatim_doc_comment, after_help = EXAMPLES)]
pub struct MountArgs {
    /// The ledger: mysql://user:password@host:3306/database or sqlite:///path/ledger.db
    /// [env: CTLFS_ORIGIN, unless there is --ldb].
    #[arg(long, value_name = "URL", conflicts_with = "ldb")]
    origin: Option<String>,
    /// A file that holds the origin's password.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    #[arg(env = "CTLFS_PASSWORD_FILE", hide_env_values = true)]
    password_file: Option<PathBuf>,
    /// Mount this LDB, which another process writes, instead of following an origin.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    ldb: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
    /// How often to look at the file of --ldb.
    #[arg(long, value_name = "DURATION", default_value = config::CHECK_INTERVAL)]
    #[arg(value_parser = config::duration)]
    check_interval: Duration,
    /// Stay in the foreground and log to standard error.
    #[arg(long)]
    foreground: bool,
    /// Log to this file [default: ctlfs.log in the state directory].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    log_file: Option<PathBuf>,
    /// Where to mount: an empty directory.
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    mountpoint: PathBuf,
}

const EXAMPLES: &str = "\
Examples:
  ctlfs mount --origin mysql://reader@db:3306/ctldb --password-file /etc/ctlfs.pw /ctl
  ctlfs mount --origin sqlite:///var/lib/app/ledger.db --poll-interval 100ms ~/ctl
  ctlfs mount --ldb /var/spool/ctlstore/ldb.db /ctl
  ctlfs mount --origin … --access 'secrets/**=0440:root:app' -o newline /ctl

A password in --origin is moved out of the process list at once. Without --state, the state is kept
in /var/lib/ctlfs (root) or ~/.local/state/ctlfs (others), in a directory named after the mount
point. Durations read 10ms, 1s, 5m; sizes 64MiB, 1GiB.";

/// The settings that `mount` and `dev` share.
#[derive(Args)]
pub(super) struct Common {
    /// The directory for the local database, lock and log.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(super) state: Option<PathBuf>,
    /// Whether the origin tells of changes as they are made: through the binlog of MySQL or
    /// MariaDB, which takes the privileges REPLICATION SLAVE and REPLICATION CLIENT and brings
    /// everything that the server writes to its binlog to this host, or by watching the file of an
    /// SQLite ledger. auto: where it can be had.
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = ["auto", "off"])]
    pub(super) push: String,
    /// How often to ask the origin while changes are not pushed, with some jitter.
    #[arg(long, value_name = "DURATION", default_value = config::POLL_INTERVAL)]
    #[arg(value_parser = config::duration)]
    pub(super) poll_interval: Duration,
    /// Mode, owner and group of what matches: 'FAMILY/TABLE=MODE:USER:GROUP', with ** for all
    /// below. Can be repeated; the last that matches counts.
    #[arg(long, value_name = "RULE")]
    pub(super) access: Vec<String>,
    /// Mount options, with commas: newline (integers, decimals and strings end in a newline),
    /// allow_other (other users may read; the default for root), no_allow_other, ro (the kernel
    /// itself refuses every write; no inotify events and no pins then).
    #[arg(short = 'o', value_name = "OPTS")]
    pub(super) options: Vec<String>,
    /// Whether changes raise events for those who watch files with inotify: auto (where it is
    /// possible, which takes root) or off.
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "auto",
        hide_possible_values = true
    )]
    pub(super) announce: Announce,
    /// Threads that answer the kernel [default: twice the number of cores, 4 to 8].
    #[arg(long, value_name = "N", value_parser = threads)]
    pub(super) threads: Option<usize>,
    /// After how long without contact, or without catching up, 'ctlfs status' fails.
    #[arg(long, value_name = "DURATION", default_value = config::STALE_AFTER)]
    #[arg(value_parser = config::duration)]
    pub(super) stale_after: Duration,
    /// Up to which size a table is shown as one file in .ctlfs/export; larger ones fail with
    /// "File too large" (EFBIG).
    #[arg(long, value_name = "SIZE", default_value = config::EXPORT_MAX_SIZE)]
    #[arg(value_parser = config::size)]
    pub(super) export_max_size: u64,
    /// How long a pin in .ctlfs/at lives at the most; after that its files fail with ESTALE.
    #[arg(long, value_name = "DURATION", default_value = config::PIN_MAX_AGE)]
    #[arg(value_parser = config::duration)]
    pub(super) pin_max_age: Duration,
    /// How many bytes of changes pins may keep from being tidied away; beyond that all are dropped.
    #[arg(long, value_name = "SIZE", default_value = config::PIN_MAX_SPACE)]
    #[arg(value_parser = config::size)]
    pub(super) pin_max_space: u64,
    /// Write a line for each changed row to this file, in the form of ctlstore's change log.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(super) changelog: Option<PathBuf>,
    /// Begin a new change log before it passes this size; the one before it stays as PATH.1.
    #[arg(long, value_name = "SIZE", default_value = config::CHANGELOG_SIZE)]
    #[arg(value_parser = config::size)]
    pub(super) changelog_size: u64,
    /// What to log: error, warn, info, debug, trace, or a filter such as info,ctlfs::mount=debug.
    #[arg(long, value_name = "LEVEL", env = "CTLFS_LOG", default_value = config::LOG_LEVEL)]
    #[arg(value_parser = log_level)]
    pub(super) log_level: String,
}

/// The values of `--announce`.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Announce {
    /// Where it is possible.
    Auto,
    /// Never.
    Off,
}

fn log_level(text: &str) -> Result<String, String> {
    if daemon::is_level(text) {
        Ok(text.to_owned())
    } else {
        Err("the levels are error, warn, info, debug and trace".into())
    }
}

fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=256) => Ok(n),
        _ => Err("it must be a number from 1 to 256".into()),
    }
}

/// Runs the command.
pub fn run(args: MountArgs) -> Result<(), Error> {
    let config = args.validated()?;
    daemon::broken_pipe_kills(false);
    if config.foreground {
        return Ok(daemon::run(&config, &mut Reporter::Here, || ())?);
    }
    match daemon::fork().map_err(|error| Error::failed(format!("cannot fork: {error}")))? {
        Fork::Daemon(mut reporter) => {
            let result = daemon::run(&config, &mut reporter, || ());
            match result {
                Ok(()) => Ok(()),
                Err(error) => {
                    tracing::error!("{error}");
                    reporter.failed(&error.to_string());
                    Err(Error::Exit(1))
                }
            }
        }
        Fork::Caller(child) => {
            let outcome = child.wait(|line| {
                let _ = writeln!(std::io::stderr(), "ctlfs: {line}");
            });
            match outcome {
                Outcome::Ready => Ok(()),
                Outcome::Failed(text) => Err(Error::Failed(text)),
                Outcome::Died(how) => Err(Error::Failed(format!(
                    "cannot mount on {}: the daemon ended before the tree was readable, {how}; \
                     its log is {}",
                    config.mountpoint.display(),
                    config
                        .log_file
                        .unwrap_or_else(|| config.state_dir.join("ctlfs.log"))
                        .display()
                ))),
            }
        }
    }
}

fn origin(url: &str, password_file: Option<&Path>) -> Result<OriginUrl, Error> {
    let url: OriginUrl = url.parse().map_err(Error::usage)?;
    match (password_file, &url) {
        // A password file in the environment may be meant for another origin.
        (None, _) | (Some(_), OriginUrl::Sqlite(_)) => Ok(url),
        (Some(path), OriginUrl::MySql(_)) => url.with_password_file(path).map_err(Error::failed),
    }
}

impl MountArgs {
    fn validated(self) -> Result<config::Daemon, Error> {
        // clap would take the variable for an --origin that --ldb conflicts with.
        let origin_url = match self.origin {
            Some(url) => Some(url),
            None => std::env::var(secret::ORIGIN_VARIABLE)
                .ok()
                .filter(|url| !url.is_empty()),
        };
        let follow = match (self.ldb, origin_url) {
            (Some(file), _) => Follow::Ldb {
                file: config::absolute(&file).map_err(Error::usage)?,
                check_interval: self.check_interval,
            },
            (None, Some(url)) => Follow::Origin {
                url: origin(&url, self.password_file.as_deref())?,
                poll_interval: self.common.poll_interval,
            },
            (None, None) => return Err(Error::usage("give --origin URL or --ldb FILE")),
        };
        let log_file = self
            .log_file
            .map(|path| config::absolute(&path))
            .transpose()
            .map_err(Error::usage)?;
        self.common
            .validated(self.mountpoint, follow, log_file, self.foreground)
    }
}

impl Common {
    pub(super) fn validated(
        self,
        mountpoint: PathBuf,
        follow: Follow,
        log_file: Option<PathBuf>,
        foreground: bool,
    ) -> Result<config::Daemon, Error> {
        // One directory, one name, however it was written; errors about it come when it is mounted.
        let mountpoint = match daemon::resolve(&mountpoint) {
            Ok(path) => path,
            Err(_) => config::absolute(&mountpoint).map_err(Error::usage)?,
        };
        let state_dir = match self.state {
            Some(path) => config::absolute(&path),
            None => config::default_state_dir(&mountpoint, daemon::is_root()),
        }
        .map_err(Error::failed)?;
        let changelog = match (self.changelog, &follow) {
            (Some(_), Follow::Ldb { .. }) => {
                return Err(Error::usage(
                    "--changelog goes with --origin: what another process changes in an LDB is \
                     not known row by row",
                ));
            }
            (Some(path), Follow::Origin { .. }) => Some(changelog::Settings {
                path: config::absolute(&path).map_err(Error::usage)?,
                max_size: self.changelog_size,
            }),
            (None, _) => None,
        };
        Ok(config::Daemon {
            mountpoint,
            follow,
            state_dir,
            access: daemon::access_rules(&self.access).map_err(Error::usage)?,
            options: Options::parse(self.options.iter().map(String::as_str))
                .map_err(Error::usage)?,
            announce: self.announce == Announce::Auto,
            threads: self.threads.unwrap_or_else(config::default_threads),
            log_file,
            log_level: self.log_level,
            push: self.push != "off",
            stale_after: self.stale_after,
            export_max_size: self.export_max_size,
            pin_max_age: self.pin_max_age,
            pin_max_space: self.pin_max_space,
            changelog,
            foreground,
        })
    }
}
