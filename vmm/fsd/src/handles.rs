//! The files and directories that the guest has opened. At [`MAX_HANDLES`] the next open is ENFILE.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::io::Errno;

pub const MAX_HANDLES: usize = 65_536;

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    file: OwnedFd,
    /// The number of what was opened: a handle is good for that only.
    node: u64,
    share: u32,
    /// Held while a directory is read: its position is the file's.
    pub position: Mutex<u64>,
}

impl Handle {
    pub fn new(file: OwnedFd, node: u64, share: u32) -> Self {
        Self { file, node, share, position: Mutex::new(0) }
    }

    pub fn share(&self) -> u32 {
        self.share
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// All of them, by number.
#[derive(Debug)]
pub struct Handles(Mutex<Table>);

#[derive(Debug)]
struct Table {
    open: HashMap<u64, Arc<Handle>>,
    next: u64,
    most: usize,
}

impl Handles {
    /// The guest knows them by `first` and what follows.
    pub fn new(most: usize, first: u64) -> Self {
        Self(Mutex::new(Table { open: HashMap::new(), next: first, most }))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn find(&self, number: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        let table = self.lock();
        table.open.get(&number).filter(|handle| handle.node == node).cloned().ok_or(Errno::BADF)
    }

    pub fn enter(&self, handle: Handle) -> Result<u64, Errno> {
        let mut table = self.lock();
        if table.open.len() >= table.most {
            return Err(Errno::NFILE);
        }
        let number = table.next;
        table.next += 1;
        table.open.insert(number, Arc::new(handle));
        Ok(number)
    }

    pub fn release(&self, number: u64, node: u64) -> Result<(), Errno> {
        self.find(number, node)?;
        self.lock().open.remove(&number);
        Ok(())
    }

    pub fn release_share(&self, share: u32) {
        self.lock().open.retain(|_, handle| handle.share != share);
    }

    pub fn clear(&self) {
        self.lock().open.clear();
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.lock().open.len()
    }
}
