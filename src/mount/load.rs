//! What there is to say of a place: read from the LDB or from a row read lately, and turned into
//! attributes and bytes.

use std::borrow::Cow;
use std::hash::BuildHasher;
use std::sync::{Arc, OnceLock, PoisonError};

use super::pins::Pin;
use super::server::{Attributes, Content, Fault, Found, Server};
use super::state::View;
use crate::ldb::LdbError;
use crate::ldb::reader::{At, Mark, Reader, Row};
use crate::model::{Table, TableRef};
use crate::tree::access::Access;
use crate::tree::node::{Node, RowFile, SharedKey, TableFile};
use crate::tree::render;

/// A row as it is kept, with what was made from it.
#[derive(Debug)]
pub(super) struct CachedRow {
    pub(super) row: Row,
    json: OnceLock<Box<[u8]>>,
}

impl CachedRow {
    fn new(row: Row) -> Self {
        CachedRow {
            row,
            json: OnceLock::new(),
        }
    }

    /// The row as `row.json` shows it. A large file is read in many parts: made once.
    fn json(&self, table: &Table) -> &[u8] {
        self.json
            .get_or_init(|| render::row_json(&table.schema, &self.row.values).into())
    }
}

impl Server {
    /// What there is to say of a place in this view; `None` if it does not exist.
    pub(super) fn load(&self, view: &View, node: &Node) -> Result<At<Option<Found>>, Fault> {
        let here = |value| {
            Ok(At {
                seq: view.seq,
                value,
            })
        };
        let plain = |mark| Found {
            size: 0,
            mark,
            content: Content::None,
        };
        if let (Some(pin), Node::Root) = (node.pin(), node.place()) {
            return here(self.pins.directory(pin).map(|(_, _, mark)| plain(mark)));
        }
        let node = node.place();
        let (table, key) = match node {
            // It stands for itself no longer.
            Node::Pinned(..) => return here(None),
            Node::Control | Node::Pins => {
                return here(Some(plain(Mark {
                    seq: view.seq,
                    time: self.started,
                })));
            }
            Node::ControlFile(_) => return here(None),
            Node::Family(family) | Node::CollectionFamily(_, family)
                if !view.catalog.has_family(family) =>
            {
                return here(None);
            }
            Node::Root | Node::Family(_) | Node::Collection(_) | Node::CollectionFamily(..) => {
                let time = self.read_in(view, Reader::schema_time)?;
                let mark = Mark {
                    seq: time.seq,
                    time: time.value,
                };
                return Ok(At {
                    seq: time.seq,
                    value: Some(plain(mark)),
                });
            }
            Node::Export(name, file) => match view.catalog.get(name) {
                Some(table) if file.suits(&table.schema) => {
                    let mark = self.read_in(view, |reader| reader.table_mark(table))?;
                    return Ok(At {
                        seq: mark.seq,
                        value: Some(Found {
                            // Not known yet, and no more than that.
                            size: self.size_before(*file),
                            mark: mark.value,
                            content: Content::Lazy(view.epoch),
                        }),
                    });
                }
                _ => return here(None),
            },
            Node::Table(name) | Node::TableFile(name, _) => {
                let Some(table) = view.catalog.get(name) else {
                    return here(None);
                };
                return self.load_table(view, table, node);
            }
            Node::Dir(name, key) => match view.catalog.get(name) {
                None => return here(None),
                Some(table) if key.len() < table.schema.key().len() => {
                    let exists = self.read_in(view, |reader| reader.has_prefix(table, key))?;
                    if !exists.value {
                        return Ok(At {
                            seq: exists.seq,
                            value: None,
                        });
                    }
                    let time = self.read_in(view, Reader::schema_time)?;
                    let mark = Mark {
                        seq: time.seq,
                        time: time.value,
                    };
                    // Two reads: a commit between them shows as a position that is not the view's.
                    let seq = if exists.seq == view.seq {
                        time.seq
                    } else {
                        exists.seq
                    };
                    return Ok(At {
                        seq,
                        value: Some(plain(mark)),
                    });
                }
                Some(table) => (table, key),
            },
            Node::RowFile(name, key, _) => match view.catalog.get(name) {
                None => return here(None),
                Some(table) => (table, key),
            },
        };
        let row = self.row(view, table, node.table(), key)?;
        let value = row.value.and_then(|row| {
            let size = match node {
                Node::RowFile(_, _, RowFile::Json) => row.json(table).len() as u64,
                Node::RowFile(_, _, RowFile::Field(index)) => {
                    let index = usize::from(*index);
                    let field = table.schema.fields().get(index)?;
                    render::field_len(field.ty, row.row.values.get(index)?, self.newline)?
                }
                _ => 0,
            };
            Some(Found {
                size,
                mark: row.row.mark,
                content: Content::Row(Arc::clone(table), row),
            })
        });
        Ok(At {
            seq: row.seq,
            value,
        })
    }

