//! A daemon that is killed at any moment, while the ledger is being written, and started again on
//! the same state: the LDB equals the ledger, with nothing applied twice and nothing skipped.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::undocumented_unsafe_blocks,
    unreachable_pub
)]

mod common {
    pub mod central;
    pub mod daemon;
    pub mod mariadb;
}

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::central::Place as Central;
use common::daemon::{Daemon, Place, is_alive, mount_command, wait_until};
use common::mariadb;
use ctlfs::executive::{Executive, Mutation};
use ctlfs::model::{Field, FieldType, TableRef, TableSchema, Value};
use rusqlite::{Connection, OpenFlags};

/// Numbers that are the same in each run: splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

const TABLES: [&str; 3] = ["app/flags", "app/routes", "tls/certs"];

fn schema(table: &str) -> TableSchema {
    let field = |name: &str, ty| Field {
        name: name.parse().unwrap(),
        ty,
    };
    let mut fields = vec![
        field("name", FieldType::String),
        field("part", FieldType::Integer),
        field("note", FieldType::Text),
        field("bytes", FieldType::Binary),
    ];
    let mut key = vec!["name".parse().unwrap()];
    if table == "app/routes" {
        key.push("part".parse().unwrap());
        fields.rotate_left(1);
    }
    TableSchema::new(fields, &key).unwrap()
}

/// What the writer does; the counter is a row that only an operator's own statement changes, one
/// that shows whether it was applied once.
struct Writer<'a> {
    central: &'a Central,
    executive: Executive,
    random: Random,
    counted: i64,
    added: u32,
}

impl<'a> Writer<'a> {
    fn new(central: &'a Central) -> Self {
        let mut executive = central.executive();
        executive.init().unwrap();
        for table in TABLES {
            let table: TableRef = table.parse().unwrap();
            executive.create_family(&table.family).unwrap();
        }
        for table in TABLES {
            let schema = schema(table);
            executive
                .create_table(&table.parse().unwrap(), &schema)
                .unwrap();
        }
        let mut writer = Writer {
            central,
            executive,
            random: Random(42),
            counted: 0,
            added: 0,
        };
        let counter = writer.upsert("app/flags", "counter", 0);
        writer.executive.mutate(&[counter]).unwrap();
        writer
    }

    fn upsert(&mut self, table: &str, name: &str, part: i64) -> Mutation {
        let note = format!("it's {}\n", self.random.below(1000));
        let bytes = vec![
            self.random.below(256).to_le_bytes()[0];
            self.random.below(300).try_into().unwrap()
        ];
        Mutation::Upsert {
            table: table.parse().unwrap(),
            values: vec![
                ("name".parse().unwrap(), Value::text(name)),
                ("part".parse().unwrap(), Value::Integer(part)),
                ("note".parse().unwrap(), Value::text(note)),
                ("bytes".parse().unwrap(), Value::Blob(bytes)),
            ],
        }
    }

    fn mutation(&mut self) -> Mutation {
        let table = TABLES[usize::try_from(self.random.below(3)).unwrap()];
        let name = format!("row {}", self.random.below(40));
        let part = self.random.below(3).cast_signed();
        if self.random.below(4) > 0 {
            return self.upsert(table, &name, part);
        }
        let mut key = vec![("name".parse().unwrap(), Value::text(name))];
        if table == "app/routes" {
            key.push(("part".parse().unwrap(), Value::Integer(part)));
        }
        Mutation::Delete {
            table: table.parse().unwrap(),
            key,
        }
    }

    /// One transaction of one kind or another.
    fn write(&mut self) {
        match self.random.below(12) {
            0 => {
                self.counted += 1;
                let text =
                    "UPDATE app___flags SET \"part\" = \"part\" + 1 WHERE \"name\" = 'counter'";
                self.central.run(&format!(
                    "BEGIN; UPDATE locks SET clock = clock + 1 WHERE id = 'ledger'; {text}; \
                     INSERT INTO ctlstore_dml_ledger (statement) VALUES ('{}'); COMMIT",
                    text.replace('\'', "''")
                ));
            }
            1 if self.added < 20 => {
                self.added += 1;
                let field = Field {
                    name: format!("added{}", self.added).parse().unwrap(),
                    ty: FieldType::Integer,
                };
                self.executive
                    .add_field(&"tls/certs".parse().unwrap(), &field)
                    .unwrap();
            }
            _ => {
                let count = 1 + self.random.below(6);
                let mutations: Vec<_> = (0..count).map(|_| self.mutation()).collect();
                self.executive.mutate(&mutations).unwrap();
            }
        }
    }
}

fn origin(central: &Central) -> String {
    match central {
        Central::Embedded(dir) => format!("sqlite://{}", dir.path().join("ledger.db").display()),
        Central::MySql(database) => database.url(),
    }
}

