//! What sandboxes, containers and further processes are made from.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use oci_spec::runtime::{Process, Spec};

use super::HostUpper;
use crate::{id::Id, network::Network, share::Share, vm::Disk};

/// RAM of a VM in MiB whose containers may use `limit` bytes: these, and for the guest kernel and agent 64 MiB and
/// a sixteenth (its page tables and page descriptors grow with the memory). So a limit is met in the container,
/// not in the VM.
pub fn vm_memory_mib(limit: u64) -> u32 {
    let mib = limit.div_ceil(1 << 20);
    u32::try_from(mib + mib / 16 + 64).unwrap_or(u32::MAX)
}

/// What a sandbox is made from.
#[derive(Debug)]
pub struct SandboxConfig {
    pub name: Id,
    pub hostname: String,
    /// 1 to [`ampoule_vmm_api::config::MAX_VCPUS`].
    pub vcpus: u8,
    /// RAM of the VM in MiB: what its containers may use, and the guest's own share.
    pub memory_mib: u32,
    pub vmm: PathBuf,
    pub kernel: PathBuf,
    pub guest_image: PathBuf,
    /// Disks there from boot, in slots [`FIRST_DISK`](super::FIRST_DISK) and after.
    pub disks: Vec<Disk>,
    /// Empty slots after those, for [`Sandbox::attach_disk`](super::Sandbox::attach_disk).
    pub spare_disks: u8,
    /// What its containers are connected by, if that is more than loopback; else each has a loopback of its own, or the one
    /// it joins. The guest follows what changes there.
    pub network: Option<Network>,
    /// Further words of the guest kernel's command line.
    pub cmdline: String,
    /// Containers may be given seeds: the guest has no source of randomness that cannot be replaced.
    pub seeded: bool,
    /// Longest time from start to the agent's hello. The limits of all that follows go by it: see [`Pace`](crate::pace::Pace).
    pub boot_timeout: Duration,
    /// The VMM's, when the host is out of memory: -1000 to 1000 (proc(5)), the higher the sooner it is ended. Not below
    /// our own, which only a privileged process could give it.
    pub oom_score_adj: i32,
    /// The program of its file server, which is started when the first container has a share. Without one there can
    /// be no [`ContainerConfig::shares`].
    pub fsd: Option<PathBuf>,
}

/// A container to be created.
#[derive(Debug)]
pub struct ContainerConfig {
    pub id: Id,
    /// As the caller has it; [`crate::spec::guest_spec`] makes it the guest's.
    pub spec: Spec,
    pub rootfs: RootFs,
    /// Where on the host what it writes is to be when it has ended; for an overlay on [`Upper::Kept`].
    pub upper: Option<HostUpper>,
    pub stdio: Stdio,
    /// Files of the host that the guest gets a copy of. Binds of others are refused.
    pub files: Vec<HostFile>,
    /// Binds of what the guest has of its own: source in the spec, source in the guest.
    pub binds: Vec<(String, String)>,
    /// Binds of directories and files of the host.
    pub shares: Vec<Share>,
    /// The container whose namespaces are those that the spec names by path; without one that is refused.
    pub joins: Option<Id>,
    /// A PID 1 of the agent's stays before the process: it reaps, and passes signals on (docker's `--init`).
    pub init: bool,
    pub fixed: Fixed,
}

/// What is given to a container where otherwise each run has its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fixed {
    /// What the guest's clock shows when the container starts.
    pub clock: Option<SystemTime>,
    /// Where the container's random numbers come from; its sandbox must be [`SandboxConfig::seeded`].
    pub seed: Option<[u8; 32]>,
}

/// A small file, as it was when it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFile {
    /// Source of bind mounts in the spec.
    pub source: String,
    pub content: Vec<u8>,
    pub mode: u32,
}

/// A further process to be created in a container.
#[derive(Debug)]
pub struct ExecConfig {
    pub container: Id,
    pub id: Id,
    pub process: Process,
    pub stdio: Stdio,
}

/// A shell to be created in the guest itself, beside a container, with which it ends.
#[derive(Debug)]
pub struct ConsoleConfig {
    pub container: Id,
    pub id: Id,
    /// Width and height in characters, if it gets a terminal.
    pub size: Option<(u16, u16)>,
}

/// Where a container's root file system lies, and the disks it has besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootFs {
    /// Read-only file systems, top first. With none, the root is the disk of [`Upper::Kept`] itself.
    pub lowers: Vec<Lower>,
    pub upper: Upper,
    pub devices: Vec<DeviceDisk>,
    /// If files have other owners in the container than on the disk: those of mapped lowers, or of the root itself.
    pub owners: Option<IdMaps>,
}

/// Lines of the first id on a disk, the first id that it is shown as, and how many (user_namespaces(7)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMaps {
    pub uids: String,
    pub gids: String,
}

/// A block device of the host that a container was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceDisk {
    pub slot: u8,
    pub read_only: bool,
    /// Which of `linux.devices` of its spec it takes the place of.
    pub entries: Vec<usize>,
}

/// A read-only file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lower {
    pub slot: u8,
    /// "erofs" or "ext4".
    pub kind: String,
    /// Slots of the further devices of an EROFS that has its data on several.
    pub devices: Vec<u8>,
    /// Its files have the owners of [`RootFs::owners`].
    pub mapped: bool,
}

/// Where writes to a root file system go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upper {
    /// Nowhere: it is read-only.
    None,
    /// To an ext4 scratch disk in this slot.
    Disk(u8),
    /// To an ext4 disk in this slot that outlives the sandbox. What was written is there when the container
    /// has been deleted or the guest has switched itself off: one of both must come before the end of the VM.
    Kept(u8),
    /// To guest memory.
    Tmpfs,
}

impl RootFs {
    /// All slots it takes.
    pub fn slots(&self) -> Vec<u8> {
        let upper = match self.upper {
            Upper::Disk(slot) | Upper::Kept(slot) => Some(slot),
            Upper::None | Upper::Tmpfs => None,
        };
        let lowers =
            self.lowers.iter().flat_map(|l| std::iter::once(&l.slot).chain(&l.devices).copied());
        let devices = self.devices.iter().map(|device| device.slot);
        lowers.chain(upper).chain(devices).collect()
    }

    /// By the place in `linux.devices`.
    pub fn device_slots(&self) -> BTreeMap<usize, u8> {
        let slots =
            |disk: &DeviceDisk| disk.entries.iter().map(|&n| (n, disk.slot)).collect::<Vec<_>>();
        self.devices.iter().flat_map(slots).collect()
    }

    /// Some of what is written outlives the sandbox. It is on the host when the container has been deleted or the guest has
    /// switched itself off: one of both must come before the end of the VM.
    pub fn is_kept(&self) -> bool {
        matches!(self.upper, Upper::Kept(_)) || self.has_kept_devices()
    }

    pub fn has_kept_devices(&self) -> bool {
        self.devices.iter().any(|device| !device.read_only)
    }
}

/// The streams a process gets; the others are `/dev/null`. With a terminal there is no stderr.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}
