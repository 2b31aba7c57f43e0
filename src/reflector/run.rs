//! The reflector's loop: fetch, apply, commit, wait.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tracing::{error, info, warn};

use super::obstacle::{Obstacle, failed};
use super::pace::Pace;
use super::sequence::{Head, ends, transaction_start, whole_transactions};
use super::source::Source;
use super::{CommitObserver, Settings, StopHandle, push};
use crate::ldb::{ApplyError, Batch, LdbWriter, Position, statement_digest};
use crate::ledger::push::PushState;
use crate::ledger::{Entry, Origin};
use crate::model::{LedgerTime, Seq};
use crate::pace::{Backoff, jitter, random};
use crate::status::{Delays, Problem, ProblemKind, StatusBoard};

/// An unfinished ledger transaction is a problem when it is still so after this many looks.
const PATIENCE: u32 = 3;
/// With no more than so many entries to be applied, each ledger transaction is committed by itself.
const LIVE_ENTRIES: usize = 64;
/// The pause in a ledger that is not in order, when new entries come.
const AFTER_DISORDER: Duration = Duration::from_secs(1);
/// The shortest pause after a failure, whoever wakes meanwhile.
const AFTER_FAILURE: Duration = Duration::from_millis(100);
/// How many gaps are looked at in one idle poll, and how many sequences they may span.
const GAPS_AT_ONCE: u32 = 256;
const GAP_SPAN: u64 = 1_000;

/// Replays a ledger into an LDB.
pub struct Reflector {
    source: Source,
    writer: LdbWriter,
    observer: Box<dyn CommitObserver>,
    board: Arc<StatusBoard>,
    settings: Settings,
    /// Fetched and not yet applied.
    queue: VecDeque<Entry>,
    queued_bytes: usize,
    /// Looks in a row at the same unfinished transaction.
    unfinished: u32,
    /// Where the next look at the gaps begins.
    gap_cursor: Seq,
    caught_up: bool,
    /// Whether this look does more than see what is new.
    thorough: bool,
    delays: Delays,
}

/// What one step of the reflector came to.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Entries were fetched, to be applied next.
    Fetched,
    /// Entries were applied; there may be more.
    Applied,
    /// The LDB holds everything the ledger has.
    Idle,
    /// The ledger ends within a transaction.
    Waiting,
    /// It was told to stop.
    Stopped,
}

impl Reflector {
    /// A reflector of `origin` into the LDB of `writer`. It tells `observer` of every commit and
    /// keeps `board` up to date. Nothing is fetched yet.
    pub fn new(
        origin: Box<dyn Origin>,
        writer: LdbWriter,
        observer: Box<dyn CommitObserver>,
        board: Arc<StatusBoard>,
        settings: Settings,
    ) -> Self {
        let position = writer.position().clone();
        let ready = writer.is_ready();
        let late = writer.late().unwrap_or_default();
        board.update(|p| {
            p.applied = position.seq;
            p.applied_time = position.time;
            p.ready = ready;
            p.late = late;
        });
        Reflector {
            source: Source::new(origin, Arc::clone(&board)),
            writer,
            observer,
            board,
            settings,
            queue: VecDeque::new(),
            queued_bytes: 0,
            unfinished: 0,
            gap_cursor: Seq::ZERO,
            caught_up: false,
            thorough: true,
            delays: Delays::default(),
        }
    }

    /// The writer, and with it the catalog and position.
    pub fn writer(&self) -> &LdbWriter {
        &self.writer
    }

