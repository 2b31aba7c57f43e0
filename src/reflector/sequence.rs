//! The ledger's order: whether what was fetched continues where we stand, and where its
//! transactions end. Pure.

use std::collections::VecDeque;

use crate::ldb::{Position, statement_digest};
use crate::ledger::{BEGIN_MARKER, COMMIT_MARKER, Entry};
use crate::model::Seq;

/// Checks that entries fetched from `position` on, that one included, continue there, and takes
/// the entry at the position away. The error is a sentence for the person who is paged.
pub(super) fn continues(position: &Position, entries: &mut Vec<Entry>) -> Result<(), String> {
    let at = position.seq;
    if at == Seq::ZERO {
        return match entries.first() {
            Some(first) if first.seq > at.next() && !may_be_first(entries) => Err(format!(
                "the beginning of the ledger was cut off: its first entry is {}, and that \
                     does not create a table; start from a copy of an LDB that is further",
                first.seq
            )),
            _ => Ok(()),
        };
    }
    match entries.first() {
        None => Err(format!(
            "the ledger has no entry {at} and none behind it, but this LDB was built up to there; \
             the ledger was truncated, or it is another one"
        )),
        Some(first) if first.seq == at => {
            let found = statement_digest(&first.statement);
            let digest = position.digest.as_ref();
            // The ends of transactions are all the same, but for when they were written.
            let is_end = first.statement.trim() == COMMIT_MARKER;
            let elsewhen = position.time.is_some_and(|time| time != first.time);
            if digest.is_some_and(|d| *d != found || (is_end && elsewhen)) {
                return Err(format!(
                    "entry {at} of the ledger is not the one that this LDB was built from; \
                     it is another ledger"
                ));
            }
            entries.remove(0);
            Ok(())
        }
        Some(first) if first.seq == at.next() => Ok(()),
        Some(first) => Err(format!(
            "the ledger was truncated beyond entry {at}, where this LDB stands: \
             its next entry is {}, and those between may be lost",
            first.seq
        )),
    }
}

/// Whether a ledger can begin like this: nothing else can come before the first table. Sequences
/// alone do not tell, as a writer that fails uses one up.
fn may_be_first(entries: &[Entry]) -> bool {
    let creates = |entry: &Entry| {
        let mut words = entry.statement.split_ascii_whitespace();
        let mut next_is = |word: &str| words.next().is_some_and(|w| w.eq_ignore_ascii_case(word));
        next_is("CREATE") && next_is("TABLE")
    };
    let begins = |entry: &Entry| entry.statement.trim() == BEGIN_MARKER;
    match entries {
        [first, second, ..] if begins(first) => creates(second),
        // What it begins with is not there yet.
        [first] if begins(first) => true,
        [first, ..] => creates(first),
        [] => true,
    }
}

/// What [`whole_transactions`] found at the head of a queue.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// So many entries make whole ledger transactions.
    Whole(usize),
    /// The first entry opens a transaction whose end is not there.
    Unfinished(Seq),
}

/// How many of the entries make up whole ledger transactions, at least one if possible and no more
/// than the bounds once the first has passed. Misplaced markers count as transactions of their
/// own: applying them tells what is wrong.
pub(super) fn whole_transactions(
    entries: &VecDeque<Entry>,
    max_entries: usize,
    max_bytes: usize,
) -> Head {
    let mut open = None;
    let mut whole = 0;
    let mut bytes = 0usize;
    for (i, entry) in entries.iter().enumerate() {
        bytes = bytes.saturating_add(entry.statement.len());
        match entry.statement.trim() {
            BEGIN_MARKER if open.is_some() => return Head::Whole(i + 1),
            BEGIN_MARKER => open = Some(entry.seq),
            COMMIT_MARKER => open = None,
            _ => {}
        }
        if open.is_none() {
            whole = i + 1;
            if whole >= max_entries || bytes >= max_bytes {
                break;
            }
        }
    }
    match open {
        Some(begin) if whole == 0 => Head::Unfinished(begin),
        _ => Head::Whole(whole),
    }
}

/// The start of the ledger transaction that the entry at `index` is part of.
pub(super) fn transaction_start(entries: &VecDeque<Entry>, index: usize) -> usize {
    let mut start = index;
    let mut open = false;
    for (i, entry) in entries.iter().enumerate().take(index + 1) {
        let marker = entry.statement.trim();
        if !open {
            start = i;
        }
        match marker {
            BEGIN_MARKER => open = true,
            COMMIT_MARKER => open = false,
            _ => {}
        }
    }
    start
}

