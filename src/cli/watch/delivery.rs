//! What is delivered: ledger transactions with what they changed, and gaps in what is known; and
//! how they are written for people and for programs. Pure.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value as Json, json};

use super::target::{Below, Target};

/// Longer values are cut on lines for people.
const SHOWN: usize = 120;

/// Something to deliver.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Delivery {
    /// A ledger transaction.
    Transaction(Transaction),
    /// What happened behind the first sequence, up to the second, is not known any more.
    Gap(u64, u64),
}

/// A ledger transaction, as far as it touched what is watched.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Transaction {
    /// Its last entry.
    pub(super) seq: u64,
    begin: u64,
    time: String,
    tables: Vec<TableChanges>,
}

#[derive(Debug, Clone, PartialEq)]
struct TableChanges {
    family: String,
    table: String,
    events: Vec<String>,
    /// How many rows changed that are not listed.
    rows: Option<u64>,
    changes: Option<Vec<Change>>,
}

/// What happened to one row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Change {
    /// Where it is, below its table.
    pub(super) path: Option<Vec<u8>>,
    json: Map<String, Json>,
}

impl Change {
    /// Takes a change as the journal has it.
    pub(super) fn new(json: Json) -> Option<Self> {
        let Json::Object(json) = json else {
            return None;
        };
        let text = |name: &str| json.get(name).and_then(Json::as_str);
        let path = match (text("path"), text("path_base64")) {
            (Some(path), _) => Some(path.as_bytes().to_vec()),
            (None, Some(encoded)) => Some(STANDARD.decode(encoded).ok()?),
            (None, None) => None,
        };
        Some(Change { path, json })
    }

    fn side(&self, name: &str) -> Option<&Map<String, Json>> {
        self.json.get(name).and_then(Json::as_object)
    }

    /// Whether it changed a field's file: for a row that came or went, those that are not NULL.
    pub(super) fn touches(&self, field: &str) -> bool {
        let (old, new) = (self.side("old"), self.side("new"));
        let both = old.is_some() && new.is_some();
        [old, new].into_iter().flatten().any(|side| {
            side.get(field)
                .is_some_and(|value| both || !value.is_null())
        })
    }
}

impl Transaction {
    /// Takes a line of a table's journal, with what of it touches one of `targets`. `Ok(None)` if
    /// nothing does; an error if it is no such line.
    pub(super) fn from_line(
        family: &str,
        table: &str,
        line: &[u8],
        targets: &[Target],
    ) -> Result<Option<Self>, &'static str> {
        const NOT_OURS: &str = "a line of it is not one that this version of ctlfs knows";
        let mut line: Map<String, Json> = serde_json::from_slice(line).map_err(|_| NOT_OURS)?;
        let number = |name: &str| line.get(name).and_then(Json::as_u64).ok_or(NOT_OURS);
        let (seq, begin) = (number("seq")?, number("begin")?);
        let rows = line.get("rows").and_then(Json::as_u64);
        let time = line.get("time").and_then(Json::as_str).ok_or(NOT_OURS)?;
        let time = time.to_owned();
        let mut events: Vec<String> = match line.get("events") {
            Some(events) => serde_json::from_value(events.clone()).map_err(|_| NOT_OURS)?,
            None => Vec::new(),
        };
        let changes = match line.remove("changes") {
            Some(Json::Array(changes)) => {
                let changes: Option<Vec<_>> = changes.into_iter().map(Change::new).collect();
                Some(changes.ok_or(NOT_OURS)?)
            }
            Some(_) => return Err(NOT_OURS),
            None => None,
        };
        let below: Vec<&Below> = targets
            .iter()
            .filter(|t| t.covers(family, table))
            .map(Target::below)
            .collect();
        let listed = changes.is_some();
        let changes = changes.map(|mut changes| {
            changes.retain(|change| below.iter().any(|b| b.touched_by(change)));
            changes
        });
        let touched = changes.as_ref().is_some_and(|changes| !changes.is_empty());
        // What happened to the table as a whole happened to everything in it, but a table that was
        // cleared tells each row that went, if it can.
        events.retain(|event| {
            below.iter().any(|b| match b {
                Below::All => true,
                Below::Schema => event != "cleared",
                Below::Path(_) => event != "cleared" || !listed || touched,
            })
        });
        let rows = rows.filter(|_| below.iter().any(|b| !matches!(b, Below::Schema)));
        if !touched && events.is_empty() && rows.is_none() {
            return Ok(None);
        }
        Ok(Some(Transaction {
            seq,
            begin,
            time,
            tables: vec![TableChanges {
                family: family.to_owned(),
                table: table.to_owned(),
                events,
                rows,
                changes: changes.filter(|_| touched),
            }],
        }))
    }

    /// A table that is gone, as far as is known since the entry `seq`.
    pub(super) fn vanished(family: &str, table: &str, seq: u64, time: String) -> Self {
        Transaction {
            seq,
            begin: seq,
            time,
            tables: vec![TableChanges {
                family: family.to_owned(),
                table: table.to_owned(),
                events: vec!["dropped".into()],
                rows: None,
                changes: None,
            }],
        }
    }

    /// Adds what the same transaction did to other tables.
    pub(super) fn join(&mut self, other: Transaction) {
        self.tables.extend(other.tables);
    }
}

