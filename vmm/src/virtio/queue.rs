//! A split virtqueue (virtio 1.2, 2.7) of which nothing the guest wrote is believed unchecked. Owned by
//! one device from activation to reset.
//!
//! `virtio_queue::Queue` does the ring indices; [`super::chain`] walks along the descriptors.

use std::{
    collections::VecDeque,
    sync::atomic::{Ordering, fence},
};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{
    chain::{Chain, DESCRIPTOR_SIZE, RingError, Table},
    interrupt::Interrupt,
};
use crate::memory::GuestMemory;

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

/// One activated queue.
#[derive(Debug)]
pub struct VirtQueue {
    ring: Queue,
    indirect: bool,
    /// Heads taken from the available ring and not yet handed to the device.
    taken: VecDeque<u16>,
    /// By head: taken, and not yet in the used ring.
    in_flight: Vec<bool>,
    event_idx: bool,
    /// The used ring's index when the driver was last told, or need not be.
    notified: u16,
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
            event_idx: features.event_idx,
            notified: 0,
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
        Chain::walk(memory, &self.table(), head).map(Some)
    }

    /// Undoes the last [`pop`](Self::pop): nothing was done with the chain.
    pub fn put_back(&mut self, chain: &Chain) {
        self.taken.push_front(chain.head());
    }

    /// Puts a chain into the used ring; `written` is how many bytes of it the device wrote (2.7.8).
    pub fn complete(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        written: u32,
    ) -> Result<(), RingError> {
        self.in_flight[usize::from(chain.head())] = false;
        self.ring.add_used(memory, chain.head(), written).map_err(RingError::Used)
    }

    /// Puts several chains, each with its `written`, into the used ring so that the driver sees all or
    /// none (5.1.6.4): the last one moves the index.
    pub fn complete_together(
        &mut self,
        memory: &GuestMemory,
        chains: &[(Chain, u32)],
    ) -> Result<(), RingError> {
        let Some(((last, written), others)) = chains.split_last() else { return Ok(()) };
        for (chain, written) in others {
            let next = self.ring.next_used();
            let slot = u64::from(next % self.ring.size());
            // The head in the lower half, the length in the upper.
            let element = u64::from(chain.head()) | u64::from(*written) << 32;
            memory
                .write_obj(element.to_le(), GuestAddress(self.ring.used_ring() + 4 + 8 * slot))
                .map_err(|e| RingError::Used(virtio_queue::Error::GuestMemory(e)))?;
            self.ring.set_next_used(next.wrapping_add(1));
            self.in_flight[usize::from(chain.head())] = false;
        }
        self.complete(memory, last, *written)
    }

    /// One interrupt for all that was completed since the last call, if the driver wants one (2.7.10).
    pub fn notify(&mut self, memory: &GuestMemory, interrupt: &Interrupt) -> Result<(), RingError> {
        let (used, before) = (self.ring.next_used(), self.notified);
        self.notified = used;
        if used != before && self.wants_interrupt(memory, before, used)? {
            interrupt.signal_used();
        }
        Ok(())
    }

    /// How many entries it has.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Whether the used ring's index passed `used_event` on its way from `before` to `used` (2.7.7.2).
    fn wants_interrupt(
        &self,
        memory: &GuestMemory,
        before: u16,
        used: u16,
    ) -> Result<bool, RingError> {
        if !self.event_idx {
            return Ok(true);
        }
        // The index is written before the driver's wish is read.
        fence(Ordering::SeqCst);
        let at = self.ring.avail_ring() + 4 + 2 * u64::from(self.ring.size());
        let event = memory
            .load::<u16>(GuestAddress(at), Ordering::Relaxed)
            .map_err(|e| RingError::Available(virtio_queue::Error::GuestMemory(e)))?;
        Ok(used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before))
    }

    fn table(&self) -> Table {
        let size = self.ring.size();
        Table { address: self.ring.desc_table(), size, indirect: self.indirect }
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
