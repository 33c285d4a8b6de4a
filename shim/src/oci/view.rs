//! What is found by whoever enters the mount namespace of a container's process, as `podman cp` and `podman top` do: the
//! root file system as it was before the start, read-only. Without that they would find the host's.
//!
//! The process itself goes on seeing the host: its root lies below what is mounted on top of it, where only who enters
//! the namespace anew comes to (mount_namespaces(7), setns(2)).

use std::path::Path;

use rustix::{
    io::Errno,
    mount::{
        MountFlags, MountPropagationFlags, UnmountFlags, mount_bind, mount_change, mount_remount,
        unmount,
    },
    thread::UnshareFlags,
};

use super::{OciError, Result};

/// Gives this process, which has one thread, a mount namespace with `rootfs` on top. An ordinary user has none.
pub fn cover(rootfs: &Path) -> Result<()> {
    match cover_root(rootfs) {
        Ok(()) | Err(Errno::PERM) => Ok(()),
        Err(e) => Err(OciError::File {
            what: "mount namespace: root file system",
            path: rootfs.into(),
            source: e.into(),
        }),
    }
}

fn cover_root(rootfs: &Path) -> std::result::Result<(), Errno> {
    // SAFETY: a new mount namespace changes nothing that memory safety depends on.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    // What is unmounted on the host is not held here.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    // Made read-only where it has a path; on top of the root nothing reaches it any more.
    mount_bind(rootfs, rootfs)?;
    mount_remount(rootfs, MountFlags::BIND | MountFlags::RDONLY, "")?;
    mount_bind(rootfs, "/")?;
    unmount(rootfs, UnmountFlags::DETACH)
}
