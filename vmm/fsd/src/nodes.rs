//! The files and directories that the guest knows: one O_PATH descriptor each, counted by the guest's look-ups.
//!
//! A guest that looks up more than [`MAX_NODES`] different files without forgetting any gets ENFILE for the
//! next; its kernel forgets them when its memory runs short, or when told to drop its caches.

use std::{
    collections::{HashMap, hash_map::Entry},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    fs::{AtFlags, FileType, Statx, StatxFlags, statx},
    io::Errno,
    path::DecInt,
};

use crate::abi::ROOT_ID;

/// Each costs a descriptor and the host's memory of one file, a kilobyte or two.
pub const MAX_NODES: usize = 400_000;

/// What makes two descriptors the same file. The mount is part of it: the same file may be shared read-only
/// and writable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    share: u32,
    device: (u32, u32),
    mount: u64,
    inode: u64,
}

/// A file, directory or whatever else lies in a share.
#[derive(Debug)]
pub struct Node {
    fd: OwnedFd,
    key: Key,
    kind: FileType,
}

impl Node {
    /// `fd` is an O_PATH descriptor; the attributes come with it since both are always wanted.
    pub fn new(share: u32, fd: OwnedFd) -> Result<(Self, Statx), Errno> {
        let stat = stat(&fd)?;
        let key = Key {
            share,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            mount: stat.stx_mnt_id,
            inode: stat.stx_ino,
        };
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        Ok((Self { fd, key, kind }, stat))
    }

    pub fn share(&self) -> u32 {
        self.key.share
    }

    /// Whether only files and directories lie between the two, no mount.
    pub fn same_mount(&self, other: &Self) -> bool {
        (self.key.mount, self.key.device) == (other.key.mount, other.key.device)
    }

    pub fn is_dir(&self) -> bool {
        self.kind == FileType::Directory
    }

    /// Whether it may be opened: all else is opened by the guest's kernel, not here.
    pub fn is_openable(&self) -> bool {
        matches!(self.kind, FileType::Directory | FileType::RegularFile)
    }

    pub fn stat(&self) -> Result<Statx, Errno> {
        stat(&self.fd)
    }

    /// Its name in the working directory of a worker, `/proc/self/fd`, for the system calls that refuse an
    /// O_PATH descriptor.
    pub fn name(&self) -> DecInt {
        DecInt::from_fd(&self.fd)
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Attributes of an open file.
pub fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, mask)
}

/// All of them, by number.
#[derive(Debug)]
pub struct Nodes(Mutex<Table>);

#[derive(Debug)]
struct Table {
    by_id: HashMap<u64, (Arc<Node>, u64)>,
    by_key: HashMap<Key, u64>,
    next: u64,
    most: usize,
}

impl Nodes {
    pub fn new(most: usize) -> Self {
        let (by_id, by_key) = (HashMap::new(), HashMap::new());
        Self(Mutex::new(Table { by_id, by_key, next: ROOT_ID + 1, most }))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn find(&self, id: u64) -> Result<Arc<Node>, Errno> {
        self.lock().by_id.get(&id).map(|(node, _)| node.clone()).ok_or(Errno::STALE)
    }

    /// The guest learns of a node, once more or for the first time; returns its number, and it if it is new.
    pub fn enter(&self, node: Node) -> Result<(u64, Option<Arc<Node>>), Errno> {
        let mut table = self.lock();
        let table = &mut *table;
        if let Some(id) = table.by_key.get(&node.key) {
            if let Some((_, count)) = table.by_id.get_mut(id) {
                *count += 1;
            }
            return Ok((*id, None));
        }
        if table.by_id.len() >= table.most {
            return Err(Errno::NFILE);
        }
        let id = table.next;
        table.next += 1;
        table.by_key.insert(node.key, id);
        let node = Arc::new(node);
        table.by_id.insert(id, (node.clone(), 1));
        Ok((id, Some(node)))
    }

    /// The guest takes back `count` of its look-ups. More than it made are as good as all. Returns what it knows
    /// no longer.
    pub fn forget(&self, id: u64, count: u64) -> Option<Arc<Node>> {
        let mut table = self.lock();
        let Entry::Occupied(mut entry) = table.by_id.entry(id) else { return None };
        let lookups = &mut entry.get_mut().1;
        *lookups = lookups.saturating_sub(count);
        if *lookups > 0 {
            return None;
        }
        let (node, _) = entry.remove();
        table.by_key.remove(&node.key);
        Some(node)
    }

    pub fn forget_share(&self, share: u32) {
        let mut table = self.lock();
        table.by_id.retain(|_, (node, _)| node.key.share != share);
        table.by_key.retain(|key, _| key.share != share);
    }

    pub fn clear(&self) {
        let mut table = self.lock();
        table.by_id.clear();
        table.by_key.clear();
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        let table = self.lock();
        assert_eq!(table.by_id.len(), table.by_key.len());
        table.by_id.len()
    }
}
