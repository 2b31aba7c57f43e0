//! Carries a document out: creates the families, tables and fields that are missing and makes the
//! rows what the document says. Everything is compared with the origin and checked before the
//! first change is made; doing it again changes nothing.

use std::collections::HashMap;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::document::{At, Document, DocumentError, Node, TablePart};
use super::{Effect, Executive, ExecutiveError, Mutation, expected, stored};
use crate::model::{FamilyName, Field, FieldName, FieldType, Seq, TableRef, TableSchema, Value};

/// The rows that one transaction holds at most.
const BATCH_ROWS: usize = 500;
/// The bytes of values at which a transaction ends.
const BATCH_BYTES: usize = 4 << 20;

/// What [`apply`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// Families created.
    pub families: usize,
    /// Tables created.
    pub tables: usize,
    /// Fields added to tables that existed.
    pub fields: usize,
    /// Rows written.
    pub written: usize,
    /// Rows that were so already.
    pub unchanged: usize,
    /// The sequence of the last ledger entry; `None` if nothing was appended.
    pub seq: Option<Seq>,
}

/// How far [`apply`] is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Rows done.
    pub rows: usize,
    /// Rows in the document.
    pub of: usize,
}

/// Why a document was not applied, or only in part.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A mistake in the document. Nothing was changed.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// The executive failed. Transactions that were committed before stay.
    #[error(transparent)]
    Executive(#[from] ExecutiveError),
}

/// A table of the document, compared with the origin.
struct Prepared {
    table: TableRef,
    /// The schema to create, if there is no such table.
    create: Option<TableSchema>,
    /// The fields to add.
    add: Vec<Field>,
    rows: Vec<Vec<(FieldName, Value)>>,
}

/// Applies a document. `progress` is called after every transaction.
pub fn apply(
    document: Document,
    executive: &mut Executive,
    progress: &mut dyn FnMut(Progress),
) -> Result<Applied, ApplyError> {
    let (families, prepared) = prepare(document, executive)?;
    let mut applied = Applied::default();
    for family in &families {
        if executive.create_family(family)? {
            applied.families += 1;
        }
    }
    for part in &prepared {
        if let Some(schema) = &part.create {
            applied.seq = Some(executive.create_table(&part.table, schema)?);
            applied.tables += 1;
        }
        for field in &part.add {
            applied.seq = Some(executive.add_field(&part.table, field)?);
            applied.fields += 1;
        }
    }
    let of = prepared.iter().map(|p| p.rows.len()).sum();
    let mut batch = Vec::new();
    let mut bytes = 0;
    let mut write = |batch: &mut Vec<Mutation>| -> Result<(), ApplyError> {
        if batch.is_empty() {
            return Ok(());
        }
        let outcome = executive.mutate(batch)?;
        batch.clear();
        applied.written += outcome.count(Effect::Written);
        applied.unchanged += outcome.count(Effect::Unchanged);
        applied.seq = outcome.seq.or(applied.seq);
        progress(Progress {
            rows: applied.written + applied.unchanged,
            of,
        });
        Ok(())
    };
    for part in prepared {
        for values in part.rows {
            bytes += size(&values);
            batch.push(Mutation::Upsert {
                table: part.table.clone(),
                values,
            });
            if batch.len() >= BATCH_ROWS || bytes >= BATCH_BYTES {
                write(&mut batch)?;
                bytes = 0;
            }
        }
    }
    write(&mut batch)?;
    Ok(applied)
}

fn size(values: &[(FieldName, Value)]) -> usize {
    values
        .iter()
        .map(|(_, v)| v.bytes().map_or(8, <[u8]>::len))
        .sum()
}

/// Compares the document with the origin, and turns its values into the fields' types.
fn prepare(
    mut document: Document,
    executive: &mut Executive,
) -> Result<(Vec<FamilyName>, Vec<Prepared>), ApplyError> {
    let mut families = Vec::new();
    let mut prepared = Vec::new();
    for (family, part) in std::mem::take(&mut document.families.0) {
        let name: FamilyName = family
            .value
            .parse()
            .map_err(|e| document.error(family.line, format!("{e}")))?;
        families.push(name.clone());
        for (table, part) in part.tables.0 {
            let name = TableRef {
                family: name.clone(),
                table: table
                    .value
                    .parse()
                    .map_err(|e| document.error(table.line, format!("{e}")))?,
            };
            let existing = executive.schema(&name)?;
            prepared.push(prepare_table(&document, name, table.line, part, existing)?);
        }
    }
    Ok((families, prepared))
}

