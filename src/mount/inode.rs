//! What an inode stands for now: its attributes and bytes, whether it still follows the tree or not.

use std::sync::Arc;
use std::time::Duration;

use super::answer::{Attributes, Content, Fault, Found, Inode};
use super::flip::Touch;
use super::kept::slice;
use super::server::{MAX_TRIES, Server};
use super::state::{LONG, Version};
use crate::ldb::reader::Mark;
use crate::model::Seq;
use crate::tree::node::Node;

impl Server {
    /// The attributes of an inode, and how long they hold.
    pub(super) fn getattr(&self, ino: u64) -> Result<(Attributes, Duration), Fault> {
        match self.inspect(ino)? {
            Inode::Present {
                node,
                found,
                fingerprint,
                attr_ttl,
            } => {
                let Some(found) = found else {
                    if !node.is_dir() {
                        return Err(Fault::Stale);
                    }
                    // A row that went with its whole table and may come back: until then its
                    // directory, if a process is in it, is one that has been removed.
                    let time = self.started;
                    let seq = Seq::ZERO;
                    let found = Found {
                        size: 0,
                        mark: Mark { seq, time },
                        content: Content::None,
                    };
                    return Ok((self.attributes(&node, ino, &found, 0), Duration::ZERO));
                };
                // The size of another version would end a read of this one too soon.
                if fingerprint != self.fingerprint(&node, Some(&found)) {
                    return Err(Fault::Stale);
                }
                if matches!(found.content, Content::Lazy(_)) {
                    return Err(Fault::Unrendered);
                }
                Ok((self.attributes(&node, ino, &found, 1), attr_ttl))
            }
            Inode::Fixed {
                node,
                version,
                detached,
                attr_ttl,
            } => {
                if version.bytes.is_none() && !node.is_dir() {
                    return Err(Fault::Stale);
                }
                let found = Found {
                    size: version.bytes.as_ref().map_or(0, |b| b.len()),
                    mark: version.mark,
                    content: Content::None,
                };
                let links = u32::from(!detached);
                Ok((self.attributes(&node, ino, &found, links), attr_ttl))
            }
        }
    }

    /// Up to `size` bytes of a file from `offset`.
    pub(super) fn read_file(&self, ino: u64, offset: u64, size: u32) -> Result<Vec<u8>, Fault> {
        match self.inspect(ino)? {
            Inode::Fixed { node, version, .. } => {
                if let Node::ControlFile(file) = node {
                    self.control_was_read(file, ino);
                }
                let bytes = version.bytes.as_ref().ok_or(Fault::Stale)?;
                Ok(bytes.read(offset, size)?)
            }
            Inode::Present {
                node,
                found,
                fingerprint,
                ..
            } => {
                let found = found.ok_or(Fault::Stale)?;
                if matches!(found.content, Content::Lazy(_)) {
                    return Err(Fault::Unrendered);
                }
                if fingerprint != self.fingerprint(&node, Some(&found)) {
                    return Err(Fault::Stale);
                }
                let bytes = self.bytes(&node, &found).ok_or(Fault::Stale)?;
                Ok(slice(&bytes, offset, size).to_vec())
            }
        }
    }

    /// What an inode stands for now.
    pub(super) fn inspect(&self, ino: u64) -> Result<Inode, Fault> {
        for _ in 0..MAX_TRIES {
            let (node, view, version, detached, attr_ttl) = {
                let state = self.state();
                let slot = state.slot(ino).ok_or(Fault::Stale)?;
                if slot.too_large {
                    return Err(Fault::TooLarge);
                }
                let attr_ttl = match &slot.node {
                    _ if slot.detached => LONG,
                    Node::ControlFile(_) => LONG,
                    node if node.is_lazy() && state.touch(node) == Touch::None => state.lifetime(),
                    // Until the commit, a version whose bytes are kept already still has its name.
                    _ => Duration::ZERO,
                };
                (
                    slot.node.clone(),
                    state.view(),
                    slot.version.clone(),
                    slot.detached,
                    attr_ttl,
                )
            };
            if let Some(version) = version {
                return Ok(Inode::Fixed {
                    node,
                    version,
                    detached,
                    attr_ttl,
                });
            }
            if detached {
                // A directory that is gone, or a version whose bytes nobody kept.
                let version = Arc::new(Version {
                    bytes: None,
                    mark: Mark {
                        seq: Seq::ZERO,
                        time: self.started,
                    },
                });
                return Ok(Inode::Fixed {
                    node,
                    version,
                    detached,
                    attr_ttl,
                });
            }
            let loaded = self.load(&view, &node);
            let Some(loaded) = self.checked(&view, loaded)? else {
                continue;
            };
            let mut state = self.state();
            if !state.settle(&view, loaded.seq) {
                drop(state);
                self.catch_up()?;
                continue;
            }
            let Some(slot) = state.slot(ino) else {
                return Err(Fault::Stale);
            };
            if slot.version.is_some() || slot.detached {
                continue;
            }
            let attr_ttl = match state.touch(&node) {
                Touch::None => state.lifetime(),
                Touch::Attributes | Touch::Entry => Duration::ZERO,
            };
            let fingerprint = slot.fingerprint;
            return Ok(Inode::Present {
                node,
                found: loaded.value,
                fingerprint,
                attr_ttl,
            });
        }
        Err(Fault::Restless)
    }
}
