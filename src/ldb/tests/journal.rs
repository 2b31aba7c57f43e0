//! The journal: what it tells of a transaction, how long, and that it is complete from its floor on.

use std::fmt::Write as _;

use serde_json::{Value as Json, json};

use super::*;
use crate::ldb::reader::Reader;
use crate::ldb::recorder::{MAX_BYTES, MAX_ROWS, MAX_TRANSACTIONS, REST_TRANSACTIONS};

const BLOBS: &str = r#"CREATE TABLE app___blobs ("k" BLOB(255), "n" INTEGER, "d" REAL, "b" BLOB, "t" TEXT, PRIMARY KEY("k","n"));"#;

impl Fixture {
    /// The lines of a table's journal: the floor, and what comes behind it.
    fn journal(&self, table: &str) -> (u64, Vec<Json>) {
        let mut reader = Reader::open(&self.path()).unwrap();
        let catalog = reader.catalog().unwrap().value;
        let table = catalog.get(&table.parse().unwrap()).unwrap();
        let text = reader.journal(table).unwrap();
        assert_eq!(text.seq.get(), self.writer.position().seq.get());
        let text = String::from_utf8(text.value).unwrap();
        assert!(text.ends_with('\n'));
        let mut lines = text
            .lines()
            .map(|l| serde_json::from_str::<Json>(l).unwrap());
        let floor = lines.next().unwrap()["floor"].as_u64().unwrap();
        let lines: Vec<Json> = lines.collect();
        assert!(
            lines.is_sorted_by_key(|l| l["seq"].as_u64().unwrap()),
            "not ascending"
        );
        (floor, lines)
    }

    fn lines(&self, table: &str) -> Vec<Json> {
        self.journal(table).1
    }
}

#[test]
fn each_transaction_has_a_line_with_old_and_new_values() {
    let mut fixture = Fixture::with(&[FLAGS]);
    fixture
        .apply(&[
            r#"REPLACE INTO app___flags ("name","on","note") VALUES('a/b',1,'x')"#,
            "--- BEGIN",
            r#"REPLACE INTO app___flags ("name","on","note") VALUES('a/b',1,NULL)"#,
            r#"REPLACE INTO app___flags ("name","on","note") VALUES('new',NULL,'')"#,
            r#"REPLACE INTO app___flags ("name","on","note") VALUES('gone',1,'')"#,
            r#"DELETE FROM app___flags WHERE "name" = 'gone'"#,
            "--- COMMIT",
            r#"UPDATE app___flags SET "on" = 9223372036854775807 WHERE "name" = 'new'"#,
            r#"DELETE FROM app___flags WHERE "name" = 'a/b'"#,
            r#"DELETE FROM app___flags WHERE "name" = 'never there'"#,
            r#"REPLACE INTO app___flags ("name","on","note") VALUES('new',9223372036854775807,'')"#,
        ])
        .unwrap();
    let (floor, lines) = fixture.journal("app/flags");
    assert_eq!(floor, 0);
    assert_eq!(
        lines,
        [
            json!({"seq":1,"begin":1,"time":"1970-01-01T00:00:01.000000Z","events":["created"]}),
            json!({"seq":2,"begin":2,"time":"1970-01-01T00:00:02.000000Z","changes":[
                {"path":"a%2Fb","key":["a/b"],"kind":"created",
                 "new":{"name":"a/b","on":1,"note":"x"}}]}),
            json!({"seq":8,"begin":3,"time":"1970-01-01T00:00:08.000000Z","changes":[
                {"path":"a%2Fb","key":["a/b"],"kind":"updated","old":{"note":"x"},"new":{"note":null}},
                {"path":"new","key":["new"],"kind":"created",
                 "new":{"name":"new","on":null,"note":""}}]}),
            json!({"seq":9,"begin":9,"time":"1970-01-01T00:00:09.000000Z","changes":[
                {"path":"new","key":["new"],"kind":"updated","old":{"on":null},
                 "new":{"on":9223372036854775807_i64}}]}),
            json!({"seq":10,"begin":10,"time":"1970-01-01T00:00:10.000000Z","changes":[
                {"path":"a%2Fb","key":["a/b"],"kind":"deleted",
                 "old":{"name":"a/b","on":1,"note":null}}]}),
        ]
    );
}

