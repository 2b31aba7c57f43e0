//! Push: a change is seen the moment it is committed, in MariaDB and in the embedded ledger, through
//! everything that interrupts a binlog stream; and where there is no push, polling does it.
//!
//! Where push is to be seen at work, the polling interval is so long that polling cannot have done
//! it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::undocumented_unsafe_blocks,
    unreachable_pub
)]

mod common {
    pub mod daemon;
    pub mod mariadb;
    pub mod proxy;
}

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, Place, run, stdout, wait_within};
use common::mariadb::{self, PrivateServer, TestDatabase};
use common::proxy::Switch;
use ctlfs::executive::{Executive, Mutation};
use ctlfs::ldb::LdbWriter;
use ctlfs::ledger::push::PushState;
use ctlfs::ledger::{self, OriginUrl};
use ctlfs::model::{Field, FieldType, TableRef, TableSchema, Value};
use ctlfs::reflector::{Reflector, Settings, StopHandle};
use ctlfs::status::StatusBoard;
use serde_json::Value as Json;

/// An interval that no test waits for.
const NEVER: [&str; 2] = ["--poll-interval", "10m"];
/// What push may take to be back.
const SOON: Duration = Duration::from_secs(5);

/// Writes one row, to a ledger that it makes.
struct Writer {
    executive: Executive,
    table: TableRef,
}

impl Writer {
    fn new(url: &str) -> Self {
        let url: OriginUrl = url.parse().unwrap();
        let mut executive = Executive::open(&url).unwrap();
        let table: TableRef = "app/flags".parse().unwrap();
        executive.init().unwrap();
        executive.create_family(&table.family).unwrap();
        let field = |name: &str| Field {
            name: name.parse().unwrap(),
            ty: FieldType::String,
        };
        let fields = vec![field("name"), field("value")];
        let schema = TableSchema::new(fields, &["name".parse().unwrap()]).unwrap();
        executive.create_table(&table, &schema).unwrap();
        let mut writer = Writer { executive, table };
        writer.put("first");
        writer
    }

    /// Changes the row; the sequence of that.
    fn put(&mut self, value: &str) -> u64 {
        let text = |text: &str| Value::Text(text.as_bytes().to_vec());
        let put = Mutation::Put {
            table: self.table.clone(),
            values: vec![
                ("name".parse().unwrap(), text("a")),
                ("value".parse().unwrap(), text(value)),
            ],
        };
        let outcome = self.executive.mutate(&[put]).unwrap();
        outcome.seq.expect("it is another value").get()
    }
}

/// A mounted ledger in MariaDB, with a binlog unless said otherwise.
struct Followed {
    // First, so that it ends before what it follows.
    daemon: Daemon,
    writer: Writer,
    database: TestDatabase,
    place: Place,
}

impl Followed {
    fn new(server: &PrivateServer) -> Self {
        let database = server.database();
        let writer = Writer::new(&database.url());
        let place = Place::new();
        let daemon = Daemon::follow(&place, &server.follower(&database), &NEVER);
        wait_push(&daemon, "on");
        Followed {
            daemon,
            writer,
            database,
            place,
        }
    }

    /// Changes the row and sees it soon.
    #[track_caller]
    fn put(&mut self, value: &str) {
        let seq = self.writer.put(value);
        see(&self.daemon, value, seq);
    }
}

#[track_caller]
fn see(daemon: &Daemon, value: &str, seq: u64) {
    wait_within(SOON, &format!("{value} is seen"), || shown(daemon) == value);
    assert!(daemon.seq() >= seq);
}

fn shown(daemon: &Daemon) -> String {
    fs::read_to_string(daemon.path("app/flags/a/value")).unwrap_or_default()
}

#[track_caller]
fn wait_push(daemon: &Daemon, state: &str) {
    daemon.wait_status(&format!("push is {state}"), |s| s["push"]["state"] == state);
}

/// Waits until the dump thread `old` has another in its place.
#[track_caller]
fn wait_new_stream(server: &PrivateServer, old: &[u64]) {
    wait_within(SOON, "there is another stream", || {
        let now = server.dump_threads();
        !now.is_empty() && now.iter().all(|id| !old.contains(id))
    });
}

