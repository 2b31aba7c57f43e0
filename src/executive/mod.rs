//! The executive: writes families, tables and rows to a central database in ctlstore's protocol.
//!
//! Every transaction takes the ledger's lock first, so that sequences become visible in order;
//! then each change goes to the data table and, as the same text, to the ledger, all in one
//! transaction. Rows that are already as asked are not written. The calls block; none may be made
//! from async code. It never reads an LDB.

mod apply;
mod central;
mod check;
mod document;
mod embedded;
mod error;
mod mysql;

use std::collections::HashMap;
use std::time::Duration;

use crate::ledger::{BEGIN_MARKER, COMMIT_MARKER, OriginUrl, statement};
use crate::model::{FamilyName, Field, FieldName, Seq, TableRef, TableSchema, Value};

pub use apply::{Applied, ApplyError, Progress, apply, unhex};
use central::{Central, Definition, Step, StepError};
pub use check::{expected, stored};
pub use document::{Document, DocumentError};
pub use error::ExecutiveError;

/// How often a transaction that lost against another writer is tried.
const ATTEMPTS: u32 = 6;
/// The pause after the first lost attempt; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// A change to the rows of one table.
#[derive(Debug, Clone)]
pub enum Mutation {
    /// Makes the row what the values say; fields that are not named become NULL.
    Upsert {
        /// The table.
        table: TableRef,
        /// The values, all key fields among them.
        values: Vec<(FieldName, Value)>,
    },
    /// Changes the named fields of a row and keeps the others; in a new row they are NULL.
    Put {
        /// The table.
        table: TableRef,
        /// The values, all key fields among them.
        values: Vec<(FieldName, Value)>,
    },
    /// Removes a row.
    Delete {
        /// The table.
        table: TableRef,
        /// All key fields and nothing else.
        key: Vec<(FieldName, Value)>,
    },
}

impl Mutation {
    fn table(&self) -> &TableRef {
        match self {
            Mutation::Upsert { table, .. }
            | Mutation::Put { table, .. }
            | Mutation::Delete { table, .. } => table,
        }
    }
}

/// What became of one mutation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It was written.
    Written,
    /// The row was so already.
    Unchanged,
    /// There was no such row to delete.
    Missing,
}

/// What became of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The sequence of the last entry that was appended; `None` if nothing changed, and then
    /// nothing was written at all.
    pub seq: Option<Seq>,
    /// One effect per mutation, in their order.
    pub effects: Vec<Effect>,
}

impl Outcome {
    /// How many mutations had this effect.
    pub fn count(&self, effect: Effect) -> usize {
        self.effects.iter().filter(|e| **e == effect).count()
    }
}

/// A writer to one central database. It keeps its connection and prepared statements.
pub struct Executive {
    central: Box<dyn Central>,
}

impl Executive {
    /// A writer to the origin. Nothing is connected, opened or created yet.
    pub fn open(url: &OriginUrl) -> Result<Self, ExecutiveError> {
        Ok(Executive {
            central: match url {
                OriginUrl::MySql(url) => Box::new(mysql::MySqlCentral::new(url)?),
                OriginUrl::Sqlite(path) => Box::new(embedded::EmbeddedCentral::new(path)),
            },
        })
    }

    /// The origin as a person may see it: never with a password.
    pub fn describe(&self) -> String {
        self.central.describe()
    }

    /// Makes the central tables that are missing, and the embedded ledger's file (mode `0600`).
    /// Gives the names of what was made: none when everything was there.
    pub fn init(&mut self) -> Result<Vec<&'static str>, ExecutiveError> {
        let origin = self.describe();
        retry(&origin, || self.central.init())
    }

    /// Creates a family; `false` if it exists. Families leave no trace in the ledger.
    pub fn create_family(&mut self, family: &FamilyName) -> Result<bool, ExecutiveError> {
        self.transaction(|central| {
            if central.has_family(family)? {
                return Ok(Done::Nothing(false));
            }
            central.add_family(family)?;
            Ok(Done::Commit(true))
        })
    }

    /// Creates a table; its family must exist. The sequence of the ledger entry.
    pub fn create_table(
        &mut self,
        table: &TableRef,
        schema: &TableSchema,
    ) -> Result<Seq, ExecutiveError> {
        let text = statement::create_table(table, schema);
        self.transaction(|central| {
            if !central.has_family(&table.family)? {
                return Err(ExecutiveError::NoFamily(table.family.clone()).into());
            }
            if central.schema(table)?.is_some() {
                return Err(ExecutiveError::TableExists(table.clone()).into());
            }
            let seq = central.append(std::slice::from_ref(&text))?;
            central.define(table, &Definition::Create(schema))?;
            Ok(Done::Commit(seq))
        })
    }

    /// Adds a field, NULL in every row, to a table. The sequence of the ledger entry.
    pub fn add_field(&mut self, table: &TableRef, field: &Field) -> Result<Seq, ExecutiveError> {
        let text = statement::add_column(table, field);
        self.transaction(|central| {
            let schema = central
                .schema(table)?
                .ok_or_else(|| ExecutiveError::NoTable(table.clone()))?;
            if let Some(known) = schema.fields().iter().find(|f| f.name == field.name) {
                return Err(ExecutiveError::FieldExists {
                    table: table.clone(),
                    field: known.name.clone(),
                    ty: known.ty,
                }
                .into());
            }
            let seq = central.append(std::slice::from_ref(&text))?;
            central.define(table, &Definition::Add(field))?;
            Ok(Done::Commit(seq))
        })
    }

    /// A table's schema as the data table has it; `None` if there is no such table.
    pub fn schema(&mut self, table: &TableRef) -> Result<Option<TableSchema>, ExecutiveError> {
        self.transaction(|central| Ok(Done::Nothing(central.schema(table)?)))
    }

    /// Carries out the mutations in their order as one ledger transaction: all of them or none.
    pub fn mutate(&mut self, mutations: &[Mutation]) -> Result<Outcome, ExecutiveError> {
        self.transaction(|central| {
            let mut plan = Plan::read(central, mutations)?;
            let mut effects = Vec::with_capacity(mutations.len());
            for mutation in mutations {
                effects.push(plan.add(mutation)?);
            }
            let mut statements = plan.statements;
            if statements.is_empty() {
                return Ok(Done::Nothing(Outcome { seq: None, effects }));
            }
            central.write(&statements)?;
            if statements.len() > 1 {
                statements.insert(0, BEGIN_MARKER.into());
                statements.push(COMMIT_MARKER.into());
            }
            let seq = Some(central.append(&statements)?);
            Ok(Done::Commit(Outcome { seq, effects }))
        })
    }

    fn transaction<T>(
        &mut self,
        mut work: impl FnMut(&mut dyn Central) -> Step<Done<T>>,
    ) -> Result<T, ExecutiveError> {
        let central = self.central.as_mut();
        let origin = central.describe();
        retry(&origin, || {
            central.begin()?;
            match work(central) {
                Ok(Done::Commit(result)) => {
                    if let Err(e) = central.commit() {
                        central.rollback();
                        return Err(e);
                    }
                    Ok(result)
                }
                Ok(Done::Nothing(result)) => {
                    central.rollback();
                    Ok(result)
                }
                Err(e) => {
                    central.rollback();
                    Err(e)
                }
            }
        })
    }
}

