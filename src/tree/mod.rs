//! The tree that readers see: how keys become file names, values become bytes, and rules become
//! modes.
//!
//! Everything here is pure: it imports no fuser, rusqlite, mysql_async, tokio or clock, and does
//! no IO. `tests/architecture.rs` holds it to that.

pub mod access;
pub mod export;
pub mod name;
pub mod node;
pub mod render;
