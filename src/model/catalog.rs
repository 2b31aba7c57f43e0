//! Field types, table schemas, and the set of tables that one state of an LDB holds.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::name::{FamilyName, FieldName, TableName, TableRef};

/// The type of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FieldType {
    /// Up to 191 characters; can be a key.
    String,
    /// 64-bit signed; can be a key.
    Integer,
    /// A double-precision number.
    Decimal,
    /// Up to 16 MiB of text.
    Text,
    /// Up to 16 MiB of bytes.
    Binary,
    /// Up to 255 bytes; can be a key.
    Bytestring,
}

impl FieldType {
    /// Every type.
    pub const ALL: [FieldType; 6] = [
        FieldType::String,
        FieldType::Integer,
        FieldType::Decimal,
        FieldType::Text,
        FieldType::Binary,
        FieldType::Bytestring,
    ];

    /// The type's name in schemas.
    pub fn as_str(self) -> &'static str {
        match self {
            FieldType::String => "string",
            FieldType::Integer => "integer",
            FieldType::Decimal => "decimal",
            FieldType::Text => "text",
            FieldType::Binary => "binary",
            FieldType::Bytestring => "bytestring",
        }
    }

    /// The column type in SQLite and in ledger statements.
    pub fn sqlite_type(self) -> &'static str {
        match self {
            FieldType::String => "VARCHAR(191)",
            FieldType::Integer => "INTEGER",
            FieldType::Decimal => "REAL",
            FieldType::Text => "TEXT",
            FieldType::Binary => "BLOB",
            FieldType::Bytestring => "BLOB(255)",
        }
    }

    /// The column type in MySQL.
    pub fn mysql_type(self) -> &'static str {
        match self {
            FieldType::String => "VARCHAR(191)",
            FieldType::Integer => "BIGINT",
            FieldType::Decimal => "DOUBLE",
            FieldType::Text => "MEDIUMTEXT",
            FieldType::Binary => "MEDIUMBLOB",
            FieldType::Bytestring => "VARBINARY(255)",
        }
    }

    /// The type of a column declared as `declared` in SQLite. Exact for the types ctlstore and
    /// ctlfs write; a column that an operator declared otherwise gets the type whose storage
    /// matches SQLite's affinity rules.
    pub fn from_sqlite(declared: &str) -> Self {
        let declared = declared.to_ascii_uppercase();
        if declared.contains("INT") {
            FieldType::Integer
        } else if declared.contains("VARCHAR") {
            FieldType::String
        } else if ["CHAR", "CLOB", "TEXT"]
            .iter()
            .any(|t| declared.contains(t))
        {
            FieldType::Text
        } else if declared == "BLOB(255)" || declared.contains("VARBINARY") {
            FieldType::Bytestring
        } else if declared.is_empty() || declared.contains("BLOB") {
            FieldType::Binary
        } else {
            FieldType::Decimal
        }
    }

    /// Whether fields of this type can be part of a key.
    pub fn can_be_key(self) -> bool {
        matches!(
            self,
            FieldType::String | FieldType::Integer | FieldType::Bytestring
        )
    }
}

impl fmt::Display for FieldType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for FieldType {
    type Err = SchemaError;

    fn from_str(name: &str) -> Result<Self, SchemaError> {
        FieldType::ALL
            .into_iter()
            .find(|t| t.as_str() == name.to_ascii_lowercase())
            .ok_or_else(|| SchemaError::UnknownType(name.to_owned()))
    }
}

/// A field of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: FieldName,
    /// Its type.
    pub ty: FieldType,
}

/// Why a schema was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    /// No such type.
    #[error("unknown type {0:?}; the types are string, integer, decimal, text, binary, bytestring")]
    UnknownType(String),
    /// The same field twice.
    #[error("field {0:?} is listed twice")]
    DuplicateField(FieldName),
    /// A table needs a key.
    #[error("a table needs at least one key field")]
    NoKey,
    /// A key field that is not a field.
    #[error("key field {0:?} is not a field of the table")]
    UnknownKeyField(FieldName),
    /// A key field twice.
    #[error("key field {0:?} is listed twice")]
    DuplicateKeyField(FieldName),
    /// A field whose type cannot be a key.
    #[error("key field {0:?} is {1}; keys must be string, integer or bytestring")]
    KeyType(FieldName, FieldType),
}

/// The fields of a table and its key. Fields keep their order; the key has at least one field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableSchema {
    fields: Vec<Field>,
    key: Vec<usize>,
}