/// The last entry of each ledger transaction.
pub(super) fn ends<'a>(
    entries: impl Iterator<Item = &'a Entry>,
) -> impl Iterator<Item = &'a Entry> {
    let mut open = false;
    entries.filter(move |entry| {
        match entry.statement.trim() {
            BEGIN_MARKER => open = true,
            COMMIT_MARKER => open = false,
            _ => {}
        }
        !open
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LedgerTime;

    fn entry(seq: u64, statement: &str) -> Entry {
        Entry {
            seq: Seq::new(seq),
            time: LedgerTime::from_micros(0),
            statement: statement.into(),
        }
    }

    fn queue(statements: &[&str]) -> VecDeque<Entry> {
        (1..).zip(statements).map(|(i, s)| entry(i, s)).collect()
    }

    #[test]
    fn only_whole_transactions_are_taken() {
        let (b, c) = ("--- BEGIN", "--- COMMIT");
        let whole = |statements: &[&str]| whole_transactions(&queue(statements), 3, 1000);
        assert_eq!(whole(&["x", "y"]), Head::Whole(2));
        assert_eq!(whole(&["x", b, "y"]), Head::Whole(1));
        assert_eq!(whole(&["x", b, "y", c, "z"]), Head::Whole(4));
        assert_eq!(whole(&[b, "x", "y", "z", c, "w"]), Head::Whole(5));
        assert_eq!(whole(&[b, "x"]), Head::Unfinished(Seq::new(1)));
        assert_eq!(whole(&[b, "x", b, "y"]), Head::Whole(3));
        assert_eq!(whole(&["x", c]), Head::Whole(2));
        assert_eq!(whole(&[]), Head::Whole(0));
        let entries = queue(&["x", b, "y", "z", c, "w"]);
        let starts: Vec<_> = (0..6).map(|i| transaction_start(&entries, i)).collect();
        assert_eq!(starts, [0, 1, 1, 1, 1, 5]);
    }

    #[test]
    fn a_ledger_must_continue_where_we_stand() {
        let at = |digest: Option<&str>| Position {
            seq: Seq::new(5),
            digest: digest.map(statement_digest),
            time: None,
        };
        let check = |position: &Position, seqs: &[u64]| {
            let mut entries: Vec<_> = seqs.iter().map(|s| entry(*s, "x")).collect();
            continues(position, &mut entries).map(|()| entries.len())
        };
        assert_eq!(check(&at(Some("x")), &[5, 7]), Ok(1));
        assert_eq!(check(&at(None), &[5]), Ok(0));
        assert_eq!(check(&at(Some("x")), &[6, 7]), Ok(2));
        assert!(check(&at(Some("y")), &[5, 6]).is_err());
        assert!(check(&at(Some("x")), &[7]).is_err());
        assert!(check(&at(Some("x")), &[]).is_err());
        assert_eq!(check(&Position::default(), &[1]), Ok(1));
        assert!(check(&Position::default(), &[42]).is_err());
        assert_eq!(check(&Position::default(), &[]), Ok(0));
    }

    #[test]
    fn ends_of_transactions_are_told_apart_by_their_time() {
        let check = |statement: &str, time: i64| {
            let position = Position {
                seq: Seq::new(5),
                digest: Some(statement_digest(statement)),
                time: Some(LedgerTime::from_micros(time)),
            };
            continues(&position, &mut vec![entry(5, statement)])
        };
        assert_eq!(check(COMMIT_MARKER, 0), Ok(()));
        assert!(check(COMMIT_MARKER, 1).is_err());
        // What else was written again is the same.
        assert_eq!(check("x", 1), Ok(()));
    }

    #[test]
    fn a_ledger_without_its_beginning_is_refused() {
        let check_all = |statements: &[&str]| {
            let mut entries: Vec<_> = (42..).zip(statements).map(|(i, s)| entry(i, s)).collect();
            continues(&Position::default(), &mut entries)
        };
        let check = |statement: &str| check_all(&[statement]);
        let create = "CREATE TABLE app___a (...)";
        assert_eq!(check_all(&[BEGIN_MARKER, create]), Ok(()));
        assert!(check_all(&[BEGIN_MARKER, "REPLACE INTO app___a"]).is_err());
        for first in [
            "--- BEGIN",
            "CREATE TABLE app___a (...)",
            " create\ttable x",
        ] {
            assert_eq!(check(first), Ok(()), "{first}");
        }
        for later in ["--- COMMIT", "REPLACE INTO app___a", "ALTER TABLE x", ""] {
            let reason = check(later).unwrap_err();
            assert!(
                reason.contains("cut off") && reason.contains("42"),
                "{reason}"
            );
        }
    }
}
