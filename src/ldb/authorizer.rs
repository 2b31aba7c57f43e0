//! What a ledger statement may do: change rows and shapes of config tables, nothing else.
//!
//! SQLite asks the authorizer while it compiles a statement. Outside of [`Guard::enter`] the
//! statements are the writer's own and everything is allowed. The guard also notes what a
//! statement is about to touch, and stops one that runs too long.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};

use crate::model::TableRef;

/// Virtual machine steps between two looks at the clock.
const STEPS: i32 = 20_000;

/// Built-in functions whose result depends on nothing but their arguments.
const FUNCTIONS: &[&str] = &[
    "abs",
    "avg",
    "char",
    "coalesce",
    "concat",
    "concat_ws",
    "count",
    "format",
    "glob",
    "group_concat",
    "hex",
    "if",
    "ifnull",
    "iif",
    "instr",
    "json",
    "json_array",
    "json_array_length",
    "json_extract",
    "json_insert",
    "json_object",
    "json_patch",
    "json_quote",
    "json_remove",
    "json_replace",
    "json_set",
    "json_type",
    "json_valid",
    "->",
    "->>",
    "length",
    "like",
    "likelihood",
    "likely",
    "lower",
    "ltrim",
    "max",
    "min",
    "nullif",
    "octet_length",
    "printf",
    "quote",
    "replace",
    "round",
    "rtrim",
    "sign",
    "string_agg",
    "substr",
    "substring",
    "sum",
    "total",
    "trim",
    "typeof",
    "unhex",
    "unicode",
    "unistr",
    "unistr_quote",
    "unlikely",
    "upper",
    "zeroblob",
];

/// The tables that hold SQLite's schema, under all their names.
const SCHEMA_TABLES: [&str; 4] = [
    "sqlite_master",
    "sqlite_schema",
    "sqlite_temp_master",
    "sqlite_temp_schema",
];

/// What the compilation of a ledger statement has shown.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// What it may not do.
    pub(super) refused: Option<String>,
    /// Whether it creates, alters or drops a table.
    pub(super) reshapes: Option<Reshape>,
    /// Which ones.
    pub(super) reshaped: Vec<String>,
    /// Tables it writes whose changes are not captured yet.
    pub(super) unarmed: Vec<String>,
    /// What it reads no column of and names without a database: a subquery, or a table.
    pub(super) unknown: Vec<String>,
}

/// How a statement changes the schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reshape {
    Create,
    Alter,
    Drop,
}

/// Whether a statement may read what [`Notes::unknown`] names: a subquery or a config table.
pub(super) fn may_read(conn: &Connection, name: &str) -> rusqlite::Result<bool> {
    let lower = name.to_ascii_lowercase();
    // These tables are in no schema.
    if lower.starts_with("sqlite_") || lower.starts_with("pragma_") {
        return Ok(false);
    }
    conn.prepare_cached(
        "SELECT name FROM main.sqlite_schema WHERE name = ?1 COLLATE NOCASE
         UNION ALL SELECT name FROM temp.sqlite_schema WHERE name = ?1 COLLATE NOCASE
         UNION ALL SELECT name FROM pragma_module_list WHERE name = ?1 COLLATE NOCASE",
    )?
    .query_map([name], |row| row.get::<_, String>(0))?
    .try_fold(true, |all, found| {
        Ok(all && TableRef::from_sql_name(&found?).is_some())
    })
}

/// Holds a connection's authorizer and progress handler.
#[derive(Clone)]
pub(super) struct Guard(Arc<Shared>);

struct Shared {
    on: AtomicBool,
    rules: Mutex<Rules>,
    epoch: Instant,
    /// Milliseconds since `epoch` at which the running statement is stopped.
    deadline: AtomicU64,
    stop: Mutex<Option<Arc<AtomicBool>>>,
}

#[derive(Default)]
struct Rules {
    trigger_prefix: String,
    armed: HashSet<String>,
    notes: Notes,
}

