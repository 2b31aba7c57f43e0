//! What the executive needs of a central database, and the tables that `init` makes there.

use crate::ledger::OriginError;
use crate::model::{FamilyName, Field, Seq, TableRef, TableSchema, Value};

use super::ExecutiveError;

/// Taken first by every transaction that appends, so that sequences become visible in order.
pub(super) const LOCK: &str = "UPDATE locks SET clock = clock + 1 WHERE id = 'ledger'";

/// Why a step did not succeed.
#[derive(Debug)]
pub(super) enum StepError {
    /// Another writer won; the whole transaction may be tried again.
    Conflict(String),
    /// Anything else.
    Failed(ExecutiveError),
}

impl From<ExecutiveError> for StepError {
    fn from(error: ExecutiveError) -> Self {
        StepError::Failed(error)
    }
}

impl From<OriginError> for StepError {
    fn from(error: OriginError) -> Self {
        StepError::Failed(error.into())
    }
}

pub(super) type Step<T> = Result<T, StepError>;

/// A change to the shape of a data table.
pub(super) enum Definition<'a> {
    /// A new table.
    Create(&'a TableSchema),
    /// A new field, NULL in every row.
    Add(&'a Field),
}

/// A central database: the ledger, the families and the data tables.
///
/// `begin` opens a transaction and takes the ledger's lock; everything up to `commit` or
/// `rollback` belongs to it, and is lost when the connection breaks.
pub(super) trait Central: Send {
    /// The database as a person may see it.
    fn describe(&self) -> String;

    /// Makes the central tables that are missing, and names them.
    fn init(&mut self) -> Step<Vec<&'static str>>;

    fn begin(&mut self) -> Step<()>;
    fn commit(&mut self) -> Step<()>;
    /// Ends the transaction without a trace; errors do not matter, the database forgets it anyway.
    fn rollback(&mut self);

    fn has_family(&mut self, family: &FamilyName) -> Step<bool>;
    fn add_family(&mut self, family: &FamilyName) -> Step<()>;

    /// The table's schema, as far as the ledger knows of it; `None` if there is no such table.
    fn schema(&mut self, table: &TableRef) -> Step<Option<TableSchema>>;

    /// The rows with these keys that exist, in no particular order, with every field. A row of
    /// another key is an error.
    fn rows(
        &mut self,
        table: &TableRef,
        schema: &TableSchema,
        keys: &[&[Value]],
    ) -> Step<Vec<Vec<Value>>>;

    /// Runs statements that change rows of data tables.
    fn write(&mut self, statements: &[String]) -> Step<()>;

    /// Appends statements, at least one, to the ledger; the sequence of the last.
    fn append(&mut self, statements: &[String]) -> Step<Seq>;

    /// Changes the shape of a data table, after the ledger entry that says so was appended.
    fn define(&mut self, table: &TableRef, definition: &Definition<'_>) -> Step<()>;
}

/// The tables of a central database, in both dialects.
pub(super) struct CentralTable {
    pub(super) name: &'static str,
    pub(super) mysql: &'static str,
    pub(super) sqlite: &'static str,
}

/// ctlstore's tables, but for a 64-bit sequence and a clock of microseconds in the ledger.
pub(super) const TABLES: [CentralTable; 7] = [
    CentralTable {
        name: "families",
        mysql: "id INTEGER AUTO_INCREMENT PRIMARY KEY, name VARCHAR(191) NOT NULL UNIQUE",
        sqlite: "id INTEGER PRIMARY KEY AUTOINCREMENT, name VARCHAR(191) NOT NULL UNIQUE",
    },
    CentralTable {
        name: "mutators",
        mysql: "writer VARCHAR(191) PRIMARY KEY, secret VARCHAR(255) NOT NULL, \
                cookie BLOB(1024) NOT NULL, clock BIGINT NOT NULL DEFAULT 0",
        sqlite: "writer VARCHAR(191) NOT NULL PRIMARY KEY, secret VARCHAR(255) NOT NULL, \
                 cookie BLOB(1024) NOT NULL, clock BIGINT NOT NULL DEFAULT 0",
    },
    CentralTable {
        name: "ctlstore_dml_ledger",
        mysql: "seq BIGINT AUTO_INCREMENT PRIMARY KEY, \
                leader_ts DATETIME(6) DEFAULT CURRENT_TIMESTAMP(6), statement MEDIUMTEXT NOT NULL",
        // AUTOINCREMENT: a sequence is never given twice, even if the last entries are removed.
        sqlite: "seq INTEGER PRIMARY KEY AUTOINCREMENT, \
                 leader_ts DATETIME DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')), \
                 statement MEDIUMTEXT NOT NULL",
    },
    CentralTable {
        name: "locks",
        mysql: "id VARCHAR(191) PRIMARY KEY, clock BIGINT NOT NULL DEFAULT 0",
        sqlite: "id VARCHAR(191) NOT NULL PRIMARY KEY, clock BIGINT NOT NULL DEFAULT 0",
    },
    CentralTable {
        name: "max_table_sizes",
        mysql: MAX_TABLE_SIZES,
        sqlite: MAX_TABLE_SIZES,
    },
    CentralTable {
        name: "max_writer_rates",
        mysql: MAX_WRITER_RATES,
        sqlite: MAX_WRITER_RATES,
    },
    CentralTable {
        name: "writer_usage",
        mysql: WRITER_USAGE,
        sqlite: WRITER_USAGE,
    },
];

const MAX_TABLE_SIZES: &str = "family_name VARCHAR(30) NOT NULL, table_name VARCHAR(50) NOT NULL, \
     warn_size_bytes BIGINT NOT NULL, max_size_bytes BIGINT NOT NULL, \
     PRIMARY KEY (family_name, table_name)";
const MAX_WRITER_RATES: &str =
    "writer_name VARCHAR(50) NOT NULL PRIMARY KEY, max_rows_per_minute BIGINT NOT NULL";
const WRITER_USAGE: &str = "writer_name VARCHAR(50) NOT NULL, bucket BIGINT NOT NULL, \
     amount BIGINT NOT NULL, PRIMARY KEY (writer_name, bucket)";

/// What `init` calls the ledger's row in `locks` when it had to be added.
pub(super) const LOCK_ROW: &str = "the ledger's lock";
