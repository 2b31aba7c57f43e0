//! What the events of a binlog say about the ledger. Pure: it takes the bytes of events, in the
//! order in which the server sends them, and keeps no more than what the transaction that is
//! passing has done to the ledger.
//!
//! Formats are those of binlog version 4, as MySQL from 5.0 and MariaDB write it: the body of an
//! event, behind its common header and without its checksum. What cannot be made out counts as a
//! change of the ledger, so that the worst is a look in vain.

use crate::ledger::LEDGER_TABLE;
use crate::model::Seq;

const QUERY: u8 = 0x02;
const ROTATE: u8 = 0x04;
const INTVAR: u8 = 0x05;
const XID: u8 = 0x10;
const TABLE_MAP: u8 = 0x13;
const WRITE_ROWS_V1: u8 = 0x17;
const UPDATE_ROWS_V1: u8 = 0x18;
const DELETE_ROWS_V1: u8 = 0x19;
const HEARTBEAT: u8 = 0x1b;
const WRITE_ROWS: u8 = 0x1e;
const UPDATE_ROWS: u8 = 0x1f;
const DELETE_ROWS: u8 = 0x20;
const GTID: u8 = 0x21;
const ANONYMOUS_GTID: u8 = 0x22;
const XA_PREPARE: u8 = 0x26;
const PARTIAL_UPDATE_ROWS: u8 = 0x27;
const HEARTBEAT_V2: u8 = 0x29;
const GTID_TAGGED: u8 = 0x2a;
const MARIADB_GTID: u8 = 0xa2;
const MARIADB_QUERY_COMPRESSED: u8 = 0xa5;
/// The rows events of MariaDB's `log_bin_compress`, in both versions.
const MARIADB_ROWS_COMPRESSED: std::ops::RangeInclusive<u8> = 0xa6..=0xab;

/// The subtype of an INTVAR event that gives the next statement's first auto-increment value.
const INSERT_ID: u8 = 2;
/// Column types of the ledger's `seq`.
const TYPE_LONG: u8 = 3;
const TYPE_LONGLONG: u8 = 8;

/// What an event came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// Nothing that concerns the ledger.
    Nothing,
    /// The server has nothing more to tell for now.
    Quiet,
    /// A transaction that changed the ledger has ended; with an entry that it appended, if known.
    Changed(Option<Seq>),
}

/// Follows the events of one stream.
#[derive(Debug)]
pub(super) struct Tracker {
    database: Vec<u8>,
    /// The ledger's number in the rows events of this transaction, and how wide its sequence is.
    table: Option<(u64, usize)>,
    /// The auto-increment value that the next statement begins with.
    insert_id: Option<u64>,
    /// What this transaction has done to the ledger.
    done: Done,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Done {
    appended: Option<Seq>,
    other: bool,
}

impl Tracker {
    /// Follows the ledger in `database`.
    pub(super) fn new(database: &str) -> Self {
        Tracker {
            database: database.as_bytes().to_vec(),
            table: None,
            insert_id: None,
            done: Done::default(),
        }
    }

