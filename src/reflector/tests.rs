//! The reflector against a ledger in memory that can be made to misbehave.

mod pushed;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::*;
use crate::ldb::LdbWriter;
use crate::ledger::push::Push;
use crate::ledger::{Entry, Origin, OriginError};
use crate::model::{LedgerTime, Seq};
use crate::status::{Problem, ProblemKind, StatusBoard};

/// A ledger; clones are the same one.
#[derive(Clone, Default)]
struct Ledger(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    entries: Vec<Entry>,
    down: bool,
    /// How many entries an answer has at most; 0 for all.
    limit: usize,
    fetches: usize,
    /// Called at each fetch with its number.
    at_fetch: Option<Box<dyn FnMut(usize) + Send>>,
    /// What [`Origin::push`] gives, once.
    push: Option<Box<dyn Push>>,
    /// What [`Origin::seqs_between`] was asked for.
    looks: Vec<(u64, u64)>,
}

impl Ledger {
    fn with(statements: &[&str]) -> Self {
        let ledger = Ledger::default();
        ledger.append(statements);
        ledger
    }

    fn append(&self, statements: &[&str]) {
        for statement in statements {
            let last = self.state(|s| s.entries.last().map_or(0, |e| e.seq.get()));
            self.put(last + 1, statement);
        }
    }

    fn put(&self, seq: u64, statement: &str) {
        self.state(|s| {
            s.entries.retain(|e| e.seq != Seq::new(seq));
            s.entries.push(Entry {
                seq: Seq::new(seq),
                time: LedgerTime::from_micros(1_000_000),
                statement: statement.into(),
            });
            s.entries.sort_by_key(|e| e.seq);
        });
    }

    fn remove(&self, seqs: std::ops::RangeInclusive<u64>) {
        self.state(|s| s.entries.retain(|e| !seqs.contains(&e.seq.get())));
    }

    fn state<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.0.lock().unwrap())
    }

    fn answer<T>(&self, answer: impl FnOnce(&mut State) -> T) -> Result<T, OriginError> {
        self.state(|s| {
            if s.down {
                return Err(OriginError::Unreachable {
                    origin: "memory".into(),
                    reason: "it is down".into(),
                });
            }
            Ok(answer(s))
        })
    }
}

impl Origin for Ledger {
    fn fetch(&mut self, from: Seq) -> Result<Vec<Entry>, OriginError> {
        self.answer(|s| {
            s.fetches += 1;
            if let Some(at_fetch) = &mut s.at_fetch {
                at_fetch(s.fetches);
            }
            let limit = if s.limit == 0 { usize::MAX } else { s.limit };
            let entries = s.entries.iter().filter(|e| e.seq >= from);
            entries.take(limit).cloned().collect()
        })
    }

    fn last_seq(&mut self) -> Result<Option<Seq>, OriginError> {
        self.answer(|s| s.entries.last().map(|e| e.seq))
    }

    fn seqs_between(&mut self, first: Seq, last: Seq) -> Result<Vec<Seq>, OriginError> {
        self.answer(|s| {
            s.looks.push((first.get(), last.get()));
            let seqs = s.entries.iter().map(|e| e.seq);
            seqs.filter(|seq| (first..=last).contains(seq)).collect()
        })
    }

    fn describe(&self) -> String {
        "memory".into()
    }

    fn push(&self, _: Duration) -> Option<Box<dyn Push>> {
        self.state(|s| s.push.take())
    }
}

/// Writes down the calls; clones share the list.
#[derive(Clone, Default)]
struct Calls(Arc<Mutex<Vec<String>>>);

impl Calls {
    fn note(&self, what: &str, changes: &ChangeSet) {
        let note = format!("{what} {}..{}", changes.from, changes.to);
        self.0.lock().unwrap().push(note);
    }
}

impl CommitObserver for Calls {
    fn before_commit(&mut self, changes: &ChangeSet) {
        self.note("before", changes);
    }
    fn after_commit(&mut self, changes: &ChangeSet) {
        self.note("after", changes);
    }
    fn commit_failed(&mut self, changes: &ChangeSet) {
        self.note("failed", changes);
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    ledger: Ledger,
    calls: Calls,
    board: Arc<StatusBoard>,
    settings: Settings,
    reflector: Option<Reflector>,
}

impl Fixture {
    fn new(ledger: Ledger) -> Self {
        Self::with(ledger, Settings::default())
    }

    fn with(ledger: Ledger, settings: Settings) -> Self {
        let mut fixture = Fixture {
            dir: tempfile::tempdir().unwrap(),
            ledger,
            calls: Calls::default(),
            board: Arc::default(),
            settings: Settings {
                poll_interval: Duration::from_millis(5),
                ..settings
            },
            reflector: None,
        };
        fixture.restart();
        fixture
    }

