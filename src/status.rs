//! What the daemon knows of its own state: written by the reflector and the mount, shown in
//! `status.json` and by `ctlfs status`.

mod delay;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::{Value as Json, json};

use crate::ledger::push::PushState;
use crate::model::{LedgerTime, Seq};

pub use delay::{DelayReport, Delays};

/// How far the reflector is, and what stands in its way.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// The position of the LDB.
    pub applied: Seq,
    /// The ledger time of the entry at that position, if any was applied.
    pub applied_time: Option<LedgerTime>,
    /// The last sequence the origin was seen to have.
    pub origin_last: Option<Seq>,
    /// When it was last seen to be that one.
    pub origin_last_seen: Option<SystemTime>,
    /// When the origin last answered, or said through push that it is there.
    pub last_contact: Option<SystemTime>,
    /// When the LDB was last known to hold everything the origin has.
    pub caught_up: Option<SystemTime>,
    /// Whether the LDB has ever held everything the origin had.
    pub ready: bool,
    /// What keeps the reflector from going on, if anything.
    pub problem: Option<Problem>,
    /// What SQLite said of the LDB when a reader of the tree came upon damage in it.
    pub damage: Option<String>,
    /// Entries that appeared behind the position, and so were never applied.
    pub late: Vec<Seq>,
    /// Entries applied since the daemon started.
    pub entries_applied: u64,
    /// Whether changes are told as they are made.
    pub push: Push,
    /// How long changes took from the ledger to the tree.
    pub delay: Option<DelayReport>,
}

impl Progress {
    /// Notes the last sequence that the origin was seen to have.
    pub fn saw_last(&mut self, seq: Seq, now: SystemTime) {
        self.origin_last = Some(seq);
        self.origin_last_seen = Some(now);
    }
}

/// How push is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Push {
    /// Its state.
    pub state: PushState,
    /// Why it is not on, or not relied on; one sentence.
    pub reason: Option<String>,
}

/// Something that keeps the reflector from going on. It tries again by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What kind of problem it is.
    pub kind: ProblemKind,
    /// The entry it is about.
    pub seq: Option<Seq>,
    /// The head of the entry's statement, without the values in it.
    pub statement: Option<String>,
    /// One sentence for the person who is paged.
    pub reason: String,
    /// When it began.
    pub since: SystemTime,
}

/// The kinds of [`Problem`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProblemKind {
    /// The origin does not answer or refuses us.
    Origin,
    /// The ledger does not continue where the LDB stands.
    Ledger,
    /// An entry cannot be applied.
    Statement,
    /// The LDB cannot be written.
    Storage,
}

/// Where the parts of the daemon write their state and others read it.
#[derive(Debug, Default)]
pub struct StatusBoard {
    progress: Mutex<Progress>,
}

impl StatusBoard {
    /// The reflector's state as it is now.
    pub fn progress(&self) -> Progress {
        self.lock().clone()
    }

    /// Whether changes are told as they are made.
    pub fn push_state(&self) -> PushState {
        self.lock().push.state
    }

    /// Changes the reflector's state. `change` must not block.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        // The state is plain data: a panic elsewhere cannot leave it half changed.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the mount counts, as status.json shows it.
#[derive(Debug)]
pub struct Counters<'a> {
    /// The sequence that the tree shows.
    pub seq: Seq,
    /// Families in the tree.
    pub families: u64,
    /// Tables in the tree.
    pub tables: u64,
    /// FUSE requests served, by operation.
    pub requests: &'a BTreeMap<&'static str, u64>,
    /// FUSE requests served.
    pub requests_total: u64,
    /// Nodes that the kernel holds.
    pub nodes: u64,
    /// Bytes of superseded versions kept in memory.
    pub kept_bytes: u64,
    /// Bytes of superseded versions kept in the state directory.
    pub spilled_bytes: u64,
    /// What was announced to inotify watchers.
    pub announced: Announced,
    /// What the kernel lacks, and what is done instead.
    pub fallbacks: &'a [String],
    /// The pins, in the order in which they were made.
    pub pins: &'a [PinStatus],
    /// Bytes of the LDB's log that they hold back.
    pub pins_held_bytes: u64,
}

/// A pin, as status.json shows it.
#[derive(Debug, Clone)]
pub struct PinStatus {
    /// The name of its directory.
    pub name: String,
    /// The sequence that it shows.
    pub seq: Seq,
    /// How long ago it was made.
    pub age: Duration,
    /// Who made it.
    pub uid: u32,
    /// Whether a bound has ended it, and only its directory is left.
    pub dropped: bool,
}

