//! A descriptor chain (virtio 1.2, 2.7.5), copied out of guest memory: each descriptor is read once, then
//! checked, then believed.
//!
//! The walk is our own because `virtio_queue`'s iterator ends without a word on a broken chain, and here a
//! broken chain is a fault of the ring. What is *in* the buffers is another matter: a bad address is the
//! request's error (see [`super::buffers`]).

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use super::buffers::{BadBuffer, Buffers};
use crate::memory::GuestMemory;

/// Longest chain in bytes: 2^32 (2.7.5.2).
const MAX_CHAIN_BYTES: u64 = 1 << 32;
pub const DESCRIPTOR_SIZE: u64 = 16;

/// How a ring can be corrupt.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error("the available ring cannot be followed")]
    Available(#[source] virtio_queue::Error),
    #[error("the used ring cannot be written")]
    Used(#[source] virtio_queue::Error),
    #[error("descriptor {0} is beyond the end of its table")]
    IndexRange(u16),
    #[error("descriptor chain {0} was made available twice")]
    InFlight(u16),
    #[error("descriptor {index} of the table at {table:#x} cannot be read")]
    Unreadable { table: u64, index: u16 },
    #[error("descriptor chain {0} has more entries than its queue")]
    TooManyEntries(u16),
    #[error("descriptor chain {0} is longer than 2^32 bytes")]
    TooManyBytes(u16),
    #[error("an indirect descriptor although the feature was not negotiated")]
    IndirectNotNegotiated,
    #[error("an indirect descriptor in an indirect table, or one with a next")]
    IndirectMisplaced,
    #[error("an indirect table of {0} bytes")]
    IndirectSize(u32),
}

/// A queue's descriptor table. No chain has more than `size` entries, wherever they lie.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    pub address: u64,
    pub size: u16,
    /// Whether its descriptors may refer to indirect tables.
    pub indirect: bool,
}

impl Table {
    fn read(&self, memory: &GuestMemory, index: u16) -> Result<Descriptor, RingError> {
        if index >= self.size {
            return Err(RingError::IndexRange(index));
        }
        GuestAddress(self.address)
            .checked_add(u64::from(index) * DESCRIPTOR_SIZE)
            .and_then(|address| memory.read_obj(address).ok())
            .ok_or(RingError::Unreadable { table: self.address, index })
    }

    /// The indirect table that a descriptor of this one refers to (2.7.5.3).
    fn enter(&self, negotiated: bool, descriptor: &Descriptor) -> Result<Self, RingError> {
        if !negotiated {
            return Err(RingError::IndirectNotNegotiated);
        }
        if !self.indirect || descriptor.has_next() {
            return Err(RingError::IndirectMisplaced);
        }
        let len = descriptor.len();
        match u16::try_from(u64::from(len) / DESCRIPTOR_SIZE) {
            Ok(size)
                if u64::from(len) == u64::from(size) * DESCRIPTOR_SIZE
                    && (1..=self.size).contains(&size) =>
            {
                Ok(Self { address: descriptor.addr().0, size, indirect: false })
            }
            _ => Err(RingError::IndirectSize(len)),
        }
    }
}

/// One chain: at least one descriptor, at most as many as its queue has entries.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    descriptors: Vec<Descriptor>,
}

impl Chain {
    /// Follows a chain from its head to its end.
    pub fn walk(memory: &GuestMemory, queue: &Table, head: u16) -> Result<Self, RingError> {
        let mut chain = Self { head, descriptors: Vec::new() };
        let (mut table, mut index, mut bytes) = (*queue, head, 0);
        loop {
            let descriptor = table.read(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                table = table.enter(queue.indirect, &descriptor)?;
                index = 0;
                continue;
            }
            bytes += u64::from(descriptor.len());
            chain.descriptors.push(descriptor);
            if bytes > MAX_CHAIN_BYTES {
                return Err(RingError::TooManyBytes(head));
            }
            if !descriptor.has_next() {
                return Ok(chain);
            }
            if chain.descriptors.len() >= usize::from(queue.size) {
                return Err(RingError::TooManyEntries(head));
            }
            index = descriptor.next();
        }
    }

    /// How many descriptors it has, at least one.
    pub fn entries(&self) -> usize {
        self.descriptors.len()
    }

    /// The index by which the driver knows it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver wrote for the device.
    pub fn readable<'m>(&self, memory: &'m GuestMemory) -> Result<Buffers<'m>, BadBuffer> {
        Buffers::new(memory, self.descriptors.iter().filter(|d| !d.is_write_only()))
    }

    /// Where the device may write.
    pub fn writable<'m>(&self, memory: &'m GuestMemory) -> Result<Buffers<'m>, BadBuffer> {
        Buffers::new(memory, self.descriptors.iter().filter(|d| d.is_write_only()))
    }

    /// Whether all readable buffers come before the writable ones, as they must (2.7.4.2).
    pub fn is_ordered(&self) -> bool {
        self.descriptors.is_sorted_by_key(|d| d.is_write_only())
    }

    /// The address of the last byte the device may write, in guest RAM or not.
    pub fn last_writable(&self) -> Option<GuestAddress> {
        let last = self.descriptors.iter().rfind(|d| d.is_write_only() && d.len() > 0)?;
        last.addr().checked_add(u64::from(last.len()) - 1)
    }
}
