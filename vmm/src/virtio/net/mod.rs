//! The network device (virtio 1.2, 5.1): one pair of queues over a tap.
//!
//! - [`frame`]: what the driver says about a frame, checked
//! - [`tap`]: the tap and the I/O on it
//! - [`limit`]: how fast frames may pass
//! - [`transmit`], [`receive`]: the two directions
//!
//! Nothing is dropped because somebody is slow: a full tap or a limit stops the transmit ring, a guest without buffers or a limit
//! stops the reading of the tap, where the host's queue fills up as before any slow link. What is dropped,
//! and counted, is what the guest may not send and what it can never receive.
//!
//! There is no control queue: the tap belongs to this guest alone, and gives it all there is.

pub mod frame;
pub mod limit;
pub mod receive;
pub mod tap;
pub mod transmit;

use std::{
    os::fd::{OwnedFd, RawFd},
    sync::Arc,
};

use ampoule_vmm_api::NetConfig;
use virtio_bindings::{virtio_ids::VIRTIO_ID_NET, virtio_net::*};

use super::{
    Active, Drained, VirtioDevice, Wake, copy_config, fault::DeviceFault, interrupt::Interrupt,
};
use frame::Rules;
use receive::Receiver;
pub use tap::NetError;
use tap::Tap;

/// Receive, transmit (5.1.2).
const QUEUE_SIZES: [u16; 2] = [256, 256];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// A window whose device is not there (4.2.2), which drivers pass by.
const NO_DEVICE: u32 = 0;

/// Besides the offloads.
const ALWAYS: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// The guest's interface, and the tap behind it.
#[derive(Debug)]
pub struct Net {
    interrupt: Arc<Interrupt>,
    tap: Tap,
    rules: Rules,
    plugged: bool,
    receiver: Option<Receiver>,
    active: Option<Active>,
    /// Frames of the guest's that were not sent.
    refused: u64,
}

impl Net {
    pub fn new(config: &NetConfig, tap: OwnedFd) -> Result<Self, NetError> {
        Self::with(config, Tap::new(config, tap)?)
    }

    fn with(config: &NetConfig, tap: Tap) -> Result<Self, NetError> {
        Ok(Self {
            interrupt: Arc::new(Interrupt::new().map_err(NetError::Interrupt)?),
            tap,
            rules: Rules { mac: config.mac, mtu: config.mtu, features: 0 },
            plugged: config.plugged,
            receiver: None,
            active: None,
            refused: 0,
        })
    }

    /// The guest finds it from now on, with this address and MTU.
    pub fn plug(&mut self, mac: [u8; 6], mtu: u16) {
        self.unplug();
        (self.rules.mac, self.rules.mtu, self.plugged) = (mac, mtu, true);
    }

    /// The guest finds it no more. A driver that still has it is not served.
    pub fn unplug(&mut self) {
        self.plugged = false;
        self.reset();
    }

    /// Frames dropped since the last reset, from the guest and to it.
    pub fn dropped(&self) -> [u64; 2] {
        [self.refused, self.receiver.as_ref().map_or(0, Receiver::dropped)]
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        if self.plugged { VIRTIO_ID_NET } else { NO_DEVICE }
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        ALWAYS | self.tap.features()
    }

    fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// `struct virtio_net_config` (5.1.4) up to `mtu`.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = if self.tap.is_up() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.rules.mac);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..].copy_from_slice(&self.rules.mtu.to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn activate(&mut self, active: Active) {
        if !self.plugged {
            return;
        }
        self.rules.features = active.features;
        self.tap.negotiated(active.features);
        self.receiver = Some(Receiver::new(active.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0));
        self.refused = 0;
        self.active = Some(active);
    }

    fn reset(&mut self) {
        self.active = None;
        self.receiver = None;
    }

    /// Both directions at each wake: the rings say what there is to do.
    fn process(&mut self, wake: Wake) -> Result<Drained, DeviceFault> {
        if wake == Wake::Backend {
            self.tap.poll();
        }
        let (Some(Active { memory, queues, .. }), Some(receiver)) =
            (&mut self.active, &mut self.receiver)
        else {
            return Ok(Drained::Empty);
        };
        let fault = |queue| move |source| DeviceFault::Ring { queue, source };
        let (tap, rules) = (&mut self.tap, &self.rules);
        let sent = transmit::pump(memory, &mut queues[TRANSMIT], tap, rules, &mut self.refused)
            .map_err(fault(TRANSMIT))?;
        let received = receiver.pump(memory, &mut queues[RECEIVE], tap).map_err(fault(RECEIVE))?;
        for (index, queue) in queues.iter_mut().enumerate() {
            queue.notify(memory, &self.interrupt).map_err(fault(index))?;
        }
        match tap.take_failure() {
            Some(error) => Err(DeviceFault::Backend(error)),
            None if sent == Drained::More => Ok(sent),
            None => Ok(received),
        }
    }

    fn backend(&self) -> Option<RawFd> {
        Some(self.tap.event())
    }
}

#[cfg(test)]
mod tests;