impl TableSchema {
    /// Checks and builds a schema. `key` names the key fields in the key's order.
    pub fn new(fields: Vec<Field>, key: &[FieldName]) -> Result<Self, SchemaError> {
        for (i, field) in fields.iter().enumerate() {
            if fields.iter().take(i).any(|f| f.name == field.name) {
                return Err(SchemaError::DuplicateField(field.name.clone()));
            }
        }
        if key.is_empty() {
            return Err(SchemaError::NoKey);
        }
        let mut indexes = Vec::with_capacity(key.len());
        for name in key {
            let (index, field) = fields
                .iter()
                .enumerate()
                .find(|(_, f)| f.name == *name)
                .ok_or_else(|| SchemaError::UnknownKeyField(name.clone()))?;
            if !field.ty.can_be_key() {
                return Err(SchemaError::KeyType(name.clone(), field.ty));
            }
            if indexes.contains(&index) {
                return Err(SchemaError::DuplicateKeyField(name.clone()));
            }
            indexes.push(index);
        }
        Ok(TableSchema {
            fields,
            key: indexes,
        })
    }

    /// All fields, in the table's order.
    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// The positions of the key fields within [`TableSchema::fields`], in the key's order.
    pub fn key(&self) -> &[usize] {
        &self.key
    }

    /// The key fields, in the key's order.
    pub fn key_fields(&self) -> impl ExactSizeIterator<Item = &Field> + Clone {
        self.key.iter().map(|i| &self.fields[*i])
    }

    /// The position of a field.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.fields.iter().position(|f| f.name.as_str() == name)
    }

    /// Whether the field at `index` is part of the key.
    pub fn is_key(&self, index: usize) -> bool {
        self.key.contains(&index)
    }
}

/// A table as one state of the LDB has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Family and table.
    pub name: TableRef,
    /// Its fields and key.
    pub schema: TableSchema,
}

/// All config tables of one state of the LDB, in order of their names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Catalog {
    tables: BTreeMap<FamilyName, BTreeMap<TableName, Arc<Table>>>,
}

impl Catalog {
    /// The families that have a table, in order.
    pub fn families(&self) -> impl Iterator<Item = &FamilyName> {
        self.tables.keys()
    }

    /// Whether the family has a table.
    pub fn has_family(&self, family: &FamilyName) -> bool {
        self.tables.contains_key(family)
    }

    /// The tables of a family, in order; none for an unknown family.
    pub fn tables_of(&self, family: &FamilyName) -> impl Iterator<Item = &Arc<Table>> {
        self.tables
            .get(family)
            .into_iter()
            .flat_map(BTreeMap::values)
    }

    /// All tables, in order.
    pub fn tables(&self) -> impl Iterator<Item = &Arc<Table>> {
        self.tables.values().flat_map(BTreeMap::values)
    }

    /// One table.
    pub fn get(&self, name: &TableRef) -> Option<&Arc<Table>> {
        self.tables.get(&name.family)?.get(&name.table)
    }

    /// How many tables there are.
    pub fn len(&self) -> usize {
        self.tables.values().map(BTreeMap::len).sum()
    }

    /// Whether there is no table.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }
}

impl FromIterator<Table> for Catalog {
    fn from_iter<I: IntoIterator<Item = Table>>(tables: I) -> Self {
        let mut catalog = Catalog::default();
        for table in tables {
            catalog
                .tables
                .entry(table.name.family.clone())
                .or_default()
                .insert(table.name.table.clone(), Arc::new(table));
        }
        catalog
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqlite_types_read_back() {
        for ty in FieldType::ALL {
            assert_eq!(FieldType::from_sqlite(ty.sqlite_type()), ty);
            assert_eq!(
                FieldType::from_sqlite(ty.mysql_type()).can_be_key(),
                ty.can_be_key()
            );
        }
    }

    #[test]
    fn schemas_are_checked() {
        let field = |name: &str, ty| Field {
            name: name.parse().unwrap(),
            ty,
        };
        let name = |n: &str| n.parse::<FieldName>().unwrap();
        let fields = vec![field("a", FieldType::String), field("b", FieldType::Text)];
        assert!(TableSchema::new(fields.clone(), &[name("a")]).is_ok());
        assert_eq!(
            TableSchema::new(fields.clone(), &[]),
            Err(SchemaError::NoKey)
        );
        assert!(TableSchema::new(fields.clone(), &[name("c")]).is_err());
        assert!(TableSchema::new(fields.clone(), &[name("b")]).is_err());
        assert!(TableSchema::new(fields, &[name("a"), name("a")]).is_err());
    }
}
