//! Reading directories.

use std::{ffi::CStr, mem::MaybeUninit, sync::PoisonError};

use rustix::{
    fs::{FileType, OFlags, RawDir, SeekFrom, seek},
    io::Errno,
};

use crate::{
    abi::{MAX_DATA, ROOT_ID},
    nodes::Node,
    reply::Reply,
    request::Request,
    server::{Done, Server, reopen},
};

/// Bytes of entries asked of the host at a time.
const CHUNK: usize = 16 << 10;
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
        *position = NOWHERE;
        let mut next = offset;
        let mut buffer = [MaybeUninit::uninit(); CHUNK];
        let mut entries = RawDir::new(&*handle, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Err(e) if list.reply.is_empty() => return Err(e),
                Err(_) => return Ok(()),
                Ok(entry) => entry,
            };
            next = entry.next_entry_cookie();
            let name = entry.file_name();
            // Of a share's parent the guest shall not even know the number.
            let inode = if name == c".." { ROOT_ID } else { entry.ino() };
            let dirent = Dirent { inode, next, kind: entry.file_type(), name };
            if !list.push(&dirent, || self.lookup_name(node, name).ok()) {
                return Ok(());
            }
        }
        *position = next;
        Ok(())
    }
}

/// A reply to READDIR or READDIRPLUS in the making.
pub(super) struct Listing<'a> {
    pub reply: &'a mut Reply,
    pub room: usize,
    pub plus: bool,
}

impl Listing<'_> {
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
