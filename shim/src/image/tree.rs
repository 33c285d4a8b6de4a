//! The merged tree of an image: names, metadata, and where each file's bytes are.
//!
//! Owns the rules by which layers are stacked (OCI image specification, "Applying changesets"):
//! an entry replaces what had its name, but a directory on a directory only renews its metadata;
//! whiteouts remove what *lower* layers brought, in whatever order they stand in their own layer;
//! a hard link is a second name of one inode. Only [`Tree`]'s methods change a tree. Nothing here
//! touches a file: a path is a key in a map, and no symbolic link is ever followed.
//!
//! What a tree may cost in memory is bounded: each inode, name and attribute is paid from [`BUDGET`].

mod path;

use std::collections::BTreeMap;

use path::is_link_target;
pub use path::{components, lossy};

/// Bytes of memory a tree may take: about 2 million files with usual names.
const BUDGET: u64 = 1 << 30;
/// What things cost besides their variable parts: an inode (120 bytes in a vector that doubles, and its
/// place in the image), a name in a well-filled map, and the first node of a map of names or attributes.
const INODE_COST: u64 = 320;
const NAME_COST: u64 = 80;
const MAP_COST: u64 = 600;

/// The root is always the first inode.
pub const ROOT: Inode = Inode(0);

/// The number of an inode within its tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Inode(pub u32);

/// What a file system keeps of every inode.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// The permission bits with set-uid, set-gid and sticky: `0o7777`.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970, may be negative, and nanoseconds below 10⁹.
    pub mtime: (i64, u32),
    /// Extended attributes by their full names, as `security.capability`.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A file's bytes in the spool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub length: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    Directory,
    File(Extent),
    Symlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
    Socket,
}

#[derive(Debug)]
pub struct Tree {
    inodes: Vec<Entry>,
    /// The layer being applied; whiteouts act below it.
    layer: u32,
    budget: u64,
}

#[derive(Debug)]
struct Entry {
    meta: Metadata,
    node: Node,
    children: Children,
}

type Children = BTreeMap<Box<[u8]>, Name>;

/// A name in a directory: which inode, and which layer last wrote it.
#[derive(Debug, Clone, Copy)]
struct Name {
    inode: Inode,
    layer: u32,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TreeError {
    #[error("its path has a `..` in it")]
    ParentPath,
    #[error("its path contains a NUL byte")]
    NulPath,
    #[error("a component of its path is longer than 255 bytes")]
    LongName,
    #[error("its path is longer than 4095 bytes")]
    LongPath,
    #[error("`{0}` on its path is not a directory")]
    ParentNotDirectory(String),
    #[error("only a directory may take the place of the root")]
    Root,
    #[error("it is a hard link to `{0}`, which does not exist in the image")]
    NoLinkTarget(String),
    #[error("it is a hard link to the directory `{0}`")]
    LinkToDirectory(String),
    #[error("its link target is empty, too long, or contains a NUL byte")]
    BadLinkTarget,
    #[error("it is a whiteout of nothing that could be a name")]
    BadWhiteout,
    #[error("the image has too many files: their names and metadata exceed {} MiB", BUDGET >> 20)]
    TooLarge,
}

impl Tree {
    /// An empty root directory, ready for the first layer.
    pub fn new() -> Self {
        let root = Entry { meta: implied(), node: Node::Directory, children: Children::new() };
        Self { inodes: vec![root], layer: 0, budget: BUDGET }
    }

    /// From here on whiteouts act on all that has been put so far.
    pub fn next_layer(&mut self) {
        self.layer += 1;
    }

    /// Gives `path` this metadata and content; missing directories above it are implied.
    pub fn put(&mut self, path: &[u8], meta: Metadata, node: Node) -> Result<Inode, TreeError> {
        if let Node::Symlink(target) = &node
            && !is_link_target(target)
        {
            return Err(TreeError::BadLinkTarget);
        }
        self.charge(meta.xattrs.iter().map(|(k, v)| MAP_COST + (k.len() + v.len()) as u64).sum())?;
        let parts = components(path)?;
        let Some((name, parents)) = parts.split_last() else { return self.put_root(meta, node) };
        let parent = self.parent(parents)?;
        let merged = self
            .entry(parent)
            .children
            .get(*name)
            .map(|name| name.inode)
            .filter(|inode| node == Node::Directory && *self.node(*inode) == Node::Directory);
        let inode = match merged {
            Some(directory) => {
                self.entry_mut(directory).meta = meta;
                directory
            }
            None => self.add(meta, node)?,
        };
        self.name(parent, name, inode)?;
        Ok(inode)
    }

    /// Makes `path` one more name of `target`'s inode.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), TreeError> {
        let inode = self.lookup(&components(target).map_err(|_| TreeError::BadLinkTarget)?);
        let inode = inode.ok_or_else(|| TreeError::NoLinkTarget(lossy(target)))?;
        if self.entry(inode).node == Node::Directory {
            return Err(TreeError::LinkToDirectory(lossy(target)));
        }
        let parts = components(path)?;
        let (name, parents) = parts.split_last().ok_or(TreeError::Root)?;
        let parent = self.parent(parents)?;
        self.name(parent, name, inode)
    }