    /// As after a stop of the daemon: only the LDB's file is left.
    fn restart(&mut self) {
        self.reflector = None;
        self.board = Arc::default();
        self.reflector = Some(Reflector::new(
            Box::new(self.ledger.clone()),
            LdbWriter::open(&self.path()).unwrap(),
            Box::new(self.calls.clone()),
            Arc::clone(&self.board),
            self.settings.clone(),
        ));
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("ldb.db")
    }

    fn catch_up(&mut self) -> Result<(), Problem> {
        let stop = StopHandle::new();
        self.reflector.as_mut().unwrap().catch_up(&stop)
    }

    fn values(&self) -> String {
        values(&self.path())
    }
}

fn values(path: &Path) -> String {
    let conn = Connection::open(path).unwrap();
    conn.query_row(
        "SELECT group_concat(id || '=' || n, ' ') FROM (SELECT * FROM app___limits ORDER BY id)",
        [],
        |row| row.get::<_, Option<String>>(0),
    )
    .unwrap()
    .unwrap_or_default()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

const BEGIN: &str = "--- BEGIN";
const COMMIT: &str = "--- COMMIT";
const LIMITS: &str = r#"CREATE TABLE app___limits ("id" INTEGER, "n" INTEGER, PRIMARY KEY("id"));"#;

fn set(id: u32, n: u32) -> String {
    format!(r#"REPLACE INTO app___limits ("id","n") VALUES({id},{n})"#)
}

/// Not idempotent, so that applying it twice shows.
const BUMP: &str = "UPDATE app___limits SET n = n + 1 WHERE id = 1";

#[test]
fn entries_are_applied_in_order_once_and_announced() {
    let ledger = Ledger::with(&[LIMITS, &set(1, 0), BUMP, BUMP]);
    let mut fixture = Fixture::new(ledger.clone());
    fixture.catch_up().unwrap();
    assert_eq!(fixture.values(), "1=2");
    let progress = fixture.board.progress();
    assert_eq!(progress.applied, Seq::new(4));
    assert_eq!(progress.origin_last, Some(Seq::new(4)));
    assert!(progress.ready && progress.caught_up.is_some());
    assert_eq!(progress.entries_applied, 4);
    for _ in 0..3 {
        fixture.restart();
        ledger.append(&[BUMP]);
        fixture.catch_up().unwrap();
        fixture.catch_up().unwrap();
    }
    assert_eq!(fixture.values(), "1=5");
    let calls = fixture.calls.0.lock().unwrap();
    assert_eq!(
        calls[..4],
        ["before 0..4", "after 0..4", "before 4..5", "after 4..5"]
    );
}

#[test]
fn a_transaction_is_applied_whole_however_it_is_fetched() {
    for limit in 2..6 {
        for transaction_bytes in [0, 1 << 20] {
            let ledger = Ledger::with(&[LIMITS, BEGIN, &set(1, 0), &set(2, 0), COMMIT]);
            ledger.append(&[&set(3, 0), BEGIN, BUMP, BUMP, BUMP, COMMIT, BUMP]);
            ledger.state(|s| s.limit = limit);
            let settings = Settings {
                batch_entries: 3,
                transaction_bytes,
                ..Settings::default()
            };
            let mut fixture = Fixture::with(ledger, settings);
            fixture.catch_up().unwrap();
            assert_eq!(fixture.values(), "1=4 2=0 3=0");
            assert_eq!(fixture.board.progress().entries_applied, 12);
            for call in fixture.calls.0.lock().unwrap().iter() {
                let to: u64 = call.rsplit("..").next().unwrap().parse().unwrap();
                assert!(![2, 3, 4, 7, 8, 9, 10].contains(&to), "{call}");
            }
        }
    }
}

#[test]
fn an_unfinished_transaction_waits_and_is_reported() {
    for transaction_bytes in [0, 1 << 20] {
        let ledger = Ledger::with(&[LIMITS, &set(1, 0), BEGIN, BUMP]);
        let settings = Settings {
            transaction_bytes,
            ..Settings::default()
        };
        let mut fixture = Fixture::with(ledger.clone(), settings);
        for _ in 0..3 {
            fixture.catch_up().unwrap();
            assert_eq!(fixture.values(), "1=0");
            assert!(!fixture.board.progress().ready);
        }
        let problem = fixture.catch_up().unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Ledger);
        assert!(
            problem.reason.contains("begins at 3 has no end"),
            "{}",
            problem.reason
        );
        ledger.append(&[BUMP, COMMIT]);
        fixture.catch_up().unwrap();
        assert_eq!(fixture.values(), "1=2");
        assert_eq!(fixture.board.progress().problem, None);
    }
}

#[test]
fn a_poison_statement_stops_there_and_goes_on_once_it_is_gone() {
    let poison = "REPLACE INTO app___missing (\"k\") VALUES('hunter2')";
    let ledger = Ledger::with(&[LIMITS, &set(1, 0), BUMP, BEGIN, BUMP, poison, COMMIT, BUMP]);
    let mut fixture = Fixture::new(ledger.clone());
    let problem = fixture.catch_up().unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Statement);
    assert_eq!(problem.seq, Some(Seq::new(6)));
    let head = problem.statement.clone().unwrap();
    assert!(head.starts_with("REPLACE INTO app___missing") && !head.contains("hunter2"));
    assert!(
        problem.reason.contains("no such table"),
        "{}",
        problem.reason
    );
    assert_eq!(fixture.values(), "1=1");
    assert_eq!(fixture.board.progress().applied, Seq::new(3));
    let again = fixture.catch_up().unwrap_err();
    assert_eq!(again, problem, "a retry made it a new problem");
    // The cause is gone: an operator replaced the entry.
    ledger.put(6, "-- skipped");
    fixture.catch_up().unwrap();
    assert_eq!(fixture.values(), "1=3");
    assert_eq!(fixture.board.progress().problem, None);
}

#[test]
fn forbidden_statements_stop_it_with_the_tree_readable() {
    for statement in [
        "DROP TABLE _ldb_seq",
        "ATTACH '/tmp/x' AS x",
        "PRAGMA user_version = 1",
    ] {
        let ledger = Ledger::with(&[LIMITS, &set(1, 7), statement, &set(1, 8)]);
        let mut fixture = Fixture::new(ledger);
        let problem = fixture.catch_up().unwrap_err();
        assert_eq!(
            (problem.kind, problem.seq),
            (ProblemKind::Statement, Some(Seq::new(3)))
        );
        assert!(
            problem.reason.starts_with("it would "),
            "{}",
            problem.reason
        );
        assert_eq!(fixture.values(), "1=7");
    }
}

#[test]
fn a_ledger_that_does_not_continue_is_refused() {
    let ledger = Ledger::with(&[LIMITS, &set(1, 0), BUMP]);
    let mut fixture = Fixture::new(ledger.clone());
    fixture.catch_up().unwrap();
    let refused = |fixture: &mut Fixture| {
        let problem = fixture.catch_up().unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Ledger);
        assert_eq!(fixture.values(), "1=1");
        problem.reason
    };
    // Truncated beyond the position.
    ledger.append(&[BUMP, BUMP]);
    ledger.remove(1..=4);
    assert!(refused(&mut fixture).contains("truncated beyond entry 3"));
    // Emptied, and started again.
    ledger.remove(1..=100);
    assert!(refused(&mut fixture).contains("no entry 3"));
    ledger.append(&[LIMITS]);
    assert!(refused(&mut fixture).contains("no entry 3"));
    // Another ledger that has grown beyond the position.
    ledger.append(&[&set(1, 9), &set(1, 9), &set(1, 9)]);
    assert!(refused(&mut fixture).contains("another ledger"));
    fixture.restart();
    assert!(refused(&mut fixture).contains("another ledger"));
    // The right one again; up to the position it may be truncated.
    ledger.put(3, BUMP);
    ledger.remove(4..=4);
    ledger.append(&[BUMP]);
    ledger.remove(1..=3);
    fixture.catch_up().unwrap();
    assert_eq!(fixture.values(), "1=2");
    assert_eq!(fixture.board.progress().problem, None);
}

