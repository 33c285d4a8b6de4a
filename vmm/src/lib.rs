//! The VMM of ampoule: one process, one VM. It opens nothing: every resource arrives as a descriptor over
//! the control socket that is its standard input. In reading order:

/// From first to last: confine, take the boot request, build, run, stop.
pub mod run;

/// Boot as one recipe.
pub mod builder;
/// The first message: what the VM is made of.
pub mod request;

/// The zero page and the command line.
pub mod boot_params;
/// What the guest's CPUID says.
pub mod cpuid;
/// The guest kernel, mapped from its file.
pub mod kernel;
/// KVM itself, checked for what a VM needs.
pub mod kvm;
/// Guest RAM: where it lies, where the boot data structures lie in it.
pub mod memory;
/// The table of processors and interrupts.
pub mod mptable;
/// A vCPU's registers at the kernel's entry.
pub mod regs;

/// Port I/O and memory-mapped I/O: which device answers which range.
pub mod bus;
/// Stage marks, power-off, reset.
pub mod guest_ports;
/// COM1 into the console ring.
pub mod serial;
/// vCPU threads, each behind a handle.
pub mod vcpu;
/// The virtio devices and their MMIO transport.
pub mod virtio;

/// The shim's requests while the guest runs.
pub mod control;
/// VM exits by reason.
pub mod counters;
/// Errors as the shim reads them.
pub mod error;
/// Events to the shim.
pub mod events;
/// Why the VM ends: the first cause wins.
pub mod stop;

/// Namespaces, an empty root, no capabilities.
pub mod confine;
/// System call filters.
pub mod seccomp;
