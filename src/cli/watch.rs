//! `ctlfs watch`: tells of every ledger transaction that touched a path, or runs a command for it.
//!
//! One thread looks, delivers and waits for what happens; others only tell it of signals, inotify
//! events and the end of a command.

mod delivery;
mod follow;
mod journal;
mod notify;
mod run;
mod signal;
mod target;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueHint};

use super::Error;
use crate::{config, daemon};
use follow::{Follower, Hopeless, Look};
use notify::Notifier;
use run::{Ended, Plan, Runner, StateFile, complain};

/// How often a glimpse is taken: at a few tables' sequences, which the kernel has; seldom where
/// inotify tells of changes.
const GLIMPSE: Duration = Duration::from_millis(2);
const GLIMPSE_WITH_EVENTS: Duration = Duration::from_millis(100);
/// Of more tables than a few, or when there is none yet, the daemon is asked for its position.
const GLIMPSE_ASKING: Duration = Duration::from_millis(10);
/// So it is, now and then, for tables that come.
const THOROUGH: Duration = Duration::from_millis(100);
/// How often a tree that is away is looked for.
const AWAY: Duration = Duration::from_millis(100);
/// How long a signal waits while the output is not read, or the tree does not answer.
const HEARING: Duration = Duration::from_secs(2);
/// How long a command may go on when the program is told to end, and how long after SIGTERM.
const GRACE: Duration = Duration::from_secs(10);
const LAST_GRACE: Duration = Duration::from_secs(2);
const STATUS: Duration = Duration::from_secs(5);

