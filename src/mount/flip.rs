//! The flip: how a commit reaches the kernel's caches. Invalidate, commit, finish.
//!
//! 1. [`State::begin`] puts the changed names into a [`Transition`]. From here on lookups of them
//!    are answered with a lifetime of zero.
//! 2. What the kernel may hold of them is collected ([`State::collect`]), the old bytes are kept,
//!    and the entries invalidated. Nothing old is cached any more.
//! 3. The LDB commits. Whoever sees that first, the reflector or a worker that read from the new
//!    snapshot, calls [`State::finish`] under the lock: the changed places get new inodes from then
//!    on. No reader can have been shown anything new before, nor is anything old shown after.
//!
//! A lookup that read the LDB before the commit and comes to register afterwards is turned back by
//! [`State::settle`], because its data is from another position.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::state::{ROOT, Slot, State, Version};
use crate::model::{
    Catalog, ChangeSet, Extent, FieldSet, Key, RowKind, Seq, TableChange, TableRef,
};
use crate::tree::export::{Collection, ExportFile};
use crate::tree::node::{Node, RowFile, TableFile};

/// How much the commit under way changes of a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Touch {
    /// Nothing.
    None,
    /// Its attributes.
    Attributes,
    /// What its name leads to.
    Entry,
}

/// A commit under way.
#[derive(Debug)]
pub(super) struct Transition {
    /// The position it leads to.
    pub(super) to: Seq,
    /// The tables after it, if they change.
    pub(super) catalog: Option<Arc<Catalog>>,
    tables: HashMap<TableRef, Touched>,
    /// Inodes of changed places that were collected.
    collected: Vec<u64>,
    /// Inodes of changed places that were looked up since.
    pub(super) late: Vec<u64>,
}

#[derive(Debug)]
enum Touched {
    Whole {
        /// Whether key values mean something else afterwards, or nothing.
        key_changes: bool,
        exists: bool,
    },
    Rows {
        rows: HashMap<Key, (RowKind, FieldSet)>,
        dirs: HashMap<Key, bool>,
    },
}

/// What to do before the commit, for one piece of it.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Files whose bytes must be kept.
    pub(super) keep: Vec<(u64, Node)>,
    /// Entries to invalidate: directory and name.
    pub(super) entries: Vec<(u64, Vec<u8>)>,
    /// Inodes whose attributes are to be invalidated after the commit.
    pub(super) attributes: Vec<u64>,
}

impl Transition {
    fn new(changes: &ChangeSet, before: &Catalog) -> Self {
        let tables = changes
            .tables
            .iter()
            .map(|TableChange { table, extent }| {
                let touched = match extent {
                    Extent::Whole => {
                        let after = changes.catalog.as_deref().unwrap_or(before);
                        let key = |catalog: &Catalog| {
                            let table = catalog.get(table)?;
                            Some(table.schema.key_fields().map(|f| f.ty).collect::<Vec<_>>())
                        };
                        Touched::Whole {
                            key_changes: key(before) != key(after),
                            exists: after.get(table).is_some(),
                        }
                    }
                    Extent::Rows { rows, dirs } => Touched::Rows {
                        rows: rows
                            .iter()
                            .map(|r| (r.key.clone(), (r.kind, r.fields.clone())))
                            .collect(),
                        dirs: dirs.iter().map(|d| (d.prefix.clone(), d.exists)).collect(),
                    },
                };
                (table.clone(), touched)
            })
            .collect();
        Transition {
            to: changes.to,
            catalog: changes.catalog.clone(),
            tables,
            collected: Vec::new(),
            late: Vec::new(),
        }
    }

    /// Whether anything in `table` changes.
    pub(super) fn touches(&self, table: &TableRef) -> bool {
        self.tables.contains_key(table)
    }

    fn touch(&self, node: &Node) -> Touch {
        let Some(table) = node.table() else {
            let has_families = matches!(node, Node::Root | Node::Collection(_));
            return match (&self.catalog, node) {
                (Some(_), Node::Family(_) | Node::CollectionFamily(..)) => Touch::Entry,
                (Some(_), _) if has_families => Touch::Attributes,
                _ => Touch::None,
            };
        };
        match (self.tables.get(&**table), node) {
            // Directories above rows carry the time of the last change of the set of tables.
            (None, Node::Dir(..)) if self.catalog.is_some() => Touch::Attributes,
            (None, _) => Touch::None,
            (Some(Touched::Whole { .. }), _) | (_, Node::Export(..)) => Touch::Entry,
            (Some(Touched::Rows { .. }), Node::Table(_)) => Touch::Attributes,
            (Some(Touched::Rows { .. }), Node::TableFile(_, file)) => match file {
                TableFile::Seq => Touch::Entry,
                TableFile::Schema => Touch::Attributes,
            },
            (Some(Touched::Rows { rows, dirs }), Node::Dir(_, key)) => match rows.get(&**key) {
                Some((RowKind::Updated, _)) => Touch::Attributes,
                Some((RowKind::Created | RowKind::Deleted, _)) => Touch::Entry,
                None if dirs.contains_key(&**key) => Touch::Entry,
                None => Touch::None,
            },
            (Some(Touched::Rows { rows, .. }), Node::RowFile(_, key, file)) => {
                match (rows.get(&**key), file) {
                    (None, _) => Touch::None,
                    (Some((RowKind::Updated, fields)), RowFile::Field(index))
                        if !fields.contains(usize::from(*index)) =>
                    {
                        Touch::Attributes
                    }
                    (Some(_), _) => Touch::Entry,
                }
            }
            (Some(_), _) => Touch::None,
        }
    }