    /// Follows the ledger until `stop`.
    pub fn run(&mut self, stop: &StopHandle) {
        self.writer.stop_on(stop.flag());
        info!(
            origin = %self.source.origin.describe(),
            position = %self.writer.position().seq,
            "following the ledger"
        );
        let mut pace = Pace::new(self.settings.poll_interval);
        let mut blind_spot = "";
        if let Some(heartbeat) = self.settings.push
            && let Some(push) = self.source.origin.push(heartbeat)
        {
            pace.settle(push.settling());
            blind_spot = push.blind_spot();
            push::start(push, stop, &self.board, self.settings.poll_interval);
        }
        let mut backoff = Backoff::new(AFTER_FAILURE);
        let mut waiting = false;
        while !stop.is_stopped() {
            // The end of a transaction is waited for with less patience.
            let pushed = self.is_pushed(&mut pace) && !waiting;
            pace.note(stop.take_wakes(), Instant::now());
            self.thorough = pace.is_thorough(pushed, Instant::now());
            match self.attempt(stop) {
                // What was fetched may fail again: that is no reason to hurry.
                Ok(Step::Fetched) => pace.found(self.source.seen(), pushed, Instant::now()),
                Ok(Step::Applied) => backoff.reset(),
                Ok(step @ (Step::Idle | Step::Waiting)) => {
                    backoff.reset();
                    waiting = step == Step::Waiting;
                    let pushed = pushed && !waiting;
                    let seen = self.source.seen();
                    let rest = pace.rest(seen, pushed, Instant::now(), random());
                    if pace.distrusts() {
                        push::distrust(&self.board, self.settings.poll_interval, blind_spot);
                    }
                    stop.wait_timeout(rest);
                }
                Ok(Step::Stopped) => break,
                Err(kind) => {
                    let longest = match kind {
                        ProblemKind::Origin => self.settings.max_backoff,
                        _ => self.settings.poll_interval,
                    };
                    let pause = jitter(backoff.next(longest), random());
                    wait_after(kind, pause, stop, &mut pace);
                }
            }
        }
        info!(position = %self.writer.position().seq, "stopped following the ledger");
    }

    /// Applies everything that the ledger has now. Returns the problem that ended it early, if
    /// any; what could be applied before it is.
    pub fn catch_up(&mut self, stop: &StopHandle) -> Result<(), Problem> {
        self.writer.stop_on(stop.flag());
        self.thorough = true;
        while !stop.is_stopped() {
            match self.attempt(stop) {
                Ok(Step::Fetched | Step::Applied) => {}
                Ok(Step::Idle | Step::Waiting | Step::Stopped) => return Ok(()),
                Err(kind) => {
                    return Err(self.board.progress().problem.unwrap_or(Problem {
                        kind,
                        seq: None,
                        statement: None,
                        reason: "it was not recorded".into(),
                        since: SystemTime::now(),
                    }));
                }
            }
        }
        Ok(())
    }

    /// Whether push is on.
    fn is_pushed(&self, pace: &mut Pace) -> bool {
        let pushed = self.board.push_state() == PushState::On;
        if !pushed {
            pace.trust();
        }
        pushed
    }

    /// One step, with its outcome on the board and in the log.
    fn attempt(&mut self, stop: &StopHandle) -> Result<Step, ProblemKind> {
        match self.step(stop) {
            Ok(step) => {
                match step {
                    Step::Stopped => {}
                    Step::Fetched => self.solved(|kind| kind == ProblemKind::Origin),
                    Step::Applied | Step::Idle | Step::Waiting => self.solved(|_| true),
                }
                Ok(step)
            }
            Err(obstacle) => {
                let kind = obstacle.kind;
                // The origin may have changed by the next look: start again from the position.
                self.clear_queue();
                self.caught_up = false;
                self.report(obstacle);
                Err(kind)
            }
        }
    }

