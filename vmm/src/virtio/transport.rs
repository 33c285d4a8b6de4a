//! The MMIO transport (virtio 1.2, 4.2.2): the registers of one device. Owns what the driver wrote
//! ([`driver`]) and the events of the queues; only vCPU threads change it, through [`BusDevice`].
//!
//! At `DRIVER_OK` the queue registers become [`VirtQueue`]s and go to the device; until the reset they are
//! deaf. Queues that cannot be used mean `DEVICE_NEEDS_RESET` at once. Whatever else the driver does out of
//! turn is ignored and counted.

pub mod driver;

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard},
};

use virtio_bindings::{virtio_config::*, virtio_mmio::*, virtio_ring::*};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Active, SharedDevice, VirtioDevice,
    fault::{DeviceFault, FaultReporter, FaultSink},
    interrupt::Interrupt,
    lock,
    queue::{RingFeatures, VirtQueue},
    worker::{Seat, Worker},
};
use crate::{bus::BusDevice, memory::GuestMemory};
use driver::DriverState;

/// Bytes of address space of one transport.
pub const MMIO_SIZE: u64 = 0x1000;
/// QueueNotify: a kick is a 4-byte write of the queue's index here, best caught by an ioeventfd.
pub const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"AMPL");
const CONFIG_SPACE: u64 = VIRTIO_MMIO_CONFIG as u64;
/// What the transport offers for every device.
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// The registers of one device.
pub struct MmioTransport {
    device: SharedDevice,
    interrupt: Arc<Interrupt>,
    kicks: Arc<[EventFd]>,
    faults: Arc<FaultReporter>,
    memory: GuestMemory,
    offered: u64,
    max_sizes: &'static [u16],
    driver: DriverState,
    /// DeviceFeaturesSel.
    offered_select: u32,
    ignored: u64,
}

impl MmioTransport {
    /// `name` is for the reports to `faults`.
    pub fn new(
        name: &str,
        device: SharedDevice,
        memory: GuestMemory,
        faults: FaultSink,
    ) -> io::Result<Self> {
        let guard = lock(&*device);
        let max_sizes = guard.queue_max_sizes();
        let offered = guard.features() | RING_FEATURES;
        let interrupt = guard.interrupt().clone();
        drop(guard);
        let kicks =
            max_sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            interrupt,
            kicks,
            faults: Arc::new(FaultReporter::new(name, faults)),
            memory,
            offered,
            max_sizes,
            driver: DriverState::new(max_sizes.len()),
            offered_select: 0,
            ignored: 0,
        })
    }

    /// One event for each queue, to register as ioeventfds at [`NOTIFY_OFFSET`] with the index as datamatch.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// To register as irqfd, edge-triggered.
    pub fn irq(&self) -> &EventFd {
        self.interrupt.event()
    }

    /// The device's subscriber to the event loop. One is enough.
    pub fn worker(&self) -> Worker {
        let queues = self.lock().own_queues();
        self.worker_of(self.device.clone(), queues)
    }

    /// One to another event loop, for queues that a part of the device serves by itself.
    pub fn worker_of<S: Seat + ?Sized>(
        &self,
        seat: Arc<Mutex<S>>,
        queues: Vec<usize>,
    ) -> Worker<S> {
        Worker {
            seat,
            queues,
            interrupt: self.interrupt.clone(),
            kicks: self.kicks.clone(),
            faults: self.faults.clone(),
        }
    }

    /// Accesses that meant nothing and did nothing.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    fn read_register(&mut self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.lock().device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => word(self.offered, self.offered_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                self.max_sizes.get(self.driver.selected()).copied().map_or(0, u32::from)
            }
            VIRTIO_MMIO_QUEUE_READY => {
                u32::from(self.driver.selected_queue().is_some_and(|q| q.ready))
            }
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.pending(),
            VIRTIO_MMIO_STATUS => self.status(),
            // No shared memory region has length -1 (4.2.2.1).
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.generation(),
            _ => {
                self.ignored += 1;
                0
            }
        }
    }

    /// `None` if the write meant nothing.
    fn write_register(&mut self, offset: u32, value: u32) -> Option<()> {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.offered_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver.select_features(value),
            VIRTIO_MMIO_DRIVER_FEATURES => return self.driver.accept_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.driver.select_queue(value),
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                // A full eventfd is a pending kick: nothing is lost.
                let _ = self.kicks.get(value as usize)?.write(1);
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => return self.write_status(value),
            _ => return self.driver.write_queue_register(offset, value),
        }
        Some(())
    }

    /// `DEVICE_NEEDS_RESET` is not the driver's to change: it is the device's bit.
    fn write_status(&mut self, value: u32) -> Option<()> {
        match value {
            0 => self.reset(),
            _ => {
                if value & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
                    // As with features that were not offered: the driver finds the bit missing.
                    self.lock().queues_with(self.driver.features())?;
                }
                if self.driver.write_status(value & !VIRTIO_CONFIG_S_NEEDS_RESET, self.offered)? {
                    self.activate();
                }
            }
        }
        Some(())
    }

    fn status(&self) -> u32 {
        let needs_reset =
            if self.interrupt.needs_reset() { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 };
        self.driver.status() | needs_reset
    }

    fn activate(&mut self) {
        match self.build_queues() {
            Ok(queues) => {
                let (memory, features) = (self.memory.clone(), self.driver.features());
                self.lock().activate(Active { memory, features, queues });
            }
            Err(fault) => {
                self.interrupt.fail();
                self.faults.report(&fault);
            }
        }
    }

    fn build_queues(&self) -> Result<Vec<VirtQueue>, DeviceFault> {
        let features = RingFeatures {
            event_idx: self.driver.has_feature(VIRTIO_RING_F_EVENT_IDX),
            indirect: self.driver.has_feature(VIRTIO_RING_F_INDIRECT_DESC),
        };
        let count = self.lock().queues_with(self.driver.features()).unwrap_or(0);
        let queues = self.driver.queues().iter().zip(self.max_sizes).enumerate();
        queues
            .take(count)
            .map(|(queue, (config, &max))| {
                VirtQueue::new(config, max, features, &self.memory)
                    .map_err(|source| DeviceFault::Setup { queue, source })
            })
            .collect()
    }

    /// Returns when the work in flight is done, because that holds the lock.
    fn reset(&mut self) {
        let mut device = self.lock();
        device.reset();
        self.interrupt.reset();
        drop(device);
        self.driver = DriverState::new(self.max_sizes.len());
    }

    fn lock(&self) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
        lock(&*self.device)
    }
}

impl BusDevice for MmioTransport {
    /// Registers are 4 bytes wide and aligned (4.2.2.2); configuration space takes any width.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            self.lock().read_config(offset, data);
        } else if offset.is_multiple_of(4) && data.len() == 4 {
            data.copy_from_slice(&self.read_register(offset as u32).to_le_bytes());
        } else {
            self.ignored += 1;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let value = <[u8; 4]>::try_from(data).map(u32::from_le_bytes);
        let done = match value {
            Ok(value) if offset.is_multiple_of(4) && offset < CONFIG_SPACE => {
                self.write_register(offset as u32, value)
            }
            _ => None,
        };
        self.ignored += u64::from(done.is_none());
    }
}

/// Word `select` of a 64-bit feature set; further words are empty.
fn word(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
