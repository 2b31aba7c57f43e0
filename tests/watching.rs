//! Programs that know nothing of ctlfs watch a thousand changes, twenty a second, and miss none.
//!
//! A file of its own, so that nothing else runs beside it.
//!
//! Python's watchdog comes from its registry, into a directory of the test. Not here is Node's chokidar,
//! which passes over events that come close together on any file system.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod common {
    pub mod daemon;
    pub mod ledger;
    pub mod watcher;
}

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::ledger::Tree;
use common::watcher::Watcher;

const FLAGS: &str =
    r#"CREATE TABLE app___flags ("name" VARCHAR(191), "enabled" INTEGER, PRIMARY KEY("name"));"#;

fn flag(value: usize) -> String {
    format!("REPLACE INTO app___flags (\"name\",\"enabled\") VALUES('a',{value})")
}

const CHANGES: usize = 1000;
const PACE: Duration = Duration::from_millis(50);
/// What may pass between a change and its notice.
const LATE: Duration = Duration::from_secs(1);

/// Prints a line for whatever moves into the row's directory.
const WATCHDOG: &str = r#"
import sys
from watchdog.observers import Observer
from watchdog.events import FileSystemEventHandler
class Handler(FileSystemEventHandler):
    def on_any_event(self, event):
        path = event.dest_path or event.src_path
        if event.event_type in ("created", "moved") and path.endswith("/enabled"):
            print("saw enabled", flush=True)
observer = Observer()
observer.schedule(Handler(), sys.argv[1], recursive=True)
observer.start()
print("watching", flush=True)
observer.join()
"#;

/// Prints a line for whatever happens to the name in the row's directory.
const FS_WATCH: &str = r#"
const { watch } = require("node:fs");
watch(process.argv[1], (event, name) => { if (name === "enabled") console.log("saw", name); });
console.log("watching");
"#;

/// Watches one file with inotifywait, again and again, for a watch ends with its file. What the
/// file holds is looked at once the watch is there, so that nothing falls in between.
const FILE_LOOP: &str = r#"
echo watching
while :; do
    inotifywait -m -e attrib,delete_self "$1" 2>&1 | while read -r line; do
        case $line in
            *established*) echo value "$(cat "$1")" ;;
            *DELETE_SELF*) pkill -P $$ -x inotifywait; break ;;
        esac
    done
done
"#;

