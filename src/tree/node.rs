//! What stands where in the tree: the identity of every file and directory, and which name leads
//! from one to the next. Pure: whether a row exists is for the caller to find out.

use std::sync::Arc;

use super::export::{Collection, ExportFile};
use super::name::{self, Decoded};
use crate::model::{Catalog, FamilyName, FieldType, Table, TableRef, Value};

/// The daemon's own directory at the root.
pub const CONTROL_DIR: &str = ".ctlfs";
/// The file of a whole row.
pub const ROW_JSON: &str = "row.json";
/// The file of a table's schema.
pub const SCHEMA_JSON: &str = ".schema.json";
/// The file of a table's last change.
pub const TABLE_SEQ: &str = ".seq";

/// The values of a key, or of its leading parts, shared by the nodes of a row.
pub type SharedKey = Arc<[Value]>;

/// One place in the tree. Equal nodes are the same place; which version of its content a reader
/// sees is a matter of inodes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Node {
    /// The mount point.
    Root,
    /// `.ctlfs`.
    Control,
    /// A file in it.
    ControlFile(ControlFile),
    /// A directory in it in which tables are files.
    Collection(Collection),
    /// A family in such a directory.
    CollectionFamily(Collection, FamilyName),
    /// A table as a file.
    Export(Arc<TableRef>, ExportFile),
    /// A family.
    Family(FamilyName),
    /// A table.
    Table(Arc<TableRef>),
    /// A file about a table.
    TableFile(Arc<TableRef>, TableFile),
    /// A directory for some or all parts of a key; with all of them it is a row.
    Dir(Arc<TableRef>, SharedKey),
    /// A file of a row.
    RowFile(Arc<TableRef>, SharedKey, RowFile),
}

/// The files in `.ctlfs`, whose content changes without a ledger entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ControlFile {
    /// The daemon's state.
    Status,
    /// The position of the tree.
    Seq,
    /// Exists once the first full catch-up is done.
    Ready,
}

impl ControlFile {
    /// All of them.
    pub const ALL: [ControlFile; 3] = [ControlFile::Status, ControlFile::Seq, ControlFile::Ready];

    /// The file's name.
    pub fn name(self) -> &'static str {
        match self {
            ControlFile::Status => "status.json",
            ControlFile::Seq => "seq",
            ControlFile::Ready => "ready",
        }
    }
}

/// The files about a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TableFile {
    /// Fields, types and key.
    Schema,
    /// The sequence of the table's last change.
    Seq,
}

impl TableFile {
    /// All of them.
    pub const ALL: [TableFile; 2] = [TableFile::Schema, TableFile::Seq];

    /// The file's name.
    pub fn name(self) -> &'static str {
        match self {
            TableFile::Schema => SCHEMA_JSON,
            TableFile::Seq => TABLE_SEQ,
        }
    }
}

/// The files of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowFile {
    /// One field, by its position in the schema.
    Field(u16),
    /// All of them.
    Json,
}

impl RowFile {
    /// The file of the field at `index` of a schema.
    pub fn field(index: usize) -> Option<Self> {
        u16::try_from(index).ok().map(RowFile::Field)
    }
}

impl Node {
    /// Whether this is a directory.
    pub fn is_dir(&self) -> bool {
        match self {
            Node::Root
            | Node::Control
            | Node::Collection(_)
            | Node::CollectionFamily(..)
            | Node::Family(_)
            | Node::Table(_)
            | Node::Dir(..) => true,
            Node::ControlFile(_) | Node::Export(..) | Node::TableFile(..) | Node::RowFile(..) => {
                false
            }
        }
    }

    /// Whether this is a file whose content is made when it is first asked for, and not before:
    /// making it takes long.
    pub fn is_lazy(&self) -> bool {
        matches!(self, Node::Export(..))
    }

    /// The table that this is, or is part of.
    pub fn table(&self) -> Option<&Arc<TableRef>> {
        match self {
            Node::Root
            | Node::Control
            | Node::ControlFile(_)
            | Node::Collection(_)
            | Node::CollectionFamily(..)
            | Node::Family(_) => None,
            Node::Export(t, _)
            | Node::Table(t)
            | Node::TableFile(t, _)
            | Node::Dir(t, _)
            | Node::RowFile(t, _, _) => Some(t),
        }
    }

    /// The directory this stands in; the root stands in itself.
    pub fn parent(&self) -> Node {
        match self {
            Node::Root | Node::Control | Node::Family(_) => Node::Root,
            Node::ControlFile(_) | Node::Collection(_) => Node::Control,
            Node::CollectionFamily(collection, _) => Node::Collection(*collection),
            Node::Export(t, file) => Node::CollectionFamily(file.collection(), t.family.clone()),
            Node::Table(t) => Node::Family(t.family.clone()),
            Node::TableFile(t, _) => Node::Table(Arc::clone(t)),
            Node::Dir(t, key) => match key.split_last() {
                Some((_, [])) | None => Node::Table(Arc::clone(t)),
                Some((_, prefix)) => Node::Dir(Arc::clone(t), prefix.into()),
            },
            Node::RowFile(t, key, _) => Node::Dir(Arc::clone(t), Arc::clone(key)),
        }
    }

