//! Attributes of files.

use std::sync::Arc;

use rustix::{
    fs::{
        AtFlags, CWD, Gid, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, chmodat,
        chownat, fstatvfs, ftruncate, utimensat,
    },
    io::Errno,
};

use crate::{
    abi::{GETATTR_FH, fattr},
    handles::Handle,
    nodes::{Node, stat},
    ops::create::permissions,
    reply::Reply,
    request::Request,
    server::{Done, Server, reopen},
};

impl Server {
    pub(crate) fn getattr(
        &self,
        node: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
    ) -> Done {
        let (flags, _) = (request.u32()?, request.u32()?);
        let stat =
            if flags & GETATTR_FH != 0 { stat(&*self.handle(request)?)? } else { node.stat()? };
        reply.attributes(&self.shown(stat, request.header.node));
        Ok(())
    }

    pub(crate) fn setattr(
        &self,
        node: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
    ) -> Done {
        let change = self.read_change(request)?;
        if let Some(mode) = change.mode {
            chmodat(CWD, node.name(), permissions(mode), AtFlags::empty())?;
        }
        if change.uid.is_some() || change.gid.is_some() {
            chownat(node, c"", change.uid, change.gid, AtFlags::EMPTY_PATH)?;
        }
        if let Some(size) = change.size {
            self.truncate(node, &change, size)?;
        }
        if let Some(times) = &change.times {
            utimensat(CWD, node.name(), times, AtFlags::empty())?;
        }
        reply.attributes(&self.shown(node.stat()?, request.header.node));
        Ok(())
    }

    fn truncate(&self, node: &Node, change: &Change, size: u64) -> Done {
        let _plain = self.privileges.kill_set_id(change.kill_set_id)?;
        match &change.handle {
            Some(handle) => ftruncate(&**handle, size),
            None if node.is_openable() => ftruncate(reopen(node, OFlags::WRONLY)?, size),
            None => Err(Errno::INVAL),
        }
    }

    /// struct fuse_setattr_in.
    fn read_change(&self, request: &mut Request<'_>) -> Result<Change, Errno> {
        let (valid, _) = (request.u32()?, request.u32()?);
        let (handle, size, _owner) = (request.u64()?, request.u64()?, request.u64()?);
        let (atime, mtime, _ctime) = (request.u64()?, request.u64()?, request.u64()?);
        let (atime_ns, mtime_ns, _) = (request.u32()?, request.u32()?, request.u32()?);
        let (mode, _) = (request.u32()?, request.u32()?);
        let (uid, gid) = (request.u32()?, request.u32()?);
        let set = |flag| valid & flag != 0;
        let time = |given, now, seconds: u64, ns: u32| match (set(given), set(now)) {
            (_, true) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
            (true, false) => Timespec { tv_sec: seconds as i64, tv_nsec: ns.into() },
            (false, false) => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        };
        let handle = (set(fattr::FH) && set(fattr::SIZE))
            .then(|| self.handles.find(handle, request.header.node))
            .transpose()?;
        let any_time = set(fattr::ATIME | fattr::MTIME | fattr::ATIME_NOW | fattr::MTIME_NOW);
        Ok(Change {
            handle,
            mode: set(fattr::MODE).then_some(mode),
            // u32::MAX is nobody, and to chown(2) no change.
            uid: (set(fattr::UID) && uid != u32::MAX).then(|| Uid::from_raw(uid)),
            gid: (set(fattr::GID) && gid != u32::MAX).then(|| Gid::from_raw(gid)),
            size: set(fattr::SIZE).then_some(size),
            kill_set_id: set(fattr::KILL_SUIDGID),
            times: any_time.then(|| Timestamps {
                last_access: time(fattr::ATIME, fattr::ATIME_NOW, atime, atime_ns),
                last_modification: time(fattr::MTIME, fattr::MTIME_NOW, mtime, mtime_ns),
            }),
        })
    }

    /// struct fuse_statfs_out.
    pub(crate) fn statfs(&self, node: &Node, reply: &mut Reply) -> Done {
        let stat = fstatvfs(node)?;
        for count in [stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree] {
            reply.u64(count);
        }
        reply.u32(stat.f_bsize as u32);
        reply.u32(stat.f_namemax as u32);
        reply.u32(stat.f_frsize as u32);
        reply.zeros(28);
        Ok(())
    }
}

/// What SETATTR asks for.
struct Change {
    handle: Option<Arc<Handle>>,
    mode: Option<u32>,
    uid: Option<Uid>,
    gid: Option<Gid>,
    size: Option<u64>,
    kill_set_id: bool,
    times: Option<Timestamps>,
}
