//! A central database of either kind, for tests that run the same scenario against both.
#![allow(dead_code)]

use ctlfs::executive::Executive;
use ctlfs::ledger::{self, Entry, Origin, OriginUrl};
use ctlfs::model::Seq;
use rusqlite::Connection;

use super::mariadb::{self, TestDatabase};

/// A place for a central database.
pub enum Place {
    /// An embedded ledger, as `ledger.db` in the directory.
    Embedded(tempfile::TempDir),
    /// A database on a server.
    MySql(TestDatabase),
}

impl Place {
    pub fn url(&self) -> OriginUrl {
        match self {
            Place::Embedded(dir) => OriginUrl::sqlite(&dir.path().join("ledger.db")).unwrap(),
            Place::MySql(database) => database.url().parse().unwrap(),
        }
    }

    pub fn executive(&self) -> Executive {
        Executive::open(&self.url()).unwrap()
    }

    pub fn origin(&self) -> Box<dyn Origin> {
        ledger::open(&self.url()).unwrap()
    }

    /// Everything in the ledger.
    pub fn entries(&self) -> Vec<Entry> {
        let mut origin = self.origin();
        let mut all: Vec<Entry> = Vec::new();
        loop {
            let from = all.last().map_or(Seq::ZERO, |e| e.seq).next();
            let more = origin.fetch(from).unwrap();
            if more.is_empty() {
                return all;
            }
            all.extend(more);
        }
    }

    pub fn statements(&self) -> Vec<String> {
        self.entries().into_iter().map(|e| e.statement).collect()
    }

    pub fn run(&self, sql: &str) {
        match self {
            Place::Embedded(dir) => Connection::open(dir.path().join("ledger.db"))
                .unwrap()
                .execute_batch(sql)
                .unwrap(),
            Place::MySql(database) => database.run(sql),
        }
    }
}

pub fn on_both(scenario: impl Fn(&Place)) {
    scenario(&Place::Embedded(tempfile::tempdir().unwrap()));
    scenario(&Place::MySql(mariadb::database()));
}