/// What was announced to inotify watchers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Announced {
    /// Whether changes are announced.
    pub on: bool,
    /// Entries that moved in, were made or were removed.
    pub entries: u64,
    /// Entries for which that failed.
    pub failed: u64,
    /// Median and 99th percentile of the time that one commit took of late.
    pub times: Option<(Duration, Duration)>,
}

/// What does not change while a daemon lives.
#[derive(Debug)]
pub struct StaticInfo<'a> {
    /// The daemon.
    pub pid: u32,
    /// The inode of the PID namespace that this number is of.
    pub pid_namespace: Option<u64>,
    /// When the process started, in the kernel's ticks.
    pub pid_started: Option<u64>,
    /// Where it is mounted.
    pub mountpoint: &'a Path,
    /// What it follows.
    pub follows: Follows<'a>,
    /// When it started.
    pub started: SystemTime,
    /// After how long without contact or without catching up the tree counts as stale.
    pub stale_after: Duration,
}

/// What a daemon follows, and whether that can be reached.
#[derive(Debug)]
pub enum Follows<'a> {
    /// A ledger.
    Origin {
        /// Without its password.
        origin: &'a str,
        /// How often it is asked when nothing happens.
        poll_interval: Duration,
    },
    /// An LDB that another process writes.
    Ldb {
        /// The file.
        file: &'a Path,
        /// How often it is looked at.
        check_interval: Duration,
        /// Why it cannot be read, if it cannot.
        unreadable: Option<&'a str>,
    },
}

/// A daemon's state in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// The tree shows what the origin has, or did moments ago.
    Ok,
    /// The first catch-up is not done, and nothing is known to be wrong.
    Starting,
    /// The origin answers, but the tree has not held everything it has for too long.
    Behind,
    /// The origin has not answered for too long.
    Stale,
    /// Something needs a person.
    Error,
}

impl Health {
    /// The word in status.json.
    pub fn as_str(self) -> &'static str {
        match self {
            Health::Ok => "ok",
            Health::Starting => "starting",
            Health::Behind => "behind",
            Health::Stale => "stale",
            Health::Error => "error",
        }
    }
}

/// Judges a daemon that follows a ledger.
///
/// A tree that is a few entries behind is healthy: under steady writes it always is. It counts as
/// behind when it has not caught up once in `stale_after`.
pub fn health(
    progress: &Progress,
    started: SystemTime,
    stale_after: Duration,
    now: SystemTime,
) -> Health {
    let older = |time: SystemTime| {
        // A clock that was set back makes nothing older.
        now.duration_since(time).is_ok_and(|age| age > stale_after)
    };
    let origin_problem = match &progress.problem {
        Some(problem) if problem.kind != ProblemKind::Origin => return Health::Error,
        problem => problem.is_some(),
    };
    if !progress.late.is_empty() {
        // This tree is not what the ledger says, and never will be by itself.
        return Health::Error;
    }
    match (progress.last_contact, progress.caught_up) {
        (None, _) if origin_problem || older(started) => Health::Stale,
        (Some(contact), _) if older(contact) => Health::Stale,
        (Some(_), _) if origin_problem && !progress.ready => Health::Stale,
        (None, _) => Health::Starting,
        (Some(_), _) if !progress.ready => Health::Starting,
        (Some(_), caught_up) => {
            let behind = behind(progress).is_some_and(|entries| entries > 0);
            if behind && older(caught_up.unwrap_or(started)) {
                Health::Behind
            } else {
                Health::Ok
            }
        }
    }
}

/// How many sequences the LDB is behind the origin; gaps count as entries.
fn behind(progress: &Progress) -> Option<u64> {
    let last = progress.origin_last?;
    Some(last.get().saturating_sub(progress.applied.get()))
}