    /// Takes the next event.
    pub(super) fn event(&mut self, kind: u8, body: &[u8]) -> Told {
        match kind {
            TABLE_MAP => match table_map(body) {
                Some(map) => self.table_map(&map),
                None => self.done.other = true,
            },
            WRITE_ROWS_V1 | WRITE_ROWS => {
                if let Some((id, width)) = self.table
                    && table_id(body).is_none_or(|of| of == id)
                {
                    self.appended(first_value(body, kind == WRITE_ROWS, width));
                }
            }
            UPDATE_ROWS_V1 | DELETE_ROWS_V1 | UPDATE_ROWS | DELETE_ROWS | PARTIAL_UPDATE_ROWS => {
                if let Some((id, _)) = self.table
                    && table_id(body).is_none_or(|of| of == id)
                {
                    self.done.other = true;
                }
            }
            INTVAR => {
                if let (Some(&INSERT_ID), Some(value)) = (body.first(), number(body, 1, 8)) {
                    self.insert_id = Some(value);
                }
            }
            QUERY => match query(body) {
                Some(query) => return self.query(&query),
                None => self.done.other = true,
            },
            // Its text is compressed: with the ledger's database as the default, or with none, it
            // may be about it.
            MARIADB_QUERY_COMPRESSED => {
                let insert_id = self.insert_id.take();
                let concerns = |schema: &[u8]| {
                    schema.is_empty() || schema.eq_ignore_ascii_case(&self.database)
                };
                if query(body).is_none_or(|q| concerns(q.schema)) {
                    self.appended(insert_id);
                }
            }
            kind if MARIADB_ROWS_COMPRESSED.contains(&kind) => {
                self.done.other |= self.table.is_some();
            }
            XID | XA_PREPARE => return self.end(),
            // A statement that needs no COMMIT, such as DDL, has ended when the next one begins.
            GTID | ANONYMOUS_GTID | GTID_TAGGED | MARIADB_GTID | ROTATE => return self.end(),
            HEARTBEAT | HEARTBEAT_V2 => {
                return match self.end() {
                    Told::Nothing => Told::Quiet,
                    told => told,
                };
            }
            _ => {}
        }
        Told::Nothing
    }

    fn table_map(&mut self, map: &TableMap<'_>) {
        // Servers that ignore case have one database with that name, the others at worst two.
        if !(map.database.eq_ignore_ascii_case(&self.database)
            && map.table.eq_ignore_ascii_case(LEDGER_TABLE.as_bytes()))
        {
            return;
        }
        let width = match map.first_type {
            Some(TYPE_LONG) => 4,
            Some(TYPE_LONGLONG) => 8,
            _ => 0,
        };
        self.table = Some((map.id, width));
    }

    fn query(&mut self, query: &Query<'_>) -> Told {
        let insert_id = self.insert_id.take();
        let word = query.text.trim_ascii_start();
        let begins = |with: &str| {
            word.get(..with.len())
                .is_some_and(|w| w.eq_ignore_ascii_case(with.as_bytes()))
        };
        if begins("BEGIN") || begins("COMMIT") || begins("ROLLBACK") {
            return self.end();
        }
        if begins("XA COMMIT") {
            // What it commits passed by when it was prepared.
            self.done.other = true;
            return self.end();
        }
        if contains(query.text, LEDGER_TABLE.as_bytes())
            && (query.schema.eq_ignore_ascii_case(&self.database)
                || contains(query.text, &self.database))
        {
            self.appended(insert_id);
        }
        Told::Nothing
    }

    /// The ledger was changed: a row was appended if its number is known, something else if not.
    fn appended(&mut self, seq: Option<u64>) {
        match seq {
            Some(seq) => self.done.appended = self.done.appended.max(Some(Seq::new(seq))),
            None => self.done.other = true,
        }
    }

    fn end(&mut self) -> Told {
        self.table = None;
        self.insert_id = None;
        match std::mem::take(&mut self.done) {
            Done { other: true, .. } => Told::Changed(None),
            Done {
                appended: Some(seq),
                ..
            } => Told::Changed(Some(seq)),
            _ => Told::Nothing,
        }
    }
}

struct TableMap<'a> {
    id: u64,
    database: &'a [u8],
    table: &'a [u8],
    first_type: Option<u8>,
}

/// Table number (6 bytes), flags (2), then the names, each with its length before and a NUL
/// behind, the number of columns and their types.
fn table_map(body: &[u8]) -> Option<TableMap<'_>> {
    let id = table_id(body)?;
    let (database, rest) = name(body.get(8..)?)?;
    let (table, rest) = name(rest)?;
    let columns = *rest.first()?;
    Some(TableMap {
        id,
        database,
        table,
        // A table of more than 250 columns has a longer number there, and is not the ledger.
        first_type: (columns < 251).then(|| rest.get(1).copied()).flatten(),
    })
}

fn name(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(*length))?;
    Some((name, rest.get(1..)?))
}

fn table_id(body: &[u8]) -> Option<u64> {
    number(body, 0, 6)
}