    /// Whether a changed place needs another inode after the commit: files do, directories only
    /// when they go.
    fn supersedes(&self, node: &Node) -> bool {
        if !node.is_dir() {
            return true;
        }
        let Some(table) = node.table() else {
            let (Node::Family(family) | Node::CollectionFamily(_, family)) = node else {
                return false;
            };
            return self.catalog.as_ref().is_some_and(|c| !c.has_family(family));
        };
        match (self.tables.get(&**table), node) {
            (Some(Touched::Whole { exists, .. }), Node::Table(_)) => !exists,
            // A process that works in a row's directory stays there when the table gets a field.
            (Some(Touched::Whole { key_changes, .. }), _) => *key_changes,
            (Some(Touched::Rows { rows, dirs }), Node::Dir(_, key)) => {
                rows.get(&**key)
                    .is_some_and(|(kind, _)| *kind == RowKind::Deleted)
                    || dirs.get(&**key).is_some_and(|exists| !exists)
            }
            _ => false,
        }
    }
}

impl State {
    /// How much the commit under way changes of `node`.
    pub(super) fn touch(&self, node: &Node) -> Touch {
        self.transition
            .as_ref()
            .map_or(Touch::None, |t| t.touch(node))
    }

    /// Begins the transition to `changes.to`.
    pub(super) fn begin(&mut self, changes: &ChangeSet) {
        let catalog = self.view().catalog;
        self.transition = Some(Transition::new(changes, &catalog));
    }

    /// What the kernel may hold of the set of tables, if that changes.
    pub(super) fn collect_catalog(&mut self, changes: &ChangeSet) -> Plan {
        let mut plan = Plan::default();
        let Some(after) = &changes.catalog else {
            return plan;
        };
        let before = self.view().catalog;
        let families: HashSet<_> = before.families().chain(after.families()).collect();
        for family in families {
            let node = Node::Family(family.clone());
            let ino = self.ino(&node);
            if before.has_family(family) != after.has_family(family) {
                plan.entries
                    .push((ROOT, family.as_str().as_bytes().to_vec()));
                if let Some(ino) = ino {
                    self.collected(ino);
                }
            }
            plan.attributes.extend(ino);
            for collection in Collection::ALL {
                let node = Node::CollectionFamily(collection, family.clone());
                plan.attributes.extend(self.ino(&node));
                if before.has_family(family) != after.has_family(family) {
                    self.collect_node(&mut plan, node);
                }
            }
        }
        plan.attributes.push(ROOT);
        let collections = Collection::ALL.map(Node::Collection);
        plan.attributes
            .extend(collections.iter().filter_map(|node| self.ino(node)));
        // Directories above rows carry the time of the last change of the set of tables.
        let above_rows = |slot: &Slot| match &slot.node {
            Node::Dir(table, key) => before
                .get(table)
                .is_some_and(|t| key.len() < t.schema.key().len()),
            _ => false,
        };
        plan.attributes.extend(
            self.slots()
                .filter(|(_, slot)| above_rows(slot))
                .map(|(ino, _)| ino),
        );
        plan
    }

    /// What the kernel may hold of a table that changes as a whole.
    pub(super) fn collect_table(&mut self, table: &TableRef) -> Plan {
        let mut plan = Plan::default();
        let catalog = self.view().catalog;
        let of_table = |slot: &Slot| slot.node.table().is_some_and(|t| **t == *table);
        let mut collected = Vec::new();
        for (ino, slot) in self
            .slots()
            .filter(|(_, slot)| of_table(slot) && !slot.detached)
        {
            if let Some(parent) = self.ino(&slot.node.parent())
                && let Some(name) = slot.node.name(&catalog)
            {
                plan.entries.push((parent, name));
            }
            if !slot.node.is_dir() && !slot.node.is_lazy() {
                plan.keep.push((ino, slot.node.clone()));
            }
            collected.push(ino);
        }
        plan.entries.extend(self.absent_in(of_table));
        for file in ExportFile::ALL {
            let node = Node::Export(Arc::new(table.clone()), file);
            if self.ino(&node).is_none() {
                self.collect_node(&mut plan, node);
            }
        }
        if let Some(family) = self.ino(&Node::Family(table.family.clone())) {
            plan.entries
                .push((family, table.table.as_str().as_bytes().to_vec()));
        }
        plan.attributes.extend(&collected);
        for ino in collected {
            self.collected(ino);
        }
        plan
    }

