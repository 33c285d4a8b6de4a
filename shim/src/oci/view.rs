//! What is found by whoever enters the mount namespace of a container's process, as `podman cp` and `podman top` do:
//! nothing. The container's files and processes are in its VM; without this the host's would be taken for them.
//!
//! The thread itself goes on seeing the host: its root lies below what is mounted on top of it, where only who enters
//! the namespace anew comes to (mount_namespaces(7), setns(2)). It can make no user namespaces any more.

use rustix::{
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::UnshareFlags,
};

use super::{OciError, Result};

/// Gives this thread a mount namespace with nothing on top; an ordinary user has none.
pub fn cover() -> Result<()> {
    match cover_root() {
        Ok(()) | Err(Errno::PERM) => Ok(()),
        Err(e) => Err(OciError::Host("cover the host's root directory", e.into())),
    }
}

fn cover_root() -> std::result::Result<(), Errno> {
    // SAFETY: a new mount namespace changes nothing that memory safety depends on.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    // What is unmounted on the host is not held here.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    let nothing = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("ampoule", "/", "tmpfs", nothing, c"size=4k,nr_inodes=1")
}