    fn step(&mut self, stop: &StopHandle) -> Result<Step, Obstacle> {
        if stop.is_stopped() {
            return Ok(Step::Stopped);
        }
        let Settings {
            batch_entries,
            batch_bytes,
            ..
        } = self.settings;
        // Who watches the tree sees each transaction by itself while that can be kept up with.
        let live = self.caught_up && self.queue.len() <= LIVE_ENTRIES;
        let batch_entries = if live { 1 } else { batch_entries };
        let head = whole_transactions(&self.queue, batch_entries, batch_bytes);
        match head {
            Head::Whole(0) => {
                if self.fetch()? > 0 {
                    return Ok(Step::Fetched);
                }
                self.unfinished = 0;
                self.idle()?;
                Ok(Step::Idle)
            }
            Head::Whole(count) => {
                self.unfinished = 0;
                self.apply(count)
            }
            Head::Unfinished(begin) => {
                if self.queued_bytes > self.settings.transaction_bytes {
                    match self.stream(stop)? {
                        Step::Waiting => {}
                        done => return Ok(done),
                    }
                } else if self.fetch()? > 0 {
                    return Ok(Step::Fetched);
                }
                if self.thorough {
                    self.unfinished = self.unfinished.saturating_add(1);
                }
                if self.unfinished > PATIENCE {
                    return Err(Obstacle::ledger(
                        begin,
                        format!("the ledger transaction that begins at {begin} has no end"),
                    ));
                }
                Ok(Step::Waiting)
            }
        }
    }

    /// Fetches behind what is queued. Returns how many entries came.
    fn fetch(&mut self) -> Result<usize, Obstacle> {
        let anchor = match self.queue.back() {
            Some(last) => anchor(last),
            None => self.writer.position().clone(),
        };
        let mut entries = self.source.fetch(&anchor, self.caught_up)?;
        let count = entries.len();
        let bytes: usize = entries.iter().map(|e| e.statement.len()).sum();
        self.queued_bytes = self.queued_bytes.saturating_add(bytes);
        if self.queue.is_empty() {
            self.queue = entries.into();
        } else {
            self.queue.extend(entries.drain(..));
        }
        Ok(count)
    }

    /// Applies and commits the first `count` entries of the queue; if one fails, what comes before
    /// its ledger transaction.
    fn apply(&mut self, count: usize) -> Result<Step, Obstacle> {
        let Some((index, error)) = self.apply_head(count)? else {
            return Ok(Step::Applied);
        };
        if error == ApplyError::Stopped {
            return Ok(Step::Stopped);
        }
        let obstacle = self.obstacle(index, error);
        let start = transaction_start(&self.queue, index);
        if start > 0 && obstacle.kind != ProblemKind::Storage {
            match self.apply_head(start)? {
                None => {}
                Some((_, ApplyError::Stopped)) => return Ok(Step::Stopped),
                Some((index, error)) => return Err(self.obstacle(index, error)),
            }
        }
        Err(obstacle)
    }

    /// Applies and commits the first `count` entries of the queue, or none of them; then returns
    /// which one failed.
    fn apply_head(&mut self, count: usize) -> Result<Option<(usize, ApplyError)>, Obstacle> {
        let mut batch = self.writer.begin()?;
        for (index, entry) in self.queue.iter().take(count).enumerate() {
            if let Err(error) = batch.apply(entry) {
                return Ok(Some((index, error)));
            }
        }
        let visible = commit(batch, &mut *self.observer)?;
        self.applied(count, visible);
        Ok(None)
    }

    /// Applies a ledger transaction that is too large for the queue while it is fetched. Unless
    /// it came to its end nothing of it is applied, and the queue holds its beginning still.
    fn stream(&mut self, stop: &StopHandle) -> Result<Step, Obstacle> {
        let mut anchor = match self.queue.back() {
            Some(last) => anchor(last),
            None => return Ok(Step::Waiting),
        };
        let mut applied = 0usize;
        let mut entries: Vec<Entry> = Vec::new();
        let mut batch = self.writer.begin()?;
        for entry in &self.queue {
            match batch.apply(entry) {
                Ok(()) => {}
                Err(ApplyError::Stopped) => return Ok(Step::Stopped),
                Err(error) => return Err(failed(entry, error)),
            }
            applied += 1;
        }
        while batch.open_transaction().is_some() {
            if stop.is_stopped() {
                return Ok(Step::Stopped);
            }
            entries = self.source.fetch(&anchor, self.caught_up)?;
            let Some(last) = entries.last() else {
                return Ok(Step::Waiting);
            };
            anchor = self::anchor(last);
            let mut used = 0;
            for entry in &entries {
                match batch.apply(entry) {
                    Ok(()) => {}
                    Err(ApplyError::Stopped) => return Ok(Step::Stopped),
                    Err(error) => return Err(failed(entry, error)),
                }
                used += 1;
                if batch.open_transaction().is_none() {
                    break;
                }
            }
            applied += used;
            entries.drain(..used);
        }
        let visible = commit(batch, &mut *self.observer)?;
        let time = self.writer.position().time.unwrap_or(visible);
        self.measure(&[time], visible);
        self.clear_queue();
        self.queued_bytes = entries.iter().map(|e| e.statement.len()).sum();
        self.queue = entries.into();
        self.count_applied(applied);
        Ok(Step::Applied)
    }

