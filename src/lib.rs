//! ctlfs mounts replicated configuration as files.
//!
//! A ledger of changes (MySQL, or an SQLite file on one machine) is replayed into a local SQLite
//! file, the LDB, which is mounted as a directory tree over FUSE. `docs/ARCHITECTURE.md` tells how
//! and why; this is the map:
//!
//! | module | owns | knows nothing of |
//! | --- | --- | --- |
//! | [`model`] | names, types, values, schemas, changes | any IO |
//! | [`ledger`] | origins: reading entries; the text of statements | the LDB, the mount |
//! | [`executive`] | writing to an origin, in ctlstore's protocol | the LDB, the mount |
//! | [`ldb`] | the LDB: its SQL, capture of changes, reading | the ledger's databases, the mount |
//! | [`changelog`] | a file of changed rows, in ctlstore's format | SQL, the mount |
//! | [`reflector`] | the order in which entries reach the LDB | SQL, the mount |
//! | [`tree`] | names of keys, bytes of values, places, access | any IO |
//! | [`mount`] | the FUSE session and the kernel's caches | the ledger |
//! | [`daemon`] | starting, locking, stopping; puts the parts together | SQL |
//! | [`cli`], [`config`], [`status`] | commands, settings, `status.json` | SQL |

#![warn(missing_docs)]

pub mod changelog;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod executive;
mod hex;
pub mod ldb;
pub mod ledger;
pub mod model;
pub mod mount;
mod pace;
pub mod reflector;
mod sqlite;
pub mod status;
pub mod tree;
