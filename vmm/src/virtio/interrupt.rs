//! What a device tells the guest. Both sides of a device change it: the transport acknowledges and resets,
//! the device signals; every field is its own atomic, and none is read to decide about another.

use std::{
    io,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// InterruptStatus, ConfigGeneration and the `DEVICE_NEEDS_RESET` bit (virtio 1.2, 4.2.2 and 2.1), with
/// the event that raises the interrupt line (edge-triggered).
#[derive(Debug)]
pub struct Interrupt {
    event: EventFd,
    pending: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
}

impl Interrupt {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::new(EFD_NONBLOCK)?,
            pending: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        })
    }

    /// The event to register as irqfd.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Used buffers wait in a ring.
    pub fn signal_used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The configuration space changed. `live` says whether there is a driver to be told (2.1.2: none
    /// before `DRIVER_OK`).
    pub fn config_changed(&self, live: bool) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        if live {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// The device cannot go on (2.1.1): sets the status bit and tells the driver.
    pub fn fail(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// InterruptStatus.
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::Acquire)
    }

    /// InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.pending.fetch_and(!bits, Ordering::AcqRel);
    }

    /// ConfigGeneration.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// The driver reset the device.
    pub fn reset(&self) {
        self.needs_reset.store(false, Ordering::Release);
        self.pending.store(0, Ordering::Release);
    }

    /// Always an edge, even if the bit is set: the driver may be about to acknowledge it.
    fn raise(&self, bit: u32) {
        self.pending.fetch_or(bit, Ordering::AcqRel);
        // A full eventfd is a pending interrupt: nothing is lost.
        let _ = self.event.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_stays_pending_until_it_is_acknowledged() {
        let interrupt = Interrupt::new().unwrap();
        interrupt.signal_used();
        interrupt.config_changed(false);
        assert_eq!((interrupt.pending(), interrupt.generation()), (VIRTIO_MMIO_INT_VRING, 1));
        interrupt.config_changed(true);
        assert_eq!(interrupt.pending(), VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
        assert_eq!(interrupt.event().read().unwrap(), 2);
        interrupt.acknowledge(VIRTIO_MMIO_INT_VRING);
        assert_eq!(interrupt.pending(), VIRTIO_MMIO_INT_CONFIG);
        interrupt.fail();
        assert!(interrupt.needs_reset());
        interrupt.reset();
        assert_eq!((interrupt.pending(), interrupt.needs_reset()), (0, false));
    }
}
