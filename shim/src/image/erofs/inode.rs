//! Inodes (`struct erofs_inode_extended`): the form that keeps the modification time.

use super::plan::Place;
use super::xattr;
use crate::image::tree::{Inode, Metadata, Node};

pub const SIZE: u64 = 64;
/// Content only in blocks of its own, or with its tail behind the inode.
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;

/// All that an inode's record is made of.
pub struct Record<'a> {
    pub inode: Inode,
    pub meta: &'a Metadata,
    pub node: &'a Node,
    pub place: &'a Place,
}

impl Record<'_> {
    /// The record, to be followed by `attributes` bytes of attributes.
    pub fn encode(&self, attributes: usize) -> [u8; SIZE as usize] {
        let mut record = [0; SIZE as usize];
        let mut put = |at: usize, bytes: &[u8]| record[at..][..bytes.len()].copy_from_slice(bytes);
        let layout = if self.place.tail > 0 { FLAT_INLINE } else { FLAT_PLAIN };
        put(0, &(1 | layout << 1).to_le_bytes());
        put(2, &xattr::count(attributes).to_le_bytes());
        put(4, &(file_type(self.node) | self.meta.mode).to_le_bytes());
        put(8, &self.place.size.to_le_bytes());
        put(16, &self.address().to_le_bytes());
        put(20, &(self.inode.0 + 1).to_le_bytes());
        put(24, &self.meta.uid.to_le_bytes());
        put(28, &self.meta.gid.to_le_bytes());
        put(32, &self.meta.mtime.0.to_le_bytes());
        put(40, &self.meta.mtime.1.to_le_bytes());
        put(44, &self.place.links.to_le_bytes());
        record
    }

    /// The first block of the content, or the device number in the kernel's encoding.
    fn address(&self) -> u32 {
        match *self.node {
            Node::CharDevice(major, minor) | Node::BlockDevice(major, minor) => {
                minor & 0xff | major << 8 | (minor & !0xff) << 12
            }
            _ => self.place.block,
        }
    }
}

/// The type bits of a mode.
fn file_type(node: &Node) -> u16 {
    match node {
        Node::Fifo => 0o010_000,
        Node::CharDevice(..) => 0o020_000,
        Node::Directory => 0o040_000,
        Node::BlockDevice(..) => 0o060_000,
        Node::File(_) => 0o100_000,
        Node::Symlink(_) => 0o120_000,
        Node::Socket => 0o140_000,
    }
}
