//! Delivery: what has been found is printed, or given to a command or a signal, one batch at a
//! time; and the last sequence that was delivered is remembered.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use super::Event;
use super::delivery::Delivery;
use super::signal::Receiver;
use super::target::Target;
use crate::daemon::Mask;

/// No more is taken in while so much waits: the journal keeps it.
const MAX_WAITING: usize = 4_096;
/// The first wait before a command that failed is run again, and the longest.
const RETRY: Duration = Duration::from_secs(1);
const MAX_RETRY: Duration = Duration::from_secs(60);
/// A burst is delivered after so many times `--debounce` at the latest.
const BURST: u32 = 10;
/// How often the state is written when nothing of interest happened.
const IDLE_STORE: Duration = Duration::from_secs(5);
/// The environment takes strings of up to 128 KiB.
const MAX_PATHS: usize = 64 << 10;

/// What is done with what was found.
pub(super) struct Plan {
    pub(super) root: PathBuf,
    pub(super) targets: Vec<Target>,
    pub(super) json: bool,
    pub(super) exec: Option<OsString>,
    /// The signals that are blocked in the command.
    pub(super) mask: Mask,
    pub(super) signal: Option<Receiver>,
    pub(super) debounce: Option<Duration>,
    pub(super) state: Option<StateFile>,
}

/// The file of `--state`: the last sequence delivered.
pub(super) struct StateFile(pub(super) PathBuf);

/// Delivers.
pub(super) struct Runner {
    plan: Plan,
    events: Sender<Event>,
    waiting: VecDeque<Delivery>,
    /// Up to where `waiting` goes.
    upto: u64,
    first_at: Option<Instant>,
    last_at: Option<Instant>,
    running: Option<Running>,
    retry_at: Option<Instant>,
    retry: Duration,
    stored: Option<u64>,
    stored_at: Instant,
    complained: bool,
}

struct Running {
    group: i32,
    deliveries: Vec<Delivery>,
    upto: u64,
}

/// Why it makes no sense to go on: `None` if nobody reads the output any more.
pub(super) struct Ended(pub(super) Option<String>);

impl Runner {
    /// Delivers as `plan` says. The end of a command is told by an event.
    pub(super) fn new(plan: Plan, events: Sender<Event>) -> Self {
        Runner {
            plan,
            events,
            waiting: VecDeque::new(),
            upto: 0,
            first_at: None,
            last_at: None,
            running: None,
            retry_at: None,
            retry: RETRY,
            stored: None,
            stored_at: Instant::now(),
            complained: false,
        }
    }

    /// Whether it takes more.
    pub(super) fn has_room(&self) -> bool {
        self.waiting.len() < MAX_WAITING
    }

    /// Takes what was found, up to the sequence `upto`.
    pub(super) fn push(&mut self, upto: u64, deliveries: Vec<Delivery>) {
        if !deliveries.is_empty() {
            let now = Instant::now();
            self.first_at.get_or_insert(now);
            self.last_at = Some(now);
        }
        self.waiting.extend(deliveries);
        self.upto = upto;
    }

    /// Does what is due. Returns how long there is nothing to do, unless something happens.
    pub(super) fn step(&mut self) -> Result<Option<Duration>, Ended> {
        if self.running.is_some() {
            return Ok(None);
        }
        if self.waiting.is_empty() {
            self.store_idle();
            return Ok(None);
        }
        let now = Instant::now();
        if let Some(at) = self.due().filter(|at| *at > now) {
            return Ok(Some(at - now));
        }
        let deliveries: Vec<Delivery> = self.waiting.drain(..).collect();
        (self.first_at, self.last_at, self.retry_at) = (None, None, None);
        let upto = self.upto;
        if self.plan.exec.is_some() {
            match self.start(&deliveries) {
                Ok(group) => {
                    self.running = Some(Running {
                        group,
                        deliveries,
                        upto,
                    });
                }
                Err(error) => {
                    complain(&format!(
                        "cannot run the command of --exec with sh: {error}"
                    ));
                    self.failed(deliveries);
                }
            }
            return Ok(None);
        }
        if self.plan.signal.is_some() {
            self.send_signal(deliveries, upto);
            return Ok(None);
        }
        self.print(&deliveries)?;
        self.store(upto);
        Ok(None)
    }

