//! ctlfs mounts replicated configuration as files.

#![warn(missing_docs)]

pub mod cli;
pub mod config;
pub mod daemon;
pub mod executive;
pub mod ldb;
pub mod ledger;
pub mod model;
pub mod mount;
pub mod reflector;
pub mod status;
pub mod tree;
