//! The ledger: where changes come from.
//!
//! [`Origin`] is what the reflector needs of a ledger, and all it knows of one. The calls block:
//! the reflector has a thread of its own, and whatever runtime an origin needs stays inside it.

use std::fmt;
use std::time::Duration;

use crate::model::{LedgerTime, Seq};

mod binlog;
pub(crate) mod embedded;
mod inotify;
mod mysql;
pub mod push;
pub(crate) mod session;
pub mod statement;
mod url;

pub use embedded::EmbeddedOrigin;
pub use mysql::MySqlOrigin;
pub use url::{MySqlUrl, OriginUrl, OriginUrlError};

/// The table that holds the ledger, in MySQL and in the embedded ledger alike.
pub const LEDGER_TABLE: &str = "ctlstore_dml_ledger";
/// The entry that opens a transaction of several mutations.
pub const BEGIN_MARKER: &str = "--- BEGIN";
/// The entry that closes it.
pub const COMMIT_MARKER: &str = "--- COMMIT";

/// One entry of the ledger.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its sequence; ascending with gaps.
    pub seq: Seq,
    /// When it was written, by the database's clock.
    pub time: LedgerTime,
    /// The statement, or a marker of a transaction's begin or end.
    pub statement: String,
}

/// Leaves the statement out: it holds users' data.
impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "entry {} ({} bytes)", self.seq, self.statement.len())
    }
}

/// A ledger that can be followed.
pub trait Origin: Send {
    /// Entries with a sequence of at least `from`, ascending, without leaving any out in between.
    /// An origin bounds the memory an answer takes, but gives an entry behind `from` if there is
    /// one: whoever asks from the entry that it has takes an answer without for the ledger's end.
    fn fetch(&mut self, from: Seq) -> Result<Vec<Entry>, OriginError>;

    /// The sequence of the last entry; `None` when the ledger is empty.
    fn last_seq(&mut self) -> Result<Option<Seq>, OriginError>;

    /// The sequences that exist from `first` to `last`, both included, ascending.
    fn seqs_between(&mut self, first: Seq, last: Seq) -> Result<Vec<Seq>, OriginError>;

    /// The origin as a person may see it: never with a password.
    fn describe(&self) -> String;

    /// What tells of changes of this ledger the moment they are made, if there is such a thing.
    /// `heartbeat` is how often it says that it is in contact while nothing changes.
    fn push(&self, heartbeat: Duration) -> Option<Box<dyn push::Push>> {
        let _ = heartbeat;
        None
    }

    /// By how many microseconds the clock that dates entries is ahead of this host's, as far as
    /// it was measured.
    fn clock_ahead(&self) -> Option<i64> {
        None
    }
}

/// Whether an answer to [`Origin::fetch`] has an entry behind `from`.
fn holds_more(entries: &[Entry], from: Seq) -> bool {
    entries.last().is_some_and(|last| last.seq > from)
}

/// The ledger that a URL names. Nothing is connected or opened before the first call, so that a
/// daemon can start while its origin is down.
pub fn open(url: &OriginUrl) -> Result<Box<dyn Origin>, OriginError> {
    Ok(match url {
        OriginUrl::MySql(url) => Box::new(MySqlOrigin::new(url)?),
        OriginUrl::Sqlite(path) => Box::new(EmbeddedOrigin::new(path)),
    })
}

/// Why an origin did not answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OriginError {
    /// No server or file there, or the connection broke. Trying again may help.
    #[error("cannot reach {origin}: {reason}")]
    Unreachable {
        /// The origin, without its password.
        origin: String,
        /// What the system or server said.
        reason: String,
    },
    /// The server refused the user or password.
    #[error("{origin} refused the login: {reason}; check the user and password of --origin")]
    Denied {
        /// The origin, without its password.
        origin: String,
        /// What the server said.
        reason: String,
    },
    /// The login was right, but the user lacks a privilege.
    #[error("{origin} does not allow this user what is needed: {reason}; grant it to the user")]
    NotAllowed {
        /// The origin, without its password.
        origin: String,
        /// What the server said.
        reason: String,
    },
    /// The database named in the URL does not exist.
    #[error("{origin} has no such database: {reason}; create it, then run 'ctlfs init'")]
    NoDatabase {
        /// The origin, without its password.
        origin: String,
        /// What the server said.
        reason: String,
    },
    /// The database has no ledger.
    #[error("{origin} holds no ledger: run 'ctlfs init --origin …' to create its tables")]
    NotInitialised {
        /// The origin, without its password.
        origin: String,
    },
    /// Anything else that the database said.
    #[error("{origin}: {reason}")]
    Failed {
        /// The origin, without its password.
        origin: String,
        /// What the database said.
        reason: String,
    },
}