#[test]
fn an_entry_that_appears_late_is_reported() {
    let ledger = Ledger::with(&[LIMITS, &set(1, 0)]);
    ledger.put(5, BUMP);
    ledger.put(9, BUMP);
    let mut fixture = Fixture::new(ledger.clone());
    fixture.catch_up().unwrap();
    assert_eq!(fixture.board.progress().late, []);
    ledger.put(4, BUMP);
    ledger.put(8, BUMP);
    for _ in 0..3 {
        fixture.catch_up().unwrap();
        assert_eq!(fixture.values(), "1=2", "a late entry was applied");
    }
    assert_eq!(fixture.board.progress().late, [Seq::new(4), Seq::new(8)]);
    fixture.restart();
    assert_eq!(fixture.board.progress().late, [Seq::new(4), Seq::new(8)]);
}

#[test]
fn gaps_far_apart_are_not_looked_at_at_once() {
    let ledger = Ledger::with(&[LIMITS, &set(1, 0)]);
    ledger.put(4, BUMP);
    ledger.put(9_000, BUMP);
    ledger.put(9_002, BUMP);
    let mut fixture = Fixture::new(ledger.clone());
    for _ in 0..4 {
        fixture.catch_up().unwrap();
    }
    let looks = ledger.state(|s| std::mem::take(&mut s.looks));
    assert_eq!(looks, [(3, 3), (5, 8_999), (9_001, 9_001)]);
}

