//! Section 12 of docs/SEMANTICS.md: what those hear who watch the tree with inotify.
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
    pub mod watcher;
}

mod events;
mod life;
mod storm;

/// A small table.
const FLAGS: &str = r#"CREATE TABLE app___flags ("name" VARCHAR(191), "enabled" INTEGER, "note" TEXT, PRIMARY KEY("name"));"#;

/// The entry that gives a flag these values.
fn flag(name: &str, enabled: i64, note: &str) -> String {
    format!(
        "REPLACE INTO app___flags (\"name\",\"enabled\",\"note\") VALUES('{name}',{enabled},'{note}')"
    )
}
