//! Which change raises which event.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{TryRecvError, channel};

use super::common::daemon::wait_until;
use super::common::ledger::{Tree, names};
use super::common::watcher::Watcher;
use super::{FLAGS, flag};

/// The events that change the tree; reading raises others.
const CHANGES: [&str; 2] = [
    "-e",
    "create,moved_to,moved_from,delete,delete_self,move_self,attrib,modify",
];

/// The tree with two flags, and `inotifywait -m -r` on a directory of it.
fn watched(directory: &str) -> (Tree, Watcher) {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x"), &flag("b", 1, "x")]);
    let watcher = watch(&tree, directory);
    (tree, watcher)
}

fn watch(tree: &Tree, directory: &str) -> Watcher {
    let args = [&["-r"][..], &CHANGES].concat();
    Watcher::inotifywait(&args, &[tree.path(directory)])
}

/// The events up to the table's `.seq`, with paths from the mount point.
#[track_caller]
fn events(tree: &Tree, watcher: &Watcher) -> Vec<String> {
    let root = format!("{}/", tree.daemon.mountpoint().display());
    let lines = watcher.until("/.seq");
    lines.iter().map(|line| line.replace(&root, "")).collect()
}

#[test]
fn a_changed_field_moves_in_and_the_others_stay() {
    let (tree, watcher) = watched("app/flags");
    let inode = |path: &str| fs::metadata(tree.path(path)).unwrap().ino();
    let (note, name) = (inode("app/flags/a/note"), inode("app/flags/a/name"));
    tree.apply(&[flag("a", 2, "x")]);
    assert_eq!(
        events(&tree, &watcher),
        [
            "MOVED_TO app/flags/a/enabled",
            "MOVED_TO app/flags/a/row.json"
        ]
    );
    assert_eq!(inode("app/flags/a/note"), note);
    assert_eq!(inode("app/flags/a/name"), name);
    assert_eq!(tree.text("app/flags/a/enabled"), "2");
    // A value that goes is a file that goes, and comes back by moving in.
    tree.apply(&[r#"UPDATE app___flags SET "note" = NULL WHERE "name" = 'a'"#]);
    assert_eq!(
        events(&tree, &watcher),
        ["DELETE app/flags/a/note", "MOVED_TO app/flags/a/row.json"]
    );
    assert!(!tree.path("app/flags/a/note").exists());
    tree.apply(&[flag("a", 2, "back")]);
    assert_eq!(
        events(&tree, &watcher),
        ["MOVED_TO app/flags/a/note", "MOVED_TO app/flags/a/row.json"]
    );
    assert_eq!(tree.text("app/flags/a/note"), "back");
    // An entry without an effect raises nothing: the next event is the next change's.
    tree.apply(&[flag("a", 2, "back")]);
    tree.apply(&[flag("b", 2, "x")]);
    assert_eq!(
        events(&tree, &watcher),
        [
            "MOVED_TO app/flags/b/enabled",
            "MOVED_TO app/flags/b/row.json"
        ]
    );
}

#[test]
fn rows_are_created_and_deleted_fields_first() {
    let (tree, watcher) = watched("app/flags");
    tree.apply(&[flag("c", 1, "new")]);
    assert_eq!(events(&tree, &watcher), ["CREATE,ISDIR app/flags/c"]);
    let row = Watcher::inotifywait(&CHANGES, &[tree.path("app/flags/c")]);
    tree.apply(&[r#"DELETE FROM app___flags WHERE "name" = 'c'"#]);
    let c = tree.path("app/flags/c");
    let expected: Vec<String> = ["name", "enabled", "note", "row.json"]
        .iter()
        .map(|file| format!("DELETE {}/{file}", c.display()))
        .collect();
    assert_eq!(
        row.until(&format!("DELETE_SELF {}/", c.display())),
        expected
    );
    watcher.wait_for(&format!("DELETE,ISDIR {}", c.display()));
    assert!(!c.exists());
}

#[test]
fn a_watched_file_hears_that_it_was_replaced() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x")]);
    let file = tree.path("app/flags/a/enabled");
    let watcher = Watcher::inotifywait(&CHANGES, &[&file]);
    let open = fs::File::open(&file).unwrap();
    tree.apply(&[flag("a", 2, "x")]);
    assert_eq!(watcher.next().1, format!("ATTRIB {}", file.display()));
    drop(open);
    assert_eq!(watcher.next().1, format!("DELETE_SELF {}", file.display()));
    // Who watches the new file at any moment hears of the next change.
    for value in 3..50 {
        let watcher = Watcher::inotifywait(&CHANGES, &[&file]);
        tree.apply(&[flag("a", value, "x")]);
        watcher.wait_for(&format!("DELETE_SELF {}", file.display()));
    }
}

#[test]
fn families_and_tables_come_and_go() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x")]);
    let watcher = Watcher::inotifywait(&CHANGES, &[tree.path(""), tree.path("app")]);
    let limits = r#"CREATE TABLE app___limits ("id" INTEGER, PRIMARY KEY("id"));"#;
    let net = r#"CREATE TABLE net___routes ("id" INTEGER, PRIMARY KEY("id"));"#;
    tree.apply(&[limits]);
    let next = |event: &str, path: &str| {
        let expected = format!("{event},ISDIR {}", tree.path(path).display());
        assert_eq!(watcher.next().1, expected);
    };
    next("CREATE", "app/limits");
    tree.apply(&[net]);
    next("CREATE", "net");
    tree.apply(&["DROP TABLE IF EXISTS net___routes"]);
    next("DELETE", "net");
    tree.apply(&["DROP TABLE IF EXISTS app___limits"]);
    next("DELETE", "app/limits");
}

#[test]
fn families_of_exports_come_and_go() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x")]);
    let directories = [".ctlfs/export", ".ctlfs/export/app", ".ctlfs/changes"];
    let watcher = Watcher::inotifywait(&CHANGES, &directories.map(|d| tree.path(d)));
    tree.apply(&[r#"CREATE TABLE net___routes ("id" INTEGER, PRIMARY KEY("id"));"#]);
    for collection in ["export", "changes"] {
        let path = tree.path(format!(".ctlfs/{collection}/net"));
        assert_eq!(watcher.next().1, format!("CREATE,ISDIR {}", path.display()));
    }
    tree.read(".ctlfs/export/app/flags.csv");
    tree.apply(&["DROP TABLE IF EXISTS app___flags"]);
    watcher.wait_for(&format!(
        "DELETE {}",
        tree.path(".ctlfs/export/app/flags.csv").display()
    ));
    watcher.wait_for(&format!(
        "DELETE,ISDIR {}",
        tree.path(".ctlfs/export/app").display()
    ));
    assert!(!tree.path(".ctlfs/export/app").exists());
    assert_eq!(tree.daemon.status()["announce"]["failed"], 0);
}

#[test]
fn a_field_that_goes_is_told_by_its_name() {
    let create = r#"CREATE TABLE app___flags ("name" VARCHAR(191), "enabled" INTEGER, "note" TEXT, "owner" TEXT, PRIMARY KEY("name"));"#;
    let row = r#"REPLACE INTO app___flags ("name","enabled","note","owner") VALUES('a',1,'n','o')"#;
    let tree = Tree::new(&[], &[create, row]);
    let watcher = watch(&tree, "app/flags");
    let held = ["note", "owner"].map(|f| fs::File::open(tree.path("app/flags/a").join(f)));
    tree.apply(&[r#"ALTER TABLE app___flags DROP COLUMN "note""#]);
    let seen = events(&tree, &watcher);
    drop(held);
    let of_row: Vec<_> = seen.iter().filter(|l| l.contains("flags/a/")).collect();
    assert!(
        of_row.contains(&&"DELETE app/flags/a/note".to_owned()),
        "{of_row:?}"
    );
    assert!(
        of_row.contains(&&"MOVED_TO app/flags/a/owner".to_owned()),
        "{of_row:?}"
    );
    let wrong = ["DELETE app/flags/a/owner", "MOVED_TO app/flags/a/note"];
    assert!(of_row.iter().all(|l| !wrong.contains(&l.as_str())));
    assert_eq!(tree.text("app/flags/a/owner"), "o");
    assert!(!tree.path("app/flags/a/note").exists());
}

#[test]
fn a_table_that_changes_its_shape_says_so() {
    let (tree, watcher) = watched("app/flags");
    let open = fs::File::open(tree.path("app/flags/a/enabled")).unwrap();
    tree.apply(&[r#"ALTER TABLE app___flags ADD COLUMN "owner" TEXT"#]);
    let seen = events(&tree, &watcher);
    drop(open);
    // Of the rows, those files that the kernel still has: this one is open.
    for entry in [".schema.json", "a/enabled"] {
        let moved = format!("MOVED_TO app/flags/{entry}");
        assert!(seen.contains(&moved), "{moved}: {seen:?}");
    }
    let moved = |line: &String| line.starts_with("MOVED_TO ");
    assert!(seen.iter().all(moved), "{seen:?}");
    tree.apply(&["DROP TABLE IF EXISTS app___flags"]);
    let gone = format!("DELETE_SELF {}/", tree.path("app/flags").display());
    watcher.wait_for(&gone);
}

#[test]
fn directories_of_composite_keys_come_and_go() {
    let routes = r#"CREATE TABLE net___routes ("region" VARCHAR(191), "id" INTEGER, "target" TEXT, PRIMARY KEY("region","id"));"#;
    let route = |region: &str, id: u32| {
        format!(
            "REPLACE INTO net___routes (\"region\",\"id\",\"target\") VALUES('{region}',{id},'t')"
        )
    };
    let tree = Tree::new(&[], &[routes, &route("eu", 1)]);
    let watcher = Watcher::inotifywait(
        &CHANGES,
        &[tree.path("net/routes"), tree.path("net/routes/eu")],
    );
    tree.apply(&[route("us", 1)]);
    assert_eq!(events(&tree, &watcher), ["CREATE,ISDIR net/routes/us"]);
    tree.apply(&[route("eu", 2)]);
    assert_eq!(events(&tree, &watcher), ["CREATE,ISDIR net/routes/eu/2"]);
    tree.apply(&["DELETE FROM net___routes WHERE \"region\" = 'eu'"]);
    let mut seen = events(&tree, &watcher);
    seen.retain(|line| !line.starts_with("DELETE_SELF"));
    seen.sort();
    assert_eq!(
        seen,
        [
            "DELETE,ISDIR net/routes/eu",
            "DELETE,ISDIR net/routes/eu/1",
            "DELETE,ISDIR net/routes/eu/2"
        ]
    );
}

#[test]
fn more_than_a_thousand_changes_move_in_the_seq_only() {
    let (tree, watcher) = watched("app/flags");
    let rows = |count: usize, value: i64| -> Vec<String> {
        (0..count)
            .map(|i| flag(&format!("a{i}"), value, "y"))
            .collect()
    };
    let seq = tree.ledger.transaction(&rows(1001, 1));
    tree.wait_shown(seq);
    assert_eq!(events(&tree, &watcher), [] as [&str; 0]);
    let seq = tree.ledger.transaction(&[flag("a", 5, "x")]);
    tree.wait_shown(seq);
    assert_eq!(events(&tree, &watcher).len(), 2);
}

#[test]
fn what_nobody_can_watch_costs_nothing() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x")]);
    // The root is known to everybody, and the family came after the mount.
    let before = tree.daemon.status()["announce"]["entries"]
        .as_u64()
        .unwrap();
    let announced = |entries: u64| {
        let what = format!("{entries} entries are announced");
        tree.daemon.wait_status(&what, |status| {
            let now = status["announce"]["entries"].as_u64().unwrap() - before;
            assert!(now <= entries, "{now}");
            now == entries
        });
    };
    assert_eq!(tree.daemon.status()["announce"]["on"], true);
    tree.apply(&[flag("a", 2, "x")]);
    tree.apply(&[flag("b", 2, "x")]);
    announced(0);
    tree.daemon
        .wait_status("that is over", |s| s["behind"] == 0);
    // Whoever knows the table can watch it.
    assert!(tree.path("app/flags").exists());
    tree.apply(&[flag("a", 3, "x")]);
    announced(1);
    assert_eq!(tree.text("app/flags/a/enabled"), "3");
    tree.apply(&[flag("a", 4, "x")]);
    announced(4);
}

#[test]
fn announcements_can_be_turned_off() {
    for options in [["--announce", "off"], ["-o", "ro"]] {
        let tree = Tree::new(&options, &[FLAGS, &flag("a", 1, "x")]);
        assert_eq!(tree.daemon.status()["announce"]["on"], false);
        let elsewhere = tree.place.root().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        let paths = [
            tree.path("app/flags/a"),
            tree.path("app/flags"),
            elsewhere.clone(),
        ];
        let watcher = Watcher::inotifywait(&CHANGES, &paths);
        tree.apply(&[flag("a", 2, "x")]);
        wait_until("the change is there", || {
            tree.text("app/flags/a/enabled") == "2"
        });
        fs::write(elsewhere.join("end"), b"").unwrap();
        assert_eq!(watcher.until("elsewhere/end"), [] as [&str; 0]);
    }
}

#[test]
fn nobody_else_sees_what_the_announcing_thread_sees() {
    let (tree, watcher) = watched("app");
    let root = tree.daemon.mountpoint();
    let listed = |directory: &str| names(root.join(directory));
    let (table, row) = (listed("app/flags"), listed("app/flags/a"));
    let look = |last: u64| {
        let text = fs::read_to_string(root.join("app/flags/a/enabled")).unwrap();
        let value = text.parse().unwrap();
        assert!(value >= last, "{value} after {last}");
        assert_eq!(listed(""), [".ctlfs", "app"]);
        assert_eq!(listed("app/flags/a"), row);
        let mut others = listed("app/flags");
        others.retain(|name| name != "c");
        assert_eq!(others, table);
        value
    };
    std::thread::scope(|scope| {
        // Ends the reader, however this ends.
        let (_end, ended) = channel::<()>();
        scope.spawn(move || {
            let mut last = 1;
            while ended.try_recv() == Err(TryRecvError::Empty) {
                last = look(last);
            }
        });
        for n in 2..400 {
            tree.apply(&[flag("a", n, "x")]);
            // Shown before it is announced, and gone likewise.
            tree.apply(&[flag("c", n, "x")]);
            assert_eq!(tree.text("app/flags/c/enabled"), n.to_string());
            tree.apply(&[r#"DELETE FROM app___flags WHERE "name" = 'c'"#]);
            assert!(!tree.path("app/flags/c").exists());
        }
    });
    // All that time there was something to be announced.
    assert!(watcher.rest().len() > 1_000);
    assert_eq!(tree.daemon.status()["announce"]["failed"], 0);
    let error = fs::rename(
        tree.path("app/flags/a/enabled"),
        tree.path("app/flags/a/note"),
    );
    assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::EROFS));
}