    /// The command has ended like this.
    pub(super) fn command_ended(&mut self, status: ExitStatus) {
        let Some(Running {
            deliveries, upto, ..
        }) = self.running.take()
        else {
            return;
        };
        if !status.success() {
            let how = match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit status {code}"),
                (None, Some(signal)) => format!("signal {signal}"),
                (None, None) => "no status".into(),
            };
            let then = if self.plan.state.is_some() {
                "it is run again"
            } else {
                "without --state it is not run again for that"
            };
            complain(&format!(
                "the command of --exec ended with {how} for sequence {upto}; {then}"
            ));
            return self.failed(deliveries);
        }
        if self.plan.signal.is_some() {
            self.send_signal(deliveries, upto);
        } else {
            self.delivered(upto);
        }
    }

    /// Whether a command runs.
    pub(super) fn is_busy(&self) -> bool {
        self.running.is_some()
    }

    /// Sends a signal to the command and what it has started.
    pub(super) fn kill(&self, signal: i32) {
        if let Some(running) = &self.running {
            // SAFETY: kill takes no pointers. The group is led by our child, whose end we have not
            // been told of.
            unsafe {
                libc::kill(-running.group, signal);
            }
        }
    }

    /// Remembers how far it is, at the end.
    pub(super) fn finish(&mut self) {
        if self.running.is_none() && self.waiting.is_empty() && self.upto > 0 {
            self.store(self.upto);
        }
    }

    fn due(&self) -> Option<Instant> {
        let debounced = self.plan.debounce.and_then(|debounce| {
            let quiet = self.last_at?.checked_add(debounce)?;
            let latest = self.first_at?.checked_add(debounce.saturating_mul(BURST))?;
            Some(quiet.min(latest))
        });
        debounced.max(self.retry_at)
    }

    fn delivered(&mut self, upto: u64) {
        self.retry = RETRY;
        self.store(upto);
    }

    /// What was to be delivered was not.
    fn failed(&mut self, deliveries: Vec<Delivery>) {
        if self.plan.state.is_none() {
            return;
        }
        for delivery in deliveries.into_iter().rev() {
            self.waiting.push_front(delivery);
        }
        self.retry_at = Instant::now().checked_add(self.retry);
        self.retry = self.retry.saturating_mul(2).min(MAX_RETRY);
    }

    fn send_signal(&mut self, deliveries: Vec<Delivery>, upto: u64) {
        let sent = self.plan.signal.as_ref().map(Receiver::send);
        match sent {
            Some(Err(why)) => {
                complain(&why);
                self.failed(deliveries);
            }
            Some(Ok(())) | None => self.delivered(upto),
        }
    }

    fn print(&self, deliveries: &[Delivery]) -> Result<(), Ended> {
        let text: String = deliveries
            .iter()
            .map(|d| {
                if self.plan.json {
                    d.to_json()
                } else {
                    d.to_line()
                }
            })
            .collect();
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .map_err(|error| {
                Ended(
                    (error.kind() != io::ErrorKind::BrokenPipe)
                        .then(|| format!("cannot write the changes to standard output: {error}")),
                )
            })
    }

    /// Starts the command; gives its process group.
    fn start(&self, deliveries: &[Delivery]) -> io::Result<i32> {
        let command = self.plan.exec.clone().unwrap_or_default();
        let seq = deliveries.last().map_or(self.upto, Delivery::seq);
        let mut shell = Command::new("sh");
        shell
            .arg("-c")
            .arg(command)
            .env("CTLFS_SEQ", seq.to_string())
            .env("CTLFS_PATHS", self.paths(deliveries))
            .env("CTLFS_ROOT", &self.plan.root)
            .stdin(Stdio::piped())
            // A Ctrl-C is for us: the command gets to finish.
            .process_group(0);
        self.plan.mask.apply_to(&mut shell);
        let mut child = shell.spawn()?;
        let text: String = deliveries.iter().map(Delivery::to_json).collect();
        if let Some(mut input) = child.stdin.take() {
            thread::Builder::new().name("input".into()).spawn(move || {
                // A command need not read it.
                let _ = input.write_all(text.as_bytes());
            })?;
        }
        let group = i32::try_from(child.id()).unwrap_or(i32::MAX);
        let events = self.events.clone();
        thread::Builder::new()
            .name("command".into())
            .spawn(move || {
                let status = child
                    .wait()
                    .unwrap_or_else(|_| ExitStatus::from_raw(1 << 8));
                // Nobody listens any more once the program ends.
                let _ = events.send(Event::CommandEnded(status));
            })?;
        Ok(group)
    }

    /// The changed paths, one a line, each once; in general terms when they are too many.
    fn paths(&self, deliveries: &[Delivery]) -> OsString {
        let mut seen = std::collections::HashSet::new();
        let mut text = Vec::new();
        let mut add = |path: OsString| {
            if seen.insert(path.clone()) {
                text.extend_from_slice(path.as_bytes());
                text.push(b'\n');
            }
            text.len() <= MAX_PATHS
        };
        let all = deliveries
            .iter()
            .flat_map(|d| d.paths(&self.plan.root, &self.plan.targets));
        for path in all {
            if !add(path) {
                let watched = Delivery::Gap(0, 0).paths(&self.plan.root, &self.plan.targets);
                text = watched.join(std::ffi::OsStr::new("\n")).into_vec();
                text.push(b'\n');
                break;
            }
        }
        text.pop();
        OsString::from_vec(text)
    }

    fn store_idle(&mut self) {
        let old = self.stored_at.elapsed() >= IDLE_STORE;
        if self.upto > 0 && (self.stored.is_none() || old) {
            self.store(self.upto);
        }
    }

    fn store(&mut self, seq: u64) {
        let Some(state) = &self.plan.state else {
            return;
        };
        self.stored_at = Instant::now();
        if self.stored == Some(seq) {
            return;
        }
        match state.store(seq) {
            Ok(()) => {
                self.stored = Some(seq);
                self.complained = false;
            }
            Err(error) => {
                if !std::mem::replace(&mut self.complained, true) {
                    complain(&format!(
                        "cannot write the state {}: {error}; going on, but after a restart some \
                         changes will be delivered again",
                        state.0.display()
                    ));
                }
            }
        }
    }
}

impl StateFile {
    /// The sequence in it; `None` if there is no file.
    pub(super) fn load(&self) -> Result<Option<u64>, String> {
        let text = match fs::read_to_string(&self.0) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(format!(
                    "cannot read the state {}: {error}",
                    self.0.display()
                ));
            }
        };
        text.trim_end().parse().map(Some).map_err(|_| {
            format!(
                "cannot read the state {}: it holds no sequence; remove it to begin from now, or \
                 write the sequence to begin behind into it",
                self.0.display()
            )
        })
    }

    /// Written beside and renamed: whoever reads it finds one whole sequence.
    fn store(&self, seq: u64) -> io::Result<()> {
        let mut name = self.0.clone().into_os_string();
        name.push(".new");
        let beside = Path::new(&name);
        let mut file = File::create(beside)?;
        file.write_all(format!("{seq}\n").as_bytes())?;
        file.sync_data()?;
        fs::rename(beside, &self.0)
    }
}

pub(super) fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "ctlfs: {text}");
}
