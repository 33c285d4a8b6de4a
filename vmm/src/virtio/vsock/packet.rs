//! The vsock packet: a header, and in RW packets a payload (virtio 1.2, 5.10.6). Pure: parsing and writing.

use crate::{
    memory::GuestMemory,
    virtio::{buffers::Buffers, chain::Chain},
};

/// Bytes of `struct virtio_vsock_hdr`.
pub const HEADER_LEN: usize = 44;
/// Longest payload we take or send; Linux makes no longer ones (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_PAYLOAD: u32 = 64 * 1024;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// The only socket type we serve (5.10.6: `VIRTIO_VSOCK_TYPE_STREAM`).
pub const TYPE_STREAM: u16 = 1;

pub const OP_REQUEST: u16 = 1;
pub const OP_RESPONSE: u16 = 2;
pub const OP_RST: u16 = 3;
pub const OP_SHUTDOWN: u16 = 4;
pub const OP_RW: u16 = 5;
pub const OP_CREDIT_UPDATE: u16 = 6;
pub const OP_CREDIT_REQUEST: u16 = 7;

/// SHUTDOWN: the sender will receive no more.
pub const SHUTDOWN_RCV: u32 = 1;
/// SHUTDOWN: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// Every field of the header, in its order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub socket_type: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            socket_type: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.socket_type.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet, from whomever it was meant for.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            socket_type: self.socket_type,
            op: OP_RST,
            ..Self::default()
        }
    }

    /// Only SHUTDOWN has flags on a stream; only RW has a payload, and a bounded one.
    fn is_well_formed(&self, payload: usize) -> bool {
        let flags = if self.op == OP_SHUTDOWN { SHUTDOWN_BOTH } else { 0 };
        let longest = if self.op == OP_RW { MAX_PAYLOAD } else { 0 };
        self.flags & !flags == 0 && self.len <= longest && self.len as usize == payload
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

/// A packet from the guest.
#[derive(Debug)]
pub struct Packet<'m> {
    pub header: Header,
    pub payload: Buffers<'m>,
}

/// Why a chain is not a packet.
#[derive(Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Not even a header: there is nobody to answer.
    NoHeader,
    /// A header that does not fit its payload, its flags or its type.
    Bad(Header),
}

/// Parses a chain of the transmit queue, cut into buffers in any way.
pub fn parse<'m>(memory: &'m GuestMemory, chain: &Chain) -> Result<Packet<'m>, Malformed> {
    let readable = chain.readable(memory).map_err(|_| Malformed::NoHeader)?;
    let (head, payload) = readable.split_at(HEADER_LEN);
    let mut bytes = [0; HEADER_LEN];
    if head.copy_to(&mut bytes) != HEADER_LEN {
        return Err(Malformed::NoHeader);
    }
    let header = Header::from_bytes(&bytes);
    if !header.is_well_formed(payload.len()) {
        return Err(Malformed::Bad(header));
    }
    Ok(Packet { header, payload })
}
