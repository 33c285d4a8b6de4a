//! A tree of the host as a detached mount: its root has no parent, so `..` ends there; whether it can be
//! written is the mount's property, so the kernel's; device nodes on it cannot be opened and symbolic links
//! are never followed, by anyone who comes through it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::mount::{OpenTreeFlags, open_tree};

use crate::Owners;

const ATTRIBUTES: u64 = libc::MOUNT_ATTR_NOSUID
    | libc::MOUNT_ATTR_NODEV
    | libc::MOUNT_ATTR_NOEXEC
    | libc::MOUNT_ATTR_NOSYMFOLLOW;

/// Clones the tree below `root`, which is of the caller's mount namespace, with what is mounted in it now.
/// Later mounts and unmounts on the host do not reach the clone.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN in the mount namespace's user namespace; with owners, those of [`Owners::apply`].
pub fn detach(
    root: BorrowedFd<'_>,
    read_only: bool,
    owners: Option<&Owners>,
) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(root, "", flags)?;
    let read_only = if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    set_attributes(mount.as_fd(), ATTRIBUTES | read_only)?;
    owners.map_or(Ok(()), |owners| owners.apply(mount.as_fd()))?;
    Ok(mount)
}

/// mount_setattr(2) on all mounts of the tree, which also leave their peer groups.
pub fn set_attributes(mount: BorrowedFd<'_>, attributes: u64) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    change(mount, &attributes, true)
}

/// Shows files of other owners than they have, by the maps of a user namespace.
pub(crate) fn map_owners(
    mount: BorrowedFd<'_>,
    namespace: BorrowedFd<'_>,
    recursive: bool,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.as_raw_fd() as u64,
    };
    change(mount, &attributes, recursive)
}

fn change(mount: BorrowedFd<'_>, attributes: &libc::mount_attr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is NUL-terminated; the structure outlives the call, which is told its size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