/// The first column of the first row of a WRITE_ROWS event, if it is there: table number (6),
/// flags (2), in version 2 also a length that counts itself (2) and what it covers; then the number
/// of columns, a bit for each that is present, and for each row a bit for each of those that is
/// NULL, followed by the values.
fn first_value(body: &[u8], version_2: bool, width: usize) -> Option<u64> {
    if width == 0 {
        return None;
    }
    let mut at = 8;
    if version_2 {
        at += usize::try_from(number(body, at, 2)?).ok()?;
    }
    let columns = usize::from(*body.get(at)?);
    if columns == 0 || columns > 250 {
        return None;
    }
    let mask_bytes = columns.div_ceil(8);
    let mask = body.get(at + 1..at + 1 + mask_bytes)?;
    let present: usize = (0..columns)
        .filter(|i| {
            mask.get(i / 8)
                .is_some_and(|byte| byte & (1 << (i % 8)) != 0)
        })
        .count();
    let nulls = at + 1 + mask_bytes;
    if mask.first()? & 1 == 0 || body.get(nulls)? & 1 != 0 {
        return None;
    }
    number(body, nulls + present.div_ceil(8), width)
}

struct Query<'a> {
    schema: &'a [u8],
    text: &'a [u8],
}

/// Thread (4 bytes), duration (4), length of the schema's name (1), error (2), length of the
/// variables (2), the variables, the name, a NUL, and the text.
fn query(body: &[u8]) -> Option<Query<'_>> {
    let schema = usize::from(*body.get(8)?);
    let variables = usize::try_from(number(body, 11, 2)?).ok()?;
    let rest = body.get(13 + variables..)?;
    let (schema, rest) = rest.split_at_checked(schema)?;
    Some(Query {
        schema,
        text: rest.get(1..)?,
    })
}

/// A number of `width` bytes, the lowest first.
fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(width)?)?;
    Some(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
}