#[test]
fn values_have_the_form_of_row_json() {
    let mut fixture = Fixture::with(&[BLOBS]);
    let long = "y".repeat(100);
    fixture
        .apply(&[
            &format!(
                r#"REPLACE INTO app___blobs ("k","n","d","b","t") VALUES(x'00ff',7,0.25,x'0001','{long}')"#
            ),
            r#"REPLACE INTO app___blobs ("k","n","d","b","t") VALUES(x'00ff',7,1.0,NULL,'short')"#,
        ])
        .unwrap();
    let lines = fixture.lines("app/blobs");
    assert_eq!(
        lines[1]["changes"],
        json!([{"path":"0x00ff/7","key":["AP8=",7],"kind":"created",
                "new":{"k":"AP8=","n":7,"d":0.25,"b":"AAE=","t":long}}])
    );
    assert_eq!(
        lines[2]["changes"],
        json!([{"path":"0x00ff/7","key":["AP8=",7],"kind":"updated",
                "old":{"d":0.25,"b":"AAE=","t":long},
                "new":{"d":1.0,"b":null,"t":"short"}}])
    );
}

#[test]
fn paths_that_are_no_utf8_are_told_exactly() {
    let mut fixture = Fixture::with(&[FLAGS]);
    fixture
        .apply(&[r#"INSERT INTO app___flags ("name") VALUES(CAST(x'61ff' AS TEXT))"#])
        .unwrap();
    let change = &fixture.lines("app/flags")[1]["changes"][0];
    assert_eq!(change["path"], Json::Null);
    assert_eq!(change["path_base64"], "Yf8=");
}

#[test]
fn many_rows_are_counted_and_clears_and_shapes_told() {
    let mut fixture = Fixture::with(&[LIMITS]);
    let many = |from: usize, n: usize| {
        format!(
            "WITH RECURSIVE c(i) AS (SELECT {from} UNION ALL SELECT i + 1 FROM c WHERE i < {}) \
             REPLACE INTO app___limits SELECT i, i FROM c",
            from + n - 1
        )
    };
    fixture
        .apply(&[
            &many(0, MAX_ROWS),
            &many(0, MAX_ROWS + 1),
            // Half of them replaced, with other values.
            "UPDATE app___limits SET n = n + 1",
            "DELETE FROM app___limits",
            &many(0, 2),
            "DELETE FROM app___limits",
            "DELETE FROM app___limits",
            "ALTER TABLE app___limits ADD COLUMN \"c\" TEXT",
            "--- BEGIN",
            "REPLACE INTO app___limits (\"id\",\"n\",\"c\") VALUES(1,1,'c')",
            "DROP TABLE IF EXISTS app___limits",
            LIMITS,
            "--- COMMIT",
        ])
        .unwrap();
    let lines = fixture.lines("app/limits");
    let rows: Vec<_> = lines.iter().map(|l| l["rows"].as_u64()).collect();
    let listed: Vec<_> = lines
        .iter()
        .map(|l| l["changes"].as_array().map(Vec::len))
        .collect();
    let events: Vec<_> = lines.iter().map(|l| l["events"].clone()).collect();
    let max = u64::try_from(MAX_ROWS).unwrap();
    assert_eq!(
        rows,
        [
            None,
            None,
            Some(max + 1),
            Some(max + 1),
            Some(max + 1),
            None,
            None,
            None,
            Some(1)
        ]
    );
    assert_eq!(
        listed,
        [
            None,
            Some(MAX_ROWS),
            None,
            None,
            None,
            Some(2),
            Some(2),
            None,
            None
        ]
    );
    let none = Json::Null;
    assert_eq!(
        events,
        [
            json!(["created"]),
            none.clone(),
            none.clone(),
            none.clone(),
            json!(["cleared"]),
            none,
            json!(["cleared"]),
            json!(["altered"]),
            json!(["dropped", "created"]),
        ]
    );
}

#[test]
fn long_values_that_do_not_fit_are_told_by_their_length() {
    let mut fixture = Fixture::with(&[FLAGS]);
    let big = "z".repeat(700_000);
    let row = |name: &str, note: &str| {
        format!(r#"REPLACE INTO app___flags ("name","on","note") VALUES('{name}',1,'{note}')"#)
    };
    fixture
        .apply(&[
            "--- BEGIN",
            &row("a", &big),
            &row("b", &big),
            "--- COMMIT",
            // Kept in full where it goes and not where it comes back: the same value all the same.
            &row("a", &big),
            &row("b", "small"),
        ])
        .unwrap();
    let lines = fixture.lines("app/flags");
    assert_eq!(lines[1]["changes"][0]["new"]["note"], big);
    assert_eq!(
        lines[1]["changes"][1]["new"],
        json!({"name":"b","on":1,"note":{"omitted":700_000}})
    );
    assert_eq!(lines.len(), 3, "{:?}", lines[2]);
    assert_eq!(
        lines[2]["changes"],
        json!([{"path":"b","key":["b"],"kind":"updated","old":{"note":big},"new":{"note":"small"}}])
    );
}

#[test]
fn rows_without_a_key_of_their_own_are_counted() {
    let mut fixture = Fixture::with(&[FLAGS]);
    fixture
        .apply(&[r#"INSERT INTO app___flags ("name","on") VALUES(NULL,1),(NULL,1)"#])
        .unwrap();
    assert_eq!(fixture.lines("app/flags")[1]["rows"], 2);
}

#[test]
fn the_journal_is_bounded_and_complete_from_its_floor_on() {
    let mut fixture = Fixture::with(&[LIMITS, FLAGS]);
    let row = |i: usize| format!(r#"REPLACE INTO app___limits ("id","n") VALUES({i},{i})"#);
    let check = |fixture: &mut Fixture, least: usize, most: usize| {
        let (floor, lines) = fixture.journal("app/limits");
        assert!((least..=most).contains(&lines.len()), "{}", lines.len());
        // Every entry was a transaction with an effect.
        assert_eq!(lines[0]["seq"], floor + 1);
        let kept = u64::try_from(lines.len()).unwrap();
        assert_eq!(floor + kept, fixture.writer.position().seq.get());
        // Opened anew it goes on the same way.
        fixture.writer = LdbWriter::open(&fixture.path()).unwrap();
        assert_eq!(fixture.journal("app/limits").0, floor);
    };
    let mut next = 0;
    let mut batch = |fixture: &mut Fixture, count: usize| {
        let statements: Vec<String> = (next..next + count).map(row).collect();
        let statements: Vec<&str> = statements.iter().map(String::as_str).collect();
        fixture.apply(&statements).unwrap();
        next += count;
    };
    batch(&mut fixture, MAX_TRANSACTIONS - 10);
    for _ in 0..300 {
        batch(&mut fixture, 1);
    }
    // Whole segments go.
    check(&mut fixture, MAX_TRANSACTIONS - 300, MAX_TRANSACTIONS);
    batch(&mut fixture, MAX_TRANSACTIONS);
    check(&mut fixture, MAX_TRANSACTIONS, MAX_TRANSACTIONS);
    // More than the journal takes in one commit.
    batch(&mut fixture, MAX_TRANSACTIONS + 1);
    check(&mut fixture, REST_TRANSACTIONS, REST_TRANSACTIONS);
    batch(&mut fixture, 5);
    check(&mut fixture, REST_TRANSACTIONS + 5, REST_TRANSACTIONS + 5);
    assert_eq!(fixture.lines("app/flags"), [Json::Null; 0]);
}

#[test]
fn the_journal_is_bounded_in_bytes() {
    let mut fixture = Fixture::with(&[FLAGS]);
    // Control bytes take six times their room in JSON.
    let note = "\u{1}".repeat(100_000);
    let mut last = 0;
    for round in 0..3 {
        let mut statements = Vec::new();
        for i in 0..20 {
            statements.push(format!(
                r#"REPLACE INTO app___flags ("name","on","note") VALUES('{round}-{i}',1,'{note}')"#
            ));
        }
        let statements: Vec<&str> = statements.iter().map(String::as_str).collect();
        fixture.apply(&statements).unwrap();
        let (floor, lines) = fixture.journal("app/flags");
        let bytes: usize = lines.iter().map(|l| l.to_string().len()).sum();
        assert!(bytes <= MAX_BYTES, "{bytes}");
        assert!(bytes > MAX_BYTES / 2 || round == 0, "{bytes}");
        assert_eq!(lines[0]["seq"], floor + 1);
        assert!(floor >= last);
        last = floor;
    }
}

#[test]
fn a_batch_that_is_taken_back_leaves_no_line() {
    let mut fixture = Fixture::with(&[FLAGS, LIMITS]);
    let row = r#"REPLACE INTO app___limits ("id","n") VALUES(1,1)"#;
    {
        let mut batch = fixture.writer.begin().unwrap();
        batch.apply(&entry(3, row)).unwrap();
        batch.finish().unwrap();
        batch.rollback();
    }
    fixture
        .apply(&[
            "REPLACE INTO app___limits (\"id\",\"n\") VALUES(2,2)",
            "nonsense",
        ])
        .unwrap_err();
    fixture.apply(&[row]).unwrap();
    let lines = fixture.lines("app/limits");
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[1]["changes"][0]["key"], json!([1]));
}

#[test]
fn an_ldb_that_was_moved_without_its_journal_begins_a_new_one() {
    let mut fixture = Fixture::with(&[FLAGS, LIMITS]);
    fixture
        .reader()
        .execute_batch("UPDATE _ldb_seq SET seq = 40")
        .unwrap();
    // Before ctlfs takes it over again, it is known not to be complete.
    let mut reader = Reader::open(&fixture.path()).unwrap();
    let catalog = reader.catalog().unwrap().value;
    let table = catalog.get(&"app/flags".parse().unwrap()).unwrap();
    assert_eq!(reader.journal(table).unwrap().value, b"{\"floor\":40}\n");
    fixture.writer = LdbWriter::open(&fixture.path()).unwrap();
    assert_eq!(fixture.journal("app/flags"), (40, vec![]));
    fixture.next = 41;
    fixture
        .apply(&[r#"REPLACE INTO app___limits ("id","n") VALUES(1,1)"#])
        .unwrap();
    assert_eq!(fixture.journal("app/limits").0, 40);
    assert_eq!(fixture.lines("app/limits").len(), 1);
}

#[test]
fn what_is_told_leads_from_one_state_to_the_next() {
    // Random statements over few rows, in transactions of random size; the lines, applied to what
    // was there before, make what is there after.
    let mut seed = 7_u64;
    let mut below = |n: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % n
    };
    let mut fixture = Fixture::with(&[LIMITS]);
    let mut told = std::collections::BTreeMap::new();
    for _ in 0..60 {
        let mut statements = Vec::new();
        for _ in 0..=below(4) {
            let marked = below(2) == 0;
            let mut add = |s: &str| statements.push(s.to_owned());
            if marked {
                add("--- BEGIN");
            }
            for _ in 0..if marked { 1 + below(30) } else { 1 } {
                let (id, n) = (below(25), below(3));
                let mut text = String::new();
                let _ = match below(4) {
                    0 => write!(text, r#"DELETE FROM app___limits WHERE "id" = {id}"#),
                    1 => write!(text, "UPDATE app___limits SET n = {n} WHERE id < {id}"),
                    2 => write!(
                        text,
                        "UPDATE app___limits SET id = id + 100 WHERE id = {id}"
                    ),
                    _ => write!(
                        text,
                        r#"REPLACE INTO app___limits ("id","n") VALUES({id},{n})"#
                    ),
                };
                add(&text);
            }
            if marked {
                add("--- COMMIT");
            }
        }
        let statements: Vec<&str> = statements.iter().map(String::as_str).collect();
        let position = fixture.writer.position().seq.get();
        if fixture.apply(&statements).is_err() {
            // A row was moved onto another.
            continue;
        }
        for line in fixture.lines("app/limits") {
            if line["seq"].as_u64().unwrap() <= position {
                continue;
            }
            for change in line["changes"].as_array().unwrap() {
                let key = change["key"][0].as_i64().unwrap();
                let old = told.get(&key).cloned();
                match change["kind"].as_str().unwrap() {
                    "created" => assert_eq!(old, None),
                    "updated" => assert_eq!(old, change["old"]["n"].as_i64()),
                    _ => assert_eq!(old, change["old"]["n"].as_i64()),
                }
                match change["new"]["n"].as_i64() {
                    Some(n) => told.insert(key, n),
                    None => told.remove(&key),
                };
            }
        }
        let shown: Vec<String> = told.iter().map(|(k, n)| format!("{k}|{n}")).collect();
        assert_eq!(
            fixture.rows("SELECT id, n FROM app___limits ORDER BY id"),
            shown
        );
    }
}
