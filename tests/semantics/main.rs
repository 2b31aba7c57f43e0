//! One test for each promise of docs/SEMANTICS.md that shows only through a mount. The document
//! names them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

#[path = "../common"]
mod common {
    pub mod daemon;
    pub mod ledger;
}

mod access;
mod attributes;
mod change;
mod files;
mod foreign;

/// A table with a field of every type.
const EVERY_TYPE: &str = r#"CREATE TABLE app___types ("name" VARCHAR(191), "i" INTEGER, "d" REAL, "t" TEXT, "b" BLOB, "k" BLOB(255), PRIMARY KEY("name"));"#;
/// A small table.
const FLAGS: &str = r#"CREATE TABLE app___flags ("name" VARCHAR(191), "enabled" INTEGER, "note" TEXT, PRIMARY KEY("name"));"#;

/// The entry that gives a flag these values.
fn flag(name: &str, enabled: i64, note: &str) -> String {
    format!(
        "REPLACE INTO app___flags (\"name\",\"enabled\",\"note\") VALUES('{name}',{enabled},'{note}')"
    )
}
