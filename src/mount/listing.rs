//! Listings: every entry once, in key order, a page at a time, while rows come and go.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::dirs::{FixedEntry, OpenDir};
use super::server::{Content, Fault, Inode, Server};
use crate::tree::export::{Collection, ExportFile};
use crate::tree::name;
use crate::tree::node::{self, ControlFile, Node, TableFile};

/// How many keys a listing reads at a time.
const LIST_PAGE: usize = 512;

/// Takes an entry of a listing: the position behind it, its inode if known, whether it is a
/// directory, and its name. Returns whether it had room for it.
pub(super) type AddEntry<'a> = dyn FnMut(u64, Option<u64>, bool, &[u8]) -> bool + 'a;

impl Server {
    /// Opens a directory; the number is for [`Server::list`].
    pub(super) fn open_directory(&self, ino: u64) -> Result<u64, Fault> {
        let node = self.state().slot(ino).ok_or(Fault::Stale)?.node.clone();
        if !node.is_dir() {
            return Err(Fault::NotADirectory);
        }
        self.view_of(&node)?;
        let handle = self.next_directory.fetch_add(1, Ordering::Relaxed);
        self.directories()
            .insert(handle, Arc::new(Mutex::new(OpenDir::new(node, ino))));
        Ok(handle)
    }

    /// Closes a directory.
    pub(super) fn close_directory(&self, handle: u64) {
        self.directories().remove(&handle);
    }

    /// Lists an open directory from position `offset`: gives `add` the position behind each entry,
    /// its inode if known, whether it is a directory, and its name, until that says it is full.
    pub(super) fn list(
        &self,
        handle: u64,
        offset: u64,
        add: &mut AddEntry<'_>,
    ) -> Result<(), Fault> {
        let directory = self
            .directories()
            .get(&handle)
            .cloned()
            .ok_or(Fault::Stale)?;
        let mut directory = directory.lock().unwrap_or_else(PoisonError::into_inner);
        if offset == 0 || directory.fixed.is_empty() {
            let fixed = self.fixed_entries(&directory)?;
            directory.rewind(fixed);
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut position = offset;
        for entry in directory.fixed.iter().skip(start) {
            position += 1;
            if !add(position, entry.ino, entry.is_dir, &entry.name) {
                return Ok(());
            }
        }
        self.list_keys(&mut directory, offset, add)
    }

    fn list_keys(
        &self,
        directory: &mut OpenDir,
        offset: u64,
        add: &mut AddEntry<'_>,
    ) -> Result<(), Fault> {
        if self.is_gone(directory) {
            return Ok(());
        }
        let prefix = directory.prefix();
        let Some(name) = directory.node.place().table().cloned() else {
            return Ok(());
        };
        let first = directory.fixed.len() as u64;
        let (mut position, mut after) = match directory.resume(offset) {
            Some((position, key)) => (position, Some(key)),
            None => (first, None),
        };
        loop {
            let view = self.view_of(&directory.node)?;
            let Some(table) = view.catalog.get(&name) else {
                return Ok(());
            };
            let Some(ty) = table.schema.key_fields().nth(prefix.len()).map(|f| f.ty) else {
                return Ok(());
            };
            let page = self.read_in(&view, |reader| {
                reader.keys(table, &prefix, after.as_ref(), LIST_PAGE)
            });
            let Some(page) = self.checked(&view, page)? else {
                continue;
            };
            if view.pin.is_none() {
                // Whoever has seen this may look the entries up.
                self.state().seen(page.seq);
            }
            let last_page = page.value.len() < LIST_PAGE;
            for key in page.value {
                position += 1;
                let text = name::encode(ty, &key);
                if position > offset
                    && let Some(text) = text
                    && !add(position, None, true, &text)
                {
                    return Ok(());
                }
                directory.passed(position, &key);
                after = Some(key);
            }
            if last_page {
                return Ok(());
            }
        }
    }

    fn fixed_entries(&self, directory: &OpenDir) -> Result<Vec<FixedEntry>, Fault> {
        let mut entries = Vec::new();
        let fixed = |name: &str, is_dir: bool| FixedEntry {
            name: name.as_bytes().to_vec(),
            ino: None,
            is_dir,
        };
        for name in [".", ".."] {
            entries.push(FixedEntry {
                ino: (name == ".").then_some(directory.ino),
                ..fixed(name, true)
            });
        }
        if self.is_gone(directory) {
            return Ok(entries);
        }
        let view = self.view_of(&directory.node)?;
        match directory.node.place() {
            Node::Root => {
                if directory.node.pin().is_none() {
                    entries.push(fixed(node::CONTROL_DIR, true));
                }
                entries.extend(view.catalog.families().map(|f| fixed(f.as_str(), true)));
            }
            Node::Control => {
                let ready = self.board.progress().ready;
                let files = ControlFile::ALL.into_iter();
                let files = files.filter(|f| *f != ControlFile::Ready || ready);
                entries.extend(files.map(|f| fixed(f.name(), false)));
                entries.extend(Collection::ALL.into_iter().map(|c| fixed(c.name(), true)));
                entries.push(fixed(node::PINS_DIR, true));
            }
            Node::Pins => {
                entries.extend(self.pins.names().into_iter().map(|name| FixedEntry {
                    name,
                    ino: None,
                    is_dir: true,
                }));
            }
            Node::Collection(_) => {
                entries.extend(view.catalog.families().map(|f| fixed(f.as_str(), true)));
            }
            Node::CollectionFamily(collection, family) => {
                for table in view.catalog.tables_of(family) {
                    let files = ExportFile::ALL.into_iter();
                    let here = files.filter(|file| {
                        file.collection() == *collection && file.suits(&table.schema)
                    });
                    entries.extend(here.map(|file| fixed(&file.name(&table.name.table), false)));
                }
            }
            Node::Family(family) => {
                let tables = view.catalog.tables_of(family);
                entries.extend(tables.map(|t| fixed(t.name.table.as_str(), true)));
            }
            Node::Table(_) => {
                entries.extend(TableFile::ALL.into_iter().map(|f| fixed(f.name(), false)));
            }
            Node::Dir(..) => {
                if let Inode::Present {
                    found: Some(found), ..
                } = self.inspect(directory.ino)?
                    && let Content::Row(table, row) = found.content
                {
                    let fields = table.schema.fields().iter().zip(&row.row.values);
                    let set = fields.filter(|(_, value)| !value.is_null());
                    entries.extend(set.map(|(field, _)| fixed(field.name.as_str(), false)));
                    entries.push(fixed(node::ROW_JSON, false));
                }
            }
            Node::ControlFile(_)
            | Node::Export(..)
            | Node::Pinned(..)
            | Node::TableFile(..)
            | Node::RowFile(..) => {
                return Err(Fault::NotADirectory);
            }
        }
        Ok(entries)
    }

    /// Whether the directory was removed while it was open: it is empty then, for good.
    fn is_gone(&self, directory: &OpenDir) -> bool {
        let state = self.state();
        state.slot(directory.ino).is_none_or(|slot| slot.detached)
    }

    fn directories(&self) -> MutexGuard<'_, HashMap<u64, Arc<Mutex<OpenDir>>>> {
        self.directories
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