fn prepare_table(
    document: &Document,
    table: TableRef,
    line: u32,
    part: TablePart,
    existing: Option<TableSchema>,
) -> Result<Prepared, DocumentError> {
    let declared = declared_fields(document, &table, &part)?;
    let key = declared_key(document, &table, &part)?;
    let (schema, create, add) = match (existing, declared) {
        (None, None) => {
            return Err(document.error(
                line,
                format!("{table} does not exist yet: it needs 'fields' and 'key'"),
            ));
        }
        (None, Some(fields)) => {
            let Some((key_line, key)) = key else {
                return Err(document.error(
                    line,
                    format!("{table} does not exist yet: it needs a 'key'"),
                ));
            };
            let fields = fields.into_iter().map(|f| f.value).collect();
            let schema = TableSchema::new(fields, &key)
                .map_err(|e| document.error(key_line, format!("{table}: {e}")))?;
            (schema.clone(), Some(schema), Vec::new())
        }
        (Some(existing), declared) => {
            if let Some((line, key)) = key
                && !existing.key_fields().map(|f| &f.name).eq(&key)
            {
                let names: Vec<&str> = existing.key_fields().map(|f| f.name.as_str()).collect();
                return Err(document.error(
                    line,
                    format!(
                        "{table} exists with the key [{}]; a key cannot be changed",
                        names.join(", ")
                    ),
                ));
            }
            let mut add = Vec::new();
            for At { line, value: field } in declared.unwrap_or_default() {
                match existing.fields().iter().find(|f| f.name == field.name) {
                    None => add.push(field),
                    Some(known) if known.ty == field.ty => {}
                    Some(known) => {
                        return Err(document.error(
                            line,
                            format!(
                                "{table} exists with field \"{}\" as {}; a field's type cannot \
                                 be changed to {}",
                                field.name, known.ty, field.ty
                            ),
                        ));
                    }
                }
            }
            let fields = existing.fields().iter().chain(&add).cloned().collect();
            let key: Vec<FieldName> = existing.key_fields().map(|f| f.name.clone()).collect();
            let schema = TableSchema::new(fields, &key)
                .map_err(|e| document.error(line, format!("{table}: {e}")))?;
            (schema, None, add)
        }
    };
    let mut rows = Vec::with_capacity(part.rows.len());
    // Two rows with one key would undo each other every time the document is applied.
    let mut keys: HashMap<Vec<u8>, usize> = HashMap::with_capacity(part.rows.len());
    for (index, row) in part.rows.into_iter().enumerate() {
        let (line, number) = (row.line, index + 1);
        let values = prepare_row(document, &table, &schema, number, row)?;
        if let Some(first) = keys.insert(key_bytes(&schema, &values), number) {
            return Err(document.error(
                line,
                format!("{table} row {number} has the same key as row {first}; remove one of them"),
            ));
        }
        rows.push(values);
    }
    Ok(Prepared {
        table,
        create,
        add,
        rows,
    })
}

/// The key of a row as bytes: two rows have the same when they are one row.
fn key_bytes(schema: &TableSchema, values: &[(FieldName, Value)]) -> Vec<u8> {
    let mut key = Vec::new();
    for field in schema.key_fields() {
        match values.iter().find(|(name, _)| *name == field.name) {
            Some((_, Value::Integer(i))) => key.extend(i.to_be_bytes()),
            Some((_, value)) => {
                let bytes = value.bytes().unwrap_or_default();
                key.extend(bytes.len().to_be_bytes());
                key.extend(bytes);
            }
            None => {}
        }
    }
    key
}

fn declared_fields(
    document: &Document,
    table: &TableRef,
    part: &TablePart,
) -> Result<Option<Vec<At<Field>>>, DocumentError> {
    let Some(fields) = &part.fields else {
        return Ok(None);
    };
    let mut declared: Vec<At<Field>> = Vec::with_capacity(fields.0.len());
    for (name, ty) in &fields.0 {
        let error = |message: String| document.error(name.line, format!("{table}: {message}"));
        let field = Field {
            name: name
                .value
                .parse::<FieldName>()
                .map_err(|e| error(e.to_string()))?,
            ty: ty
                .value
                .parse::<FieldType>()
                .map_err(|e| error(format!("field \"{}\": {e}", name.value)))?,
        };
        if declared.iter().any(|f| f.value.name == field.name) {
            return Err(error(format!("field \"{}\" is listed twice", field.name)));
        }
        declared.push(At {
            line: name.line,
            value: field,
        });
    }
    Ok(Some(declared))
}

