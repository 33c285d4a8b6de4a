//! Operations that the guest's agent only repeats, so that its kernel tells whoever watches there what the host has
//! done. They succeed and do nothing.
//!
//! Any process of the guest that may choose its group can make them, and has nothing of it: the host stays as it is,
//! what it learns are names and attributes that it may look up anyway, and whom it deceives is its own kernel, about
//! files that it could have changed in earnest. On a read-only share its kernel lets it do nothing of the kind.

use ampoule_vmm_api::guest::replay;
use rustix::{
    fs::{FileType, OFlags},
    io::Errno,
};

use crate::{
    abi::opcode,
    nodes::Node,
    reply::Reply,
    request::{Header, Request},
    server::{Done, Server, open_path, reopen},
};

/// The numbers of a file and of a directory that are no more. The guest asks nothing of them, but to forget them.
const GONE: u64 = u64::MAX;
const GONE_DIR: u64 = u64::MAX - 1;

/// What is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replay {
    Create,
    Delete(FileType),
    Change,
    Move(FileType),
}

impl Replay {
    pub(crate) fn of(header: &Header) -> Option<Self> {
        match header.gid {
            replay::CREATE => Some(Self::Create),
            replay::DELETE => Some(Self::Delete(FileType::RegularFile)),
            replay::DELETE_DIR => Some(Self::Delete(FileType::Directory)),
            replay::CHANGE => Some(Self::Change),
            replay::MOVE => Some(Self::Move(FileType::RegularFile)),
            replay::MOVE_DIR => Some(Self::Move(FileType::Directory)),
            _ => None,
        }
    }
}

impl Server {
    pub(crate) fn replay(
        &self,
        replay: Replay,
        node: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
    ) -> Done {
        match (replay, request.header.opcode) {
            // To be created it must not be there before; to be deleted it must.
            (Replay::Create, opcode::LOOKUP) => {
                request.name()?;
                reply.no_entry();
                Ok(())
            }
            (Replay::Delete(kind), opcode::LOOKUP) => {
                request.name()?;
                self.reply_gone(node, kind, reply)
            }
            // What is there by now is the new name, what is not is the old one.
            (Replay::Move(kind), opcode::LOOKUP) => match open_path(node, request.name()?) {
                Err(Errno::NOENT) => self.reply_gone(node, kind, reply),
                Ok(_) => {
                    reply.no_entry();
                    Ok(())
                }
                Err(e) => Err(e),
            },
            (Replay::Move(_), opcode::RENAME | opcode::RENAME2) => Ok(()),
            (Replay::Change, opcode::LOOKUP) => self.lookup(node, request, reply),
            (Replay::Create, opcode::SYMLINK) => self.lookup(node, request, reply),
            (Replay::Create, opcode::MKNOD) => {
                request.bytes(16)?;
                self.lookup(node, request, reply)
            }
            (Replay::Create, opcode::MKDIR) => {
                request.bytes(8)?;
                self.lookup(node, request, reply)
            }
            (Replay::Delete(_), opcode::UNLINK | opcode::RMDIR) => Ok(()),
            (Replay::Change, opcode::OPEN) if node.is_openable() => {
                let file = reopen(node, OFlags::RDONLY)?;
                self.reply_opened(file, request.header.node, node.share(), reply)
            }
            (Replay::Change, opcode::FALLOCATE) => Ok(()),
            (Replay::Change, opcode::SETATTR) => {
                reply.attributes(&node.stat()?);
                Ok(())
            }
            (_, opcode::GETATTR) => self.getattr(node, request, reply),
            (_, opcode::RELEASE) => self.release(request),
            _ => Err(Errno::PERM),
        }
    }

    fn reply_gone(&self, parent: &Node, kind: FileType, reply: &mut Reply) -> Done {
        let mut stat = parent.stat()?;
        stat.stx_mode = kind.as_raw_mode() as u16;
        let id = if kind == FileType::Directory { GONE_DIR } else { GONE };
        (stat.stx_ino, stat.stx_nlink, stat.stx_size) = (id, 1, 0);
        // Not even for as long as it takes to look at what has its name now.
        reply.momentary_entry(id, &stat);
        Ok(())
    }
}
