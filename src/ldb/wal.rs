//! The write-ahead log of an LDB that readers hold back: who does, and how it shrinks afterwards.
//!
//! SQLite starts the log anew once all of it is in the database and nobody reads from it. A read
//! transaction that is kept open prevents that: the log grows with every commit.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::{LdbError, sidecar};

/// A log of up to this size is left as it is: SQLite writes it back at about this size by itself.
const SMALL: u64 = 4 << 20;
/// How long the log's end waits for readers that are about to finish.
const PATIENCE: Duration = Duration::from_millis(200);

/// Who holds the log back on purpose. Shared by those who do and the writer, who then does not
/// wait for them.
#[derive(Debug, Clone, Default)]
pub struct WalHolds(Arc<AtomicUsize>);

/// Holds the log back until it is dropped.
#[derive(Debug)]
pub struct WalHold(Arc<AtomicUsize>);

impl WalHolds {
    /// One more.
    pub fn take(&self) -> WalHold {
        self.0.fetch_add(1, Ordering::Relaxed);
        WalHold(Arc::clone(&self.0))
    }

    /// Whether anybody does.
    pub fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

impl Drop for WalHold {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The log of the LDB at `path`.
#[derive(Debug)]
pub struct Wal {
    ldb: PathBuf,
    wal: PathBuf,
}

impl Wal {
    /// The log of the LDB at `path`, which need not exist.
    pub fn of(path: &Path) -> Self {
        Wal {
            ldb: path.to_owned(),
            wal: sidecar(path, "-wal"),
        }
    }

    /// Its size; zero without one.
    pub fn len(&self) -> u64 {
        std::fs::metadata(&self.wal).map_or(0, |meta| meta.len())
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes a log back that has grown, and makes it small. Returns whether it is. What takes long
    /// is done first and beside the writer, who has to wait for the rest only.
    pub fn shrink(&self) -> Result<bool, LdbError> {
        if self.len() <= SMALL {
            return Ok(true);
        }
        let shrink = || -> rusqlite::Result<bool> {
            let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let connection = Connection::open_with_flags(&self.ldb, flags)?;
            connection.busy_timeout(PATIENCE)?;
            let busy = |mode: &str| {
                let sql = format!("PRAGMA wal_checkpoint({mode})");
                connection.query_row(&sql, [], |row| row.get::<_, i64>(0))
            };
            Ok(busy("PASSIVE")? == 0 && busy("TRUNCATE")? == 0)
        };
        shrink().map_err(|error| LdbError::from_sqlite(&self.ldb, "write back", &error))
    }
}