#[test]
fn contact_is_noted_within_a_large_transaction() {
    let ledger = Ledger::with(&[LIMITS, BEGIN]);
    for i in 0..6 {
        ledger.append(&[&set(i, 0)]);
    }
    ledger.append(&[COMMIT]);
    ledger.state(|s| s.limit = 3);
    let settings = Settings {
        batch_entries: 1,
        transaction_bytes: 0,
        ..Settings::default()
    };
    let mut fixture = Fixture::with(ledger.clone(), settings);
    let board = Arc::clone(&fixture.board);
    let contacts = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&contacts);
    ledger.state(|s| {
        s.at_fetch = Some(Box::new(move |_| {
            seen.lock().unwrap().push(board.progress().last_contact);
            board.update(|p| p.last_contact = None);
        }));
    });
    fixture.catch_up().unwrap();
    let contacts = contacts.lock().unwrap();
    assert!(contacts.len() > 4, "{contacts:?}");
    assert!(
        contacts.iter().skip(1).all(Option::is_some),
        "a fetch that was not noted: {contacts:?}"
    );
}

#[test]
fn a_stop_within_a_statement_is_no_problem() {
    let endless = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c) \
                   INSERT INTO app___limits SELECT 1, count(*) FROM c";
    for transaction_bytes in [0, 1 << 20] {
        let ledger = Ledger::with(&[LIMITS, BEGIN, &set(1, 0), endless, COMMIT]);
        ledger.state(|s| s.limit = 3);
        let settings = Settings {
            transaction_bytes,
            ..Settings::default()
        };
        let mut fixture = Fixture::with(ledger.clone(), settings);
        let stop = StopHandle::new();
        let handle = stop.clone();
        ledger.state(|s| {
            s.at_fetch = Some(Box::new(move |number| {
                if number == 2 {
                    handle.stop();
                }
            }));
        });
        let reflector = fixture.reflector.as_mut().unwrap();
        reflector.catch_up(&stop).unwrap();
        assert_eq!(fixture.board.progress().problem, None);
        assert_eq!(fixture.values(), "");
    }
}

#[test]
fn a_full_disk_is_a_problem_of_storage_and_passes() {
    let mut fixture = Fixture::new(Ledger::with(&[LIMITS]));
    fixture.catch_up().unwrap();
    let limit = |fixture: &Fixture, pages: u32| {
        let writer = fixture.reflector.as_ref().unwrap().writer();
        writer.limit_pages(pages);
    };
    limit(&fixture, 1);
    let many = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 20000) \
                INSERT INTO app___limits SELECT i, i FROM c";
    fixture.ledger.append(&[many]);
    let problem = fixture.catch_up().unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Storage);
    assert!(problem.reason.contains("no space"), "{}", problem.reason);
    assert_eq!(fixture.values(), "");
    limit(&fixture, 1_000_000);
    fixture.catch_up().unwrap();
    assert_eq!(fixture.board.progress().problem, None);
    assert!(fixture.values().starts_with("1=1 2=2"));
}

#[test]
fn it_follows_until_stopped_through_an_outage() {
    let ledger = Ledger::with(&[LIMITS, &set(1, 0)]);
    let mut fixture = Fixture::new(ledger.clone());
    let (board, path) = (Arc::clone(&fixture.board), fixture.path());
    let stop = StopHandle::new();
    let mut reflector = fixture.reflector.take().unwrap();
    let handle = stop.clone();
    let thread = std::thread::spawn(move || reflector.run(&handle));
    wait_until("the first entries", || board.progress().ready);
    ledger.state(|s| s.down = true);
    wait_until("the outage", || board.progress().problem.is_some());
    assert_eq!(board.progress().problem.unwrap().kind, ProblemKind::Origin);
    ledger.append(&[BUMP]);
    ledger.state(|s| s.down = false);
    wait_until("the way back", || board.progress().problem.is_none());
    wait_until("the entry", || values(&path) == "1=1");
    stop.stop();
    thread.join().unwrap();
}

#[test]
fn an_idle_reflector_stops_at_once_and_can_be_woken() {
    let ledger = Ledger::with(&[LIMITS, &set(1, 0)]);
    let mut fixture = Fixture::new(ledger.clone());
    fixture.settings.poll_interval = Duration::from_secs(3600);
    fixture.restart();
    let (board, path) = (Arc::clone(&fixture.board), fixture.path());
    let stop = StopHandle::new();
    let mut reflector = fixture.reflector.take().unwrap();
    let handle = stop.clone();
    let thread = std::thread::spawn(move || reflector.run(&handle));
    wait_until("the first entries", || board.progress().ready);
    ledger.append(&[BUMP]);
    stop.wake();
    wait_until("the woken reflector", || values(&path) == "1=1");
    stop.stop();
    thread.join().unwrap();
}
