//! The I/O ports by which the guest marks its stages and switches itself off: one `out` instruction each.

/// Byte writes here are stage marks.
pub const STAGE_PORT: u16 = 0x0a00;
/// A byte write here ends the VM: the agent has synced and unmounted. There is no ACPI to do it.
pub const POWER_PORT: u16 = 0x0a01;
/// Marks a VMM forwards; further ones are dropped.
pub const MAX_MARKS: u32 = 64;

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
