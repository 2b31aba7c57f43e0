//! What is to be watched: paths in a mounted tree, taken apart, and whether a change touches them.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crate::cli::Error;
use crate::daemon::{self, Mount};
use crate::model::{FamilyName, TableName};
use crate::tree::node::{CONTROL_DIR, ROW_JSON, SCHEMA_JSON, TABLE_SEQ};

use super::delivery::Change;

/// One path of the command line, below the mount point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// Everything.
    All,
    /// A family.
    Family(String),
    /// A table, or something in it.
    Table(String, String, Below),
}

/// What of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Below {
    /// All of it.
    All,
    /// Its shape.
    Schema,
    /// A row, a directory above rows, or a file of a row.
    Path(Vec<u8>),
}

/// The mount that all of `paths` are in, and what they name there. A path need not exist.
pub(super) fn parse(paths: &[PathBuf]) -> Result<(PathBuf, Vec<Target>), Error> {
    let mounts = daemon::mounts().map_err(|error| {
        Error::failed(format!("cannot find out what is mounted where: {error}"))
    })?;
    let mut found: Option<PathBuf> = None;
    let mut targets = Vec::with_capacity(paths.len());
    for path in paths {
        let (mount, below) = locate(&mounts, path).ok_or_else(|| {
            Error::usage(format!(
                "cannot watch {}: it is in no ctlfs mount; mount one with 'ctlfs mount'",
                path.display()
            ))
        })?;
        match &found {
            Some(other) if *other != mount => {
                return Err(Error::usage(format!(
                    "cannot watch {} and {} together: they are different mounts; run one \
                     'ctlfs watch' for each",
                    other.display(),
                    mount.display()
                )));
            }
            _ => found = Some(mount),
        }
        targets.push(
            Target::new(&below)
                .map_err(|why| Error::usage(format!("cannot watch {}: {why}", path.display())))?,
        );
    }
    let mount = found.ok_or_else(|| Error::usage("give at least one PATH to watch"))?;
    Ok((mount, targets))
}

/// The ctlfs mount that `path` is in, and the path from there.
fn locate(mounts: &[Mount], path: &Path) -> Option<(PathBuf, PathBuf)> {
    let absolute = std::path::absolute(path).ok()?;
    let split = |path: &Path| {
        let on_top = |target: &Path| mounts.iter().rfind(|m| m.target == target);
        let target = path.ancestors().find_map(on_top)?;
        let below = path.strip_prefix(&target.target).ok()?;
        target
            .is_ctlfs()
            .then(|| (target.target.clone(), below.to_owned()))
    };
    let straight = absolute.components().all(|c| c != Component::ParentDir);
    // Without a look at the file system first: the mount may be dead.
    if let Some(found) = straight.then(|| split(&absolute)).flatten() {
        return Some(found);
    }
    // Then through links, as far as the path exists.
    absolute.ancestors().find_map(|ancestor| {
        let real = daemon::resolve(ancestor).ok()?;
        let rest = absolute.strip_prefix(ancestor).ok()?;
        split(&real.join(rest))
    })
}

impl Target {
    fn new(below: &Path) -> Result<Self, String> {
        let mut parts = Vec::new();
        for component in below.components() {
            match component {
                Component::Normal(part) => parts.push(part.as_bytes()),
                Component::CurDir => {}
                _ => return Err("write it without '..'".into()),
            }
        }
        let [family, rest @ ..] = &*parts else {
            return Ok(Target::All);
        };
        if *family == CONTROL_DIR.as_bytes() {
            return Err(format!(
                "{CONTROL_DIR} is the daemon's own and holds no config"
            ));
        }
        let family = text(family).filter(|f| valid::<FamilyName>(f, FamilyName::as_str));
        let family = family.ok_or("no family can have that name")?.to_owned();
        let [table, rest @ ..] = rest else {
            return Ok(Target::Family(family));
        };
        let table = text(table).filter(|t| valid::<TableName>(t, TableName::as_str));
        let table = table.ok_or("no table can have that name")?.to_owned();
        let below = match rest {
            [] => Below::All,
            [only] if *only == TABLE_SEQ.as_bytes() => Below::All,
            [only] if *only == SCHEMA_JSON.as_bytes() => Below::Schema,
            [first, ..] if first.starts_with(b".") => {
                return Err("no row can have that name".into());
            }
            path => Below::Path(path.join(&b'/')),
        };
        Ok(Target::Table(family, table, below))
    }