    /// What the kernel may hold of the changed rows of a table; once, for the table itself.
    pub(super) fn collect_rows_table(&mut self, table: &Arc<TableRef>) -> Plan {
        let mut plan = Plan::default();
        let schema = Node::TableFile(Arc::clone(table), TableFile::Schema);
        let same = [Node::Table(Arc::clone(table)), schema];
        plan.attributes
            .extend(same.iter().filter_map(|node| self.ino(node)));
        self.collect_node(
            &mut plan,
            Node::TableFile(Arc::clone(table), TableFile::Seq),
        );
        for file in ExportFile::ALL {
            self.collect_node(&mut plan, Node::Export(Arc::clone(table), file));
        }
        plan
    }

    /// What the kernel may hold of one changed row.
    pub(super) fn collect_row(
        &mut self,
        plan: &mut Plan,
        table: &Arc<TableRef>,
        key: &Key,
        kind: RowKind,
        fields: usize,
    ) {
        let row = Node::Dir(Arc::clone(table), key.as_ref().into());
        let Node::Dir(_, key) = &row else { return };
        // The directory of a row that comes may be known too: one that a process stayed in while
        // the table was cleared. The kernel may hold there that the files are absent.
        let files = (0..fields)
            .filter_map(RowFile::field)
            .chain([RowFile::Json]);
        for file in files {
            let node = Node::RowFile(Arc::clone(table), Arc::clone(key), file);
            if self.touch(&node) == Touch::Entry {
                self.collect_node(plan, node);
            } else if let Some(ino) = self.ino(&node) {
                plan.attributes.push(ino);
            }
        }
        plan.attributes.extend(self.ino(&row));
        if kind != RowKind::Updated {
            self.collect_node(plan, row);
        }
    }

    /// A file may be known whose directory is not: a watch holds an inode, and nothing of the way to
    /// it.
    pub(super) fn collect_node(&mut self, plan: &mut Plan, node: Node) {
        let parent = self.ino(&node.parent());
        match self.ino(&node) {
            Some(ino) => {
                plan.attributes.push(ino);
                if let Some(parent) = parent
                    && let Some(name) = node.name(&self.view().catalog)
                {
                    plan.entries.push((parent, name));
                }
                self.collected(ino);
                // What is made when it is asked for is kept from then on; before, there is nothing.
                if !node.is_dir() && !node.is_lazy() {
                    plan.keep.push((ino, node));
                }
            }
            None => {
                if let Some(parent) = parent
                    && let Some(name) = node.name(&self.view().catalog)
                    && self.is_absent(parent, &name)
                {
                    plan.entries.push((parent, name));
                }
            }
        }
    }

    fn collected(&mut self, ino: u64) {
        if let Some(transition) = &mut self.transition {
            transition.collected.push(ino);
        }
    }

    /// The commit has happened: the changed places move on. Safe to call again.
    pub(super) fn finish(&mut self) {
        let Some(mut transition) = self.transition.take() else {
            return;
        };
        let inodes = std::mem::take(&mut transition.collected);
        let late = std::mem::take(&mut transition.late);
        let catalog = self.view().catalog;
        for ino in &late {
            if let Some(slot) = self.slot(*ino)
                && let Some(parent) = self.ino(&slot.node.parent())
                && let Some(name) = slot.node.name(&catalog)
            {
                self.expired.push((parent, name));
            }
        }
        for ino in inodes.into_iter().chain(late) {
            if self
                .slot(ino)
                .is_some_and(|slot| transition.supersedes(&slot.node))
            {
                self.supersede(ino);
            }
        }
        self.announcing.pending = self.announcing.on;
        self.drop_rows(&transition);
        self.advance(transition.to, transition.catalog);
    }

    /// The commit has failed: everything stays as it was. Returns the versions that were kept for
    /// nothing, to be dropped when the lock is not held.
    pub(super) fn abandon(&mut self) -> Vec<Arc<Version>> {
        let Some(transition) = self.transition.take() else {
            return Vec::new();
        };
        let inodes = transition.collected.into_iter().chain(transition.late);
        let fixed = |slot: &&mut Slot| !slot.node.is_lazy();
        inodes
            .filter_map(|ino| self.slot_mut(ino).filter(fixed)?.version.take())
            .collect()
    }

    fn drop_rows(&mut self, transition: &Transition) {
        let changed: usize = transition
            .tables
            .values()
            .map(|t| match t {
                Touched::Whole { .. } => usize::MAX,
                Touched::Rows { rows, .. } => rows.len(),
            })
            .fold(0, usize::saturating_add);
        if changed > self.rows().len() {
            self.rows()
                .remove_where(|table, key| match transition.tables.get(table) {
                    None => false,
                    Some(Touched::Whole { .. }) => true,
                    Some(Touched::Rows { rows, .. }) => rows.contains_key(&**key),
                });
            return;
        }
        for (table, touched) in &transition.tables {
            let Touched::Rows { rows, .. } = touched else {
                continue;
            };
            let table = Arc::new(table.clone());
            for key in rows.keys() {
                self.rows().remove(&table, &key.as_ref().into());
            }
        }
    }
}