/// Renders `.ctlfs/status.json`.
pub fn render_json(
    progress: &Progress,
    counters: &Counters<'_>,
    info: &StaticInfo<'_>,
    now: SystemTime,
) -> Vec<u8> {
    let (mode, origin, ldb, interval_name, interval, unreadable) = match &info.follows {
        Follows::Origin {
            origin,
            poll_interval,
        } => (
            "origin",
            Some(*origin),
            None,
            "poll_interval",
            *poll_interval,
            None,
        ),
        Follows::Ldb {
            file,
            check_interval,
            unreadable,
        } => {
            let file = file.to_string_lossy().into_owned();
            (
                "ldb",
                None,
                Some(file),
                "check_interval",
                *check_interval,
                *unreadable,
            )
        }
    };
    let foreign = ldb.is_some();
    let damage = progress.damage.as_ref().map(|reason| {
        let what_to_do = if foreign {
            "let the process that writes it build it anew"
        } else {
            "unmount, remove it and its -wal and -shm files, and mount: it is built anew from the \
             ledger"
        };
        format!("the LDB is damaged ({reason}), so some reads fail; {what_to_do}")
    });
    let unreadable = unreadable.map(str::to_owned).or(damage);
    let health = match (foreign, &unreadable) {
        (_, Some(_)) => Health::Error,
        (true, None) => Health::Ok,
        (false, None) => health(progress, info.started, info.stale_after, now),
    };
    let problem = match (unreadable, &progress.problem) {
        (Some(reason), _) => json!({
            "kind": "storage", "seq": null, "statement": null, "reason": reason, "since": null,
        }),
        (None, Some(problem)) => json!({
            "kind": problem.kind.as_str(),
            "seq": problem.seq.map(Seq::get),
            "statement": problem.statement,
            "reason": problem.reason,
            "since": rfc3339(problem.since),
        }),
        (None, None) => Json::Null,
    };
    let since_contact = progress
        .last_contact
        .map(|time| now.duration_since(time).unwrap_or_default().as_secs());
    let mut status = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": info.pid,
        "pid_namespace": info.pid_namespace,
        "pid_started": info.pid_started,
        "mountpoint": info.mountpoint.to_string_lossy(),
        "mode": mode,
        "origin": origin,
        "ldb": ldb,
        "started": rfc3339(info.started),
        "health": health.as_str(),
        "ready": foreign || progress.ready,
        "seq": counters.seq.get(),
        "ledger_time": progress.applied_time.and_then(|time| rfc3339(time.into())),
        "origin_seq": progress.origin_last.map(Seq::get),
        "origin_seq_seen": progress.origin_last_seen.and_then(rfc3339),
        "behind": behind(progress),
        "last_contact": progress.last_contact.and_then(rfc3339),
        "seconds_since_contact": since_contact,
        "caught_up": progress.caught_up.and_then(rfc3339),
        "push": {"state": progress.push.state.as_str(), "reason": progress.push.reason},
        "delay": progress.delay.as_ref().map(DelayReport::json),
        "entries_applied": progress.entries_applied,
        "problem": problem,
        "late": progress.late.iter().map(|seq| seq.get()).collect::<Vec<_>>(),
        "counts": {"families": counters.families, "tables": counters.tables},
        "requests": {"total": counters.requests_total},
        "cache": {
            "nodes": counters.nodes,
            "kept_bytes": counters.kept_bytes,
            "spilled_bytes": counters.spilled_bytes,
        },
        interval_name: humantime::format_duration(interval).to_string(),
        "stale_after": humantime::format_duration(info.stale_after).to_string(),
        "announce": {
            "on": counters.announced.on,
            "entries": counters.announced.entries,
            "failed": counters.announced.failed,
            "p50_ms": counters.announced.times.map(|(p50, _)| milliseconds(p50)),
            "p99_ms": counters.announced.times.map(|(_, p99)| milliseconds(p99)),
        },
        "fallbacks": counters.fallbacks,
        "pins": counters.pins.iter().map(|pin| json!({
            "name": pin.name,
            "seq": pin.seq.get(),
            "age_seconds": pin.age.as_secs(),
            "uid": pin.uid,
            "dropped": pin.dropped,
        })).collect::<Vec<_>>(),
        "pins_held_bytes": counters.pins_held_bytes,
    });
    if let Some(requests) = status.get_mut("requests").and_then(Json::as_object_mut) {
        for (operation, count) in counters.requests {
            requests.insert((*operation).to_owned(), (*count).into());
        }
    }
    let mut text = format!("{status:#}").into_bytes();
    text.push(b'\n');
    text
}

/// To the microsecond.
fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// A time as text; `None` outside the years 1970 to 9999, which the format cannot show.
fn rfc3339(time: SystemTime) -> Option<String> {
    use std::fmt::Write;
    // humantime panics at earlier ones.
    time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let mut text = String::new();
    write!(text, "{}", humantime::format_rfc3339_micros(time)).ok()?;
    Some(text)
}

impl ProblemKind {
    /// The word in status.json.
    pub fn as_str(self) -> &'static str {
        match self {
            ProblemKind::Origin => "origin",
            ProblemKind::Ledger => "ledger",
            ProblemKind::Statement => "statement",
            ProblemKind::Storage => "storage",
        }
    }
}

#[cfg(test)]
mod tests;
