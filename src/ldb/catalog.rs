//! Reads the config tables that an LDB holds out of SQLite's schema.

use rusqlite::Connection;
use tracing::warn;

use crate::model::{Catalog, Field, FieldName, FieldType, Table, TableRef, TableSchema};

/// The config tables of the LDB. A table that cannot be shown (no usable primary key, field names
/// that are none, no rowids) is left out with a warning.
pub fn load(conn: &Connection) -> rusqlite::Result<Catalog> {
    let names = config_tables(conn)?;
    let mut tables = Vec::with_capacity(names.len());
    for name in names {
        match load_table(conn, &name)? {
            Ok(table) => tables.push(table),
            Err(why) => warn!(table = %name, "the table is left out: {why}"),
        }
    }
    Ok(tables.into_iter().collect())
}

/// The names of all config tables, shown or not.
pub(super) fn config_tables(conn: &Connection) -> rusqlite::Result<Vec<TableRef>> {
    let mut statement =
        conn.prepare_cached("SELECT name FROM main.sqlite_schema WHERE type = 'table'")?;
    let names = statement.query_map([], |row| row.get::<_, String>(0))?;
    let mut tables = Vec::new();
    for name in names {
        tables.extend(TableRef::from_sql_name(&name?));
    }
    Ok(tables)
}

/// One table, or the reason why it cannot be shown.
fn load_table(conn: &Connection, name: &TableRef) -> rusqlite::Result<Result<Table, String>> {
    let sql_name = name.sql_name();
    let without_rowid: bool = conn
        .prepare_cached("SELECT wr FROM pragma_table_list(?1) WHERE schema = 'main'")?
        .query_row([&sql_name], |row| row.get(0))?;
    let mut statement =
        conn.prepare_cached("SELECT name, type, pk FROM pragma_table_info(?1, 'main')")?;
    let columns = statement.query_map([&sql_name], |row| {
        Ok((
            row.get::<_, String>(0)?,
            row.get::<_, String>(1)?,
            row.get::<_, i64>(2)?,
        ))
    })?;
    let mut columns = columns.collect::<rusqlite::Result<Vec<_>>>()?;
    Ok(build(name, without_rowid, &mut columns))
}

fn build(
    name: &TableRef,
    without_rowid: bool,
    columns: &mut [(String, String, i64)],
) -> Result<Table, String> {
    if without_rowid {
        return Err("it is declared WITHOUT ROWID".into());
    }
    let mut fields = Vec::with_capacity(columns.len());
    for (field, declared, _) in columns.iter() {
        let parsed: FieldName = field.parse().map_err(|e| format!("{e}"))?;
        if parsed.as_str() != field {
            return Err(format!("field {field:?} is not lower-case"));
        }
        fields.push(Field {
            name: parsed,
            ty: FieldType::from_sqlite(declared),
        });
    }
    columns.sort_by_key(|(_, _, position)| *position);
    let key = columns
        .iter()
        .filter(|(_, _, position)| *position > 0)
        .map(|(field, _, _)| field.parse().map_err(|e| format!("{e}")))
        .collect::<Result<Vec<FieldName>, String>>()?;
    let schema = TableSchema::new(fields, &key).map_err(|e| e.to_string())?;
    Ok(Table {
        name: name.clone(),
        schema,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_their_order_and_odd_tables_are_left_out() {
        let conn = Connection::open_in_memory().unwrap();
        conn.execute_batch(
            r#"CREATE TABLE app___flags ("a" VARCHAR(191), "b" INTEGER, "c" TEXT, PRIMARY KEY("b", "a"));
               CREATE TABLE app___nokey (a TEXT);
               CREATE TABLE app___textkey (a TEXT PRIMARY KEY);
               CREATE TABLE app___norowid (a INTEGER, PRIMARY KEY(a)) WITHOUT ROWID;
               CREATE TABLE app___names ("A-b" INTEGER PRIMARY KEY);
               CREATE TABLE other (a INTEGER PRIMARY KEY);"#,
        )
        .unwrap();
        let catalog = load(&conn).unwrap();
        let names: Vec<_> = catalog.tables().map(|t| t.name.to_string()).collect();
        assert_eq!(names, ["app/flags"]);
        let table = catalog.get(&"app/flags".parse().unwrap()).unwrap();
        assert_eq!(table.schema.key(), [1, 0]);
        assert_eq!(table.schema.fields().len(), 3);
    }
}
