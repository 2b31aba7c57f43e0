//! The hot path: what the kernel holds costs the daemon nothing, and only what has changed is asked
//! for again. Held to the daemon's own count of requests.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::undocumented_unsafe_blocks,
    unreachable_pub
)]

mod common {
    pub mod daemon;
    pub mod helper;
}

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use common::daemon::{Daemon, Place, ctlfs, stderr};
use common::helper::{self, Helper};
use ctlfs::executive::{Executive, Mutation};
use ctlfs::model::Value;
use serde_json::json;

const DOCUMENT: &str = "
families:
  app:
    tables:
      flags:
        fields: {name: string, enabled: integer, note: text, owner: text}
        key: [name]
        rows:
          - {name: one, enabled: 1, note: first}
          - {name: two, enabled: 2, note: second}
      limits:
        fields: {name: string, most: integer}
        key: [name]
        rows:
          - {name: requests, most: 100}
";

fn mount() -> (Place, Daemon, Executive) {
    let place = Place::new();
    let file = place.root().join("config.yaml");
    fs::write(&file, DOCUMENT).unwrap();
    let mut executive = Executive::open(&place.origin().parse().unwrap()).unwrap();
    executive.init().unwrap();
    let output = ctlfs()
        .args(["apply", "--origin", &place.origin(), "-f"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let daemon = Daemon::mount(&place, &[]);
    (place, daemon, executive)
}

fn put(daemon: &Daemon, executive: &mut Executive, table: &str, values: &[(&str, Value)]) {
    let values = values.iter().map(|(f, v)| (f.parse().unwrap(), v.clone()));
    let mutation = Mutation::Put {
        table: table.parse().unwrap(),
        values: values.collect(),
    };
    let outcome = executive.mutate(&[mutation]).unwrap();
    daemon.wait_seq(outcome.seq.unwrap().get());
    // Until then nothing is remembered as absent, and the announcing thread looks names up.
    daemon.wait_status("it is announced", |s| s["behind"] == 0);
}

/// The requests that the daemon has served, by operation.
type Requests = BTreeMap<String, u64>;

fn requests(daemon: &Daemon) -> Requests {
    let status = daemon.status();
    let counts = status["requests"].as_object().unwrap();
    let counts: Requests = counts
        .iter()
        .map(|(name, count)| (name.clone(), count.as_u64().unwrap()))
        .collect();
    let sum: u64 = counts
        .iter()
        .filter(|(n, _)| *n != "total")
        .map(|(_, c)| c)
        .sum();
    assert_eq!(sum, counts["total"]);
    counts
}

/// What `work` made the daemon serve of the tree. Reading status.json counts under `control`; when
/// the kernel forgets what it no longer needs is its own business.
fn served(daemon: &Daemon, work: impl FnOnce()) -> Requests {
    let before = requests(daemon);
    work();
    let after = requests(daemon);
    after
        .into_iter()
        .filter(|(name, _)| !["control", "forget", "total"].contains(&name.as_str()))
        .map(|(name, count)| (name.clone(), count - before[&name]))
        .filter(|(_, count)| *count > 0)
        .collect()
}

fn nothing() -> Requests {
    Requests::new()
}

#[test]
fn a_hot_read_costs_the_daemon_nothing() {
    let (_place, daemon, _) = mount();
    for file in ["enabled", "note", "row.json"] {
        let path = daemon.path("app/flags/one").join(file);
        let cold = served(&daemon, || drop(fs::read(&path).unwrap()));
        println!("the first read of {file}: {cold:?}");
        assert!(cold["lookup"] >= 1 && cold["read"] == 1, "{cold:?}");
        let content = fs::read(&path).unwrap();
        let hot = served(&daemon, || assert_eq!(fs::read(&path).unwrap(), content));
        assert_eq!(hot, nothing());
        let hot = served(&daemon, || {
            for _ in 0..1000 {
                assert_eq!(fs::read(&path).unwrap(), content);
            }
        });
        assert_eq!(hot, nothing());
    }
}

#[test]
fn stats_of_what_is_known_cost_nothing() {
    let (_place, daemon, _) = mount();
    let paths = [
        "",
        "app",
        "app/flags",
        "app/flags/one",
        "app/flags/one/enabled",
        "app/flags/.seq",
    ];
    let paths = paths.map(|path| daemon.path(path));
    let look = || paths.iter().for_each(|path| assert!(path.exists()));
    look();
    assert_eq!(served(&daemon, look), nothing());
}

#[test]
fn hot_reads_of_another_process_cost_nothing() {
    let (_place, daemon, _) = mount();
    let path = daemon.path("app/flags/one/note");
    fs::read(&path).unwrap();
    fs::read(&path).unwrap();
    let hot = served(&daemon, || {
        let reader = Helper::start("reader_process", &json!({"path": path, "times": 1000}));
        assert_eq!(reader.finish(), json!(1000));
    });
    assert_eq!(hot, nothing());
}

#[test]
#[ignore = "a process of the other tests"]
fn reader_process() {
    let Some(job) = helper::job() else { return };
    let path = PathBuf::from(job["path"].as_str().unwrap());
    let times = job["times"].as_u64().unwrap();
    let right = (0..times).filter(|_| fs::read(&path).unwrap() == b"first");
    helper::answer(&json!(right.count()));
}

#[test]
fn an_absent_field_is_remembered_as_absent() {
    let (_place, daemon, mut executive) = mount();
    let owner = daemon.path("app/flags/one/owner");
    let nowhere = daemon.path("app/flags/three");
    assert!(!owner.exists() && !nowhere.exists());
    let test_again = || {
        for _ in 0..100 {
            assert!(!owner.exists() && !nowhere.exists());
        }
    };
    assert_eq!(served(&daemon, test_again), nothing());
    // A change elsewhere leaves that as it is.
    let name = ("name", Value::text("requests"));
    put(
        &daemon,
        &mut executive,
        "app/limits",
        &[name, ("most", Value::Integer(7))],
    );
    assert_eq!(served(&daemon, test_again), nothing());
    // And once it is there, it is there.
    let name = ("name", Value::text("one"));
    put(
        &daemon,
        &mut executive,
        "app/flags",
        &[name.clone(), ("owner", Value::text("me"))],
    );
    assert_eq!(fs::read(&owner).unwrap(), b"me");
    put(
        &daemon,
        &mut executive,
        "app/flags",
        &[name, ("owner", Value::Null)],
    );
    assert!(!owner.exists());
    assert_eq!(served(&daemon, test_again), nothing());
}

#[test]
fn a_change_elsewhere_costs_a_hot_file_nothing() {
    let (_place, daemon, mut executive) = mount();
    let path = daemon.path("app/flags/one/note");
    let read = || assert_eq!(fs::read(&path).unwrap(), b"first");
    read();
    read();
    let ino = fs::metadata(&path).unwrap().ino();
    for (table, name, field) in [
        ("app/limits", "requests", "most"),
        ("app/flags", "two", "enabled"),
        ("app/flags", "new", "enabled"),
    ] {
        let name = ("name", Value::text(name));
        put(
            &daemon,
            &mut executive,
            table,
            &[name.clone(), (field, Value::Integer(-1))],
        );
        let cost = served(&daemon, read);
        // The time of the table's directory is that of its last change, and on the way through it
        // the kernel asks for what it must know of it: once, for all files below.
        let getattr = |count| [("getattr".into(), count)].into();
        let allowed: Requests = if table == "app/flags" {
            getattr(1)
        } else {
            nothing()
        };
        assert_eq!(cost, allowed, "after a change of {name:?} in {table}");
        assert_eq!(served(&daemon, read), nothing());
        assert_eq!(fs::metadata(&path).unwrap().ino(), ino);
    }
}

#[test]
fn only_changed_fields_get_new_inodes() {
    let (_place, daemon, mut executive) = mount();
    let row = daemon.path("app/flags/one");
    let ino = |file: &str| fs::metadata(row.join(file)).unwrap().ino();
    let read = |file: &str| fs::read_to_string(row.join(file)).unwrap();
    let all = ["enabled", "note", "name", "row.json"];
    all.iter().for_each(|file| drop(read(file)));
    let before = all.map(ino);
    let name = ("name", Value::text("one"));
    put(
        &daemon,
        &mut executive,
        "app/flags",
        &[name, ("enabled", Value::Integer(5))],
    );
    let after = all.map(ino);
    assert_ne!(before[0], after[0]);
    assert_eq!(before[1..3], after[1..3]);
    assert_ne!(before[3], after[3]);
    assert_eq!(read("enabled"), "5");
    assert!(read("row.json").contains("\"enabled\":5"));
    // The bytes of the others are in the kernel still; their times are new.
    let cost = served(&daemon, || {
        assert_eq!(read("note"), "first");
        assert_eq!(read("name"), "one");
    });
    assert!(
        !cost.contains_key("read") && !cost.contains_key("lookup"),
        "{cost:?}"
    );
    let times = all.map(|file| fs::metadata(row.join(file)).unwrap().mtime());
    assert!(times.iter().all(|time| *time == times[0]), "{times:?}");
}
