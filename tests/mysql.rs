//! A mount that follows a ledger in MySQL or MariaDB, from end to end: what is put is seen, an
//! outage is survived, and a schema made by ctlstore is as good as our own.
//!
//! The server goes away behind a proxy of the test's own, so that the same is tested against any
//! server: connections are refused and cut, or, worse, taken and never answered.
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
}

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Output;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, Place, ctlfs, stderr, wait_within};
use common::mariadb::{self, TestDatabase};

const DOCUMENT: &str = "
families:
  app:
    tables:
      flags:
        fields: {name: string, enabled: integer, note: text, most: decimal, raw: binary}
        key: [name]
        rows:
          - {name: one, enabled: 9223372036854775807, note: \"it's \\\\ \\\"so\\\" \\u00e9\\U0001F600\", most: 0.25}
";

fn run(origin: &str, args: &[&str]) -> Output {
    ctlfs()
        .args(args)
        .args(["--origin", origin])
        .output()
        .unwrap()
}

#[track_caller]
fn ok(output: &Output) {
    assert!(output.status.success(), "{}", stderr(output));
}

fn put(origin: &str, values: &[&str]) {
    let args: Vec<&str> = ["put", "app/flags"].iter().chain(values).copied().collect();
    ok(&run(origin, &args));
}

fn apply(place: &Place, origin: &str) {
    let file = place.root().join("config.yaml");
    fs::write(&file, DOCUMENT).unwrap();
    ok(&run(origin, &["apply", "-f", file.to_str().unwrap()]));
}

fn read(daemon: &Daemon, file: &str) -> Option<String> {
    fs::read_to_string(daemon.path("app/flags").join(file)).ok()
}

/// Waits for a change that a working daemon shows within its poll interval.
#[track_caller]
fn wait_for(daemon: &Daemon, file: &str, expected: &str) {
    wait_within(
        Duration::from_secs(15),
        &format!("{file} is {expected:?}"),
        || read(daemon, file).as_deref() == Some(expected),
    );
}

/// A server that can go away.
struct Proxy {
    port: u16,
    mode: Arc<AtomicU8>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

const UP: u8 = 0;
const REFUSING: u8 = 1;
const SILENT: u8 = 2;
const ENDED: u8 = 3;

impl Proxy {
    fn start(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy {
            port: listener.local_addr().unwrap().port(),
            mode: Arc::default(),
            open: Arc::default(),
        };
        let (mode, open) = (Arc::clone(&proxy.mode), Arc::clone(&proxy.open));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                match mode.load(Ordering::SeqCst) {
                    ENDED => return,
                    // Dropped at once.
                    REFUSING => continue,
                    SILENT => open.lock().unwrap().push(client),
                    _ => {
                        let Ok(server) = TcpStream::connect(&target) else {
                            continue;
                        };
                        pump(&client, &server, &mode);
                        pump(&server, &client, &mode);
                        open.lock().unwrap().extend([client, server]);
                    }
                }
            }
        });
        proxy
    }

    /// From now on like this; connections that are open are cut, unless they fall silent.
    fn set(&self, mode: u8) {
        self.mode.store(mode, Ordering::SeqCst);
        if mode != SILENT {
            for stream in self.open.lock().unwrap().drain(..) {
                // It may be closed already.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.set(ENDED);
        // Wakes the thread that listens.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// Copies one direction until either side closes; swallows everything while silent.
fn pump(from: &TcpStream, to: &TcpStream, mode: &Arc<AtomicU8>) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    let mode = Arc::clone(mode);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if mode.load(Ordering::SeqCst) != SILENT && to.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
}

/// The URL of `database` through the proxy, and the proxy.
fn proxied(database: &TestDatabase) -> (String, Proxy) {
    let url = database.url();
    let (before, rest) = url.rsplit_once('@').unwrap();
    let (host, name) = rest.split_once('/').unwrap();
    let proxy = Proxy::start(host.to_owned());
    (format!("{before}@127.0.0.1:{}/{name}", proxy.port), proxy)
}

#[test]
fn a_put_is_seen_within_the_poll_interval() {
    let database = mariadb::database();
    let origin = database.url();
    let place = Place::new();
    ok(&run(&origin, &["init"]));
    apply(&place, &origin);
    let daemon = Daemon::follow(&place, &origin, &["--poll-interval", "50ms"]);
    assert_eq!(read(&daemon, "one/enabled").unwrap(), i64::MAX.to_string());
    assert_eq!(read(&daemon, "one/note").unwrap(), "it's \\ \"so\" é😀");
    assert_eq!(read(&daemon, "one/most").unwrap(), "0.25");
    assert_eq!(read(&daemon, "one/raw"), None);
    let mut delays = Vec::new();
    for number in ["1", "2", "3", "4", "5", "6", "7"] {
        put(&origin, &["name=one", &format!("enabled={number}")]);
        let start = Instant::now();
        wait_for(&daemon, "one/enabled", number);
        delays.push(start.elapsed());
    }
    delays.sort();
    println!("visible {delays:?} after the command ended, polling every 50 ms");
    // Far below the interval that is the default.
    assert!(delays[3] < Duration::from_millis(400));
    put(&origin, &["name=two", "note=new"]);
    wait_for(&daemon, "two/note", "new");
    ok(&run(&origin, &["delete", "app/flags", "name=two"]));
    wait_within(Duration::from_secs(15), "the row is gone", || {
        !daemon.path("app/flags/two").exists()
    });
}

/// The server is away in `mode`; reads go on, the status says so, and then it is back.
fn an_outage(mode: u8) {
    let database = mariadb::database();
    let origin = database.url();
    let place = Place::new();
    ok(&run(&origin, &["init"]));
    apply(&place, &origin);
    let (through, proxy) = proxied(&database);
    let daemon = Daemon::follow(
        &place,
        &through,
        &["--poll-interval", "20ms", "--stale-after", "500ms"],
    );
    daemon.wait_status("all is well", |s| s["health"] == "ok");
    proxy.set(mode);
    put(&origin, &["name=one", "enabled=5"]);
    wait_within(Duration::from_secs(60), "the status says stale", || {
        daemon.status()["health"] == "stale"
    });
    let status = daemon.status();
    let password = database.password();
    assert!(!status.to_string().contains(password));
    // What was there is read as ever, hot or cold.
    assert_eq!(read(&daemon, "one/enabled").unwrap(), i64::MAX.to_string());
    assert_eq!(read(&daemon, "one/most").unwrap(), "0.25");
    let shown = ctlfs()
        .arg("status")
        .arg(place.mountpoint())
        .output()
        .unwrap();
    assert_eq!(shown.status.code(), Some(1));
    proxy.set(UP);
    wait_within(Duration::from_secs(60), "the change is seen", || {
        read(&daemon, "one/enabled").as_deref() == Some("5")
    });
    daemon.wait_status("all is well again", |s| {
        s["health"] == "ok" && s["problem"].is_null() && s["behind"] == 0
    });
}

#[test]
fn a_server_that_refuses_is_waited_for() {
    an_outage(REFUSING);
}

#[test]
fn a_server_that_is_silent_is_waited_for() {
    an_outage(SILENT);
}

#[test]
fn connections_cut_by_the_server_are_made_again() {
    let database = mariadb::database();
    let origin = database.url();
    let place = Place::new();
    ok(&run(&origin, &["init"]));
    apply(&place, &origin);
    let daemon = Daemon::follow(&place, &origin, &["--poll-interval", "20ms"]);
    for number in ["11", "12", "13"] {
        database.hang_up();
        put(&origin, &["name=one", &format!("enabled={number}")]);
        wait_for(&daemon, "one/enabled", number);
    }
}

#[test]
fn a_ledger_made_by_ctlstore_is_followed() {
    let database = mariadb::database();
    // As ctlstore's own schema has them.
    database.run(
        "CREATE TABLE families (id INTEGER AUTO_INCREMENT PRIMARY KEY, name VARCHAR(191) NOT NULL UNIQUE);
         CREATE TABLE mutators (writer VARCHAR(191) PRIMARY KEY, secret VARCHAR(255) NOT NULL,
             cookie BLOB(1024) NOT NULL, clock BIGINT NOT NULL DEFAULT 0);
         CREATE TABLE ctlstore_dml_ledger (seq INTEGER AUTO_INCREMENT PRIMARY KEY,
             leader_ts DATETIME DEFAULT CURRENT_TIMESTAMP, statement MEDIUMTEXT NOT NULL);
         CREATE TABLE locks (id VARCHAR(191) PRIMARY KEY, clock BIGINT NOT NULL DEFAULT 0);
         INSERT INTO locks VALUES ('ledger', 0)",
    );
    for statement in [
        "CREATE TABLE app___flags (\"name\" VARCHAR(191), \"enabled\" INTEGER, PRIMARY KEY(\"name\"));",
        "REPLACE INTO app___flags (\"name\",\"enabled\") VALUES('one',1)",
        "--- BEGIN",
        "REPLACE INTO app___flags (\"name\",\"enabled\") VALUES('two',-9223372036854775808)",
        "DELETE FROM app___flags WHERE \"name\" = 'one'",
        "--- COMMIT",
    ] {
        database.append(statement);
    }
    let place = Place::new();
    let daemon = Daemon::follow(&place, &database.url(), &["--poll-interval", "20ms"]);
    assert_eq!(read(&daemon, "two/enabled").unwrap(), i64::MIN.to_string());
    assert!(!daemon.path("app/flags/one").exists());
    // A time of whole seconds.
    let time = fs::metadata(daemon.path("app/flags/two/enabled"))
        .unwrap()
        .modified()
        .unwrap();
    let age = std::time::SystemTime::now().duration_since(time).unwrap();
    assert!(age < Duration::from_secs(120), "{age:?}");
    // A gap, as a rolled-back transaction leaves it, then a sequence near the end of 32 bits.
    database.run("ALTER TABLE ctlstore_dml_ledger AUTO_INCREMENT = 2147483600");
    database.append("REPLACE INTO app___flags (\"name\",\"enabled\") VALUES('three',3)");
    wait_for(&daemon, "three/enabled", "3");
    assert_eq!(daemon.seq(), 2_147_483_600);
    database.append("ALTER TABLE app___flags ADD COLUMN \"note\" TEXT");
    database
        .append("REPLACE INTO app___flags (\"name\",\"enabled\",\"note\") VALUES('three',3,'n')");
    wait_for(&daemon, "three/note", "n");
    // Our own init finds the ledger as it is and adds what is missing.
    ok(&run(&database.url(), &["init"]));
    database.append("DROP TABLE IF EXISTS app___flags");
    wait_within(Duration::from_secs(15), "the family is gone", || {
        !daemon.path("app").exists()
    });
}