/// Tell of changes as they happen.
///
/// Prints a line for each ledger transaction that touched one of the PATHs, with old and new values.
/// A PATH is the mount point, a family, a table, a row, a field or a row.json in a mounted tree; it
/// need not exist yet. All PATHs are in one mount. Goes on when the daemon is stopped or killed and
/// comes back, and ends with SIGINT or SIGTERM.
///
/// With --exec, runs a command for each transaction instead: 'sh -c CMD', never two at once. What
/// happens while it runs is given to the next run as a whole. It gets the transactions on standard
/// input (as --json prints them), and in its environment CTLFS_SEQ (the last sequence), CTLFS_PATHS
/// (the changed rows, one path a line; a table where rows are not listed) and CTLFS_ROOT (the mount
/// point).
///
/// With --state, what was delivered is remembered: every transaction is delivered at least once,
/// over restarts of the daemon and of this program, and a command that fails is run again, after 1
/// second, then 2, 4, up to 60. The daemon remembers the last 4,096 transactions, or 16 MiB; when
/// something is older than that, a line says 'gap', and what is watched has to be read anew.
#[derive(Args)]
#[command(verbatim_doc_comment, after_help = EXAMPLES)]
pub struct WatchArgs {
    /// Print JSON: one object a line.
    #[arg(long)]
    json: bool,
    /// Begin with what happened behind this sequence, instead of now.
    #[arg(long, value_name = "SEQ")]
    since: Option<u64>,
    /// Remember the last sequence delivered in this file, and go on behind it. It wins over --since.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    state: Option<PathBuf>,
    /// Run this command for each transaction.
    #[arg(long, value_name = "CMD", value_hint = ValueHint::CommandString)]
    exec: Option<OsString>,
    /// Wait until nothing happened for this long, at most ten times as long, and deliver all of it
    /// together.
    #[arg(long, value_name = "DURATION", value_parser = config::duration)]
    debounce: Option<Duration>,
    /// Send a signal for each transaction, after the command of --exec if there is one:
    /// PID or PIDFILE, with :SIGNAL behind it if it is not SIGHUP.
    #[arg(long, value_name = "PID|PIDFILE[:SIGNAL]", value_parser = signal::Receiver::parse)]
    signal: Option<signal::Receiver>,
    /// What to watch.
    #[arg(value_name = "PATH", required = true, value_hint = ValueHint::AnyPath)]
    paths: Vec<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  ctlfs watch /ctl                                   everything
  ctlfs watch /ctl/app/flags/new-checkout/enabled    one value
  ctlfs watch --json --since 4711 /ctl/app | jq .seq
  ctlfs watch --state /var/lib/app/seen --exec 'render-config && reload' /ctl/app /ctl/edge
  ctlfs watch --debounce 500ms --signal /run/nginx.pid /ctl/edge/routes
  ctlfs watch --signal /run/haproxy.pid:USR2 /ctl/edge

A line:
  4711 2026-01-31T12:00:00.000000Z app/flags/new-checkout: enabled 0 -> 1
and the same with --json:
  {\"seq\":4711,\"begin\":4711,\"time\":\"2026-01-31T12:00:00.000000Z\",\"tables\":[{\"family\":\"app\",
   \"table\":\"flags\",\"changes\":[{\"path\":\"new-checkout\",\"key\":[\"new-checkout\"],
   \"kind\":\"updated\",\"old\":{\"enabled\":0},\"new\":{\"enabled\":1}}]}]}

A transaction that changes more than 1,000 rows of a table says how many, without listing them.
Exits with 2 when a PATH is in no ctlfs mount.";

/// What the main thread waits for.
enum Event {
    Signal,
    Changed,
    CommandEnded(ExitStatus),
}

/// Runs the command.
pub fn run(args: WatchArgs) -> Result<(), Error> {
    daemon::broken_pipe_kills(false);
    let (root, targets) = target::parse(&args.paths)?;
    let state = args.state.map(StateFile);
    let since = match &state {
        Some(state) => state.load().map_err(Error::Failed)?.or(args.since),
        None => args.since,
    };
    let (send, events) = mpsc::channel();
    let (taken, heard) = mpsc::channel();
    let mask = watch_signals(&send, heard).map_err(Error::failed)?;
    let notifier = Notifier::start(send.clone()).ok();
    let follower = Follower::new(&root, &targets, since);
    let plan = Plan {
        root: root.clone(),
        targets,
        json: args.json,
        exec: args.exec,
        mask,
        signal: args.signal,
        debounce: args.debounce,
        state,
    };
    let mut watch = Watch {
        root,
        follower,
        runner: Runner::new(plan, send),
        notifier,
        checked: false,
        away: None,
        thorough_at: Instant::now(),
        by_event: false,
        pause: GLIMPSE,
        taken,
    };
    match watch.follow(&events) {
        Ok(()) => {
            watch.end(&events);
            Ok(())
        }
        Err(Ended(why)) => why.map_or(Ok(()), |why| Err(Error::Failed(why))),
    }
}

/// Tells of the first signal; the second ends the process at once, and so does the first when it is
/// not `heard` in time. Returns what was blocked before.
fn watch_signals(events: &Sender<Event>, heard: Receiver<()>) -> std::io::Result<daemon::Mask> {
    let blocked = daemon::block_signals()?;
    let events = events.clone();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut heard = Some(heard);
            while let Ok(signal) = blocked.wait() {
                let Some(heard) = heard.take().filter(|_| events.send(Event::Signal).is_ok())
                else {
                    daemon::exit_now(signal);
                };
                let late = thread::Builder::new()
                    .name("hearing".into())
                    .spawn(move || {
                        if heard.recv_timeout(HEARING) == Err(RecvTimeoutError::Timeout) {
                            daemon::exit_now(signal);
                        }
                    });
                if late.is_err() {
                    daemon::exit_now(signal);
                }
            }
        })?;
    Ok(blocked.before)
}

struct Watch {
    root: PathBuf,
    follower: Follower,
    runner: Runner,
    notifier: Option<Notifier>,
    /// Whether the mount that is there was seen to be one that can be watched.
    checked: bool,
    /// Why the tree is not there, if that was said.
    away: Option<String>,
    thorough_at: Instant,
    /// Whether inotify told of the last change; at first, whether the mount says that it does.
    by_event: bool,
    /// How long to wait between glimpses.
    pause: Duration,
    /// Told once a signal was heard.
    taken: Sender<()>,
}