    /// Removes what lower layers have under `path`, and `path` itself if they made it.
    pub fn whiteout(&mut self, path: &[u8]) -> Result<(), TreeError> {
        let parts = components(path)?;
        let (name, parents) = parts.split_last().ok_or(TreeError::BadWhiteout)?;
        let Some(parent) = self.lookup(parents) else { return Ok(()) };
        if let Some(&child) = self.entry(parent).children.get(*name)
            && !self.keep(child)
        {
            self.entry_mut(parent).children.remove(*name);
        }
        Ok(())
    }

    /// Removes all that lower layers have in the directory `path`.
    pub fn opaque(&mut self, path: &[u8]) -> Result<(), TreeError> {
        if let Some(directory) = self.lookup(&components(path)?) {
            self.prune(directory);
        }
        Ok(())
    }

    pub fn metadata(&self, inode: Inode) -> &Metadata {
        &self.entry(inode).meta
    }

    pub fn node(&self, inode: Inode) -> &Node {
        &self.entry(inode).node
    }

    /// A directory's names in byte order.
    pub fn children(&self, directory: Inode) -> impl Iterator<Item = (&[u8], Inode)> {
        self.entry(directory).children.iter().map(|(name, child)| (&name[..], child.inode))
    }

    /// How many inodes were ever made: every [`Inode`] of this tree is below it.
    pub fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    /// The inode at a path whose parents are directories.
    pub fn lookup(&self, parts: &[&[u8]]) -> Option<Inode> {
        let step = |inode: Inode, part: &&[u8]| Some(self.entry(inode).children.get(*part)?.inode);
        parts.iter().try_fold(ROOT, step)
    }

    /// One of the paths of an inode, for messages.
    pub fn path_of(&self, inode: Inode) -> String {
        let mut path = Vec::new();
        self.find(ROOT, inode, &mut path);
        lossy(&path)
    }

    fn find(&self, directory: Inode, wanted: Inode, path: &mut Vec<u8>) -> bool {
        self.children(directory).any(|(name, child)| {
            let length = path.len();
            path.push(b'/');
            path.extend(name);
            let found = child == wanted || self.find(child, wanted, path);
            if !found {
                path.truncate(length);
            }
            found
        })
    }

    /// Whether a name survives a whiteout: this layer wrote it, or something under it.
    fn keep(&mut self, name: Name) -> bool {
        self.prune(name.inode);
        let survivors = !self.entry(name.inode).children.is_empty();
        if survivors && name.layer < self.layer {
            self.entry_mut(name.inode).meta = implied();
        }
        survivors || name.layer == self.layer
    }

    fn prune(&mut self, directory: Inode) {
        let mut children = std::mem::take(&mut self.entry_mut(directory).children);
        children.retain(|_, child| self.keep(*child));
        self.entry_mut(directory).children = children;
    }

    fn put_root(&mut self, meta: Metadata, node: Node) -> Result<Inode, TreeError> {
        if node != Node::Directory {
            return Err(TreeError::Root);
        }
        self.entry_mut(ROOT).meta = meta;
        Ok(ROOT)
    }

    /// Walks to a directory, making what is missing; a symbolic link or a file on the way is refused.
    fn parent(&mut self, parts: &[&[u8]]) -> Result<Inode, TreeError> {
        let mut at = ROOT;
        for part in parts {
            at = match self.entry(at).children.get(*part) {
                Some(child) => child.inode,
                None => {
                    let inode = self.add(implied(), Node::Directory)?;
                    self.name(at, part, inode)?;
                    inode
                }
            };
            if self.entry(at).node != Node::Directory {
                return Err(TreeError::ParentNotDirectory(lossy(part)));
            }
        }
        Ok(at)
    }

    fn add(&mut self, meta: Metadata, node: Node) -> Result<Inode, TreeError> {
        self.charge(match &node {
            Node::Directory => INODE_COST + MAP_COST,
            Node::Symlink(target) => INODE_COST + target.len() as u64,
            _ => INODE_COST,
        })?;
        let inode = Inode(self.inodes.len() as u32);
        self.inodes.push(Entry { meta, node, children: Children::new() });
        Ok(inode)
    }

    fn name(&mut self, parent: Inode, name: &[u8], inode: Inode) -> Result<(), TreeError> {
        self.charge(NAME_COST + name.len() as u64)?;
        let layer = self.layer;
        self.entry_mut(parent).children.insert(name.into(), Name { inode, layer });
        Ok(())
    }

    fn charge(&mut self, cost: u64) -> Result<(), TreeError> {
        self.budget = self.budget.checked_sub(cost).ok_or(TreeError::TooLarge)?;
        Ok(())
    }

    fn entry(&self, inode: Inode) -> &Entry {
        &self.inodes[inode.0 as usize]
    }

    fn entry_mut(&mut self, inode: Inode) -> &mut Entry {
        &mut self.inodes[inode.0 as usize]
    }
}

/// The metadata of a directory no layer describes.
fn implied() -> Metadata {
    Metadata { mode: 0o755, ..Metadata::default() }
}

#[cfg(test)]
mod tests;
