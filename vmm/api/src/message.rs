//! Requests, events, and why a VM ended.

use serde::{Deserialize, Serialize};

use crate::config::{DiskConfig, VmConfig};

/// Shim to VMM. The descriptors named are sent in the same packet, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The first message, once. Descriptors: `/dev/kvm`, the kernel (an ELF64 `vmlinux`), the console
    /// memory ([`crate::console`]), one per disk, one stream socket per port in `listen`, one
    /// tap per pair of queues of each network device, the socket of the share.
    Boot(VmConfig),
    /// The guest's next connection to host port `port` is spliced to the stream socket sent along.
    /// Once: a second connection needs a second request. Ports nobody asked for are answered with RST.
    ListenVsock { port: u32 },
    /// Connect to guest port `port` and splice to the stream socket sent along. Refused: it is closed.
    ConnectVsock { port: u32 },
    /// Put a backing file or block device (the descriptor) under a spare slot; answered by
    /// [`Event::DiskAttached`].
    AttachDisk { slot: u8, disk: DiskConfig },
    /// Take it away again: capacity 0, further requests fail. Answered by [`Event::DiskDetached`].
    DetachDisk { slot: u8 },
    /// The guest finds a network device, by its place in [`nets`](VmConfig::nets), where it has found none: its agent has
    /// it look once more.
    PlugNet { number: u8, mac: [u8; 6], mtu: u16 },
    /// There is none from now on, whether its driver has let go of it or not.
    UnplugNet { number: u8 },
    /// End the VM now, whatever the guest is doing.
    Stop,
}

/// VMM to shim. Whatever is in here was made by a process that a guest may have taken over: data only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The vCPUs run.
    Started(Stamps),
    /// The guest wrote a stage mark ([`crate::guest`]) at `at_ns` (CLOCK_MONOTONIC). A VMM forwards at
    /// most [`crate::guest::MAX_MARKS`].
    Stage {
        mark: u8,
        at_ns: u64,
    },
    DiskAttached {
        slot: u8,
    },
    DiskDetached {
        slot: u8,
    },
    /// A request could not be done; the VM goes on.
    RequestFailed {
        request: String,
        error: String,
    },
    /// A device went to `DEVICE_NEEDS_RESET` (virtio 1.2, 2.1.1) because of what the guest gave it.
    DeviceFault {
        device: String,
        error: String,
    },
    /// The last message: the process ends with [`StopCause::exit_code`].
    Stopped {
        cause: StopCause,
        detail: String,
        exits: ExitCounts,
    },
}

/// Instants on the way to the first guest instruction, CLOCK_MONOTONIC in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamps {
    /// `main` of the VMM.
    pub process_ns: u64,
    /// KVM gave the VM's descriptor.
    pub vm_created_ns: u64,
    /// Just before the first `KVM_RUN`.
    pub first_run_ns: u64,
    /// The first exit to the VMM: guest kernel code has run.
    pub first_exit_ns: u64,
}

/// VM exits that reached the VMM, by reason; in-kernel ones (ioeventfd, irqchip) are not among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitCounts {
    pub pio_in: u64,
    pub pio_out: u64,
    pub mmio_read: u64,
    pub mmio_write: u64,
    pub other: u64,
    /// All of them when the guest marked [`crate::guest::Mark::Hello`].
    pub until_hello: u64,
}

/// Why the VM ended. Each has its own exit code of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopCause {
    /// The guest switched itself off ([`crate::guest::POWER_PORT`]).
    PowerOff,
    /// The guest asked for a reset (port 0x64).
    Reset,
    /// The guest kernel panicked: it said so on the console, then reset.
    Panic,
    /// A triple fault: KVM_EXIT_SHUTDOWN.
    TripleFault,
    /// KVM could not go on: KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_FAIL_ENTRY.
    KvmError,
    /// The VM was never started: bad configuration, kernel, or host resource. `detail` says which.
    BootFailed,
    /// [`Request::Stop`].
    Requested,
    /// The shim closed the control socket.
    ShimGone,
    /// A bug or a broken control channel.
    Internal,
}

impl StopCause {
    /// Exit code of the VMM process.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::PowerOff | Self::Requested => 0,
            Self::BootFailed => 10,
            Self::Reset => 11,
            Self::Panic => 12,
            Self::TripleFault => 13,
            Self::KvmError => 14,
            Self::ShimGone => 15,
            Self::Internal => 16,
        }
    }

    /// For messages: "the guest kernel panicked".
    pub fn describe(self) -> &'static str {
        match self {
            Self::PowerOff => "the guest switched itself off",
            Self::Reset => "the guest asked for a reset",
            Self::Panic => "the guest kernel panicked",
            Self::TripleFault => "the guest triple-faulted",
            Self::KvmError => "KVM could not run the guest",
            Self::BootFailed => "the VM could not be started",
            Self::Requested => "the VM was stopped",
            Self::ShimGone => "the shim went away",
            Self::Internal => "the VMM failed",
        }
    }
}
