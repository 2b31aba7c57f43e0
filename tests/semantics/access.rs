//! Section 5: who may read what. The rules are tried by another user, for root may everything.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use super::common::ledger::Tree;
use super::{FLAGS, flag};

/// An id that no user of the host has.
const STRANGER: u32 = 54_321;
/// The group that may read the secrets.
const READERS: u32 = 54_322;

/// Whether a user in `group` can run `script` with `$1` for `path`.
fn can(group: u32, script: &str, path: &Path) -> bool {
    Command::new("setpriv")
        .args([
            format!("--reuid={STRANGER}"),
            format!("--regid={group}"),
            "--clear-groups".into(),
        ])
        .args(["sh", "-c", script, "sh"])
        .arg(path)
        .output()
        .unwrap()
        .status
        .success()
}

#[test]
fn the_kernel_enforces_the_access_rules() {
    let secrets =
        r#"CREATE TABLE secrets___keys ("name" VARCHAR(191), "value" TEXT, PRIMARY KEY("name"));"#;
    let tree = Tree::new(
        &[
            "--access",
            &format!("secrets/**=0440:root:{READERS}"),
            "--access",
            "*/limits=0400:0:0",
            "--access",
            ".ctlfs=0440:root:root",
        ],
        &[
            FLAGS,
            &flag("a", 1, "open"),
            secrets,
            "INSERT INTO secrets___keys VALUES('a', 'hidden')",
            r#"CREATE TABLE app___limits ("id" INTEGER, PRIMARY KEY("id"));"#,
            "INSERT INTO app___limits VALUES(1)",
        ],
    );
    // The stranger has to get to the mount point first.
    fs::set_permissions(tree.place.root(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = |path: &str| tree.path(path);
    // Warm caches must not let anybody in.
    assert_eq!(tree.read("secrets/keys/a/value"), b"hidden");
    for (group, place, readable) in [
        (STRANGER, "app/flags/a/note", true),
        (STRANGER, "secrets/keys/a/value", false),
        (READERS, "secrets/keys/a/value", true),
        (READERS, "secrets/keys/.schema.json", true),
        (STRANGER, "secrets/keys/a/row.json", false),
        (READERS, "app/limits/1/id", false),
        (STRANGER, ".ctlfs/status.json", false),
        (READERS, "app/flags/.seq", true),
    ] {
        assert_eq!(
            can(group, "cat -- \"$1\"", &path(place)),
            readable,
            "{group} {place}"
        );
    }
    assert!(!can(STRANGER, "ls \"$1\"", &path("secrets")));
    assert!(can(
        READERS,
        "ls \"$1\" && cd \"$1/keys/a\"",
        &path("secrets")
    ));
    assert!(!can(STRANGER, "cd \"$1\"", &path("app/limits")));
    assert!(can(STRANGER, "ls -la \"$1\"", &path("")));
    assert!(!can(
        READERS,
        "getfattr -d \"$1\" 2>&1 | grep seq",
        &path("app/limits/1/id")
    ));
    let modes = |place: &str| {
        let meta = fs::metadata(path(place)).unwrap();
        (meta.mode() & 0o7777, meta.uid(), meta.gid())
    };
    assert_eq!(modes("secrets"), (0o550, 0, READERS));
    assert_eq!(modes("secrets/keys/a/value"), (0o440, 0, READERS));
    assert_eq!(modes("app/limits/1"), (0o500, 0, 0));
    assert_eq!(modes("app/flags/a/note"), (0o444, 0, 0));
    assert_eq!(modes(""), (0o555, 0, 0));
    // A new version comes with the same rules.
    tree.apply(&["UPDATE secrets___keys SET value = 'still'"]);
    assert!(!can(
        STRANGER,
        "cat -- \"$1\"",
        &path("secrets/keys/a/value")
    ));
    assert!(can(
        READERS,
        "grep -qx still \"$1\"",
        &path("secrets/keys/a/value")
    ));
}

#[test]
fn the_ldb_is_private() {
    let tree = Tree::new(&[], &[FLAGS, &flag("a", 1, "x")]);
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!(mode(&tree.place.state()), 0o700);
    for entry in fs::read_dir(tree.place.state()).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    for file in ["ldb.db", "ldb.db-wal", "ldb.db-shm"] {
        assert!(tree.place.state().join(file).exists(), "{file}");
    }
}
