//! From a request to its reply: which of the operations it is, and what they work on.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use ampoule_fsd_api::message::Hint;
use ampoule_vmm_api::Channel;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, Statx, openat},
    io::{Errno, fcntl_dupfd_cloexec},
};

use crate::{
    abi::{ATTR_SUBMOUNT, FOPEN_DIRECT_IO, ROOT_ID, opcode},
    caller::Privileges,
    handles::{Handle, Handles},
    locks::{Locks, MAX_OWNERS, MAX_RANGES},
    nodes::{Node, Nodes},
    ops::Replay,
    reply::Reply,
    request::Request,
    watch::Watch,
};

/// What the threads of a file server have in common.
#[derive(Debug)]
pub struct Server {
    pub(crate) shares: RwLock<BTreeMap<u32, Share>>,
    /// What is served instead of a list of shares.
    root: Option<Arc<Node>>,
    pub(crate) nodes: Nodes,
    pub(crate) handles: Handles,
    pub(crate) locks: Locks,
    pub(crate) privileges: Privileges,
    /// Set once, if at all, before the guest's first request: who passes on what the guest is to be told.
    pub(crate) hints: OnceLock<Channel>,
    /// Likewise, if the host has it.
    pub(crate) watch: OnceLock<Watch>,
    /// Whether the guest wants to know where a mount of the host begins.
    pub(crate) submounts: AtomicBool,
}

/// What is served under a number.
#[derive(Debug)]
pub(crate) struct Share {
    root: OwnedFd,
    /// Whether an overlay's may be made.
    whiteouts: bool,
}

/// The result of an operation, whose reply is written as it goes.
pub(crate) type Done = Result<(), Errno>;

impl Server {
    pub fn new(privileges: Privileges, most_nodes: usize, most_handles: usize) -> Self {
        Self::numbered(privileges, most_nodes, most_handles, ROOT_ID + 1)
    }

    /// Of one directory, which is the root, with all that is mounted below. Files and what is open have numbers from
    /// `first` on, more than 1.
    pub fn of_directory(
        privileges: Privileges,
        most_nodes: usize,
        most_handles: usize,
        root: OwnedFd,
        first: u64,
    ) -> Result<Self, Errno> {
        let mut server = Self::numbered(privileges, most_nodes, most_handles, first);
        let (node, _) = Node::new(0, fcntl_dupfd_cloexec(&root, 0)?)?;
        server.add_share(0, root, false)?;
        server.root = Some(Arc::new(node));
        Ok(server)
    }

    fn numbered(
        privileges: Privileges,
        most_nodes: usize,
        most_handles: usize,
        first: u64,
    ) -> Self {
        Self {
            shares: RwLock::default(),
            root: None,
            nodes: Nodes::new(most_nodes, first),
            handles: Handles::new(most_handles, first),
            locks: Locks::new(MAX_OWNERS, MAX_RANGES),
            privileges,
            hints: OnceLock::new(),
            watch: OnceLock::new(),
            submounts: AtomicBool::new(false),
        }
    }

    /// `root` is the root of a detached mount; the guest may make `whiteouts` in it, or no devices at all.
    pub fn add_share(&self, number: u32, root: OwnedFd, whiteouts: bool) -> Result<(), Errno> {
        let mut shares = self.shares.write().unwrap_or_else(PoisonError::into_inner);
        if shares.contains_key(&number) {
            return Err(Errno::EXIST);
        }
        shares.insert(number, Share { root, whiteouts });
        Ok(())
    }

    pub fn remove_share(&self, number: u32) -> Result<(), Errno> {
        let mut shares = self.shares.write().unwrap_or_else(PoisonError::into_inner);
        shares.remove(&number).ok_or(Errno::NOENT)?;
        self.handles.release_share(number);
        self.locks.release_share(number);
        self.nodes.forget_share(number);
        if let Some(watch) = self.watch.get() {
            watch.keep(|id| self.nodes.find(id).is_ok());
        }
        Ok(())
    }

    /// Where hints go. Once, before the guest's first request.
    pub fn tell(&self, hints: Channel) -> Result<(), Errno> {
        self.hints.set(hints).map_err(|_| Errno::EXIST)
    }

    /// What the host changes is from now on noticed. Once, before the guest's first request.
    pub fn watch(&self, watch: Watch) -> Result<(), Errno> {
        self.watch.set(watch).map_err(|_| Errno::EXIST)
    }

