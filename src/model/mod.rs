//! The vocabulary of ctlfs: names, types, values, schemas, rows and changes.
//!
//! Everything here is pure: it imports no fuser, rusqlite, mysql_async, tokio or clock. What has
//! passed a constructor of this module is valid; the rest of the crate does not check it again.

mod catalog;
mod change;
mod name;
mod seq;
mod time;
mod value;

pub use catalog::{Catalog, Field, FieldType, SchemaError, Table, TableSchema};
pub use change::{ChangeSet, DirChange, Extent, FieldSet, RowChange, RowKind, TableChange};
pub use name::{FamilyName, FieldName, NameError, TableName, TableRef};
pub use seq::Seq;
pub use time::LedgerTime;
pub use value::{Key, Value};
