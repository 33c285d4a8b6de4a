//! A block request as the driver wrote it (virtio 1.2, 5.2.6): parsed, and bounded as far as that can be
//! done without knowing the disk. Pure: nothing here does I/O.

use virtio_bindings::virtio_blk::*;

use crate::{
    memory::GuestMemory,
    virtio::{buffers::Buffers, chain::Chain},
};

/// Bytes of a sector, the unit of every address and of the capacity.
pub const SECTOR: u64 = 512;
/// Longest range of one discard or write-zeroes, in sectors: 1 GiB, so that one request has a bound.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Ranges of one discard or write-zeroes.
pub const MAX_RANGES: u32 = 1;

/// Type, reserved, sector: le32, le32, le64.
const HEADER: usize = 16;
/// Sector, number of sectors, flags: le64, le32, le32.
const RANGE: usize = 16;

/// What a driver can ask for. Data is a whole number of sectors, and some.
#[derive(Debug)]
pub enum Operation<'m> {
    Read { sector: u64, into: Buffers<'m> },
    Write { sector: u64, from: Buffers<'m> },
    Flush,
    GetId { into: Buffers<'m> },
    Discard(Range),
    WriteZeroes { range: Range, unmap: bool },
}

/// Sectors of a discard or write-zeroes, at least 1 and at most [`MAX_RANGE_SECTORS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub sector: u64,
    pub sectors: u32,
}

/// Why a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    IoError,
    Unsupported,
}

impl Refusal {
    pub fn status(self) -> u32 {
        match self {
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }
    }
}

/// Parses a chain. Header and data may be cut into buffers in any way (2.7.4).
pub fn parse<'m>(memory: &'m GuestMemory, chain: &Chain) -> Result<Operation<'m>, Refusal> {
    let readable = chain.readable(memory).map_err(|_| Refusal::IoError)?;
    let writable = chain.writable(memory).map_err(|_| Refusal::IoError)?;
    let (header, from) = readable.split_at(HEADER);
    let mut bytes = [0; HEADER];
    if header.copy_to(&mut bytes) != HEADER || !chain.is_ordered() {
        return Err(Refusal::IoError);
    }
    let status_at = writable.len().checked_sub(1).ok_or(Refusal::IoError)?;
    let (into, _status) = writable.split_at(status_at);
    let sector = u64::from_le_bytes(field(&bytes, 8));
    match u32::from_le_bytes(field(&bytes, 0)) {
        VIRTIO_BLK_T_IN => Ok(Operation::Read { sector, into: whole_sectors(into)? }),
        VIRTIO_BLK_T_OUT => Ok(Operation::Write { sector, from: whole_sectors(from)? }),
        VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Operation::GetId { into }),
        VIRTIO_BLK_T_DISCARD => parse_discard(&from),
        VIRTIO_BLK_T_WRITE_ZEROES => parse_write_zeroes(&from),
        _ => Err(Refusal::Unsupported),
    }
}

fn whole_sectors(data: Buffers<'_>) -> Result<Buffers<'_>, Refusal> {
    match data.len() as u64 {
        0 => Err(Refusal::IoError),
        len if len % SECTOR != 0 => Err(Refusal::IoError),
        _ => Ok(data),
    }
}

/// The unmap flag is not one of a discard's (5.2.6.2).
fn parse_discard<'m>(data: &Buffers<'_>) -> Result<Operation<'m>, Refusal> {
    match parse_range(data)? {
        (range, 0) => Ok(Operation::Discard(range)),
        _ => Err(Refusal::Unsupported),
    }
}

fn parse_write_zeroes<'m>(data: &Buffers<'_>) -> Result<Operation<'m>, Refusal> {
    match parse_range(data)? {
        (range, 0) => Ok(Operation::WriteZeroes { range, unmap: false }),
        (range, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => {
            Ok(Operation::WriteZeroes { range, unmap: true })
        }
        _ => Err(Refusal::Unsupported),
    }
}

/// The one range, and its flags.
fn parse_range(data: &Buffers<'_>) -> Result<(Range, u32), Refusal> {
    let mut bytes = [0; RANGE];
    if data.len() != RANGE || data.copy_to(&mut bytes) != RANGE {
        return Err(Refusal::IoError);
    }
    let sectors = u32::from_le_bytes(field(&bytes, 8));
    let flags = u32::from_le_bytes(field(&bytes, 12));
    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
        return Err(Refusal::Unsupported);
    }
    if sectors == 0 || sectors > MAX_RANGE_SECTORS {
        return Err(Refusal::IoError);
    }
    Ok((Range { sector: u64::from_le_bytes(field(&bytes, 0)), sectors }, flags))
}

/// `N` bytes of 16 from `at`.
fn field<const N: usize>(bytes: &[u8; 16], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}