impl Guard {
    /// Installs the hooks. Our own triggers are those whose names begin with `trigger_prefix`.
    pub(super) fn install(conn: &mut Connection, trigger_prefix: String) -> rusqlite::Result<Self> {
        let shared = Arc::new(Shared {
            on: AtomicBool::new(false),
            rules: Mutex::new(Rules {
                trigger_prefix,
                ..Rules::default()
            }),
            epoch: Instant::now(),
            deadline: AtomicU64::new(u64::MAX),
            stop: Mutex::new(None),
        });
        let judge = Arc::clone(&shared);
        conn.authorizer(Some(move |context: AuthContext<'_>| {
            if !judge.on.load(Ordering::Relaxed) {
                return Authorization::Allow;
            }
            judge.rules().judge(&context)
        }))?;
        let clock = Arc::clone(&shared);
        conn.progress_handler(STEPS, Some(move || clock.must_stop()))?;
        Ok(Guard(shared))
    }

    /// From here on statements are the ledger's; one that runs longer than `limit` is stopped.
    pub(super) fn enter(&self, limit: Duration) {
        let deadline = self.0.epoch.elapsed().saturating_add(limit).as_millis();
        let deadline = u64::try_from(deadline).unwrap_or(u64::MAX);
        self.0.deadline.store(deadline, Ordering::Relaxed);
        self.0.on.store(true, Ordering::Relaxed);
    }

    /// From here on statements are the writer's own.
    pub(super) fn leave(&self) {
        self.0.on.store(false, Ordering::Relaxed);
        self.0.deadline.store(u64::MAX, Ordering::Relaxed);
    }

    /// Stops the running ledger statement once `stop` is set.
    pub(super) fn stop_on(&self, stop: Arc<AtomicBool>) {
        *self.0.stop.lock().unwrap_or_else(PoisonError::into_inner) = Some(stop);
    }

    /// Whether the flag of [`Guard::stop_on`] is set.
    pub(super) fn is_stopped(&self) -> bool {
        let stop = self.0.stop.lock().unwrap_or_else(PoisonError::into_inner);
        stop.as_ref().is_some_and(|s| s.load(Ordering::Relaxed))
    }

    /// What was noted since the last call.
    pub(super) fn take_notes(&self) -> Notes {
        std::mem::take(&mut self.0.rules().notes)
    }

    /// Whether nothing needs to be done before the compiled statement runs.
    pub(super) fn is_plain(&self) -> bool {
        let rules = self.0.rules();
        rules.notes.refused.is_none()
            && rules.notes.reshapes.is_none()
            && rules.notes.unarmed.is_empty()
            && rules.notes.unknown.is_empty()
    }

    /// The changes of this table are captured.
    pub(super) fn arm(&self, sql_name: String) {
        self.0.rules().armed.insert(sql_name);
    }

    /// No table's changes are captured any more.
    pub(super) fn disarm_all(&self) {
        self.0.rules().armed.clear();
    }

    /// Whether the changes of this table are captured.
    pub(super) fn is_armed(&self, sql_name: &str) -> bool {
        self.0.rules().armed.contains(sql_name)
    }

    /// How many tables' changes are captured.
    pub(super) fn armed(&self) -> usize {
        self.0.rules().armed.len()
    }
}

impl Shared {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn must_stop(&self) -> bool {
        if !self.on.load(Ordering::Relaxed) {
            return false;
        }
        let now = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        if now >= self.deadline.load(Ordering::Relaxed) {
            return true;
        }
        let stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        stop.as_ref().is_some_and(|s| s.load(Ordering::Relaxed))
    }
}

impl Rules {
    fn judge(&mut self, context: &AuthContext<'_>) -> Authorization {
        // SQLite names the trigger that a part of the statement comes from. A subquery's alias
        // shows up there too, but none can be spelled like our triggers.
        if context
            .accessor
            .is_some_and(|a| a.starts_with(&self.trigger_prefix))
        {
            return Authorization::Allow;
        }
        match self.refusal(context) {
            None => Authorization::Allow,
            Some(what) => {
                self.notes.refused.get_or_insert(what);
                Authorization::Deny
            }
        }
    }

