//! The VMM of ampoule: one process, one VM. It opens nothing: every resource arrives as a descriptor over
//! the control socket that is its standard input. In reading order:

/// Guest RAM: where it lies, where the boot data structures lie in it.
pub mod memory;

/// Port I/O and memory-mapped I/O: which device answers which range.
pub mod bus;
/// The virtio devices and their MMIO transport.
pub mod virtio;
