//! What mounts may have set after they were made (mount_setattr(2)).

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

/// Changes to the attributes of a mount (struct mount_attr in include/uapi/linux/mount.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Attributes {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE` or 0.
    pub propagation: u64,
    /// Descriptor of the user namespace for `MOUNT_ATTR_IDMAP`.
    pub user_namespace: u64,
}

impl Attributes {
    pub const READ_ONLY: Self =
        Self { set: libc::MOUNT_ATTR_RDONLY, clear: 0, propagation: 0, user_namespace: 0 };

    pub fn propagation(propagation: u64) -> Self {
        Self { propagation, ..Self::default() }
    }

    /// Applies the changes to a mount, and to what is mounted below if `recursive`.
    pub fn apply(&self, mount: impl AsFd, recursive: bool) -> io::Result<()> {
        let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
        // SAFETY: self is a whole struct mount_attr that outlives the call; the path is empty.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                mount.as_fd().as_raw_fd(),
                c"".as_ptr(),
                flags,
                &raw const *self,
                size_of::<Self>(),
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
