//! What keeps the reflector from going on, as it comes from the origin, the LDB and the entries.

use crate::ldb::{ApplyError, LdbError};
use crate::ledger::{Entry, OriginError, statement};
use crate::model::Seq;
use crate::status::ProblemKind;

/// Why a step could not be done.
#[derive(Debug)]
pub(super) struct Obstacle {
    pub(super) kind: ProblemKind,
    pub(super) seq: Option<Seq>,
    pub(super) statement: Option<String>,
    pub(super) reason: String,
}

impl Obstacle {
    pub(super) fn ledger(seq: Seq, reason: String) -> Self {
        Obstacle {
            kind: ProblemKind::Ledger,
            seq: Some(seq),
            statement: None,
            reason,
        }
    }
}

impl From<OriginError> for Obstacle {
    fn from(error: OriginError) -> Self {
        Obstacle {
            kind: ProblemKind::Origin,
            seq: None,
            statement: None,
            reason: error.to_string(),
        }
    }
}

impl From<LdbError> for Obstacle {
    fn from(error: LdbError) -> Self {
        Obstacle {
            kind: ProblemKind::Storage,
            seq: None,
            statement: None,
            reason: error.to_string(),
        }
    }
}

/// Why an entry was not applied.
pub(super) fn failed(entry: &Entry, error: ApplyError) -> Obstacle {
    let (kind, statement) = match &error {
        ApplyError::Ldb(_) | ApplyError::Stopped => (ProblemKind::Storage, None),
        ApplyError::Order(_) => (ProblemKind::Ledger, None),
        ApplyError::Statement(_) => (
            ProblemKind::Statement,
            Some(statement::head(&entry.statement)),
        ),
    };
    Obstacle {
        kind,
        seq: Some(entry.seq),
        statement,
        reason: error.to_string(),
    }
}
