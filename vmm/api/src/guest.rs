//! What the guest knows of its machine: the I/O ports by which it marks its stages and switches itself off, one `out`
//! instruction each, and the name of what the host shares with it.

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
