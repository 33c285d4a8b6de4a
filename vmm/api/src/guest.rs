//! What the guest knows of its machine: the I/O ports by which it marks its stages and switches itself off, one `out`
//! instruction each, the name of what the host shares with it, and how it repeats what the host has changed there.

/// Byte writes here are stage marks.
pub const STAGE_PORT: u16 = 0x0a00;
/// A byte write here ends the VM: the agent has synced and unmounted. There is no ACPI to do it.
pub const POWER_PORT: u16 = 0x0a01;
/// Marks a VMM forwards; further ones are dropped.
pub const MAX_MARKS: u32 = 64;

/// The tag of the virtio-fs device (virtio 1.2, 5.11.4), there if the host shares directories.
pub const SHARE_TAG: &str = "ampoule";

/// Stage marks the agent writes, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mark {
    /// The agent's first instructions as PID 1.
    AgentStarted = 1,
    /// File systems are mounted.
    Mounted = 2,
    /// The agent dials the host.
    Hello = 3,
}

/// Group ids by which the guest's agent says that a request on a share only repeats, for its own kernel to tell whoever
/// watches, what the host has done: the file server answers as if it did it, and does nothing.
pub mod replay {
    /// mknod(2), mkdir(2) and symlink(2).
    pub const CREATE: u32 = 0xffff_fff0;
    /// unlink(2) of what is no directory.
    pub const DELETE: u32 = 0xffff_fff1;
    /// rmdir(2).
    pub const DELETE_DIR: u32 = 0xffff_fff2;
    /// fallocate(2) for a write, chown(2) for attributes.
    pub const CHANGE: u32 = 0xffff_fff3;
    /// rename(2) of what is no directory.
    pub const MOVE: u32 = 0xffff_fff4;
    /// rename(2) of a directory.
    pub const MOVE_DIR: u32 = 0xffff_fff5;
}
