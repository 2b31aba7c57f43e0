//! The words in which the server answers: what was found, and why not.

use std::sync::Arc;
use std::time::Duration;

use super::load::CachedRow;
use super::state::Version;
use crate::ldb::LdbError;
use crate::ldb::reader::Mark;
use crate::model::{LedgerTime, Table};
use crate::tree::node::Node;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// No such name.
    #[error("no such entry")]
    NotFound,
    /// The inode is not known, or its content is gone.
    #[error("stale inode")]
    Stale,
    /// No such extended attribute.
    #[error("no such attribute")]
    NoAttribute,
    /// A listing of what is not a directory, or a read of what is not a file.
    #[error("not a directory")]
    NotADirectory,
    /// The LDB could not be read.
    #[error("cannot read the LDB: {0}")]
    Ldb(#[from] LdbError),
    /// Kept bytes could not be read back.
    #[error("cannot read a superseded version: {0}")]
    Kept(#[from] std::io::Error),
    /// A table that is larger than what is shown as one file.
    #[error("larger than --export-max-size")]
    TooLarge,
    /// A table that could not be made into a file; it was logged why.
    #[error("the table could not be shown as a file")]
    Unrendered,
    /// Commits came in between without end.
    #[error("the tree changed too often to compute an answer")]
    Restless,
}

/// The attributes of a file or directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes {
    pub(super) ino: u64,
    pub(super) is_dir: bool,
    pub(super) size: u64,
    pub(super) time: LedgerTime,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) links: u32,
}

/// What a lookup found.
#[derive(Debug)]
pub(super) enum Lookup {
    /// An entry.
    Found {
        attributes: Attributes,
        entry_ttl: Duration,
        attr_ttl: Duration,
    },
    /// Nothing, and for how long.
    Absent(Duration),
}

/// What there is to say of a place.
pub(super) struct Found {
    pub(super) size: u64,
    pub(super) mark: Mark,
    /// What the content is made from.
    pub(super) content: Content,
}

pub(super) enum Content {
    None,
    Bytes(Vec<u8>),
    /// Not made yet: of the view of this epoch.
    Lazy(u64),
    Row(Arc<Table>, Arc<CachedRow>),
}

/// What an inode stands for.
pub(super) enum Inode {
    /// A place of the tree as it is now; `found` is `None` if it does not exist (any more).
    Present {
        node: Node,
        found: Option<Found>,
        fingerprint: u64,
        attr_ttl: Duration,
    },
    /// A content that no longer follows the tree, and whether its place has moved on already.
    Fixed {
        node: Node,
        version: Arc<Version>,
        detached: bool,
        attr_ttl: Duration,
    },
}
