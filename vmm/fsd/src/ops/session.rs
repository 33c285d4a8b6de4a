//! The beginning, the end, and what the guest has forgotten.

use std::sync::atomic::Ordering;

use rustix::io::Errno;

use crate::{
    abi::{MAJOR, MAX_DATA, MAX_PAGES, MIN_MINOR, MINOR, init},
    reply::Reply,
    request::Request,
    server::{Done, Server},
};

/// What we would like to have. Not among it: a write-back cache (the host would see writes late), NO_OPEN (nothing
/// would bound what is open).
const WANTED: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::SUBMOUNTS
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT
    | init::CREATE_SUPP_GROUP;

/// Wanted of a kernel that waits for locks by itself: virtio-fs cannot interrupt a wait.
const LOCKS: u64 = init::POSIX_LOCKS | init::FLOCK_LOCKS;

/// Without these files would get wrong modes, or messages other shapes.
const NEEDED: u64 = init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::MAX_PAGES
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT;

/// Requests that wait for nobody, which is how read-ahead comes.
const MAX_BACKGROUND: u16 = 64;

impl Server {
    pub(crate) fn init(&self, request: &mut Request<'_>, reply: &mut Reply) -> Done {
        let (major, minor) = (request.u32()?, request.u32()?);
        let (readahead, flags) = (request.u32()?, request.u32()?);
        if major != MAJOR || minor < MIN_MINOR {
            return Err(Errno::PROTO);
        }
        let extended = u64::from(flags) & init::INIT_EXT != 0;
        let more = if extended { request.u32()? } else { 0 };
        let offered = u64::from(flags) | u64::from(more) << 32;
        let asks_again = offered & init::LOCKS_ASK_AGAIN != 0;
        let flags = offered & if asks_again { WANTED | LOCKS } else { WANTED };
        if flags & NEEDED != NEEDED {
            return Err(Errno::PROTO);
        }
        self.destroy()?;
        self.submounts.store(flags & init::SUBMOUNTS != 0, Ordering::Relaxed);
        reply.u32(MAJOR);
        reply.u32(MINOR.min(minor));
        reply.u32(readahead.min(MAX_DATA as u32));
        reply.u32(flags as u32);
        reply.u16(MAX_BACKGROUND);
        reply.u16(MAX_BACKGROUND / 4 * 3);
        reply.u32(MAX_DATA as u32);
        // Time stamps are as fine as the host's.
        reply.u32(1);
        reply.u16(MAX_PAGES);
        reply.u16(0);
        reply.u32((flags >> 32) as u32);
        reply.zeros(28);
        Ok(())
    }

    pub(crate) fn destroy(&self) -> Done {
        self.handles.clear();
        self.locks.clear();
        self.nodes.clear();
        if let Some(watch) = self.watch.get() {
            watch.clear();
        }
        Ok(())
    }

    pub(crate) fn forget(&self, id: u64, request: &mut Request<'_>) -> Done {
        self.forget_node(id, request.u64()?);
        Ok(())
    }

    pub(crate) fn batch_forget(&self, request: &mut Request<'_>) -> Done {
        let (count, _) = (request.u32()?, request.u32()?);
        for _ in 0..count {
            let id = request.u64()?;
            self.forget_node(id, request.u64()?);
        }
        Ok(())
    }
}