    fn refusal(&mut self, context: &AuthContext<'_>) -> Option<String> {
        let main = matches!(context.database_name, None | Some("main"));
        match context.action {
            AuthAction::Select | AuthAction::Recursive => None,
            AuthAction::Read {
                table_name,
                column_name,
            } => {
                let allowed = (main && self.is_config(table_name))
                    || (SCHEMA_TABLES.contains(&table_name) && self.reads_schema(column_name));
                if !allowed && column_name.is_empty() && context.database_name.is_none() {
                    // What is read without using a column is told under the name that the
                    // statement gives it. Only the schema, which cannot be read from here, tells
                    // a subquery from a table.
                    self.notes.unknown.push(table_name.to_owned());
                    return None;
                }
                (!allowed).then(|| format!("read the table {table_name}"))
            }
            AuthAction::Insert { table_name }
            | AuthAction::Delete { table_name }
            | AuthAction::Update { table_name, .. } => self.write(main, table_name),
            AuthAction::CreateTable { table_name } => {
                self.reshape(main, table_name, Reshape::Create, "create")
            }
            AuthAction::AlterTable {
                database_name,
                table_name,
            } => self.reshape(database_name == "main", table_name, Reshape::Alter, "alter"),
            AuthAction::DropTable { table_name } => {
                self.reshape(main, table_name, Reshape::Drop, "drop")
            }
            // The index behind a PRIMARY KEY or UNIQUE; nobody else can use the prefix.
            AuthAction::CreateIndex { index_name, .. } => {
                (!index_name.starts_with("sqlite_autoindex_")).then(|| "create an index".to_owned())
            }
            AuthAction::Function { function_name } => {
                let name = function_name.to_ascii_lowercase();
                // ALTER TABLE runs internal functions, which SQLite hides from everyone else.
                let allowed = FUNCTIONS.contains(&name.as_str())
                    || (self.notes.reshapes == Some(Reshape::Alter) && name.starts_with("sqlite_"));
                (!allowed).then(|| format!("call the function {name}()"))
            }
            AuthAction::Attach { .. } => Some("attach another database".into()),
            AuthAction::Detach { .. } => Some("detach a database".into()),
            AuthAction::Pragma { pragma_name, .. } => Some(format!("run PRAGMA {pragma_name}")),
            AuthAction::Transaction { .. } => Some("begin or end a transaction".into()),
            AuthAction::Savepoint { .. } => Some("use savepoints".into()),
            AuthAction::DropIndex { .. }
            | AuthAction::CreateTempIndex { .. }
            | AuthAction::DropTempIndex { .. } => Some("create or drop an index".into()),
            AuthAction::CreateTempTable { .. } | AuthAction::DropTempTable { .. } => {
                Some("use temporary tables".into())
            }
            // A DROP TABLE takes our triggers with it.
            AuthAction::DropTempTrigger { trigger_name, .. }
                if trigger_name.starts_with(&self.trigger_prefix) =>
            {
                None
            }
            AuthAction::CreateTrigger { .. }
            | AuthAction::CreateTempTrigger { .. }
            | AuthAction::DropTrigger { .. }
            | AuthAction::DropTempTrigger { .. } => Some("create or drop a trigger".into()),
            AuthAction::CreateView { .. }
            | AuthAction::CreateTempView { .. }
            | AuthAction::DropView { .. }
            | AuthAction::DropTempView { .. } => Some("create or drop a view".into()),
            AuthAction::CreateVtable { .. } | AuthAction::DropVtable { .. } => {
                Some("create or drop a virtual table".into())
            }
            AuthAction::Reindex { .. } => Some("run REINDEX".into()),
            AuthAction::Analyze { .. } => Some("run ANALYZE".into()),
            _ => Some("do what ctlfs does not know".into()),
        }
    }

    fn is_config(&self, name: &str) -> bool {
        self.armed.contains(name) || TableRef::from_sql_name(name).is_some()
    }

    /// Whether the statement is one that makes SQLite itself read this column of its schema. A
    /// CREATE TABLE … AS SELECT holds a query of the user's, so there it is the rowid only.
    fn reads_schema(&self, column: &str) -> bool {
        match self.notes.reshapes {
            Some(Reshape::Alter | Reshape::Drop) => true,
            Some(Reshape::Create) => column.eq_ignore_ascii_case("rowid"),
            None => false,
        }
    }

    fn write(&mut self, main: bool, table: &str) -> Option<String> {
        // SQLite itself refuses every direct change of its schema tables; what passes here are
        // the changes that CREATE, ALTER and DROP TABLE make.
        if SCHEMA_TABLES.contains(&table) || (main && self.armed.contains(table)) {
            return None;
        }
        if !main || TableRef::from_sql_name(table).is_none() {
            return Some(format!("change the table {table}"));
        }
        if !self.notes.unarmed.iter().any(|t| t == table) {
            self.notes.unarmed.push(table.to_owned());
        }
        None
    }

    fn reshape(&mut self, main: bool, table: &str, how: Reshape, verb: &str) -> Option<String> {
        if !main || TableRef::from_sql_name(table).is_none() {
            return Some(format!("{verb} the table {table}"));
        }
        self.notes.reshapes = Some(how);
        self.notes.reshaped.push(table.to_owned());
        None
    }
}
