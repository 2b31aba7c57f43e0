//! The origin as the reflector reads it: every fetch is checked against the position and noted on the
//! board.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::obstacle::Obstacle;
use super::sequence::continues;
use crate::ldb::Position;
use crate::ledger::{Entry, Origin};
use crate::model::Seq;
use crate::status::StatusBoard;

/// From so many entries in an answer on there may be many more.
const MANY: usize = 1_000;

/// The origin, with what the board shows of it.
pub(super) struct Source {
    pub(super) origin: Box<dyn Origin>,
    board: Arc<StatusBoard>,
    asked_last: Option<Instant>,
    /// Everything up to here was fetched.
    seen: Seq,
}

impl Source {
    pub(super) fn new(origin: Box<dyn Origin>, board: Arc<StatusBoard>) -> Self {
        Source {
            origin,
            board,
            asked_last: None,
            seen: Seq::ZERO,
        }
    }

    /// Everything up to here was fetched by the last call of [`Source::fetch`].
    pub(super) fn seen(&self) -> Seq {
        self.seen
    }

    /// The entries behind `anchor`, which must be there still. `live` is whether everything that
    /// the origin had was fetched before.
    pub(super) fn fetch(&mut self, anchor: &Position, live: bool) -> Result<Vec<Entry>, Obstacle> {
        let mut entries = self.origin.fetch(anchor.seq)?;
        self.board
            .update(|p| p.last_contact = Some(SystemTime::now()));
        continues(anchor, &mut entries).map_err(|reason| Obstacle::ledger(anchor.seq, reason))?;
        self.seen = anchor.seq;
        if let Some(last) = entries.last() {
            self.seen = last.seq;
            self.note_last(last.seq, live && entries.len() < MANY)?;
        }
        Ok(entries)
    }

    /// Tells the board how far the origin is, now and then asking for it while catching up.
    fn note_last(&mut self, seen: Seq, is_last: bool) -> Result<(), Obstacle> {
        let asked = self.asked_last.get_or_insert_with(|| {
            // The first answer is due at once.
            Instant::now()
                .checked_sub(Duration::from_secs(5))
                .unwrap_or_else(Instant::now)
        });
        let mut last = seen;
        if !is_last && asked.elapsed() >= Duration::from_secs(2) {
            *asked = Instant::now();
            last = self.origin.last_seq()?.unwrap_or(seen).max(seen);
        }
        self.board.update(|p| {
            let last = p.origin_last.map_or(last, |known| known.max(last));
            p.saw_last(last, SystemTime::now());
        });
        Ok(())
    }
}
