//! Locks, which hold against the host's processes and other sandboxes: flock(2) on the guest's open file, fcntl(2) on one
//! for each owner ([`crate::locks`]). On a read-only share a guest has none that the host would notice: its own kernel
//! keeps them.

use std::os::fd::OwnedFd;

use rustix::{
    fs::{FlockOperation, OFlags, StatVfsMountFlags, flock, fstatvfs},
    io::Errno,
};

use crate::{
    abi::LK_FLOCK,
    locks::{Kind, Owner, Range},
    nodes::Node,
    reply::Reply,
    request::Request,
    server::{Done, Server, reopen},
};

/// struct fuse_lk_in.
struct Asked {
    handle: u64,
    owner: Owner,
    range: Range,
    /// `None`: unlocked.
    kind: Option<Kind>,
    whole_file: bool,
}

impl Asked {
    fn read(request: &mut Request<'_>) -> Result<Self, Errno> {
        let (handle, owner) = (request.u64()?, request.u64()?);
        let range = Range::new(request.u64()?, request.u64()?)?;
        let (kind, _pid) = (request.u32()?, request.u32()?);
        let kind = match kind as i32 {
            libc::F_RDLCK => Some(Kind::Shared),
            libc::F_WRLCK => Some(Kind::Exclusive),
            libc::F_UNLCK => None,
            _ => return Err(Errno::INVAL),
        };
        let whole_file = request.u32()? & LK_FLOCK != 0;
        Ok(Self { handle, owner: (request.header.node, owner), range, kind, whole_file })
    }
}

impl Server {
    pub(crate) fn setlk(&self, node: &Node, request: &mut Request<'_>) -> Done {
        let asked = Asked::read(request)?;
        let handle = self.handles.find(asked.handle, request.header.node)?;
        is_lockable(node)?;
        if asked.whole_file {
            let operation = match asked.kind {
                Some(Kind::Shared) => FlockOperation::NonBlockingLockShared,
                Some(Kind::Exclusive) => FlockOperation::NonBlockingLockExclusive,
                None => FlockOperation::Unlock,
            };
            return flock(&*handle, operation);
        }
        let Some(kind) = asked.kind else { return self.locks.unset(asked.owner, asked.range) };
        let of = (node.share(), asked.handle);
        self.locks.set(asked.owner, of, asked.range, kind, || open(node))?;
        // What has been closed meanwhile has no locks.
        if self.handles.find(asked.handle, request.header.node).is_err() {
            self.locks.release(asked.handle);
        }
        Ok(())
    }

    /// struct fuse_lk_out.
    pub(crate) fn getlk(&self, node: &Node, request: &mut Request<'_>, reply: &mut Reply) -> Done {
        let asked = Asked::read(request)?;
        self.handles.find(asked.handle, request.header.node)?;
        is_lockable(node)?;
        let kind = asked.kind.ok_or(Errno::INVAL)?;
        let found = self.locks.find(asked.owner, asked.range, kind, || open(node))?;
        let (range, kind) = match found {
            Some((range, Kind::Shared)) => (range, libc::F_RDLCK),
            Some((range, Kind::Exclusive)) => (range, libc::F_WRLCK),
            None => (asked.range, libc::F_UNLCK),
        };
        reply.u64(range.first());
        reply.u64(range.last());
        reply.u32(kind as u32);
        // Nobody whom the guest knows.
        reply.u32(0);
        Ok(())
    }
}

fn is_lockable(node: &Node) -> Done {
    let read_only = fstatvfs(node)?.f_flag.contains(StatVfsMountFlags::RDONLY);
    if read_only || !node.is_openable() || node.is_dir() { Err(Errno::NOSYS) } else { Ok(()) }
}

/// For both kinds of locks, where that can be.
fn open(node: &Node) -> Result<OwnedFd, Errno> {
    reopen(node, OFlags::RDWR).or_else(|_| reopen(node, OFlags::RDONLY))
}
