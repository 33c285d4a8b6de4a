//! Extended attributes, access control lists among them. The host's kernel says which names there are, and which
//! of them a server without privileges on the host may touch.

use rustix::{
    fs::{
        AtFlags, CWD, Mode, XattrFlags, chmodat, getxattr, getxattr_query, listxattr,
        listxattr_query, removexattr, setxattr,
    },
    io::Errno,
};

use crate::{
    abi::SETXATTR_ACL_KILL_SGID,
    nodes::Node,
    reply::Reply,
    request::Request,
    server::{Done, Server},
};

/// XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux.
const MAX: usize = 64 << 10;

impl Server {
    pub(crate) fn setxattr(&self, node: &Node, request: &mut Request<'_>) -> Done {
        let (size, flags) = (request.u32()? as usize, request.u32()?);
        let (more, _) = (request.u32()?, request.u32()?);
        let name = request.string()?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        setxattr(node.name(), name, request.bytes(size)?, flags)?;
        if more & SETXATTR_ACL_KILL_SGID != 0 {
            let mode = Mode::from_raw_mode(node.stat()?.stx_mode.into()) - Mode::SGID;
            chmodat(CWD, node.name(), mode, AtFlags::empty())?;
        }
        Ok(())
    }

    pub(crate) fn getxattr(
        &self,
        node: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
    ) -> Done {
        let (size, _) = (request.u32()? as usize, request.u32()?);
        let name = request.string()?;
        match size {
            0 => reply.u64(getxattr_query(node.name(), name)? as u64),
            size => reply.fill(size.min(MAX), |value| getxattr(node.name(), name, value))?,
        }
        Ok(())
    }

    pub(crate) fn listxattr(
        &self,
        node: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
    ) -> Done {
        match request.u32()? as usize {
            0 => reply.u64(listxattr_query(node.name())? as u64),
            size => reply.fill(size.min(MAX), |list| listxattr(node.name(), list))?,
        }
        Ok(())
    }

    pub(crate) fn removexattr(&self, node: &Node, request: &mut Request<'_>) -> Done {
        removexattr(node.name(), request.string()?)
    }
}