    /// Answers a message; `None` is for those that have no answer.
    pub fn answer<'a>(&self, message: &[u8], reply: &'a mut Reply) -> Option<&'a [u8]> {
        reply.clear();
        let (header, result) = match Request::parse(message) {
            Ok(request) => (request.header, self.perform(request, reply)),
            Err(header) => (header?, Err(Errno::INVAL)),
        };
        match header.opcode {
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => None,
            _ => Some(reply.finish(header.unique, result)),
        }
    }

    fn perform(&self, mut request: Request<'_>, reply: &mut Reply) -> Done {
        let header = request.header;
        let request = &mut request;
        match header.opcode {
            opcode::INIT => return self.init(request, reply),
            opcode::DESTROY => return self.destroy(),
            opcode::FORGET => return self.forget(header.node, request),
            opcode::BATCH_FORGET => return self.batch_forget(request),
            // Nothing here waits for long, and virtio-fs does not send it.
            opcode::INTERRUPT => return Ok(()),
            _ if header.node == ROOT_ID && self.root.is_none() => {
                return self.perform_on_root(request, reply);
            }
            _ => {}
        }
        let node = &*self.node(header.node)?;
        // Where nobody watches these are groups as any other.
        if let (Some(replay), Some(_)) = (Replay::of(&header), self.watch.get()) {
            return self.replay(replay, node, request, reply);
        }
        match header.opcode {
            opcode::LOOKUP => self.lookup(node, request, reply),
            opcode::GETATTR => self.getattr(node, request, reply),
            opcode::SETATTR => self.setattr(node, request, reply),
            opcode::READLINK => self.readlink(node, reply),
            opcode::STATFS => self.statfs(node, reply),
            opcode::SYMLINK => self.symlink(node, request, reply),
            opcode::MKNOD => self.mknod(node, request, reply),
            opcode::MKDIR => self.mkdir(node, request, reply),
            opcode::LINK => self.link(node, request, reply),
            opcode::CREATE => self.create(node, request, reply),
            opcode::TMPFILE => self.tmpfile(node, request, reply),
            opcode::UNLINK => self.unlink(node, request),
            opcode::RMDIR => self.rmdir(node, request),
            opcode::RENAME => self.rename(node, request, false),
            opcode::RENAME2 => self.rename(node, request, true),
            opcode::OPEN => self.open(node, request, reply),
            opcode::OPENDIR => self.opendir(node, request, reply),
            opcode::READ => self.read(request, reply),
            opcode::WRITE => self.write(request, reply),
            opcode::FSYNC | opcode::FSYNCDIR => self.fsync(request),
            opcode::FALLOCATE => self.fallocate(request),
            opcode::GETLK => self.getlk(node, request, reply),
            opcode::SETLK => self.setlk(node, request),
            opcode::LSEEK => self.lseek(node, request, reply),
            opcode::COPY_FILE_RANGE => self.copy_file_range(request, reply),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(request),
            opcode::READDIR => self.readdir(node, request, reply, false),
            opcode::READDIRPLUS => self.readdir(node, request, reply, true),
            opcode::SETXATTR => self.setxattr(node, request),
            opcode::GETXATTR => self.getxattr(node, request, reply),
            opcode::LISTXATTR => self.listxattr(node, request, reply),
            opcode::REMOVEXATTR => self.removexattr(node, request),
            // FLUSH among them: what is written is the host kernel's at once.
            _ => Err(Errno::NOSYS),
        }
    }

    /// Anything but the root, if that is the list of shares, which is nobody's to work on.
    pub(crate) fn node(&self, id: u64) -> Result<Arc<Node>, Errno> {
        match id {
            ROOT_ID => self.root.clone().ok_or(Errno::ROFS),
            id => self.nodes.find(id),
        }
    }

    /// How the guest's kernel is to treat what it has opened. Whoever looks into a directory, and not at a share, sees what is
    /// there now, and all of a file that does not say how long it is, as in /proc.
    pub(crate) fn open_flags(&self) -> u32 {
        if self.root.is_some() { FOPEN_DIRECT_IO } else { 0 }
    }

    /// A name that has been found. Likewise only those of directories are believed for longer than they are told.
    pub(crate) fn reply_entry(&self, (id, stat, flags): (u64, Statx, u32), reply: &mut Reply) {
        let is_directory = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
        match self.root.is_some() && !is_directory {
            true => reply.momentary_entry(id, &stat),
            false => reply.entry(id, &stat, flags),
        }
    }

    /// That there is no such name.
    pub(crate) fn reply_no_entry(&self, reply: &mut Reply) -> Done {
        if self.root.is_some() {
            return Err(Errno::NOENT);
        }
        reply.no_entry();
        Ok(())
    }

    /// Attributes as the guest is told them. One that does not know of mounts would take files of the same number in two
    /// of them for one.
    pub(crate) fn shown(&self, mut stat: Statx, id: u64) -> Statx {
        if self.root.is_some() {
            stat.stx_ino = id;
        }
        stat
    }

    /// The handle whose number is next in the request, of the node that the request is about.
    pub(crate) fn handle(&self, request: &mut Request<'_>) -> Result<Arc<Handle>, Errno> {
        self.handles.find(request.u64()?, request.header.node)
    }

    /// Tells the guest of a file that `fd`, an O_PATH descriptor, is of.
    pub(crate) fn enter(&self, parent: &Node, fd: OwnedFd) -> Result<(u64, Statx, u32), Errno> {
        let (node, stat) = Node::new(parent.share(), fd)?;
        let border = node.is_dir() && !node.same_mount(parent);
        let flags = if border { self.submount() } else { 0 };
        let watched = node.is_dir();
        let id = self.enter_node(node, watched)?;
        Ok((id, self.shown(stat, id), flags))
    }

    fn enter_node(&self, node: Node, watched: bool) -> Result<u64, Errno> {
        let share = node.share();
        if let Some(hints) = self.hints.get() {
            // Who does not listen now is asked again.
            self.nodes.make_room(&node, || drop(hints.send(&Hint::Crowded, &[])));
        }
        let (id, new) = self.nodes.enter(node)?;
        if !self.shares_still(share) {
            self.nodes.forget_share(share);
            return Err(Errno::STALE);
        }
        if let (Some(watch), Some(node)) = (self.watch.get().filter(|_| watched), new) {
            watch.add(id, &node);
        }
        Ok(id)
    }

    /// A handle, which a share that has just been taken away must not leave behind either.
    pub(crate) fn enter_handle(&self, handle: Handle) -> Result<u64, Errno> {
        let share = handle.share();
        let number = self.handles.enter(handle)?;
        if !self.shares_still(share) {
            self.handles.release_share(share);
            return Err(Errno::STALE);
        }
        Ok(number)
    }

    fn shares_still(&self, number: u32) -> bool {
        self.shares.read().unwrap_or_else(PoisonError::into_inner).contains_key(&number)
    }

    pub(crate) fn may_have_whiteouts(&self, number: u32) -> bool {
        let shares = self.shares.read().unwrap_or_else(PoisonError::into_inner);
        shares.get(&number).is_some_and(|share| share.whiteouts)
    }

    pub(crate) fn forget_node(&self, id: u64, count: u64) {
        let forgotten = self.nodes.forget(id, count);
        if let (Some(watch), Some(node)) = (self.watch.get(), forgotten) {
            watch.remove(id, &node);
        }
    }

    /// As [`Server::enter`], of a share itself.
    pub(crate) fn enter_share(&self, number: u32) -> Result<(u64, Statx, u32), Errno> {
        let root = {
            let shares = self.shares.read().unwrap_or_else(PoisonError::into_inner);
            fcntl_dupfd_cloexec(&shares.get(&number).ok_or(Errno::NOENT)?.root, 0)?
        };
        let (node, stat) = Node::new(number, root)?;
        let flags = if node.is_dir() { self.submount() } else { 0 };
        Ok((self.enter_node(node, true)?, stat, flags))
    }

    fn submount(&self) -> u32 {
        if self.submounts.load(Ordering::Relaxed) { ATTR_SUBMOUNT } else { 0 }
    }
}

/// Opens what an O_PATH descriptor is of, or an open file once more. The worker's working directory is
/// `/proc/self/fd`, and this link in it leads to that file and no other.
pub(crate) fn reopen(fd: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    openat(CWD, rustix::path::DecInt::from_fd(fd), flags | OFlags::CLOEXEC, Mode::empty())
}

/// The file of this name, whatever it is, without following or opening it.
pub(crate) fn open_path(parent: &Node, name: &std::ffi::CStr) -> Result<OwnedFd, Errno> {
    openat(parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests;
