//! What a driver says about a frame (`struct virtio_net_hdr_v1`, virtio 1.2, 5.1.6) and the frame's first
//! bytes: pure checks of a copy, before the host's network stack has to believe any of it.

use virtio_bindings::virtio_net::*;

/// Bytes of the header before every frame, in both directions.
pub const HEADER_LEN: usize = 12;
/// Where in it `num_buffers` lies.
pub const NUM_BUFFERS: usize = 10;
/// Bytes of an Ethernet header.
pub const ETHERNET_LEN: usize = 14;
/// What of a packet is copied and checked.
pub const HEAD_LEN: usize = HEADER_LEN + ETHERNET_LEN;
/// The longest frame there is: an IP packet of 64 KiB (5.1.6.3.1).
pub const MAX_FRAME: usize = ETHERNET_LEN + 65536;

/// VLAN tags are the host's to give: a guest is on one network only.
const TAGGED: [u16; 2] = [0x8100, 0x88a8];
/// Where the checksum lies in a TCP and in a UDP header.
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

/// What a guest may send: its own address, whole packets up to the MTU, the offloads it has negotiated.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub mac: [u8; 6],
    pub mtu: u16,
    /// The accepted feature bits.
    pub features: u64,
}

impl Rules {
    /// Whether the host is given a frame of `len` bytes that begins with `head`.
    pub fn allow(&self, head: &[u8; HEAD_LEN], len: usize) -> bool {
        let (header, ethernet) = head.split_at(HEADER_LEN);
        let kind = u16::from_be_bytes([ethernet[12], ethernet[13]]);
        (ETHERNET_LEN..=MAX_FRAME).contains(&len)
            && ethernet[6..12] == self.mac
            && !TAGGED.contains(&kind)
            && self.allow_offload(&Offload::parse(header), len)
    }

    fn allow_offload(&self, offload: &Offload, len: usize) -> bool {
        match offload.flags {
            0 => {}
            VIRTIO_NET_HDR_F_NEEDS_CSUM if self.has(VIRTIO_NET_F_CSUM) => {
                let end = offload.csum_start + offload.csum_offset + 2;
                if offload.csum_start < ETHERNET_LEN || end > len {
                    return false;
                }
            }
            _ => return false,
        }
        let longest = usize::from(self.mtu) + ETHERNET_LEN;
        if offload.gso_type == VIRTIO_NET_HDR_GSO_NONE {
            return len <= longest;
        }
        // A segment is the headers, which end after `csum_start`, and `gso_size` bytes.
        self.allow_gso(offload)
            && offload.flags == VIRTIO_NET_HDR_F_NEEDS_CSUM
            && offload.gso_size > 0
            && offload.csum_start + offload.gso_size <= longest
            && offload.hdr_len <= len
    }

    /// Whether the kind was negotiated, and its checksum is where such packets have it.
    fn allow_gso(&self, offload: &Offload) -> bool {
        let ecn = offload.gso_type & VIRTIO_NET_HDR_GSO_ECN != 0;
        let (feature, checksum) = match offload.gso_type & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_TCPV4 => (VIRTIO_NET_F_HOST_TSO4, TCP_CHECKSUM),
            VIRTIO_NET_HDR_GSO_TCPV6 => (VIRTIO_NET_F_HOST_TSO6, TCP_CHECKSUM),
            VIRTIO_NET_HDR_GSO_UDP_L4 if !ecn => (VIRTIO_NET_F_HOST_USO, UDP_CHECKSUM),
            _ => return false,
        };
        self.has(feature)
            && (!ecn || self.has(VIRTIO_NET_F_HOST_ECN))
            && offload.csum_offset == checksum
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }
}

/// The fields of the header that mean something on the way to the host.
struct Offload {
    flags: u32,
    gso_type: u32,
    hdr_len: usize,
    gso_size: usize,
    csum_start: usize,
    csum_offset: usize,
}

impl Offload {
    fn parse(header: &[u8]) -> Self {
        let field = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
        Self {
            flags: header[0].into(),
            gso_type: header[1].into(),
            hdr_len: field(2),
            gso_size: field(4),
            csum_start: field(6),
            csum_offset: field(8),
        }
    }
}
