//! What a shim and the guest agent say to each other: `proto/agent.proto`, generated into [`agent`] (the
//! messages) and [`agent_ttrpc`] (client and service). And what both say to their kernels: [`netlink`], [`bpf`].

pub mod bpf;
pub mod netlink;

#[allow(clippy::all, clippy::unwrap_used, clippy::expect_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub use generated::{agent, agent_ttrpc};

/// Host vsock port that the agent dials when it is ready.
pub const AGENT_PORT: u32 = 1024;

/// The major number of a block device in a guest's spec that stands for a disk, by its slot for a minor one: the agent puts
/// the numbers that the kernel has given it there. No device has so large a one.
pub const DISK_MAJOR: u32 = 1 << 12;

/// Where the agent puts the nth file of a request for a container.
pub fn file_path(container: &str, n: usize) -> String {
    format!("{}/{n}", files_of(container))
}

/// The folder of those files.
pub fn files_of(container: &str) -> String {
    format!("/run/ampoule-files/{container}")
}

/// Options of mounts, by name, that are not the file system's own: bind, attributes ("r" before one: of all below too),
/// propagation, and a copy of what a tmpfs hides.
pub const MOUNT_OPTIONS: &[&str] = &[
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "exec",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "tmpcopyup",
    "unbindable",
];
