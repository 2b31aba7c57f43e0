//! Open directories: where each listing stands.
//!
//! A position in a directory is the count of entries before it. That says nothing about keys, so
//! an open directory remembers the key behind each entry of the last page, and one in every
//! [`MARK_EVERY`] before that: enough to go on from anywhere in bounded memory.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use crate::model::Value;
use crate::tree::node::{Node, SharedKey};

/// Every so many entries a position is remembered for good.
const MARK_EVERY: u64 = 1024;
/// Up to how many positions of the latest pages are remembered.
const WINDOW: usize = 4096;

/// The directories that are open, by handle.
pub(super) type OpenDirs = Mutex<HashMap<u64, Arc<Mutex<OpenDir>>>>;

/// An open directory.
#[derive(Debug)]
pub(super) struct OpenDir {
    /// The directory.
    pub(super) node: Node,
    /// Its inode.
    pub(super) ino: u64,
    /// The entries that are not keys of a table; all of them, in most directories. Taken when a
    /// listing begins, so that they belong to one state of the tree.
    pub(super) fixed: Vec<FixedEntry>,
    recent: VecDeque<(u64, Value)>,
    marks: Vec<(u64, Value)>,
}

/// An entry with a name that is known without reading a table's keys.
#[derive(Debug, Clone)]
pub(super) struct FixedEntry {
    /// The name.
    pub(super) name: Vec<u8>,
    /// Its inode if it is known.
    pub(super) ino: Option<u64>,
    /// Whether it is a directory.
    pub(super) is_dir: bool,
}

impl OpenDir {
    /// A directory at its beginning.
    pub(super) fn new(node: Node, ino: u64) -> Self {
        OpenDir {
            node,
            ino,
            fixed: Vec::new(),
            recent: VecDeque::new(),
            marks: Vec::new(),
        }
    }

    /// Back to the beginning, with these fixed entries.
    pub(super) fn rewind(&mut self, fixed: Vec<FixedEntry>) {
        self.fixed = fixed;
        self.recent.clear();
        self.marks.clear();
    }

    /// Remembers that the entry before position `offset` is the one of `key`.
    pub(super) fn passed(&mut self, offset: u64, key: &Value) {
        if offset.is_multiple_of(MARK_EVERY) && self.marks.last().is_none_or(|(o, _)| *o < offset) {
            self.marks.push((offset, key.clone()));
        }
        if self.recent.back().is_some_and(|(last, _)| *last >= offset) {
            self.recent.clear();
        }
        if self.recent.len() == WINDOW {
            self.recent.pop_front();
        }
        self.recent.push_back((offset, key.clone()));
    }

    /// Where to go on for position `offset`: the nearest position at or before it, with the key of
    /// the entry before that. `None` before the first key.
    pub(super) fn resume(&self, offset: u64) -> Option<(u64, Value)> {
        let behind = |(position, _): &&(u64, Value)| *position <= offset;
        let recent = self.recent.iter().rfind(behind);
        let mark = self.marks.iter().rfind(behind);
        recent
            .into_iter()
            .chain(mark)
            .max_by_key(|(position, _)| *position)
            .cloned()
    }

    /// The part of the key above this directory, if it lists keys.
    pub(super) fn prefix(&self) -> SharedKey {
        match self.node.place() {
            Node::Dir(_, key) => SharedKey::clone(key),
            _ => SharedKey::from([]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_goes_on_from_any_position_of_the_last_pages_and_near_any_other() {
        let mut dir = OpenDir::new(Node::Root, 1);
        for offset in 1..=20_000_i64 {
            dir.passed(offset.unsigned_abs(), &Value::Integer(offset));
        }
        assert_eq!(dir.resume(19_999), Some((19_999, Value::Integer(19_999))));
        assert_eq!(dir.resume(5_000), Some((4_096, Value::Integer(4_096))));
        assert_eq!(dir.resume(10), None);
        // Going back and on again keeps the positions ascending.
        dir.passed(5_001, &Value::Integer(5_001));
        assert_eq!(dir.resume(5_001), Some((5_001, Value::Integer(5_001))));
        dir.rewind(Vec::new());
        assert_eq!(dir.resume(20_000), None);
    }
}
