//! ctlfs mounts replicated configuration as files.

#![warn(missing_docs)]

pub mod cli;
pub mod executive;
pub mod ledger;
pub mod model;
pub mod reflector;
pub mod status;