#[test]
fn every_binlog_format_tells_of_changes() {
    let server = PrivateServer::with_binlog(&[]);
    for format in ["ROW", "STATEMENT", "MIXED"] {
        for compress in ["OFF", "ON"] {
            server.run(&format!("SET GLOBAL binlog_format = {format}"));
            server.run(&format!("SET GLOBAL log_bin_compress = {compress}"));
            server.run("SET GLOBAL log_bin_compress_min_len = 10");
            let mut followed = Followed::new(&server);
            followed.put("before");
            quiet(&server);
            let before = server.selects_of_followers();
            for number in 0..50 {
                followed.put(&number.to_string());
            }
            quiet(&server);
            let looks = server.selects_of_followers() - before;
            println!("{format}, compression {compress}: {looks} queries for 50 changes");
            // Which entry it is stands in the events: one look finds it and one finds no more. Those
            // that are compressed are not opened, and take a few looks each.
            let each = if compress == "OFF" { 3 } else { 20 };
            assert!(looks <= 50 * each, "{format}: {looks} queries");
        }
    }
}

#[test]
fn rotation_and_flush_logs_miss_nothing() {
    let server = PrivateServer::with_binlog(&["--max-binlog-size=4096"]);
    let mut followed = Followed::new(&server);
    let stream = server.dump_threads();
    for number in 0..200 {
        followed.put(&format!("rotating {number}"));
    }
    for flush in ["FLUSH LOGS", "FLUSH BINARY LOGS", "FLUSH TABLES"] {
        server.run(flush);
        followed.put(flush);
    }
    assert_eq!(server.dump_threads(), stream, "the stream was made again");
    // The file that it reads from is gone.
    server.run("FLUSH BINARY LOGS");
    server.run("RESET MASTER");
    followed.put("reset");
    followed.put("and again");
}

#[test]
fn a_killed_stream_is_made_again() {
    let server = PrivateServer::with_binlog(&[]);
    let mut followed = Followed::new(&server);
    for round in 0..5 {
        let old = server.dump_threads();
        for id in &old {
            server.run(&format!("KILL {id}"));
        }
        // While it is gone, and once it is there again.
        followed.put(&format!("{round} at once"));
        wait_new_stream(&server, &old);
        wait_push(&followed.daemon, "on");
        followed.put(&format!("{round} later"));
    }
}

#[test]
fn a_server_that_restarts_is_followed_again() {
    let server = PrivateServer::with_binlog(&[]);
    let mut followed = Followed::new(&server);
    for (round, orderly) in [true, false].into_iter().enumerate() {
        server.stop(orderly);
        wait_push(&followed.daemon, "connecting");
        let value = shown(&followed.daemon);
        assert!(!value.is_empty(), "it can be read while the server is away");
        server.start_again();
        let up = Instant::now();
        followed.put(&format!("{round} at once"));
        wait_within(SOON, "push is on", || {
            followed.daemon.status()["push"]["state"] == "on"
        });
        println!("pushing {:?} after the server was up", up.elapsed());
        followed.put(&format!("{round} later"));
        wait_within(SOON, "all is well", || {
            let status = followed.daemon.status();
            status["health"] == "ok" && status["problem"].is_null()
        });
    }
}

/// Two servers with the same ledger; the second takes over while `silently` is how the first one
/// goes away.
fn a_change_of_primary(silently: bool) {
    let first = PrivateServer::with_binlog(&["--server-id=11"]);
    let second = PrivateServer::with_binlog(&["--server-id=12"]);
    let databases = [&first, &second].map(PrivateServer::database);
    let mut writers = [0, 1].map(|i: usize| Writer::new(&databases[i].url()));
    let switch = Switch::to(&first.address());
    let origin = databases[0]
        .url()
        .replace(&first.address(), switch.address());
    let place = Place::new();
    let daemon = Daemon::follow(&place, &origin, &NEVER);
    wait_push(&daemon, "on");
    for number in 0..5 {
        let value = format!("replicated {number}");
        let seqs = [0, 1].map(|i: usize| writers[i].put(&value));
        assert_eq!(seqs[0], seqs[1]);
        see(&daemon, &value, seqs[0]);
    }
    // The last that the first one wrote has reached the second, and the next is its own.
    let value = "the new primary's";
    let seq = writers[1].put(value);
    let changed = Instant::now();
    switch.point_to(&second.address(), silently);
    see(&daemon, value, seq);
    println!("the new primary is followed after {:?}", changed.elapsed());
    wait_within(SOON, "push is on", || {
        daemon.status()["push"]["state"] == "on" && !second.dump_threads().is_empty()
    });
    for number in 0..5 {
        let value = format!("after {number}");
        let seq = writers[1].put(&value);
        see(&daemon, &value, seq);
    }
}