fn declared_key(
    document: &Document,
    table: &TableRef,
    part: &TablePart,
) -> Result<Option<(u32, Vec<FieldName>)>, DocumentError> {
    let Some(key) = &part.key else {
        return Ok(None);
    };
    let names = key
        .value
        .iter()
        .map(|name| {
            name.value
                .parse::<FieldName>()
                .map_err(|e| document.error(name.line, format!("{table}: {e}")))
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Some((key.line, names)))
}

fn prepare_row(
    document: &Document,
    table: &TableRef,
    schema: &TableSchema,
    number: usize,
    row: At<super::document::RowPart>,
) -> Result<Vec<(FieldName, Value)>, DocumentError> {
    let mut values: Vec<(FieldName, Value)> = Vec::with_capacity(row.value.0.len());
    for (name, node) in row.value.0 {
        let error = |line: u32, message: &str| {
            document.error(
                line,
                format!("{table} row {number}, field \"{}\": {message}", name.value),
            )
        };
        let field = schema
            .index_of(&name.value)
            .and_then(|i| schema.fields().get(i))
            .ok_or_else(|| error(name.line, "the table has no such field"))?;
        let value = value(field.ty, node.value, &document.directory)
            .and_then(|value| stored(field.ty, &value))
            .map_err(|message| error(node.line, &message))?;
        if value.is_null() && schema.key_fields().any(|f| f.name == field.name) {
            return Err(error(node.line, "a key field cannot be null"));
        }
        values.push((field.name.clone(), value));
    }
    for field in schema.key_fields() {
        if !values.iter().any(|(name, _)| *name == field.name) {
            return Err(document.error(
                row.line,
                format!(
                    "{table} row {number}: key field \"{}\" is missing",
                    field.name
                ),
            ));
        }
    }
    Ok(values)
}

/// The value that a node means in a field of this type.
fn value(ty: FieldType, node: Node, directory: &Path) -> Result<Value, String> {
    let found = |what: &str| Err(format!("expected {}, found {what}", expected(ty)));
    match (ty, node) {
        (_, Node::Null) => Ok(Value::Null),
        (FieldType::Integer | FieldType::Decimal, Node::Integer(i)) => Ok(Value::Integer(i)),
        (FieldType::Integer, Node::Bool(b)) => Ok(Value::Integer(b.into())),
        (FieldType::Integer, Node::Huge) => {
            Err("the number does not fit into 64 bits with a sign".into())
        }
        // The parser has made a decimal of digits that are too many for any integer.
        (FieldType::Integer, Node::Decimal(d)) if d.abs() >= 1.8e19 => {
            Err("the number does not fit into 64 bits with a sign".into())
        }
        (FieldType::Decimal, Node::Huge) => {
            Err("the number has more digits than a decimal holds; write it with a point".into())
        }
        (FieldType::Decimal, Node::Decimal(d)) => Ok(Value::Real(d)),
        (FieldType::String | FieldType::Text, Node::Text(t)) => Ok(Value::text(t)),
        (FieldType::String | FieldType::Text, Node::Bool(b)) => {
            found(&format!("the boolean {b}; put it in quotes"))
        }
        (FieldType::String | FieldType::Text, Node::Integer(_) | Node::Huge | Node::Decimal(_)) => {
            found("a number; put it in quotes")
        }
        (_, Node::Notation(notation)) => {
            let (tag, text) = *notation;
            let bytes = match tag.as_str() {
                "hex" => unhex(&text)?,
                "base64" => BASE64
                    .decode(text.split_ascii_whitespace().collect::<String>())
                    .map_err(|_| "the base64 text is not valid")?,
                "file" => std::fs::read(directory.join(&text))
                    .map_err(|e| format!("cannot read the file {text:?}: {e}"))?,
                _ => {
                    return found(
                        "a mapping; bytes are written {hex: …}, {base64: …} or {file: …}",
                    );
                }
            };
            match ty {
                FieldType::Binary | FieldType::Bytestring => Ok(Value::Blob(bytes)),
                FieldType::String | FieldType::Text => Ok(Value::Text(bytes)),
                FieldType::Integer | FieldType::Decimal => found("bytes"),
            }
        }
        (FieldType::Binary | FieldType::Bytestring, Node::Text(_)) => {
            found("text; bytes are written {hex: …}, {base64: …} or {file: …}")
        }
        (_, Node::Text(t)) if t.chars().count() <= 40 => found(&format!("{t:?}")),
        (_, Node::Text(_)) => found("text"),
        (_, Node::Bool(b)) => found(&format!("the boolean {b}")),
        (_, Node::Integer(_) | Node::Huge) => found("an integer"),
        (_, Node::Decimal(_)) => found("a decimal"),
        (_, Node::List) => found("a list"),
        (_, Node::Mapping) => found("a mapping"),
    }
}

/// The bytes that hexadecimal digits mean; the error is a sentence without them.
pub fn unhex(text: &str) -> Result<Vec<u8>, String> {
    let digits = text
        .chars()
        .map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok()))
        .collect::<Option<Vec<u8>>>()
        .ok_or("only hexadecimal digits can stand in hex")?;
    if digits.len() % 2 != 0 {
        return Err("hex needs two digits for every byte".into());
    }
    Ok(digits
        .chunks_exact(2)
        .map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit))
        .collect())
}
