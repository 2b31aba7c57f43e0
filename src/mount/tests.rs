//! The flip without a kernel: each race of lookups, reads and commits, step by step.

use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use super::observer::{Flipper, Kernel};
use super::pins::PinLimits;
use super::server::{Attributes, Fault, Lookup, Server, ServerSettings};
use super::state::{LONG, Lifetimes, ROOT};
use crate::ldb::LdbWriter;
use crate::ledger::Entry;
use crate::model::{ChangeSet, LedgerTime, Seq};
use crate::reflector::CommitObserver;
use crate::tree::access::AccessRules;

/// Notes what it is asked, and runs a hook at the first notification.
struct Recorder {
    notes: Sender<String>,
    hook: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Kernel for Recorder {
    fn invalidate_entry(&self, parent: u64, name: &[u8]) -> io::Result<()> {
        if let Some(hook) = self.hook.lock().unwrap().take() {
            hook();
        }
        self.notes
            .send(format!("{parent}/{}", String::from_utf8_lossy(name)))
            .unwrap();
        Ok(())
    }

    fn invalidate_attributes(&self, ino: u64) -> io::Result<()> {
        self.notes.send(format!("attributes of {ino}")).unwrap();
        Ok(())
    }
}

struct World {
    _directory: tempfile::TempDir,
    writer: LdbWriter,
    server: Arc<Server>,
    seq: u64,
    notes: Receiver<String>,
    sender: Sender<String>,
}

impl World {
    fn new(statements: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ldb.db");
        let mut writer = LdbWriter::open(&path).unwrap();
        let mut seq = 0;
        apply(&mut writer, &mut seq, statements, &mut ());
        let server = Arc::new(serve(&path));
        let (sender, notes) = channel();
        World {
            _directory: directory,
            writer,
            server,
            seq,
            notes,
            sender,
        }
    }

    /// Commits, with `hook` run just before the first invalidation.
    fn commit_with(&mut self, statements: &[&str], hook: impl FnOnce() + Send + 'static) {
        let recorder = Recorder {
            notes: self.sender.clone(),
            hook: Mutex::new(Some(Box::new(hook))),
        };
        let mut flipper = Flipper::new(Arc::clone(&self.server), recorder, Arc::default());
        apply(&mut self.writer, &mut self.seq, statements, &mut flipper);
    }

    fn commit(&mut self, statements: &[&str]) -> Vec<String> {
        self.commit_with(statements, || {});
        self.notes.try_iter().collect()
    }

    fn walk(&self, path: &str) -> Result<(Attributes, Duration), Duration> {
        walk(&self.server, path)
    }

