//! A split virtqueue (virtio 1.2, 2.7) of which nothing the guest wrote is believed unchecked. Owned by
//! one device from activation to reset.
//!
//! `virtio_queue::Queue` does the ring indices; the walk along the descriptors is done here, because that
//! crate's iterator ends without a word on a broken chain, and a broken chain is a fault. What is *in* the
//! buffers is another matter: a bad address is the request's error, not the ring's (see [`super::buffers`]).

use std::collections::VecDeque;

use virtio_queue::{Queue, QueueOwnedT, QueueT, desc::split::Descriptor};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::{
    buffers::{BadBuffer, Buffers},
    interrupt::Interrupt,
};
use crate::memory::GuestMemory;

/// Longest chain in bytes: 2^32 (2.7.5.2).
const MAX_CHAIN_BYTES: u64 = 1 << 32;
const DESCRIPTOR_SIZE: u64 = 16;

/// The queue registers as the driver wrote them, unchecked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueConfig {
    pub size: u32,
    pub ready: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// The ring features the driver accepted.
#[derive(Clone, Copy, Debug)]
pub struct RingFeatures {
    pub event_idx: bool,
    pub indirect: bool,
}

/// Why a queue cannot be activated.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("the queue was not made ready")]
    NotReady,
    #[error("size {size} is not a power of 2 from 1 to {max}")]
    Size { size: u32, max: u16 },
    #[error("the {area} at {address:#x} is misaligned")]
    Misaligned { area: &'static str, address: u64 },
    #[error("the {area} at {address:#x} is not in guest memory")]
    OutsideMemory { area: &'static str, address: u64 },
    #[error("the descriptor table and the rings overlap")]
    Overlap,
}

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

/// One activated queue.
#[derive(Debug)]
pub struct VirtQueue {
    ring: Queue,
    indirect: bool,
    /// Heads taken from the available ring and not yet handed to the device.
    taken: VecDeque<u16>,
    /// By head: taken, and not yet in the used ring.
    in_flight: Vec<bool>,
    /// Something was used since the last interrupt.
    used: bool,
}

impl VirtQueue {
    /// Checks everything there is to check before the first use (2.7: alignment; no overlap; in RAM).
    pub fn new(
        config: &QueueConfig,
        max_size: u16,
        features: RingFeatures,
        memory: &GuestMemory,
    ) -> Result<Self, SetupError> {
        if !config.ready {
            return Err(SetupError::NotReady);
        }
        let bad_size = SetupError::Size { size: config.size, max: max_size };
        let Some(size) = u16::try_from(config.size).ok().filter(|&n| n <= max_size) else {
            return Err(bad_size);
        };
        let mut ring = Queue::new(max_size).map_err(|_| bad_size)?;
        ring.try_set_size(size)
            .map_err(|_| SetupError::Size { size: config.size, max: max_size })?;
        check_areas(config, u64::from(size), memory)?;
        ring.set_desc_table_address(low(config.descriptors), high(config.descriptors));
        ring.set_avail_ring_address(low(config.available), high(config.available));
        ring.set_used_ring_address(low(config.used), high(config.used));
        ring.set_event_idx(features.event_idx);
        ring.set_ready(true);
        Ok(Self {
            ring,
            indirect: features.indirect,
            taken: VecDeque::new(),
            in_flight: vec![false; usize::from(size)],
            used: false,
        })
    }

    /// The next chain. `None` means that the ring is empty and that the driver will kick.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, RingError> {
        if self.taken.is_empty() {
            self.take_available(memory)?;
        }
        if self.taken.is_empty()
            && self.ring.enable_notification(memory).map_err(RingError::Used)?
        {
            self.take_available(memory)?;
        }
        let Some(head) = self.taken.pop_front() else { return Ok(None) };
        self.walk(memory, head).map(Some)
    }

    /// Undoes the last [`pop`](Self::pop): nothing was done with the chain.
    pub fn put_back(&mut self, chain: &Chain) {
        self.taken.push_front(chain.head);
    }

    /// Puts a chain into the used ring; `written` is how many bytes of it the device wrote (2.7.8).
    pub fn complete(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        written: u32,
    ) -> Result<(), RingError> {
        self.in_flight[usize::from(chain.head)] = false;
        self.used = true;
        self.ring.add_used(memory, chain.head, written).map_err(RingError::Used)
    }

    /// One interrupt for all that was completed since the last call, if the driver wants one (2.7.10).
    pub fn notify(&mut self, memory: &GuestMemory, interrupt: &Interrupt) -> Result<(), RingError> {
        if !std::mem::take(&mut self.used) {
            return Ok(());
        }
        if self.ring.needs_notification(memory).map_err(RingError::Available)? {
            interrupt.signal_used();
        }
        Ok(())
    }

    /// Takes what is available now, at most as many chains as the queue has entries. None of them was
    /// used when the driver published them, so a head that is among them twice is a fault.
    fn take_available(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        for chain in self.ring.iter(memory).map_err(RingError::Available)? {
            let head = chain.head_index();
            match self.in_flight.get_mut(usize::from(head)) {
                None => return Err(RingError::IndexRange(head)),
                Some(true) => return Err(RingError::InFlight(head)),
                Some(free) => *free = true,
            }
            self.taken.push_back(head);
        }
        Ok(())
    }

    /// Copies a chain's descriptors, each read once.
    fn walk(&self, memory: &GuestMemory, head: u16) -> Result<Chain, RingError> {
        let size = self.ring.size();
        let mut table = Table { address: self.ring.desc_table(), entries: size, indirect: false };
        let mut chain = Chain { head, descriptors: Vec::new() };
        let (mut index, mut bytes) = (head, 0);
        loop {
            let descriptor = table.read(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                table = self.enter_indirect(&table, &descriptor)?;
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
            if chain.descriptors.len() >= usize::from(size) {
                return Err(RingError::TooManyEntries(head));
            }
            index = descriptor.next();
        }
    }

    /// Checks an indirect descriptor (2.7.5.3).
    fn enter_indirect(&self, table: &Table, descriptor: &Descriptor) -> Result<Table, RingError> {
        if !self.indirect {
            return Err(RingError::IndirectNotNegotiated);
        }
        if table.indirect || descriptor.has_next() {
            return Err(RingError::IndirectMisplaced);
        }
        let len = descriptor.len();
        let entries = u64::from(len) / DESCRIPTOR_SIZE;
        if u64::from(len) % DESCRIPTOR_SIZE != 0 || entries == 0 {
            return Err(RingError::IndirectSize(len));
        }
        match u16::try_from(entries) {
            Ok(entries) if entries <= self.ring.size() => {
                Ok(Table { address: descriptor.addr().0, entries, indirect: true })
            }
            _ => Err(RingError::IndirectSize(len)),
        }
    }
}

/// A descriptor table being walked: the queue's own, or an indirect one.
struct Table {
    address: u64,
    entries: u16,
    indirect: bool,
}

impl Table {
    fn read(&self, memory: &GuestMemory, index: u16) -> Result<Descriptor, RingError> {
        if index >= self.entries {
            return Err(RingError::IndexRange(index));
        }
        GuestAddress(self.address)
            .checked_add(u64::from(index) * DESCRIPTOR_SIZE)
            .and_then(|address| memory.read_obj(address).ok())
            .ok_or(RingError::Unreadable { table: self.address, index })
    }
}

/// A descriptor chain, copied out of guest memory.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    descriptors: Vec<Descriptor>,
}

impl Chain {
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

/// The three areas of a queue with their alignment and sizes (2.7): each in RAM, no two overlapping.
fn check_areas(config: &QueueConfig, n: u64, memory: &GuestMemory) -> Result<(), SetupError> {
    let areas = [
        ("descriptor table", config.descriptors, 16, DESCRIPTOR_SIZE * n),
        ("available ring", config.available, 2, 6 + 2 * n),
        ("used ring", config.used, 4, 6 + 8 * n),
    ];
    for (area, address, align, len) in areas {
        if address % align != 0 {
            return Err(SetupError::Misaligned { area, address });
        }
        if !memory.check_range(GuestAddress(address), len as usize) {
            return Err(SetupError::OutsideMemory { area, address });
        }
    }
    let mut ranges = areas.map(|(_, address, _, len)| (address, address + len));
    ranges.sort_unstable();
    match ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0) {
        true => Ok(()),
        false => Err(SetupError::Overlap),
    }
}

fn low(address: u64) -> Option<u32> {
    Some(address as u32)
}

fn high(address: u64) -> Option<u32> {
    Some((address >> 32) as u32)
}

#[cfg(test)]
mod tests;
