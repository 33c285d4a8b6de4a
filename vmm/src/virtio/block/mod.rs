//! The block device (virtio 1.2, 5.2): one queue over a file or a host block device.
//!
//! - [`request`]: what the driver asks for, parsed and bounded; knows nothing of files
//! - [`disk`]: a backing descriptor and the I/O on it
//!
//! I/O is synchronous on the thread of the event loop, straight between the file and guest memory; the
//! file is never mapped, so that a file that shrinks is an error and not a signal.
//!
//! A slot may be empty: capacity 0, every request an I/O error. [`Block::attach`] puts a disk under it,
//! [`Block::detach`] takes it away; both tell the driver by a configuration change (5.2.5). Features are
//! fixed when the slot is made: one that starts with a read-only disk offers `VIRTIO_BLK_F_RO` for good,
//! one that starts empty offers the superset. A read-only disk attached to such a slot is therefore
//! read-only by the answer to the request: every write, discard, write-zeroes and flush is an I/O error.

pub mod disk;
pub mod request;

use std::{io, os::fd::OwnedFd, sync::Arc};

use ampoule_vmm_api::DiskConfig;
use virtio_bindings::{virtio_blk::*, virtio_ids::VIRTIO_ID_BLOCK};
use vm_memory::Bytes;

use super::{
    Active, Drained, VirtioDevice, Wake,
    chain::{Chain, RingError},
    copy_config,
    fault::DeviceFault,
    interrupt::Interrupt,
    queue::VirtQueue,
};
use crate::memory::GuestMemory;
use disk::{Disk, DiskError};
use request::{MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};

const QUEUE_SIZE: u16 = 256;
/// A request is a header, the data and a status: Linux believes this even for indirect tables.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Requests in one turn.
const TURN: usize = 64;
/// What the driver should ask for at once, in sectors: Linux reads twice as much ahead, so that a program starts with
/// fewer requests. Each is an interrupt and two VM exits.
const OPTIMAL_IO: u32 = (256 << 10) / SECTOR as u32;
/// Discards should start and end on these, in sectors: a page of the host's page cache.
const DISCARD_ALIGNMENT: u32 = 8;

const READ_ONLY: u64 = 1 << VIRTIO_BLK_F_RO;
const ALWAYS: u64 =
    1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_TOPOLOGY;
const WRITABLE: u64 =
    1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// Why a slot did not change.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    #[error("the slot already has a disk")]
    Occupied,
    #[error("the slot has no disk")]
    Empty,
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("the interrupt event cannot be made")]
    Interrupt(#[source] io::Error),
}

/// One slot, with or without a disk.
#[derive(Debug)]
pub struct Block {
    interrupt: Arc<Interrupt>,
    features: u64,
    disk: Option<Disk>,
    active: Option<Active>,
}

impl Block {
    /// A slot with a disk, or, without a descriptor, an empty one (of which `config` is ignored).
    pub fn new(config: &DiskConfig, backing: Option<OwnedFd>) -> Result<Self, SlotError> {
        let disk = backing.map(|fd| Disk::new(config, fd)).transpose()?;
        let read_only = disk.as_ref().is_some_and(Disk::is_read_only);
        Ok(Self {
            interrupt: Arc::new(Interrupt::new().map_err(SlotError::Interrupt)?),
            features: ALWAYS | if read_only { READ_ONLY } else { WRITABLE },
            disk,
            active: None,
        })
    }

    /// Puts a disk under an empty slot.
    pub fn attach(&mut self, config: &DiskConfig, backing: OwnedFd) -> Result<(), SlotError> {
        if self.disk.is_some() {
            return Err(SlotError::Occupied);
        }
        self.disk = Some(Disk::new(config, backing)?);
        self.interrupt.config_changed(self.active.is_some());
        Ok(())
    }

    /// Takes the disk away. No request is in flight, and later ones fail; what was not flushed is in the
    /// host's page cache.
    pub fn detach(&mut self) -> Result<(), SlotError> {
        self.disk.take().ok_or(SlotError::Empty)?;
        self.interrupt.config_changed(self.active.is_some());
        Ok(())
    }

    /// `struct virtio_blk_config` (5.2.4) up to `write_zeroes_may_unmap` and its padding.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.as_ref().map_or(0, Disk::sectors).to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(28, &OPTIMAL_IO.to_le_bytes());
        if self.features & WRITABLE != 0 {
            put(36, &MAX_RANGE_SECTORS.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &DISCARD_ALIGNMENT.to_le_bytes());
            put(48, &MAX_RANGE_SECTORS.to_le_bytes());
            put(52, &MAX_RANGES.to_le_bytes());
            put(56, &[1]);
        }
        config
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config(), offset, data);
    }

    fn activate(&mut self, active: Active) {
        self.active = Some(active);
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn process(&mut self, _wake: Wake) -> Result<Drained, DeviceFault> {
        let Some(Active { memory, queues, .. }) = &mut self.active else {
            return Ok(Drained::Empty);
        };
        drain(memory, &mut queues[0], self.disk.as_mut(), &self.interrupt)
            .map_err(|source| DeviceFault::Ring { queue: 0, source })
    }
}

/// Serves the requests of one turn.
fn drain(
    memory: &GuestMemory,
    queue: &mut VirtQueue,
    mut disk: Option<&mut Disk>,
    interrupt: &Interrupt,
) -> Result<Drained, RingError> {
    for _ in 0..TURN {
        let Some(chain) = queue.pop(memory)? else {
            queue.notify(memory, interrupt)?;
            return Ok(Drained::Empty);
        };
        queue.complete(memory, &chain, serve(memory, &chain, disk.as_deref_mut()))?;
    }
    queue.notify(memory, interrupt)?;
    Ok(Drained::More)
}

/// Does one request and writes its status, the last writable byte (5.2.6); says how many bytes were
/// written. A chain without a place for the status is used unanswered.
fn serve(memory: &GuestMemory, chain: &Chain, disk: Option<&mut Disk>) -> u32 {
    let Some(status) = chain.last_writable() else { return 0 };
    let outcome = request::parse(memory, chain).and_then(|operation| match disk {
        Some(disk) => disk.execute(operation),
        None => Err(request::Refusal::IoError),
    });
    let (code, written) = match outcome {
        Ok(written) => (VIRTIO_BLK_S_OK, written),
        Err(refusal) => (refusal.status(), 0),
    };
    memory.write_obj(code as u8, status).map_or(0, |()| written + 1)
}

#[cfg(test)]
mod tests;
