//! The announcement of a commit: which entries move in, are made or are removed, so that whoever
//! watches them hears of it.
//!
//! Every changed file is a new inode. The announcing thread renames the new one over the old one:
//! the kernel looks both names up first, and is told that the target is still the old inode
//! ([`super::announcing`]). So the old one's watchers hear that it was replaced, the directory's
//! that an entry has moved in, and from then on the name leads to the inode that it led to since the
//! commit anyway.
//!
//! Only what can be watched is announced: what is in directories that the kernel knows. It knows
//! those that somebody has looked up and that it has not dropped since.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::sync::Arc;

use super::announcer::{Job, Step};
use super::announcing::Target;
use super::server::Server;
use super::state::{State, View};
use crate::model::{
    Catalog, ChangeSet, Extent, FamilyName, Key, RowChange, RowKind, TableChange, TableRef, Value,
};
use crate::tree::export::{Collection, ExportFile};
use crate::tree::node::{Node, RowFile, TableFile};

/// A transaction of more changed rows than this is announced by the `.seq` of its tables only.
const MAX_CHANGES: usize = 1000;
/// The same holds for one that would take more than so many renames, which take a second or so.
const MAX_STEPS: usize = 10_000;

/// What happens to a place.
enum Act {
    Replace(Node),
    /// A field's file that comes in the place of the second one: the table's fields are numbered
    /// otherwise now.
    Renumber(Node, Node),
    Remove(Node),
    Make(Node),
}

/// What the kernel still holds of what the commit superseded.
struct Known {
    old: HashMap<Node, u64>,
    /// What is above those: a watch holds an inode, and nothing of the way to it.
    above: HashSet<Node>,
}

/// Collects jobs, under the lock of the state.
struct Plan<'a> {
    state: &'a mut State,
    before: &'a Catalog,
    after: Arc<Catalog>,
    known: Known,
    /// The directory that the last job is for.
    last: Option<Node>,
    jobs: Vec<Job>,
}

impl Server {
    /// What is to be announced of a commit that has happened; `before` are the tables as they were.
    /// From now on the announcing thread is answered accordingly.
    /// `missed` are tables of earlier commits of which nothing could be announced.
    pub(super) fn plan_announcement(
        &self,
        changes: &ChangeSet,
        before: &Catalog,
        missed: &HashSet<TableRef>,
    ) -> Vec<Job> {
        let (old, view) = {
            let mut state = self.state();
            if !state.announcing.on {
                return Vec::new();
            }
            let old = std::mem::take(&mut state.announcing.superseded);
            (old, state.view())
        };
        let rows: usize = changes
            .tables
            .iter()
            .map(|t| match &t.extent {
                Extent::Whole => 0,
                Extent::Rows { rows, .. } => rows.len(),
            })
            .sum();
        let old: HashMap<Node, u64> = old.into_iter().collect();
        let mut above = HashSet::new();
        for node in old.keys() {
            let mut node = node.parent();
            while node != Node::Root && above.insert(node.clone()) {
                node = node.parent();
            }
        }
        let known = Known { old, above };
        let mut acts = self.acts(changes, &view, before, &known, rows <= MAX_CHANGES);
        if acts.len() > MAX_STEPS {
            acts = self.acts(changes, &view, before, &known, false);
        }
        for table in missed.iter().filter(|t| view.catalog.get(t).is_some()) {
            let seq = TableFile::Seq;
            acts.push(Act::Replace(Node::TableFile(Arc::new(table.clone()), seq)));
        }
        let mut state = self.state();
        let mut plan = Plan {
            state: &mut state,
            before,
            after: view.catalog,
            known,
            last: None,
            jobs: Vec::new(),
        };
        for act in acts {
            plan.add(act);
        }
        plan.jobs
    }

    /// The announcement is over.
    pub(super) fn end_announcement(&self) {
        self.state().announcing.clear();
    }

