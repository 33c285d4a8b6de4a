//! What a shim and its VMM say to each other. No KVM in here.
//!
//! The VMM is one process for one VM. It is started with one end of a `SOCK_SEQPACKET` socketpair as its
//! standard input and is told everything else over that socket: the shim sends [`Request`]s, each with the
//! descriptors it speaks of; the VMM sends [`Event`]s and never a descriptor. In reading order:
//!
//! - [`config`]: what a VM is made of
//! - [`message`]: requests, events, and why a VM ended
//! - [`channel`]: the control socket: one packet, one message, its descriptors
//! - [`console`]: the console ring, memory shared by both so that it outlives the VMM
//! - [`guest`]: the I/O ports by which the guest marks its stages and switches itself off, and the share's name
//! - [`attributes`]: what a mount has set, of the host or the guest; [`owners`]: whose files are whose on it
//! - [`confine`]: what a process gives up, [`seccomp`]: system call filters
//! - [`spawn`]: starting and reaping the VMM's process

pub mod attributes;
pub mod channel;
pub mod config;
pub mod confine;
pub mod console;
pub mod guest;
pub mod message;
pub mod owners;
pub mod seccomp;
pub mod spawn;

pub use channel::{Channel, ChannelError};
pub use config::{DiskConfig, NetConfig, Rate, RateLimit, VmConfig};
pub use message::{Event, ExitCounts, Request, Stamps, StopCause};
pub use owners::Owners;
pub use spawn::{SpawnError, VmmExit, VmmProcess};