/// What a watcher is to show.
enum Sees {
    /// This line, once for each change.
    Events(&'static str),
    /// What it reads of the file, behind this. It may leave out values that were replaced before it
    /// came to read them.
    Latest(&'static str),
}

struct Watched {
    name: &'static str,
    watcher: Watcher,
    sees: Sees,
}

/// Installs watchdog; gives the directory for PYTHONPATH.
fn watchdog(home: &Path) -> PathBuf {
    let directory = home.join("python");
    let output = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--target"])
        .arg(&directory)
        .arg("watchdog")
        .output()
        .expect("python3 can be run");
    assert!(
        output.status.success(),
        "cannot install watchdog: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    directory
}

fn watchers(tree: &Tree, home: &Path) -> Vec<Watched> {
    let python = watchdog(home);
    let (table, row) = (tree.path("app/flags"), tree.path("app/flags/a"));
    let file = row.join("enabled");
    let script = |program: &str, args: &[&str], last: &Path| {
        let mut command = Command::new(program);
        command.args(args).arg(last).env("PYTHONPATH", &python);
        let watcher = Watcher::start(&mut command);
        watcher.wait_for("watching");
        watcher
    };
    // Polls, for it takes every FUSE file system for a remote one.
    let tail = Watcher::start(
        Command::new("tail")
            .args(["-F", "-s", "0.005", "--max-unchanged-stats=1"])
            .arg(&file),
    );
    tail.wait_for("0");
    vec![
        Watched {
            name: "inotifywait on the table",
            watcher: Watcher::inotifywait(&["-e", "moved_to"], &[&table]),
            sees: Sees::Events(".seq"),
        },
        Watched {
            name: "inotifywait on the row",
            watcher: Watcher::inotifywait(&["-e", "moved_to"], &[&row]),
            sees: Sees::Events("enabled"),
        },
        Watched {
            name: "inotifywait on the file",
            watcher: script("sh", &["-c", FILE_LOOP, "sh"], &file),
            sees: Sees::Latest("value "),
        },
        Watched {
            name: "watchdog",
            watcher: script("python3", &["-c", WATCHDOG], &table),
            sees: Sees::Events("saw enabled"),
        },
        Watched {
            name: "fs.watch",
            watcher: script("node", &["-e", FS_WATCH], &row),
            sees: Sees::Events("saw enabled"),
        },
        Watched {
            name: "tail -F",
            watcher: tail,
            sees: Sees::Latest(""),
        },
    ]
}

#[test]
fn programs_of_others_see_every_change() {
    let tree = Tree::new(&["-o", "newline"], &[FLAGS, &flag(0)]);
    let home = tempfile::tempdir().unwrap();
    let watchers = watchers(&tree, home.path());
    let mut changed = Vec::new();
    // For how long the machine kept us from doing something that was due.
    let mut held_up = Duration::ZERO;
    let began = Instant::now();
    for change in 1..=CHANGES {
        // A pace, not a wait: changes come at fixed times.
        let due = began + PACE * u32::try_from(change).unwrap();
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        held_up = held_up.max(due.elapsed());
        tree.ledger.append(&[flag(change)]);
        changed.push(Instant::now());
    }
    println!("the changes were up to {held_up:?} late themselves");
    let mut failed = Vec::new();
    for Watched {
        name,
        watcher,
        sees,
    } in &watchers
    {
        let Seen {
            missed,
            skipped,
            latest,
        } = match sees {
            Sees::Events(end) => events(watcher, end, &changed),
            Sees::Latest(before) => values(watcher, before, &changed),
        };
        println!("{name}: {missed} missed, {skipped} passed over, the latest after {latest:?}");
        if missed > 0 || latest >= LATE + 2 * held_up {
            failed.push(*name);
        }
    }
    assert_eq!(failed, [] as [&str; 0]);
}

/// How a watcher did.
struct Seen {
    /// Changes that it did not notice in time.
    missed: usize,
    /// Changes of which it noticed only that something later was there.
    skipped: usize,
    /// How late the latest notice was.
    latest: Duration,
}

/// By the number of events.
fn events(watcher: &Watcher, end: &str, changed: &[Instant]) -> Seen {
    let mut times = Vec::new();
    let give_up = Instant::now() + 10 * LATE;
    while times.len() < changed.len() && Instant::now() < give_up {
        let lines = watcher.rest().into_iter();
        times.extend(lines.filter(|(_, l)| l.ends_with(end)).map(|(t, _)| t));
        std::thread::yield_now();
    }
    let late = times.iter().zip(changed);
    let late = late.map(|(seen, at)| seen.saturating_duration_since(*at));
    Seen {
        missed: changed.len().saturating_sub(times.len()),
        skipped: 0,
        latest: late.max().unwrap_or_default(),
    }
}

/// By the values that it shows: who shows a later one has noticed all before.
fn values(watcher: &Watcher, before: &str, changed: &[Instant]) -> Seen {
    let mut seen = vec![None; changed.len() + 1];
    let give_up = Instant::now() + 10 * LATE;
    while seen.last().is_none_or(Option::is_none) && Instant::now() < give_up {
        for (time, line) in watcher.rest() {
            let value = line.strip_prefix(before);
            let value = value.and_then(|v| v.parse::<usize>().ok());
            if let Some(first) = value.and_then(|v| seen.get_mut(v)) {
                first.get_or_insert(time);
            }
        }
        std::thread::yield_now();
    }
    let shown = seen.iter().skip(1).flatten().count();
    let mut next = None;
    for time in seen.iter_mut().rev() {
        next = time.or(next);
        *time = next;
    }
    let noticed: Vec<_> = seen.iter().skip(1).zip(changed).collect();
    let late = noticed
        .iter()
        .filter_map(|(seen, at)| Some(seen.as_ref()?.saturating_duration_since(**at)));
    let missed = noticed.iter().filter(|(seen, _)| seen.is_none()).count();
    Seen {
        missed,
        skipped: changed.len() - shown - missed,
        latest: late.max().unwrap_or_default(),
    }
}