#[test]
fn a_new_primary_is_followed_when_the_old_one_hangs_up() {
    a_change_of_primary(false);
}

#[test]
fn a_new_primary_is_followed_when_the_old_one_falls_silent() {
    a_change_of_primary(true);
}

#[test]
fn without_the_privilege_it_polls_and_says_so_once() {
    let server = PrivateServer::with_binlog(&[]);
    let database = server.database();
    let mut writer = Writer::new(&database.url());
    server.run(&format!(
        "CREATE USER 'reader'@'127.0.0.1' IDENTIFIED BY 'hunter2'; \
         GRANT SELECT ON {}.ctlstore_dml_ledger TO 'reader'@'127.0.0.1'",
        database.name()
    ));
    let place = Place::new();
    let log = place.root().join("log");
    let daemon = Daemon::follow(
        &place,
        &database.url_of("reader", "hunter2"),
        &[
            "--poll-interval",
            "50ms",
            "--log-file",
            log.to_str().unwrap(),
        ],
    );
    wait_push(&daemon, "off");
    let reason = daemon.status()["push"]["reason"].to_string();
    assert!(reason.contains("GRANT REPLICATION SLAVE"), "{reason}");
    for number in 0..20 {
        let value = number.to_string();
        let seq = writer.put(&value);
        see(&daemon, &value, seq);
    }
    let said = fs::read_to_string(&log).unwrap();
    assert_eq!(said.matches("push is off").count(), 1, "{said}");
    assert!(!said.contains("hunter2"), "{said}");
    let shown = stdout(&run(["status", daemon.mountpoint().to_str().unwrap()]));
    assert!(shown.contains("off, polling every 50ms: "), "{shown}");
    assert_eq!(daemon.status()["health"], "ok");
}

#[test]
fn without_a_binlog_a_change_is_seen_within_the_polling_interval() {
    let database = mariadb::database();
    let mut writer = Writer::new(&database.url());
    let place = Place::new();
    let interval = Duration::from_millis(400);
    let daemon = Daemon::follow(&place, &database.url(), &["--poll-interval", "400ms"]);
    if std::env::var_os("CTLFS_TEST_MYSQL_URL").is_none() {
        wait_push(&daemon, "off");
        let reason = daemon.status()["push"]["reason"].to_string();
        assert!(reason.contains("log_bin"), "{reason}");
    }
    let mut delays = Vec::new();
    for number in 0..10 {
        let value = number.to_string();
        let seq = writer.put(&value);
        let written = Instant::now();
        see(&daemon, &value, seq);
        delays.push(written.elapsed());
    }
    delays.sort();
    println!("visible after {delays:?}, polling every {interval:?}");
    // A quarter of jitter. Single ones take as long as the machine is busy with other tests.
    assert!(delays[delays.len() / 2] <= interval * 2);
}

#[test]
fn push_can_be_turned_off() {
    let server = PrivateServer::with_binlog(&[]);
    let database = server.database();
    let mut writer = Writer::new(&database.url());
    let place = Place::new();
    let arguments = ["--push", "off", "--poll-interval", "50ms"];
    let daemon = Daemon::follow(&place, &database.url(), &arguments);
    let seq = writer.put("polled");
    see(&daemon, "polled", seq);
    let push: Json = daemon.status()["push"].clone();
    assert_eq!(push["state"], "off");
    assert!(server.dump_threads().is_empty());
}