/// Ends the daemon `times` times by `signal`, each time at another moment, while `central` is being
/// written, and compares what comes of it.
fn survives(central: &Central, times: u64, signal: i32) {
    let mut writer = Writer::new(central);
    let place = Place::new();
    let origin = origin(central);
    let stop = AtomicBool::new(false);
    let counted = std::thread::scope(|scope| {
        // However this ends, the writer does too.
        let _guard = StopOnDrop(&stop);
        let writing = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                writer.write();
            }
            writer.counted
        });
        let mut random = Random(7);
        for time in 0..times {
            if time % 3 == 2 {
                end_while_starting(&place, &origin, signal, &mut random);
                continue;
            }
            let mut daemon = Daemon::follow(&place, &origin, &["--poll-interval", "2ms"]);
            let aim = daemon.seq() + 1 + random.below(60);
            wait_until("some more is applied", || daemon.seq() >= aim);
            std::thread::sleep(Duration::from_micros(random.below(3000)));
            daemon.signal(signal);
            daemon.wait();
        }
        stop.store(true, Ordering::Relaxed);
        writing.join().unwrap()
    });
    let entries = central.entries();
    let last = entries.last().unwrap().seq.get();
    let mut daemon = Daemon::follow(&place, &origin, &["--poll-interval", "2ms"]);
    daemon.wait_seq(last);
    assert_eq!(daemon.seq(), last);
    daemon.wait_status("everything is well", |status| {
        status["health"] == "ok" && status["late"] == serde_json::json!([])
    });
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));

    let ldb = place.state().join("ldb.db");
    let ldb = Connection::open_with_flags(ldb, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    let replay = Connection::open_in_memory().unwrap();
    for entry in &entries {
        if !entry.statement.starts_with("---") {
            replay.execute_batch(&entry.statement).unwrap();
        }
    }
    let reflected = tables(&ldb);
    assert_eq!(reflected.len(), TABLES.len());
    assert!(
        reflected == tables(&replay),
        "the LDB is not what the ledger says"
    );
    for (table, rows) in &reflected {
        let there = central_rows(central, &replay, table);
        assert!(*rows == there, "{table} is not as in the central database");
    }
    let part: i64 = ldb
        .query_row(
            "SELECT part FROM app___flags WHERE name = 'counter'",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(part, counted);
    let seq: i64 = ldb
        .query_row("SELECT seq FROM _ldb_seq", [], |row| row.get(0))
        .unwrap();
    assert_eq!(seq.cast_unsigned(), last);
    println!("ended {times} times over {last} entries, {counted} of them counted");
    assert!(counted > 0);
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Ends a daemon that may not even have mounted yet.
fn end_while_starting(place: &Place, origin: &str, signal: i32, random: &mut Random) {
    let mut child = mount_command(place, origin, &["--poll-interval", "2ms"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = child.id();
    std::thread::sleep(Duration::from_micros(random.below(60_000)));
    // SAFETY: kill takes no pointers; the process is our child and not yet waited for.
    assert_eq!(unsafe { libc::kill(pid.try_into().unwrap(), signal) }, 0);
    wait_until("it has ended", || child.try_wait().unwrap().is_some());
    assert!(!is_alive(pid));
}

/// The rows of one table, each as text.
type Rows = Vec<Vec<Option<String>>>;

fn columns(db: &Connection, table: &str) -> Vec<String> {
    let mut query = db
        .prepare("SELECT name FROM pragma_table_info(?1)")
        .unwrap();
    let names = query.query_map([table], |row| row.get(0)).unwrap();
    names.map(Result::unwrap).collect()
}

/// Selects every field as text that both databases write alike, in an order they agree on.
fn select(db: &Connection, table: &str) -> String {
    let fields: Vec<_> = columns(db, table)
        .iter()
        .map(|name| match name.as_str() {
            "name" | "note" | "bytes" => format!("hex(\"{name}\")"),
            _ => format!("CAST(\"{name}\" AS CHAR)"),
        })
        .collect();
    format!(
        "SELECT {} FROM {table} ORDER BY hex(\"name\"), \"part\"",
        fields.join(", ")
    )
}

fn rows(db: &Connection, table: &str) -> Rows {
    let mut query = db.prepare(&select(db, table)).unwrap();
    let width = query.column_count();
    let rows = query.query_map([], |row| (0..width).map(|i| row.get(i)).collect());
    rows.unwrap().map(Result::unwrap).collect()
}

/// Every config table of a SQLite database.
fn tables(db: &Connection) -> BTreeMap<String, Rows> {
    let mut query = db
        .prepare("SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE '%\\_\\_\\_%' ESCAPE '\\' AND name NOT LIKE '\\_%' ESCAPE '\\'")
        .unwrap();
    let names = query.query_map([], |row| row.get::<_, String>(0)).unwrap();
    names
        .map(Result::unwrap)
        .map(|name| (name.clone(), rows(db, &name)))
        .collect()
}

fn central_rows(central: &Central, shape: &Connection, table: &str) -> Rows {
    match central {
        Central::Embedded(dir) => rows(&open(&dir.path().join("ledger.db")), table),
        Central::MySql(database) => database.query(&select(shape, table)),
    }
}

fn open(path: &Path) -> Connection {
    Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap()
}

fn embedded() -> Central {
    Central::Embedded(tempfile::tempdir().unwrap())
}

#[test]
fn a_killed_daemon_goes_on_where_it_was() {
    survives(&embedded(), 24, libc::SIGKILL);
}

#[test]
fn a_terminated_daemon_goes_on_where_it_was() {
    survives(&embedded(), 9, libc::SIGTERM);
}

#[test]
fn a_killed_daemon_goes_on_in_a_mariadb_ledger() {
    survives(&Central::MySql(mariadb::database()), 15, libc::SIGKILL);
}
