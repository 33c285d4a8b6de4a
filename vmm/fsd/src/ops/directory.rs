//! Reading directories.

use std::{ffi::CStr, mem::MaybeUninit, sync::PoisonError};

use rustix::{
    fs::{FileType, OFlags, RawDir, SeekFrom, seek},
    io::Errno,
};

use crate::{
    abi::{MAX_DATA, ROOT_ID},
    handles::Handle,
    nodes::Node,
    reply::Reply,
    request::Request,
    server::{Done, Server, reopen},
};

/// Bytes of entries asked of the host at a time.
const CHUNK: usize = 16 << 10;
/// The longest entry of the host's, and what aligning the buffer may take.
const LONGEST: usize = 280 + 8;
/// Bytes of struct fuse_dirent and fuse_entry_out.
const DIRENT: usize = 24;
const ENTRY: usize = 128;
/// A position where no directory is: seek before reading.
const NOWHERE: u64 = u64::MAX;

/// An entry of a directory.
pub(super) struct Dirent<'a> {
    pub inode: u64,
    /// Where the next one is.
    pub next: u64,
    pub kind: FileType,
    pub name: &'a CStr,
}

impl Server {
    pub(crate) fn opendir(
        &self,
        node: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
    ) -> Done {
        if !node.is_dir() {
            return Err(Errno::NOTDIR);
        }
        let directory = reopen(node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        self.reply_opened(directory, request.header.node, node.share(), reply)
    }

    pub(crate) fn readdir(
        &self,
        node: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
        plus: bool,
    ) -> Done {
        let handle = self.handle(request)?;
        let (offset, size) = (request.u64()?, request.u32()?);
        let mut list = Listing { reply, room: (size as usize).min(MAX_DATA), plus };
        let mut position = handle.position.lock().unwrap_or_else(PoisonError::into_inner);
        if *position != offset {
            seek(&*handle, SeekFrom::Start(offset))?;
        }
        // Until this has gone well.
        *position = NOWHERE;
        let (mut next, mut buffer) = (offset, [MaybeUninit::uninit(); CHUNK]);
        loop {
            let read = self.read_chunk(node, &handle, &mut buffer, &mut list);
            match read {
                Ok(Some(reached)) => next = reached,
                Ok(None) => break,
                Err(e) if list.reply.is_empty() => return Err(e),
                Err(_) => return Ok(()),
            }
        }
        *position = next;
        Ok(())
    }

    /// As many of the next entries as there is room for all of: a position that would have to be gone back to is
    /// not what it was once entries are removed, on some file systems. `None` at the end.
    fn read_chunk(
        &self,
        node: &Node,
        handle: &Handle,
        buffer: &mut [MaybeUninit<u8>; CHUNK],
        list: &mut Listing<'_>,
    ) -> Result<Option<u64>, Errno> {
        let size = list.host_room().min(CHUNK);
        if size < LONGEST {
            // Nothing at all would be the end of the directory.
            return if list.reply.is_empty() { Err(Errno::INVAL) } else { Ok(None) };
        }
        let mut reached = None;
        let mut entries = RawDir::new(handle, &mut buffer[..size]);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let (next, name) = (entry.next_entry_cookie(), entry.file_name());
            // Of a share's parent the guest shall not even know the number.
            let inode = if name == c".." { ROOT_ID } else { entry.ino() };
            let dirent = Dirent { inode, next, kind: entry.file_type(), name };
            // Nobody has asked for it yet.
            let lookup = || match self.nodes.are_many() {
                true => None,
                false => self.lookup_name(node, name).ok(),
            };
            if !list.push(&dirent, lookup) {
                return Err(Errno::OVERFLOW);
            }
            reached = Some(next);
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(reached)
    }
}

/// A reply to READDIR or READDIRPLUS in the making.
pub(super) struct Listing<'a> {
    pub reply: &'a mut Reply,
    pub room: usize,
    pub plus: bool,
}

impl Listing<'_> {
    /// Bytes of the host's entries that surely fit when they are the guest's. The shortest grow the most, from 24
    /// bytes to 32, and to 160 with attributes.
    fn host_room(&self) -> usize {
        let left = self.room.saturating_sub(self.reply.len());
        left * 24 / if self.plus { ENTRY + 32 } else { 32 }
    }

    /// `false` if there is no room for it. `lookup` tells the guest of the file, and is only called when it fits.
    pub fn push(
        &mut self,
        dirent: &Dirent<'_>,
        lookup: impl FnOnce() -> Option<(u64, rustix::fs::Statx, u32)>,
    ) -> bool {
        let name = dirent.name.to_bytes();
        let padded = (DIRENT + name.len()).next_multiple_of(8);
        let length = padded + if self.plus { ENTRY } else { 0 };
        if self.reply.len() + length > self.room {
            return false;
        }
        if self.plus {
            let known = matches!(name, b"." | b"..");
            match if known { None } else { lookup() } {
                Some((id, stat, flags)) => self.reply.entry(id, &stat, flags),
                // Number 0: the guest looks it up itself when it wants it.
                None => self.reply.zeros(ENTRY),
            }
        }
        self.reply.u64(dirent.inode);
        self.reply.u64(dirent.next);
        self.reply.u32(name.len() as u32);
        self.reply.u32(type_number(dirent.kind));
        self.reply.bytes(name);
        self.reply.zeros(padded - DIRENT - name.len());
        true
    }
}

/// DT_REG and the others.
fn type_number(kind: FileType) -> u32 {
    if kind == FileType::Unknown { 0 } else { kind.as_raw_mode() >> 12 }
}