    /// What happens to which place, in the order in which it is told.
    fn acts(
        &self,
        changes: &ChangeSet,
        view: &View,
        before: &Catalog,
        known: &Known,
        few: bool,
    ) -> Vec<Act> {
        let after = &view.catalog;
        let mut acts = Vec::new();
        for family in after.families().filter(|f| !before.has_family(f)) {
            acts.extend(places_of(family).map(Act::Make));
        }
        for TableChange { table, extent } in &changes.tables {
            let name = Arc::new(table.clone());
            let exists = after.get(table).is_some();
            for file in ExportFile::ALL {
                let suits = |catalog: &Catalog| {
                    let table = catalog.get(table);
                    table.is_some_and(|table| file.suits(&table.schema))
                };
                let node = Node::Export(Arc::clone(&name), file);
                if suits(after) {
                    acts.push(Act::Replace(node));
                } else if suits(before) {
                    acts.push(Act::Remove(node));
                }
            }
            if exists && before.get(table).is_none() {
                acts.push(Act::Make(Node::Table(Arc::clone(&name))));
                continue;
            }
            match extent {
                Extent::Rows { rows, dirs } if few => {
                    let made = dirs.iter().filter(|d| d.exists);
                    let mut made: Vec<_> = made.map(|d| &d.prefix).collect();
                    made.sort_by_key(|prefix| prefix.len());
                    acts.extend(made.into_iter().map(|p| Act::Make(directory(&name, p))));
                    for row in rows {
                        self.row_acts(view, &name, row, known, &mut acts);
                    }
                    let gone = dirs.iter().filter(|d| !d.exists);
                    let mut gone: Vec<_> = gone.map(|d| &d.prefix).collect();
                    gone.sort_by_key(|prefix| std::cmp::Reverse(prefix.len()));
                    acts.extend(gone.into_iter().map(|p| Act::Remove(directory(&name, p))));
                }
                Extent::Rows { .. } => {}
                // Otherwise so many rows changed that they were not kept.
                Extent::Whole if few && before.get(table) != after.get(table) => {
                    self.whole_acts(view, before, &name, known, &mut acts);
                }
                Extent::Whole => {}
            }
            if exists {
                if changes.catalog.is_some() && before.get(table) != after.get(table) {
                    let schema = Node::TableFile(Arc::clone(&name), TableFile::Schema);
                    acts.push(Act::Replace(schema));
                }
                // Last, so that whoever waits for it finds everything announced.
                acts.push(Act::Replace(Node::TableFile(name, TableFile::Seq)));
            } else {
                acts.push(Act::Remove(Node::Table(name)));
            }
        }
        for family in before.families().filter(|f| !after.has_family(f)) {
            acts.extend(places_of(family).map(Act::Remove));
        }
        acts
    }

    fn row_acts(
        &self,
        view: &View,
        table: &Arc<TableRef>,
        change: &RowChange,
        known: &Known,
        acts: &mut Vec<Act>,
    ) {
        let row = directory(table, &change.key);
        let Node::Dir(_, key) = &row else { return };
        let file = |file| Node::RowFile(Arc::clone(table), Arc::clone(key), file);
        let fields = || change.fields.iter().filter_map(RowFile::field);
        match change.kind {
            RowKind::Created => acts.push(Act::Make(row.clone())),
            RowKind::Deleted => {
                acts.extend(fields().map(|field| Act::Remove(file(field))));
                acts.push(Act::Remove(file(RowFile::Json)));
                acts.push(Act::Remove(row.clone()));
            }
            RowKind::Updated => {
                if self.state().ino(&row).is_none() && !known.above.contains(&row) {
                    return;
                }
                let loaded = match view.catalog.get(table) {
                    Some(shape) => self.row(view, shape, Some(table), key),
                    None => return,
                };
                let Ok(Some(loaded)) = loaded.map(|at| at.value) else {
                    return;
                };
                for field in fields() {
                    let RowFile::Field(index) = field else {
                        continue;
                    };
                    let value = loaded.row.values.get(usize::from(index));
                    acts.push(if value.is_none_or(Value::is_null) {
                        Act::Remove(file(field))
                    } else {
                        Act::Replace(file(field))
                    });
                }
                acts.push(Act::Replace(file(RowFile::Json)));
            }
        }
    }

