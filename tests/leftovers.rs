//! What the writer path does on a server where something went wrong half way: DDL without its ledger
//! entry, answers that get lost, and tables whose collation is not ours.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::central::Place;
use common::mariadb::{self, TestDatabase};
use common::proxy;
use ctlfs::executive::{Effect, Executive, ExecutiveError, Mutation};
use ctlfs::model::{Field, FieldName, FieldType, TableRef, TableSchema, Value};

fn table() -> TableRef {
    "app/flags".parse().unwrap()
}

fn name(name: &str) -> FieldName {
    name.parse().unwrap()
}

fn note() -> Field {
    Field {
        name: name("note"),
        ty: FieldType::Text,
    }
}

fn flags() -> TableSchema {
    let key = Field {
        name: name("name"),
        ty: FieldType::String,
    };
    let enabled = Field {
        name: name("enabled"),
        ty: FieldType::Integer,
    };
    TableSchema::new(vec![key, enabled], &[name("name")]).unwrap()
}

fn put(key: &str) -> Mutation {
    Mutation::Put {
        table: table(),
        values: vec![
            (name("name"), Value::text(key)),
            (name("enabled"), Value::Integer(1)),
        ],
    }
}

fn delete(key: &str) -> Mutation {
    Mutation::Delete {
        table: table(),
        key: vec![(name("name"), Value::text(key))],
    }
}

/// A central database with the family `app`.
fn place() -> Place {
    let place = Place::MySql(mariadb::database());
    let mut executive = place.executive();
    executive.init().unwrap();
    executive.create_family(&"app".parse().unwrap()).unwrap();
    place
}

fn database(place: &Place) -> &TestDatabase {
    match place {
        Place::MySql(database) => database,
        Place::Embedded(_) => unreachable!(),
    }
}

/// A writer that never gets the first answer to `statement`.
fn unlucky(place: &Place, statement: &'static str) -> Executive {
    let url = database(place).url();
    let (user, rest) = url.split_once('@').unwrap();
    let (server, database) = rest.split_once('/').unwrap();
    let proxy = proxy::losing_the_answer_to(server, statement);
    Executive::open(&format!("{user}@{proxy}/{database}").parse().unwrap()).unwrap()
}

fn columns(place: &Place) -> usize {
    database(place)
        .query(
            "SELECT column_name FROM information_schema.columns \
             WHERE table_schema = DATABASE() AND table_name = 'app___flags'",
        )
        .len()
}

/// Every statement of the ledger, as every host would apply it.
fn replay(place: &Place) -> rusqlite::Connection {
    let ldb = rusqlite::Connection::open_in_memory().unwrap();
    for statement in place.statements() {
        ldb.execute_batch(&statement).unwrap();
    }
    ldb
}

#[test]
fn a_failed_ddl_leaves_no_trace() {
    let place = place();
    let mut executive = place.executive();
    // Seven strings make a key of more bytes than InnoDB indexes.
    let names: Vec<FieldName> = (0..7).map(|i| name(&format!("k{i}"))).collect();
    let fields = names.iter().map(|n| Field {
        name: n.clone(),
        ty: FieldType::String,
    });
    let wide = TableSchema::new(fields.collect(), &names).unwrap();
    executive.create_table(&table(), &wide).unwrap_err();
    assert!(place.statements().is_empty());
    assert_eq!(columns(&place), 0);
}

#[test]
fn a_table_whose_ledger_entry_was_lost_is_made_again() {
    let place = place();
    let lost = unlucky(
        &place,
        "ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE",
    )
    .create_table(&table(), &flags());
    assert!(matches!(lost, Err(ExecutiveError::Origin(_))), "{lost:?}");
    assert!(place.statements().is_empty());
    assert_eq!(columns(&place), 2, "the server did not get the statement");

    let mut executive = place.executive();
    assert_eq!(executive.schema(&table()).unwrap(), None);
    let early = executive.mutate(&[put("a")]);
    assert!(
        matches!(early, Err(ExecutiveError::NoTable(_))),
        "{early:?}"
    );
    executive.create_table(&table(), &flags()).unwrap();
    executive.mutate(&[put("a")]).unwrap();
    assert_eq!(place.executive().schema(&table()).unwrap(), Some(flags()));
    let again = executive.create_table(&table(), &flags());
    assert!(matches!(again, Err(ExecutiveError::TableExists(_))));
    replay(&place);
}