    /// The name under which the parent has it; `None` for the root, for what the catalog no longer
    /// knows, and for keys that have no name.
    pub fn name(&self, catalog: &Catalog) -> Option<Vec<u8>> {
        let name = match self {
            Node::Root => return None,
            Node::Control => CONTROL_DIR,
            Node::ControlFile(file) => file.name(),
            Node::Collection(collection) => collection.name(),
            Node::Export(t, file) => return Some(file.name(&t.table).into_bytes()),
            Node::Family(family) | Node::CollectionFamily(_, family) => family.as_str(),
            Node::Table(t) => t.table.as_str(),
            Node::TableFile(_, file) => file.name(),
            Node::RowFile(_, _, RowFile::Json) => ROW_JSON,
            Node::RowFile(t, _, RowFile::Field(index)) => {
                return catalog
                    .get(t)?
                    .schema
                    .fields()
                    .get(usize::from(*index))
                    .map(|f| f.name.as_str().as_bytes().to_vec());
            }
            Node::Dir(t, key) => {
                let part = key.len().checked_sub(1)?;
                let field = catalog.get(t)?.schema.key_fields().nth(part)?.clone();
                return name::encode(field.ty, key.last()?);
            }
        };
        Some(name.as_bytes().to_vec())
    }
}

/// Where a name leads.
#[derive(Debug, Clone)]
pub enum Step {
    /// Nowhere: no row, table or family could make this name exist.
    Nothing,
    /// To this place, if it exists: families and tables do, rows and prefixes have to be looked up.
    Node(Node),
    /// To a key directory below `prefix` whose name is too long to hold its key. `start` is how the
    /// key's bytes begin; [`name::matches_hashed`] tells which key it is.
    Hashed {
        /// The table.
        table: Arc<Table>,
        /// The key parts above.
        prefix: SharedKey,
        /// The type of the key part.
        ty: FieldType,
        /// The first bytes of the key part.
        start: Vec<u8>,
    },
}

/// Where `name` leads from the directory `parent`.
pub fn step(catalog: &Catalog, parent: &Node, name: &[u8]) -> Step {
    let Ok(text) = std::str::from_utf8(name) else {
        return match parent {
            Node::Table(t) => key_step(catalog, t, &[], name),
            Node::Dir(t, key) => key_step(catalog, t, key, name),
            _ => Step::Nothing,
        };
    };
    let found = match parent {
        Node::Root if text == CONTROL_DIR => Some(Node::Control),
        Node::Root => family(catalog, text).map(Node::Family),
        Node::Control => {
            let file = ControlFile::ALL.into_iter().find(|f| f.name() == text);
            let collection = Collection::ALL.into_iter().find(|c| c.name() == text);
            let file = file.map(Node::ControlFile);
            file.or_else(|| collection.map(Node::Collection))
        }
        Node::Collection(collection) => {
            family(catalog, text).map(|family| Node::CollectionFamily(*collection, family))
        }
        Node::CollectionFamily(collection, family) => {
            export_step(catalog, *collection, family, text)
        }
        Node::Family(family) => catalog
            .tables_of(family)
            .find(|t| t.name.table.as_str() == text)
            .map(|t| Node::Table(Arc::new(t.name.clone()))),
        Node::Table(t) => {
            if let Some(file) = TableFile::ALL.into_iter().find(|f| f.name() == text) {
                catalog.get(t).map(|_| Node::TableFile(Arc::clone(t), file))
            } else {
                return key_step(catalog, t, &[], name);
            }
        }
        Node::Dir(t, key) => match catalog.get(t) {
            Some(table) if key.len() == table.schema.key().len() => {
                let file = if text == ROW_JSON {
                    Some(RowFile::Json)
                } else {
                    table.schema.index_of(text).and_then(RowFile::field)
                };
                file.map(|file| Node::RowFile(Arc::clone(t), Arc::clone(key), file))
            }
            _ => return key_step(catalog, t, key, name),
        },
        Node::ControlFile(_) | Node::Export(..) | Node::TableFile(..) | Node::RowFile(..) => None,
    };
    found.map_or(Step::Nothing, Step::Node)
}

fn family(catalog: &Catalog, name: &str) -> Option<FamilyName> {
    catalog.families().find(|f| f.as_str() == name).cloned()
}

fn export_step(
    catalog: &Catalog,
    collection: Collection,
    family: &FamilyName,
    text: &str,
) -> Option<Node> {
    let (table, _) = text.rsplit_once('.')?;
    let mut tables = catalog.tables_of(family);
    let table = tables.find(|t| t.name.table.as_str() == table)?;
    let file = ExportFile::ALL.into_iter().find(|file| {
        file.collection() == collection
            && file.suits(&table.schema)
            && file.name(&table.name.table) == text
    })?;
    Some(Node::Export(Arc::new(table.name.clone()), file))
}

fn key_step(catalog: &Catalog, name: &Arc<TableRef>, prefix: &[Value], text: &[u8]) -> Step {
    let Some(table) = catalog.get(name) else {
        return Step::Nothing;
    };
    let Some(field) = table.schema.key_fields().nth(prefix.len()) else {
        return Step::Nothing;
    };
    match name::decode(field.ty, text) {
        None => Step::Nothing,
        Some(Decoded::Exact(value)) => {
            let key = prefix.iter().cloned().chain([value]).collect();
            Step::Node(Node::Dir(Arc::clone(name), key))
        }
        Some(Decoded::Hashed { prefix: start, .. }) => Step::Hashed {
            table: Arc::clone(table),
            prefix: prefix.into(),
            ty: field.ty,
            start,
        },
    }
}