    /// Whether it can have to do with a table.
    pub(super) fn covers(&self, family: &str, table: &str) -> bool {
        match self {
            Target::All => true,
            Target::Family(f) => f == family,
            Target::Table(f, t, _) => f == family && t == table,
        }
    }

    /// What of a table that it covers.
    pub(super) fn below(&self) -> &Below {
        match self {
            Target::All | Target::Family(_) => &Below::All,
            Target::Table(_, _, below) => below,
        }
    }
}

impl Below {
    /// Whether the change of a row touches it.
    pub(super) fn touched_by(&self, change: &Change) -> bool {
        let wanted = match self {
            Below::All => return true,
            Below::Schema => return false,
            Below::Path(wanted) => &**wanted,
        };
        let Some(row) = &change.path else {
            return false;
        };
        if wanted == &**row || is_below(row, wanted).is_some() {
            return true;
        }
        is_below(wanted, row).is_some_and(|file| {
            file == ROW_JSON.as_bytes() || text(file).is_some_and(|field| change.touches(field))
        })
    }
}

/// What follows the directory in the path of something in it.
fn is_below<'a>(path: &'a [u8], directory: &[u8]) -> Option<&'a [u8]> {
    path.strip_prefix(directory)?.strip_prefix(b"/")
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// Whether a name is one, in the spelling that the tree has.
fn valid<T: std::str::FromStr>(text: &str, spelling: impl Fn(&T) -> &str) -> bool {
    text.parse::<T>().is_ok_and(|name| spelling(&name) == text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn target(path: &str) -> Target {
        Target::new(Path::new(path)).unwrap()
    }

    #[test]
    fn paths_name_what_the_tree_has() {
        assert_eq!(target(""), Target::All);
        assert_eq!(target("app"), Target::Family("app".into()));
        let table = |below| Target::Table("app".into(), "flags".into(), below);
        assert_eq!(target("app/flags/"), table(Below::All));
        assert_eq!(target("app/flags/.seq"), table(Below::All));
        assert_eq!(target("app/flags/.schema.json"), table(Below::Schema));
        assert_eq!(
            target("app/./flags/eu/x"),
            table(Below::Path(b"eu/x".to_vec()))
        );
        for bad in [
            ".ctlfs/seq",
            "App",
            "a",
            "app/t",
            "app/../x",
            "app/flags/.x",
        ] {
            assert!(Target::new(Path::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_change_touches_its_row_what_is_above_and_the_files_that_changed() {
        let change = |json| Change::new(json).unwrap();
        let updated = change(json!({"path":"eu/7","key":["eu",7],"kind":"updated",
                                    "old":{"note":"a"},"new":{"note":null}}));
        let created = change(json!({"path":"eu/7","key":["eu",7],"kind":"created",
                                    "new":{"part":"eu","n":7,"note":null}}));
        let touched =
            |path: &str, change: &Change| Below::Path(path.as_bytes().to_vec()).touched_by(change);
        for (path, by_update, by_creation) in [
            ("eu", true, true),
            ("eu/7", true, true),
            ("eu/7/row.json", true, true),
            ("eu/7/note", true, false),
            ("eu/7/n", false, true),
            ("eu/7/other", false, false),
            ("eu/70", false, false),
            ("e", false, false),
            ("eu/8", false, false),
        ] {
            assert_eq!(touched(path, &updated), by_update, "{path}");
            assert_eq!(touched(path, &created), by_creation, "{path}");
        }
        assert!(Below::All.touched_by(&created) && !Below::Schema.touched_by(&created));
    }

    #[test]
    fn the_mount_on_top_counts() {
        let mount = |target: &str, kind: &str| Mount {
            id: Default::default(),
            target: target.into(),
            kind: kind.into(),
            source: "ctlfs".into(),
            user: None,
        };
        let mounts = [
            mount("/", "ext4"),
            mount("/ctl-test/a", "fuse.ctlfs"),
            mount("/ctl-test/b", "fuse.ctlfs"),
            mount("/ctl-test/b", "ext4"),
        ];
        let found = locate(&mounts, Path::new("/ctl-test/a/app/x"));
        assert_eq!(found, Some(("/ctl-test/a".into(), "app/x".into())));
        for outside in ["/ctl-test", "/ctl-test/ab", "/ctl-test/b/app"] {
            assert_eq!(locate(&mounts, Path::new(outside)), None, "{outside}");
        }
    }
}
