//! Where everything goes: first the inodes, siblings side by side, then the contents in blocks.
//!
//! The last part of a content (its tail) is kept behind its inode if there is room in that block, so
//! that small files, directories and links come with their inode and half-filled blocks are rare.

use super::{BLOCK, FormatError, dirent, inode, xattr};
use crate::image::tree::{Inode, Node, ROOT, Tree};

/// An inode's address is counted in slots of this size.
const SLOT: u64 = 32;
/// Moving to the next block for the sake of a tail leaves a gap: not for tails longer than this.
const MAX_MOVED_TAIL: u64 = 1024;

/// An inode's place in the image. An inode that no name leads to has no links and no place.
#[derive(Debug, Clone, Default)]
pub struct Place {
    /// Byte of the inode in the image.
    pub offset: u64,
    /// Bytes of content, and how many of them follow the inode.
    pub size: u64,
    pub tail: u32,
    /// First block of the content that does not.
    pub block: u32,
    pub links: u32,
    parent: Option<Inode>,
}

impl Place {
    /// The inode's address: its offset in slots.
    pub fn nid(&self) -> u64 {
        self.offset / SLOT
    }
}

#[derive(Debug)]
pub struct Plan {
    order: Vec<Inode>,
    places: Vec<Place>,
    blocks: u64,
}

impl Plan {
    pub fn new(tree: &Tree) -> Result<Self, FormatError> {
        let places = vec![Place::default(); tree.inode_count()];
        let mut plan = Self { order: Vec::new(), places, blocks: 0 };
        plan.walk(tree);
        let end = plan.place_inodes(tree)?;
        plan.place_contents(end.div_ceil(BLOCK))?;
        Ok(plan)
    }

    /// All inodes with a name, in the order of their places.
    pub fn order(&self) -> &[Inode] {
        &self.order
    }

    pub fn place(&self, inode: Inode) -> &Place {
        &self.places[inode.0 as usize]
    }

    /// The length of the image.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// A directory's names with `.` and `..`, sorted as lookup expects them.
    pub fn names<'t>(&self, tree: &'t Tree, directory: Inode) -> Vec<(&'t [u8], Inode)> {
        let parent = self.place(directory).parent.unwrap_or(ROOT);
        let dots = [(&b"."[..], directory), (&b".."[..], parent)];
        let mut names: Vec<_> = dots.into_iter().chain(tree.children(directory)).collect();
        names.sort_unstable_by_key(|(name, _)| *name);
        names
    }

    /// Orders the inodes, the children of a directory together, and counts their links.
    fn walk(&mut self, tree: &Tree) {
        self.order.push(ROOT);
        self.places[ROOT.0 as usize].links = 2;
        let mut directories = vec![ROOT];
        while let Some(directory) = directories.pop() {
            let first = self.order.len();
            for (_, child) in tree.children(directory) {
                self.meet(tree, directory, child);
            }
            let met = self.order[first..].iter().rev();
            directories.extend(met.filter(|child| *tree.node(**child) == Node::Directory));
        }
    }

    fn meet(&mut self, tree: &Tree, directory: Inode, child: Inode) {
        let is_directory = *tree.node(child) == Node::Directory;
        let place = &mut self.places[child.0 as usize];
        if place.links == 0 {
            self.order.push(child);
        }
        place.links += if is_directory { 2 } else { 1 };
        if is_directory {
            place.parent = Some(directory);
            self.places[directory.0 as usize].links += 1;
        }
    }

    /// Gives every inode its offset and tail; the superblock has the first block to itself.
    fn place_inodes(&mut self, tree: &Tree) -> Result<u64, FormatError> {
        let mut at = BLOCK;
        for &inode in &self.order {
            let attributes = xattr::size(&tree.metadata(inode).xattrs);
            let attributes =
                attributes.ok_or_else(|| FormatError::Attributes(tree.path_of(inode)))?;
            let size = self.content_size(tree, inode);
            let (offset, tail) = place_inode(at, inode::SIZE + attributes, size);
            let place = &mut self.places[inode.0 as usize];
            (place.offset, place.size, place.tail) = (offset, size, tail as u32);
            at = (offset + inode::SIZE + attributes + tail).next_multiple_of(SLOT);
        }
        Ok(at)
    }

    fn place_contents(&mut self, first: u64) -> Result<(), FormatError> {
        let mut next = first;
        for inode in &self.order {
            let place = &mut self.places[inode.0 as usize];
            place.block = u32::try_from(next).map_err(|_| FormatError::TooLarge)?;
            next += (place.size - u64::from(place.tail)).div_ceil(BLOCK);
        }
        u32::try_from(next).map_err(|_| FormatError::TooLarge)?;
        self.blocks = next;
        Ok(())
    }

    fn content_size(&self, tree: &Tree, inode: Inode) -> u64 {
        match tree.node(inode) {
            Node::File(extent) => extent.length,
            Node::Symlink(target) => target.len() as u64,
            Node::Directory => {
                dirent::size(self.names(tree, inode).into_iter().map(|(name, _)| name))
            }
            _ => 0,
        }
    }
}

/// Where an inode with its attributes (`head` bytes) can stand at `at` or after, and how much of its
/// content then follows it: kernels want inode, attributes and tail in one block.
fn place_inode(at: u64, head: u64, size: u64) -> (u64, u64) {
    let tail = size % BLOCK;
    let fits = |at: u64| at % BLOCK + head + tail <= BLOCK;
    let next_block = at.next_multiple_of(BLOCK);
    if tail == 0 || fits(at) {
        (at, tail)
    } else if tail <= MAX_MOVED_TAIL && fits(next_block) {
        (next_block, tail)
    } else {
        (at, 0)
    }
}
