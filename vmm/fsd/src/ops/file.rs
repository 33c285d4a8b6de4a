//! Open files and what is in them.

use std::os::fd::OwnedFd;

use rustix::{
    fs::{FallocateFlags, OFlags, SeekFrom, fallocate, fdatasync, fsync, seek},
    io::{Errno, IoSlice, ReadWriteFlags, pread, pwrite, pwritev2},
};

use crate::{
    abi::{FSYNC_FDATASYNC, OPEN_KILL_SUIDGID, WRITE_CACHE, WRITE_KILL_SUIDGID},
    handles::Handle,
    nodes::Node,
    reply::Reply,
    request::Request,
    server::{Done, Server, reopen},
};

/// What of the guest's open flags is the host's business. O_APPEND comes with each write; O_DIRECT would ask
/// for buffers aligned as the host's disk wants them.
const OPEN: OFlags = OFlags::ACCMODE
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::NOATIME)
    .union(OFlags::NONBLOCK);

/// What Linux's own FUSE driver lets through.
const FALLOCATE: FallocateFlags =
    FallocateFlags::KEEP_SIZE.union(FallocateFlags::PUNCH_HOLE).union(FallocateFlags::ZERO_RANGE);

/// Most bytes of one COPY_FILE_RANGE, which may copy less than it is asked for: a thread is not away for long.
const COPY: u64 = 64 << 20;

/// The host's flags for the guest's.
pub(super) fn open_flags(flags: u32) -> Result<OFlags, Errno> {
    let flags = OFlags::from_bits_retain(flags) & OPEN;
    if flags & OFlags::ACCMODE == OFlags::ACCMODE { Err(Errno::INVAL) } else { Ok(flags) }
}

impl Server {
    pub(crate) fn open(&self, node: &Node, request: &mut Request<'_>, reply: &mut Reply) -> Done {
        let (flags, more) = (open_flags(request.u32()?)?, request.u32()?);
        if !node.is_openable() || node.is_dir() {
            return Err(Errno::NXIO);
        }
        let file = {
            let _plain = self.privileges.kill_set_id(more & OPEN_KILL_SUIDGID != 0)?;
            match reopen(node, flags) {
                // Only the owner may ask for O_NOATIME, whom an unprivileged server may not be.
                Err(Errno::PERM) => reopen(node, flags - OFlags::NOATIME)?,
                file => file?,
            }
        };
        self.reply_opened(file, request.header.node, node.share(), reply)
    }

    /// struct fuse_open_out. Without FOPEN_KEEP_CACHE each open sees what the host has written.
    pub(crate) fn reply_opened(
        &self,
        file: OwnedFd,
        node: u64,
        share: u32,
        reply: &mut Reply,
    ) -> Done {
        reply.u64(self.enter_handle(Handle::new(file, node, share))?);
        reply.u32(self.open_flags());
        reply.u32(0);
        Ok(())
    }

    pub(crate) fn release(&self, request: &mut Request<'_>) -> Done {
        let number = request.u64()?;
        self.handles.release(number, request.header.node)?;
        self.locks.release(number);
        Ok(())
    }

    pub(crate) fn read(&self, request: &mut Request<'_>, reply: &mut Reply) -> Done {
        let handle = self.handle(request)?;
        let (offset, size) = (request.u64()?, request.u32()?);
        reply.fill(size as usize, |buffer| pread(&*handle, buffer, offset))
    }

    pub(crate) fn write(&self, request: &mut Request<'_>, reply: &mut Reply) -> Done {
        let handle = self.handle(request)?;
        let (offset, size) = (request.u64()?, request.u32()?);
        let (how, _owner) = (request.u32()?, request.u64()?);
        let (flags, _) = (OFlags::from_bits_retain(request.u32()?), request.u32()?);
        let data = request.bytes(size as usize)?;
        let _plain = self.privileges.kill_set_id(how & WRITE_KILL_SUIDGID != 0)?;
        // From the guest's page cache it goes where the guest has it.
        let written = if flags.contains(OFlags::APPEND) && how & WRITE_CACHE == 0 {
            pwritev2(&*handle, &[IoSlice::new(data)], offset, ReadWriteFlags::APPEND)?
        } else {
            pwrite(&*handle, data, offset)?
        };
        reply.u64(written as u64);
        Ok(())
    }

    pub(crate) fn fsync(&self, request: &mut Request<'_>) -> Done {
        let handle = self.handle(request)?;
        let data_only = request.u32()? & FSYNC_FDATASYNC != 0;
        if data_only { fdatasync(&*handle) } else { fsync(&*handle) }
    }

    pub(crate) fn fallocate(&self, request: &mut Request<'_>) -> Done {
        let handle = self.handle(request)?;
        let (offset, length) = (request.u64()?, request.u64()?);
        let mode = FallocateFlags::from_bits(request.u32()?).ok_or(Errno::OPNOTSUPP)?;
        if !FALLOCATE.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        fallocate(&*handle, mode, offset, length)
    }

    /// SEEK_DATA and SEEK_HOLE; the guest's kernel knows the rest itself.
    pub(crate) fn lseek(&self, node: &Node, request: &mut Request<'_>, reply: &mut Reply) -> Done {
        let handle = self.handle(request)?;
        let (offset, whence) = (request.u64()?, request.u32()?);
        let to = match whence as i32 {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        if node.is_dir() {
            return Err(Errno::INVAL);
        }
        reply.u64(seek(&*handle, to)?);
        Ok(())
    }

    pub(crate) fn copy_file_range(&self, request: &mut Request<'_>, reply: &mut Reply) -> Done {
        let from = self.handle(request)?;
        let mut from_offset = request.u64()?;
        let to_node = request.u64()?;
        let to = self.handles.find(request.u64()?, to_node)?;
        let (mut to_offset, length) = (request.u64()?, request.u64()?.min(COPY));
        let (from_at, to_at) = (Some(&mut from_offset), Some(&mut to_offset));
        let copied = rustix::fs::copy_file_range(&*from, from_at, &*to, to_at, length as usize)?;
        reply.u64(copied as u64);
        Ok(())
    }
}