    /// The first `count` entries of the queue are committed.
    fn applied(&mut self, count: usize, visible: LedgerTime) {
        let times: Vec<LedgerTime> = ends(self.queue.iter().take(count))
            .map(|entry| entry.time)
            .collect();
        self.measure(&times, visible);
        for entry in self.queue.drain(..count) {
            self.queued_bytes = self.queued_bytes.saturating_sub(entry.statement.len());
        }
        self.count_applied(count);
    }

    /// Transactions that were written at these times became visible: how long it took counts when
    /// they came while everything before them was there already.
    fn measure(&mut self, written: &[LedgerTime], visible: LedgerTime) {
        if !self.caught_up {
            return;
        }
        let Some(ahead) = self.source.origin.clock_ahead() else {
            return;
        };
        for time in written {
            self.delays.add(*time, ahead, visible);
        }
        let report = self.delays.report(ahead);
        self.board.update(|p| p.delay = report);
    }

    fn count_applied(&self, count: usize) {
        let position = self.writer.position();
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.board.update(|p| {
            p.applied = position.seq;
            p.applied_time = position.time;
            p.entries_applied = p.entries_applied.saturating_add(count);
        });
    }

    fn obstacle(&self, index: usize, error: ApplyError) -> Obstacle {
        match (self.queue.get(index), error) {
            (Some(entry), error) => failed(entry, error),
            (None, error) => Obstacle {
                kind: ProblemKind::Storage,
                seq: None,
                statement: None,
                reason: error.to_string(),
            },
        }
    }

    /// The ledger has nothing behind the position.
    fn idle(&mut self) -> Result<(), Obstacle> {
        self.writer.set_ready()?;
        if self.thorough {
            self.look_for_late_entries()?;
        }
        let now = SystemTime::now();
        let seq = self.writer.position().seq;
        self.board.update(|p| {
            p.caught_up = Some(now);
            p.ready = true;
            p.saw_last(seq, now);
        });
        if !self.caught_up {
            self.caught_up = true;
            info!(position = %seq, "caught up with the ledger");
        }
        Ok(())
    }

    /// Looks whether some of the gaps behind the position have filled, a part of them each time.
    fn look_for_late_entries(&mut self) -> Result<(), Obstacle> {
        let gaps = self.writer.gaps(self.gap_cursor, GAPS_AT_ONCE)?;
        let Some((first, _)) = gaps.first().copied() else {
            self.gap_cursor = Seq::ZERO;
            return Ok(());
        };
        let near: Vec<_> = gaps
            .iter()
            .copied()
            .enumerate()
            .take_while(|(i, (_, last))| *i == 0 || last.get() - first.get() <= GAP_SPAN)
            .map(|(_, gap)| gap)
            .collect();
        let last = near.last().map_or(first, |(_, last)| *last);
        self.gap_cursor = last.next();
        let found = self.source.origin.seqs_between(first, last)?;
        let known = self.writer.late()?;
        let late: Vec<Seq> = found
            .into_iter()
            .filter(|seq| near.iter().any(|(first, last)| first <= seq && seq <= last))
            .filter(|seq| known.binary_search(seq).is_err())
            .collect();
        if late.is_empty() {
            return Ok(());
        }
        self.writer.add_late(&late)?;
        for seq in &late {
            error!(
                %seq,
                position = %self.writer.position().seq,
                "an entry of the ledger appeared behind the position and was not applied; \
                 a writer does not take the ledger's lock"
            );
        }
        let all = self.writer.late()?;
        self.board.update(|p| p.late = all);
        Ok(())
    }