    pub(super) fn load_table(
        &self,
        view: &View,
        table: &Arc<Table>,
        node: &Node,
    ) -> Result<At<Option<Found>>, Fault> {
        let mark = self.read_in(view, |reader| reader.table_mark(table))?;
        let bytes = match node {
            Node::TableFile(_, TableFile::Schema) => Some(render::schema_json(table)),
            Node::TableFile(_, TableFile::Seq) => {
                Some(format!("{}\n", mark.value.seq).into_bytes())
            }
            _ => None,
        };
        let found = Found {
            size: bytes.as_ref().map_or(0, |b| b.len() as u64),
            mark: mark.value,
            content: bytes.map_or(Content::None, Content::Bytes),
        };
        Ok(At {
            seq: mark.seq,
            value: Some(found),
        })
    }

    /// A row of this view: one read lately, or one from the LDB, which is then kept.
    pub(super) fn row(
        &self,
        view: &View,
        table: &Arc<Table>,
        name: Option<&Arc<TableRef>>,
        key: &SharedKey,
    ) -> Result<At<Option<Arc<CachedRow>>>, Fault> {
        let Some(name) = name else {
            return Ok(At {
                seq: view.seq,
                value: None,
            });
        };
        if let Some(pin) = &view.pin {
            return self.pinned_row(pin, table, name, key);
        }
        {
            let mut state = self.state();
            let now = state.view();
            if (now.seq, now.epoch) == (view.seq, view.epoch)
                && let Some(row) = state.rows().get(name, key)
            {
                return Ok(At {
                    seq: view.seq,
                    value: Some(row),
                });
            }
        }
        let read = self.read_in(view, |reader| reader.row(table, key))?;
        let row = read.value.map(|row| Arc::new(CachedRow::new(row)));
        if let Some(row) = &row {
            let mut state = self.state();
            if state.may_keep(view, read.seq) {
                state.rows().insert(name, key, Arc::clone(row));
            }
        }
        Ok(At {
            seq: read.seq,
            value: row,
        })
    }

    fn pinned_row(
        &self,
        pin: &Pin,
        table: &Arc<Table>,
        name: &Arc<TableRef>,
        key: &SharedKey,
    ) -> Result<At<Option<Arc<CachedRow>>>, Fault> {
        let rows = || {
            let rows = pin.snapshot().rows.lock();
            rows.unwrap_or_else(PoisonError::into_inner)
        };
        let seq = pin.seq();
        if let Some(row) = rows().get(name, key) {
            let value = Some(row);
            return Ok(At { seq, value });
        }
        let read = pin.read(|reader| reader.row(table, key));
        let read = read.map_err(|error| self.damaged(error))?;
        let value = read.value.map(|row| Arc::new(CachedRow::new(row)));
        if let Some(row) = &value {
            rows().insert(name, key, Arc::clone(row));
        }
        Ok(At { seq, value })
    }