    fn read(&self, ino: u64) -> String {
        String::from_utf8(self.server.read_file(ino, 0, 4096).unwrap()).unwrap()
    }
}

fn serve(ldb: &Path) -> Server {
    let settings = ServerSettings {
        ldb: ldb.to_owned(),
        lifetimes: Lifetimes::UntilNotified,
        spill: None,
        access: AccessRules::open(0, 0),
        newline: false,
        export_max_size: 1 << 20,
        pin_limits: PinLimits {
            max_age: Duration::from_secs(600),
            max_space: 1 << 30,
        },
        started: SystemTime::now(),
    };
    Server::new(settings, Box::new(|_| Vec::new()), Arc::default()).unwrap()
}

fn apply(
    writer: &mut LdbWriter,
    seq: &mut u64,
    statements: &[&str],
    observer: &mut dyn CommitObserver,
) {
    let changes = prepare(writer, seq, statements, observer, true);
    observer.after_commit(&changes);
}

/// One SQLite transaction with these statements; rolled back behind `before_commit` unless
/// `commit`.
fn prepare(
    writer: &mut LdbWriter,
    seq: &mut u64,
    statements: &[&str],
    observer: &mut dyn CommitObserver,
    commit: bool,
) -> ChangeSet {
    let mut batch = writer.begin().unwrap();
    for statement in statements {
        *seq += 1;
        let entry = Entry {
            seq: Seq::new(*seq),
            time: LedgerTime::from_micros(1_000_000),
            statement: (*statement).to_owned(),
        };
        batch.apply(&entry).unwrap();
    }
    let changes = batch.finish().unwrap().unwrap();
    observer.before_commit(&changes);
    if commit {
        batch.commit().unwrap();
    }
    changes
}

/// Looks a path up name by name: the last entry and its lifetime, or for how long it is absent.
fn walk(server: &Server, path: &str) -> Result<(Attributes, Duration), Duration> {
    let mut at = ROOT;
    let mut last = None;
    for name in path.split('/') {
        match server.lookup(at, name.as_bytes()) {
            Ok(Lookup::Found {
                attributes,
                entry_ttl,
                ..
            }) => {
                at = attributes.ino;
                last = Some((attributes, entry_ttl));
            }
            Ok(Lookup::Absent(ttl)) => return Err(ttl),
            Err(Fault::NotFound) => return Err(Duration::ZERO),
            Err(fault) => panic!("{path}: {fault}"),
        }
    }
    Ok(last.unwrap())
}

const TABLE: &str = r#"CREATE TABLE app___flags ("name" VARCHAR(191), "on" INTEGER, "note" TEXT, PRIMARY KEY("name"));"#;
const ROW: &str = r#"REPLACE INTO app___flags ("name","on","note") VALUES('a',1,'old')"#;
const NEXT: &str = r#"REPLACE INTO app___flags ("name","on","note") VALUES('a',1,'newer')"#;

#[test]
fn a_changed_field_gets_a_new_inode_and_the_old_one_keeps_its_bytes() {
    let mut world = World::new(&[TABLE, ROW]);
    let (note, ttl) = world.walk("app/flags/a/note").unwrap();
    let (on, _) = world.walk("app/flags/a/on").unwrap();
    assert_eq!(ttl, LONG);
    let notes = world.commit(&[NEXT]);
    assert!(notes.iter().any(|n| n.ends_with("/note")), "{notes:?}");
    assert!(
        !notes.iter().any(|n| n.ends_with("/on")),
        "an unchanged field was invalidated"
    );
    let (new, ttl) = world.walk("app/flags/a/note").unwrap();
    assert_ne!(new.ino, note.ino);
    assert_eq!((new.size, ttl), (5, LONG));
    assert_eq!(world.read(note.ino), "old");
    assert_eq!(world.read(new.ino), "newer");
    assert_eq!(world.server.getattr(note.ino).unwrap().0.links, 0);
    assert_eq!(world.walk("app/flags/a/on").unwrap().0.ino, on.ino);
}

#[test]
fn a_lookup_during_a_transition_is_answered_old_and_not_cached() {
    let mut world = World::new(&[TABLE, ROW]);
    // The first thing to be invalidated; the hook looks around then.
    world.walk("app/flags/.seq").unwrap();
    let (sender, receiver) = channel();
    let server = Arc::clone(&world.server);
    // The note was never looked up before: nothing of it was collected.
    world.commit_with(&[NEXT], move || {
        sender
            .send(walk(&server, "app/flags/a/note").unwrap())
            .unwrap();
    });
    let (old, ttl) = receiver.try_recv().unwrap();
    assert_eq!(ttl, Duration::ZERO);
    assert_eq!(old.size, 3);
    assert_eq!(world.read(old.ino), "old");
    let (new, _) = world.walk("app/flags/a/note").unwrap();
    assert_ne!(new.ino, old.ino);
    assert_eq!(world.read(new.ino), "newer");
}

#[test]
fn whoever_sees_the_commit_first_completes_the_flip() {
    let mut world = World::new(&[TABLE, ROW]);
    let (old, _) = world.walk("app/flags/a/note").unwrap();
    let recorder = Recorder {
        notes: world.sender.clone(),
        hook: Mutex::new(None),
    };
    let mut flipper = Flipper::new(Arc::clone(&world.server), recorder, Arc::default());
    let changes = prepare(
        &mut world.writer,
        &mut world.seq,
        &[NEXT],
        &mut flipper,
        true,
    );
    // Committed, but the reflector has not said so yet: a reader meets the new snapshot.
    world.server.state().rows().clear();
    let (new, ttl) = world.walk("app/flags/a/note").unwrap();
    assert_ne!(new.ino, old.ino);
    assert_eq!(ttl, LONG);
    assert_eq!(world.read(new.ino), "newer");
    assert_eq!(world.read(old.ino), "old");
    flipper.after_commit(&changes);
    assert_eq!(world.walk("app/flags/a/note").unwrap().0.ino, new.ino);
}

#[test]
fn whoever_lists_the_commit_completes_the_flip() {
    let mut world = World::new(&[TABLE, ROW]);
    let (table, _) = world.walk("app/flags").unwrap();
    let (row, _) = world.walk("app/flags/a").unwrap();
    // From then on the row is in the cache of rows.
    let (old, _) = world.walk("app/flags/a/note").unwrap();
    let recorder = Recorder {
        notes: world.sender.clone(),
        hook: Mutex::new(None),
    };
    let mut flipper = Flipper::new(Arc::clone(&world.server), recorder, Arc::default());
    let added = r#"REPLACE INTO app___flags ("name","on","note") VALUES('b',1,'new')"#;
    let changes = prepare(
        &mut world.writer,
        &mut world.seq,
        &[NEXT, added],
        &mut flipper,
        true,
    );
    let handle = world.server.open_directory(table.ino).unwrap();
    let mut names = Vec::new();
    let mut add = |_, _, _, name: &[u8]| {
        names.push(String::from_utf8(name.to_vec()).unwrap());
        true
    };
    world.server.list(handle, 0, &mut add).unwrap();
    assert!(names.contains(&"b".to_owned()), "{names:?}");
    // The kernel knows the way there, and asks for the last name only.
    let Ok(Lookup::Found { attributes, .. }) = world.server.lookup(row.ino, b"note") else {
        panic!("the note is there");
    };
    assert_ne!(attributes.ino, old.ino);
    assert_eq!(world.read(attributes.ino), "newer");
    flipper.after_commit(&changes);
}

#[test]
fn a_commit_that_fails_leaves_everything_as_it_was() {
    let mut world = World::new(&[TABLE, ROW]);
    let (old, _) = world.walk("app/flags/a/note").unwrap();
    let recorder = Recorder {
        notes: world.sender.clone(),
        hook: Mutex::new(None),
    };
    let mut flipper = Flipper::new(Arc::clone(&world.server), recorder, Arc::default());
    let changes = prepare(
        &mut world.writer,
        &mut world.seq,
        &[NEXT],
        &mut flipper,
        false,
    );
    assert_eq!(world.walk("app/flags/a/note").unwrap().1, Duration::ZERO);
    flipper.commit_failed(&changes);
    let (again, ttl) = world.walk("app/flags/a/note").unwrap();
    assert_eq!((again.ino, ttl), (old.ino, LONG));
    assert_eq!(world.read(again.ino), "old");
    assert_eq!(world.server.getattr(again.ino).unwrap().0.links, 1);
    assert_eq!(world.server.counters().kept_bytes, 0);
}

#[test]
fn an_absent_name_is_invalidated_when_it_comes() {
    let mut world = World::new(&[TABLE]);
    assert!(world.walk("app/flags/a").unwrap_err() > Duration::ZERO);
    assert!(world.walk("net/hosts").unwrap_err() > Duration::ZERO);
    let notes = world.commit(&[ROW]);
    assert!(notes.iter().any(|n| n.ends_with("/a")), "{notes:?}");
    assert!(world.walk("app/flags/a/row.json").is_ok());
    let notes = world.commit(&[&TABLE.replace("app___flags", "net___hosts")]);
    assert!(notes.contains(&format!("{ROOT}/net")), "{notes:?}");
    assert!(world.walk("net/hosts/.schema.json").is_ok());
}

#[test]
fn a_deleted_row_goes_with_its_files_and_comes_back_as_another() {
    let mut world = World::new(&[TABLE, ROW]);
    let (row, _) = world.walk("app/flags/a").unwrap();
    let (note, _) = world.walk("app/flags/a/note").unwrap();
    let notes = world.commit(&[r#"DELETE FROM app___flags WHERE "name" = 'a'"#]);
    assert!(notes.contains(&format!("{}/note", row.ino)), "{notes:?}");
    assert!(world.walk("app/flags/a").is_err());
    // Whoever stands in the directory finds nothing, for good.
    assert!(matches!(
        world.server.lookup(row.ino, b"note"),
        Err(Fault::NotFound)
    ));
    assert_eq!(world.read(note.ino), "old");
    world.commit(&[ROW]);
    assert_ne!(world.walk("app/flags/a").unwrap().0.ino, row.ino);
    assert!(matches!(
        world.server.lookup(row.ino, b"note"),
        Err(Fault::NotFound)
    ));
}

#[test]
fn the_files_of_a_table_of_another_shape_are_others() {
    let mut world = World::new(&[TABLE, ROW]);
    let (json, _) = world.walk("app/flags/a/row.json").unwrap();
    world.commit(&[
        "DROP TABLE IF EXISTS app___flags",
        r#"CREATE TABLE app___flags ("name" VARCHAR(191), "off" TEXT, PRIMARY KEY("name"));"#,
        r#"REPLACE INTO app___flags ("name","off") VALUES('a','x')"#,
    ]);
    assert!(world.walk("app/flags/a/on").is_err());
    let (new, _) = world.walk("app/flags/a/row.json").unwrap();
    assert_eq!(world.read(new.ino), "{\"name\":\"a\",\"off\":\"x\"}\n");
    assert_eq!(
        world.read(json.ino),
        "{\"name\":\"a\",\"on\":1,\"note\":\"old\"}\n"
    );
}

#[test]
fn what_the_kernel_forgets_is_forgotten() {
    let mut world = World::new(&[TABLE, ROW]);
    let (note, _) = world.walk("app/flags/a/note").unwrap();
    world.commit(&[NEXT]);
    assert_eq!(world.server.counters().kept_bytes, 3);
    world.server.forget(note.ino, 1);
    assert_eq!(world.server.counters().kept_bytes, 0);
    assert!(matches!(
        world.server.read_file(note.ino, 0, 10),
        Err(Fault::Stale)
    ));
    let nodes = world.server.counters().nodes;
    let (new, _) = world.walk("app/flags/a/note").unwrap();
    assert_eq!(world.server.counters().nodes, nodes + 1);
    world.server.forget(new.ino, 1);
    assert_eq!(world.server.counters().nodes, nodes);
}

#[test]
fn a_long_name_that_is_about_to_come_is_not_remembered_as_absent() {
    let mut world = World::new(&[TABLE, ROW]);
    world.walk("app/flags/.seq").unwrap();
    let key = "é".repeat(191);
    let name = crate::tree::name::encode(
        crate::model::FieldType::String,
        &crate::model::Value::text(key.clone()),
    )
    .unwrap();
    let path = format!("app/flags/{}", String::from_utf8(name).unwrap());
    let (sender, receiver) = channel();
    let server = Arc::clone(&world.server);
    let during = path.clone();
    let insert =
        format!("REPLACE INTO app___flags (\"name\",\"on\",\"note\") VALUES('{key}',1,'x')");
    world.commit_with(&[&insert], move || {
        sender.send(walk(&server, &during).unwrap_err()).unwrap();
    });
    assert_eq!(receiver.try_recv().unwrap(), Duration::ZERO);
    assert!(world.walk(&path).is_ok());
}

#[test]
fn a_directory_that_is_gone_lists_nothing() {
    let mut world = World::new(&[
        r#"CREATE TABLE app___routes ("a" INTEGER, "b" INTEGER, PRIMARY KEY("a","b"));"#,
        r#"REPLACE INTO app___routes ("a","b") VALUES(1,2)"#,
    ]);
    let (dir, _) = world.walk("app/routes/1").unwrap();
    let handle = world.server.open_directory(dir.ino).unwrap();
    world.commit(&[r#"DELETE FROM app___routes WHERE "a" = 1 AND "b" = 2"#]);
    world.commit(&[r#"REPLACE INTO app___routes ("a","b") VALUES(1,3)"#]);
    let mut names = Vec::new();
    let mut add = |_, _, _, name: &[u8]| {
        names.push(String::from_utf8(name.to_vec()).unwrap());
        true
    };
    world.server.list(handle, 0, &mut add).unwrap();
    assert_eq!(names, [".", ".."]);
}

#[test]
fn a_version_that_is_kept_still_tells_its_sequence() {
    let mut world = World::new(&[TABLE, ROW]);
    let (note, _) = world.walk("app/flags/a/note").unwrap();
    let before = world.server.xattr(note.ino, b"user.ctlfs.seq").unwrap();
    world.commit(&[NEXT]);
    assert_eq!(
        world.server.xattr(note.ino, b"user.ctlfs.seq").unwrap(),
        before
    );
}

#[test]
fn a_watched_file_moves_on_though_its_directory_was_forgotten() {
    let mut world = World::new(&[TABLE, ROW]);
    let (before, _) = world.walk("app/flags/a/note").unwrap();
    let (directory, _) = world.walk("app/flags/a").unwrap();
    // Both walks looked the directory up. A watch on the file keeps the file only.
    world.server.forget(directory.ino, 2);
    world.commit(&[NEXT]);
    let (after, _) = world.walk("app/flags/a/note").unwrap();
    assert_ne!(before.ino, after.ino);
    assert_eq!(world.read(before.ino), "old");
    assert_eq!(world.read(after.ino), "newer");
}
