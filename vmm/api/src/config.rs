//! What a VM is made of. Descriptors are not in here: they travel beside the message, in the order
//! [`Request::Boot`](crate::Request::Boot) gives.

use serde::{Deserialize, Serialize};

/// Most vCPUs a VM can have (the MP table and the kernel are built for it).
pub const MAX_VCPUS: u8 = 16;
/// Least guest memory that boots the kernel and the agent, in MiB.
pub const MIN_MEMORY_MIB: u32 = 64;
/// Most virtio-blk slots, attached and spare together: `/dev/vda` to `/dev/vdp`.
pub const MAX_DISKS: usize = 16;
/// Most virtio-blk slots, network devices and shares together: each has an interrupt of its own.
pub const MAX_SLOTS: usize = 17;
/// Most pairs of queues of a network device: each further one has a thread of the VMM's.
pub const MAX_QUEUE_PAIRS: u8 = 4;
/// Least MTU of a network device: what IPv4 cannot do without (RFC 791).
pub const MIN_MTU: u16 = 68;
/// Most vsock streams that may be asked for in one boot message.
pub const MAX_BOOT_STREAMS: usize = 16;

/// Everything that is fixed at boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest RAM in MiB, at least [`MIN_MEMORY_MIB`].
    pub memory_mib: u32,
    /// Words for the kernel command line besides those the VMM writes itself.
    pub cmdline: String,
    /// Disks in slot order: slot 0 is `/dev/vda`, the guest image. One descriptor each.
    pub disks: Vec<DiskConfig>,
    /// Further slots with capacity 0, for [`Request::AttachDisk`](crate::Request::AttachDisk).
    pub spare_disks: u8,
    /// The guest's vsock context id, 3 or more.
    pub guest_cid: u32,
    /// Host ports the guest may connect to, once each. One stream descriptor each.
    pub listen: Vec<u32>,
    /// Keep the processor's own random numbers (RDRAND, RDSEED) from the guest.
    pub hide_random: bool,
    /// Network devices, in the order in which the guest finds them. One tap descriptor for each pair of queues.
    pub nets: Vec<NetConfig>,
    /// A virtio-fs device named [`SHARE_TAG`](crate::guest::SHARE_TAG). Its descriptor is a `SOCK_SEQPACKET` socket of
    /// which each packet is one FUSE message; the other end is `ampoule-fsd`'s.
    pub share: bool,
}

/// One virtio-net device. Its descriptors are the queues of one tap, made with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`,
/// and with `IFF_MULTI_QUEUE` if there are several; the VMM sets the size of its header and its offloads, and which queues
/// are attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// The guest's MAC address, unicast. Frames from any other are not sent.
    pub mac: [u8; 6],
    /// The largest IP packet, [`MIN_MTU`] or more. Longer frames from the guest are not sent, but for those
    /// that the host cuts into segments.
    pub mtu: u16,
    /// The guest finds it at its boot; else its window has no device until [`Request::PlugNet`](crate::Request::PlugNet).
    pub plugged: bool,
    /// Of queues, 1 to [`MAX_QUEUE_PAIRS`].
    pub pairs: u8,
    /// What the guest may send.
    pub from_guest: RateLimit,
    /// What the guest is given.
    pub to_guest: RateLimit,
}

/// How fast frames may pass; those that come too early wait. By default as fast as they come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// Bytes of frames.
    pub bytes: Option<Rate>,
    /// Frames as the guest hands them over or gets them: a long one that the host cuts into segments
    /// counts once.
    pub packets: Option<Rate>,
}

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// In the long run, at least 1.
    pub per_second: u64,
    /// At once after a rest, at least 1.
    pub burst: u64,
}

/// One virtio-blk device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// What `VIRTIO_BLK_T_GET_ID` answers: ASCII, at most 20 bytes (virtio 1.2, 5.2.6.1).
    pub id: String,
    /// Offer `VIRTIO_BLK_F_RO` and fail every write. The descriptor should be read-only too.
    pub read_only: bool,
}