/// Whether `text` contains `word` in any case.
fn contains(text: &[u8], word: &[u8]) -> bool {
    let Some(first) = word.first() else {
        return true;
    };
    text.windows(word.len()).any(|w| {
        w.first().is_some_and(|c| c.eq_ignore_ascii_case(first)) && w.eq_ignore_ascii_case(word)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map(id: u8, database: &str, table: &str, types: &[u8]) -> Vec<u8> {
        let mut body = vec![id, 0, 0, 0, 0, 0, 1, 0];
        for name in [database, table] {
            body.push(name.len().try_into().unwrap());
            body.extend(name.as_bytes());
            body.push(0);
        }
        body.push(types.len().try_into().unwrap());
        body.extend(types);
        body
    }

    fn ledger(id: u8) -> Vec<u8> {
        map(id, "ctldb", LEDGER_TABLE, &[TYPE_LONGLONG, 18, 252])
    }

    /// A row of (seq, NULL, NULL).
    fn rows(id: u8, version_2: bool, seq: u64) -> Vec<u8> {
        let mut body = vec![id, 0, 0, 0, 0, 0, 1, 0];
        if version_2 {
            body.extend([4, 0, 9, 9]);
        }
        body.extend([3, 0b111, 0b110]);
        body.extend(seq.to_le_bytes());
        body
    }

    fn statement(schema: &str, text: &str) -> Vec<u8> {
        let mut body = vec![0; 8];
        body.push(schema.len().try_into().unwrap());
        body.extend([0, 0, 3, 0, 7, 7, 7]);
        body.extend(schema.as_bytes());
        body.push(0);
        body.extend(text.as_bytes());
        body
    }

    fn insert_id(value: u64) -> Vec<u8> {
        let mut body = vec![INSERT_ID];
        body.extend(value.to_le_bytes());
        body
    }

    fn tell(events: &[(u8, Vec<u8>)]) -> Vec<Told> {
        let mut tracker = Tracker::new("ctldb");
        events
            .iter()
            .map(|(kind, body)| tracker.event(*kind, body))
            .filter(|told| *told != Told::Nothing)
            .collect()
    }

    fn changed(seq: u64) -> Told {
        Told::Changed(Some(Seq::new(seq)))
    }

    #[test]
    fn a_row_appended_to_the_ledger_is_told_at_the_commit() {
        for (kind, version_2) in [(WRITE_ROWS_V1, false), (WRITE_ROWS, true)] {
            let events = [
                (MARIADB_GTID, vec![0; 19]),
                (TABLE_MAP, map(1, "ctldb", "app___flags", &[15, 8])),
                (kind, rows(1, version_2, 7)),
                (TABLE_MAP, ledger(2)),
                (kind, rows(2, version_2, 4711)),
                (kind, rows(2, version_2, 4712)),
            ];
            assert_eq!(tell(&events), []);
            let end = [&events[..], &[(XID, vec![0; 8])]].concat();
            assert_eq!(tell(&end), [changed(4712)]);
        }
    }

    #[test]
    fn a_statement_that_appends_is_told_with_its_auto_increment() {
        let insert = "INSERT INTO ctlstore_dml_ledger (statement) VALUES ('x')";
        assert_eq!(
            tell(&[
                (QUERY, statement("ctldb", "BEGIN")),
                (INTVAR, insert_id(9)),
                (QUERY, statement("ctldb", insert)),
                (XID, vec![0; 8]),
                (QUERY, statement("other", insert)),
                (XID, vec![0; 8]),
                (INTVAR, insert_id(3)),
                (
                    QUERY,
                    statement("other", &insert.replace("INTO ", "INTO CTLDB."))
                ),
                (QUERY, statement("other", "COMMIT")),
            ]),
            [changed(9), changed(3)]
        );
    }

    #[test]
    fn other_traffic_says_nothing() {
        assert_eq!(
            tell(&[
                (TABLE_MAP, map(2, "shop", LEDGER_TABLE, &[TYPE_LONGLONG])),
                (WRITE_ROWS_V1, rows(2, false, 1)),
                (XID, vec![0; 8]),
                (INTVAR, insert_id(9)),
                (
                    QUERY,
                    statement("ctldb", "INSERT INTO app___flags VALUES (1)")
                ),
                (XID, vec![0; 8]),
                (ROTATE, vec![0; 20]),
                (HEARTBEAT, vec![]),
            ]),
            [Told::Quiet]
        );
    }

    #[test]
    fn what_has_no_sequence_is_told_without_one() {
        for (kind, body) in [
            (UPDATE_ROWS_V1, rows(2, false, 5)),
            (DELETE_ROWS, rows(2, true, 5)),
            (0xa6, rows(2, false, 5)),
            (WRITE_ROWS_V1, vec![2, 0, 0, 0, 0, 0]),
        ] {
            assert_eq!(
                tell(&[(TABLE_MAP, ledger(2)), (kind, body), (XID, vec![])]),
                [Told::Changed(None)],
                "{kind:#x}"
            );
        }
        let narrow = map(2, "ctldb", LEDGER_TABLE, &[TYPE_LONG, 18, 252]);
        let row = vec![2, 0, 0, 0, 0, 0, 1, 0, 3, 7, 6, 210, 4, 0, 0];
        assert_eq!(
            tell(&[(TABLE_MAP, narrow), (WRITE_ROWS_V1, row), (XID, vec![])]),
            [changed(1234)]
        );
        let alter = "alter table CTLSTORE_dml_ledger add column x int";
        assert_eq!(
            tell(&[(QUERY, statement("ctldb", alter)), (HEARTBEAT, vec![])]),
            [Told::Changed(None)]
        );
        assert_eq!(
            tell(&[(QUERY, statement("", "XA COMMIT X'00'"))]),
            [Told::Changed(None)]
        );
        for (schema, told) in [("", &[Told::Changed(None)][..]), ("shop", &[])] {
            let compressed = (MARIADB_QUERY_COMPRESSED, statement(schema, "\u{1}zip"));
            assert_eq!(tell(&[compressed, (XID, vec![])]), told, "{schema}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(events in prop::collection::vec(
            (any::<u8>(), prop::collection::vec(any::<u8>(), 0..64)), 0..16)
        ) {
            let mut tracker = Tracker::new("ctldb");
            tracker.event(TABLE_MAP, &ledger(1));
            for (kind, body) in events {
                tracker.event(kind, &body);
            }
        }
    }
}