/// Twenty hosts follow one server at once: none ends another's stream, all see every change.
#[test]
fn a_fleet_follows_side_by_side() {
    const HOSTS: usize = 20;
    let server = PrivateServer::with_binlog(&[]);
    let database = server.database();
    let mut writer = Writer::new(&database.url());
    let directory = tempfile::tempdir().unwrap();
    let hosts: Vec<_> = (0..HOSTS)
        .map(|number| {
            let ldb = directory.path().join(format!("{number}.db"));
            let board = Arc::new(StatusBoard::default());
            let stop = StopHandle::new();
            let url: OriginUrl = database.url().parse().unwrap();
            let mut reflector = Reflector::new(
                ledger::open(&url).unwrap(),
                LdbWriter::open(&ldb).unwrap(),
                Box::new(()),
                Arc::clone(&board),
                Settings {
                    poll_interval: Duration::from_secs(600),
                    ..Settings::default()
                },
            );
            let handle = stop.clone();
            let thread = std::thread::spawn(move || reflector.run(&handle));
            (board, stop, thread)
        })
        .collect();
    let all = |condition: &dyn Fn(&StatusBoard) -> bool| hosts.iter().all(|h| condition(&h.0));
    wait_within(Duration::from_secs(30), "all are on", || {
        all(&|board| board.push_state() == PushState::On)
    });
    let mut streams = server.dump_threads();
    streams.sort_unstable();
    assert_eq!(streams.len(), HOSTS);
    for number in 0..20 {
        let seq = writer.put(&number.to_string());
        wait_within(SOON, "all have it", || {
            all(&|board| board.progress().applied.get() >= seq)
        });
    }
    let mut now = server.dump_threads();
    now.sort_unstable();
    assert_eq!(now, streams, "streams were made again");
    let stopping = Instant::now();
    for (_, stop, _) in &hosts {
        stop.stop();
    }
    for (_, _, thread) in hosts {
        thread.join().unwrap();
    }
    wait_within(SOON, "all streams have ended", || {
        server.dump_threads().is_empty()
    });
    assert!(stopping.elapsed() < SOON);
}

#[test]
fn other_traffic_of_the_server_makes_no_queries() {
    let server = PrivateServer::with_binlog(&[]);
    let mut followed = Followed::new(&server);
    followed.put("before");
    let other = server.database();
    let tables = "CREATE TABLE t (x INT AUTO_INCREMENT PRIMARY KEY, y TEXT); \
                  CREATE TABLE ctlstore_dml_ledger (seq BIGINT, statement TEXT)";
    for table in tables.split("; ") {
        other.run(table);
    }
    followed.database.run("CREATE TABLE t (x INT PRIMARY KEY)");
    quiet(&server);
    for format in ["ROW", "STATEMENT"] {
        server.run(&format!("SET GLOBAL binlog_format = {format}"));
        let before = server.selects_of_followers();
        for number in 0..300 {
            other.run(&format!("INSERT INTO t (y) VALUES ('{number}')"));
            other.run(&format!(
                "INSERT INTO ctlstore_dml_ledger VALUES ({number}, 'x')"
            ));
            followed
                .database
                .run(&format!("REPLACE INTO t VALUES ({number})"));
        }
        // A change behind them shows that the stream has passed them all.
        followed.put(format);
        quiet(&server);
        let queries = server.selects_of_followers() - before;
        println!("{queries} queries during 900 transactions of others, written as {format}");
        assert!(queries <= 10, "{queries}");
    }
    let _ = &followed.place;
}

/// Waits until the follower asks the server nothing for two seconds.
fn quiet(server: &PrivateServer) {
    let mut last = (server.selects_of_followers(), Instant::now());
    wait_within(Duration::from_secs(60), "the reflector is quiet", || {
        let now = server.selects_of_followers();
        if now != last.0 {
            last = (now, Instant::now());
        }
        last.1.elapsed() > Duration::from_secs(2)
    });
}