impl Watch {
    /// Follows the tree until a signal comes.
    fn follow(&mut self, events: &Receiver<Event>) -> Result<(), Ended> {
        let mut look = true;
        let mut event = false;
        loop {
            let has_room = self.runner.has_room();
            if has_room {
                let news = look || self.glimpse();
                look = news && self.look(event)?;
            }
            event = false;
            let due = self.runner.step()?;
            let mut pause = if self.away.is_some() {
                AWAY
            } else {
                self.pause
            };
            if let Some(due) = due {
                pause = pause.min(due);
            }
            // Without room a look has to wait for the command's end, which is an event.
            if look && has_room {
                pause = Duration::ZERO;
            }
            match events.recv_timeout(pause) {
                Ok(Event::Signal) => {
                    // It waits for that no longer than it has to.
                    let _ = self.taken.send(());
                    return Ok(());
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Ok(Event::CommandEnded(status)) => self.runner.command_ended(status),
                Ok(Event::Changed) => {
                    if let Some(notifier) = &self.notifier {
                        notifier.seen();
                    }
                    (look, event) = (true, true);
                }
                Err(RecvTimeoutError::Timeout) => look |= self.away.is_some(),
            }
        }
    }

    /// Whether a look may find something. What it costs decides how often it is done.
    fn glimpse(&mut self) -> bool {
        let thorough = self.thorough_at.elapsed() >= THOROUGH;
        if thorough {
            self.thorough_at = Instant::now();
        }
        let began = Instant::now();
        let news = self.follower.glimpse(thorough);
        let base = match (self.by_event, self.follower.asks()) {
            (true, _) => GLIMPSE_WITH_EVENTS,
            (false, true) => GLIMPSE_ASKING,
            (false, false) => GLIMPSE,
        };
        self.pause = base.max(began.elapsed().saturating_mul(20)).min(THOROUGH);
        news
    }

    /// Looks, and hands on what is found. Returns whether to look again at once.
    fn look(&mut self, event: bool) -> Result<bool, Ended> {
        let hopeless = |Hopeless(why)| Ended(Some(why));
        if !self.checked {
            self.checked = self.check().map_err(hopeless)?;
        }
        let found = self.follower.look().map_err(hopeless)?;
        for notice in self.follower.notices() {
            complain(&notice);
        }
        match found {
            Look::Same => {
                self.back();
                Ok(false)
            }
            Look::News { upto, deliveries } => {
                self.back();
                if !deliveries.is_empty() {
                    self.by_event = event;
                }
                self.runner.push(upto, deliveries);
                if let Some(notifier) = &self.notifier {
                    notifier.watch(&self.follower.directories());
                }
                Ok(false)
            }
            Look::Away(why) => {
                self.checked = false;
                if self.away.is_none() {
                    complain(&format!("waiting for {}: {why}", self.root.display()));
                    self.away = Some(why);
                }
                Ok(false)
            }
        }
    }

    fn back(&mut self) {
        if self.away.take().is_some() {
            let from = self.follower.cursor().unwrap_or(0);
            complain(&format!(
                "{} is there again, at sequence {from}",
                self.root.display()
            ));
        }
    }

    /// Whether the mount is one that can be watched; false when it cannot be asked now.
    fn check(&mut self) -> Result<bool, Hopeless> {
        let Ok(status) = daemon::read_status(&self.root, STATUS) else {
            return Ok(false);
        };
        let Ok(status) = serde_json::from_slice::<serde_json::Value>(&status) else {
            return Ok(false);
        };
        self.by_event = self.notifier.is_some() && status["announce"]["on"] == true;
        match status.get("ldb").and_then(serde_json::Value::as_str) {
            None => Ok(true),
            Some(ldb) => Err(Hopeless(format!(
                "cannot watch {}: it shows the LDB {ldb}, which another process writes, and nothing \
                 records what that changes; mount with --origin",
                self.root.display()
            ))),
        }
    }

    /// Lets a command that runs finish, within a grace, and remembers how far it is.
    fn end(&mut self, events: &Receiver<Event>) {
        self.wait_for_command(events, GRACE);
        if self.runner.is_busy() {
            self.runner.kill(libc::SIGTERM);
            self.wait_for_command(events, LAST_GRACE);
        }
        if self.runner.is_busy() {
            self.runner.kill(libc::SIGKILL);
        }
        self.runner.finish();
    }

    fn wait_for_command(&mut self, events: &Receiver<Event>, limit: Duration) {
        let end = Instant::now() + limit;
        while self.runner.is_busy() {
            match events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Event::CommandEnded(status)) => self.runner.command_ended(status),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }
}