/// How a transaction's work ended.
enum Done<T> {
    /// There is something to commit.
    Commit(T),
    /// Nothing was written.
    Nothing(T),
}

fn retry<T>(origin: &str, mut attempt: impl FnMut() -> Step<T>) -> Result<T, ExecutiveError> {
    let mut pause = FIRST_PAUSE;
    let mut tries = 1;
    loop {
        match attempt() {
            Ok(result) => return Ok(result),
            Err(StepError::Failed(e)) => return Err(e),
            Err(StepError::Conflict(reason)) if tries == ATTEMPTS => {
                return Err(ExecutiveError::Conflict {
                    origin: origin.to_owned(),
                    reason,
                });
            }
            Err(StepError::Conflict(_)) => {
                std::thread::sleep(pause);
                pause *= 2;
                tries += 1;
            }
        }
    }
}

/// What the mutations find in the data tables, and the statements they come to.
struct Plan {
    tables: HashMap<TableRef, PlannedTable>,
    statements: Vec<String>,
}

struct PlannedTable {
    schema: TableSchema,
    /// The rows that the mutations are about, as they stand so far.
    rows: HashMap<Vec<Value>, Vec<Value>>,
}

impl Plan {
    /// Reads the schemas and rows that the mutations are about, under the ledger's lock.
    fn read(central: &mut dyn Central, mutations: &[Mutation]) -> Step<Plan> {
        let mut tables: HashMap<TableRef, PlannedTable> = HashMap::new();
        let mut wanted: HashMap<TableRef, Vec<Vec<Value>>> = HashMap::new();
        for mutation in mutations {
            let table = mutation.table();
            if !tables.contains_key(table) {
                let schema = central
                    .schema(table)?
                    .ok_or_else(|| ExecutiveError::NoTable(table.clone()))?;
                let planned = PlannedTable {
                    schema,
                    rows: HashMap::new(),
                };
                tables.insert(table.clone(), planned);
            }
            let Some(planned) = tables.get(table) else {
                continue;
            };
            let key = match mutation {
                Mutation::Upsert { values, .. } | Mutation::Put { values, .. } => {
                    check::key(table, &planned.schema, values)?
                }
                Mutation::Delete { key, .. } => check::only_key(table, &planned.schema, key)?,
            };
            wanted.entry(table.clone()).or_default().push(key);
        }
        for (table, keys) in wanted {
            if let Some(planned) = tables.get_mut(&table) {
                let keys: Vec<&[Value]> = keys.iter().map(Vec::as_slice).collect();
                for row in central.rows(&table, &planned.schema, &keys)? {
                    planned
                        .rows
                        .insert(check::key_of(&planned.schema, &row), row);
                }
            }
        }
        Ok(Plan {
            tables,
            statements: Vec::new(),
        })
    }

    fn add(&mut self, mutation: &Mutation) -> Result<Effect, ExecutiveError> {
        let table = mutation.table();
        let Some(planned) = self.tables.get_mut(table) else {
            return Err(ExecutiveError::NoTable(table.clone()));
        };
        let schema = &planned.schema;
        let text = match mutation {
            Mutation::Upsert { values, .. } | Mutation::Put { values, .. } => {
                let key = check::key(table, schema, values)?;
                let before = planned.rows.get(&key);
                let keep = match mutation {
                    Mutation::Put { .. } => before,
                    _ => None,
                };
                let row = check::row(table, schema, values, keep.map(Vec::as_slice))?;
                if before == Some(&row) {
                    return Ok(Effect::Unchanged);
                }
                let text = statement::replace(table, schema, &row);
                planned.rows.insert(key, row);
                text
            }
            Mutation::Delete { key, .. } => {
                let key = check::only_key(table, schema, key)?;
                if planned.rows.remove(&key).is_none() {
                    return Ok(Effect::Missing);
                }
                statement::delete(table, schema, &key)
            }
        };
        check::length(table, &text)?;
        self.statements.push(text);
        Ok(Effect::Written)
    }
}