/// Puts the tables' parts of transactions together, in the ledger's order.
pub(super) fn merge(parts: Vec<Transaction>) -> Vec<Transaction> {
    let mut merged: BTreeMap<u64, Transaction> = BTreeMap::new();
    for part in parts {
        match merged.entry(part.seq) {
            std::collections::btree_map::Entry::Occupied(mut there) => there.get_mut().join(part),
            std::collections::btree_map::Entry::Vacant(free) => {
                free.insert(part);
            }
        }
    }
    merged.into_values().collect()
}

impl Delivery {
    /// The last sequence that it tells of.
    pub(super) fn seq(&self) -> u64 {
        match self {
            Delivery::Transaction(transaction) => transaction.seq,
            Delivery::Gap(_, to) => *to,
        }
    }

    /// As one JSON object, and a newline.
    pub(super) fn to_json(&self) -> String {
        let json = match self {
            Delivery::Gap(after, to) => json!({"seq": to, "gap": {"after": after, "to": to}}),
            Delivery::Transaction(transaction) => {
                let tables: Vec<Json> = transaction.tables.iter().map(TableChanges::json).collect();
                json!({
                    "seq": transaction.seq,
                    "begin": transaction.begin,
                    "time": transaction.time,
                    "tables": tables,
                })
            }
        };
        format!("{json}\n")
    }

    /// As one line for people.
    pub(super) fn to_line(&self) -> String {
        let transaction = match self {
            Delivery::Gap(after, to) => {
                return format!(
                    "{to} gap: what changed behind {after} up to {to} is not known any more; \
                     read it anew\n"
                );
            }
            Delivery::Transaction(transaction) => transaction,
        };
        let mut line = format!("{} {} ", transaction.seq, transaction.time);
        let told: Vec<String> = transaction
            .tables
            .iter()
            .flat_map(TableChanges::lines)
            .collect();
        line.push_str(&told.join("; "));
        line.push('\n');
        line
    }

    /// The rows that changed, as paths; the table where they are not listed, and everything that is
    /// watched after a gap.
    pub(super) fn paths(&self, root: &Path, watched: &[Target]) -> Vec<OsString> {
        let path = |parts: &[&[u8]]| {
            let mut path = root.as_os_str().to_owned().into_vec();
            for part in parts {
                path.push(b'/');
                path.extend_from_slice(part);
            }
            OsString::from_vec(path)
        };
        let transaction = match self {
            Delivery::Transaction(transaction) => transaction,
            Delivery::Gap(..) => {
                return watched
                    .iter()
                    .map(|target| match target {
                        Target::All => path(&[]),
                        Target::Family(f) => path(&[f.as_bytes()]),
                        Target::Table(f, t, Below::Path(p)) => {
                            path(&[f.as_bytes(), t.as_bytes(), p])
                        }
                        Target::Table(f, t, _) => path(&[f.as_bytes(), t.as_bytes()]),
                    })
                    .collect();
            }
        };
        let mut paths = Vec::new();
        for table in &transaction.tables {
            let (family, name) = (table.family.as_bytes(), table.table.as_bytes());
            let rows = table.changes.iter().flatten();
            let before = paths.len();
            paths.extend(rows.filter_map(|c| Some(path(&[family, name, c.path.as_deref()?]))));
            if paths.len() == before || table.rows.is_some() {
                paths.push(path(&[family, name]));
            }
        }
        paths
    }
}

impl TableChanges {
    fn json(&self) -> Json {
        let mut json = Map::new();
        json.insert("family".into(), self.family.clone().into());
        json.insert("table".into(), self.table.clone().into());
        if !self.events.is_empty() {
            json.insert("events".into(), self.events.clone().into());
        }
        if let Some(rows) = self.rows {
            json.insert("rows".into(), rows.into());
        }
        if let Some(changes) = &self.changes {
            let changes: Vec<Json> = changes
                .iter()
                .map(|c| Json::Object(c.json.clone()))
                .collect();
            json.insert("changes".into(), changes.into());
        }
        Json::Object(json)
    }

    fn lines(&self) -> Vec<String> {
        let name = format!("{}/{}", self.family, self.table);
        let mut lines = Vec::new();
        if !self.events.is_empty() {
            lines.push(format!("{name}: {}", self.events.join(", ")));
        }
        if let Some(rows) = self.rows {
            lines.push(format!("{name}: {rows} rows changed"));
        }
        for change in self.changes.iter().flatten() {
            let row = change.path.as_deref().unwrap_or(b"?");
            let row = String::from_utf8_lossy(row);
            lines.push(format!("{name}/{row}: {}", change.words()));
        }
        lines
    }
}