    fn clear_queue(&mut self) {
        self.queue.clear();
        self.queued_bytes = 0;
    }

    /// Puts a problem on the board; into the log only when it is a new one, or has another reason.
    fn report(&self, obstacle: Obstacle) {
        let mut new = true;
        let mut shown = None;
        self.board.update(|p| {
            let mut problem = Problem {
                kind: obstacle.kind,
                seq: obstacle.seq,
                statement: obstacle.statement,
                reason: obstacle.reason,
                since: SystemTime::now(),
            };
            if let Some(old) = &p.problem
                && (old.kind, old.seq) == (problem.kind, problem.seq)
            {
                new = old.reason != problem.reason;
                problem.since = old.since;
            }
            shown = Some(problem.clone());
            p.problem = Some(problem);
        });
        let Some(problem) = shown.filter(|_| new) else {
            return;
        };
        let position = self.writer.position().seq;
        match (problem.seq, problem.statement) {
            (Some(seq), Some(statement)) => error!(
                %seq, %statement, %position, "cannot apply a ledger entry: {}", problem.reason
            ),
            _ if problem.kind == ProblemKind::Origin => {
                warn!(%position, "cannot follow the ledger: {}", problem.reason);
            }
            _ => error!(%position, "cannot follow the ledger: {}", problem.reason),
        }
    }

    fn solved(&self, which: impl FnOnce(ProblemKind) -> bool) {
        let mut was = None;
        self.board
            .update(|p| was = p.problem.take_if(|problem| which(problem.kind)));
        if let Some(problem) = was {
            info!(kind = ?problem.kind, "following the ledger again");
        }
    }
}

/// Waits after a failure: for all of `pause`, or less if what is announced may be what helps. New
/// entries do not help against one that cannot be applied, and seldom against a ledger that is not
/// in order: fetching it again with each of them would be a load on its server.
fn wait_after(kind: ProblemKind, pause: Duration, stop: &StopHandle, pace: &mut Pace) {
    let began = Instant::now();
    let mut until = began + pause;
    stop.wait_stopped(pause.min(AFTER_FAILURE));
    loop {
        let wakes = stop.take_wakes();
        pace.note(wakes, Instant::now());
        let helps = match kind {
            ProblemKind::Origin => wakes.any(),
            ProblemKind::Ledger | ProblemKind::Statement | ProblemKind::Storage => wakes.unknown,
        };
        if kind == ProblemKind::Ledger && wakes.known.is_some() {
            until = until.min(began + AFTER_DISORDER);
        }
        let left = until.saturating_duration_since(Instant::now());
        if helps || left.is_zero() || stop.wait_timeout(left) {
            return;
        }
    }
}

/// Finishes and commits a batch, telling the observer. Returns when it became visible.
fn commit(mut batch: Batch<'_>, observer: &mut dyn CommitObserver) -> Result<LedgerTime, Obstacle> {
    let Some(changes) = batch.finish()? else {
        return Ok(SystemTime::now().into());
    };
    observer.before_commit(&changes);
    match batch.commit() {
        Ok(()) => {
            let visible = SystemTime::now().into();
            observer.after_commit(&changes);
            Ok(visible)
        }
        Err(e) => {
            observer.commit_failed(&changes);
            Err(e.into())
        }
    }
}

fn anchor(entry: &Entry) -> Position {
    Position {
        seq: entry.seq,
        digest: Some(statement_digest(&entry.statement)),
        time: Some(entry.time),
    }
}
