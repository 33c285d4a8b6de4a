//! The files and directories that the guest knows: one O_PATH descriptor each, counted by the guest's look-ups.
//!
//! A guest's kernel forgets files by itself only when its memory runs short. So it is asked to when it knows many
//! ([`crate::crowd`]), and told of further ones slowly until it does. What is in use it cannot forget: where that is all there
//! is room for, at most [`MAX_NODES`], the next file is ENFILE.

use std::{
    collections::{HashMap, hash_map::Entry},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, FileType, Statx, StatxFlags, statx},
    io::Errno,
    path::DecInt,
};

use crate::crowd::{Crowd, Next, PATIENCE};

/// Each costs a descriptor and the host's memory of one file, a kilobyte or two.
pub const MAX_NODES: usize = 400_000;

/// How long a further file waits for the guest to forget others.
const BRAKE: Duration = Duration::from_millis(20);
/// Threads that wait for longer, where there is no room: others are there for what it forgets.
const MOST_WAITING: usize = 6;

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
pub struct Nodes {
    table: Mutex<Table>,
    /// The guest has forgotten one.
    fewer: Condvar,
}

#[derive(Debug)]
struct Table {
    by_id: HashMap<u64, (Arc<Node>, u64)>,
    by_key: HashMap<Key, u64>,
    next: u64,
    most: usize,
    crowd: Crowd,
    waiting: usize,
}

impl Nodes {
    /// The guest knows them by `first` and what follows.
    pub fn new(most: usize, first: u64) -> Self {
        let (by_id, by_key) = (HashMap::new(), HashMap::new());
        let crowd = Crowd::new(most);
        let table = Table { by_id, by_key, next: first, most, crowd, waiting: 0 };
        Self { table: Mutex::new(table), fewer: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn find(&self, id: u64) -> Result<Arc<Node>, Errno> {
        self.lock().by_id.get(&id).map(|(node, _)| node.clone()).ok_or(Errno::STALE)
    }

    /// Whether the guest knows so many that it is asked to forget some.
    pub fn are_many(&self) -> bool {
        let table = self.lock();
        table.by_id.len() >= table.crowd.mark()
    }

    /// Before the guest learns of this one: if it is new and there are many, the guest is asked to forget some, and has
    /// some time for it.
    pub fn make_room(&self, node: &Node, ask: impl FnOnce()) {
        let mut table = self.lock();
        if table.by_key.contains_key(&node.key) {
            return;
        }
        let count = table.by_id.len();
        match table.crowd.next(count, Instant::now()) {
            Next::Nothing => return,
            Next::Ask => ask(),
            Next::Wait => {}
        }
        let is_full = count >= table.most && table.waiting < MOST_WAITING;
        let limit = if is_full { PATIENCE } else { BRAKE };
        let enough = if is_full { table.most } else { table.crowd.mark() };
        table.waiting += 1;
        let waited = self.fewer.wait_timeout_while(table, limit, |t| t.by_id.len() >= enough);
        let (mut table, _) = waited.unwrap_or_else(PoisonError::into_inner);
        table.waiting -= 1;
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
        if table.waiting > 0 {
            self.fewer.notify_all();
        }
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
