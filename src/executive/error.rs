//! Why the executive did not do what it was asked. No message holds a value or a password.

use crate::ledger::OriginError;
use crate::model::{FamilyName, FieldName, FieldType, SchemaError, TableRef};

/// Why the executive did not do what it was asked. Nothing of a failed call was written, unless
/// the variant says otherwise.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ExecutiveError {
    /// The central database did not answer, refused, or said something unexpected.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// Other writers kept winning.
    #[error("{origin} refused the transaction because of other writers: {reason}; try again")]
    Conflict {
        /// The origin, without its password.
        origin: String,
        /// What the database said.
        reason: String,
    },
    /// The outcome of the commit is not known: the connection broke while it was under way.
    #[error(
        "the connection to {origin} broke during the commit ({reason}): the change may or may \
         not have been made; look, then repeat it"
    )]
    CommitUnknown {
        /// The origin, without its password.
        origin: String,
        /// What the system or server said.
        reason: String,
    },
    /// No such family.
    #[error("there is no family {0}")]
    NoFamily(FamilyName),
    /// No such table.
    #[error("there is no table {0}; 'ctlfs apply' creates tables")]
    NoTable(TableRef),
    /// A table that was to be created is there.
    #[error("the table {0} exists")]
    TableExists(TableRef),
    /// A field that was to be added is there.
    #[error("{table} has a field {field} of type {ty} already")]
    FieldExists {
        /// The table.
        table: TableRef,
        /// The field.
        field: FieldName,
        /// Its type at the origin.
        ty: FieldType,
    },
    /// A table at the origin that does not follow the rules for config tables.
    #[error("{table} at the origin is not a config table: {reason}")]
    ForeignTable {
        /// The table.
        table: TableRef,
        /// What is wrong with it.
        reason: String,
    },
    /// A table at the origin whose collation takes different keys for one.
    #[error(
        "{table} cannot be written: the origin finds a row of another key there, because its \
         key has the collation {collation}, which ignores case or trailing spaces; convert the \
         table to a binary collation (ALTER TABLE … CONVERT TO CHARACTER SET utf8mb4 COLLATE \
         utf8mb4_bin)"
    )]
    Collation {
        /// The table.
        table: TableRef,
        /// The key's collations.
        collation: String,
    },
    /// A schema that is not valid.
    #[error("{table}: {reason}")]
    Schema {
        /// The table.
        table: TableRef,
        /// What is wrong with it.
        reason: SchemaError,
    },
    /// A field that the table does not have.
    #[error("{table} has no field {field}; its fields are {fields}")]
    UnknownField {
        /// The table.
        table: TableRef,
        /// The field that was named.
        field: FieldName,
        /// The fields that exist.
        fields: String,
    },
    /// A field twice in one mutation.
    #[error("{table}: field {field} is given twice")]
    RepeatedField {
        /// The table.
        table: TableRef,
        /// The field.
        field: FieldName,
    },
    /// A row without all of its key.
    #[error("{table}: key field {field} is missing; every key field must be given")]
    MissingKey {
        /// The table.
        table: TableRef,
        /// The key field.
        field: FieldName,
    },
    /// A field in a deletion that is not part of the key.
    #[error("{table}: {field} is not a key field; a deletion names the key fields only")]
    NotAKey {
        /// The table.
        table: TableRef,
        /// The field.
        field: FieldName,
    },
    /// A value that the field cannot hold.
    #[error("{table}, field \"{field}\": {reason}")]
    BadValue {
        /// The table.
        table: TableRef,
        /// The field.
        field: FieldName,
        /// What is wrong with it, without the value.
        reason: String,
    },
    /// A row whose statement the ledger cannot hold.
    #[error(
        "a row of {table} is too large: its ledger statement has {bytes} bytes (bytes count \
         twice), and the ledger holds 16777215"
    )]
    StatementTooLong {
        /// The table.
        table: TableRef,
        /// The length of the statement.
        bytes: usize,
    },
}
