//! The root: a read-only directory that is on no disk, whose entries are the shares by their numbers.

use std::{ffi::CString, sync::PoisonError};

use rustix::{
    fs::{FileType, Statx},
    io::Errno,
};

use crate::{
    abi::{MAX_DATA, NAME_MAX, ROOT_ID, opcode},
    nodes,
    ops::directory::{Dirent, Listing},
    reply::Reply,
    request::Request,
    server::{Done, Server},
};

const MODE: u16 = 0o40555;

impl Server {
    pub(crate) fn perform_on_root(&self, request: &mut Request<'_>, reply: &mut Reply) -> Done {
        match request.header.opcode {
            opcode::LOOKUP => self.lookup_share(request, reply),
            opcode::GETATTR => root_stat().map(|stat| reply.attributes(&stat)),
            opcode::OPENDIR => {
                reply.zeros(16);
                Ok(())
            }
            opcode::READDIR => self.list_shares(request, reply, false),
            opcode::READDIRPLUS => self.list_shares(request, reply, true),
            opcode::RELEASEDIR | opcode::FSYNCDIR => Ok(()),
            opcode::STATFS => {
                reply.zeros(40);
                reply.u32(4096);
                reply.u32(NAME_MAX as u32);
                reply.u32(4096);
                reply.zeros(28);
                Ok(())
            }
            opcode::GETXATTR => Err(Errno::NODATA),
            opcode::LISTXATTR => {
                if request.u32()? == 0 {
                    reply.u64(0);
                }
                Ok(())
            }
            opcode::SETATTR
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::CREATE
            | opcode::TMPFILE
            | opcode::SETXATTR
            | opcode::REMOVEXATTR => Err(Errno::ROFS),
            opcode::OPEN | opcode::READ | opcode::WRITE => Err(Errno::ISDIR),
            _ => Err(Errno::NOSYS),
        }
    }

    fn lookup_share(&self, request: &mut Request<'_>, reply: &mut Reply) -> Done {
        let name = request.name()?.to_str().map_err(|_| Errno::NOENT)?;
        let number: u32 = name.parse().map_err(|_| Errno::NOENT)?;
        // One name for each: no "+1", no "01".
        if number.to_string() != name {
            return Err(Errno::NOENT);
        }
        let (id, stat, flags) = self.enter_share(number)?;
        reply.entry(id, &stat, flags);
        Ok(())
    }

    /// The position after a share is its number and one.
    fn list_shares(&self, request: &mut Request<'_>, reply: &mut Reply, plus: bool) -> Done {
        let (_handle, offset) = (request.u64()?, request.u64()?);
        let room = (request.u32()? as usize).min(MAX_DATA);
        let mut list = Listing { reply, room, plus };
        let Ok(first) = u32::try_from(offset) else { return Ok(()) };
        let shares = self.shares.read().unwrap_or_else(PoisonError::into_inner);
        for number in shares.range(first..).map(|(number, _)| *number) {
            let name = CString::new(number.to_string()).map_err(|_| Errno::INVAL)?;
            let dirent = Dirent {
                inode: u64::from(number) + 2,
                next: u64::from(number) + 1,
                kind: FileType::Unknown,
                name: &name,
            };
            if !list.push(&dirent, || None) {
                break;
            }
        }
        Ok(())
    }
}

/// That of the server's own root directory, which is as empty, with the fields a guest may know of.
fn root_stat() -> Result<Statx, Errno> {
    let root = rustix::fs::openat(
        rustix::fs::CWD,
        c"/",
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    let mut stat = nodes::stat(&root)?;
    stat.stx_ino = ROOT_ID;
    stat.stx_mode = MODE;
    (stat.stx_uid, stat.stx_gid, stat.stx_nlink) = (0, 0, 2);
    (stat.stx_size, stat.stx_blocks, stat.stx_blksize) = (0, 0, 4096);
    Ok(stat)
}
