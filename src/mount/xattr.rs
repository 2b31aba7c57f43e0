//! Extended attributes: which entry made what one sees, and of which type it is.

use super::server::{Fault, Inode, Server};
use super::state::View;
use crate::tree::node::{Node, RowFile};

impl Server {
    /// The value of an extended attribute of an inode.
    pub(super) fn xattr(&self, ino: u64, attribute: &[u8]) -> Result<Vec<u8>, Fault> {
        let (node, view) = {
            let state = self.state();
            (
                state.slot(ino).ok_or(Fault::Stale)?.node.clone(),
                state.view(),
            )
        };
        match attribute {
            b"user.ctlfs.type" => {
                let ty = self.type_of(&view, &node).ok_or(Fault::NoAttribute)?;
                Ok(ty.as_bytes().to_vec())
            }
            b"user.ctlfs.seq" if has_seq(&node) => match self.inspect(ino)? {
                Inode::Present { found, .. } => {
                    Ok(found.ok_or(Fault::Stale)?.mark.seq.to_string().into_bytes())
                }
                Inode::Fixed { version, .. } => Ok(version.mark.seq.to_string().into_bytes()),
            },
            _ => Err(Fault::NoAttribute),
        }
    }

    /// The names of the extended attributes of an inode, each with a NUL behind it.
    pub(super) fn xattrs(&self, ino: u64) -> Result<Vec<u8>, Fault> {
        let state = self.state();
        let slot = state.slot(ino).ok_or(Fault::Stale)?;
        let mut names = Vec::new();
        if has_seq(&slot.node) {
            names.extend_from_slice(b"user.ctlfs.seq\0");
        }
        if self.type_of(&state.view(), &slot.node).is_some() {
            names.extend_from_slice(b"user.ctlfs.type\0");
        }
        Ok(names)
    }

    fn type_of(&self, view: &View, node: &Node) -> Option<&'static str> {
        match node {
            Node::RowFile(_, _, RowFile::Json) => Some("json"),
            Node::RowFile(table, _, RowFile::Field(index)) => view
                .catalog
                .get(table)?
                .schema
                .fields()
                .get(usize::from(*index))
                .map(|f| f.ty.as_str()),
            _ => None,
        }
    }
}

/// Whether a place has an entry that last changed it.
fn has_seq(node: &Node) -> bool {
    matches!(
        node,
        Node::Export(..) | Node::Table(_) | Node::TableFile(..) | Node::Dir(..) | Node::RowFile(..)
    )
}
