//! Making things: each as the guest's process that asks for it, so that owner, group, mode and inherited access
//! control lists are the host kernel's doing.

use std::{ffi::CStr, os::fd::OwnedFd};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, linkat, mkdirat, mknodat, openat, symlinkat},
    io::Errno,
    process::umask,
};

use crate::{
    caller::Check,
    nodes::Node,
    ops::file::open_flags,
    reply::Reply,
    request::Request,
    server::{Done, Server, open_path, reopen},
};

impl Server {
    pub(crate) fn mkdir(
        &self,
        parent: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
    ) -> Done {
        let (mode, mask) = (request.u32()?, request.u32()?);
        let name = request.name()?;
        self.make(parent, request, mask, || mkdirat(parent, name, permissions(mode)))?;
        self.reply_named(parent, name, reply)
    }

    pub(crate) fn mknod(
        &self,
        parent: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
    ) -> Done {
        let (mode, device) = (request.u32()?, request.u32()?);
        let (mask, _) = (request.u32()?, request.u32()?);
        let name = request.name()?;
        let kind = FileType::from_raw_mode(mode);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            // An overlay's mark for what is not there. No driver has this number, and Linux lets anybody make it.
            FileType::CharacterDevice if device == 0 && self.may_have_whiteouts(parent.share()) => {
            }
            // Another device made by a guest would be one of the host's.
            _ => return Err(Errno::PERM),
        }
        self.make(parent, request, mask, || mknodat(parent, name, kind, permissions(mode), 0))?;
        self.reply_named(parent, name, reply)
    }

    pub(crate) fn symlink(
        &self,
        parent: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
    ) -> Done {
        let (name, target) = (request.name()?, request.string()?);
        self.make(parent, request, 0, || symlinkat(target, parent, name))?;
        self.reply_named(parent, name, reply)
    }

    pub(crate) fn link(&self, parent: &Node, request: &mut Request<'_>, reply: &mut Reply) -> Done {
        let old = self.node(request.u64()?)?;
        let name = request.name()?;
        linkat(CWD, old.name(), parent, name, AtFlags::SYMLINK_FOLLOW)?;
        self.reply_named(parent, name, reply)
    }

    pub(crate) fn create(
        &self,
        parent: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
    ) -> Done {
        let (flags, mode) = (request.u32()?, request.u32()?);
        let (mask, _) = (request.u32()?, request.u32()?);
        let name = request.name()?;
        let new = open_flags(flags)? | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let created = self.make(parent, request, mask, || {
            openat(parent, name, new | OFlags::CLOEXEC, permissions(mode))
        });
        let exclusive = OFlags::from_bits_retain(flags).contains(OFlags::EXCL);
        match created {
            Err(Errno::EXIST) if !exclusive => {
                self.open_existing(parent, name, request, reply, flags)
            }
            created => self.reply_created(parent, created?, reply),
        }
    }

    pub(crate) fn tmpfile(
        &self,
        parent: &Node,
        request: &mut Request<'_>,
        reply: &mut Reply,
    ) -> Done {
        let (flags, mode) = (request.u32()?, request.u32()?);
        let mask = request.u32()?;
        // O_EXCL: it can never be given a name.
        let kept = OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let new = open_flags(flags)? | kept | OFlags::TMPFILE | OFlags::CLOEXEC;
        let file =
            self.make(parent, request, mask, || openat(parent, c".", new, permissions(mode)))?;
        self.reply_created(parent, file, reply)
    }

    /// The host has made the file since the guest looked.
    fn open_existing(
        &self,
        parent: &Node,
        name: &CStr,
        request: &Request<'_>,
        reply: &mut Reply,
        flags: u32,
    ) -> Done {
        let path = open_path(parent, name)?;
        let (found, _) = Node::new(parent.share(), fcntl_dup(&path)?)?;
        if !found.is_openable() {
            return Err(Errno::EXIST);
        }
        let file = {
            let _caller = self.privileges.act_as(&request.header, request.group()?, Check::Host)?;
            reopen(&found, open_flags(flags)?)?
        };
        self.reply_created(parent, file, reply)
    }

    fn make<T>(
        &self,
        parent: &Node,
        request: &Request<'_>,
        mask: u32,
        make: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        if !parent.is_dir() {
            return Err(Errno::NOTDIR);
        }
        let _caller = self.privileges.act_as(&request.header, request.group()?, Check::Guest)?;
        // The thread's own. A directory with a default access control list does without it.
        umask(permissions(mask) & Mode::from_bits_truncate(0o777));
        make()
    }

    fn reply_named(&self, parent: &Node, name: &CStr, reply: &mut Reply) -> Done {
        self.reply_entry(self.lookup_name(parent, name)?, reply);
        Ok(())
    }

    /// The entry and the handle of a file that is open.
    fn reply_created(&self, parent: &Node, file: OwnedFd, reply: &mut Reply) -> Done {
        let path = reopen(&file, OFlags::PATH)?;
        let entered = self.enter(parent, path)?;
        let id = entered.0;
        self.reply_entry(entered, reply);
        let opened = self.reply_opened(file, id, parent.share(), reply);
        if opened.is_err() {
            self.forget_node(id, 1);
        }
        opened
    }
}

fn fcntl_dup(fd: &OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::io::fcntl_dupfd_cloexec(fd, 0)
}

/// Permission and set-id bits.
pub(super) fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}