#[test]
fn a_field_whose_ledger_entry_was_lost_is_made_again() {
    let place = place();
    let mut executive = place.executive();
    executive.create_table(&table(), &flags()).unwrap();
    executive.mutate(&[put("a")]).unwrap();
    let lost = unlucky(
        &place,
        "ALTER TABLE app___flags ADD COLUMN \"note\" MEDIUMTEXT",
    )
    .add_field(&table(), &note());
    assert!(matches!(lost, Err(ExecutiveError::Origin(_))), "{lost:?}");
    assert_eq!(columns(&place), 3, "the server did not get the statement");

    assert_eq!(executive.schema(&table()).unwrap(), Some(flags()));
    executive.mutate(&[put("b")]).unwrap();
    replay(&place);
    executive.add_field(&table(), &note()).unwrap();
    executive.mutate(&[put("c")]).unwrap();
    assert_eq!(columns(&place), 3);
    let rows: i64 = replay(&place)
        .query_row(
            "SELECT COUNT(*) FROM app___flags WHERE note IS NULL",
            [],
            |r| r.get(0),
        )
        .unwrap();
    assert_eq!(rows, 3);
}

#[test]
fn a_commit_whose_answer_was_lost_is_unknown_and_undoes_nothing() {
    let place = place();
    let lost = unlucky(&place, "\u{3}COMMIT").create_table(&table(), &flags());
    assert!(
        matches!(lost, Err(ExecutiveError::CommitUnknown { .. })),
        "{lost:?}"
    );
    assert_eq!(place.statements().len(), 1);
    let mut executive = place.executive();
    assert_eq!(executive.schema(&table()).unwrap(), Some(flags()));
    executive.mutate(&[put("a")]).unwrap();
    replay(&place);
}

#[test]
fn tables_stay_when_the_ledger_is_shortened_or_when_they_hold_rows() {
    let place = place();
    let mut executive = place.executive();
    executive.create_table(&table(), &flags()).unwrap();
    executive.mutate(&[put("a")]).unwrap();
    executive.mutate(&[put("b")]).unwrap();
    place.run("DELETE FROM ctlstore_dml_ledger WHERE seq < 3");
    assert_eq!(executive.schema(&table()).unwrap(), Some(flags()));
    // As if it never had been there, but rows cannot have come from nowhere.
    place.run("UPDATE ctlstore_dml_ledger SET seq = 1");
    place.run("ALTER TABLE app___flags MODIFY \"enabled\" BIGINT COMMENT 'ctlfs ledger 99'");
    assert_eq!(executive.schema(&table()).unwrap(), Some(flags()));
    place.run("ALTER TABLE app___flags MODIFY \"name\" VARCHAR(191) COMMENT 'ctlfs ledger 99'");
    assert_eq!(executive.schema(&table()).unwrap(), Some(flags()));
}

#[test]
fn a_key_that_the_collation_takes_for_another_is_refused() {
    let place = place();
    place.run(
        "CREATE TABLE app___flags (\"name\" VARCHAR(191), \"enabled\" BIGINT, \
         PRIMARY KEY (\"name\")) DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci",
    );
    let mut executive = place.executive();
    executive.mutate(&[put("a")]).unwrap();
    let length = place.statements().len();
    for confused in [put("A"), delete("A"), put("a ")] {
        let error = executive.mutate(&[confused]).unwrap_err();
        assert!(matches!(error, ExecutiveError::Collation { .. }), "{error}");
        assert!(error.to_string().contains("utf8mb4_general_ci"), "{error}");
    }
    assert_eq!(place.statements().len(), length);
    let outcome = executive.mutate(&[put("b"), delete("a")]).unwrap();
    assert_eq!(outcome.effects, [Effect::Written, Effect::Written]);
}