/// An idle host is in contact, healthy, and costs the server next to nothing.
#[test]
fn an_idle_host_asks_the_server_almost_nothing() {
    let server = PrivateServer::with_binlog(&["--auto-increment-increment=3"]);
    let database = server.database();
    let mut writer = Writer::new(&database.url());
    for number in 0..20 {
        writer.put(&number.to_string());
    }
    let place = Place::new();
    let origin = server.follower(&database);
    let daemon = Daemon::follow(&place, &origin, &["--stale-after", "4s"]);
    wait_push(&daemon, "on");
    quiet(&server);
    let window = Duration::from_secs(60);
    let (before, began) = (server.counter("Questions"), Instant::now());
    wait_within(window * 2, "the window is over", || {
        // Reading it costs the server nothing.
        let status = daemon.status();
        assert_eq!(status["health"], "ok", "{status}");
        assert_eq!(status["push"]["state"], "on");
        assert!(
            status["seconds_since_contact"].as_u64().unwrap() <= 3,
            "{status}"
        );
        began.elapsed() >= window
    });
    let after = server.counter("Questions");
    // What the second look at the counter itself cost: see how much a third one does.
    let own = server.counter("Questions") - after;
    let asked = after - before - own;
    let rate = asked as f64 / began.elapsed().as_secs_f64();
    println!("{asked} queries in {:?}: {rate:.3}/s", began.elapsed());
    assert!(rate <= 0.1, "{rate}");
}

/// A server that is written to without a word in its binlog is polled, whatever it said.
#[test]
fn a_push_that_tells_nothing_is_noticed() {
    let server = PrivateServer::with_binlog(&[]);
    let database = server.database();
    Writer::new(&database.url());
    let place = Place::new();
    let origin = server.follower(&database);
    let daemon = Daemon::follow(&place, &origin, &["--poll-interval", "100ms"]);
    wait_push(&daemon, "on");
    // By then what may have been missed before push was on has been looked for.
    quiet(&server);
    let append = |value: &str| {
        database.run(&format!(
            "SET sql_log_bin = 0; INSERT INTO ctlstore_dml_ledger (statement) VALUES \
             ('REPLACE INTO app___flags (\"name\",\"value\") VALUES(''a'',''{value}'')')"
        ));
    };
    append("unsaid");
    // The safety net finds the first.
    wait_within(Duration::from_secs(60), "the first is seen", || {
        shown(&daemon) == "unsaid"
    });
    daemon.wait_status("push is not relied on", |s| {
        s["push"]["reason"]
            .as_str()
            .is_some_and(|r| r.contains("log_slave_updates"))
    });
    let written = Instant::now();
    append("unsaid again");
    wait_within(SOON, "the next is seen", || {
        shown(&daemon) == "unsaid again"
    });
    println!("polled after {:?}", written.elapsed());
}

/// The LDB of an embedded ledger's file that comes, goes and is replaced.
#[test]
fn an_embedded_ledger_pushes_through_a_replacement_of_its_file() {
    let place = Place::new();
    let mut writer = Writer::new(&place.origin());
    let daemon = Daemon::follow(&place, &place.origin(), &NEVER);
    wait_push(&daemon, "on");
    for number in 0..50 {
        let value = number.to_string();
        let seq = writer.put(&value);
        see(&daemon, &value, seq);
    }
    // A copy of it takes its place, as when a backup is put back.
    drop(writer);
    let copy = place.root().join("copy.db");
    let ledger: PathBuf = place.ledger();
    let db = rusqlite::Connection::open(&ledger).unwrap();
    db.execute("VACUUM INTO ?1", [copy.to_str().unwrap()])
        .unwrap();
    drop(db);
    for suffix in ["-wal", "-shm"] {
        let mut beside = ledger.clone().into_os_string();
        beside.push(suffix);
        // SQLite may have removed it.
        let _ = fs::remove_file(beside);
    }
    fs::rename(&copy, &ledger).unwrap();
    let url: OriginUrl = place.origin().parse().unwrap();
    let mut writer = Writer {
        executive: Executive::open(&url).unwrap(),
        table: "app/flags".parse().unwrap(),
    };
    for number in 0..20 {
        let value = format!("in the copy {number}");
        let seq = writer.put(&value);
        see(&daemon, &value, seq);
    }
}