impl Change {
    /// What happened, in words.
    fn words(&self) -> String {
        let fields = |side: &Map<String, Json>| -> String {
            let told: Vec<String> = side
                .iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(name, value)| format!("{name} {}", shown(value)))
                .collect();
            told.join(", ")
        };
        match (self.side("old"), self.side("new")) {
            (Some(old), Some(new)) => {
                let told: Vec<String> = new
                    .iter()
                    .map(|(name, value)| {
                        let before = old.get(name).unwrap_or(&Json::Null);
                        format!("{name} {} -> {}", shown(before), shown(value))
                    })
                    .collect();
                told.join(", ")
            }
            (None, Some(new)) => format!("created with {}", fields(new)),
            (Some(old), None) => format!("deleted with {}", fields(old)),
            (None, None) => "changed".into(),
        }
    }
}

/// A value on a line for people.
fn shown(value: &Json) -> String {
    if let Some(length) = value.get("omitted") {
        return format!("({length} bytes)");
    }
    let mut text = value.to_string();
    if text.len() > SHOWN {
        let cuts = |at: &usize| text.is_char_boundary(*at);
        let end = (0..=SHOWN).rev().find(cuts).unwrap_or(0);
        let more = text.len() - end;
        text.truncate(end);
        let _ = write!(text, "…(+{more} bytes)");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"seq":8,"begin":5,"time":"T","changes":[{"path":"a","key":["a"],"kind":"updated","old":{"d":0.1,"note":"x"},"new":{"d":1.0,"note":null}},{"path":"b","key":["b"],"kind":"created","new":{"name":"b","n":9223372036854775807,"note":null}}]}"#;

    fn table(below: Below) -> [Target; 1] {
        [Target::Table("app".into(), "flags".into(), below)]
    }

    fn read(line: &str, targets: &[Target]) -> Option<Delivery> {
        let read = Transaction::from_line("app", "flags", line.as_bytes(), targets).unwrap();
        read.map(Delivery::Transaction)
    }

    #[test]
    fn lines_are_for_people_and_for_programs() {
        let delivery = read(LINE, &[Target::All]).unwrap();
        assert_eq!(
            delivery.to_line(),
            "8 T app/flags/a: d 0.1 -> 1.0, note \"x\" -> null; \
             app/flags/b: created with name \"b\", n 9223372036854775807\n"
        );
        let json = delivery.to_json();
        let changes = LINE.split_once("\"changes\"").unwrap().1;
        let changes = changes.strip_suffix('}').unwrap();
        assert_eq!(
            json,
            format!(
                "{{\"seq\":8,\"begin\":5,\"time\":\"T\",\"tables\":[{{\"family\":\"app\",\
                 \"table\":\"flags\",\"changes\"{changes}}}]}}\n"
            )
        );
        let gap = Delivery::Gap(3, 9);
        assert_eq!(
            gap.to_json(),
            "{\"seq\":9,\"gap\":{\"after\":3,\"to\":9}}\n"
        );
        assert!(gap.to_line().starts_with("9 gap: "));
    }

    #[test]
    fn only_what_is_watched_is_told() {
        let only = read(LINE, &table(Below::Path(b"b".to_vec()))).unwrap();
        assert_eq!(
            only.paths(Path::new("/ctl"), &[]),
            ["/ctl/app/flags/b"].map(OsString::from)
        );
        assert_eq!(read(LINE, &table(Below::Path(b"c".to_vec()))), None);
        assert_eq!(read(LINE, &table(Below::Schema)), None);
        let cleared = r#"{"seq":1,"begin":1,"time":"T","events":["cleared"],"changes":[{"path":"b","key":["b"],"kind":"deleted","old":{"name":"b"}}]}"#;
        assert_eq!(read(cleared, &table(Below::Path(b"c".to_vec()))), None);
        let told = read(cleared, &table(Below::Path(b"b".to_vec()))).unwrap();
        assert_eq!(
            told.to_line(),
            "1 T app/flags: cleared; app/flags/b: deleted with name \"b\"\n"
        );
        let many = r#"{"seq":1,"begin":1,"time":"T","events":["cleared"],"rows":5000}"#;
        let told = read(many, &table(Below::Path(b"c".to_vec()))).unwrap();
        assert_eq!(
            told.to_line(),
            "1 T app/flags: cleared; app/flags: 5000 rows changed\n"
        );
        assert_eq!(
            told.paths(Path::new("/ctl"), &[]),
            ["/ctl/app/flags"].map(OsString::from)
        );
        assert!(Transaction::from_line("app", "flags", b"{}", &[Target::All]).is_err());
    }

    #[test]
    fn parts_of_one_transaction_come_together() {
        let part = |table: &str, seq: u64| Transaction::vanished("app", table, seq, "T".into());
        let merged = merge(vec![part("a", 7), part("a", 9), part("b", 7)]);
        let told: Vec<String> = merged
            .into_iter()
            .map(|t| Delivery::Transaction(t).to_line())
            .collect();
        assert_eq!(
            told,
            [
                "7 T app/a: dropped; app/b: dropped\n",
                "9 T app/a: dropped\n"
            ]
        );
    }

    #[test]
    fn long_values_are_cut_for_people() {
        let long = Json::from("é".repeat(100));
        assert!(shown(&long).ends_with(" bytes)"), "{}", shown(&long));
        assert_eq!(shown(&json!({"omitted": 7})), "(7 bytes)");
    }
}
