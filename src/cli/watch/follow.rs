//! Follows a mounted tree: what changed behind a sequence, read from the files that every tree has.
//!
//! The position of the tree is read first, then the journals of those tables that have changed
//! since. Each of them is of that position or a later one, so what they tell up to it is complete,
//! over all tables.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::delivery::{Delivery, Transaction, merge};
use super::journal::{Journal, number};
use super::target::Target;
use crate::tree::node::{CONTROL_DIR, TABLE_SEQ};

/// The sequences of so many tables are read each time.
const FEW: usize = 8;
/// A tree that shows less than was there before may be catching up again; for so long it is waited
/// for.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a look at the tree came to.
#[derive(Debug)]
pub(super) enum Look {
    /// Nothing new.
    Same,
    /// Everything up to the sequence `upto`, oldest first.
    News {
        upto: u64,
        deliveries: Vec<Delivery>,
    },
    /// The tree is not there, or not ready, for this reason.
    Away(String),
}

/// Why it makes no sense to go on.
#[derive(Debug, PartialEq)]
pub(super) struct Hopeless(pub(super) String);

/// A tree that is followed.
pub(super) struct Follower {
    root: PathBuf,
    targets: Vec<Target>,
    /// Everything up to here has been handed out; `None` until a beginning is known.
    cursor: Option<u64>,
    /// The tables that were there at the last look, and are watched.
    tables: BTreeSet<(String, String)>,
    /// Since when the tree shows less than the cursor.
    behind_since: Option<Instant>,
    /// The position and the tables' sequences at the last look.
    glance: Vec<Vec<u8>>,
    /// What may not be read, and notices about it that were not given yet.
    closed: BTreeSet<String>,
    notices: Vec<String>,
}

impl Follower {
    /// Follows the tree at `root` from behind `cursor`, or from its position now.
    pub(super) fn new(root: &Path, targets: &[Target], cursor: Option<u64>) -> Self {
        Follower {
            root: root.to_owned(),
            targets: targets.to_vec(),
            cursor,
            tables: BTreeSet::new(),
            behind_since: None,
            glance: Vec::new(),
            closed: BTreeSet::new(),
            notices: Vec::new(),
        }
    }

    /// Up to where everything has been handed out.
    pub(super) fn cursor(&self) -> Option<u64> {
        self.cursor
    }

