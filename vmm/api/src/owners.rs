//! Whose files are whose on a mount (mount_setattr(2), "ID-mapped mounts"): the mapping is a user namespace that nobody is
//! in. Shims, of the host's files, and agents, of the guest's, map them alike.

use std::{
    fs, io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use crate::attributes::Attributes;
use rustix::{
    fs::{Mode, OFlags, open},
    pipe::{PipeFlags, pipe_with},
    process::Pid,
};

/// A mapping for a mount.
#[derive(Debug)]
pub struct Owners {
    namespace: OwnedFd,
    /// Of what is mounted below, too.
    recursive: bool,
}

impl Owners {
    /// The maps have lines of a first id on disk, the first id it is shown as, and how many (user_namespaces(7)).
    ///
    /// # Errors
    /// EPERM for who is not root of the host, EINVAL for maps that the kernel does not take.
    pub fn new(users: &str, groups: &str, recursive: bool) -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        // No signal at its end: whoever else waits for children of this process does not see it.
        let flags = libc::CLONE_NEWUSER;
        // SAFETY: without CLONE_VM it is a fork; the child makes system calls on numbers and memory of its own only.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        if pid == 0 {
            drop(write);
            // Until the parent closes its end.
            let _ = rustix::io::read(&read, &mut [0; 1]);
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(0) }
        }
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(io::Error::last_os_error)?;
        let namespace = mapped(pid, users, groups);
        drop(write);
        // SAFETY: waitpid(2) takes plain numbers and no status here.
        unsafe { libc::waitpid(pid.as_raw_pid(), std::ptr::null_mut(), libc::__WCLONE) };
        Ok(Self { namespace: namespace?, recursive })
    }

    /// Maps a detached mount.
    ///
    /// # Errors
    /// EINVAL for a file system whose owners the kernel cannot map.
    pub fn apply(&self, mount: BorrowedFd<'_>) -> io::Result<()> {
        let user_namespace = self.namespace.as_raw_fd() as u64;
        let set = libc::MOUNT_ATTR_IDMAP;
        Attributes { set, user_namespace, ..Default::default() }.apply(mount, self.recursive)
    }
}

fn mapped(pid: Pid, users: &str, groups: &str) -> io::Result<OwnedFd> {
    let folder = format!("/proc/{pid}");
    fs::write(format!("{folder}/uid_map"), users)?;
    fs::write(format!("{folder}/gid_map"), groups)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(open(format!("{folder}/ns/user"), flags, Mode::empty())?)
}