    /// The bytes of a file, from what was loaded of it.
    pub(super) fn bytes<'a>(&self, node: &Node, found: &'a Found) -> Option<Cow<'a, [u8]>> {
        match (&found.content, node.place()) {
            (Content::Bytes(bytes), _) => Some(Cow::Borrowed(bytes)),
            (Content::Row(table, row), Node::RowFile(_, _, RowFile::Json)) => {
                Some(Cow::Borrowed(row.json(table)))
            }
            (Content::Row(table, row), Node::RowFile(_, _, RowFile::Field(index))) => {
                let index = usize::from(*index);
                let field = table.schema.fields().get(index)?;
                render::field_bytes(field.ty, row.row.values.get(index)?, self.newline)
            }
            _ => None,
        }
    }

    pub(super) fn fingerprint(&self, node: &Node, found: Option<&Found>) -> u64 {
        match found {
            // Every commit that was found out may have changed it.
            Some(Found {
                content: Content::Lazy(epoch),
                ..
            }) if self.fingerprints => *epoch,
            Some(found) if !node.is_dir() && node.pin().is_none() && self.fingerprints => self
                .bytes(node, found)
                .map_or(0, |bytes| self.hasher.hash_one(bytes)),
            _ => 0,
        }
    }

    pub(super) fn attributes(
        &self,
        node: &Node,
        ino: u64,
        found: &Found,
        links: u32,
    ) -> Attributes {
        let access = self.access_of(node);
        let is_dir = node.is_dir();
        Attributes {
            ino,
            is_dir,
            size: found.size,
            time: found.mark.time,
            mode: match node {
                // Whoever may list it may pin, and drop pins of his own.
                Node::Pins => access.dir_mode() | (access.file_mode() & 0o444) >> 1 | 0o1000,
                _ if is_dir => access.dir_mode(),
                _ => access.file_mode(),
            },
            uid: access.uid,
            gid: access.gid,
            links,
        }
    }

    pub(super) fn access_of(&self, node: &Node) -> Access {
        if let (Some(pin), Node::Root) = (node.pin(), node.place()) {
            let access = self.access.default_access();
            return match self.pins.directory(pin) {
                Some((uid, gid, _)) => Access { uid, gid, ..access },
                None => access,
            };
        }
        match node.place() {
            Node::Pinned(..) => self.access.default_access(),
            Node::Root => self.access.default_access(),
            Node::Control | Node::ControlFile(_) | Node::Collection(_) | Node::Pins => {
                self.access.of_control()
            }
            Node::Family(family) | Node::CollectionFamily(_, family) => {
                self.access.of_family(family)
            }
            Node::Export(t, _)
            | Node::Table(t)
            | Node::TableFile(t, _)
            | Node::Dir(t, _)
            | Node::RowFile(t, _, _) => self.access.of_table(t),
        }
    }

    /// `None` if the answer failed because the tables have changed under it.
    pub(super) fn checked<T, E: Into<Fault>>(
        &self,
        view: &View,
        answer: Result<T, E>,
    ) -> Result<Option<T>, Fault> {
        match answer {
            Ok(answer) => Ok(Some(answer)),
            Err(error) => {
                if let Some(pin) = &view.pin {
                    return Err(if pin.is_dropped() {
                        Fault::Stale
                    } else {
                        error.into()
                    });
                }
                // Perhaps it was prepared for tables that are no longer there.
                if self.fingerprints {
                    self.follow(true)?;
                    let same = Arc::ptr_eq(&view.catalog, &self.state().view().catalog);
                    return if same { Err(error.into()) } else { Ok(None) };
                }
                let now = self.read(Reader::position)?;
                if self.state().settle(view, now) {
                    return Err(error.into());
                }
                Ok(None)
            }
        }
    }

    /// Reads the LDB as it is now.
    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&mut Reader) -> rusqlite::Result<T>,
    ) -> Result<T, LdbError> {
        self.readers.read(read).map_err(|error| self.damaged(error))
    }

    /// Reads the LDB as `view` has it: as it is now, or as a pin keeps it.
    pub(super) fn read_in<T>(
        &self,
        view: &View,
        read: impl FnOnce(&mut Reader) -> rusqlite::Result<T>,
    ) -> Result<T, LdbError> {
        match &view.pin {
            None => self.read(read),
            Some(pin) => pin.read(read).map_err(|error| self.damaged(error)),
        }
    }

    /// Reports damage that a read has come upon.
    pub(super) fn damaged(&self, error: LdbError) -> LdbError {
        if let LdbError::Corrupt { reason, .. } | LdbError::NotAnLdb { reason, .. } = &error {
            let mut known = false;
            self.board
                .update(|p| known = p.damage.replace(reason.clone()).is_some());
            if !known {
                // Once: every read of the damaged part comes this way.
                tracing::error!(%reason, "the LDB is damaged: some reads fail");
            }
        }
        error
    }
}