    /// Things to say that were not said yet.
    pub(super) fn notices(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notices)
    }

    /// The directories in which something happens when there is news.
    pub(super) fn directories(&self) -> Vec<PathBuf> {
        let mut directories: Vec<PathBuf> = self
            .tables
            .iter()
            .map(|(family, table)| self.root.join(family).join(table))
            .collect();
        for target in &self.targets {
            match target {
                Target::All => directories.push(self.root.clone()),
                Target::Family(family) => directories.push(self.root.join(family)),
                Target::Table(family, table, _) => {
                    directories.push(self.root.join(family).join(table));
                }
            }
        }
        directories.sort();
        directories.dedup();
        directories
    }

    /// Whether every glimpse asks the daemon.
    pub(super) fn asks(&self) -> bool {
        self.tables.is_empty() || self.tables.len() > FEW
    }

    /// Whether a look may be worthwhile. Of a few tables, their sequences are read, which the kernel
    /// has; otherwise, and `now and then`, the position, which the daemon is asked for.
    pub(super) fn glimpse(&mut self, thorough: bool) -> bool {
        let fixed = |t: &Target| matches!(t, Target::Table(..));
        let few = self.tables.len() <= FEW;
        let mut glance = Vec::new();
        if thorough || self.asks() {
            glance.push(fs::read(self.control("seq")).unwrap_or_default());
        } else {
            glance.extend(self.glance.first().cloned());
        }
        if few {
            for (family, table) in &self.tables {
                let seq = fs::read(self.root.join(family).join(table).join(TABLE_SEQ));
                glance.push(seq.unwrap_or_default());
            }
        }
        // With nothing but tables watched, what happens elsewhere is of no interest.
        let from = usize::from(few && !thorough && self.targets.iter().all(fixed));
        let changed = glance.get(from..) != self.glance.get(from..);
        self.glance = glance;
        changed
    }

    fn control(&self, name: &str) -> PathBuf {
        self.root.join(CONTROL_DIR).join(name)
    }

    /// Looks what is new.
    pub(super) fn look(&mut self) -> Result<Look, Hopeless> {
        let mount = fs::metadata(&self.root).map_or(0, |root| root.dev());
        let position = match self.position()? {
            Ok(position) => position,
            Err(away) => return Ok(Look::Away(away)),
        };
        let Some(cursor) = self.cursor else {
            if !self.is_ready() {
                return Ok(Look::Away("it is still being filled".into()));
            }
            let tables = match self.list() {
                Ok(tables) => tables,
                Err(error) => return self.failed("list the tables of", &self.root, &error),
            };
            if let Err(away) = self.still(mount, position)? {
                return Ok(Look::Away(away));
            }
            self.tables = tables;
            self.cursor = Some(position);
            return Ok(Look::News {
                upto: position,
                deliveries: Vec::new(),
            });
        };
        if position < cursor {
            let since = *self.behind_since.get_or_insert_with(Instant::now);
            if since.elapsed() < PATIENCE || !self.is_ready() {
                return Ok(Look::Away(format!(
                    "it shows sequence {position} and has to catch up with {cursor}"
                )));
            }
            self.behind_since = None;
            self.cursor = Some(position);
            return Ok(Look::News {
                upto: position,
                deliveries: vec![Delivery::Gap(cursor, position)],
            });
        }
        self.behind_since = None;
        if position == cursor && !self.tables.is_empty() {
            return Ok(Look::Same);
        }
        self.read(mount, cursor, position)
    }

    /// What the tables of this mount tell of the transactions behind `cursor` up to `position`.
    fn read(&mut self, mount: u64, cursor: u64, position: u64) -> Result<Look, Hopeless> {
        let tables = match self.list() {
            Ok(tables) => tables,
            Err(error) => return self.failed("list the tables of", &self.root, &error),
        };
        let mut parts = Vec::new();
        let mut floor = 0;
        for (family, table) in &tables {
            let journal = match self.journal(family, table, cursor) {
                Ok(Some(journal)) => journal,
                Ok(None) => continue,
                Err(error) => match self.excuse(family, table, &error) {
                    // It went in between, which the next look will see; unless all of it went.
                    Some(Excuse::Gone) => match self.still(mount, position)? {
                        Ok(()) => continue,
                        Err(away) => return Ok(Look::Away(away)),
                    },
                    Some(Excuse::NotAllowed) => {
                        self.notice_closed(format!("{family}/{table}"));
                        continue;
                    }
                    Some(Excuse::TooLarge) => {
                        floor = position;
                        continue;
                    }
                    None => {
                        return self.failed("read the changes of", &self.of(family, table), &error);
                    }
                },
            };
            floor = floor.max(journal.floor);
            for line in journal.lines() {
                match Transaction::from_line(family, table, line, &self.targets) {
                    Ok(Some(part)) if part.seq <= position => parts.push(part),
                    Ok(_) => {}
                    Err(why) => {
                        return Err(Hopeless(format!(
                            "cannot read the changes of {}: {why}; use the ctlfs that mounted it",
                            self.of(family, table).display()
                        )));
                    }
                }
            }
        }
        if let Err(away) = self.still(mount, position)? {
            return Ok(Look::Away(away));
        }
        for (family, table) in self.tables.difference(&tables) {
            let time = fs::metadata(&self.root).and_then(|m| m.modified());
            let time = time.map_or_else(
                |_| String::new(),
                |time| humantime::format_rfc3339_micros(time).to_string(),
            );
            parts.push(Transaction::vanished(family, table, position, time));
        }
        let mut deliveries = Vec::new();
        if floor > cursor {
            let to = floor.min(position);
            deliveries.push(Delivery::Gap(cursor, to));
            // A table that was read before the floor rose may still tell of some of it.
            parts.retain(|part| part.seq > to);
        }
        deliveries.extend(merge(parts).into_iter().map(Delivery::Transaction));
        self.tables = tables;
        self.cursor = Some(position);
        Ok(Look::News {
            upto: position,
            deliveries,
        })
    }

    /// The sequence that the tree shows, or why there is none now.
    fn position(&self) -> Result<Result<u64, String>, Hopeless> {
        let path = self.control("seq");
        match fs::read(&path) {
            Ok(text) => Ok(number(&text).ok_or_else(|| "its position cannot be read".into())),
            Err(error) => match error.raw_os_error() {
                Some(libc::EACCES) => Err(Hopeless(format!(
                    "cannot watch {}: {error}; it needs to read {}",
                    self.root.display(),
                    path.display()
                ))),
                Some(libc::ENOENT) => Ok(Err("ctlfs is not mounted there now".into())),
                Some(libc::ENOTCONN | libc::ECONNABORTED) => Ok(Err("its daemon is dead".into())),
                _ => Ok(Err(error.to_string())),
            },
        }
    }

    /// Whether what was read is of the mount on the device `mount`, which showed `position`; or why
    /// it may not be. Once a mount is detached its paths lead into the directory beneath it, where
    /// all that is missing looks like a table that was dropped.
    fn still(&self, mount: u64, position: u64) -> Result<Result<(), String>, Hopeless> {
        Ok(match (self.position()?, fs::metadata(&self.root)) {
            (Err(away), _) => Err(away),
            (Ok(at), Ok(root)) if root.dev() == mount && at >= position => Ok(()),
            (_, Ok(_)) => Err("it was mounted anew meanwhile".into()),
            (_, Err(error)) => Err(error.to_string()),
        })
    }

    fn is_ready(&self) -> bool {
        self.control("ready").exists()
    }

    fn of(&self, family: &str, table: &str) -> PathBuf {
        self.root.join(family).join(table)
    }

    /// Says once that something is closed to us.
    fn notice_closed(&mut self, what: String) {
        if !self.closed.contains(&what) {
            self.notices.push(format!(
                "not watching {what}: {}",
                io::Error::from_raw_os_error(libc::EACCES)
            ));
            self.closed.insert(what);
        }
    }

    /// The tables that are there and covered by a target.
    fn list(&mut self) -> io::Result<BTreeSet<(String, String)>> {
        let mut tables = BTreeSet::new();
        for target in &self.targets.clone() {
            match target {
                Target::All => {
                    for family in names(&self.root)? {
                        match names(&self.root.join(&family)) {
                            Ok(names) => {
                                tables.extend(names.into_iter().map(|t| (family.clone(), t)));
                            }
                            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                                self.notice_closed(family);
                            }
                            Err(error) => return Err(error),
                        }
                    }
                }
                Target::Family(family) => {
                    for table in names(&self.root.join(family))? {
                        tables.insert((family.clone(), table));
                    }
                }
                Target::Table(family, table, _) => {
                    match fs::symlink_metadata(self.of(family, table)) {
                        Ok(_) => {
                            tables.insert((family.clone(), table.clone()));
                        }
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        Ok(tables)
    }

    /// The lines behind `cursor` of a table's journal, if it has changed since.
    fn journal(&self, family: &str, table: &str, cursor: u64) -> io::Result<Option<Journal>> {
        let seq = fs::read(self.of(family, table).join(TABLE_SEQ))?;
        if number(&seq).is_some_and(|seq| seq <= cursor) {
            return Ok(None);
        }
        let path = self
            .control("changes")
            .join(family)
            .join(format!("{table}.ndjson"));
        Journal::read(&File::open(path)?, cursor).map(Some)
    }

    /// What an error about one table means, if it is no reason to give up.
    fn excuse(&self, family: &str, table: &str, error: &io::Error) -> Option<Excuse> {
        let named = |t: &Target| matches!(t, Target::Table(..)) && t.covers(family, table);
        match error.raw_os_error()? {
            libc::ENOENT | libc::ESTALE if !self.of(family, table).exists() => Some(Excuse::Gone),
            libc::ESTALE => Some(Excuse::Gone),
            libc::EFBIG => Some(Excuse::TooLarge),
            libc::EACCES if !self.targets.iter().any(named) => Some(Excuse::NotAllowed),
            _ => None,
        }
    }

    /// What an error means that says more of the tree than of one table.
    fn failed(&self, action: &str, path: &Path, error: &io::Error) -> Result<Look, Hopeless> {
        match error.raw_os_error() {
            Some(libc::EACCES) => Err(Hopeless(format!(
                "cannot {action} {}: {error}; see the mount's --access rules",
                path.display()
            ))),
            Some(libc::ENOENT)
                if self.control("seq").exists() && !self.control("changes").exists() =>
            {
                Err(Hopeless(format!(
                    "cannot {action} {}: this mount keeps no record of changes; mount it with this \
                 version of ctlfs and --origin",
                    path.display()
                )))
            }
            _ => Ok(Look::Away(error.to_string())),
        }
    }
}

enum Excuse {
    Gone,
    NotAllowed,
    TooLarge,
}

/// The names in a directory that are families or tables; none if there is no such directory.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        if let Ok(text) = std::str::from_utf8(name.as_bytes())
            && !text.starts_with('.')
        {
            names.push(text.to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests;
