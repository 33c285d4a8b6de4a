//! Names in directories: finding, removing and moving them.

use rustix::{
    fs::{AtFlags, RenameFlags, readlinkat_raw, renameat_with, unlinkat},
    io::Errno,
};

use crate::{
    abi::MAX_DATA,
    nodes::Node,
    reply::Reply,
    request::Request,
    server::{Done, Server, open_path},
};

/// A whiteout would be a device.
const RENAME: RenameFlags = RenameFlags::NOREPLACE.union(RenameFlags::EXCHANGE);

impl Server {
    pub(crate) fn lookup(
        &self,
        parent: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
    ) -> Done {
        match self.lookup_name(parent, request.name()?) {
            Ok(found) => self.reply_entry(found, reply),
            Err(Errno::NOENT) => return self.reply_no_entry(reply),
            Err(e) => return Err(e),
        }
        Ok(())
    }

    pub(crate) fn lookup_name(
        &self,
        parent: &Node,
        name: &std::ffi::CStr,
    ) -> Result<(u64, rustix::fs::Statx, u32), Errno> {
        self.enter(parent, open_path(parent, name)?)
    }

    /// The text of a symbolic link, which only the guest follows.
    pub(crate) fn readlink(&self, node: &Node, reply: &mut Reply) -> Done {
        reply.fill(MAX_DATA, |buffer| readlinkat_raw(node, c"", buffer))
    }

    pub(crate) fn unlink(&self, parent: &Node, request: &mut Request<'_>) -> Done {
        unlinkat(parent, request.name()?, AtFlags::empty())
    }

    pub(crate) fn rmdir(&self, parent: &Node, request: &mut Request<'_>) -> Done {
        unlinkat(parent, request.name()?, AtFlags::REMOVEDIR)
    }

    pub(crate) fn rename(&self, parent: &Node, request: &mut Request<'_>, flagged: bool) -> Done {
        let to = self.node(request.u64()?)?;
        let flags = if flagged { request.u64()? as u32 } else { 0 };
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if !RENAME.contains(flags) {
            return Err(Errno::INVAL);
        }
        let (old, new) = (request.name()?, request.name()?);
        renameat_with(parent, old, &*to, new, flags)
    }
}