    /// A table that changed as a whole: every file of it that was known is another one now.
    fn whole_acts(
        &self,
        view: &View,
        before: &Catalog,
        table: &Arc<TableRef>,
        known: &Known,
        acts: &mut Vec<Act>,
    ) {
        let of_table =
            |node: &&Node| matches!(node, Node::Dir(t, _) | Node::RowFile(t, _, _) if t == table);
        let mut nodes: Vec<&Node> = known.old.keys().filter(of_table).collect();
        if nodes.len() > MAX_CHANGES {
            return;
        }
        // What is in a directory goes before the directory.
        nodes.sort_by_key(|node| match node {
            Node::Dir(_, key) => (1, usize::MAX - key.len()),
            _ => (0, 0),
        });
        // The number that a field has now.
        let number = |old: u16| {
            let name = &before
                .get(table)?
                .schema
                .fields()
                .get(usize::from(old))?
                .name;
            let fields = view.catalog.get(table)?.schema.fields();
            u16::try_from(fields.iter().position(|field| field.name == *name)?).ok()
        };
        let is_there = |node: &Node| self.load(view, node).is_ok_and(|at| at.value.is_some());
        for node in nodes {
            let now = match node {
                Node::RowFile(table, key, RowFile::Field(old)) => number(*old).map(|new| {
                    Node::RowFile(Arc::clone(table), Arc::clone(key), RowFile::Field(new))
                }),
                Node::RowFile(..) => Some(node.clone()),
                _ => None,
            };
            acts.push(match now.filter(is_there) {
                Some(now) if now == *node => Act::Replace(now),
                Some(now) => Act::Renumber(now, node.clone()),
                None => Act::Remove(node.clone()),
            });
        }
    }
}

/// Where a family is in the tree.
fn places_of(family: &FamilyName) -> impl Iterator<Item = Node> {
    let collections = Collection::ALL.map(|c| Node::CollectionFamily(c, family.clone()));
    collections
        .into_iter()
        .chain([Node::Family(family.clone())])
}

impl Plan<'_> {
    fn add(&mut self, act: Act) {
        // What it was before.
        let (Act::Replace(node) | Act::Renumber(_, node) | Act::Remove(node) | Act::Make(node)) =
            &act;
        let parent = node.parent();
        // A directory that is gone is known by the inode it had.
        let known = self.state.ino(&parent).is_some() || self.known.old.contains_key(&parent);
        if !known && !self.known.old.contains_key(node) && !self.known.above.contains(node) {
            return;
        }
        let name = match &act {
            Act::Remove(node) => node.name(self.before).or_else(|| node.name(&self.after)),
            Act::Replace(node) | Act::Renumber(node, _) | Act::Make(node) => self.name(node),
        };
        let Some(name) = name else { return };
        let Ok(text) = CString::new(name.clone()) else {
            return;
        };
        let old = self.known.old.get(node).copied();
        let (target, step) = match act {
            Act::Replace(node) | Act::Renumber(node, _) => {
                let announcing = &mut self.state.announcing;
                announcing.next += 1;
                let staged = announcing.next.to_string();
                let Ok(token) = CString::new(staged.clone()) else {
                    return;
                };
                announcing.staged.insert(staged.into_bytes(), node);
                let target = old.map_or(Target::Absent { makes: None }, Target::Old);
                let step = Step::MoveIn {
                    staged: token,
                    name: text,
                };
                (target, step)
            }
            Act::Remove(node) => {
                let step = if node.is_dir() {
                    Step::RemoveDir(text)
                } else {
                    Step::Unlink(text)
                };
                (Target::Going(old, node), step)
            }
            Act::Make(node) => (Target::Absent { makes: Some(node) }, Step::Make(text)),
        };
        if self.last.as_ref() != Some(&parent) {
            let Some(path) = self.path(&parent) else {
                return;
            };
            self.jobs.push(Job {
                directory: path,
                steps: Vec::new(),
            });
            self.last = Some(parent.clone());
        }
        if let Some(job) = self.jobs.last_mut() {
            job.steps.push(step);
        }
        self.state.announcing.targets.insert((parent, name), target);
    }

    fn name(&self, node: &Node) -> Option<Vec<u8>> {
        node.name(&self.after).or_else(|| node.name(self.before))
    }

    /// Where a directory is, from the root.
    fn path(&self, directory: &Node) -> Option<CString> {
        let mut names = Vec::new();
        let mut node = directory.clone();
        while node != Node::Root {
            names.push(self.name(&node)?);
            node = node.parent();
        }
        names.reverse();
        CString::new(names.join(&b'/')).ok()
    }
}

fn directory(table: &Arc<TableRef>, key: &Key) -> Node {
    Node::Dir(Arc::clone(table), key.as_ref().into())
}
